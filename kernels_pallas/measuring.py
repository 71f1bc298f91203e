"""Measures on this machine how many times as fast as dense the product with a packed weight is: `speed`.

    speed(packed_weight, tokens=1)    # Speed(forward=1.9, note='measured here: 1.7 to 2.1 in 15 rounds')
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kernels_pallas.around import OPS
from sparsejax.advice.measured import Speed
from sparsejax.formats import PackedArray
from sparsejax.types import Array

ROUNDS, CALLS = 15, 5


def speed(form: PackedArray, tokens: int) -> Speed:
  """Returns how many times as fast as dense the product of `tokens` rows with one layer of `form` is here.

  Packed and dense product take turns on the default device for `ROUNDS` rounds. The time of a round is the median of
  `CALLS` calls. The speed is the median of the ratios, and `note` has their 10th and 90th percentile. A product that
  the op refuses has no speed, and `note` says why.
  """
  w = jax.tree.map(lambda a: a[(0,) * form.leading], form)
  dense, contracted = w.to_dense(), tuple(a % w.ndim for a in w.axes)
  sizes = [dense.shape[a] for a in contracted]
  x = jax.random.normal(jax.random.key(0), (tokens, math.prod(sizes))).astype(dense.dtype)
  if why := OPS[form.kind].refusal(x, w):
    return Speed(note=why)

  def product(x: Array, dense: Array) -> Array:
    axes = tuple(range(1, 1 + len(sizes)))
    return jax.lax.dot_general(x.reshape(tokens, *sizes), dense, ((axes, contracted), ((), ())))

  calls = functools.partial(jax.jit(product), x, dense), functools.partial(jax.jit(OPS[form.kind].multiply), x, w)
  low, ratio, high = np.percentile(_ratios(*calls), [10, 50, 90])
  return Speed(float(ratio), note=f'measured here: {low:.2f} to {high:.2f} in {ROUNDS} rounds')


def _ratios(*calls: Callable[[], Any]) -> list[float]:
  """Returns the time of the first call over that of the second, round by round; their order changes each round."""
  for call in calls:
    jax.block_until_ready(call())
  ratios = []
  for i in range(ROUNDS):
    seconds = {j: _seconds(calls[j]) for j in ((0, 1), (1, 0))[i % 2]}
    ratios.append(seconds[0] / seconds[1])
  return ratios


def _seconds(call: Callable[[], Any]) -> float:
  """Returns the median of `CALLS` calls in a row."""
  taken = []
  for _ in range(CALLS):
    start = time.perf_counter()
    jax.block_until_ready(call())
    taken.append(time.perf_counter() - start)
  return float(np.median(taken))
