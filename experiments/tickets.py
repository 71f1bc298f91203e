"""Runs rounds of pruning and retraining: iterative magnitude pruning, with its rewindings, and sparse model soups.

  python -m experiments.tickets --config experiments/configs/claims/soup_mlp_mnist.py --workdir runs/soup [--set k=v]

First the model is trained dense. Each round then prunes an equal share of the weights that are left, so that the last
round reaches `sparsity`. The smallest weights of all leaves together are pruned, and the model is retrained (Frankle
and Carbin 2019, 1803.03635; Renda et al. 2020, 2003.02389). With several `members` a round retrains as many copies,
each with its batches in another order, and continues from the copies' average, the soup (Zimmer et al. 2023,
2306.16788). Each retraining starts with a new optimizer state and with the learning rates of `rates`. The copies of all
seeds are trained side by side under `jax.vmap`.

The same command resumes a job that was stopped or killed, bit for bit, from the last checkpoint inside a round. Soups
and barriers of finished rounds are computed again. The exit statuses are those of `experiments.loop.commands`; only one
process may run.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import commands, evaluate, exits, hosts, optimizers, outcomes, records, runs, training
from experiments.loop.stopping import StopRequest
from experiments.tables import pages
from experiments.tables import tickets as tables
from sparsejax import io, metrics
from sparsejax.types import Array, PyTree

DEFAULTS = {
    'rounds': 3,
    'sparsity': 0.9,  # after the last round
    # `learning_rate` keeps the weights, `weights` restores the weights of `rewind_step`, None fine-tunes.
    'rewind': 'learning_rate',
    'rewind_step': 0.05,
    'retrain_steps': 1.0,  # of a round
    'members': 1,
    'recipe': {},  # further arguments of `recipes.iterative_magnitude`: {'where': ['mlp/*/kernel']}
}
REWINDS = {'weights': 'weights', 'learning_rate': 'learning_rate', None: 'fine_tuning'}
DENSE = {'dense': {'name': 'dense'}}
FINE = 0.01  # of the peak learning rate, as in Renda et al. on CIFAR-10
SOUP = 'soup.safetensors'  # the soups of all seeds, beside the checkpoints of their members
ORDERS = 0x9E3779B1  # from the data seed of one member to the data seed of the next; 2^32 over the golden ratio


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  return commands.main(arguments, 'tickets', rounds)


def rounds(config: ConfigDict, workdir: pathlib.Path, request: StopRequest) -> outcomes.Outcomes:
  """Trains and tests whatever is not finished, then shows all rounds. Returns the outcomes by run.

  A run is `dense`, or in the last round `imp-<rewind>`, or `member-<number>` and `soup`; in earlier rounds these names
  follow `round-<number>-`. Raises `ValueError` for a config without `tickets`, and in one of several processes.
  """
  section = settings(config)
  if not hosts.alone():
    raise ValueError('tickets: runs in one process only; leave --distributed out.')
  workdir.mkdir(parents=True, exist_ok=True)
  results = records.read_json(workdir / 'results.json', 'Remove the file: it is made again from the finished rounds.')
  if results is None or results.get('config') != configs.of_run(config, 'dense'):
    results = _results(config, section, workdir, request)
  pages.show(tables.page(results, workdir, SOUP), workdir, training.console())
  return {outcome['name']: outcome for outcome in results['outcomes']}


def settings(config: ConfigDict) -> dict[str, Any]:
  """Returns `config.tickets` with its defaults, steps as whole numbers. Raises `ValueError` for an unusable value."""
  given = configs.plain(config)['tickets']
  if given is None:
    raise ValueError("config: tickets is None; experiments.tickets needs it, such as {'rounds': 3, 'sparsity': 0.9}.")
  configs.refuse_unknown('config', 'key', [f'tickets.{key}' for key in given], [f'tickets.{key}' for key in DEFAULTS])
  section = {**DEFAULTS, **given}
  for key in ('rewind_step', 'retrain_steps'):
    section[key] = optimizers.in_steps(section[key], config.steps)
  if section['rewind'] not in REWINDS:
    raise ValueError(f'config: tickets.rewind={section["rewind"]!r}; valid: {", ".join(map(repr, REWINDS))}.')
  for key, fits, rule in (
      ('sparsity', 0 < section['sparsity'] < 1, 'between 0 and 1'),
      ('rewind_step', section['rewind_step'] <= config.steps, f'at most steps={config.steps}'),
      *((key, isinstance(section[key], int) and section[key] >= 1, 'a whole number of at least 1')
        for key in ('rounds', 'retrain_steps', 'members'))):
    if not fits:
      raise ValueError(f'config: tickets.{key}={section[key]!r} must be {rule}.')
  if configs.plain(config)['recipes'] != DENSE or config.models:
    raise ValueError('config: experiments.tickets makes its own runs; leave recipes and models as they are, and give '
                     'further arguments of the pruning as tickets.recipe.')
  return section


def sparsities(section: Mapping[str, Any]) -> list[float]:
  """Returns the sparsity after each round.

  Each round prunes the fraction 1 - (1 - sparsity)^(1 / rounds) of the weights that are left.
  """
  return [1 - (1 - section['sparsity'])**(number / section['rounds']) for number in range(1, section['rounds'] + 1)]


def rates(optimizer: ConfigDict, rewind: str | None) -> ConfigDict:
  """Returns the optimizer of a retraining: its schedule, warm-up included, runs once over the steps of the retraining.

  The whole schedule is learning-rate rewinding to step 0, compressed if the retraining is shorter (the CLR and LLR of
  Zimmer et al. 2023). If `rewind` is `None`, the rate is constant, a hundredth of the peak: fine-tuning.
  """
  if rewind is not None:
    return optimizer
  return configs.changed(optimizer, learning_rate=FINE * optimizer.learning_rate, decay='constant', warmup=0)


def soup(params: PyTree, members: int) -> PyTree:
  """Returns the average of the members of each seed: `[members * seeds, ...]` becomes NumPy `[seeds, ...]`.

  Raises `ValueError` if the members of one seed do not have the same zeros.
  """
  apart = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(members, -1, *leaf.shape[1:]), params)
  seeds = jax.tree.leaves(apart)[0].shape[1]
  of = lambda member, seed: jax.tree.map(lambda leaf: leaf[member, seed], apart)
  soups = [metrics.model_soup([of(member, seed) for member in range(members)]) for seed in range(seeds)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *soups)


# The phases.


def _results(config: ConfigDict, section: Mapping[str, Any], workdir: pathlib.Path,
             request: StopRequest) -> dict[str, Any]:
  """Trains and tests all phases. Returns the content of `results.json`."""
  run = functools.partial(training.run, workdir=workdir, request=request, job=config)
  base, retraining = configs.changed(config, tickets=None), _retraining(config, section)
  early = _early(base, section['rewind_step'], run) if section['rewind'] == 'weights' else None
  dense = run(base)['dense']
  after = functools.lru_cache(1)(functools.partial(_after, dense, workdir, section['members']))
  retrained = run(retraining, tickets=_tickets(section, after, early))
  rows, barriers = [_part(dense, 'dense', 0)], []
  judge = _judge(base) if section['members'] > 1 else None
  for number, outcome in enumerate(retrained.values(), 1):
    rows += _members(outcome, number, section)
    if judge:
      test, barrier = judge(after(number), outcomes.tested_parameters(outcome))
      rows.append({**rows[-section['members']], 'name': _name(section, number, 'soup'), 'seconds': 0.0, 'test': test})
      barriers.append({'round': number, 'height': barrier.height.tolist(), 'losses': barrier.losses.tolist()})
  return {'config': configs.of_run(config, 'dense'), 'sparsities': sparsities(section), 'outcomes': rows,
          'barriers': barriers}


def _retraining(config: ConfigDict, section: Mapping[str, Any]) -> ConfigDict:
  """Returns the config of the rounds. Each round is a run with a row for each member of each seed, member 0 first."""
  seeds = tuple((seed + member * ORDERS) % 2**32 for member in range(section['members']) for seed in config.seeds)
  entries = {f'round-{number}': {'name': 'iterative_magnitude', **section['recipe'], 'sparsity': sparsity}
             for number, sparsity in enumerate(sparsities(section), 1)}
  return configs.changed(config, tickets=None, seeds=seeds, steps=section['retrain_steps'], recipes=entries,
                         optimizer=rates(config.optimizer, section['rewind']))


def _early(base: ConfigDict, steps: int, run: Callable[..., outcomes.Outcomes]) -> PyTree:
  """Returns the parameters of the dense run after `steps` steps, `[seeds, ...]`.

  The first steps are trained apart, because the dense run keeps only its newest checkpoints.
  """
  if not steps:
    return jax.tree.map(np.asarray, runs.prepare(base).models['dense'].initial())
  # A run has to be measured at its last step, and the dense run need not measure this step.
  early = configs.changed(base, measure_every=steps, recipes={'early': DENSE['dense']})
  return outcomes.tested_parameters(run(early, until=steps)['early'])


def _after(dense: outcomes.Outcome, workdir: pathlib.Path, members: int, number: int) -> PyTree:
  """Returns the parameters that round `number` left, `[seeds, ...]`; for 0 those that the dense training left.

  The soup of several members is saved beside their checkpoints.
  """
  if not number:
    return outcomes.tested_parameters(dense)
  directory = workdir / f'round-{number}'
  params = outcomes.tested_parameters(outcomes.read(directory))
  if members > 1:
    params = soup(params, members)
    io.save(directory / SOUP, params)
  return params


def _tickets(section: dict[str, Any], after: Callable[[int], PyTree], early: PyTree | None) -> dict[str, runs.Ticket]:
  """Returns the ticket of each round: the parameters that the round before left choose the mask.

  The weights to train are `early`, if given, or else the same parameters. All members start from equal weights.
  """
  rows = lambda params: jax.tree.map(lambda leaf: np.concatenate([leaf] * section['members']), params)
  trained = lambda number: rows(after(number - 1))
  weights = trained if early is None else lambda number: rows(early)
  return {f'round-{number}': runs.Ticket(functools.partial(weights, number), functools.partial(trained, number))
          for number in range(1, section['rounds'] + 1)}


# The results.


def _part(outcome: outcomes.Outcome, name: str, number: int, rows: slice = slice(None)) -> dict[str, Any]:
  """Returns the part of a run's outcome that is in `rows`, as the outcome `name` of a round."""
  kept = {key: value for key, value in outcome.items() if key != 'directory'}
  return {**kept, 'name': name, 'round': number, 'seeds': outcome['seeds'][rows], 'empty': outcome['empty'][rows],
          'test': {key: values[rows] for key, values in outcome['test'].items()}}


def _members(outcome: outcomes.Outcome, number: int, section: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns an outcome for each member of a round. The members share the round's seconds."""
  members = section['members']
  kinds = [f'member-{member}' for member in range(members)] if members > 1 else [f'imp-{REWINDS[section["rewind"]]}']
  seeds = len(outcome['seeds']) // members
  return [{**_part(outcome, _name(section, number, kind), number, slice(member * seeds, (member + 1) * seeds)),
           'seconds': outcome['seconds'] / members} for member, kind in enumerate(kinds)]


def _name(section: Mapping[str, Any], number: int, kind: str) -> str:
  return kind if number == section['rounds'] else f'round-{number}-{kind}'


def _judge(base: ConfigDict) -> Callable[[PyTree, PyTree], tuple[dict[str, list[float]], metrics.Barrier]]:
  """Returns a function of a round's soup and members: the soup's test scores, and the barrier of the test loss.

  The barrier is the one from member 0 to member 1, of each seed.
  """
  setup = runs.prepare(base)
  barrier, predict = _barrier(setup), setup.models['dense'].predict

  def judge(average: PyTree, members: PyTree) -> tuple[dict[str, list[float]], metrics.Barrier]:
    test = evaluate.scores(setup.task, predict, average, runs.split(setup, 'test'))
    seeds = len(setup.config.seeds)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i * seeds:(i + 1) * seeds], members) for i in range(2))
    return {key: values.tolist() for key, values in test.items()}, barrier(first, second)

  return judge


def _barrier(setup: runs.Setup) -> Callable[[PyTree, PyTree], metrics.Barrier]:
  """Returns a function of two models' parameters, of all seeds: the barrier of the test loss between the models."""
  model, task = setup.models['dense'], setup.task
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(dict, setup.data[0].test))

  def loss(params: PyTree, batches: Any) -> Array:
    def of_batch(batch):
      weight = batch['weight'].sum()
      return task.loss(model.apply(params, batch['inputs']), batch['labels'], batch['weight']) * weight, weight

    losses, weights = jax.lax.map(of_batch, batches)
    return losses.sum() / weights.sum()

  of_seed = lambda a, b, batches: metrics.barrier(lambda params: loss(params, batches), a, b)
  every = jax.jit(jax.vmap(of_seed, in_axes=(0, 0, None)))
  return lambda a, b: every(a, b, stacked)


if __name__ == '__main__':
  exits.leave(main)
