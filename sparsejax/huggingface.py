"""Prunes the model of a Hugging Face folder, and writes a folder of the same layout with zeros in place.

    report = prune_folder('bert/', 'bert-2-4/', sj.recipes.sparsegpt(pattern=sj.NM(2, 4)), tokens)

The files keep their names, and the tensors their names, dtypes and order, so that other tools load the new folder like
the old one. The new folder appears in one step, when all of it is on the disk. The old folder is only read.
"""

import dataclasses
import fnmatch
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sparsejax import formats, hub, io, post_training, trees
from sparsejax.hub import texts
from sparsejax.io import folders
from sparsejax.io.stored import Tensor
from sparsejax.post_training import Recipe
from sparsejax.programs.contractions import contractions
from sparsejax.tables import Report
from sparsejax.types import FACTORS, Pattern, says

__all__ = ['prune_folder']

BATCH = 16
# Files and folders of these names are the dense weights once more, in other forms.
_WEIGHTS = ('*.safetensors', 'pytorch_model*', 'tf_model*', 'flax_model*', 'rust_model*', '*.pth', '*.gguf', '*.onnx',
            'onnx', 'openvino', 'coreml', 'original')


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
  `sj.prune`. The report names files that are not copied, as they hold the dense weights in another form.

  Raises `ValueError` for a model of another type without `apply`, and for tokens that the model does not have. Raises
  `ValueError` for recipes that write factors, and if `out` exists.
  """
  folder, out = pathlib.Path(folder), pathlib.Path(out)
  copy = out.with_name(out.name + '.packed.safetensors')
  _refuse(recipe, (out, copy) if packed is not None else (out,))
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
  batches, valid = _batches(tokens, padding, batch)
  if apply is None:
    _refuse_tokens(tokens, padding, hub.WORDS[hub.reader(config)], tensors)
  with jax.enable_x64(any(tensor.place.dtype == np.float64 for tensor in tensors.values())):  # kept bits stay
    params = {name: jnp.asarray(tensor.read()) for name, tensor in tensors.items()}
    made = post_training.prune(run, params, batches, recipe, where=where, valid=valid, **options)
    changed = {name for name, mask in made.masks.items() if mask is not True}
    small = None if packed is None else formats.pack(made.params, packed, where=trees.named(*changed),
                                                     axes=contractions(run, params, *batches[0]))
    left = _write(folder, out, {name: str(tensor.path) for name, tensor in tensors.items()},
                  {name: np.asarray(made.params[name]) for name in changed}, None if small is None else (copy, small))
  note = f'not copied, dense weights in another form: {", ".join(left)}'
  return dataclasses.replace(made.report, notes=(*made.report.notes, *[note] * bool(left)))


def _refuse(recipe: Recipe, paths: tuple[pathlib.Path, ...]) -> None:
  """Raises `ValueError` for a recipe whose result no such folder can hold, and for paths that cannot be written."""
  if any(says(repair, FACTORS) for repair in getattr(recipe, 'repairs', ())):
    raise ValueError('prune: the recipe writes matrices as factors, whose products have no zeros, and a Hugging Face '
                     'folder has no place for factors. Use sj.prune and io.save, or another recipe.')
  for path in paths:
    if path.exists():
      raise ValueError(f'prune: {path} is there already; name a folder that does not exist.')
  parent = pathlib.Path(os.path.realpath(paths[0])).parent
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ValueError(f'prune: there is no folder {parent} that can be written; make it first.')


def _refuse_tokens(tokens: np.ndarray, padding: int | None, words: str, tensors: Mapping[str, Tensor]) -> None:
  """Raises `ValueError` for a token without a row in the table of tokens, which JAX would look up elsewhere."""
  number = next((tensor.place.shape[0] for name, tensor in tensors.items() if name.endswith(words)), None)
  strange = tokens[(tokens < 0) | (tokens >= (np.inf if number is None else number))]
  strange = strange[strange != (-1 if padding is None else padding)]
  if strange.size:
    raise ValueError(f'prune: the data have the token {strange[0]}, and the model has the tokens 0 to '
                     f'{(number or 0) - 1}. Give the tokens of this model.')


def _config(folder: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads((folder / 'config.json').read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f'prune: {folder} has no config.json that can be read ({error}).') from error
  if not isinstance(found, dict):
    raise ValueError(f'prune: {folder}/config.json holds a {type(found).__name__}, and no names with values. Download '
                     'the file again.')
  return found


def _batches(tokens: np.ndarray, padding: int | None, batch: int) -> tuple[list[Any], list[Any] | None]:
  """Returns batches of tokens with masks, and the masks, or `None` if nothing is padding."""
  if tokens.ndim != 2 or tokens.dtype.kind not in 'iu' or not tokens.size:
    raise ValueError(f'prune: the data are {tokens.dtype}{list(tokens.shape)}; give token ids, int[sentences, length].')
  ids = [jnp.asarray(tokens[i:i + batch], jnp.int32) for i in range(0, len(tokens), batch)]
  valid = [each != (-1 if padding is None else padding) for each in ids]
  return list(zip(ids, valid)), None if padding is None else valid


def _write(folder: pathlib.Path, out: pathlib.Path, parts: Mapping[str, str], changed: Mapping[str, Any],
           packed: tuple[pathlib.Path, Any] | None) -> list[str]:
  """Copies a folder with other values of some tensors; the copy appears when all of it is written.

  `packed`: the path and the tree of a packed copy, which appears with the folder. Returns what is not copied: dense
  weights in another form.
  """
  partial = out.parent / f'.sparsejax-{secrets.token_hex(4)}.tmp'
  left = [name for name in sorted(os.listdir(folder)) if any(fnmatch.fnmatch(name, each) for each in _WEIGHTS)]
  lost = lambda at, names: [name for name in names if not os.path.exists(os.path.join(at, name))]  # links to nothing
  try:
    shutil.copytree(folder, partial, ignore=lambda at, names: [
        *lost(at, names), *(left if os.fspath(at) == os.fspath(folder) else [])])
    for part in sorted(set(parts.values())):
      _write_part(pathlib.Path(part), partial / pathlib.Path(part).name,
                  {name: changed[name] for name, own in parts.items() if own == part and name in changed})
    _synchronise(partial)
    if packed is not None:
      io.save(*packed)
    os.rename(partial, out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
    if packed is not None and not out.exists():
      packed[0].unlink(missing_ok=True)
  return [name for name in left if name not in {pathlib.Path(part).name for part in parts.values()}]


def _write_part(source: pathlib.Path, target: pathlib.Path, changed: Mapping[str, np.ndarray]) -> None:
  with safetensors.safe_open(source, 'numpy') as file:
    metadata = file.metadata()
  tensors = safetensors.numpy.load_file(source)
  try:
    safetensors.numpy.save_file({**tensors, **changed}, target, metadata)
  except safetensors.SafetensorError as error:  # says a full disk by no `OSError`
    raise OSError(f'prune: {target} cannot be written ({error}).') from error


def _synchronise(folder: pathlib.Path) -> None:
  """Waits until every file of a folder is on the disk."""
  for path in folder.rglob('*'):
    if path.is_file():
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
