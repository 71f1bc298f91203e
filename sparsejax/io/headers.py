"""Reads and writes the header of a safetensors file, which says where the bytes of each tensor are.

    header = headers.read('model.safetensors')
    header.places['a/kernel']        # dtype, shape, and the first and last byte in the file
    header.metadata                  # the strings under `__metadata__`
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import safetensors

CODES = {
  'bool': 'BOOL', 'int8': 'I8', 'uint8': 'U8', 'int16': 'I16', 'uint16': 'U16', 'int32': 'I32', 'uint32': 'U32',
  'int64': 'I64', 'uint64': 'U64', 'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32', 'float64': 'F64',
  'complex64': 'C64', 'float8_e4m3fn': 'F8_E4M3', 'float8_e5m2': 'F8_E5M2', 'float8_e8m0fnu': 'F8_E8M0',
  'float8_e4m3fnuz': 'F8_E4M3FNUZ', 'float8_e5m2fnuz': 'F8_E5M2FNUZ'}
DTYPES = {code: name for name, code in CODES.items()}

LONGEST = 100_000_000  # bytes of a header, as the safetensors package has it
DEEPEST = 128  # keys in a path; deeper trees end in a `RecursionError` somewhere
_MOST_AXES = 64  # as NumPy has it
MOST_TEXT = 2000  # letters of a refusal, which may quote the file

VERSION = 2  # of what `__metadata__` says
READABLE = (1, VERSION)  # Version 1 has no axes and no tied leaves.
OWN = ('sparsejax', 'sha256')  # the keys of `__metadata__` that belong to this library
_OWN_MARKS = ('"version": ', '"leaves": [', '"tensors": {')  # in the entry `sparsejax`, which `json.dumps` wrote
# Reading metadata raises these errors for values of a wrong type, of a wrong length, or beyond every limit.
MALFORMED = (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError, RecursionError, MemoryError)
UNKNOWN = '0' * 64  # stands for a digest until it is known
_DIGEST = b'"sha256":"'  # The header's own digest begins behind this text: other quotes in JSON text are escaped.


class Extent(NamedTuple):
  """An `Extent` says where in a file the bytes of a tensor are: from `begin` to `end`, row-major and little-endian."""

  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int


class Header(NamedTuple):
  """A `Header` is that of one safetensors file. `text` is its JSON, byte for byte."""

  path: Any
  text: bytes
  metadata: dict[str, str]
  places: dict[str, Extent]


class Behind:
  """A `Behind` makes one call at a time in a thread of its own, while its caller goes on.

      with headers.Behind() as behind:
        for block in blocks:
          behind.call(hashed.update, block)       # waits for the block before, which must not change until then
        behind.wait()
  """

  def __init__(self) -> None:
    self._thread = ThreadPoolExecutor(1)
    self._last: Future[Any] | None = None

  def __enter__(self) -> 'Behind':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def call(self, function: Callable[..., Any], *arguments: Any) -> None:
    """Waits for the previous call, and then begins the call `function(*arguments)`."""
    self.wait()
    self._last = self._thread.submit(function, *arguments)

  def wait(self) -> None:
    """Waits for the last call, and raises what that call raised."""
    last, self._last = self._last, None
    if last:
      last.result()

  @property
  def busy(self) -> bool:
    return self._last is not None and not self._last.done()

  def close(self) -> None:
    """Waits for the last call, whose result nobody wants any more, and ends the thread."""
    self._thread.shutdown()


class Unreadable(ValueError):
  """An `Unreadable` says which file cannot be read, and why."""


def bad(path: Any, what: str) -> Unreadable:
  """Returns the error for a file that cannot be read; `what` says why."""
  what = what if len(what) <= MOST_TEXT else f'{what[:MOST_TEXT]}...'
  return Unreadable(f'io.load: {path}: {what}. Nothing was loaded; copy the file again, or save it anew.')


def is_own(header: Header) -> bool:
  """Returns whether `saving.save` wrote the file, altered or not. Other files may have metadata of the same names.

  A file of `save` has both names of `OWN` and an entry with three marks. A single altered byte leaves a name and two
  marks, which suffice: a damaged file is not taken for one of another program.
  """
  return any(key in header.metadata for key in OWN) and any(
      sum(mark in text for mark in _OWN_MARKS) > 1 for text in header.metadata.values())


def parsed(text: str | bytes) -> Any:
  """Returns the value of a JSON text. Raises `ValueError` if an object has one name twice, and for NaN and infinity."""
  return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)


def _refuse_constant(text: str) -> None:
  raise ValueError(f'{text} is no number of JSON')


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns the pairs of a JSON object as a dict. Other readers let the last of two equal names win in silence."""
  found: dict[str, Any] = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f'the name {name!r} is there twice')
    found[name] = value
  return found


def read(path: str | os.PathLike[str]) -> Header:
  """Returns the header of a safetensors file. The safetensors package checks that the file is sound and complete.

  Raises `OSError` if the file cannot be read. Raises `ValueError` for any other file, and for dtypes and shapes that
  NumPy does not have. Raises `ValueError` for two tensors of one name, and for a name of more than `DEEPEST` keys.
  """
  try:
    text = _text(path)
    entries = parsed(text)  # first, because the safetensors package does not say that a name is there twice
    with safetensors.safe_open(os.fspath(path), framework='numpy') as opened:
      metadata = dict(opened.metadata() or {})
  except OSError as e:
    raise OSError(e.errno, f'io.load: cannot read {path}: {e.strerror or e}') from e
  except (safetensors.SafetensorError, UnicodeError, *MALFORMED) as e:
    raise bad(path, f'it is not a whole safetensors file: truncated, altered, or another format ({e})') from e
  entries.pop('__metadata__', None)
  return Header(path, text, metadata, {name: _place(path, name, entry, 8 + len(text))
                                       for name, entry in entries.items()})


def _text(path: str | os.PathLike[str]) -> bytes:
  """Returns the JSON of a header, or as much of it as the file has."""
  kind = os.stat(path).st_mode
  if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # Reading a pipe would wait for ever.
    raise ValueError('a pipe or a device')
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    return file.read(min(length, LONGEST, os.fstat(file.fileno()).st_size))


def _place(path: Any, name: str, entry: dict[str, Any], start: int) -> Extent:
  if entry['dtype'] not in DTYPES:
    raise bad(path, f'tensor {name!r} has dtype {entry["dtype"]}; {", ".join(DTYPES)} can be read')
  dtype, shape, (begin, end) = np.dtype(DTYPES[entry['dtype']]), tuple(entry['shape']), entry['data_offsets']
  if not can_be(shape, dtype):
    raise bad(path, f'tensor {name!r} has a shape of {len(shape)} axes that NumPy does not have')
  if keys_in(name) > DEEPEST:
    raise bad(path, f'the name of a tensor has {keys_in(name)} keys, more than {DEEPEST}: {name!r}')
  return Extent(dtype, shape, start + begin, start + end)


def can_be(shape: tuple[int, ...], dtype: np.dtype) -> bool:
  """Returns whether NumPy has arrays of this shape, empty ones too."""
  return len(shape) <= _MOST_AXES and math.prod(n or 1 for n in shape) * dtype.itemsize < 2**63


def keys_in(name: str) -> int:
  """Returns how many keys a name has that is split at slashes or at dots."""
  return name.count('/') + name.count('.') + 1


def written(metadata: dict[str, str], places: dict[str, Extent]) -> bytes:
  """Returns the JSON of a header, in the order of `places`, whose offsets count from the first byte of data."""
  header: dict[str, Any] = {'__metadata__': metadata}
  for name, place in places.items():
    header[name] = {'dtype': CODES[place.dtype.name], 'shape': list(place.shape),
                    'data_offsets': [place.begin, place.end]}
  return json.dumps(header, separators=(',', ':')).encode()


def signed(text: bytes) -> bytes:
  """Returns the JSON of a header whose own SHA-256 is `UNKNOWN` with this SHA-256 in place."""
  return _with_digest(text, hashlib.sha256(text).hexdigest())


def is_signed(header: Header) -> bool:
  """Returns whether the header is that of `signed`, unaltered."""
  return signed(_with_digest(header.text, UNKNOWN)) == header.text


def _with_digest(text: bytes, digest: str) -> bytes:
  own = text.find(_DIGEST) + len(_DIGEST)
  return text[:own] + digest.encode() + text[own + len(digest):]
