"""Keeps each finished unit in a folder, so that a call of `prune` that was killed goes on where it was.

A file is written under another name, flushed to the disk, and renamed: a file that exists is whole. Each file carries
the fingerprint of the call: parameters, batches, recipe and options. Another call is refused, and changes nothing.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.post_training.lockstep import Solved, Unit
from sparsejax.post_training.recipe import Factors
from sparsejax.post_training.results import StackReport
from sparsejax.post_training.targets import Target, names_of

_NUMBERS = ('achieved', 'rows', 'before', 'after', 'damping', 'raised', 'dead', 'seconds', 'note', 'each')


@dataclasses.dataclass(frozen=True)
class Finished:
  """A `Finished` is the folder of one call; `fingerprint` says of which."""

  folder: pathlib.Path
  fingerprint: str
  targets: Mapping[str, Target]

  def keep(self, unit: Unit, solved: Solved, row: StackReport) -> None:
    """Writes one unit. After a crash at any time, the folder has the whole file or none."""
    path = self._path(unit)
    arrays = {'part': _raw(solved.part), 'mask': np.asarray(solved.mask)}
    if solved.started is not None:
      arrays['started'] = _raw(solved.started)
    if solved.factors is not None:
      arrays |= {f'factors.{name}': np.asarray(array) for name, array in solved.factors._asdict().items()}
    about = {'fingerprint': self.fingerprint, 'name': row.name, 'measured': solved.measured,
             'row': {name: getattr(row, name) for name in _NUMBERS}}
    self.folder.mkdir(parents=True, exist_ok=True)
    other = path.with_suffix(f'.{os.getpid()}.tmp')
    with open(other, 'wb') as file:
      np.savez(file, **{'about': np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays})  # type: ignore[arg-type]
      file.flush()
      os.fsync(file.fileno())
    os.replace(other, path)

  def read(self, units: Iterable[Unit]) -> dict[Unit, tuple[Solved, StackReport]]:
    """Returns the units that are finished. Raises `ValueError` for a folder of another call, or a file that is torn."""
    return {unit: self._read(unit) for unit in units if self._path(unit).exists()}

  def _path(self, unit: Unit) -> pathlib.Path:
    name = names_of(self.targets[unit[0]], unit[1])
    return self.folder / (re.sub(r'\W+', '.', name)[-80:] + hashlib.blake2b(name.encode(), digest_size=6).hexdigest() +
                          '.npz')

  def _read(self, unit: Unit) -> tuple[Solved, StackReport]:
    path, target = self._path(unit), self.targets[unit[0]]
    try:
      with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
      about = json.loads(arrays.pop('about').tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise ValueError(f'prune: {path} cannot be read ({error}). Remove the file, and the call goes on.') from error
    if about['fingerprint'] != self.fingerprint:
      raise ValueError(f'prune: {self.folder} belongs to another call: other parameters, batches, recipe or options. '
                       'Give another `workdir`, or remove the folder.')
    shape = target.at(target.array, unit[1]).shape
    weights = lambda raw: jnp.asarray(raw.view(target.array.dtype).reshape(shape))
    started = weights(arrays['started']) if 'started' in arrays else None
    factors = Factors(*(jnp.asarray(arrays[f'factors.{name}']) for name in Factors._fields)
                      ) if 'factors.core' in arrays else None
    solved = Solved(weights(arrays['part']), jnp.asarray(arrays['mask']), started, about['measured'], factors)
    own = next(iter(target.arrangements.values()))
    numbers = {**about['row'], 'each': tuple(about['row']['each'])}  # JSON has no tuples
    return solved, StackReport(unit[0], unit[1], tuple(own.shape), target.pattern, target.leaf.sparsity, **numbers)


def _raw(array: Any) -> np.ndarray:
  """Returns the bytes of an array: NumPy's files do not know all dtypes."""
  return np.frombuffer(np.asarray(array).tobytes(), np.uint8)


def fingerprint_of(trees: Iterable[Any], words: Iterable[Any]) -> str:
  """Returns a hash of all arrays in `trees`, and of the texts of `words` without addresses of memory."""
  hashed = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(list(trees)):
    if hasattr(leaf, 'dtype') and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      hashed.update(f'{leaf.dtype}{leaf.shape}'.encode())
      hashed.update(np.asarray(leaf).tobytes())
    else:
      hashed.update(_text(leaf))
  for word in words:
    hashed.update(_text(word))
  return hashed.hexdigest()


def _text(word: Any) -> bytes:
  return re.sub(r' at 0x[0-9a-f]+', '', repr(word)).encode()
