"""Writes packed and dense parameters to one safetensors file, in which every byte can be verified.

    save('model.safetensors', packed, metadata={'run': 'seed 0'})

Every tensor of the file is a plain tensor that any safetensors reader opens. A dense leaf has the name of its path,
`a/b/kernel`. A packed leaf is `a/b/kernel.values` and the other arrays of its format, such as `.indices` (`NMArray`) or
`.mask` (`BitmaskArray`). The header's `__metadata__` says in JSON which tensors belong together, what the axes of a
packed leaf mean and which leaves are one array. `__metadata__` also holds the SHA-256 of every tensor and of the header
itself.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import errors, formats, progress, trees
from sparsejax.arguments import checked, is_known
from sparsejax.io import bodies, claims, headers
from sparsejax.io.stored import Stored
from sparsejax.types import PyTree


@checked
def save(path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, str] | None = None) -> None:
  """Writes `params`, whose leaves may be packed or dense, to one safetensors file, or leaves nothing behind.

  A leaf that is in several places of the tree, one and the same array, is written once. Leaves may be `Stored`, of
  other files: each is read, written and forgotten before the next. `metadata` holds strings of the caller, which
  `io.metadata` reads back. A file at `path` is replaced in one step, after the new file has reached the disk. Raises
  `ValueError` for leaves, keys and dtypes that the file format cannot hold, and `OSError` if the file cannot be
  written.
  """
  metadata = dict(metadata or {})
  wrong = [k for k, v in metadata.items() if k in headers.OWN or not isinstance(k, str) or not isinstance(v, str)]
  if wrong:
    raise ValueError(f'io.save: metadata {errors.some(map(str, wrong))}: keys and values must be strings, and the keys '
                     f'not {errors.some(headers.OWN)}.')
  leaves = _planned(params)
  entries = [leaf.entry for leaf in leaves]
  room = _room(leaves, metadata)
  _refuse_unreadable(leaves, entries, metadata, room)
  with bodies.replacing(path) as file:
    body = bodies.Body(file, room)
    once = [leaf for leaf in leaves if 'same' not in leaf.entry]
    try:
      for leaf in progress.counted('write', sorted(once, key=lambda leaf: -leaf.widest), lambda leaf: leaf.path):
        _write(body, leaf)
      body.finish(lambda places, digests, length: _header(entries, places, digests, metadata, length))
    finally:
      body.close()


def _refuse_unreadable(leaves: list['_Planned'], entries: list[Any], metadata: dict[str, str], room: int) -> None:
  """Raises `ValueError` if `load` would refuse a file of these leaves, as far as is known before they are packed."""
  nbytes = {name: formats.nbytes(part) for leaf in leaves for name, part in leaf.parts.items()}
  why = claims.problem(entries, nbytes, room)
  if room > headers.LONGEST:
    why = f'the names and the metadata take {room} bytes, more than the {headers.LONGEST} of the file format'
  try:
    ''.join((*metadata, *metadata.values())).encode()
  except UnicodeEncodeError:
    why = 'the metadata have half of a surrogate pair, which is no text'
  if why:
    raise ValueError(f'io.save: {why}. Nothing was written; rename it, or leave it out.')


class _Planned(NamedTuple):
  """A `_Planned` is a leaf to be written; `entry` is what `__metadata__` says of the leaf.

  `parts` holds the tensors of the leaf by name, and nothing if they are not known before the leaf is read. `widest` is
  the largest item size, in bytes, that a tensor of the leaf may have.
  """

  path: str
  leaf: Any
  entry: dict[str, Any]
  parts: dict[str, Any]
  widest: int


def _planned(params: PyTree) -> list[_Planned]:
  """Returns what is to be written of each leaf, in the order of the tree. Nothing is read or copied yet."""
  planned: list[_Planned] = []
  first: dict[int, str] = {}
  taken: set[str] = set()
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=formats.is_packed)[0]:
    path = trees.path_name(keys)
    boxed = isinstance(keys[-1], jax.tree_util.GetAttrKey) if len(keys) > 1 else False
    steps = keys[:-1] if boxed and trees.path_name(keys[:-1]) == path else keys  # NNX paths end in `.value`.
    entry = {'path': path, 'keys': [_key(path, key) for key in steps]}
    if id(leaf) in first and hasattr(leaf, 'shape'):
      entry |= {'same': first[id(leaf)]}
      parts, widest = {}, 0
    elif isinstance(leaf, Stored):
      _refuse(path, leaf)
      entry |= _dense_entry(leaf)
      parts, widest = {} if leaf.index_bytes else {path: leaf}, leaf.widest
    else:
      leaf = leaf if hasattr(leaf, 'dtype') and hasattr(leaf, 'shape') else np.asarray(leaf)
      about, parts = _entry(path, leaf)
      entry |= about
      widest = max(np.dtype(part.dtype).itemsize for part in parts.values())
    names = {path, *parts}
    if taken & names:
      raise ValueError(f'io.save: two leaves of the tree have the path {sorted(taken & names)[0]!r}; rename one.')
    taken |= names
    first.setdefault(id(leaf), path)
    planned.append(_Planned(path, leaf, entry, parts, widest))
  return planned


def _write(body: bodies.Body, planned: _Planned) -> None:
  """Adds the tensors of a leaf to the file, and completes the leaf's entry of `__metadata__`."""
  path, leaf, parts, blocks = planned.path, planned.leaf, planned.parts, iter([planned.parts])
  if isinstance(leaf, Stored) and leaf.blocks:
    rows = max(1, (1 << 24) // max(leaf.dtype.itemsize * leaf.size // max(leaf.shape[0], 1), 1))
    parts, blocks = {path: leaf}, ({path: block} for block in leaf.blocks(rows))
  elif isinstance(leaf, Stored):  # packed, or made dense, now
    made, rows_of_parts = leaf.packing() if leaf.packing else (leaf.load(), None)
    about, parts = _entry(path, made, check=False)
    planned.entry.update(about)
    if why := claims.problem([planned.entry], {name: formats.nbytes(part) for name, part in parts.items()}, 0):
      raise ValueError(f'io.save: {why}.')
    blocks = iter([parts]) if rows_of_parts is None else (_named(path, rows) for rows in rows_of_parts)
  body.add(parts, blocks, planned.widest)


def _dense_entry(leaf: Any) -> dict[str, Any]:
  return {'kind': 'dense', 'shape': list(leaf.shape), 'dtype': np.dtype(leaf.dtype).name}


def _entry(path: str, leaf: Any, check: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the entry of `__metadata__` of one leaf, without its path, and its tensors by name.

  `check=False` is for leaves that were verified or are made just now; their arrays may be mere shapes.
  """
  if not formats.is_packed(leaf):
    _refuse(path, leaf)
    return _dense_entry(leaf), {path: leaf}
  for part in leaf.arrays().values():
    _refuse(path, part, check)
  if check and (problem := leaf.problem()):
    raise errors.at_leaf('io.save', path, leaf.shape, problem)
  parts, axes = leaf.in_files(), formats.axes_of(leaf)
  about = {'kind': leaf.kind, 'parts': list(parts), **leaf.described(), **({'roles': axes._asdict()} if axes else {})}
  return _dense_entry(leaf) | about, _named(path, parts)


def _named(path: str, parts: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arrays of the packed leaf at `path` by the names of their tensors."""
  return {f'{path}.{name}': part for name, part in parts.items()}


def _refuse(path: str, part: Any, check: bool = True) -> None:
  """Raises `ValueError` if `part`, an array of a leaf, has no bytes that can be written."""
  problem = None
  if check and not is_known(part):
    problem = 'it has no values here (traced, or a mere shape); save concrete arrays.'
  elif jax.dtypes.issubdtype(part.dtype, jax.dtypes.prng_key):
    problem = 'it is a typed PRNG key; save jax.random.key_data of it.'
  elif np.dtype(part.dtype).name not in headers.CODES:
    problem = (f'safetensors cannot hold dtype {part.dtype}; cast it, or leave it out. It holds '
               f'{", ".join(headers.CODES)}.')
  elif not getattr(part, 'is_fully_addressable', True):
    problem = 'parts of it are on other hosts; gather it with jax.experimental.multihost_utils.process_allgather first.'
  if problem:
    raise errors.at_leaf('io.save', path, part.shape, problem)


def _key(path: str, key: Any) -> list[Any]:
  """Returns one step of a path: `['dict', key]` or `['list', index]`; attributes become keys of a dict."""
  if isinstance(key, (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)):
    return ['list', getattr(key, 'idx', getattr(key, 'key', None))]
  name = getattr(key, 'key', getattr(key, 'name', None))
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise ValueError(f'io.save: {path!r}: the key {name!r} is neither a string nor a whole number; rename it.')
  return ['dict', name]


def _room(leaves: list[_Planned], metadata: dict[str, str]) -> int:
  """Returns how many bytes the header will take, about, if leaves are packed later, or else exactly."""
  parts = {name: part for leaf in leaves for name, part in leaf.parts.items()}
  later = [leaf for leaf in leaves if not leaf.parts and 'same' not in leaf.entry]
  parts |= {leaf.path: leaf.leaf for leaf in later}
  places = {name: headers.Extent(np.dtype(part.dtype), tuple(part.shape), 0, 0) for name, part in parts.items()}
  text = _header([leaf.entry for leaf in leaves], places, dict.fromkeys(places, headers.UNKNOWN), metadata, 0)
  return len(text) + sum(len(leaf.path) + 400 for leaf in later) // 8 * 8


def _header(leaves: list[Any], places: Mapping[str, headers.Extent], digests: Mapping[str, str],
            metadata: dict[str, str], length: int) -> bytes:
  """Returns the JSON of the header, filled up with spaces to `length` or more, a multiple of eight bytes.

  The length does not depend on the offsets of a file of less than 10 GB, so that the header fits in the room for it.
  """
  about = json.dumps({'version': headers.VERSION, 'leaves': leaves, 'tensors': digests})
  own = {**metadata, 'sparsejax': about, 'sha256': headers.UNKNOWN}
  far = {name: place._replace(begin=10**9, end=10**9) for name, place in places.items()}
  text, longest = headers.written(own, places), headers.written(own, far)
  length = max(length, len(text), len(longest))
  return headers.signed(text.ljust(length + -length % 8))
