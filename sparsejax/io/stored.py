"""Defines the leaves of files that are read when they are asked for, so that a file need not fit into memory.

    leaf = io.stored('model.safetensors')['mlp']['kernel']
    leaf.shape, leaf.axes                 # This is what the file says.
    leaf.load()                           # The array is packed or dense, and every byte is verified.
    list(leaf.blocks(64))                 # Each array has 64 rows.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sparsejax import formats, progress, trees
from sparsejax.formats import pieces
from sparsejax.io import headers
from sparsejax.types import Axes, PyTree

_BLOCK = 1 << 22  # bytes that are read at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
  """A `Stored` leaf stands for an array in a file. The leaf has the shape and dtype of the dense array, and no values.

  `load()` reads and verifies the leaf, packed or dense. `blocks(rows)` yields a dense leaf as arrays of `rows` rows
  each, along the first axis; a packed leaf has no `blocks`. `axes`: the `Axes` that the file has on record, or `None`.
  `index_bytes`: the item size of the widest index array of the loaded leaf, 0 for a leaf that is dense when loaded.
  `packing()` returns what `Packing.in_blocks` does, for a leaf that is packed while it is written.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], Any]
  blocks: Callable[[int], Iterator[np.ndarray]] | None = None
  axes: Axes | None = None
  index_bytes: int = 0
  packing: Callable[[], tuple[formats.PackedArray, Iterator[Mapping[str, Any]]]] | None = None

  def in_multiples(self, multiple: int) -> Iterator[np.ndarray]:
    """Yields a dense leaf in blocks of about `_BLOCK` bytes, whose rows are a multiple of `multiple` but for the last.
    """
    row = math.prod(self.shape[1:]) * self.dtype.itemsize
    assert self.blocks
    return self.blocks(max(_BLOCK // max(row, 1) // multiple, 1) * multiple)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.load(), dtype)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def widest(self) -> int:
    """The largest item size, in bytes, that a tensor of the leaf may have."""
    return max(self.dtype.itemsize, self.index_bytes)

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A `Tensor` is one tensor of a file. If `digest`, a SHA-256, is known, reading the tensor verifies it."""

  path: Any
  name: str
  place: headers.Extent
  digest: str | None = None

  def leaf(self) -> Stored:
    """Returns the leaf that consists of this tensor."""
    return Stored(self.place.shape, self.place.dtype, self.read, self.blocks if self.place.shape else None)

  def read(self) -> np.ndarray:
    """Returns the whole tensor."""
    data = self._bytes(self.place.begin, self.place.end)
    if self.digest:
      self._verify(hashlib.sha256(data).hexdigest())
    return data.view(self.place.dtype).reshape(self.place.shape)

  def blocks(self, rows: int) -> Iterator[np.ndarray]:
    """Yields `rows` rows of the tensor at a time; the bytes are verified when the last block has been read."""
    length, *rest = self.place.shape
    step = rows * math.prod(rest) * self.place.dtype.itemsize
    hashed = hashlib.sha256()
    with headers.Behind() as behind:
      for begin in range(self.place.begin, self.place.end, max(step, 1)):
        data = self._bytes(begin, min(begin + step, self.place.end))
        if self.digest:
          behind.call(hashed.update, data)
        yield data.view(self.place.dtype).reshape(-1, *rest)
        del data  # The consumer may let go of this block before the next block is read.
      behind.wait()
    if self.digest:
      self._verify(hashed.hexdigest())

  def _bytes(self, begin: int, end: int) -> np.ndarray:
    data = pieces.empty(end - begin, np.uint8)
    with open(self.path, 'rb', buffering=0) as file:
      file.seek(begin)
      filled = 0
      while more := file.readinto(data[filled:]):  # The system reads at most 2 GB at a time.
        filled += more
    if filled != end - begin:
      raise headers.bad(self.path, f'tensor {self.name!r} was truncated while it was read')
    return data

  def _verify(self, digest: str) -> None:
    if digest != self.digest:
      raise headers.bad(self.path, f'tensor {self.name!r} was altered (its bytes do not have the SHA-256 that was '
                                   'saved)')


def loaded(tree: PyTree) -> PyTree:
  """Returns `tree` with every `Stored` leaf loaded. A leaf that is in several places stays one array."""
  paths, leaves, structure = trees.flatten(tree)
  once = {id(leaf): (path, leaf) for path, leaf in zip(paths, leaves) if isinstance(leaf, Stored)}
  arrays = {id(leaf): leaf.load() for _, leaf in progress.counted('read', list(once.values()), lambda pair: pair[0])}
  return structure.unflatten([arrays.get(id(leaf), leaf) for leaf in leaves])
