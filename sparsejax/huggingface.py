"""Prunes the model of a Hugging Face folder, and writes a folder of the same layout with zeros in place.

    report = prune_folder('bert/', 'bert-2-4/', sj.recipes.sparsegpt(pattern=sj.NM(2, 4)), tokens)

The files keep their names, and the tensors their names, dtypes and order, so that other tools load the new folder like
the old one. The new folder appears in one step, when all of it is on the disk. The old folder is only read.
"""

import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sparsejax import formats, hub, io, post_training, trees
from sparsejax.hub import texts
from sparsejax.io import folders
from sparsejax.post_training import Recipe
from sparsejax.programs.contractions import contractions
from sparsejax.tables import Report
from sparsejax.types import Pattern

__all__ = ['prune_folder']

BATCH = 16


def prune_folder(folder: str | os.PathLike[str], out: str | os.PathLike[str], recipe: Recipe,
                 tokens: np.ndarray | str | os.PathLike[str], *, apply: Callable[..., Any] | None = None,
                 padding: int | None = None, length: int = texts.LENGTH, batch: int = BATCH, where: Any = None,
                 packed: Pattern | None = None, **options: Any) -> Report:
  """Prunes the model in `folder` by a recipe, on `tokens` `int[N, T]` or on a text, and writes the folder `out`.

  A text is the path of a UTF-8 file, which the `tokenizer.json` of the folder makes tokens of: a row of at most
  `length` tokens for each line, or windows where there is no padding. `apply(params, tokens, valid)`: a model of any
  type, whose parameters are named as in the files; by default, the reader of `hub` for the `model_type`.
  `padding`: the token that does not count, by default `pad_token_id` of `config.json`, if it has one. `where`: by
  default, the matrices of the transformer layers; with `apply`, the default of `sj.prune`. `packed`: the pattern by
  which a packed copy is written too, to the file `out` with the ending `.packed.safetensors`. `options` are those of
  `sj.prune`. Raises `ValueError` for a model of another type without `apply`, and if `out` exists.
  """
  folder, out = pathlib.Path(folder), pathlib.Path(out)
  if out.exists():
    raise ValueError(f'prune: {out} is there already; name a folder that does not exist.')
  config = _config(folder)
  run = hub.forward(config) if apply is None else apply
  if where is None and apply is None:
    where = trees.named(*hub.MATRICES[hub.reader(config)])
  padding = config.get('pad_token_id') if padding is None else padding
  if not isinstance(tokens, np.ndarray):
    tokens = texts.tokens(folder, tokens, length=length, padding=padding)
  tensors = folders.tensors(folder)
  if tensors is None:
    raise ValueError(f'prune: {folder} holds no safetensors file; convert the model to safetensors first.')
  params = {name: jnp.asarray(tensor.read()) for name, tensor in tensors.items()}
  batches, valid = _batches(tokens, padding, batch)
  made = post_training.prune(run, params, batches, recipe, where=where, valid=valid, **options)
  changed = {name for name, mask in made.masks.items() if mask is not True}
  _write(folder, out, {name: str(tensor.path) for name, tensor in tensors.items()},
         {name: np.asarray(made.params[name]) for name in changed})
  if packed is not None:
    io.save(out.with_name(out.name + '.packed.safetensors'),
            formats.pack(made.params, packed, where=trees.named(*changed), axes=contractions(run, params, *batches[0])))
  return made.report


def _config(folder: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads((folder / 'config.json').read_text())
    if not isinstance(config, dict):
      raise ValueError('it is no JSON object')
    return config
  except (OSError, ValueError) as error:
    raise ValueError(f'prune: {folder} has no config.json that can be read ({error}).') from error


def _batches(tokens: np.ndarray, padding: int | None, batch: int) -> tuple[list[Any], list[Any] | None]:
  """Returns batches of tokens with masks, and the masks, or `None` if nothing is padding."""
  if tokens.ndim != 2 or tokens.dtype.kind not in 'iu' or not tokens.size:
    raise ValueError(f'prune: the data are {tokens.dtype}{list(tokens.shape)}; give token ids, int[sentences, length].')
  ids = [jnp.asarray(tokens[i:i + batch], jnp.int32) for i in range(0, len(tokens), batch)]
  valid = [each != (-1 if padding is None else padding) for each in ids]
  return list(zip(ids, valid)), None if padding is None else valid


def _write(folder: pathlib.Path, out: pathlib.Path, parts: Mapping[str, str], changed: Mapping[str, Any]) -> None:
  """Copies a folder with other values of some tensors; the copy appears when all of it is written."""
  partial = out.parent / f'.sparsejax-{secrets.token_hex(4)}.tmp'
  try:
    shutil.copytree(folder, partial, ignore=lambda at, names: [n for n in names if n.endswith('.safetensors')])
    for part in sorted(set(parts.values())):
      _write_part(pathlib.Path(part), partial / pathlib.Path(part).name,
                  {name: changed[name] for name, own in parts.items() if own == part and name in changed})
    _synchronise(partial)
    os.rename(partial, out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_part(source: pathlib.Path, target: pathlib.Path, changed: Mapping[str, np.ndarray]) -> None:
  with safetensors.safe_open(source, 'numpy') as file:
    metadata = file.metadata()
  tensors = safetensors.numpy.load_file(source)
  safetensors.numpy.save_file({**tensors, **changed}, target, metadata)


def _synchronise(folder: pathlib.Path) -> None:
  """Waits until every file of a folder is on the disk."""
  for path in folder.rglob('*'):
    if path.is_file():
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
