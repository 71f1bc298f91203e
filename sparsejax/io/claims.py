"""Checks what the metadata of a file claims of its leaves, against the bytes that are there, before anything is built.

    claims.problem([{'path': 'w', 'keys': [['list', 10**9]], ...}], {'w': 64}, length=300)   # why this is refused

`save` and `load` refuse the same claims, so that whatever is written can be read.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sparsejax.io import headers

PLACES = 1 << 16  # places of lists, and one more for each byte of the header: lists may have holes
WEIGHTS = 1 << 26, 1024  # weights of a packed leaf, and so many more for each of its bytes: a leaf may be all zeros


def problem(leaves: Iterable[Mapping[str, Any]], nbytes: Mapping[str, int], length: int) -> str | None:
  """Returns why a file cannot have leaves with these entries of `__metadata__`, or `None`.

  `nbytes` maps the name of each tensor to its bytes. `length` is the number of bytes of the header. An entry that lacks
  a field or has a value of another type there may raise one of `headers.MALFORMED` instead.
  """
  ends: dict[Any, int] = {}  # maps the path of each list to its length
  types: dict[Any, type] = {}  # maps the path of each node to the type of its keys
  for entry in leaves:
    path, keys = entry['path'], [(kind, key) for kind, key in entry['keys']]
    if why := _unnamed(path, keys) or ('same' not in entry and _oversized(entry, nbytes)):
      return why
    for i, (kind, key) in enumerate(keys):
      node = tuple(keys[:i])
      if kind == 'list':
        ends[node] = max(ends.get(node, 0), key + 1)
      if types.setdefault(node, type(key)) is not type(key):
        return f'{path!r} has a number for a key beside a string, which JAX cannot sort'
  if sum(ends.values()) > PLACES + length:
    return f'its lists have {sum(ends.values())} places, more than the {PLACES + length} that {length} bytes may name'
  return None


def _unnamed(path: Any, keys: list[tuple[Any, Any]]) -> str | None:
  """Returns why a leaf cannot have this path and these keys, or `None`."""
  kinds = {'dict': (str, int), 'list': (int,)}
  if not isinstance(path, str) or path == '__metadata__':
    return f'{path!r} cannot be the path of a leaf'
  if not all(type(key) in kinds.get(kind, ()) and (kind == 'dict' or key >= 0) for kind, key in keys):
    return f'{path!r} cannot have the keys {keys}'
  if max(headers.keys_in(path), sum(headers.keys_in(str(key)) for _, key in keys)) > headers.DEEPEST:
    return f'the path of a leaf has more than {headers.DEEPEST} keys: {path!r}'
  try:
    ''.join((path, *(key for _, key in keys if isinstance(key, str)))).encode()
  except UnicodeEncodeError:
    return f'{path!r} has half of a surrogate pair, which is no text'
  return None


def _oversized(entry: Mapping[str, Any], nbytes: Mapping[str, int]) -> str | None:
  """Returns why no leaf has the shape and dtype of `entry`, or `None`."""
  path, shape, dtype = entry['path'], entry['shape'], entry['dtype']
  if dtype not in headers.CODES or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
    return f'{path!r} cannot have the shape {shape} and the dtype {dtype!r}'
  if not headers.can_be(tuple(shape), np.dtype(dtype)):
    return f'{path!r} has a shape of {len(shape)} axes that NumPy does not have'
  floor, each = WEIGHTS
  there = sum(nbytes.get(f'{path}.{part}', 0) for part in entry.get('parts', ()))
  if entry['kind'] != 'dense' and 'parts' in entry and math.prod(shape) > floor + each * there:
    return (f'{path!r} of shape {tuple(shape)} is packed into {there} bytes, which stand for at most '
            f'{floor + each * there} weights; pack a matrix of zeros in parts, or leave it dense')
  return None
