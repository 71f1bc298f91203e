"""Tunes the learning rate of each run of an engine that trains seed by seed, as a sweep tunes its cells.

    outcomes = tuned(protocols.finished, config, workdir, claims.tuned(1e-3, 3e-3), request)
    outcomes['SSVI']['tuning']['best']    # 0.003
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import configs, data
from experiments.loop.outcomes import Outcome, Outcomes
from experiments.loop.stopping import StopRequest
from experiments.sweep import engine, grids

Engine = Callable[[ConfigDict, pathlib.Path, StopRequest], Outcomes]


def tuned(run: Engine, config: ConfigDict, workdir: pathlib.Path, grid: Mapping[str, Any], request: StopRequest
          ) -> Outcomes:
  """Returns the outcomes of `run(config, workdir, request)`, of each run at the best learning rate of `grid`.

  Each rate is tried on the seeds of the tuning, which train without the validation split and are scored on it. The best
  rate has the highest mean quality, or score where a run has none; of equal rates, the first is best. Without
  rates the config's own rate is used. Raises `ValueError` for a grid that no sweep could use.
  """
  if not grid:
    return run(config, workdir, request)
  whole = grids.read(grid, config)
  if whole['tuning'] is None:
    raise ValueError('sweep: tasks and protocols have no axis learning_rate of their own; give tuning, such as '
                     '{"seeds": (1000, 1001)}.')
  split, lines = data.pixels(**config.data), {name: [] for name in config.recipes}
  for rate in whole['learning_rate']:
    tried = configs.merged(config, {
        'seeds': whole['tuning']['seeds'], 'optimizer': {**config.optimizer, 'learning_rate': rate},
        'data': {'train': split['train'], 'test': split['valid']}})
    for name, outcome in run(tried, workdir / f'{grids.RATE}{rate:g}', request).items():
      lines[name].append(_line(outcome))
  found = {name: engine.choice(each, 'accuracy', whole['learning_rate']) for name, each in lines.items()}
  best = {name: {'learning_rate': each['best']} for name, each in found.items()}
  outcomes = run(configs.merged(config, {'optimizers': best}), workdir, request)
  return {name: {**outcome, 'tuning': found[name]} for name, outcome in outcomes.items()}


def _line(outcome: Outcome) -> dict[str, Any]:
  """Returns the line of a sweep for the outcome of one rate."""
  quality = outcome.get('quality') or outcome['test']['accuracy']
  return {**outcome, 'status': 'done', 'scores': {'accuracy': np.asarray(quality)}}
