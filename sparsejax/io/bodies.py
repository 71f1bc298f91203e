"""Writes new safetensors files one tensor after another, so that no more than one tensor has to be in memory.

    with bodies.replacing('model.safetensors') as file:
      body = bodies.Body(file, room=4096)             # keeps 4096 bytes free for the header
      body.add({'a/kernel': w}, [{'a/kernel': w[:8]}, {'a/kernel': w[8:]}], front=4)
      body.finish(lambda places, digests: header)     # the header says where the tensors came to be
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from sparsejax.io.headers import Behind, Extent

_COPY = 1 << 24  # bytes that are moved at a time
_FLUSH = 1 << 26  # bytes behind which the disk is told to begin, while the next tensors are made


@dataclasses.dataclass
class _Part:
  """A `_Part` is a file in which tensors lie one after another, from the byte `start` on; `places` count from there."""

  file: BinaryIO
  start: int
  end: int = 0
  places: dict[str, Extent] = dataclasses.field(default_factory=dict)

  def reserve(self, name: str, like: Any) -> int:
    """Reserves the place of a tensor of the shape and dtype of `like`, and returns where in the file it begins."""
    dtype, begin = np.dtype(like.dtype), self.end
    self.end += math.prod(like.shape) * dtype.itemsize
    self.places[name] = Extent(dtype, tuple(like.shape), begin, self.end)
    return self.start + begin

  def append(self, other: '_Part') -> None:
    """Appends all tensors of a part whose file begins with them."""
    self.file.seek(self.start + self.end)
    other.file.seek(0)
    shutil.copyfileobj(other.file, self.file, _COPY)
    self.places |= {name: place._replace(begin=self.end + place.begin, end=self.end + place.end)
                    for name, place in other.places.items()}
    self.end += other.end


class Body:
  """A `Body` collects the tensors of a new file in an order in which every tensor is aligned to its own item size.

  Tensors with wide items come first. `add` writes a tensor to the file at once if no wider tensor can follow. Narrower
  tensors wait in a temporary file for each item size. Threads write and hash a block while the next block is made, and
  flush the file to the disk: the disk would otherwise be idle until the file is complete.
  """

  def __init__(self, file: BinaryIO, room: int):
    self.digests: dict[str, str] = {}
    self._main, self._waiting = _Part(file, 8 + room), dict[int, _Part]()
    self._writing, self._hashing, self._flushing = Behind(), Behind(), Behind()
    self._unflushed = 0

  def add(self, tensors: Mapping[str, Any], blocks: Iterable[Mapping[str, Any]], front: int) -> None:
    """Adds `tensors`, shapes and dtypes by name. Each of `blocks` holds the next rows of each tensor by name.

    `front` is the largest item size, in bytes, of these tensors and of those that follow. Raises `ValueError` if there
    is a tensor of one of the names.
    """
    if taken := tensors.keys() & self.digests.keys():
      raise ValueError(f'io.save: two leaves of the tree have the path {min(taken)!r}; rename one.')
    self._settle(front)
    parts = {name: self._part(np.dtype(like.dtype).itemsize, front) for name, like in tensors.items()}
    offsets = {name: part.reserve(name, tensors[name]) for name, part in parts.items()}
    hashes = {name: hashlib.sha256() for name in tensors}

    def write(block: dict[str, memoryview]) -> None:
      for name, data in block.items():
        self._hashing.call(hashes[name].update, data)
        parts[name].file.seek(offsets[name])
        parts[name].file.write(data)
        offsets[name] += len(data)
        self._flush(len(data))

    for block in blocks:
      self._writing.call(write, {name: raw(rows) for name, rows in block.items()})
    self._writing.wait()
    self._hashing.wait()
    self.digests |= {name: each.hexdigest() for name, each in hashes.items()}

  def _part(self, size: int, front: int) -> _Part:
    """Returns where a tensor of this item size is written."""
    if size >= front:
      return self._main
    if size not in self._waiting:
      self._waiting[size] = _Part(tempfile.TemporaryFile(dir=os.path.dirname(self._main.file.name)), 0)
    return self._waiting[size]

  def _flush(self, written: int) -> None:
    """Begins to flush the file, if much was written since the last time. Raises `OSError` if that time failed."""
    self._unflushed += written
    if self._unflushed >= _FLUSH and not self._flushing.busy:
      self._flushing.call(os.fsync, self._main.file.fileno())
      self._unflushed = 0

  def _settle(self, front: int) -> None:
    """Appends the waiting tensors whose items are not narrower than `front`, the widest first."""
    for size in sorted((size for size in self._waiting if size >= front), reverse=True):
      with (waiting := self._waiting.pop(size)).file:
        self._main.append(waiting)

  def finish(self, header: Callable[[Mapping[str, Extent], Mapping[str, str], int], bytes]) -> None:
    """Writes what is waiting, and the header, which `header(places, digests, length)` makes.

    `header` pads its text to `length` bytes if the text is shorter. The data move if the header does not fit, or if it
    leaves much room.
    """
    self._settle(0)
    self._flushing.wait()
    file, start, end, places = self._main.file, self._main.start, self._main.end, self._main.places
    file.truncate(start + end)
    text, room = header(places, self.digests, 0), start - 8
    if len(text) > room or room - len(text) > end // 1024:
      _move(file, start, end, 8 + len(text))
    else:
      text = header(places, self.digests, room)
    file.seek(0)
    file.write(len(text).to_bytes(8, 'little') + text)

  def close(self) -> None:
    """Waits for what is being written, hashed and flushed, and removes the temporary files."""
    for behind in (self._writing, self._hashing, self._flushing):
      behind.close()
    for waiting in self._waiting.values():
      waiting.file.close()


def raw(tensor: Any) -> memoryview:
  """Returns the bytes of one tensor, row-major and little-endian. Copies only this tensor to the host."""
  array = np.asarray(tensor, order='C')
  if array.dtype.byteorder == '>':
    array = array.astype(array.dtype.newbyteorder('<'))
  return array.reshape(-1).view(np.uint8).data


def _move(file: BinaryIO, start: int, size: int, to: int) -> None:
  """Moves `size` bytes of `file` from `start` to `to`, block by block, and ends the file behind them."""
  offsets = range(0, size, _COPY)
  for offset in offsets if to < start else reversed(offsets):
    file.seek(start + offset)
    data = file.read(min(_COPY, size - offset))
    file.seek(to + offset)
    file.write(data)
  file.truncate(to + size)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Opens a new file that replaces `path` once it is complete and on the disk. An error removes the new file."""
  target = os.path.realpath(path)
  partial = os.path.join(os.path.dirname(target), f'.sparsejax-{secrets.token_hex(4)}.tmp')
  try:
    with contextlib.suppress(FileNotFoundError):  # Links in a circle and names that are too long are told now.
      if not stat.S_ISREG(os.stat(target).st_mode):
        raise ValueError(f'io.save: {path} is a folder or a device; give the name of a file.')
    with open(partial, 'x+b') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, target)
  except OSError as e:
    reason = f'io.save: cannot write {path}: {e.strerror or e}. No part of it was left; what was there before still is.'
    raise OSError(e.errno, reason) from e
  finally:
    with contextlib.suppress(OSError):
      os.unlink(partial)
