"""Reads the folder of a sharded safetensors checkpoint: an index in JSON, and the files that hold the tensors.

    folders.tensors('Llama-3-8B/')      # {'model.layers.0.mlp.up_proj.weight': Tensor(...), ...}

The index maps the name of each tensor to the file that holds the tensor: `{"weight_map": {"a.weight":
"model-00001-of-00002.safetensors", ...}}`. A folder with one safetensors file and no index is read like the file.
"""

import os
import pathlib
from typing import Any

from sparsejax import errors
from sparsejax.io import headers
from sparsejax.io.stored import Tensor

INDEX, PART = '.safetensors.index.json', '.safetensors'


def tensors(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
  """Returns the tensors of a safetensors checkpoint by name, or `None` if `path` is a folder without any.

  `path` is a safetensors file, an index, or the folder of either. Raises `ValueError` naming the part if a part is
  missing, and naming the tensor if index and parts do not agree where it is. Raises `ValueError` if the folder has
  several indices, or several files and no index.
  """
  folder = pathlib.Path(path)
  if folder.is_file():
    return _indexed(folder) if is_index(path) else of_part(path)
  names = sorted(os.listdir(folder))
  indices, files = ([name for name in names if name.endswith(end)] for end in (INDEX, PART))
  if len(indices) > 1:
    raise ValueError(f'io.read: {path} holds several indices; give one of them as the path: {errors.some(indices)}.')
  if indices:
    return _indexed(folder / indices[0])
  if len(files) > 1:
    raise ValueError(f'io.read: {path} holds {errors.some(files)}, and no index (...{INDEX}) that says what belongs '
                     'together; give one of the files as the path, or download the index too.')
  return of_part(folder / files[0]) if files else None


def is_index(path: str | os.PathLike[str]) -> bool:
  """Returns whether `path` has the name of an index."""
  return os.fspath(path).endswith(INDEX)


def of_part(path: Any) -> dict[str, Tensor]:
  """Returns the tensors of one safetensors file by name, as the file has them."""
  return of_header(headers.read(path))


def of_header(header: headers.Header) -> dict[str, Tensor]:
  """Returns the tensors of the safetensors file with this header, by name."""
  return {name: Tensor(header.path, name, place) for name, place in header.places.items()}


def _indexed(index: pathlib.Path) -> dict[str, Tensor]:
  where = _weight_map(index)
  missing = sorted({part for part in where.values() if not os.path.isfile(index.parent / part)})
  if missing:
    lost = [name for name, part in where.items() if part in missing]
    raise ValueError(f'io.read: {index} names the parts {errors.some(missing)}, which are missing, with the tensors '
                     f'{errors.some(lost)}; download them again.')
  found: dict[str, Tensor] = {}
  for part in sorted(set(where.values())):
    for name, tensor in of_part(index.parent / part).items():
      if name in found:
        raise ValueError(f'io.read: {index}: tensor {name!r} is in two parts, {found[name].path.name} and {part}; '
                         'save the checkpoint anew.')
      found[name] = tensor
  absent = [f'{name} ({where[name]})' for name in where if name not in found]
  strange = [f'{name} ({tensor.path.name})' for name, tensor in found.items() if name not in where]
  elsewhere = [f'{name} ({tensor.path.name}, not {where[name]})' for name, tensor in found.items()
               if name in where and tensor.path.name != where[name]]
  if absent or strange or elsewhere:
    raise ValueError(f'io.read: {index} and its parts differ. Missing in the parts: {errors.some(absent) or "none"}; '
                     f'missing in the index: {errors.some(strange) or "none"}; in another part: '
                     f'{errors.some(elsewhere) or "none"}. Download the checkpoint again.')
  return {name: found[name] for name in where}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """Returns the file name of each tensor by the tensor's name. Raises `ValueError` for an index that is none."""
  try:
    where = headers.parsed(index.read_text())['weight_map']
    sound = where and all(isinstance(part, str) and part == os.path.basename(part) and part not in ('', '.', '..')
                          for part in where.values())
  except headers.MALFORMED as e:
    raise headers.bad(index, f'it is no index of a sharded checkpoint ({e!r})') from e
  if not sound:
    raise ValueError(f'io.read: {index}: `weight_map` must map the name of each tensor to the name of a file in the '
                     'same folder.')
  return where
