"""Says which blocks of keys each block of queries sees, and lists the blocks: `of_mask` is the only place that does.

A *builder* is a function of an `AttentionSite` that returns a `BlockMask`. The builders of this module do not read
queries and keys, so that their lists are known at trace time. Builders that compare places refuse an attention of
other lengths, unless a known mask says at which keys its queries stand.

    builder = sliding(window=256, block=64)
    index = of_mask(builder(site).mask)          # a BlockIndex for kernels_pallas.block_sparse_attention
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments
from sparsejax.argument_kinds import FUNCTION, shaped
from sparsejax.arguments import checked
from sparsejax.attention.sites import AttentionSite
from sparsejax.types import Bound

arguments.declare('union', builders=FUNCTION)
arguments.declare('of_mask', mask=shaped('[..., nq, nk]'))


class BlockMask(NamedTuple):
  """A `BlockMask` says which blocks of keys each block of queries sees.

  `mask` is `bool[1 or heads, nq, nk]`, or `bool[batch, 1 or heads, nq, nk]` if examples differ. `block_q` and `block_k`
  are tokens. `capacity`: the most blocks of keys in a list. A mask that is known at trace time needs none. `fits`: the
  builder promises that no list is longer than the capacity.
  """

  mask: Any
  block_q: int
  block_k: int
  capacity: int | None = None
  fits: bool = False


class BlockIndex(NamedTuple):
  """A `BlockIndex` lists the blocks of keys that each block of queries sees, as `block_sparse_attention` takes it.

  `index` is `int32[..., heads, nq, R]`, in increasing order; the first `counts`, `int32[..., heads, nq]`, are used.
  `overflow` is the number of blocks that the mask keeps and no list has room for. All three are NumPy arrays if the
  mask is known at trace time.
  """

  index: Any
  counts: Any
  overflow: Any


Builder = Callable[[AttentionSite], BlockMask]


@checked
def of_mask(mask: Any, capacity: int | None = None) -> BlockIndex:
  """Returns the lists of the blocks of `mask`, `bool[..., nq, nk]`, in increasing order, padded with the last block.

  `capacity` is the length R of a list, by default that of the longest list. Blocks beyond the capacity are left out,
  the later first, and counted in `overflow`. Raises `ValueError` for a traced mask without a capacity, since a list
  needs a length.
  """
  if mask.dtype != bool:
    raise ValueError(f'attention.of_mask: the mask is {mask.dtype}{list(mask.shape)}; give bool[..., nq, nk].')
  if isinstance(mask, jax.core.Tracer):
    if capacity is None:
      raise ValueError(f'attention.of_mask: a traced mask of shape {mask.shape} needs capacity=, the most blocks of '
                       'keys in a list.')
    return _listed(mask, min(capacity, mask.shape[-1]), jnp)
  mask = np.asarray(mask)
  longest = int(mask.sum(-1).max(initial=0))
  return _listed(mask, min(longest if capacity is None else capacity, max(longest, 1)), np)


def _listed(mask: Any, length: int, xp: Any) -> BlockIndex:
  order = xp.argsort(~mask, axis=-1, stable=True)[..., :length].astype('int32')  # of NumPy, or of JAX if traced
  total = mask.sum(-1).astype('int32')
  counts = xp.minimum(total, length).astype('int32')
  last = xp.take_along_axis(order, xp.maximum(counts - 1, 0)[..., None], -1) if length else order
  place = np.arange(length).reshape((1,) * counts.ndim + (length,))
  index = xp.where(place < counts[..., None], order, last).astype('int32')
  return BlockIndex(index, counts, (total - counts).sum().astype('int32'))


def blocks_of(site: AttentionSite, block: int) -> tuple[int, int]:
  """Returns how many blocks the queries and the keys of a site have; the last may be shorter."""
  return -(-site.q.shape[1] // block), -(-site.k.shape[1] // block)


def _static(site: AttentionSite, rule: Callable[..., Any], block: int, *arguments: Any) -> BlockMask:
  """Returns the mask of `rule(i, j, site, *arguments)`, for blocks i `[nq, 1]` of queries and j `[1, nk]` of keys."""
  rows, columns = blocks_of(site, block)
  i, j = np.arange(rows)[:, None], np.arange(columns)[None]
  mask = np.asarray(rule(i, j, site, *arguments))
  return BlockMask(np.broadcast_to(mask, (mask.shape[0] if mask.ndim > 2 else 1, rows, columns)), block, block)


def _placed(site: AttentionSite, rule: Callable[..., Any], block: int, *arguments: Any) -> BlockMask:
  """Returns the mask of a rule that compares places; its i is the block of keys at which these queries stand."""
  offset = site.offset
  if offset is None:
    raise site.refused('attention', 'a builder of distances does not know at which keys the queries stand. Give this '
                       'attention another builder, as in lambda site: (full if site.offset is None else near)(site).')
  if offset % block:
    raise site.refused('attention', f'its queries begin at key {offset}, which is not whole blocks of {block}; take a '
                       'block that divides it.')
  return _static(site, lambda i, *rest: rule(i + offset // block, *rest), block, *arguments)


def _band(i: Any, j: Any, site: AttentionSite, width: int) -> Any:
  return abs(i - j) <= width


def _sliding(i: Any, j: Any, site: AttentionSite, window: int, block: int) -> Any:
  nearest = np.maximum(abs(i - j) - 1, 0) * block + (i != j)  # the least distance of two tokens of the blocks
  return nearest <= window


def _strided(i: Any, j: Any, site: AttentionSite, period: int, width: int) -> Any:
  return (abs(i - j) % period == 0) | (abs(i - j) <= width)


def _columns(i: Any, j: Any, site: AttentionSite, count: int) -> Any:
  return (j < count) | (i < 0)


def _sharded(i: Any, j: Any, site: AttentionSite, local: int, period: int, offset: int) -> Any:
  heads = np.arange(site.heads)[:, None, None]
  if not site.causal:
    beyond = np.maximum(abs(i - j) - local + 1, 0)
    return np.broadcast_to(beyond % period == 0, (site.heads, i.size, j.size))
  step = max(1, period // site.heads)
  return (((j + heads * step + offset) % period == 0) | (i - j < local)) & (j <= i)


@checked
def band(width: int, block: int = 64) -> Builder:
  """Returns the builder of a band: a block of queries sees the blocks of keys at most `width` blocks away."""
  return Bound(_placed, (_band, block, width))


@checked
def sliding(window: int, block: int = 64) -> Builder:
  """Returns the builder of a sliding window: the blocks that have a key at most `window` tokens away from a query.

  All keys of these blocks are seen, a few more than the window. A program that masks the window itself stays exact.
  """
  return Bound(_placed, (_sliding, block, window, block))


@checked
def strided(period: int, width: int = 0, block: int = 64) -> Builder:
  """Returns the builder of diagonals: every `period`-th one, and those at most `width` blocks away."""
  return Bound(_placed, (_strided, block, period, width))


@checked
def columns(count: int, block: int = 64) -> Builder:
  """Returns the builder of vertical stripes: every query sees the first `count` blocks of keys."""
  return Bound(_static, (_columns, block, count))


@checked
def sharded(local: int = 4, period: int = 4, offset: int = 0, block: int = 64) -> Builder:
  """Returns the builder of S2-Attention: strides that are sharded over the heads, and a local window.

  Block i of the queries of head h sees the blocks j with `(j + h step + offset) mod period = 0`, and those with
  `i - j < local`, its own among them. `step` is `max(1, period // heads)`. Heads together see all blocks if `heads` is
  a multiple of `period`, or divides it. Without a causal mask the stride counts from the end of the window, and is the
  same for all heads. S2-Attention (arXiv 2407.17678), as in the authors' kernels.
  """
  return Bound(_placed, (_sharded, block, local, period, offset))


def _full(i: Any, j: Any, site: AttentionSite) -> Any:
  return (i >= 0) & (j >= 0)


def _empty(i: Any, j: Any, site: AttentionSite) -> Any:
  return (i < 0) & (j < 0)


@checked
def full(block: int = 64) -> Builder:
  """Returns the builder of dense attention: every block."""
  return Bound(_static, (_full, block))


@checked
def empty(block: int = 64) -> Builder:
  """Returns the builder of no block at all; `sparse_attention` keeps the diagonal."""
  return Bound(_static, (_empty, block))


def _union(site: AttentionSite, builders: tuple[Builder, ...]) -> BlockMask:
  masks = [builder(site) for builder in builders]
  blocks = {(m.block_q, m.block_k) for m in masks}
  if len(blocks) > 1:
    raise ValueError(f'attention.union: the builders have blocks of {sorted(blocks)} tokens; give all one block.')
  known = all(m.capacity is None for m in masks)
  capacity = None if known else sum(m.mask.shape[-1] if m.capacity is None else m.capacity for m in masks)
  whole = masks[0].mask
  for m in masks[1:]:
    whole = whole | m.mask
  return BlockMask(whole, *blocks.pop(), capacity, all(m.capacity is None or m.fits for m in masks))


@checked
def union(*builders: Builder) -> Builder:
  """Returns the builder of the blocks that any of the builders keeps, as in `union(columns(1), sliding(256))`."""
  if not builders:
    raise ValueError('attention.union: there is no builder; give at least one, as in union(columns(1), sliding(256)).')
  return Bound(_union, (builders,))


def diagonal(rows: int, columns: int, block_q: int, block_k: int, offset: int = 0) -> np.ndarray:
  """Returns the blocks that have a query's own key, `bool[nq, nk]`; of queries beyond the keys, the last block.

  Query 0 stands at the key `offset`.
  """
  i, j = np.arange(rows)[:, None] * block_q + offset, np.arange(columns)[None]
  first, last = i // block_k, (i + block_q - 1) // block_k
  return (j >= np.minimum(first, columns - 1)) & (j <= np.minimum(last, columns - 1))
