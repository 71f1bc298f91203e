"""Says what a model costs as a function of the sizes of its groups, before any unit is cut.

    cost = multiply_adds(found)
    cost({'up/kernel:1': 128})        # with 128 units left in this group and the others whole
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsejax import errors
from sparsejax.arguments import checked
from sparsejax.programs.contractions import read
from sparsejax.programs.tracing import trace
from sparsejax.structured.groups import Groups


@checked
def multiply_adds(groups: Groups) -> Callable[[Mapping[str, Any]], Any]:
  """Returns the function from sizes of groups to the multiply-adds of one call, in contractions of parameters.

  The count of a parameter is a product of the lengths of its axes. A length is linear in the size of each group with
  positions on the axis. Sizes may be traced, and groups without a size are whole. Contractions of no parameter, such as
  attention scores, do not shrink, and are left out. The function raises `ValueError` for a name that is no group.
  """
  macs = dict(read(trace(groups.apply, (groups.shapes, *groups.inputs))).macs)
  axes: dict[str, dict[int, list[tuple[str, float]]]] = {}
  for name, group in groups.items():
    for member in group.members:
      if member.path in macs:
        share = sum(int(np.count_nonzero(own >= 0)) for own in member.labels) / member.shape[member.axis]
        axes.setdefault(member.path, {}).setdefault(member.axis, []).append((name, share))
  return lambda sizes: _cost(groups, macs, axes, sizes)


def _cost(groups: Groups, macs: Mapping[str, int], axes: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
  for name in sizes:
    if name not in groups:
      raise errors.unknown('structured.multiply_adds', 'group', name, groups)
  gone = {name: 1 - size / groups[name].size for name, size in sizes.items()}
  total = 0.0
  for path, count in macs.items():
    left = float(count)
    for parts in axes.get(path, {}).values():
      left = left * (1 - sum(share * gone.get(name, 0.0) for name, share in parts))
    total = total + left
  return total
