"""Computes a run seed by seed, for engines whose runs have no checkpoints: finished seeds are read, not computed again.

    outcome = run(config, 'TEDDY-80', workdir / 'TEDDY-80', request, compute=scores_of_seed, tell=columns)
"""

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import origins, outcomes, records, training
from experiments.loop.stopping import StopRequest


def run(config: ConfigDict, name: str, directory: pathlib.Path, request: StopRequest, compute: Callable[[int], Any],
        tell: Callable[[Sequence[Any]], Mapping[str, Any]]) -> outcomes.Outcome:
  """Returns the outcome of the run `name` over all seeds, and writes it.

  `compute(seed)` returns what JSON can hold, and `tell` makes the own part of the outcome of what the seeds gave.
  Raises `ValueError` if the run, or one of its seeds, was computed under another config, and `training.Stopped` if a
  signal came. Raises `FloatingPointError` for numbers that are not finite.
  """
  wanted = configs.of_run(config, name)
  if origins.is_finished(directory, wanted, config.steps, meant=False):
    return outcomes.read(directory)
  begun = time.perf_counter()
  directory.mkdir(parents=True, exist_ok=True)
  found = [_of_seed(seed, name, directory, wanted, request, compute) for seed in config.seeds]
  records.write_json(directory / outcomes.FILE, {
      'name': name, 'task': 'classification', 'config': wanted, 'seeds': list(config.seeds), 'steps': config.steps,
      'seconds': time.perf_counter() - begun, 'empty': [0] * len(found), 'asked': wanted['recipe'].get('sparsity'),
      'labels': {'count': None, 'chance': None}, 'environment': outcomes.environment(), **tell(found)})
  return outcomes.read(directory)


def _of_seed(seed: int, name: str, directory: pathlib.Path, wanted: Mapping[str, Any], request: StopRequest,
             compute: Callable[[int], Any]) -> Any:
  """Returns what one seed gives, from its file if there is one."""
  file = directory / f'seed_{seed}.json'
  record = records.read_json(file, 'Remove the file, and its seed is computed again.')
  if record is None:
    if request.received:
      raise training.Stopped(name, request)
    record = {'config': wanted, 'seeds': wanted['seeds'], 'found': compute(seed)}
    try:
      json.dumps(record['found'], allow_nan=False)
    except ValueError as error:
      raise FloatingPointError(f'{name}: a number of seed {seed} is not finite. A lower optimizer.learning_rate may '
                               'help.') from error
    records.write_json(file, record)
  origins.continued(directory, wanted['steps'], record, wanted, wanted['steps'], meant=False)
  return record['found']
