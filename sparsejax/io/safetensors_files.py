"""Writes packed and dense parameters to one safetensors file, and reads them back with every byte verified.

    save('model.safetensors', packed, metadata={'run': 'seed 0'})
    load('model.safetensors')        # the tree as nested dicts and lists, packed leaves packed
    read('anything')                 # the same for files and Orbax checkpoints that others wrote

Every tensor of the file is a plain tensor that any safetensors reader opens. A dense leaf has the name of its path,
`a/b/kernel`. A packed leaf is `a/b/kernel.values` and the other arrays of its format, such as `.indices` (`NMArray`) or
`.mask` (`BitmaskArray`). The header's `__metadata__` says in JSON which tensors belong together, and holds the SHA-256
of every tensor and of the header itself.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
import safetensors

from sparsejax import errors, formats, trees
from sparsejax.io import orbax
from sparsejax.types import PyTree

VERSION = 1

_CODES = {
  'bool': 'BOOL', 'int8': 'I8', 'uint8': 'U8', 'int16': 'I16', 'uint16': 'U16', 'int32': 'I32', 'uint32': 'U32',
  'int64': 'I64', 'uint64': 'U64', 'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32', 'float64': 'F64',
  'complex64': 'C64', 'float8_e4m3fn': 'F8_E4M3', 'float8_e5m2': 'F8_E5M2', 'float8_e8m0fnu': 'F8_E8M0',
  'float8_e4m3fnuz': 'F8_E4M3FNUZ', 'float8_e5m2fnuz': 'F8_E5M2FNUZ'}
_DTYPES = {code: name for name, code in _CODES.items()}

_OWN = ('sparsejax', 'sha256')  # These keys of `__metadata__` belong to this module.
_UNKNOWN = '0' * 64  # stands for a digest until it is known
_DIGEST = b'"sha256":"'  # The header's own digest begins behind this text: other quotes in JSON text are escaped.


def save(path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, str] | None = None) -> None:
  """Writes `params`, whose leaves may be packed or dense, to one safetensors file, or leaves nothing behind.

  `metadata` holds strings of the caller, which `io.metadata` reads back. A file at `path` is replaced in one step,
  after the new file has reached the disk. Raises `ValueError` for leaves, keys and dtypes that the file format cannot
  hold, and `OSError` if the file cannot be written.
  """
  metadata = dict(metadata or {})
  wrong = [k for k, v in metadata.items() if k in _OWN or not isinstance(k, str) or not isinstance(v, str)]
  if wrong:
    raise ValueError(f'io.save: metadata {errors.some(map(str, wrong))}: keys and values must be strings, and the keys '
                     f'not {errors.some(_OWN)}.')
  leaves, tensors = _described(params)
  order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))  # aligns every tensor
  tensors = {name: tensors[name] for name in order}
  with _replacing(path) as file:
    file.write(_header(leaves, tensors, dict.fromkeys(tensors, _UNKNOWN), metadata))
    digests = {}
    for name, tensor in tensors.items():
      data = _bytes(tensor)
      digests[name] = hashlib.sha256(data).hexdigest()
      file.write(data)
    file.seek(0)
    file.write(_header(leaves, tensors, digests, metadata))


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
  """Returns the tree in a file that `save` wrote, after every byte is verified.

  Leaves are NumPy arrays, and packed arrays of NumPy arrays. The tree consists of nested dicts and lists or, with
  `like`, has the structure of `like`. Leaves of `like` are arrays or mere shapes, packed or dense, and must have the
  dense shapes and dtypes of the file's leaves. Raises `ValueError` naming the file and the tensor if anything is
  missing, altered or malformed.
  """
  file = _contents(path)
  if not file.ours:
    raise ValueError(f'io.load: {path} was not written by sparsejax.io.save; sparsejax.io.read opens any such file.')
  about = _verified(path, file)
  try:
    leaves = {entry['path']: _leaf(path, entry, file.tensors) for entry in about['leaves']}
    tree = _nested([(entry['keys'], leaves[entry['path']]) for entry in about['leaves']])
  except (KeyError, TypeError, IndexError, AttributeError) as e:
    raise _bad(path, f'its metadata is malformed ({e!r})') from e
  return tree if like is None else _like(path, leaves, like)


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the strings that were given to `save`, or the metadata of any other safetensors file."""
  return {key: value for key, value in _contents(path).metadata.items() if key not in _OWN}


def read(path: str | os.PathLike[str], item: str | None = None) -> PyTree:
  """Returns the parameters in a file or checkpoint of unknown structure, as NumPy arrays on this host.

  `path` is a file that `save` wrote, any other safetensors file, or an Orbax checkpoint. The names of another
  safetensors file are split at `/`, or else at `.`. Of a `CheckpointManager`'s folder the newest complete step is read.
  Of several items `item` is read, by default `params` or the only item. Of a tree with `params` beside an optimizer's
  state `params` is read. `item` can also name a key at the top of the tree.

  Raises `ValueError` for anything else, and for a damaged or ambiguous checkpoint, listing the items that it has.
  """
  if os.path.isdir(path):
    return orbax.read(path, item)
  if not os.path.exists(path):
    raise ValueError(f'io.read: {path} does not exist; give a safetensors file or the folder of an Orbax checkpoint.')
  file = _contents(path)
  tree = load(path) if file.ours else _split_names(file.tensors)
  return tree if item is None else orbax.at_top(path, tree, item)


# Writing.


def _described(params: PyTree) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Returns the entry of `__metadata__` for each leaf, and the tensors by name, not yet on the host."""
  entries, tensors = [], {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=formats.is_packed)[0]:
    path = trees.path_name(keys)
    entry, parts = _entry(path, leaf)
    taken = sorted(tensors.keys() & parts.keys()) or [e['path'] for e in entries if e['path'] == path]
    if taken:
      raise ValueError(f'io.save: two leaves of the tree have the path {taken[0]!r}; rename one.')
    keys = keys[:-1] if trees.path_name(keys[:-1]) == path else keys  # NNX paths end in `.value`.
    entries.append({'path': path, 'keys': [_key(path, key) for key in keys], **entry})
    tensors |= parts
  return entries, tensors


def _entry(path: str, leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  if formats.is_packed(leaf):
    kind = {'kind': leaf.kind, **leaf.described()}
    parts = {f'{path}.{name}': array for name, array in leaf.arrays().items()}
  else:
    leaf = leaf if hasattr(leaf, 'dtype') and hasattr(leaf, 'shape') else np.asarray(leaf)
    kind, parts = {'kind': 'dense'}, {path: leaf}
  for part in parts.values():
    _refuse(path, part)
  if formats.is_packed(leaf) and (problem := leaf.problem()):
    raise errors.at_leaf('io.save', path, leaf.shape, problem)
  return {**kind, 'shape': list(leaf.shape), 'dtype': np.dtype(leaf.dtype).name}, parts


def _refuse(path: str, part: Any) -> None:
  """Raises `ValueError` if `part`, an array of a leaf, has no bytes that can be written."""
  problem = None
  if isinstance(part, (jax.core.Tracer, jax.ShapeDtypeStruct)):
    problem = 'it has no values here (traced, or a mere shape); save concrete arrays.'
  elif jax.dtypes.issubdtype(part.dtype, jax.dtypes.prng_key):
    problem = 'it is a typed PRNG key; save jax.random.key_data of it.'
  elif np.dtype(part.dtype).name not in _CODES:
    problem = f'safetensors cannot hold dtype {part.dtype}; cast it, or leave it out. It holds {", ".join(_CODES)}.'
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


def _header(leaves: list[Any], tensors: dict[str, Any], digests: dict[str, str], metadata: dict[str, str]) -> bytes:
  """Returns the length of the header, and the header; the length does not depend on the digests."""
  about = json.dumps({'version': VERSION, 'leaves': leaves, 'tensors': digests})
  header: dict[str, Any] = {'__metadata__': {**metadata, 'sparsejax': about, 'sha256': _UNKNOWN}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    code = _CODES[np.dtype(tensor.dtype).name]
    header[name] = {'dtype': code, 'shape': list(tensor.shape), 'data_offsets': [start, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  digest = hashlib.sha256(text).hexdigest()
  own = text.index(_DIGEST) + len(_DIGEST)
  return len(text).to_bytes(8, 'little') + text[:own] + digest.encode() + text[own + len(digest):]


def _bytes(tensor: Any) -> memoryview:
  """Returns the bytes of one tensor, row-major and little-endian. Copies only this tensor to the host."""
  array = np.asarray(tensor, order='C')
  if array.dtype.byteorder == '>':
    array = array.astype(array.dtype.newbyteorder('<'))
  return array.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Opens a new file that replaces `path` once it is complete and on the disk. An error removes the new file."""
  target = os.path.realpath(path)
  if os.path.exists(target) and not os.path.isfile(target):
    raise ValueError(f'io.save: {path} is a folder or a device; give the name of a file.')
  partial = f'{target}.{secrets.token_hex(4)}.tmp'
  try:
    with open(partial, 'xb') as file:
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


# Reading.


class _File(NamedTuple):
  """A `_File` is a safetensors file in memory, whose `tensors` are views of one buffer."""

  metadata: dict[str, str]
  header: bytes
  tensors: dict[str, np.ndarray]

  @property
  def ours(self) -> bool:
    return any(key in self.metadata for key in _OWN)


def _bad(path: Any, what: str) -> ValueError:
  return ValueError(f'io.load: {path}: {what}. Nothing was loaded; copy the file again, or save it anew.')


def _contents(path: str | os.PathLike[str]) -> _File:
  """Returns the contents of the file. The safetensors package checks that the header is sound and the file complete."""
  try:
    buffer = np.fromfile(path, np.uint8)
    with safetensors.safe_open(os.fspath(path), framework='numpy') as opened:
      metadata = dict(opened.metadata() or {})
  except OSError as e:
    raise OSError(e.errno, f'io.load: cannot read {path}: {e.strerror or e}') from e
  except (safetensors.SafetensorError, ValueError) as e:
    raise _bad(path, f'it is not a whole safetensors file: truncated, altered, or another format ({e})') from e
  start = 8 + int.from_bytes(buffer[:8].tobytes(), 'little')
  header = buffer[8:start].tobytes()
  tensors = {}
  for name, entry in json.loads(header).items():
    if name == '__metadata__':
      continue
    if entry['dtype'] not in _DTYPES:
      raise _bad(path, f'tensor {name!r} has dtype {entry["dtype"]}; {", ".join(_DTYPES)} can be read')
    begin, end = (start + offset for offset in entry['data_offsets'])
    tensors[name] = buffer[begin:end].view(np.dtype(_DTYPES[entry['dtype']])).reshape(entry['shape'])
  return _File(metadata, header, tensors)


def _verified(path: Any, file: _File) -> dict[str, Any]:
  """Returns the entry `sparsejax` of `__metadata__`, after version, header and every tensor are verified."""
  try:
    about = json.loads(file.metadata['sparsejax'])
    version, digests = about['version'], dict(about['tensors'])
  except (KeyError, TypeError, ValueError) as e:
    raise _bad(path, 'its header was altered') from e
  if version != VERSION:
    raise ValueError(f'io.load: {path} has format version {version!r}, but {VERSION} is read here; update sparsejax.')
  if digests.keys() != file.tensors.keys():
    missing, added = digests.keys() - file.tensors.keys(), file.tensors.keys() - digests.keys()
    raise _bad(path, f'missing tensors: {errors.some(sorted(missing)) or "none"}; tensors that were not saved: '
                     f'{errors.some(sorted(added)) or "none"}')
  own = file.header.find(_DIGEST) + len(_DIGEST)
  blank = file.header[:own] + _UNKNOWN.encode() + file.header[own + len(_UNKNOWN):]
  if hashlib.sha256(blank).hexdigest() != file.metadata.get('sha256'):
    raise _bad(path, 'its header was altered (names, shapes or metadata do not have the SHA-256 that was saved)')
  for name, tensor in file.tensors.items():
    if hashlib.sha256(_bytes(tensor)).hexdigest() != digests[name]:
      raise _bad(path, f'tensor {name!r} was altered (its bytes do not have the SHA-256 that was saved)')
  return about


def _leaf(path: Any, entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
  """Returns one leaf, made of its tensors and its entry of `__metadata__`."""
  name, shape, kind = entry['path'], tuple(entry['shape']), entry['kind']
  if kind == 'dense':
    leaf = tensors[name]
  elif format_ := formats.TABLE.get(kind):
    parts = {part: tensors[f'{name}.{part}'] for part in format_.names()}
    try:
      leaf = format_.restored(parts, shape, entry)
    except ValueError as e:
      raise _bad(path, f'{name!r} {e}') from e
  else:
    raise _bad(path, f'{name!r} is of an unknown kind, {kind!r}: none of {", ".join(formats.TABLE)} in formats.TABLE')
  problem = leaf.problem() if formats.is_packed(leaf) else None
  if problem or leaf.shape != shape or leaf.dtype.name != entry['dtype']:
    raise _bad(path, f'{name!r}: {problem or f"has shape {leaf.shape} and dtype {leaf.dtype}, not those saved"}')
  return leaf


def _nested(leaves: list[tuple[list[Any], Any]]) -> PyTree:
  """Returns the tree of `(keys, leaf)` pairs, in dicts and lists."""
  if len(leaves) == 1 and not leaves[0][0]:
    return leaves[0][1]
  branches: dict[tuple[str, Any], list[Any]] = {}
  for (step, *rest), leaf in leaves:
    branches.setdefault(tuple(step), []).append((rest, leaf))
  children = {key: _nested(branch) for (_, key), branch in branches.items()}
  if branches and all(kind == 'list' for kind, _ in branches):
    return [children.get(i) for i in range(max(children) + 1)]
  return children


def _like(path: Any, leaves: dict[str, Any], like: PyTree) -> PyTree:
  """Returns `leaves` in the structure of `like`."""
  names, models, treedef = trees.flatten(like, is_leaf=formats.is_packed)
  absent, extra = [name for name in names if name not in leaves], [name for name in leaves if name not in names]
  if absent or extra:
    raise ValueError(f'io.load: {path} holds another tree than `like`. Missing in the file: '
                     f'{errors.some(absent) or "none"}; missing in `like`: {errors.some(extra) or "none"}.')
  for name, model in zip(names, models):
    leaf, model = leaves[name], model if hasattr(model, 'dtype') else np.asarray(model)
    if tuple(model.shape) != leaf.shape or model.dtype.name != leaf.dtype.name:
      raise errors.at_leaf('io.load', name, model.shape, f'`like` has dtype {model.dtype} there, but {path} has shape '
                           f'{leaf.shape} and dtype {leaf.dtype}; give the `like` of this file, or none.')
  return treedef.unflatten([leaves[name] for name in names])


def _split_names(tensors: dict[str, np.ndarray]) -> PyTree:
  """Returns the tensors as nested dicts by the parts of their names; flat if one name is the beginning of another."""
  mark = '/' if any('/' in name for name in tensors) else '.'
  parents = {name[:i] for name in tensors for i, letter in enumerate(name) if letter == mark}
  if parents & tensors.keys():
    return dict(tensors)
  return _nested([([['dict', key] for key in name.split(mark)], tensor) for name, tensor in tensors.items()])
