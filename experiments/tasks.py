r"""Trains tasks one after the other, and tells what the later tasks left of the earlier ones.

  python -m experiments.tasks --config experiments/configs/claims/task_masks_digits.py --workdir runs/tasks [--set k=v]

The classes of the digits are split into tasks. After each task all tasks so far are tested, which gives a row of the
matrix of accuracies. `recipes.cl_dst` keeps a mask for each task in a `continual.Bank`, and every other recipe trains
one model on. With a `buffer`, examples of earlier tasks are replayed (DER++, Buzzega et al. 2020, 2004.07211).

The score of a run is the mean accuracy over all tasks after the last one. `forgetting` and `backward_transfer` stand
beside it in `outcome.json`. Finished seeds and runs are read, not trained again. The exit statuses are those of
`experiments.loop.commands`.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from sklearn import datasets

from experiments import configs
from experiments.loop import commands, exits, optimizers, outcomes, seeds, training
from experiments.loop.stopping import StopRequest
from sparsejax import continual, masks, metrics, project, recipes
from sparsejax.types import Array, PyTree

DEFAULTS = {
    'classes': 2,  # of each task
    'width': 100,  # of the two hidden layers
    'told': True,  # whether a test tells the task, so that only its classes compete
    'buffer': 0,  # examples of earlier tasks that are kept; 0: none
}
LABELS, LOGITS = 0.5, 0.1  # the weights of a buffer's labels and logits in the loss, those of SparCL's code
FREE = -1e9  # the logit of a class that does not compete

Matrix = list[list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  return commands.main(arguments, 'tasks', trained)


def trained(config: ConfigDict, workdir: pathlib.Path, request: StopRequest) -> outcomes.Outcomes:
  """Trains and tests whatever is not finished. Returns the outcomes by run. Raises `ValueError` without `tasks`."""
  if config.tasks is None:
    raise ValueError('config: tasks is None; give config.tasks = {} for tasks one after the other.')
  settings = dict(config.tasks)
  configs.refuse_unknown('tasks', 'key of tasks', settings, DEFAULTS)
  settings, found = DEFAULTS | settings, {}
  for name, recipe in configs.plain(config)['recipes'].items():
    compute = functools.partial(matrix, config, settings, recipe)
    found[name] = seeds.run(config, name, workdir / name, request, compute, functools.partial(_told, settings))
    training.console().print(f'{name}: {np.mean(found[name]["test"]["accuracy"]):.1%} after all tasks, forgetting '
                             f'{np.mean(found[name]["forgetting"]):.1%}')
  return found


def _told(settings: Mapping[str, Any], found: Sequence[Matrix]) -> dict[str, Any]:
  """Returns the own part of the outcome, of the matrix of each seed."""
  left = [metrics.forgetting(jnp.asarray(rows)) for rows in found]
  return {'labels': {'count': len(digits()[1][1]), 'chance': 1 / settings['classes'] if settings['told'] else 0.1},
          'test': {'accuracy': [float(each.accuracy) for each in left]}, 'matrix': list(found),
          'forgetting': [float(each.forgetting) for each in left],
          'backward_transfer': [float(each.backward_transfer) for each in left]}


@functools.cache
def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """Returns images `[N, 64]` from 0 to 1 and labels, for training and for test: every fifth, sorted by label."""
  images, labels = datasets.load_digits(return_X_y=True)
  order = np.argsort(labels, kind='stable')
  test = np.sort(order[::5])
  train = np.setdiff1d(order, test)
  part = lambda rows: ((images[rows] / 16).astype(np.float32), labels[rows].astype(np.int32))
  return part(train), part(test)


def matrix(config: ConfigDict, settings: Mapping[str, Any], recipe: Mapping[str, Any], seed: int) -> Matrix:
  """Returns the accuracy of each task (column) after each task (row) of one seed; tasks to come have 0."""
  tasks = np.arange(10).reshape(-1, settings['classes'])
  key, bank, rows = jax.random.key(seed), continual.Bank(start(seed, settings['width'])), []
  learn = jax.jit(functools.partial(_learned, config, settings, recipe))
  params, earlier, buffer = bank.params, None, _empty(settings['buffer'])
  for number, classes in enumerate(tasks):
    own = np.isin(digits()[0][1], classes)
    data = tuple(jnp.asarray(x[own]) for x in digits()[0])
    here = jnp.isin(jnp.arange(10), classes)
    banked = recipe['name'] == 'cl_dst'
    # In each task of one structure, so that the program compiles once.
    used = jax.tree.map(lambda mask, w: jnp.broadcast_to(mask, w.shape), bank.used(), bank.params)
    before = continual.Bank(bank.params, (used,)) if banked else None
    params, state = learn(bank.params if banked else params, before, earlier, data, here, buffer,
                          jax.random.fold_in(key, number))
    bank = bank.added(params, state) if banked else bank
    earlier = masks(params, state) if recipe['name'] == 'sparcl' else None
    if settings['buffer']:
      buffer = _kept(buffer, params, data, number, jax.random.fold_in(key, len(tasks) + number))
    seen = np.isin(np.arange(10), tasks[:number + 1].ravel())
    rows.append([_tested(bank.task(j) if banked else params, tasks[j], np.isin(np.arange(10), tasks[j])
                         if settings['told'] else seen) if j <= number else 0.0 for j in range(len(tasks))])
  return rows


def start(seed: int, width: int) -> PyTree:
  """Returns the initial parameters of a perceptron of two hidden layers."""
  init, sizes = jax.nn.initializers.he_normal(), (64, width, width, 10)
  keys = jax.random.split(jax.random.key(seed), 3)
  return {f'layer_{i}': {'kernel': init(keys[i], sizes[i:i + 2]), 'bias': jnp.zeros(sizes[i + 1])} for i in range(3)}


def forward(params: PyTree, x: Array) -> Array:
  """Returns the logits of images `[N, 64]`."""
  for name in sorted(params):
    x = (x if name == 'layer_0' else jax.nn.relu(x)) @ params[name]['kernel'] + params[name]['bias']
  return x


def _learned(config: ConfigDict, settings: Mapping[str, Any], recipe: Mapping[str, Any], params: PyTree, bank: Any,
             earlier: Any, data: Any, here: Array, buffer: Any, key: Array) -> tuple[PyTree, Any]:
  """Returns parameters and state after the steps of one task. Every batch is a function of the key and the step."""
  signals = {'key': jax.random.fold_in(key, 0), 'bank': bank, 'masks': earlier}
  tx = recipes.from_config(optimizers.make(total_steps=config.steps, **config.optimizer)[1], recipe,
                           total_steps=config.steps, signals={k: v for k, v in signals.items() if v is not None})
  state = tx.init(params)

  def loss(params: PyTree, batch: Any, old: Any) -> Array:
    logits = jnp.where(here[None], forward(params, batch[0]), FREE)
    total = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    if settings['buffer']:
      x, y, kept, weight = old
      again = forward(params, x)
      each = LABELS * optax.softmax_cross_entropy_with_integer_labels(again, y)
      total += jnp.mean(weight * (each + LOGITS * jnp.mean(jnp.square(again - kept), -1)))
    return total

  def step(carry: Any, number: Array) -> tuple[Any, None]:
    params, state = carry
    old = _drawn(buffer, key, number, 2, config.batch_size) if settings['buffer'] else None
    grads = jax.grad(loss)(params, _drawn(data, key, number, 1, config.batch_size), old)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (project(params, state), state), jnp.arange(config.steps))[0]


def _drawn(examples: Any, key: Array, number: Array, salt: int, size: int) -> Any:
  """Returns a batch of examples, arrays `[N, ...]`, for a step."""
  rows = jax.random.randint(jax.random.fold_in(jax.random.fold_in(key, number), salt), (size,), 0, len(examples[0]))
  return jax.tree.map(lambda x: x[rows], examples)


def _empty(size: int) -> Any:
  """Returns a buffer without examples: images, labels, logits, and 1 for each slot that is filled."""
  return jnp.zeros((size, 64)), jnp.zeros(size, jnp.int32), jnp.zeros((size, 10)), jnp.zeros(size)


def _kept(buffer: Any, params: PyTree, data: Any, number: int, key: Array) -> Any:
  """Returns the buffer with an equal share for the task that has just ended; slots of earlier tasks go at random."""
  size = len(buffer[0])
  slots = jax.random.permutation(key, size)[:size // (number + 1)]
  rows = jax.random.choice(key, len(data[0]), (len(slots),), replace=len(slots) > len(data[0]))
  new = data[0][rows], data[1][rows], forward(params, data[0][rows]), jnp.ones(len(slots))
  return tuple(old.at[slots].set(each) for old, each in zip(buffer, new))


def _tested(params: PyTree, classes: np.ndarray, competing: np.ndarray) -> float:
  """Returns the accuracy on the test images of some classes, where only `competing` classes may be the answer."""
  images, labels = digits()[1]
  own = np.isin(labels, classes)
  logits = np.where(competing, np.asarray(forward(params, images[own])), FREE)
  return float(np.mean(logits.argmax(-1) == labels[own]))


if __name__ == '__main__':
  exits.leave(main)
