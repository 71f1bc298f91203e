"""Puts texts of different lengths side by side into rows without padding, so that nothing is computed on padding.

    packs = first_fit([3, 1, 2], capacity=4)                     # first fit, the longest first
    tokens = packs.packed(padded)                           # `[texts, longest, ...]` to `[rows, capacity, ...]`
    loss = packs.mean(token_loss, packs.first)              # over tokens, without the first of each text
    y = unpadded(mlp, mask, most=256)(x)                    # a function of tokens, on the valid ones alone

`packs.segments` is the argument `segments=` of `kernels_pallas.block_sparse_attention`. `blocks(packs.segments, 64)`
says which blocks of keys a block of queries sees. `packs.positions` restart with each text. References: Kundu et al.
2024, arXiv 2407.09105 (packing with flash attention); Zhai et al. 2022, arXiv 2210.03052 (ByteTransformer), whose
functions of tokens see valid tokens alone. The order of texts in the rows is ours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import arguments
from sparsejax.argument_kinds import FLAG, FUNCTION, SERIES, TIMES, shaped
from sparsejax.arguments import checked
from sparsejax.types import Array

arguments.declare('first_fit', lengths=SERIES, capacity=TIMES)
arguments.declare('blocks', segments=shaped('[rows, capacity]'), block=TIMES, causal=FLAG)
arguments.declare('unpadded', function=FUNCTION, mask=shaped('[B, T]'), most=TIMES)


class Packs(NamedTuple):
  """`Packs` say where the tokens of each text are: rows of `capacity` tokens, known at trace time.

  `row` and `begin`, `int32[texts]`: the row of a text, and its first place there. `segments`, `int32[rows, capacity]`:
  the number of the text of each place, or -1 where no text is. `positions`, of the same shape: the place in the text.
  """

  lengths: np.ndarray
  row: np.ndarray
  begin: np.ndarray
  segments: np.ndarray
  positions: np.ndarray

  @property
  def valid(self) -> np.ndarray:
    """Returns where a place holds a token, `bool[rows, capacity]`."""
    return self.segments >= 0

  @property
  def first(self) -> np.ndarray:
    """Returns where a place holds the first token of a text, which no token predicts, `bool[rows, capacity]`."""
    return self.valid & (self.positions == 0)

  @property
  def share(self) -> float:
    """The number of places, over the number that rows padded to the longest text would have."""
    return self.segments.size / (len(self.lengths) * int(self.lengths.max()))

  def packed(self, padded: Array, fill: float = 0) -> Array:
    """Returns `padded [texts, T, ...]`, whose texts begin at 0, as `[rows, capacity, ...]`, with `fill` elsewhere."""
    self._fits('packed', padded, (len(self.lengths),), int(self.lengths.max()))
    taken = padded[np.maximum(self.segments, 0), self.positions]
    return jnp.where(_wide(self.valid, taken), taken, jnp.asarray(fill, taken.dtype))

  def padded(self, packed: Array, length: int | None = None, fill: float = 0) -> Array:
    """Returns `packed [rows, capacity, ...]` as `[texts, length, ...]`, the inverse of `packed`."""
    self._fits('padded', packed, (len(self.segments),), self.segments.shape[1])
    length = int(self.lengths.max()) if length is None else length
    inside = np.arange(length)[None] < self.lengths[:, None]
    taken = packed[self.row[:, None], np.where(inside, self.begin[:, None] + np.arange(length)[None], 0)]
    return jnp.where(_wide(inside, taken), taken, jnp.asarray(fill, taken.dtype))

  def mean(self, values: Array, without: np.ndarray | None = None) -> Array:
    """Returns the mean of `values [rows, capacity]` over tokens: that of the padded texts, whatever the rows are.

    `without`, `bool[rows, capacity]`: tokens that are left out.
    """
    self._fits('mean', values, self.segments.shape[:1], self.segments.shape[1])
    used = self.valid if without is None else self.valid & ~without
    return jnp.sum(jnp.where(used, values, jnp.zeros((), values.dtype))) / max(int(used.sum()), 1)

  def _fits(self, name: str, array: Array, first: tuple[int, ...], least: int) -> None:
    if array.ndim < 2 or array.shape[:1] != first or array.shape[1] < least:
      raise ValueError(f'packing.{name}: an array of shape {array.shape} does not fit these packs, which need '
                       f'[{first[0]}, {least}, ...].')


@checked
def first_fit(lengths: Sequence[int], capacity: int) -> Packs:
  """Returns the packs of texts of these lengths in rows of `capacity` tokens: the longest first, each in the first row
  that has room.

  Raises `ValueError` for a length below 1 or above the capacity.
  """
  given = np.asarray(lengths)
  if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer) or given.min() < 1:
    raise ValueError(f'packing.first_fit: `lengths` must be whole numbers of tokens, at least 1, not {lengths!r:.60}.')
  if given.max() > capacity:
    raise ValueError(f'packing.first_fit: a text of {given.max()} tokens does not fit into rows of {capacity}; give a '
                     'larger capacity, or cut the text.')
  used: list[int] = []
  row, begin = np.zeros((2, len(given)), np.int32)
  for text in np.argsort(-given, kind='stable'):
    place = next((i for i, n in enumerate(used) if n + given[text] <= capacity), len(used))
    used += [0] * (place == len(used))
    row[text], begin[text] = place, used[place]
    used[place] += int(given[text])
  segments, positions = np.full((len(used), capacity), -1, np.int32), np.zeros((len(used), capacity), np.int32)
  for text, n in enumerate(given):
    here = row[text], slice(begin[text], begin[text] + n)
    segments[here], positions[here] = text, np.arange(n)
  return Packs(given.astype(np.int32), row, begin, segments, positions)


@checked
def blocks(segments: np.ndarray, block: int, causal: bool = False) -> np.ndarray:
  """Returns which blocks of keys hold a token of the same text as a block of queries, `bool[rows, 1, nq, nq]`.

  If `causal`, later blocks are left out. Each block sees itself. `attention.of_mask` makes lists of the result.
  """
  ids = np.pad(np.asarray(segments), ((0, 0), (0, -np.shape(segments)[1] % block)), constant_values=-1)
  count = ids.shape[1] // block
  apart = ids.reshape(len(ids), count, block)
  mask = np.zeros((len(ids), 1, count, count), bool)
  for example, text in ((i, t) for i in range(len(ids)) for t in np.unique(ids[i]) if t >= 0):
    held = (apart[example] == text).any(-1)
    mask[example, 0] |= held[:, None] & held[None]
  mask |= np.eye(count, dtype=bool)
  return mask & np.tri(count, dtype=bool) if causal else mask


@checked
def unpadded(function: Callable[[Array], Array], mask: Array, most: int) -> Callable[[Array], Array]:
  """Returns `function`, which maps tokens `[N, ...]` one by one, for the valid tokens of `[B, T, ...]` alone.

  `mask`, `bool[B, T]`, says which tokens are valid, and may be traced. `most` is how many are computed, since shapes
  are static. Padding has zeros in the result. Raises `ValueError` where more than `most` tokens are valid, unless the
  mask is traced: then the result is NaN for the valid tokens that did not fit, the last ones.
  """
  if mask.dtype != bool:
    raise ValueError(f'packing.unpadded: mask {mask.dtype}{list(mask.shape)} must be bool[B, T]; True is a token.')
  known = isinstance(mask, np.ndarray)
  if known and int(mask.sum()) > most:
    raise ValueError(f'packing.unpadded: {int(mask.sum())} tokens are valid, and `most` is {most}; give a larger one.')
  flat = jnp.asarray(mask).reshape(-1)
  place = jnp.nonzero(flat, size=min(most, flat.size), fill_value=flat.size)[0]

  def run(x: Array) -> Array:
    if x.shape[:2] != mask.shape:
      raise ValueError(f'packing.unpadded: x of shape {x.shape} does not fit the mask, {mask.shape}.')
    y = function(x.reshape(flat.size, *x.shape[2:]).at[place].get(mode='fill', fill_value=0))
    number = jnp.cumsum(flat, dtype=jnp.int32)
    lost = jnp.where(flat & (number > most), jnp.nan, 0).astype(y.dtype)
    whole = jnp.broadcast_to(_wide(lost, y), (flat.size, *y.shape[1:])).at[place].set(y, mode='drop')
    return whole.reshape(*mask.shape, *y.shape[1:])

  return run


def _wide(mask: Array | np.ndarray, like: Array) -> Array | np.ndarray:
  """Returns `mask` with axes of length 1 appended, up to the number of axes of `like`."""
  return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


__all__ = ['Packs', 'blocks', 'first_fit', 'unpadded']
