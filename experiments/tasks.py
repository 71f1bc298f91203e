r"""Trains tasks one after the other, and tells what the later tasks left of the earlier ones.

  python -m experiments.tasks --config experiments/configs/claims/task_masks_digits.py --workdir runs/tasks [--set k=v]

The classes of the digits are split into tasks. After each task all tasks so far are tested, which gives a row of the
matrix of accuracies. `recipes.cl_dst` keeps a mask for each task in a `continual.Bank`, and every other recipe trains
one model on. With a `buffer`, examples of earlier tasks are replayed (DER++, Buzzega et al. 2020, 2004.07211). A run
that `removed` names drops this fraction of a task's examples in its course, those first that are forgotten least, and
has fewer steps: see `experiments.loop.examples`.

The score of a run is the mean accuracy over all tasks after the last one. `forgetting` and `backward_transfer` stand
beside it in `outcome.json`. Finished seeds and runs are read, not trained again. The exit statuses are those of
`experiments.loop.commands`.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import commands, examples, exits, fitting, outcomes, seeds, training
from experiments.loop.fitting import Ending, Split
from experiments.loop.stopping import StopRequest
from experiments.models.perceptron import forward, start
from sparsejax import continual, masks, metrics
from sparsejax.types import Array, PyTree

DEFAULTS = {
    'classes': 2,  # of each task
    'width': 100,  # of the two hidden layers
    'told': True,  # whether a test tells the task, so that only its classes compete
    'buffer': 0,  # examples of earlier tasks that are kept; 0: none
    'removed': {},  # by run: the fraction of a task's examples that goes in the course of the task
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
  settings = DEFAULTS | dict(configs.plain(config)['tasks'])
  recipes = configs.plain(config)['recipes']
  configs.refuse_unknown('tasks', 'key of tasks', settings, DEFAULTS)
  configs.refuse_unknown('tasks', 'run of removed:', settings['removed'], recipes)
  splits, found = fitting.both_splits(config), {}
  for name, recipe in recipes.items():
    compute = matrices(configs.at_run(config, name), settings, recipe, settings['removed'].get(name, 0.0), splits)
    found[name] = seeds.run(config, name, workdir / name, request, compute,
                            functools.partial(_told, settings, splits[1][1]))
    training.console().print(f'{name}: {np.mean(found[name]["test"]["accuracy"]):.1%} after all tasks, forgetting '
                             f'{np.mean(found[name]["forgetting"]):.1%}')
  return found


def _told(settings: Mapping[str, Any], labels: Array, found: Sequence[Matrix]) -> dict[str, Any]:
  """Returns the own part of the outcome, of the matrix of each seed. Chance is that of the classes that compete."""
  left = [metrics.forgetting(jnp.asarray(rows)) for rows in found]
  of_tasks = [np.asarray(labels)[np.isin(labels, classes)] for classes in _tasks(settings)] if settings['told'] else [
      labels]
  return {'labels': {'count': len(labels), 'chance': float(np.mean([fitting.chance(each) for each in of_tasks]))},
          'test': {'accuracy': [float(each.accuracy) for each in left]}, 'matrix': list(found),
          'forgetting': [float(each.forgetting) for each in left],
          'backward_transfer': [float(each.backward_transfer) for each in left]}


def _tasks(settings: Mapping[str, Any]) -> np.ndarray:
  return np.arange(10).reshape(-1, settings['classes'])


def matrices(config: ConfigDict, settings: Mapping[str, Any], recipe: Mapping[str, Any], removed: float,
             splits: tuple[Split, Split]) -> Callable[[int], Matrix]:
  """Returns the function from a seed to its matrix; the program of a task compiles once for all tasks and seeds."""
  learn = jax.jit(functools.partial(_learned, config, settings, recipe, removed))
  return functools.partial(matrix, learn, settings, recipe, splits)


def matrix(learn: Callable[..., Ending], settings: Mapping[str, Any], recipe: Mapping[str, Any],
           splits: tuple[Split, Split], seed: int) -> Matrix:
  """Returns the accuracy of each task (column) after each task (row) of one seed; tasks to come have 0."""
  (train, test), tasks = splits, _tasks(settings)
  key, bank, rows = jax.random.key(seed), continual.Bank(start(seed, settings['width'])), []
  params, earlier, buffer = bank.params, None, _empty(settings['buffer'])
  for number, classes in enumerate(tasks):
    own = examples.of_rows(np.flatnonzero(np.isin(train[1], classes)), len(train[1]))
    here = jnp.isin(jnp.arange(10), classes)
    banked = recipe['name'] == 'cl_dst'
    # In each task of one structure, so that the program compiles once.
    used = jax.tree.map(lambda mask, w: jnp.broadcast_to(mask, w.shape), bank.used(), bank.params)
    before = continual.Bank(bank.params, (used,)) if banked else None
    params, state, own = learn(bank.params if banked else params, before, earlier, train, own, here, buffer,
                               jax.random.fold_in(key, number))
    bank = bank.added(params, state) if banked else bank
    earlier = masks(params, state) if recipe['name'] == 'sparcl' else None
    if settings['buffer']:
      left = own.order[:int(own.count)]
      buffer = _kept(buffer, params, (train[0][left], train[1][left]), number,
                     jax.random.fold_in(key, len(tasks) + number))
    seen = np.isin(np.arange(10), tasks[:number + 1].ravel())
    rows.append([_tested(bank.task(j) if banked else params, test, tasks[j], np.isin(np.arange(10), tasks[j])
                         if settings['told'] else seen) if j <= number else 0.0 for j in range(len(tasks))])
  return rows


def _learned(config: ConfigDict, settings: Mapping[str, Any], recipe: Mapping[str, Any], removed: float, params: PyTree,
             bank: Any, earlier: Any, data: Split, own: Any, here: Array, buffer: Any, key: Array) -> Ending:
  """Returns the end of the training of one task on the examples `own`."""
  signals = {'key': jax.random.fold_in(key, 0), 'bank': bank, 'masks': earlier}
  tx = fitting.optimizer(config, recipe, {k: v for k, v in signals.items() if v is not None},
                         examples.removal_steps(config.steps, removed)[1])

  def loss(params: PyTree, batch: Any, key: Array, step: Array) -> tuple[Array, Array]:
    logits = jnp.where(here[None], forward(params, batch[0]), FREE)
    total = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    if settings['buffer']:
      x, y, kept, weight = _drawn(buffer, key, config.batch_size)
      again = forward(params, x)
      each = LABELS * optax.softmax_cross_entropy_with_integer_labels(again, y)
      total += jnp.mean(weight * (each + LOGITS * jnp.mean(jnp.square(again - kept), -1)))
    return total, logits.argmax(-1) == batch[1]

  return fitting.trained_on(loss, tx, params, tx.init(params), data, config, key, own, removed)


def _drawn(buffer: Any, key: Array, size: int) -> Any:
  """Returns a batch of the examples of a buffer."""
  rows = jax.random.randint(key, (size,), 0, len(buffer[0]))
  return jax.tree.map(lambda x: x[rows], buffer)


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


def _tested(params: PyTree, test: Split, classes: np.ndarray, competing: np.ndarray) -> float:
  """Returns the accuracy on the test images of some classes, where only `competing` classes may be the answer."""
  own = np.isin(test[1], classes)
  return fitting.right(np.where(competing, np.asarray(forward(params, test[0])), FREE)[own], test[1][own])


if __name__ == '__main__':
  exits.leave(main)
