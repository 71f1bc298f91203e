"""Refuses batches for which a function runs other products than for the first batch."""

from collections.abc import Mapping

from sparsejax import errors
from sparsejax.post_training.targets import Target
from sparsejax.programs.calls import Calls
from sparsejax.programs.contractions import read


def refuse_other_programs(calls: Calls, targets: Mapping[str, Target]) -> None:
  """Raises `ValueError` for a batch for which the function runs other products than for the first batch."""
  uses = {path: [(use.address, use.operand) for use in target.uses.values()] for path, target in targets.items()}
  for i, program in enumerate(calls.programs):
    if program is calls.programs[0] or program in calls.programs[:i]:
      continue
    found = read(program).uses
    other = [path for path, places in uses.items()
             if places != [(use.address, use.operand) for use in found.get(path, ()) if use.data]]
    if other:
      raise ValueError(f'prune: batch {i} runs other operations than batch 0, at the products with '
                       f'{errors.some(other)}: the function branches in Python on the shape or on an option. Prune '
                       'with batches of one kind.')
