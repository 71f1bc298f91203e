"""Finds a data set by its name: `digits`, SST-2 by sentences, any prepared TFDS set, a UTF-8 text file, or a made set.
"""

import contextlib
import difflib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.configs import OWN, Own
from experiments.data import arrays, digits, images, madelon, movielens, sst2, text
from experiments.data.batches import Data
from experiments.data.order import BatchPart
from sparsejax import errors

# Sets that a function makes, in the form of own data.
MADE = {'madelon': madelon.drawn, 'films_rated': movielens.rated, 'films_liked': movielens.liked}


def cache_directory() -> pathlib.Path:
  """Returns the folder of data sets if `data_dir` is not given: `$XDG_CACHE_HOME/sparsejax` or `~/.cache/sparsejax`."""
  # The XDG specification says that a relative path is to be ignored.
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))
  return (cache if cache.is_absolute() else pathlib.Path.home() / '.cache') / 'sparsejax'


def load(name: str, *, batch_size: int, seed: int, data_dir: str | os.PathLike[str] | None = None,
         sequence_length: int | None = None, valid_fraction: float = 0.1, augment: bool = False,
         task: str = 'classification', splits: Any = None, num_classes: int | None = None,
         rows: slice = slice(None)) -> Data:
  """Returns the batches of the data set `name`, whose order depends on `seed`.

  `name` is `digits`, `sst2_sentences`, a TFDS set of images or text that is prepared in `data_dir`, or the path of a
  UTF-8 text file. `B` is `batch_size`. Batches of `valid` and `test` also have a `weight`, as `Data` says.

  - Images: `inputs` `float32[B, H, W, C]`, `labels` `int32[B]` and `weight` `float32[B]`. Inputs are standardised per
    channel by the mean and the deviation of the training split. Each process computes these constants itself, from the
    same images. `augment` shifts training images by up to an eighth of their height.
  - Images with `task='super_resolution'`: `labels` `float32[B, H, W, C]` is the image, divided by the largest pixel
    value of the training split. `inputs` is the label at half the height and width, bicubic with antialiasing. Classes
    are not used.
  - Text is read as bytes: `inputs` and `labels` `int32[B, T]`, `weight` `float32[B, T]`. Each label is the next byte.
    `T` is `sequence_length`, or 128.
  - `own`: the user's own `splits`, as `arrays.own_batches` takes them, with `num_classes`. A name in `MADE`, such as
    `madelon`, stands for the splits that its function returns.
  - `sst2_sentences`: `inputs` `int32[B, T]`, tokens filled up with 0, and `labels` `int32[B]`. `T` is
    `sequence_length`, or 32. The files are `data_dir/sst2_sentences/{train,dev,test}.tsv`; see `sst2.load`.

  A set of images without a validation split gets `valid_fraction` of its training split, evenly spaced. The last
  `valid_fraction` of a text file is cut in half: the validation split, then the test split.

  `rows` selects rows of each batch, for one of several processes, and only these rows are read. `example` always has
  the shapes of the whole batch.

  Raises `ValueError` for an unknown name, for a set that is not in `data_dir`, and for arguments that do not fit.
  """
  for argument, fits, rule in (
      (f'batch_size={batch_size}', batch_size >= 1, 'at least 1'),
      (f'seed={seed}', 0 <= seed < 2**32, 'in 0 ... 2**32 - 1'),
      (f'sequence_length={sequence_length}', sequence_length is None or sequence_length >= 1, 'at least 1'),
      (f'valid_fraction={valid_fraction}', 0 <= valid_fraction < 1, 'in 0 ... 1, without 1')):
    if not fits:
      raise ValueError(f'data.load: {argument} must be {rule}.')
  if task not in images.PREPARATIONS:
    raise errors.unknown('data.load', 'task', task, images.PREPARATIONS)
  root, part = pathlib.Path(data_dir or cache_directory()).expanduser(), BatchPart(batch_size, rows)
  name, splits = _made(name, splits)
  if name == OWN:
    _refuse_for_text(name, 'own data', augment, task)
    _refuse(name, 'own data', 'sequence_length', sequence_length)
    splits = splits.value if isinstance(splits, Own) else splits
    return arrays.own_batches(splits, part, seed, valid_fraction, num_classes)
  _refuse(name, 'a named set', 'splits', splits)
  _refuse(name, 'a named set', 'num_classes', num_classes)
  if name == sst2.NAME:
    _refuse_for_text(name, 'sentences', augment, task)
    return sst2.sentence_batches(sst2.load(root, sequence_length or sst2.LENGTH), part, seed)
  with _quiet():
    read = _splits(name, root, valid_fraction)
    if isinstance(read, text.TextSplits):
      _refuse_for_text(name, 'text', augment, task)
      return text.text_batches(name, read, part, seed, sequence_length or text.LENGTH)
    _refuse(name, 'images', 'sequence_length', sequence_length)
    return images.image_batches(read, part, seed, augment, task)


def pixels(name: str, *, data_dir: str | os.PathLike[str] | None = None, valid_fraction: float = 0.1,
           splits: Any = None, **others: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns all images, `float32[N, H, W, C]` from 0 to 1, and all labels, `int32[N]`, of `train`, `valid` and `test`.

  The arguments are the section `data` of a config. Images of bytes are divided by the largest pixel of the training
  split, 16 for `digits`. Own inputs and labels, of any shape, are as `arrays.own_splits` gives them. An empty split, as
  `valid` for a `valid_fraction` of 0, is left out. Raises `ValueError` for text, for a set that is not there, and for
  arguments without a meaning here.
  """
  for argument, value in others.items():
    _refuse(name, 'read whole', argument, value if value != 'classification' else None)
  name, splits = _made(name, splits)
  with _quiet():
    if name == OWN:
      read = arrays.own_splits(splits.value if isinstance(splits, Own) else splits, valid_fraction)
    else:
      found = _splits(name, pathlib.Path(data_dir or cache_directory()).expanduser(), valid_fraction)
      if isinstance(found, text.TextSplits):
        raise ValueError(f'data.pixels: {name!r} is text, which has no pixels; name a set of images.')
      read = {split: getattr(found, split) for split in ('train', 'valid', 'test')}
    whole = {split: reader(rows) for split, (reader, rows) in read.items() if len(rows)}
  if name == OWN:
    return {split: (each['inputs'], each['labels']) for split, each in whole.items()}
  largest = np.float32(max(int(whole['train']['inputs'].max()), 1))
  return {split: (each['inputs'].astype(np.float32) / largest, each['labels']) for split, each in whole.items()}


def _made(name: str, splits: Any) -> tuple[str, Any]:
  """Returns the name and the splits of own data for a name in `MADE`, and other names as they are."""
  if name not in MADE:
    return name, splits
  _refuse(name, 'a named set', 'splits', splits)
  return OWN, MADE[name]


def _refuse(name: str, kind: str, argument: str, value: Any) -> None:
  if value:
    raise ValueError(f'data.load: {name!r} is {kind}, and {argument}={value} means nothing there; leave it out.')


def _refuse_for_text(name: str, kind: str, augment: bool, task: str) -> None:
  _refuse(name, kind, 'augment', augment)
  _refuse(name, kind, 'task', task if task != 'classification' else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Suppresses TFDS's warnings that OpenCV would be faster and that a directory is not a data set."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


# Names.


def _splits(name: str, root: pathlib.Path, valid_fraction: float) -> images.ImageSplits | text.TextSplits:
  """Returns the splits of `digits`, else of the text file `name`, else of the TFDS set `name` under `root`."""
  path = pathlib.Path(name).expanduser()
  if name != 'digits' and (path.suffix == '.txt' or path.is_file()):
    return text.file_splits(path, valid_fraction)
  builder = digits.prepared(root) if name == 'digits' else _builder(name, root)
  try:
    if 'text' not in builder.info.features:
      return images.image_splits(name, builder, valid_fraction)
    return text.builder_splits(builder)
  except NotImplementedError as error:
    raise ValueError(f'data.load: {name!r} in {str(root)!r} is in the format {builder.info.file_format.value}, which '
                     f'needs TensorFlow to read; {_remedy(name, root)}') from error


def _builder(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
  present = sorted(path.name for path in root.glob('*') if any(path.rglob('dataset_info.json')))
  try:
    builder = tfds.builder(name, data_dir=root)
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name.partition('/')[0].partition(':')[0], known, n=3, cutoff=0.5)
    problem = errors.unknown('data.load', 'data set', name, {'digits', sst2.NAME, *MADE, *present, *close})
    raise ValueError(f'{problem} Every image set of TFDS and the path of a UTF-8 text file are names too.') from None
  if not (builder.data_path / 'dataset_info.json').exists():
    raise ValueError(f'data.load: {name!r} is not in data_dir {str(root)!r}, which holds '
                     f'{errors.some(present) or "nothing"}; name the directory of this set, or {_remedy(name, root)}')
  return builder


def _remedy(name: str, root: pathlib.Path) -> str:
  return ('prepare it with TensorFlow on a machine with a network: '
          f'tfds build {name} --data_dir {root} --file_format array_record')
