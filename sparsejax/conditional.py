"""Computes a block for the rows alone to which a gate gives a weight other than zero, with static shapes.

    weights, penalty = gates.bernoulli('straight_through')(x @ params['gate'], key, step)     # [rows, blocks]
    block = lambda own, rows: jax.nn.relu(rows @ own['up']) @ own['down']                     # of one block
    y, dropped = conditional.apply(block, params['blocks'], x, weights, capacity=32)

Each block has `capacity` slots, into which its rows are gathered. All blocks are computed as one batched product, and
the results are added to their rows. The compiled program thus has `blocks * capacity` rows of work, whatever the gate
says. Rows without a slot are counted and dropped.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments, errors, trees
from sparsejax.arguments import checked
from sparsejax.types import Array, PyTree

__all__ = ['Applied', 'Routing', 'apply', 'routed']


class Routing(NamedTuple):
  """A `Routing` says which rows each block computes.

  `tokens`: `int32[blocks, capacity]`, the row in each slot. `weights`: `[blocks, capacity]`. `filled`:
  `bool[blocks, capacity]`; a slot that is not filled has row 0 and weight 0. `dropped`: `int32[]`, the number of pairs
  of row and block that found no slot.
  """

  tokens: Array
  weights: Array
  filled: Array
  dropped: Array


class Applied(NamedTuple):
  """An `Applied` holds the sum of the blocks for each row, `[..., outputs]`, and the number of `dropped` pairs."""

  y: Array
  dropped: Array


@checked
def routed(weights: Array, capacity: int) -> Routing:
  """Returns the `Routing` of the weights `[rows, blocks]` of a gate: a row wants a block where its weight is not zero.

  Each block takes the first `capacity` rows that want it, in order; the others are dropped, and counted. A gate that
  keeps nothing leaves all slots empty. NaN counts as a weight. Raises `ValueError` for weights of another rank.
  """
  if weights.ndim != 2:
    raise ValueError(f'conditional.routed: `weights` has shape {weights.shape}; give one weight for each row and '
                     'block, [rows, blocks].')
  return _in_slots(weights, capacity)


def _in_slots(weights: Array, capacity: int) -> Routing:
  chosen = weights != 0
  place = jnp.cumsum(chosen, 0, dtype=jnp.int32) - 1
  fits = chosen & (place < capacity)
  return placed(weights, jnp.where(fits, place, capacity), capacity, jnp.sum(chosen & ~fits, dtype=jnp.int32))


def placed(weights: Array, place: Array, capacity: int, dropped: Array) -> Routing:
  """Returns the routing that puts each pair of row and block in its place; the place `capacity` is none."""
  tokens, blocks = (jax.lax.broadcasted_iota(jnp.int32, weights.shape, axis) for axis in (0, 1))
  put = lambda values: jnp.zeros((weights.shape[1], capacity), values.dtype).at[blocks, place].set(values, mode='drop')
  return Routing(put(tokens), put(weights), put(jnp.ones(weights.shape, bool)), dropped)


@checked
def apply(block: Callable[[PyTree, Array], Array], params: PyTree, x: Array, weights: Array | Routing,
          capacity: int | None = None) -> Applied:
  """Returns the sum of `weights * block(params of the block, x)` over the blocks that a gate opens, for each row.

  `block(own, rows)` maps rows `[capacity, inputs]` to `[capacity, outputs]`. `params`: a pytree whose leaves have the
  blocks as their first axis. `x`: `[..., inputs]`. `weights`: `[..., blocks]`, exactly 0 where a block is skipped, or a
  `Routing` of the rows of `x`. `capacity`: the slots of each block, needed for weights. The rows of a block beyond its
  slots are dropped and counted; the first rows come first. Slots beyond the number of rows are not computed. A row that
  opens nothing, and all rows of a gate that keeps nothing, get zeros. Gradients flow to parameters, rows and weights; a
  weight of 0 gets none.
  Raises `ValueError` for parameters of other numbers of blocks, for weights of other rows, and for a known `Routing` of
  more rows. The same holds for a block that does not return a row for each row.
  """
  if not x.ndim:
    raise ValueError('conditional.apply: `x` is a scalar; give rows, [..., inputs].')
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 cannot tell how many rows are none
  if isinstance(weights, Routing):
    routing = weights
    refuse_rows('conditional.apply', routing, len(rows))
  else:
    if capacity is None:
      raise ValueError('conditional.apply: weights need `capacity`, the number of rows that each block computes.')
    if weights.shape[:-1] != x.shape[:-1]:
      raise ValueError(f'conditional.apply: weights of shape {weights.shape} for rows {x.shape}; give one weight for '
                       'each row and block.')
    routing = _in_slots(weights.reshape(len(rows), weights.shape[-1]), min(capacity, len(rows)))
  _refuse_blocks(params, len(routing.tokens))
  computed = jax.vmap(block)(params, rows[routing.tokens])  # an empty slot computes row 0, and no row of zeros
  if computed.ndim != 3 or computed.shape[:2] != routing.tokens.shape:
    raise ValueError(f'conditional.apply: `block` maps rows {[*routing.tokens.shape[1:], rows.shape[-1]]} to '
                     f'{[*computed.shape[1:]]}; return one row of outputs for each row.')
  scaled = jnp.where(routing.filled[..., None], computed * routing.weights[..., None].astype(computed.dtype), 0)
  y = jnp.zeros((len(rows), computed.shape[-1]), computed.dtype).at[routing.tokens].add(scaled)
  return Applied(y.reshape(*x.shape[:-1], y.shape[-1]), routing.dropped)


def refuse_rows(function: str, routing: Routing, rows: int) -> None:
  """Raises `ValueError` if the routing is known and has a row beyond `rows`, which JAX would take for the last one."""
  if arguments.is_known(routing.tokens) and routing.tokens.size and int(jnp.max(routing.tokens)) >= rows:
    raise ValueError(f'{function}: the routing has row {int(jnp.max(routing.tokens))}, and there are {rows} rows; give '
                     'the rows and scores for which the routing was made.')


def _refuse_blocks(params: PyTree, blocks: int) -> None:
  for path, leaf in zip(*trees.flatten(params)[:2]):
    if not leaf.ndim or leaf.shape[0] != blocks:
      raise errors.at_leaf('conditional.apply', path, leaf.shape, f'the gate has {blocks} blocks. Give parameters '
                           'whose first axis numbers the blocks.')
