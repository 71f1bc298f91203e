"""Compares a step of decoding that reads listed tokens with dense attention over the whole cache, on this CPU.

The cache has 16,384 tokens of 8 heads of 64 numbers, float32, as Flax's layers keep it: `[B, T, heads, d]`. The dense
product reads a copy whose heads come first, which XLA multiplies fastest; a second dense product reads the cache as it
is. Lists have 1,024 tokens. `gathered_floor.c` is the product by hand: vector instructions that ask for rows ahead of
time. Without a C compiler its rows are left out. Each claim is measured by the clock and in seconds of the processor.
"""

import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Measurement
from kernels_pallas import decoder, gathered_attention
from sparsejax.attention import decode

TOKENS, HEADS, D, KEEP, PAGE = 16_384, 8, 64, 1024, 16
CLOCKS = {'processor seconds': time.process_time, 'wall': time.perf_counter}
BARS = {'the product': 15.0, 'a step, pages of 16': 6.0, 'a step, quest': 6.0}
FLOOR = pathlib.Path(__file__).with_name('gathered_floor.c')


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Returns the attention of `q [1, H, d]` to all of `k` and `v [1, H, T, d]`."""
  scores = jnp.einsum('bhd,bhtd->bht', q, k) * D**-0.5
  return jnp.einsum('bht,bhtd->bhd', jax.nn.softmax(scores, -1), v)


def in_place(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Returns the attention of `q` to all of a cache `[1, T, H, d]`, by JAX's own function."""
  return jax.nn.dot_product_attention(q[:, None], k, v)[:, 0]


def contestants() -> dict[str, Callable[[], Any]]:
  """Returns a call of each product and of each step. Raises `AssertionError` if a product is not that of its list."""
  draw = np.random.default_rng(0)
  q, k, v = (jnp.asarray(draw.standard_normal(shape), jnp.float32)
             for shape in ((1, HEADS, D), *[(1, TOKENS, HEADS, D)] * 2))
  own = np.stack([np.sort(draw.permutation(TOKENS)[:KEEP]) for _ in range(HEADS)])[None].astype(np.int32)
  first = tuple(jnp.asarray(np.ascontiguousarray(a.swapaxes(1, 2))) for a in (k, v))
  listed = jax.jit(gathered_attention)
  calls = {'dense': functools.partial(jax.jit(dense), q, *first),
           'dense, as it lies': functools.partial(jax.jit(in_place), q, k, v),
           'the product': functools.partial(listed, q, k, v, jnp.asarray(own)),
           'the product, one list for all heads': functools.partial(listed, q, k, v, jnp.asarray(own[:, :1]))}
  calls |= _by_hand(q, k, v, own)
  exact = gathered_attention(q, k, v, jnp.asarray(own), implementation='dense')
  for name in {'the product', 'by hand'} & set(calls):
    np.testing.assert_allclose(calls[name](), exact, atol=1e-5)
  channels = decode.heavy_channels(k[0], D // 16)
  rules = {'a step, pages of 16': decode.double_sparsity(channels, KEEP, PAGE),
           'a step, tokens': decode.double_sparsity(channels, KEEP), 'a step, quest': decode.quest(KEEP, PAGE)}
  for name, rule in rules.items():
    decoding = decoder(rule)
    cache = jax.jit(decoding.extend)(decoding.start(1, TOKENS, HEADS, D), k, v)
    calls[name] = functools.partial(jax.jit(decoding.step), q, cache)
  return calls


def _by_hand(q: jax.Array, k: jax.Array, v: jax.Array, own: np.ndarray) -> dict[str, Callable[[], Any]]:
  """Returns the calls of the product in C, or none without a compiler."""
  compiler = shutil.which('cc') or shutil.which('gcc')
  if compiler is None:
    return {}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'floor.so'
    subprocess.run([compiler, '-O3', '-march=native', '-ffast-math', '-shared', '-fPIC', str(FLOOR), '-o', str(path),
                    '-lm'], check=True)
    run = ctypes.CDLL(str(path)).gathered
  arrays = [np.ascontiguousarray(a) for a in (q, k, v)]
  pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p)

  def call(lists: np.ndarray) -> np.ndarray:
    y = np.empty((1, HEADS, D), np.float32)
    run(*map(pointer, (*arrays, lists, y)), HEADS, KEEP, ctypes.c_float(D**-0.5))
    return y

  shared = np.repeat(own[:, :1], HEADS, 1)
  return {'by hand': lambda: call(own), 'by hand, one list for all heads': lambda: call(shared)}


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields, for each contestant and clock, how many times faster than the dense product it is."""
  calls = contestants()
  for clock, read in CLOCKS.items():
    seconds = list(timing.take_turns(calls, rounds, clock=read))
    for name in calls:
      if not name.startswith('dense'):
        yield timing.claim(f'{name}: times faster than dense, {clock}', seconds, 'dense', name, BARS.get(name, 0.0))
    yield timing.claim(f'the product: times faster than dense over the cache as it lies, {clock}', seconds,
                       'dense, as it lies', 'the product', 15.0)
    yield timing.claim(f'a step, pages of 16: times faster than dense over the cache as it lies, {clock}', seconds,
                       'dense, as it lies', 'a step, pages of 16', 6.0)
