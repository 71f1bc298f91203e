"""Turns a config and a grid into cells. A cell is one run of all seeds, with its own place and an ordinary config.

    grid = read({'pattern': ['1:4', '1:8'], 'learning_rate': [1e-3, 3e-3], 'tuning': {'seeds': (100, 101)}}, config)
    for arm in arms(config, grid):
      arm.place, arm.axes['pattern']    # 'SR-STE/1of8', '1:8'

The recipes of the config are the axis `recipe`. A recipe without patterns gets the sparsity of the pattern, and a
recipe without sparsity, such as `dense`, is one cell for all patterns.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import tasks
from sparsejax import errors, patterns, recipes

AXES = {
    'recipe': None,  # recipes by name; None: the recipes of the config
    'pattern': (),  # 'N:M'
    'model': {},  # by name: a section `model`, or a model of the user's own
    'data': {},  # by name: a section `data`, or the user's own splits
    'task': {},  # by name: changes of any keys of the config together, such as data, model and steps
    'learning_rate': (),  # peaks; with `tuning` the best of them is chosen for each arm
    'seed': (),  # of the tested runs
}
OPTIONS = {
    'optimizer': {},  # by name of the recipe: changes of the section `optimizer`
    'tuning': None,  # {'seeds': seeds of their own, 'steps': None for those of the config, 'pattern': None for each}
    'metric': 'loss',  # of the verdicts: 'loss', or the name of the task's score
    'baseline': None,  # the recipe that the others are compared with; None: the first
    'order': (),  # a list of {axis: values}: the cells that match the first run first, and others last
    'equal_flops': False,  # runs each arm once more, with the steps at which its training FLOPs are the baseline's
    'cpu_hours': None,  # after which no further cell begins; the report names what is left out
    'pack': None,  # seeds that train together; None: all, or as many as the memory holds
    'keep': False,  # whether checkpoints and packed files of finished cells stay on the disk
}
TUNING = {'seeds': (1000, 1001), 'steps': None, 'pattern': None}
RATE = 'rate-'  # the name of a tuning run begins so


class Arm(NamedTuple):
  """An `Arm` is one setting of all axes but learning rate and seed; it is tuned, if the grid says so, and tested."""

  place: str  # the folder in the job's folder, and the name in its records
  axes: Mapping[str, str | None]  # task, data, model, recipe, pattern; None where the grid has no such axis
  config: ConfigDict  # of one run, which has the name of the recipe


def read(given: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
  """Returns the grid `given` with all keys, checked against `config`.

  Raises `ValueError` for an unknown axis or option, with the nearest, and for a value that no cell could use.
  """
  valid = {**AXES, **OPTIONS}
  configs.refuse_unknown('sweep', 'axis or option', given, valid)
  grid = {**valid, **given}
  grid['recipe'] = configs.plain(config)['recipes'] if grid['recipe'] is None else dict(grid['recipe'])
  for axis in ('model', 'data', 'task', 'recipe'):
    _refuse_names(axis, grid[axis])
  configs.refuse_unknown('sweep', 'recipe in optimizer:', grid['optimizer'], grid['recipe'])
  grid['baseline'] = grid['baseline'] or next(iter(grid['recipe']))
  configs.refuse_unknown('sweep', 'recipe as baseline:', [grid['baseline']], grid['recipe'])
  for axis in ('pattern', 'learning_rate', 'seed'):
    grid[axis] = _listed(axis, grid[axis])
  for pattern in grid['pattern']:
    patterns.parse(pattern)
  if grid['tuning'] is not None:
    grid['tuning'] = _tuning(grid, config)
  for place in grid['order']:
    configs.refuse_unknown('sweep', 'axis in order:', place, ('task', 'data', 'model', 'recipe', 'pattern'))
  if grid['pack'] is not None and (not isinstance(grid['pack'], int) or grid['pack'] < 1):
    raise ValueError(f'sweep: pack={grid["pack"]!r} must be a whole number of seeds, at least 1, or None.')
  return grid


def _refuse_names(axis: str, values: Any) -> None:
  if not isinstance(values, Mapping):
    raise ValueError(f'sweep: {axis}={values!r} must be a dict: a name for each value of the axis.')
  for name in values:
    if not isinstance(name, str) or not re.fullmatch(r'[\w-]+', name):
      raise ValueError(f'sweep: the {axis} {name!r} is a directory too; use letters, digits, "-" and "_".')


def _listed(axis: str, values: Any) -> tuple[Any, ...]:
  """Returns the values of an axis without names. Raises `ValueError` for a single value and for equal values."""
  if isinstance(values, str) or not isinstance(values, Iterable):
    raise ValueError(f'sweep: {axis}={values!r} must be a list of values.')
  values = tuple(values)
  if len(set(values)) < len(values):
    raise ValueError(f'sweep: {axis}={values!r} has a value twice; leave one of them out.')
  return values


def _tuning(grid: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
  configs.refuse_unknown('sweep', 'key of tuning:', grid['tuning'], TUNING)
  tuning = {**TUNING, **grid['tuning']}
  tuning['seeds'] = _listed('tuning.seeds', tuning['seeds'])
  if not grid['learning_rate']:
    raise ValueError('sweep: tuning needs the axis learning_rate, such as [1e-3, 3e-3, 1e-2].')
  if shared := set(tuning['seeds']) & set(grid['seed'] or config.seeds):
    raise ValueError(f'sweep: tuning.seeds and the tested seeds share {sorted(shared)}; tune on other seeds.')
  if tuning['pattern'] is not None:
    configs.refuse_unknown('sweep', 'pattern of tuning:', [tuning['pattern']], grid['pattern'])
  return tuning


def arms(config: ConfigDict, grid: Mapping[str, Any]) -> list[Arm]:
  """Returns the arms of the grid in the order in which they run.

  Without `tuning` a learning rate is an axis like others. Raises `ValueError` for a change that is no config.
  """
  made = [arm for setting in _settings(grid) for arm in _arms(config, grid, setting)]
  return sorted(made, key=lambda arm: _priority(arm, grid['order']))


def _settings(grid: Mapping[str, Any]) -> Iterator[dict[str, str | None]]:
  """Yields each combination of task, data and model, by name."""
  axes = ('task', 'data', 'model')
  for names in itertools.product(*(grid[axis] or [None] for axis in axes)):
    yield dict(zip(axes, names))


def _arms(config: ConfigDict, grid: Mapping[str, Any], setting: Mapping[str, str | None]) -> Iterator[Arm]:
  data_dir = config.data.data_dir
  if setting['task'] is not None:
    config = configs.merged(config, grid['task'][setting['task']])
  for axis in ('data', 'model'):
    if setting[axis] is not None:
      config = configs.merged(config, {axis: grid[axis][setting[axis]]})
  if config.data.data_dir is None and config.data.name not in ('digits', configs.OWN):  # Digits would be written there.
    config = configs.merged(config, {'data': {**config.data, 'data_dir': data_dir}})
  if grid['seed']:
    config = configs.merged(config, {'seeds': grid['seed']})
  rates = (None,) if grid['tuning'] else grid['learning_rate'] or (None,)
  for name, recipe in grid['recipe'].items():
    for (pattern, section), rate in itertools.product(_patterned(recipe, grid['pattern']), rates):
      # The changes go into the sections themselves: a change of `name` keeps the other keys of the optimizer.
      optimizer = {**config.optimizer, **config.optimizers.get(name, {}), **grid['optimizer'].get(name, {}),
                   **({} if rate is None else {'learning_rate': rate})}
      model = {**config.model, **config.models.get(name, {})}
      axes = {**setting, 'recipe': name, 'pattern': pattern, 'learning_rate': None if rate is None else f'{rate:g}'}
      spelled = pattern and re.sub(r'\W+', '-', pattern.replace(':', 'of'))
      parts = [setting['task'], setting['data'], setting['model'], name, spelled,
               None if rate is None else f'{RATE}{rate:g}']
      of_one = configs.changed(config, models={}, optimizers={})
      yield Arm('/'.join(part for part in parts if part), axes, configs.merged(of_one, {
          'recipes': {name: section}, 'model': model, 'optimizer': optimizer}))


def _patterned(recipe: Mapping[str, Any], axis: Sequence[str]) -> Iterator[tuple[str | None, dict[str, Any]]]:
  """Yields each pattern with the recipe at that pattern, or `None` with the recipe if it has no use for patterns."""
  known = recipes.TABLE.get(recipe.get('name'))
  takes = recipes.arguments(known) if known else ['pattern']  # An unknown recipe is refused where its cell runs.
  if not axis or not {'pattern', 'sparsity'} & set(takes):
    yield None, dict(recipe)
    return
  for pattern in axis:
    sparsity = patterns.parse(pattern).sparsity
    yield pattern, {**recipe, **({'pattern': pattern} if 'pattern' in takes else {'sparsity': sparsity})}


def _priority(arm: Arm, order: Sequence[Mapping[str, Any]]) -> int:
  """Returns the place of an arm in the order. A cell without a pattern belongs to the first place of its task."""
  fits = lambda place: all(arm.axes[axis] is None or arm.axes[axis] in values for axis, values in place.items())
  return next((i for i, place in enumerate(order) if fits(place)), len(order))


def tuning_run(arm: Arm, rate: float, tuning: Mapping[str, Any]) -> Arm:
  """Returns the run that tries one learning rate of `arm`, on the seeds and steps of the tuning."""
  steps = tuning['steps'] or arm.config.steps
  return arm._replace(place=f'{arm.place}/{RATE}{rate:g}', axes={**arm.axes, 'learning_rate': f'{rate:g}'},
                      config=configs.merged(at_rate(arm, rate).config, {'seeds': tuning['seeds'], 'steps': steps}))


def at_rate(arm: Arm, rate: float) -> Arm:
  """Returns `arm` with another peak of the learning rate."""
  return arm._replace(config=configs.merged(arm.config, {
      'optimizer': {**arm.config.optimizer, 'learning_rate': rate}}))


def at_flops(arm: Arm, own: float, of_baseline: float) -> Arm:
  """Returns `arm` with as many steps as make its training FLOPs, `own` a step, those of the baseline's steps."""
  steps = max(1, round(arm.config.steps * of_baseline / own))
  return arm._replace(place=f'{arm.place}/flops', config=configs.merged(arm.config, {'steps': steps}))


def metric(config: ConfigDict, name: str) -> str:
  """Returns `name` if the task of `config` has this number. Raises `ValueError` with the nearest otherwise."""
  valid = ('loss', tasks.of_config(config)[1].name)
  if name not in valid:
    raise errors.unknown('sweep', 'metric', name, valid)
  return name
