"""Trains small gates that predict which blocks of keys matter, as SeerAttention does.

    gates = init_gates(apply, key, block=64)(params, x)
    loss = distillation(apply, block=64)                      # loss(gates, params, x): train the gates with optax
    run = kernels_pallas.sparse_attention(apply, gated_blocks(gates, keep=8, block=64))
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import PART, TIMES
from sparsejax.arguments import checked
from sparsejax.attention.masks import BlockMask, Builder
from sparsejax.attention.routing import best_blocks, pool, shared_heads
from sparsejax.attention.sites import AttentionSite, attended
from sparsejax.types import Array

arguments.declare('kept_of_ratio', ratio=PART, blocks=TIMES)

KINDS = ('max', 'min')  # how keys are pooled; queries are pooled by their mean

Gate = dict[str, Array]


@checked
def init_gates(apply: Callable[..., Any], key: Array, block: int = 64, size: int = 128) -> Callable[..., Any]:
  """Returns a function of the arguments of `apply` that makes a gate for each attention, by `site.name`.

  A gate has `query [heads, d, size]` and `key [heads, 2 d, size]`, normal with standard deviation 1 / sqrt(inputs).
  """
  def call(*args: Any, **kwargs: Any) -> dict[str, Gate]:
    found: dict[str, AttentionSite] = {}
    run = attended(apply, lambda site: found.update({site.name: site}))
    jax.eval_shape(lambda: [run(*args, **kwargs), None][1])
    draw = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(shape[1])
    gates = {}
    for i, (name, site) in enumerate(found.items()):
      one, two = jax.random.split(jax.random.fold_in(key, i))
      heads, d = site.heads, site.q.shape[-1]
      gates[name] = {'query': draw(one, heads, d, size), 'key': draw(two, heads, len(KINDS) * d, size)}
    return gates

  return call


def gate_logits(gate: Mapping[str, Array], site: AttentionSite, block: int) -> Array:
  """Returns the gate's score of each two blocks, `float32[batch, heads, nq, nk]`; -inf where masks hide a block.

  Queries are pooled by their mean, keys by maximum and minimum, each followed by a linear map of the head. A gate
  without `query` takes the pooled queries as they are. Raises `ValueError` for a gate of other shapes.
  """
  heads, d, wide = site.heads, site.q.shape[-1], len(KINDS) * site.k.shape[-1]
  shapes = {name: jnp.shape(gate[name]) for name in gate}
  size = shapes.get('key', (0,))[-1]
  if shapes not in ({'query': (heads, d, size), 'key': (heads, wide, size)}, {'key': (heads, wide, d)}):
    raise site.refused('attention.gated_blocks', f'its gate has the shapes {shapes}, and must have query [{heads}, '
                       f'{d}, size] and key [{heads}, {wide}, size], as attention.init_gates makes it.')
  q, k = pool(site.q, block), shared_heads(site, pool(site.k, block, KINDS))
  q = jnp.einsum('bqhd,hdc->bqhc', q, gate['query']) if 'query' in gate else q
  k = jnp.einsum('bkhd,hdc->bkhc', k, gate['key'])
  scores = jnp.einsum('bqhc,bkhc->bhqk', q, k) / math.sqrt(k.shape[-1])
  return jnp.where(site.blocks(block, block)[None], scores, -jnp.inf)


def block_targets(site: AttentionSite, block: int) -> Array:
  """Returns what a gate learns: the largest attention weight in each two blocks, divided by the sum of its row."""
  weights = site.weights()
  tall, wide = (-n % block for n in weights.shape[2:])
  padded = jnp.pad(weights, ((0, 0), (0, 0), (0, tall), (0, wide)))
  largest = padded.reshape(*weights.shape[:2], padded.shape[2] // block, block, -1, block).max((3, 5))
  return largest / jnp.maximum(largest.sum(-1, keepdims=True), 1e-30)


def gate_loss(gate: Mapping[str, Array], site: AttentionSite, block: int) -> Array:
  """Returns KL(target || gate), the mean over rows of blocks, without the first quarter of the rows."""
  target = jax.lax.stop_gradient(block_targets(site, block))
  logits = gate_logits(gate, site, block)
  gap = jnp.where(target > 0, target * (jnp.log(jnp.where(target > 0, target, 1)) - jax.nn.log_softmax(logits)), 0)
  return gap[:, :, gap.shape[2] // 4:].sum(-1).mean()


@checked
def distillation(apply: Callable[..., Any], block: int = 64) -> Callable[..., Array]:
  """Returns the loss of gates, `loss(gates, *args)`, with the arguments of `apply`: the sum over its attentions.

  The attention of the program itself is the teacher, and gradients flow to the gates alone. SeerAttention (Gao et al.
  2024, 2410.13276) pools queries and keys before their rotary embedding, and rotates the pooled ones; here they are
  pooled as the program multiplies them. The authors' code divides the divergence by the number of entries instead of
  rows. Raises `ValueError` for an attention without a gate, and for one inside of a loop or `remat`.
  """
  def loss(gates: Mapping[str, Gate], *args: Any, **kwargs: Any) -> Array:
    losses: list[Array] = []

    def answer(site: AttentionSite) -> None:
      if site.enclosed or site.name not in gates:
        why = 'is inside of a loop or remat, which no loss can leave; unroll it' if site.enclosed else (
          f'has no gate {site.name!r}; the gates are {sorted(gates)}')
        raise ValueError(f'attention.distillation: {site.place} {why}.')
      losses.append(gate_loss(gates[site.name], site.stopped(), block))

    attended(apply, answer)(*args, **kwargs)
    return jnp.sum(jnp.stack(losses)) if losses else jnp.zeros(())

  return loss


@checked
def kept_of_ratio(ratio: float, blocks: int) -> int:
  """Returns how many blocks of each row SeerAttention keeps so that `ratio` of a causal map is kept: at least 1."""
  return max(1, int((1 - math.sqrt(1 - ratio)) * blocks))


def _gated(site: AttentionSite, gates: Any, keep: int | None, threshold: float | None, capacity: int | None,
           block: int) -> BlockMask:
  logits = gate_logits(site.own('attention.gated_blocks', 'gate', gates), site, block)
  if threshold is None:
    return best_blocks(site, logits, keep or 1, block)
  chosen = jax.lax.stop_gradient(jax.nn.softmax(logits)) > threshold
  return BlockMask(chosen, block, block, capacity)


@checked
def gated_blocks(gates: Mapping[str, Any], keep: int | None = None, threshold: float | None = None,
                 capacity: int | None = None, block: int = 64) -> Builder:
  """Returns the builder of SeerAttention: the `keep` blocks that a gate scores highest, or those over a threshold.

  With `threshold`, the blocks whose softmax of gate scores is larger are kept. A list then has room for `capacity`
  blocks, and `sparse_attention` reports what does not fit. Raises `ValueError` unless either `keep`, or `threshold` and
  `capacity`, are given.
  """
  if (keep is None) == (threshold is None) or (threshold is None) != (capacity is None):
    raise ValueError('attention.gated_blocks: give keep=, or threshold= with capacity=, the room of a list.')
  return functools.partial(_gated, gates=gates, keep=keep, threshold=threshold, capacity=capacity, block=block)
