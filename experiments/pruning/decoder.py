"""Trains a byte-level decoder of 10.8M parameters and judges pruned copies of it by their loss on held-out text.

The text is Tiny Shakespeare, where a folder has it, and the sources of the standard library. The first of
eighty modules is held out, and so on, in the order of the names. Of Shakespeare the test split is held out.
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds

from experiments import configs
from experiments.data import stdlib, text
from experiments.loop import outcomes, records, training
from experiments.loop.stopping import StopRequest
from experiments.models.lm import LM
from experiments.pruning.encoder import WHERE
from experiments.pruning.subjects import Subject
from sparsejax.types import Array, PyTree

CALIBRATED, HELD_OUT = 48, 64  # windows: to prune, and to judge
BATCH = 16  # windows
TESTED = 16_384  # bytes of the held-out text on which the training is validated and tested
EVERY = 80  # the distance of modules that are held out, in the order of their names
CONFIG: dict[str, Any] = {
    'steps': 192, 'batch_size': 4, 'model': {'name': 'lm', 'width': 384, 'depth': 6, 'heads': 6},
    'optimizer': {'learning_rate': 1e-3, 'weight_decay': 0.1, 'options': {'b2': 0.95}}, 'validate_every': 64,
    'checkpoint_every': 64, 'resume_changed': True}
LENGTH = 128  # bytes of a window
# How many times `LENGTH` a window of a training that reaches has, with the part of the steps. Attention finds a passage
# among few bytes first, and then learns to find it among more.
STAGES = ((1, 0.5), (4, 0.3), (8, 0.2))
SIZES = {'calibration': f'{CALIBRATED} windows', 'held out': f'{HELD_OUT} windows', 'bytes a window': LENGTH,
         'windows a step': CONFIG['batch_size']}


def subject(data_dir: str | None, workdir: pathlib.Path, request: StopRequest, steps: int, seed: int,
            config: Mapping[str, Any] = CONFIG, length: int = LENGTH, reach: int | None = None) -> Subject:
  """Returns the decoder, trained for `steps` in `workdir / 'training'`, with the windows that `seed` draws.

  A training that is there already goes on, up to `steps`. `length`: bytes of a window, of the training too. With
  `reach`, the decoder has `RecallAttention`, and is trained as `reaching` says; `length` is that of other windows then.

  Raises `training.Stopped` where a signal stops the training.
  """
  texts, names = split_texts(data_dir)
  windows = {split: _windows(content, length) for split, content in texts.items()}
  if reach:
    config = {**config, 'model': {**config['model'], 'recall': True}}
    params = reaching(config, texts, reach, workdir, request, steps)
  else:
    data = _file(workdir / 'text.txt', texts, length)
    params = _trained({**config, 'steps': steps, 'data': data}, workdir / 'training', request)
  apply = _model(config)
  (inputs, labels), held_out = (_drawn(windows[split], count, seed)
                                for split, count in (('train', CALIBRATED), ('test', HELD_OUT)))
  inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
  return Subject(
      apply, params, [(inputs[i:i + BATCH],) for i in range(0, len(inputs), BATCH)], None, WHERE,
      functools.partial(_loss, apply, labels[:BATCH]), lambda path: path.split('/')[0],
      functools.partial(_scored, jax.jit(functools.partial(_nats, apply)), held_out),
      {'data': names, 'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)), **SIZES,
       'bytes a window': length, 'steps': steps, 'seed': seed})


def reaching(config: Mapping[str, Any], texts: Mapping[str, bytes], reach: int, workdir: pathlib.Path,
             request: StopRequest, steps: int) -> PyTree:
  """Returns the parameters of a decoder that knows distances up to `reach` bytes, trained on the windows of `Reaching`.

  The windows become longer by `STAGES`. A step has the same bytes in each stage, unless one window has more. `steps` is
  the number of all stages together.
  """
  apply, params = _model(config), None
  for times, part in STAGES:
    length, model = min(times * LENGTH, max(reach, LENGTH)), config['model']
    if params is not None:
      model = {'name': configs.OWN, 'make': configs.Own((functools.partial(lambda start, key: start, params), apply))}
    size = max(config['batch_size'] * LENGTH // length, 1)
    own = {'model': model, 'batch_size': size, 'steps': max(round(part * steps), 1), 'validate_every': 256,
           'data': _reaching(texts, length, reach)}
    params = _trained({**config, **own}, workdir / f'training_{times}', request)
  return params


def _trained(config: Mapping[str, Any], place: pathlib.Path, request: StopRequest) -> PyTree:
  """Returns the parameters of the first seed after training in `place`, on as many devices as share a step evenly."""
  mesh = {'data': math.gcd(config['batch_size'], jax.device_count())}
  outcome = training.run(configs.complete({**config, 'mesh': mesh}), place, request)
  return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), outcomes.tested_parameters(outcome['dense']))


def _model(config: Mapping[str, Any]) -> Any:
  """Returns the function `apply(params, tokens)` of the model of a config."""
  model = LM(text.BYTES, **{key: value for key, value in config['model'].items() if key != 'name'})
  return lambda params, tokens: model.apply({'params': params}, tokens)


def split_texts(data_dir: str | None) -> tuple[dict[str, bytes], str]:
  """Returns the text of `train` and of `test` as UTF-8 bytes, and a description of the data."""
  modules = stdlib.sources()
  texts = {'train': [b for i, (_, b) in enumerate(modules) if i % EVERY], 'test': [b for _, b in modules[::EVERY]]}
  name = 'sources of the standard library'
  if data_dir is not None:
    shakespeare = text.builder_splits(tfds.builder('tiny_shakespeare', data_dir=data_dir))
    texts = {split: [getattr(shakespeare, split).tobytes(), *parts] for split, parts in texts.items()}
    name = f'Tiny Shakespeare and {name}'
  return {split: b''.join(parts) for split, parts in texts.items()}, name


def _file(path: pathlib.Path, texts: Mapping[str, bytes], length: int) -> dict[str, Any]:
  """Writes both texts to one file, `test` last, and returns the section `data` of a config that reads the file so."""
  path.parent.mkdir(parents=True, exist_ok=True)
  records.write_whole(path, b''.join(texts[split] for split in ('train', 'test')).decode())
  held_out = min(len(texts['test']), TESTED)
  return {'name': str(path), 'sequence_length': length, 'valid_fraction': held_out / sum(map(len, texts.values()))}


def _reaching(texts: Mapping[str, bytes], length: int, reach: int) -> dict[str, Any]:
  """Returns the section `data` of a config with windows that reach over `reach` bytes."""
  half, test = TESTED // 2, texts['test']
  splits = {'train': texts['train'], 'valid': test[:half + reach], 'test': test[half:TESTED + reach]}
  return {'name': configs.OWN, 'num_classes': text.BYTES, 'splits': configs.Own({
      split: text.Reaching(content, length, reach, seed) for seed, (split, content) in enumerate(splits.items())})}


def _windows(content: bytes, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns windows of bytes and of the next bytes, `int32[N, length]` each."""
  array = np.frombuffer(content, np.uint8).astype(np.int32)
  count = (len(array) - 1) // length
  cut = lambda shift: array[shift:shift + count * length].reshape(count, length)
  return cut(0), cut(1)


def _drawn(arrays: tuple[np.ndarray, ...], count: int, seed: int) -> list[np.ndarray]:
  """Returns the same `count` rows of each array."""
  rows = np.random.default_rng(seed).permutation(len(arrays[0]))[:count]
  return [array[rows] for array in arrays]


def _nats(apply: Any, params: PyTree, inputs: Array, labels: Array) -> Array:
  """Returns the mean loss of each window, `float32[N]`."""
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), labels), -1)


def _loss(apply: Any, labels: Array, params: PyTree, batch: tuple[Array]) -> Array:
  return jnp.mean(_nats(apply, params, *batch, labels))


def _scored(nats: Any, held_out: list[np.ndarray], params: PyTree) -> dict[str, np.ndarray]:
  """Returns the loss in nats a byte of each held-out window."""
  inputs, labels = held_out
  parts = [nats(params, inputs[i:i + BATCH], labels[i:i + BATCH]) for i in range(0, len(inputs), BATCH)]
  return {'nats': np.concatenate([np.asarray(part, np.float64) for part in parts])}
