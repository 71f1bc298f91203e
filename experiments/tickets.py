"""Rounds of pruning and retraining: iterative magnitude pruning, its rewindings, and soups of what was retrained.

  python -m experiments.tickets --config experiments/configs/claims/soup_vit_digits.py --workdir runs/soup [--set k=v]

Trains dense. Then each round prunes the share of the weights left that makes `sparsity` in equal shares, the smallest
of all leaves together, and retrains (Frankle and Carbin 2019, 1803.03635; Renda et al. 2020, 2003.02389). With several
`members` a round retrains as many copies, each on batches in its own order, and goes on from their average, the soup
(Zimmer et al. 2023, 2306.16788). Each retraining starts with a new optimizer state and a learning rate of its own, see
`rates`. The copies of all seeds are trained side by side under `jax.vmap`.

The same command resumes what was stopped or killed, bit for bit, from the last checkpoint inside of a round; what
follows from finished rounds is computed again. Exit status: as of `experiments.train`; of one process only.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import rich.console
from ml_collections import ConfigDict

from experiments import configs, train
from experiments.loop import checkpoints, evaluate, hosts, optimizers, outcomes, records, tasks
from experiments.loop.progress import Progress
from experiments.loop.runs import Model, Run, Setup, build, prepare, split
from experiments.loop.stopping import StopRequest
from experiments.tables import results
from sparsejax import errors, io, metrics, recipes
from sparsejax.types import Array, PyTree

DEFAULTS = {
    'rounds': 3,
    'sparsity': 0.9,  # after the last round
    'rewind': 'learning_rate',  # the weights go on; `weights`: back to those of `rewind_step`; None: fine-tuning
    'rewind_step': 0.05,
    'retrain_steps': 1.0,  # of a round
    'members': 1,
    'recipe': {},  # further arguments of `recipes.iterative_magnitude`: {'where': ['mlp/*/kernel']}
}
REWINDS = {'weights': 'weights', 'learning_rate': 'learning_rate', None: 'fine_tuning'}
FINE = 0.01  # of the peak learning rate: what Renda et al. fine-tune with on CIFAR-10
SOUP = 'soup.safetensors'  # of all seeds, beside the checkpoints of its members
ORDERS = 0x9E3779B1  # from the data seed of one member to that of the next; 2^32 over the golden ratio


class Stopped(Exception):
  """A signal came; the run under way is saved."""


class Round(NamedTuple):
  """What a round left: outcomes of each member and, of several, the soup; the parameters to go on from."""

  outcomes: list[dict[str, Any]]
  params: PyTree  # NumPy, `[seeds, ...]`
  path: metrics.Barrier | None  # from member 0 to member 1, of each seed


def main(arguments: Sequence[str] | None = None) -> int:
  return train.main(arguments, 'tickets', rounds)


def rounds(config: ConfigDict, workdir: pathlib.Path, signals: StopRequest, again: str) -> int:
  """Trains and tests whatever is not finished yet, then shows all of it. Returns the exit status."""
  section = settings(config)
  if not hosts.alone():
    raise ValueError('tickets: runs in one process only; leave --distributed out.')
  workdir.mkdir(parents=True, exist_ok=True)
  console, shown = rich.console.Console(), workdir / 'results.json'
  found = json.loads(shown.read_text()) if shown.exists() else {}
  if found.get('config') != configs.plain(config):
    _refuse_changes(config, workdir)
    try:
      found = _found(config, section, workdir, signals, console)
    except Stopped as stopped:
      console.print(f'Stopped by {signals.name}, {stopped} is saved. Resume with: {again}', markup=False,
                    highlight=False, soft_wrap=True)
      return 128 + signals.received
  show(found, workdir, console)
  return 0


def settings(config: ConfigDict) -> dict[str, Any]:
  """`config.tickets` with its defaults, steps as whole numbers. Raises `ValueError` for what no round could use."""
  given = configs.plain(config)['tickets']
  if given is None:
    raise ValueError("config: tickets is None; experiments.tickets needs it, such as {'rounds': 3, 'sparsity': 0.9}.")
  for key in given:
    if key not in DEFAULTS:
      raise errors.unknown('config', 'key', f'tickets.{key}', [f'tickets.{known}' for known in DEFAULTS])
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
  if configs.plain(config)['recipes'] != {'dense': {'name': 'dense'}} or config.models:
    raise ValueError('config: experiments.tickets makes its own runs; leave recipes and models as they are, and give '
                     'further arguments of the pruning as tickets.recipe.')
  return section


def sparsities(section: Mapping[str, Any]) -> list[float]:
  """After each round: a fraction 1 - (1 - sparsity)^(1 / rounds) of the weights that are left goes in each."""
  return [1 - (1 - section['sparsity'])**(number / section['rounds']) for number in range(1, section['rounds'] + 1)]


def rates(optimizer: ConfigDict, rewind: str | None) -> ConfigDict:
  """The optimizer of a retraining: its schedule, warm-up included, once more over the steps of the retraining.

  This is learning-rate rewinding to step 0, compressed if the retraining is shorter (the CLR and LLR of Zimmer et al.
  2023). Fine-tuning is at a constant hundredth of the peak.
  """
  optimizer = optimizer.copy_and_resolve_references()
  if rewind is None:
    optimizer.update(learning_rate=FINE * optimizer.learning_rate, decay='constant', warmup=0)
  return optimizer


def soup(params: PyTree, members: int) -> PyTree:
  """The average of the members of each seed: `[members * seeds, ...]` to NumPy `[seeds, ...]`.

  Raises `ValueError` where members of one seed have not the same zeros.
  """
  apart = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(members, -1, *leaf.shape[1:]), params)
  seeds = jax.tree.leaves(apart)[0].shape[1]
  of = lambda member, seed: jax.tree.map(lambda leaf: leaf[member, seed], apart)
  soups = [recipes.model_soup([of(member, seed) for member in range(members)]) for seed in range(seeds)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *soups)


# The phases.


def _refuse_changes(config: ConfigDict, workdir: pathlib.Path) -> None:
  """A finished round is not trained again, and would be taken for one of the new config."""
  path, now = workdir / 'config.json', configs.plain(config)
  free = ('data.data_dir', 'measure_every', 'validate_every', 'checkpoint_every')
  changes = configs.differences(json.loads(path.read_text()), now) if path.exists() else []
  if changes := [change for change in changes if not change.startswith(free)]:
    raise ValueError(f'tickets: {workdir} is of another config ({"; ".join(changes)}). Give another --workdir.')
  records.write_whole(path, json.dumps(now, indent=2) + '\n')


def _found(config: ConfigDict, section: Mapping[str, Any], workdir: pathlib.Path, signals: StopRequest,
           console: rich.console.Console) -> dict[str, Any]:
  """What `results.json` holds."""
  early = None
  if section['rewind'] == 'weights':
    early = _early(config, section['rewind_step'], workdir / 'early', signals, console)
  base = prepare(_phase(config, recipes={'dense': {'name': 'dense'}}))
  with Progress(1, config.steps, console) as progress:
    progress.doing('reading data, tracing')
    run = build(base, {'dense': workdir / 'dense'})['dense']
    params = _trained(run, base, signals, progress)
  found, paths = [_of_rows(outcomes.read(run.directory, base.config), 'dense', 0)], []
  setup = prepare(_retraining(config, section))
  between = _between(base)
  with Progress(section['rounds'], section['retrain_steps'], console) as progress:
    for number in range(1, section['rounds'] + 1):
      one = _round(number, section, setup, base, params if early is None else early, params, between,
                   workdir, signals, progress)
      found, paths, params = found + one.outcomes, paths + [one.path], one.params
  return {
      'config': configs.plain(config), 'sparsities': sparsities(section), 'outcomes': found,
      'barriers': [{'round': number, 'height': path.height.tolist(), 'losses': path.losses.tolist()}
                   for number, path in enumerate(paths, 1) if path is not None]}


def _phase(config: ConfigDict, **changes: Any) -> ConfigDict:
  """The config of the runs of one phase, as `experiments.train` has it."""
  phase = config.copy_and_resolve_references().unlock()
  for key, value in {**changes, 'tickets': None}.items():
    phase[key] = ConfigDict(value) if isinstance(value, dict) else value
  return phase.lock()


def _retraining(config: ConfigDict, section: Mapping[str, Any]) -> ConfigDict:
  """A run for each round, with a row for each member of each seed: all seeds of member 0 first."""
  seeds = tuple((seed + member * ORDERS) % 2**32 for member in range(section['members']) for seed in config.seeds)
  rounds = {f'round-{number}': {'name': 'iterative_magnitude', **section['recipe'], 'sparsity': sparsity}
            for number, sparsity in enumerate(sparsities(section), 1)}
  return _phase(config, seeds=seeds, steps=section['retrain_steps'], recipes=rounds,
                optimizer=rates(config.optimizer, section['rewind']))


def _early(config: ConfigDict, steps: int, directory: pathlib.Path, signals: StopRequest,
           console: rich.console.Console) -> PyTree:
  """The parameters of the dense run at this step, by its first steps run apart: its checkpoints are soon gone."""
  # Measured at its last step, which the dense run need not be at.
  setup = prepare(_phase(config, measure_every=max(steps, 1), recipes={'dense': {'name': 'dense'}}))
  run = build(setup, {'dense': directory})['dense']._replace(name='early')
  if not steps:
    return jax.tree.map(np.asarray, run.start().params)
  with Progress(1, steps, console) as progress:
    return _trained(run, setup._replace(config=_phase(setup.config, steps=steps)), signals, progress, test=False)


def _trained(run: Run, setup: Setup, signals: StopRequest, progress: Progress, test: bool = True) -> PyTree:
  """The last parameters of a run, NumPy, after whatever of it is left to train and test. Raises `Stopped`."""
  if not train.train(run, setup, signals, progress):
    raise Stopped(run.name)
  if test and outcomes.read(run.directory, setup.config) is None:
    progress.doing(f'testing {run.name}')
    outcomes.write(run, setup, progress.say)
  with checkpoints.open_(run.directory / 'checkpoints') as saved:
    _, state, _ = checkpoints.restore(saved, run.state, progress.say)
  return jax.tree.map(np.asarray, state.params)


def _round(number: int, section: Mapping[str, Any], setup: Setup, base: Setup, start: PyTree, ticket: PyTree,
           between: Callable[[PyTree, PyTree], metrics.Barrier], workdir: pathlib.Path, signals: StopRequest,
           progress: Progress) -> Round:
  """Prunes `ticket`, retrains `start` under its mask, all members at once, and averages them."""
  name, members = f'round-{number}', section['members']
  rows = lambda params: jax.tree.map(lambda leaf: np.concatenate([leaf] * members), params)
  model = setup.models[name]._replace(initial=lambda: rows(start), signals=lambda: {'ticket': rows(ticket)})
  progress.doing(f'tracing {name}')
  run = build(setup._replace(models={name: model}), {name: workdir / name})[name]
  params = _trained(run, setup, signals, progress)
  outcome, seeds = outcomes.read(run.directory, setup.config), len(base.config.seeds)
  prefix = '' if number == section['rounds'] else f'{name}-'
  if members == 1:
    return Round([_of_rows(outcome, f'{prefix}imp-{REWINDS[section["rewind"]]}', number)], params, None)
  parts = [slice(member * seeds, (member + 1) * seeds) for member in range(members)]
  each = [{**_of_rows(outcome, f'{prefix}member-{member}', number, part), 'seconds': outcome['seconds'] / members}
          for member, part in enumerate(parts)]
  average = soup(params, members)
  io.save(run.directory / SOUP, average)
  progress.doing(f'testing the soup of {name}')
  test = evaluate.scores(base.task, base.models['dense'].predict, average, split(base, 'test'))
  ours = {**each[0], 'name': f'{prefix}soup', 'seconds': 0.0, 'test': {key: x.tolist() for key, x in test.items()}}
  first, second = (jax.tree.map(lambda leaf, part=part: leaf[part], params) for part in parts[:2])
  return Round([*each, ours], average, jax.tree.map(np.asarray, between(first, second)))


def _of_rows(outcome: Mapping[str, Any], name: str, number: int, rows: slice = slice(None)) -> dict[str, Any]:
  """The part of a run's outcome that these rows are."""
  kept = {key: value for key, value in outcome.items() if key != 'directory'}
  return {**kept, 'name': name, 'round': number, 'seeds': outcome['seeds'][rows], 'empty': outcome['empty'][rows],
          'test': {key: values[rows] for key, values in outcome['test'].items()}}


def _between(base: Setup) -> Callable[[PyTree, PyTree], metrics.Barrier]:
  """The barrier of the test loss from one model to another, of all seeds."""
  model: Model = base.models['dense']

  def loss(params: PyTree, batches: Any) -> Array:
    def of_batch(batch):
      weight = batch['weight'].sum()
      return base.task.loss(model.apply(params, batch['inputs']), batch['labels'], batch['weight']) * weight, weight

    losses, weights = jax.lax.map(of_batch, batches)
    return losses.sum() / weights.sum()

  one = lambda a, b, batches: metrics.barrier(lambda params: loss(params, batches), a, b)
  every = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
  stacked = lambda: jax.tree.map(lambda *leaves: np.stack(leaves), *map(dict, base.data[0].test))
  return lambda a, b: every(a, b, stacked())


# What came out.


HEAD = ('run', 'round', 'test\n{} {}', 'difference', 'test\nloss', 'sparsity')


def show(found: Mapping[str, Any], workdir: pathlib.Path, console: rich.console.Console) -> None:
  """Prints the table and writes `results.{md,json,png}`."""
  task = tasks.named(found['outcomes'][0]['task'])
  head = [name.format(task.name, task.unit) for name in HEAD]
  cells = [_cells(task, outcome, found['outcomes'][0]) for outcome in found['outcomes']]
  dense, last = found['outcomes'][0], found['outcomes'][-1]
  notes = [f'{dense["steps"]} dense steps, {last["steps"]} in each round, seeds {", ".join(map(str, dense["seeds"]))}. '
           f'±: 95 % confidence interval (Student t). Difference: in {task.difference} to dense, seed by seed. '
           f'Loss: in {task.loss_unit}.']
  for barrier in found['barriers']:
    gain = results.interval(np.subtract(*_soup_and_mean(found, barrier['round'], task)))
    height = np.array(barrier['height'], np.float64)
    notes.append(f'Round {barrier["round"]}: the soup minus the mean of its members is '
                 f'{results.spread(task.scale, *gain, "+")} {task.difference}; from member 0 to member 1 the barrier '
                 f'of the test loss is {height.mean():.4f} {task.loss_unit} in the mean, {height.max():.4f} at most.')
  console.print('', results.drawn(head, cells))
  notes.append(f'Files in {workdir}: results.md, results.json, results.png; parameters in round-*/checkpoints'
               + (f' and round-*/{SOUP}.' if found['barriers'] else '.'))
  console.print('\n' + '\n'.join(notes), markup=False, highlight=False, soft_wrap=True)
  records.write_whole(workdir / 'results.md', '\n\n'.join(
      [results.markdown(head, cells), '\n'.join(f'- {note}' for note in notes)]) + '\n')
  draw(found, task, workdir / 'results.png')
  # Last: with it the job is finished.
  records.write_whole(workdir / 'results.json', json.dumps(results.strict(found), indent=2) + '\n')


def _cells(task: tasks.Task, outcome: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
  score, base = (np.array(one['test'][task.name]) for one in (outcome, dense))
  difference = results.spread(task.scale, *results.interval(score - base), '+') if outcome['round'] else 'baseline'
  sparsity = '-' if outcome['achieved'] is None else f'{outcome["achieved"]:.2%}'
  return [outcome['name'], str(outcome['round']), results.spread(task.scale, *results.interval(score)), difference,
          f'{np.mean(outcome["test"]["loss"]):.4f}', sparsity]


def _soup_and_mean(found: Mapping[str, Any], number: int, task: tasks.Task) -> list[np.ndarray]:
  """The scores of a round's soup, and the mean of its members' scores, of each seed."""
  *members, average = (np.array(one['test'][task.name]) for one in found['outcomes'] if one['round'] == number)
  return [average, np.mean(members, axis=0)]


def draw(found: Mapping[str, Any], task: tasks.Task, path: pathlib.Path) -> None:
  """Test scores over the rounds, means of the seeds, and the test loss on the way from member 0 to member 1."""
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, 1 + bool(found['barriers']), figsize=(13, 4.5), squeeze=False, layout='constrained')
  scores, *ways = axes[0]
  for outcome in found['outcomes']:
    kind = next((kind for kind in ('soup', 'member') if kind in outcome['name']), 'other')
    mean, half = results.interval(outcome['test'][task.name])
    place = outcome['round'] + {'soup': 0.1, 'member': -0.1, 'other': 0}[kind]
    scores.errorbar(place, task.scale * mean, yerr=task.scale * np.nan_to_num(half), fmt='o', capsize=3,
                    color={'soup': 'C1', 'member': 'C7', 'other': 'C0'}[kind])
  scores.set_xticks(range(1 + len(found['sparsities'])),
                    ['dense', *(f'round {i}\n{s:.1%}' for i, s in enumerate(found['sparsities'], 1))])
  scores.set_title(f'test {task.name}, {task.unit}' + (': members grey, soup orange' if found['barriers'] else ''))
  for axis in ways:
    for barrier in found['barriers']:
      losses = np.array(barrier['losses'], np.float64).mean(0)
      axis.plot(np.linspace(0, 1, len(losses)), losses, label=f'round {barrier["round"]}')
    axis.set_title('test loss from member 0 to member 1')
    axis.legend()
  for axis in axes[0]:
    axis.grid(alpha=0.3)
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  sys.exit(main())
