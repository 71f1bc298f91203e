"""Runs the cells of a sweep, one after the other, on the loop of `experiments.train`; skips what is done.

The line of a finished cell, as the ledger keeps it, has these keys:

- `cell`, its place; `phase`: `tuning`, `test` or `flops`; and the name of each axis: `task`, `data`, `model`, `recipe`,
  `pattern`, `learning_rate`.
- `status`: `done`, `refused` (by the data, the model or the recipe) or `diverged` (a number is not finite); `reason`.
- `config`; `rate`, the peak of the learning rate; `steps`, `seeds`; `wall` and `cpu`, the seconds that the cell took.
- `scores` of a cell that is done, by name, a number for each seed, on `split`. `metric_task` is the name of the task.
  `seconds`, sparsities, FLOPs, `empty`, `labels` and `environment` are the outcome's. `curve` of a tested cell
  holds its records, means over the seeds.
- `tuning`, of a tested cell: the validation metric of each rate, the best rate, and whether it is the first or last.
"""

import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import configs
from experiments.loop import outcomes, records, training
from experiments.loop.shared import Shared
from experiments.loop.stopping import StopRequest
from experiments.sweep import grids
from experiments.sweep.board import Board
from experiments.sweep.grids import Arm
from experiments.sweep.ledger import Ledger, Line

POINTS = 60  # records that the line of a cell keeps of its curve
DROPPED = ('checkpoints', outcomes.PACKED, outcomes.DENSE)  # files of a finished cell, unless the grid says `keep`


class Job(NamedTuple):
  """A `Job` holds what the cells of one sweep share."""

  grid: Mapping[str, Any]
  workdir: pathlib.Path
  ledger: Ledger
  board: Board
  request: StopRequest
  shared: Shared


def lines(job: Job, arms: Sequence[Arm]) -> Iterator[Line]:
  """Runs what is not finished, and yields the line of each cell: the runs of the tuning, then the tested run of an arm.

  With `equal_flops` all arms follow once more. After `cpu_hours` no further cell begins; the line of a cell
  that did not begin has the status `dropped`, and is not kept. Raises `Stopped` or `OSError` where the sweep ends.
  """
  tested = {}
  for arm in arms:
    yield from (tried := _tuned(job, arms, arm))
    tested[arm.place] = _tested(job, arm, tried)
    yield tested[arm.place]
  for arm in arms if job.grid['equal_flops'] else ():
    repeated = _repeated(job, arms, arm, tested)
    if repeated is not None:
      yield repeated


def planned(arms: Sequence[Arm], grid: Mapping[str, Any]) -> int:
  """Returns the number of cells that `lines` runs if none is refused."""
  tuned = {_tuned_at(arms, arm, grid['tuning']['pattern']).place for arm in arms} if grid['tuning'] else ()
  return len(arms) * (1 + grid['equal_flops']) + len(tuned) * len(grid['learning_rate'])


def _tuned(job: Job, arms: Sequence[Arm], arm: Arm) -> list[Line]:
  """Returns the lines of the tuning runs of `arm`: none without a tuning; one if the first is refused."""
  tuning, tried = job.grid['tuning'], []
  if tuning is None:
    return tried
  source = _tuned_at(arms, arm, tuning['pattern'])
  for rate in job.grid['learning_rate']:
    tried.append(_finished(job, grids.tuning_run(source, rate, tuning), 'tuning', 'valid'))
    if tried[-1]['status'] in ('refused', 'dropped'):
      break
  return tried


def _tuned_at(arms: Sequence[Arm], arm: Arm, pattern: str | None) -> Arm:
  """Returns the arm at whose pattern the learning rate of `arm` is tuned."""
  if pattern is None or arm.axes['pattern'] is None:
    return arm
  return next(other for other in arms if other.axes == {**arm.axes, 'pattern': pattern})


def _tested(job: Job, arm: Arm, tried: Sequence[Line]) -> Line:
  """Returns the line of the tested run of `arm`, at the best of the rates that were `tried`."""
  if not tried:
    return _finished(job, arm, 'test', 'test')
  if all(line['status'] != 'done' for line in tried):
    kept = {key: value for key, value in tried[-1].items() if key != 'cell'}
    return {**kept, **_named(arm, 'test'), 'cell': arm.place, 'wall': 0.0, 'cpu': 0.0, 'seeds': list(arm.config.seeds)}
  found = choice(tried, grids.metric(arm.config, job.grid['metric']), job.grid['learning_rate'])
  return _finished(job, grids.at_rate(arm, found['best']), 'test', 'test', {'tuning': found})


def choice(tried: Sequence[Line], metric: str, rates: Sequence[float]) -> dict[str, Any]:
  """Returns the validation metric of each rate, the best rate, and whether a rate beyond the grid might be better.

  The first of equal rates is best. A rate at which training diverged has no number, and is not chosen.
  """
  means = [float(np.mean(line['scores'][metric])) if line['status'] == 'done' else None for line in tried]
  worth = [-np.inf if mean is None else -mean if metric == 'loss' else mean for mean in means]
  best = rates[int(np.argmax(worth))]
  return {'rates': list(rates), 'metric': metric, 'means': means, 'best': best, 'steps': tried[0]['steps'],
          'seeds': tried[0]['seeds'], 'edge': len(rates) > 1 and best in (min(rates), max(rates))}


def _repeated(job: Job, arms: Sequence[Arm], arm: Arm, tested: Mapping[str, Line]) -> Line | None:
  """Returns the line of `arm` at the training FLOPs of its baseline.

  Returns `None` where one of both is not done, or where the steps are the same.
  """
  own = tested[arm.place]
  same = lambda other: {**other.axes, 'recipe': None, 'pattern': None} == {**arm.axes, 'recipe': None, 'pattern': None}
  bases = [other for other in arms if other.axes['recipe'] == job.grid['baseline'] and same(other)
           and other.axes['pattern'] in (None, arm.axes['pattern'])]
  base = tested[bases[0].place] if bases else own
  if own['status'] != 'done' or base['status'] != 'done':
    return None
  tuned = {'tuning': own['tuning']} if 'tuning' in own else {}
  longer = grids.at_flops(grids.at_rate(arm, own['rate']), own['training_flops'], base['training_flops'])
  if longer.config.steps == arm.config.steps:
    return None
  return _finished(job, longer, 'flops', 'test', tuned)


def _finished(job: Job, arm: Arm, phase: str, split: str, more: Mapping[str, Any] = {}) -> Line:
  """Returns the line of one cell, which runs now if the ledger does not have it."""
  config = configs.of_run(arm.config, arm.axes['recipe'])
  line = known = job.ledger.get(arm.place, config)
  if line is None:
    if job.grid['cpu_hours'] is not None and job.board.spent >= 3600 * job.grid['cpu_hours']:
      reason = f'not begun: the {job.grid["cpu_hours"]:g} CPU hours of the sweep are over'
      line = {**_named(arm, phase), 'cell': arm.place, 'status': 'dropped', 'reason': reason, 'config': config,
              'rate': arm.config.optimizer.learning_rate, 'steps': arm.config.steps, 'seeds': list(arm.config.seeds),
              'wall': 0.0, 'cpu': 0.0}
    else:
      line = job.ledger.add(arm.place, {**_ran(job, arm, phase, split), **more, 'config': config})
      if not job.grid['keep']:
        _drop_files(job.workdir / 'cells' / arm.place)
  job.board.finished(arm.place, line, known is None)
  return line


def _named(arm: Arm, phase: str) -> dict[str, Any]:
  return {'phase': phase, **arm.axes}


def _ran(job: Job, arm: Arm, phase: str, split: str) -> dict[str, Any]:
  """Runs one cell to its end. Returns its line, with the reason where the cell was refused or diverged."""
  job.board.begin(arm, phase)
  line = {**_named(arm, phase), 'rate': arm.config.optimizer.learning_rate, 'steps': arm.config.steps,
          'seeds': list(arm.config.seeds)}
  began, worked = time.monotonic(), time.process_time()
  try:
    packs = _in_packs(job, arm, split)
    line |= {'status': 'done', 'reason': None, **_joined(packs, split)}
  except training.Refused as error:
    line |= {'status': 'refused', 'reason': ' '.join(str(error).split())}
  except FloatingPointError as error:
    line |= {'status': 'diverged', 'reason': str(error)}
  return {**line, 'wall': time.monotonic() - began, 'cpu': time.process_time() - worked}


def _in_packs(job: Job, arm: Arm, split: str) -> list[outcomes.Outcome]:
  """Returns the outcome of each pack of seeds, which train together. Packs get smaller until they fit the memory."""
  seeds = tuple(arm.config.seeds)
  size = min(job.grid['pack'] or len(seeds), len(seeds))
  while True:
    try:
      return [_pack(job, arm, seeds[start:start + size], split) for start in range(0, len(seeds), size)]
    except (training.TooLarge, jax.errors.JaxRuntimeError) as error:
      if not isinstance(error, training.TooLarge) and 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      if size == 1:
        raise training.Refused(str(error)) from error
      size = max(1, min(getattr(error, 'seeds', size // 2), size - 1))
      job.board.say(f'{arm.place}: the memory holds {size} seeds at a time, not more.')


def _pack(job: Job, arm: Arm, seeds: tuple[int, ...], split: str) -> outcomes.Outcome:
  """Trains and tests some of the seeds of a cell, all in one program. Returns the outcome."""
  place = job.workdir / 'cells' / arm.place
  if len(seeds) < len(arm.config.seeds):
    place /= f'seeds-{seeds[0]}-{seeds[-1]}'
  config = configs.changed(arm.config, seeds=seeds, writers=tuple(
      _placed(writer, arm.place) for writer in arm.config.writers))
  return training.run(config, place, job.request, scored=split, board=job.board,
                      shared=job.shared)[arm.axes['recipe']]


def _placed(writer: records.Writer, place: str) -> records.Writer:
  """Returns `writer` with the place of the cell in the place of the name of its run."""
  return lambda run, step, numbers: writer(place, step, numbers)


def _joined(packs: Sequence[outcomes.Outcome], split: str) -> dict[str, Any]:
  """Returns the part of a line that comes from the outcomes of all packs."""
  first = packs[0]
  mean = lambda key: float(np.average([pack[key] for pack in packs], weights=[len(pack['seeds']) for pack in packs]))
  return {
      'split': split, 'metric_task': first['task'],
      'scores': {key: [x for pack in packs for x in pack[split][key]] for key in first[split]},
      'empty': [count for pack in packs for count in pack['empty']], 'labels': first.get('labels'),
      'seconds': sum(pack['seconds'] for pack in packs), 'asked': first['asked'], 'achieved': first['achieved'],
      'training_flops': mean('training_flops'), 'inference_flops': mean('inference_flops'),
      'environment': first['environment'],
      **({'curve': _curve([list(records.read(pack['directory'])) for pack in packs])} if split == 'test' else {})}


def _curve(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[Any]]:
  """Returns at most `POINTS` records, evenly spaced and with the last: each number over the steps, `None` where absent.

  Numbers are means over the seeds of all packs.
  """
  count = min(map(len, runs))
  points = min(count, POINTS)
  chosen = {count - 1 - round(i * count / points) for i in range(points)}
  # Records with a validation are rare, and stay whole.
  rare = {i for i in range(count) if any(key.startswith('valid_') for key in runs[0][i])}
  keys = dict.fromkeys(key for record in runs[0] for key in record if key != 'step')
  places = sorted({*chosen, *rare})
  return {'step': [runs[0][i]['step'] for i in places],
          **{key: [_mean([record[i].get(key) for record in runs]) for i in places] for key in keys}}


def _mean(values: Sequence[Any]) -> float | None:
  numbers = [x for value in values for x in np.atleast_1d(np.array(value, object))]
  # Five digits are enough for a picture, and keep a line at a few kilobytes.
  return None if None in numbers else float(f'{np.mean(np.array(numbers, np.float64)):.5g}')


def _drop_files(place: pathlib.Path) -> None:
  """Removes what a finished cell no longer needs: checkpoints and files of parameters."""
  for name in DROPPED:
    for path in place.rglob(name):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
