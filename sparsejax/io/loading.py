"""Reads the files that `save` wrote, with every byte verified, and files and checkpoints of other programs.

    load('model.safetensors')        # the tree as nested dicts and lists, packed leaves packed.
    read('anything')                 # The same for files, sharded folders and Orbax checkpoints that others wrote.
    stored('anything')               # The same without the values, which are read leaf by leaf.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax import errors, formats, trees
from sparsejax.arguments import checked
from sparsejax.io import claims, folders, headers, orbax
from sparsejax.io.stored import Stored, Tensor, loaded
from sparsejax.types import Axes, PyTree


@checked
def load(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
  """Returns the tree in a file that `save` wrote, after every byte is verified.

  Leaves are NumPy arrays, and packed arrays of NumPy arrays. A leaf that was in several places is one array again. The
  tree consists of nested dicts and lists or, with `like`, has the structure of `like`. Leaves of `like` are arrays or
  mere shapes, packed or dense, and must have the dense shapes and dtypes of the file's leaves. Raises `ValueError`
  naming the file and the tensor if anything is missing, altered or malformed.
  """
  header = _own(headers.read(path))
  about = _verified(header)
  leaves = loaded(_leaves(header, about))
  return _tree(header, about, leaves) if like is None else _like(path, leaves, like)


def _own(header: headers.Header) -> headers.Header:
  """Returns the header of a file that `save` wrote. Raises `ValueError` for another file."""
  if not headers.is_own(header):
    raise ValueError(f'io.load: {header.path} was not written by sparsejax.io.save; sparsejax.io.read opens any such '
                     'file.')
  return header


@checked
def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the strings that were given to `save`, or the metadata of any other safetensors file.

  The names in `headers.OWN` are left out: `save` writes its own strings under these names.
  """
  return {key: value for key, value in headers.read(path).metadata.items() if key not in headers.OWN}


@checked
def read(path: str | os.PathLike[str], item: str | None = None) -> PyTree:
  """Returns the parameters in a file or checkpoint of unknown structure, as NumPy arrays on this host.

  `path` is a file that `save` wrote, any other safetensors file, the folder of a sharded safetensors checkpoint or its
  index, or an Orbax checkpoint. The names of another safetensors file are split at `/`, or else at `.`. Of a
  `CheckpointManager`'s folder the newest complete step is read. Of several items `item` is read, by default `params` or
  the only item. Of a tree with `params` beside an optimizer's state `params` is read. `item` can also name a key at the
  top of the tree.

  Raises `ValueError` for anything else, and for a damaged, incomplete or ambiguous checkpoint, listing the items that
  it has.
  """
  return loaded(stored(path, item))


@checked
def stored(path: str | os.PathLike[str], item: str | None = None, *, own: bool = False) -> PyTree:
  """Returns the tree of `read` without the values: its leaves are `Stored` and are read when they are asked for.

  The leaves of an Orbax checkpoint are arrays, as `read` returns them. Raises `ValueError` as `read` does; damage
  within a tensor is found when the tensor is read. With `own`, files that `save` did not write are refused, as `load`
  does.
  """
  header = headers.read(path) if own or os.path.isfile(path) and not folders.is_index(path) else None
  if header and (own or headers.is_own(header)):
    about = _verified(_own(header))
    tree = _tree(header, about, _leaves(header, about))
  elif header:
    tree = _split_names(folders.of_header(header))
  elif not os.path.exists(path) or not (os.path.isdir(path) or os.path.isfile(path)):
    what = 'is a pipe or a device' if os.path.exists(path) else 'does not exist'
    raise ValueError(f'io.read: {path} {what}; give a safetensors file, the folder of a sharded safetensors '
                     'checkpoint, or the folder of an Orbax checkpoint.')
  else:
    tensors = folders.tensors(path)
    if tensors is None:
      return orbax.read(path, item)
    tree = _split_names(tensors)
  return tree if item is None else orbax.at_top(path, tree, item)


def _verified(header: headers.Header) -> dict[str, Any]:
  """Returns the entry `sparsejax` of `__metadata__`, after the version and the header itself are verified."""
  try:
    about = headers.parsed(header.metadata['sparsejax'])
    version, digests = about['version'], dict(about['tensors'])
  except headers.MALFORMED as e:
    raise headers.bad(header.path, 'its header was altered') from e
  if version not in headers.READABLE or type(version) is not int:
    raise ValueError(f'io.load: {header.path} has format version {version!r}, but {headers.VERSION} is read here; '
                     'update sparsejax.')
  if digests.keys() != header.places.keys():
    missing, added = digests.keys() - header.places.keys(), header.places.keys() - digests.keys()
    raise headers.bad(header.path, f'missing tensors: {errors.some(sorted(missing)) or "none"}; tensors that were not '
                                   f'saved: {errors.some(sorted(added)) or "none"}')
  if not headers.is_signed(header):
    raise headers.bad(header.path, 'its header was altered (names, shapes or metadata do not have the SHA-256 that was '
                                   'saved)')
  return about


def _leaves(header: headers.Header, about: dict[str, Any]) -> dict[str, Stored]:
  """Returns the leaves of a verified file by path; leaves that are one array are one object."""
  tensors = {name: Tensor(header.path, name, place, about['tensors'][name]) for name, place in header.places.items()}
  leaves: dict[str, Stored] = {}
  try:
    nbytes = {name: place.end - place.begin for name, place in header.places.items()}
    if why := claims.problem(about['leaves'], nbytes, len(header.text)):
      raise headers.bad(header.path, why)
    for entry in about['leaves']:
      path = entry['path']
      leaves[path] = leaves[entry['same']] if 'same' in entry else _stored(header.path, entry, tensors)
  except headers.Unreadable:
    raise
  except headers.MALFORMED as e:
    raise headers.bad(header.path, f'its metadata is malformed ({e!r})') from e
  return leaves


def _stored(path: Any, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
  """Returns one leaf of its entry of `__metadata__`. The leaf is made and verified when it is loaded."""
  shape, dtype = tuple(entry['shape']), np.dtype(entry['dtype'])
  if entry['kind'] == 'dense':
    leaf = tensors[entry['path']].leaf()
    if (leaf.shape, leaf.dtype) == (shape, dtype):
      return leaf
  packed = 0 if entry['kind'] == 'dense' else formats.PackedArray.index_bytes
  return Stored(shape, dtype, lambda: _leaf(path, entry, tensors), axes=_roles(path, entry), index_bytes=packed)


def _roles(path: Any, entry: dict[str, Any]) -> Axes | None:
  """Returns the axes that the entry of a packed leaf tells, or `None`."""
  if entry.get('roles') is None:
    return None
  roles, rank = entry['roles'], len(entry['shape'])
  axes = Axes(*(tuple(roles[field]) for field in Axes._fields[:4]), roles['source'])
  if sorted(sum(axes[:4], ())) != list(range(rank)) or not isinstance(axes.source, str) or any(
      type(a) is not int for group in axes[:4] for a in group):
    raise headers.bad(path, f'{entry["path"]!r} has axes {roles}, which are not those of {rank} axes')
  return axes


def _leaf(path: Any, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
  """Returns one leaf, made of its tensors and its entry of `__metadata__`."""
  try:
    leaf = _made(path, entry, tensors)
    problem = leaf.problem() if formats.is_packed(leaf) else None
  except headers.Unreadable:
    raise
  except headers.MALFORMED as e:
    raise headers.bad(path, f'its metadata is malformed ({e!r})') from e
  shape = tuple(entry['shape'])
  if problem or leaf.shape != shape or leaf.dtype.name != entry['dtype']:
    raise headers.bad(path, f'{entry["path"]!r}: '
                            f'{problem or f"has shape {leaf.shape} and dtype {leaf.dtype}, not those saved"}')
  return leaf


def _made(path: Any, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
  name, kind = entry['path'], entry['kind']
  if kind == 'dense':
    return tensors[name].read()
  format_ = formats.TABLE.get(kind) or formats.AROUND.get(kind)
  if not format_:
    raise headers.bad(path, f'{name!r} is of an unknown kind, {kind!r}: none of {", ".join(formats.TABLE)} in '
                            'formats.TABLE')
  parts = {part: tensors[f'{name}.{part}'].read() for part in entry.get('parts', format_.names())}
  try:
    leaf = format_.restored(parts, tuple(entry['shape']), entry)
  except ValueError as e:
    raise headers.bad(path, f'{name!r} {e}') from e
  return formats.with_axes(leaf, _roles(path, entry))


def _tree(header: headers.Header, about: dict[str, Any], leaves: Mapping[str, Any]) -> PyTree:
  try:
    return _nested([(entry['keys'], leaves[entry['path']]) for entry in about['leaves']])
  except headers.MALFORMED as e:
    raise headers.bad(header.path, f'its metadata is malformed ({e!r})') from e


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


def _split_names(tensors: Mapping[str, Tensor]) -> PyTree:
  """Returns the leaves as nested dicts by the parts of their names; flat if one name is the beginning of another."""
  leaves = {name: tensor.leaf() for name, tensor in tensors.items()}
  mark = '/' if any('/' in name for name in leaves) else '.'
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *above, last = name.split(mark)
    node = tree
    for key in above:
      node = node.setdefault(key, {})
      if isinstance(node, Stored):
        return leaves
    if last in node:
      return leaves
    node[last] = leaf
  return tree
