"""Makes the models that are cut: a residual network, a ViT and the pretrained encoder, each with its data.

    own = SUBJECTS['resnet'](RunSizes(), data_dir=None, seed=0)
    own.apply(own.start, own.test[0])        # logits
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from experiments import data
from experiments.data import sst2, stdlib
from experiments.models import encoders, residual, vit
from sparsejax import calibration
from sparsejax.types import Array, PyTree


class RunSizes(NamedTuple):
  """A `RunSizes` holds what is fixed before a run, such as the updates of the dense model and of a method."""

  batch: int = 64
  steps: int = 400
  tuned: int = 300
  width: int = 16
  rate: float = 3e-3
  tests: int = 2000
  samples: int = 8  # random vectors of the Hessian's trace
  multiple: int = 1  # of which the kept units of each group are a multiple


class Cuttable(NamedTuple):
  """A `Cuttable` is a model with its data.

  `apply(variables, inputs)` returns logits. `trained(variables, inputs)` returns them with the statistics of the batch.
  `start`: the variables of the seed, with `params` among them. `batches`: training inputs `[steps, B, ...]` and labels.
  `test`: inputs and labels. `settled(variables)` returns the variables with statistics measured anew.
  """

  apply: Callable[[PyTree, Array], Array]
  trained: Callable[[PyTree, Array], Array]
  start: PyTree
  batches: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]
  settled: Callable[[PyTree], PyTree]
  facts: Mapping[str, Any]


def resnet(sizes: RunSizes, data_dir: str | None, seed: int) -> Cuttable:
  """Returns the residual network on CIFAR-10 in `data_dir`, or on the digits without one."""
  batches, test, facts = _images(sizes, data_dir, seed)
  model = residual.ResNet(10, width=sizes.width)
  start = flax.core.unfreeze(model.init(jax.random.key(seed), jnp.asarray(batches[0][0])))
  trained = lambda variables, x: model.apply(variables, x, train=True, mutable=['batch_stats'])[0]

  def update(params: PyTree, stats: PyTree, x: Array) -> PyTree:
    variables = {'params': params, 'batch_stats': stats}
    return model.apply(variables, x, train=True, mutable=['batch_stats'])[1]['batch_stats']

  def settled(variables: PyTree) -> PyTree:
    stats = calibration.recalibrated(functools.partial(update, variables['params']), variables['batch_stats'],
                                     [jnp.asarray(x) for x in batches[0][-8:]])
    return {**variables, 'batch_stats': stats}

  return Cuttable(model.apply, trained, start, batches, test, settled, {**facts, 'stages': 3})


def transformer(sizes: RunSizes, data_dir: str | None, seed: int) -> Cuttable:
  """Returns a ViT of two blocks, four times as wide as `width`, on the same images as `resnet`."""
  batches, test, facts = _images(sizes, data_dir, seed)
  patch = 2 if batches[0].shape[2] < 16 else 4
  model = vit.ViT(10, patch=patch, width=4 * sizes.width, depth=2, heads=4)
  start = flax.core.unfreeze(model.init(jax.random.key(seed), jnp.asarray(batches[0][0])))
  return Cuttable(model.apply, model.apply, start, batches, test, lambda variables: variables,
                  {**facts, 'blocks': 2, 'patch': patch})


def encoder(sizes: RunSizes, data_dir: str | None, seed: int) -> Cuttable:
  """Returns the pretrained encoder with a head for two classes: SST-2 in `data_dir`, or the standard library's lines.

  `width` does not matter. Without data, the head tells docstrings of classes from those of functions.
  """
  train, held_out, name = _sentences(data_dir)
  rng = np.random.default_rng(seed)
  rows = np.stack([rng.permutation(len(train['labels']))[:sizes.batch] for _ in range(sizes.steps + sizes.tuned)])
  model = encoders.MiniLM(num_classes=2)
  head = {'kernel': 0.02 * jax.random.normal(jax.random.key(seed), (384, 2)), 'bias': jnp.zeros(2)}
  start = {'params': {**jax.tree.map(jnp.asarray, encoders.load_pretrained()), 'head': head}}
  test = rng.permutation(len(held_out['labels']))[:sizes.tests]
  return Cuttable(model.apply, model.apply, start, (train['inputs'][rows], train['labels'][rows]),
                  (held_out['inputs'][test], held_out['labels'][test]), lambda variables: variables,
                  {'data': name, **sizes._asdict()})


SUBJECTS: dict[str, Callable[[RunSizes, str | None, int], Cuttable]] = {
  'resnet': resnet, 'vit': transformer, 'encoder': encoder}


def _images(sizes: RunSizes, data_dir: str | None, seed: int) -> tuple[Any, Any, dict[str, Any]]:
  """Returns stacked training batches, the test images, and what they are."""
  name = 'cifar10' if data_dir else 'digits'
  found = data.load(name, batch_size=sizes.batch, seed=seed, data_dir=data_dir, valid_fraction=0.0)
  part = [found.train[i] for i in range(sizes.steps + sizes.tuned)]
  batches = tuple(np.stack([each[key] for each in part]) for key in ('inputs', 'labels'))
  tests = [found.test[i] for i in range(min(len(found.test), -(-sizes.tests // sizes.batch)))]
  keep = np.concatenate([each['weight'] for each in tests]) > 0
  test = tuple(np.concatenate([each[key] for each in tests])[keep] for key in ('inputs', 'labels'))
  return batches, test, {'data': name, **sizes._asdict()}


def _sentences(data_dir: str | None) -> tuple[Any, Any, str]:
  if data_dir:
    splits = sst2.load(pathlib.Path(data_dir).expanduser(), sst2.LENGTH)
    return splits['train'], splits['test'], 'SST-2, sentences'
  found = stdlib.docstrings()
  tokens, labels = sst2.tokens([text for text, _ in found], sst2.LENGTH), np.array([label for _, label in found])
  last = np.arange(len(found)) % 4 == 3
  part = lambda rows: {'inputs': tokens[rows], 'labels': labels[rows]}
  return part(~last), part(last), 'docstrings of the standard library'
