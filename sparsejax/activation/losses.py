"""Computes losses for experts that few tokens, and few neighbouring tokens, use: BlockFFN's router and its losses.

    scores = relu_router(x, w, scale)                        # gates, and raw scores before ReLU
    loss = task + 5e-2 * chunk_loss(used(scores.raw), 64) + 1e-3 * locality_loss(scores.raw)
    chunk_sparsity(scores.raw > 0, 8)                        # the fraction of experts that 8 tokens leave unused
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import shaped
from sparsejax.arguments import checked
from sparsejax.types import Array

_TOKENS = shaped('[..., T, E]')
arguments.declare('relu_router', x=shaped('[..., D]'), w=shaped('[D, E]'), scale=shaped('[E]'))
arguments.declare('used', raw=shaped('[..., E]'))
arguments.declare('chunk_loss locality_loss chunk_sparsity', p=_TOKENS, raw=_TOKENS, used=_TOKENS)

_EPS = 1e-5  # the authors' constant in the share and in the logarithm


class RouterScores(NamedTuple):
  """A `RouterScores` holds the gates of experts, `[..., E]`, zero where an expert is off, and the `raw` scores."""

  gates: Array
  raw: Array


@checked
def relu_router(x: Array, w: Array, scale: Array, eps: float = 1e-6) -> RouterScores:
  """Returns the gates of BlockFFN (Song et al. 2025, 2507.08771): RMSNorm of the ReLU of `x w`.

  `x`: `[..., D]`, `w`: `[D, E]`, `scale`: `[E]`, the learned weight of the norm. The norm runs over experts, so that
  ReLU alone decides which experts a token uses, and the norm how much.
  """
  if x.shape[-1] != w.shape[0] or scale.shape != w.shape[1:]:
    raise ValueError(f'activation.relu_router: x {x.shape}, w {w.shape} and scale {scale.shape} must be [..., D], '
                     '[D, E] and [E].')
  raw = x @ w
  return RouterScores(_normed(jax.nn.relu(raw), eps) * jnp.broadcast_to(scale, raw.shape), raw)


def _normed(s: Array, eps: float = 1e-6) -> Array:
  return s * jax.lax.rsqrt(jnp.mean(jnp.square(s), -1, keepdims=True) + eps)


@checked
def used(raw: Array) -> Array:
  """Returns the share of each expert in the use of a token, `[..., E]` (Song et al. 2025, 2507.08771).

  The share is the normed ReLU score over the sum of the experts' scores, plus 1e-5.
  """
  normed = _normed(jax.nn.relu(raw))
  return normed / (jnp.sum(normed, -1, keepdims=True) + _EPS)


@checked
def chunk_loss(p: Array, length: int, valid: Array | None = None) -> Array:
  """Returns the chunk sparsity loss of BlockFFN (Song et al. 2025, 2507.08771), `[]`: how many experts a chunk uses.

  `p`: `[..., T, E]`, the share of each expert, as in `used`. Chunks of `length` tokens do not overlap, and `length`
  divides T. The loss is 1 minus the mean, over chunks and experts, of the product of `1 - p + 1e-5`. As in the authors'
  code, 1e-5 makes the loss of unused chunks slightly negative. Tokens that `valid`, `bool[..., T]`, leaves out use no
  expert.
  """
  p = p if valid is None else jnp.where(valid[..., None], p, 0)
  logs = jnp.log(1 - p + _EPS)
  return 1 - jnp.mean(jnp.exp(jnp.sum(_chunks('chunk_loss', logs, length), -2)))


@checked
def locality_loss(raw: Array, sharpness: float = 100.0, segments: Array | None = None) -> Array:
  """Returns the activation locality loss of BlockFFN (Song et al. 2025, 2507.08771), `[]`.

  The loss is low where neighbouring tokens use equal experts. `raw`: `[..., T, E]`, scores before ReLU. The loss is the
  binary cross entropy of the logits `sharpness * raw` of a token and of the sigmoid of those of the next token. Both
  sides have gradients, as in the authors' code. `segments`, `int[..., T]`: only pairs of one segment count.
  """
  if raw.shape[-2] < 2:
    raise ValueError(f'activation.locality_loss: raw of shape {raw.shape} must be [..., T, E] with two tokens or more, '
                     'since neighbours are compared.')
  left, right = raw[..., :-1, :] * sharpness, raw[..., 1:, :] * sharpness
  target = jax.nn.sigmoid(right)
  each = jnp.maximum(left, 0) - left * target + jnp.log1p(jnp.exp(-jnp.abs(left)))
  if segments is None:
    return jnp.mean(each)
  same = jnp.broadcast_to((segments[..., 1:] == segments[..., :-1])[..., None], each.shape)
  return jnp.sum(jnp.where(same, each, 0)) / jnp.maximum(jnp.sum(same), 1).astype(each.dtype)


@checked
def chunk_sparsity(used: Array, length: int = 1) -> Array:
  """Returns the fraction of experts, `float32[]`, that no token of a chunk of `length` tokens uses.

  `used`: `bool[..., T, E]`. With a length of 1, the fraction is that of single tokens.
  """
  return 1 - jnp.mean(jnp.any(_chunks('chunk_sparsity', used, length), -2), dtype=jnp.float32)


def _chunks(function: str, array: Array, length: int) -> Array:
  if array.shape[-2] % length:
    raise ValueError(f'activation.{function}: chunks of {length} tokens do not divide {array.shape[-2]} tokens; pad '
                     'the tokens, and leave the padding out with `valid`.')
  return array.reshape(*array.shape[:-2], -1, length, array.shape[-1])


class AdaptiveWeight(NamedTuple):
  """An `AdaptiveWeight` is the state of a loss's weight that follows the loss: see `adapted`.

  `weight`: the weight now. `first`: the weight at the start. `aim`, `origin`: where the ramp ends and began. `total`:
  the sum of the losses of this window. `before`: the mean of the window before. `step`: the number of updates.
  """

  weight: Array
  first: Array
  aim: Array
  origin: Array
  total: Array
  before: Array
  step: Array

  @classmethod
  def of(cls, weight: float) -> 'AdaptiveWeight':
    """Returns the state before the first step."""
    number = lambda value: jnp.asarray(value, jnp.float32)
    return cls(number(weight), number(weight), number(weight), number(weight), number(0), number(0),
               jnp.zeros((), jnp.int32))


@checked
def adapted(state: AdaptiveWeight, loss: Array, *, begin: int = 1000, window: int = 100) -> AdaptiveWeight:
  """Returns the state after a step with this chunk loss, as in the training code of BlockFFN (2507.08771).

  The weight is constant for `begin` steps. Then every `window` steps the weight is multiplied by the ratio of the mean
  loss of the window to that of the window before. A ratio above 1 is at least 1.025, and the weight is at most 4 times
  the first. The weight moves to the new value on a line over the next window. `begin` is a multiple of `window`.
  """
  step = state.step + 1
  ends = step % window == 0
  mean = (state.total + loss) / window
  ratio = mean / jnp.where(state.before > 0, state.before, mean)
  ratio = jnp.where(ratio > 1, jnp.maximum(ratio, 1.025), ratio)
  turns = ends & (step > begin)
  aim = jnp.where(turns, jnp.minimum(state.aim * ratio, 4 * state.first), state.aim)
  origin = jnp.where(turns, state.aim, state.origin)
  along = (step % window).astype(jnp.float32) / window
  weight = jnp.where(step > begin, origin + (aim - origin) * along, state.first)
  return AdaptiveWeight(weight, state.first, aim, origin, jnp.where(ends, 0.0, state.total + loss),
                        jnp.where(ends, mean, state.before), step)
