"""Packs zeros anywhere on the host, with NumPy: by pieces that fit into the cache of a processor, on all processors.

    values, mask = pieces.compacted(w.reshape(-1), signed_zeros=False)   # the nonzeros, and one bit for each entry
    pieces.spread(values, mask, w.size)                                # the same entries, bit for bit

NumPy asks the operating system for large pages, and XLA:CPU does not: a program of XLA takes five times as long to
write 64 MB for the first time as a copy takes to write them once more.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sparsejax.arguments import is_known
from sparsejax.formats import arrays
from sparsejax.types import Array

_PIECE = 1 << 16  # entries, a multiple of the eight that share a byte of a mask
_FEW = 0.06  # of the entries, of which NumPy finds each place faster by itself
_ALONE = 1 << 22  # entries that one thread packs sooner than several


def compacted(flat: np.ndarray, signed_zeros: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns the entries of `flat` that are not zero, in order, and the mask of all entries, eight to a byte."""
  parts = _each(lambda share: [_compacted(flat[piece], signed_zeros) for piece in _pieces(share)], _shares(flat.size))
  values, masks = zip(*sum(parts, [])) if flat.size else ((flat,), (np.empty(0, np.uint8),))
  return np.concatenate(values, out=empty(sum(map(len, values)), flat.dtype)), np.concatenate(masks)


def _compacted(piece: np.ndarray, signed_zeros: bool) -> tuple[np.ndarray, np.ndarray]:
  kept = arrays.stored_entries(piece, None, signed_zeros)
  return piece[_places(kept)], np.packbits(kept, bitorder='little')


def spread(values: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
  """Returns the `size` entries that `compacted` packed."""
  bits, shares = values.view(f'u{values.dtype.itemsize}'), _shares(size)
  dense = empty(size, bits.dtype, np.zeros)  # The system hands out zeros, which nobody has to write.
  stored = [_number(mask[share.start // 8:-(-share.stop // 8)]) for share in shares]
  starts = np.cumsum([0, *stored])

  def unpack(share: range, start: int) -> None:
    for piece in _pieces(share):
      kept = np.unpackbits(mask[piece.start // 8:-(-piece.stop // 8)], bitorder='little').view(bool)
      places = _places(kept)
      dense[piece][places] = bits[start:start + len(places)]
      start += len(places)

  _each(unpack, shares, starts.tolist())
  return dense.view(values.dtype)


def _places(kept: np.ndarray) -> np.ndarray:
  """Returns the indices at which the mask `kept` is `True`.

  NumPy searches from one to the next if at most a tenth is kept. Where it is nearly a tenth, its other way, without a
  branch, takes two thirds of the time: a tail of `True` makes NumPy take that way.
  """
  number = np.count_nonzero(kept)
  if not _FEW * kept.size < number <= 0.1 * kept.size:
    return np.flatnonzero(kept)
  return np.flatnonzero(np.concatenate([kept, np.ones(kept.size // 8, bool)]))[:number]


def on_host(*parts: Array) -> bool:
  """Returns whether NumPy may read `parts` where they are: arrays of the host, or each whole on one CPU."""
  devices = [part.devices() if is_known(part) and isinstance(part, jax.Array) else set() for part in parts]
  return all(map(is_known, parts)) and all(
      len(each) <= 1 and all(device.platform == 'cpu' for device in each) for each in devices)


def as_array(dense: np.ndarray, like: Array) -> Array:
  """Returns `dense`, which nobody writes any more, as an array of JAX on the device of `like`, without a copy."""
  committed = isinstance(like, jax.Array) and like.committed
  return jax.device_put(dense, like.sharding if committed else None, may_alias=True)


def _number(mask: np.ndarray) -> int:
  """Returns how many bits of `mask` are set."""
  return int(np.bitwise_count(mask).sum(dtype=np.int64))


def _shares(size: int) -> list[range]:
  """Returns the ranges of entries that make `size` together, whole pieces, one range for each processor."""
  number = (os.cpu_count() or 1) if size >= _ALONE else 1
  length = max(-(-size // number // _PIECE), 1) * _PIECE
  return [range(start, min(start + length, size)) for start in range(0, size, length)]


def _pieces(share: range) -> list[slice]:
  return [slice(start, min(start + _PIECE, share.stop)) for start in range(share.start, share.stop, _PIECE)]


def _each(function: Callable[..., Any], *rows: Sequence[Any]) -> list[Any]:
  """Returns `function` of each row, each in a thread of its own if there are several: NumPy lets others run."""
  if len(rows[0]) < 2:
    return list(map(function, *rows))
  with ThreadPoolExecutor(len(rows[0])) as threads:
    return list(threads.map(function, *rows))


def empty(size: int, dtype: Any, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
  """Returns `size` new entries of `make` at an address from which `jax.device_put` takes them over without a copy."""
  memory = make(size * np.dtype(dtype).itemsize + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start:len(memory) - 64 + start].view(dtype)
