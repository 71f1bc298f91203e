r"""Tests claims that need a protocol of their own: graphs, unlearning, transfer, posteriors, experts, films, starts.

  python -m experiments.protocols --config experiments/configs/claims/edges_digits.py --workdir runs/edges [--set k=v]

`config.protocol` names the protocol, its sizes, and under `runs` what differs from run to run besides the recipe. Each
run gives a score from 0 to 1 for each seed, of which a larger one is better. `chance` is the accuracy of the best
constant answer, and `quality` the accuracy of the run's models, by default the score: a run whose quality is not above
chance decides no claim. Further numbers stand beside in `outcome.json`. The data are the digits, or own images of their
size; own features for `features`; and films for `recommended` and `liked`. Finished seeds and runs are read, not
computed again. The exit statuses are those of `experiments.loop.commands`.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import commands, outcomes, seeds, training
from experiments.loop.stopping import StopRequest
from experiments.protocols import (
  consensus,
  edges,
  experts,
  features,
  forgetting,
  gaters,
  liked,
  midpoints,
  posteriors,
  recommended,
  searched,
  served,
  starts,
  transferred,
)
from sparsejax import errors

PROTOCOLS = {module.__name__.rpartition('.')[2]: module for module in (
    consensus, edges, experts, features, forgetting, gaters, liked, midpoints, posteriors, recommended, searched,
    served, starts, transferred)}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  return commands.main(arguments, 'protocols', finished)


def finished(config: ConfigDict, workdir: pathlib.Path, request: StopRequest) -> outcomes.Outcomes:
  """Computes whatever is not finished. Returns the outcomes by run. Raises `ValueError` for an unknown protocol or key.
  """
  if config.protocol is None:
    raise ValueError('config: protocol is None; give config.protocol = {"name": ...}, one of '
                     f'{errors.some(PROTOCOLS)}.')
  settings = configs.plain(config)['protocol']
  name, runs = settings.pop('name'), settings.pop('runs', {})
  configs.refuse_unknown('protocols', 'protocol', [name], PROTOCOLS)
  module = PROTOCOLS[name]
  configs.refuse_unknown('protocols', f'key of {name}:', settings, module.SIZES)
  for own in runs.values():
    configs.refuse_unknown('protocols', f'key of a run of {name}:', own, module.RUN)
  found = {}
  for run, recipe in configs.plain(config)['recipes'].items():
    own = module.RUN | runs.get(run, {})
    compute = functools.partial(_scores, module, configs.at_run(config, run), module.SIZES | settings, own, recipe)
    found[run] = seeds.run(config, run, workdir / run, request, compute, _told)
    training.console().print(f'{run}: {np.mean(found[run]["test"]["accuracy"]):.1%}')
  return found


def _scores(module: Any, config: ConfigDict, sizes: Mapping[str, Any], own: Mapping[str, Any],
            recipe: Mapping[str, Any], seed: int) -> dict[str, float]:
  """Returns the numbers of one seed."""
  return {key: float(value) for key, value in module.scores(config, sizes, own, recipe, seed).items()}


def _told(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """Returns the score of each seed as the accuracy of the outcome, and the further numbers beside it."""
  columns = {key: [each[key] for each in found] for key in found[0]}
  test = columns.pop('score')
  return {'test': {'accuracy': test}, 'quality': columns.pop('quality', test), 'beside': columns,
          'labels': {'count': None, 'chance': float(np.mean(columns.pop('chance')))}}
