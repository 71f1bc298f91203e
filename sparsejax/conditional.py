"""Computes a block for the rows alone to which a gate gives a weight other than zero, with static shapes.

    weights, penalty = gates.bernoulli('straight_through')(x @ params['gate'], key, step)     # [rows, blocks]
    block = lambda own, rows: jax.nn.relu(rows @ own['up']) @ own['down']                     # of one block
    y, dropped = conditional.apply(block, params['blocks'], x, weights, capacity=32)

Each block has `capacity` slots, into which its rows are gathered. All blocks are computed as one batched product, and
the results are added to their rows. The compiled program thus has `blocks * capacity` rows of work,
whatever the gate says. Rows without a slot are counted and dropped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.types import Array, PyTree

__all__ = ['Applied', 'Routing', 'apply', 'routed']


class Routing(NamedTuple):
  """A `Routing` says which rows each block computes.

  `tokens`: `int32[blocks, capacity]`, the number of the row in each slot, and the number of rows in an empty slot.
  `weights`: `[blocks, capacity]`, 0 in an empty slot. `filled`: `bool[blocks, capacity]`.
  """

  tokens: Array
  weights: Array
  filled: Array


class Applied(NamedTuple):
  """An `Applied` holds the sum of the blocks for each row, `[..., outputs]`, and `dropped`, `int32[blocks]`.

  `dropped` counts the rows that had a weight for a block, and no slot.
  """

  y: Array
  dropped: Array


@checked
def routed(weights: Array, capacity: int) -> tuple[Routing, Array]:
  """Returns the `Routing` of `weights`, `[rows, blocks]`, and the number of rows without a slot, `int32[blocks]`.

  A row wants every block of which its weight is not zero; NaN is not zero. The slots of a block go to the first rows
  that want the block.
  """
  _refuse_weights('routed', weights)
  rows, blocks = weights.shape
  wanted = weights != 0
  place = jnp.cumsum(wanted, 0, dtype=jnp.int32) - 1
  slot = jnp.where(wanted, place, capacity)
  column = jnp.broadcast_to(jnp.arange(blocks)[None], slot.shape)
  number = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], slot.shape)
  tokens = jnp.full((blocks, capacity), rows, jnp.int32).at[column, slot].set(number, mode='drop')
  held = weights.at[tokens, jnp.arange(blocks)[:, None]].get(mode='fill', fill_value=0)
  count = jnp.sum(wanted, 0, dtype=jnp.int32)
  return Routing(tokens, held, tokens < rows), jnp.maximum(count - capacity, 0)


@checked
def apply(block: Callable[[PyTree, Array], Array], params: PyTree, x: Array, weights: Array | Routing,
          capacity: int | None = None) -> Applied:
  """Returns the sum of `weights * block(params of the block, x)` over the blocks that a gate opens, for each row.

  `block(own, rows)` maps rows `[capacity, inputs]` to `[capacity, outputs]`. `params`: a pytree whose leaves have the
  blocks as their first axis. `x`: `[..., inputs]`. `weights`: `[..., blocks]`, exactly 0 where a block is skipped, or a
  `Routing` of the rows of `x`. `capacity`: the slots of each block, needed for weights. The rows of a block beyond its
  slots are dropped and counted in `dropped`, the first rows come first. A row that opens nothing, and all rows of a
  gate that keeps nothing, get zeros. Gradients flow to parameters, rows and weights; a weight of 0 gets none.
  Raises `ValueError` for parameters of other numbers of blocks, and for weights of other rows.
  """
  rows = x.reshape(-1, x.shape[-1])
  if isinstance(weights, Routing):
    routing, dropped = weights, jnp.zeros(len(weights.tokens), jnp.int32)
  else:
    if capacity is None:
      raise ValueError('conditional.apply: weights need `capacity`, the number of rows that each block computes.')
    if weights.shape[:-1] != x.shape[:-1]:
      raise ValueError(f'conditional.apply: weights of shape {weights.shape} for rows {x.shape}; give one weight for '
                       'each row and block.')
    routing, dropped = routed(weights.reshape(-1, weights.shape[-1]), capacity)
  _refuse_blocks(params, len(routing.tokens))
  # An empty slot computes the last row. A row of zeros could make a NaN that no gate has asked for.
  gathered = rows.at[routing.tokens].get(mode='clip')
  computed = jax.vmap(block)(params, gathered)
  scaled = jnp.where(routing.filled[..., None], computed * routing.weights[..., None].astype(computed.dtype), 0)
  empty = jnp.zeros((len(rows), computed.shape[-1]), computed.dtype)
  y = empty.at[routing.tokens].add(scaled, mode='drop')
  return Applied(y.reshape(*x.shape[:-1], -1), dropped)


def _refuse_blocks(params: PyTree, blocks: int) -> None:
  for path, leaf in zip(*trees.flatten(params)[:2]):
    if not leaf.ndim or leaf.shape[0] != blocks:
      raise errors.at_leaf('conditional.apply', path, leaf.shape, f'the gate has {blocks} blocks. Give parameters '
                           'whose first axis numbers the blocks.')


def _refuse_weights(function: str, weights: Any) -> None:
  if weights.ndim != 2:
    raise ValueError(f'conditional.{function}: `weights` has shape {weights.shape}; give one weight for each row and '
                     'block, [rows, blocks].')
