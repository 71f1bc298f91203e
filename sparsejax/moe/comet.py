"""Has the gate COMET: k binary trees over the experts, with exact zeros (Ibrahim et al. 2023, 2306.02824).

    gate = comet(k=2, experts=16)
    weights, penalty = gate(x @ w, key, step)      # w: [features, k (2 experts - 1)]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import ARRAY, POSITIVE, RATE, TIMES
from sparsejax.arguments import checked
from sparsejax.gates import refuse_logits
from sparsejax.moe.gating import Gated
from sparsejax.types import Array, Bound

__all__ = ['comet', 'smooth_step']

arguments.declare('comet smooth_step', x=ARRAY, k=TIMES, experts=TIMES, gamma=POSITIVE, penalty=RATE)


@checked
def smooth_step(x: Array, gamma: float = 1.0) -> Array:
  """Returns 0 up to -gamma/2, 1 from gamma/2 on, and the cubic `-2 x^3/gamma^3 + 3 x/(2 gamma) + 1/2` between."""
  inside = jnp.clip(x, -gamma / 2, gamma / 2)
  smooth = -2 * inside**3 / gamma**3 + 1.5 * inside / gamma + 0.5
  return jnp.where(x <= -gamma / 2, 0, jnp.where(x >= gamma / 2, 1, smooth))


@checked
def comet(k: int, experts: int, gamma: float = 1.0, penalty: float = 1.0) -> Callable[..., Gated]:
  """Returns the gate of `k` full binary trees whose leaves are the `experts`, from logits `[..., k (2 experts - 1)]`.

  The first `k (experts - 1)` logits are the splits, tree after tree in heap order, and the rest the logits of the
  leaves. The probability p of a leaf is the product of `smooth_step` (to the left) and one minus it on its path. A
  softmax over all trees and leaves of `logit + log(p + 1e-8)`, without leaves of p = 0, gives weights that sum to 1.
  Trees are summed, and an expert that no tree reaches has exactly 0. The penalty is `penalty` times the mean over
  tokens of `-sum p log(p + 1e-6)`. This entropy drives each tree to one leaf, so that at most k experts are left in the
  end; no count is imposed before. In the authors' code every expert is computed all the same.
  Raises `ValueError` where `experts` is no power of two.
  """
  if experts & (experts - 1) or experts < 2:
    raise ValueError(f'moe.comet: {experts} experts; a full binary tree has 2, 4, 8, ... leaves. Add experts.')
  return Bound(_comet, (k, experts, gamma, penalty))


def _comet(logits: Array, key: Any, step: Any, k: int, experts: int, gamma: float, penalty: float) -> Gated:
  refuse_logits('moe.comet', logits)
  splits = k * (experts - 1)
  if logits.shape[-1] != splits + k * experts:
    raise ValueError(f'moe.comet: logits of shape {logits.shape}; {k} trees over {experts} experts need '
                     f'{splits + k * experts} logits a token.')
  front = logits.shape[:-1]
  leaves = _leaves(smooth_step(logits[..., :splits].reshape(*front, k, experts - 1), gamma))
  own = logits[..., splits:].reshape(*front, k, experts)
  # A leaf that is not reached has no part in the softmax, and no gradient.
  reached = jnp.where(leaves > 0, own + jnp.log(leaves + 1e-8), -jnp.inf)
  weights = jax.nn.softmax(reached.reshape(*front, -1)).reshape(*front, k, experts)
  entropy = jnp.sum(-leaves * jnp.log(leaves + 1e-6), (-1, -2), dtype=jnp.float32)
  return Gated(jnp.sum(weights, -2), penalty * jnp.mean(entropy))


def _leaves(left: Array) -> Array:
  """Returns the probability of each leaf, from left to right, by the probabilities of turning left in heap order."""
  found, first, width = jnp.ones_like(left[..., :1]), 0, 1
  while first < left.shape[-1]:
    turn = left[..., first:first + width]
    found = jnp.stack([found * turn, found * (1 - turn)], -1).reshape(*found.shape[:-1], 2 * width)
    first, width = first + width, 2 * width
  return found
