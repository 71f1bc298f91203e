"""Says what a model costs as a function of the sizes of its groups, before any unit is cut.

    cost = multiply_adds(found)
    cost({'up/kernel:1': 128})        # with 128 units left in this group and the others whole
    grouped(found, budget=flops(0.5))         # as many units as half of the multiply-adds allow
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, progress, trees
from sparsejax.arguments import checked
from sparsejax.programs.contractions import read
from sparsejax.programs.tracing import trace
from sparsejax.structured.groups import Groups
from sparsejax.structured.removal import cut
from sparsejax.types import PyTree

Cost = Callable[[Mapping[str, Any]], Any]  # from the sizes of groups to a number; groups without a size are whole


class Allowance(NamedTuple):
  """An `Allowance` is the fraction of the whole model's cost that is left, and how the cost is made from `Groups`."""

  fraction: float
  cost: Callable[[Groups], Cost]


@checked
def flops(fraction: float) -> Allowance:
  """Returns the allowance of a fraction of the multiply-adds, as `multiply_adds` counts them."""
  return Allowance(fraction, multiply_adds)


@checked
def parameters(fraction: float) -> Allowance:
  """Returns the allowance of a fraction of all parameters, as `weights` counts them."""
  return Allowance(fraction, weights)


@checked
def latency(fraction: float, cost: Cost) -> Allowance:
  """Returns the allowance of a fraction of `cost({})`, such as `structured.seconds(groups, params, x)` measures it.

  `cost` may be any function of the sizes that JAX can trace.
  """
  return Allowance(fraction, lambda groups: cost)


@checked
def multiply_adds(groups: Groups) -> Cost:
  """Returns the function from sizes of groups to the multiply-adds of one call, in contractions of parameters.

  The count of a parameter is a product of the lengths of its axes. A length is linear in the size of each group with
  positions on the axis. Sizes may be traced, and groups without a size are whole. Contractions of no parameter, such as
  attention scores, do not shrink, and are left out. The function raises `ValueError` for a name that is no group.
  """
  macs = dict(read(trace(groups.apply, (groups.shapes, *groups.inputs))).macs)
  return lambda sizes: _cost('multiply_adds', groups, macs, _axes(groups), sizes)


@checked
def weights(groups: Groups) -> Cost:
  """Returns the function from sizes of groups to the number of parameters. Groups without a size are whole."""
  paths, leaves, _ = trees.flatten(groups.shapes)
  count = {path: math.prod(leaf.shape) for path, leaf in zip(paths, leaves) if hasattr(leaf, 'shape')}
  return lambda sizes: _cost('weights', groups, count, _axes(groups), sizes)


def _axes(groups: Groups) -> dict[str, dict[int, list[tuple[str, float]]]]:
  """Maps each parameter to its axes, and each axis to its groups with the share of the axis that they have."""
  axes: dict[str, dict[int, list[tuple[str, float]]]] = {}
  for name, group in groups.items():
    for member in group.members:
      share = sum(int(np.count_nonzero(own >= 0)) for own in member.labels) / member.shape[member.axis]
      axes.setdefault(member.path, {}).setdefault(member.axis, []).append((name, share))
  return axes


def _cost(function: str, groups: Groups, counts: Mapping[str, int], axes: Mapping[str, Any], sizes: Mapping[str, Any]
          ) -> Any:
  for name in sizes:
    if name not in groups:
      raise errors.unknown(f'structured.{function}', 'group', name, groups)
  gone = {name: 1 - size / groups[name].size for name, size in sizes.items()}
  total = 0.0
  for path, count in counts.items():
    left = float(count)
    for parts in axes.get(path, {}).values():
      left = left * (1 - sum(share * gone.get(name, 0.0) for name, share in parts))
    total = total + left
  return total


@checked
def seconds(groups: Groups, params: PyTree, *inputs: Any, points: int = 3, rounds: int = 10) -> Cost:
  """Returns the measured time of one call as a function of the sizes of groups, for this device and these inputs.

  Each group is cut to `points` sizes, evenly spaced down to one unit, with all other groups whole. The model and its
  cuts run compiled, in turn, `rounds` times. Medians count, and are made to rise with the units. Between the points the
  time is a straight line. The savings of several groups multiply, as those of both axes of a matrix do. Compiles
  `points` programs a group.
  """
  whole = jax.jit(groups.apply)
  runs: dict[Any, Callable[[], Any]] = {'whole': functools.partial(whole, params, *inputs)}
  knots = {name: np.unique(np.linspace(1, group.size, points + 1).astype(int)) for name, group in groups.items()}
  for name, sizes in knots.items():
    for size in sizes[:-1]:
      small = cut(groups, params, {name: np.arange(groups[name].size) < size})
      run = jax.jit(small.apply)
      runs[name, int(size)] = functools.partial(run, small.params, *inputs)
  medians = _medians(runs, rounds)
  lines = {name: _rising([medians[name, int(size)] / medians['whole'] for size in sizes[:-1]])
           for name, sizes in knots.items()}
  return lambda sizes: medians['whole'] * math.prod(_between(knots, lines, name, size) for name, size in sizes.items())


def _rising(parts: list[float]) -> np.ndarray:
  """Returns the measured parts of the whole, made to rise to 1: a fall is noise."""
  return np.minimum(np.maximum.accumulate([*parts, 1.0]), 1.0)


def _between(knots: Mapping[str, Any], lines: Mapping[str, Any], name: str, size: Any) -> Any:
  """Returns the time with `size` units of a group, over the time of the whole."""
  if name not in knots:
    raise errors.unknown('structured.seconds', 'measured group', name, knots)
  return jnp.interp(jnp.asarray(size, jnp.float32), knots[name], lines[name])


def _medians(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
  """Returns the median seconds of each function; all are called in turn, after a first call that compiles."""
  for _, run in progress.counted('compile', list(runs.items()), lambda pair: str(pair[0])):
    jax.block_until_ready(run())
  taken: dict[Any, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      taken[name].append(time.perf_counter() - start)
  return {name: float(np.median(each)) for name, each in taken.items()}
