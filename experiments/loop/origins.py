"""Compares the config of a run with the config under which the run was trained, which its files record.

    finished = is_finished(directory, configs.of_run(config, 'SR-STE'), config.steps, meant=False)
    history = continued(directory, step, meta, wanted, total, meant=True)    # what the next checkpoint records

A checkpoint and an outcome record `config`, the result of `configs.of_run`, and `changes`. `changes` has one entry for
each time that the run went on with another config: `{'step': 6, 'changes': ['optimizer.learning_rate: 0.01 -> 0.5']}`.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import configs
from experiments.loop import checkpoints, outcomes
from sparsejax import plans, states

SHOWN = 6  # changes that a message names

History = Sequence[Mapping[str, Any]]  # the `changes` of a record


def is_finished(directory: pathlib.Path, wanted: Mapping[str, Any], total: int, meant: bool) -> bool:
  """Returns whether the run in `directory` has an outcome under the config `wanted`, of `total` steps.

  Raises `ValueError` for a finished or an unfinished run of another config, see `continued`.
  """
  outcome = outcomes.read(directory)
  step, record = (outcome['steps'], outcome) if outcome else checkpoints.newest(directory / 'checkpoints')
  if record is None:
    return False
  history = continued(directory, step, record, wanted, total, meant)
  return outcome is not None and history == record.get('changes', [])


def continued(directory: pathlib.Path, step: int, record: Mapping[str, Any], wanted: Mapping[str, Any], total: int,
              meant: bool) -> History:
  """Returns the history of the run in `directory` that goes on from `step` under the config `wanted`.

  `record` is what the outcome or the checkpoint of `step` holds. If its config is `wanted`, its history is returned. A
  change of the config is appended where it is `meant`, where steps are left of `total`, and where the seeds are equal.
  Any other change raises `ValueError` with the keys, their values before and after, and the remedy.
  """
  old, history = record.get('config'), record.get('changes', [])
  changes = ['the old config was not recorded'] if old is None else configs.differences(old, wanted)
  if not changes:
    return history
  # The rounds of `experiments.tickets` are built on each other, so no round can change alone.
  possible = step < total and record.get('seeds') == wanted['seeds'] and wanted['tickets'] is None
  if meant and possible:
    return [*history, {'step': step, 'changes': changes}]
  more = f'; and {len(changes) - SHOWN} more' if len(changes) > SHOWN else ''
  remedy = ', undo the change, or go on from there by --set resume_changed=True' if possible else ', or undo the change'
  raise ValueError(f'train: {directory} holds step {step} of another config ({"; ".join(changes[:SHOWN])}{more}). '
                   f'Give another --workdir{remedy}.')


def refuse_other_recipe(state: checkpoints.State) -> None:
  """Raises `ValueError` naming both if `state`, read from a checkpoint, was made by another recipe or pattern."""
  for sparse in states.find(state.opt_state):
    plans.refuse_unless_of(sparse.plan, sparse.plan.identity)


def told(name: str, history: History) -> list[str]:
  """Returns a sentence for each time that the run `name` went on with another config."""
  return [f'{name}: went on from step {change["step"]} with another config: {"; ".join(change["changes"])}.'
          for change in history]
