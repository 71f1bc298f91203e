"""Writes new safetensors files one tensor after another, so that no more than one tensor has to be in memory.

    with bodies.replacing('model.safetensors') as file:
      body = bodies.Body(file, room=4096)             # keeps 4096 bytes free for the header
      body.add('a/kernel', [w], front=4)
      body.finish(lambda places, digests: header)     # the header says where the tensors came to be
"""

import contextlib
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from sparsejax.io.headers import Extent, Hashing

_COPY = 1 << 24  # bytes that are moved at a time
_FLUSH = 1 << 26  # bytes behind which the disk is told to begin, while the next tensors are made


class Body:
  """A `Body` collects the tensors of a new file in an order in which every tensor is aligned to its own item size.

  Tensors with wide items come first. `add` writes a tensor to the file at once if no wider tensor can follow. Narrower
  tensors wait in a temporary file for each item size. A thread flushes the file to the disk while the next tensors are
  made: the disk would otherwise be idle until the file is complete.
  """

  def __init__(self, file: BinaryIO, room: int):
    self.file, self.start, self.end = file, 8 + room, 0
    self.places: dict[str, Extent] = {}
    self.digests: dict[str, str] = {}
    self._waiting: dict[int, tuple[BinaryIO, dict[str, Extent]]] = {}
    self._thread, self._flushing, self._flushed = ThreadPoolExecutor(1), Future[None](), 0
    self._flushing.set_result(None)
    file.seek(self.start)

  def add(self, name: str, blocks: Iterable[Any], like: Any, front: int) -> None:
    """Adds the tensor `name`, whose rows `blocks` yields, of the shape and dtype of `like`.

    `front` is the largest item size, in bytes, of this tensor and of the tensors that follow. Raises `ValueError` if
    there is a tensor of this name.
    """
    if name in self.digests:
      raise ValueError(f'io.save: two leaves of the tree have the path {name!r}; rename one.')
    self._settle(front)
    dtype = np.dtype(like.dtype)
    file, places, begin = self.file, self.places, self.end
    if dtype.itemsize < front:
      if dtype.itemsize not in self._waiting:
        self._waiting[dtype.itemsize] = tempfile.TemporaryFile(dir=os.path.dirname(self.file.name)), {}
      file, places = self._waiting[dtype.itemsize]
      begin = file.tell()
    with Hashing() as hashed:
      for block in blocks:
        data = raw(block)
        hashed.update(data)
        file.write(data)
      self.digests[name] = hashed.hexdigest()
    end = begin + math.prod(like.shape) * dtype.itemsize
    places[name] = Extent(dtype, tuple(like.shape), begin, end)
    if places is self.places:
      self.end = end
      self._flush()

  def _flush(self) -> None:
    """Begins to flush the file, if much was written since the last time. Raises `OSError` if that time failed."""
    if self._flushing.done() and self.end - self._flushed >= _FLUSH:
      self._flushing.result()
      self._flushing, self._flushed = self._thread.submit(os.fsync, self.file.fileno()), self.end

  def _settle(self, front: int) -> None:
    """Appends the waiting tensors whose items are not narrower than `front`, the widest first."""
    for size in sorted((size for size in self._waiting if size >= front), reverse=True):
      waiting, places = self._waiting.pop(size)
      with waiting:
        waiting.seek(0)
        shutil.copyfileobj(waiting, self.file, _COPY)
      self.places |= {name: place._replace(begin=self.end + place.begin, end=self.end + place.end)
                      for name, place in places.items()}
      self.end = max((place.end for place in self.places.values()), default=0)

  def finish(self, header: Callable[[Mapping[str, Extent], Mapping[str, str], int], bytes]) -> None:
    """Writes what is waiting, and the header, which `header(places, digests, length)` makes.

    `header` pads its text to `length` bytes if the text is shorter. The data move if the header does not fit, or if it
    leaves much room.
    """
    self._settle(0)
    self._flushing.result()
    self.file.truncate(self.start + self.end)
    text, room = header(self.places, self.digests, 0), self.start - 8
    if len(text) > room or room - len(text) > self.end // 1024:
      _move(self.file, self.start, self.end, 8 + len(text))
    else:
      text = header(self.places, self.digests, room)
    self.file.seek(0)
    self.file.write(len(text).to_bytes(8, 'little') + text)

  def close(self) -> None:
    """Removes the temporary files, and waits for what is being flushed."""
    self._thread.shutdown()
    for waiting, _ in self._waiting.values():
      waiting.close()


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
