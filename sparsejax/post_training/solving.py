"""Prunes one unit by a recipe, with everything that may be wrong about its statistic, and writes its row of the report.

A unit becomes a `Stack`, the recipe chooses and repairs, and the stack becomes the unit again. Kept weights that no
repair has changed keep every bit.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import calibration, errors
from sparsejax.post_training.lockstep import Solved, Unit
from sparsejax.post_training.recipe import Chooser, Recipe, Stack, stack_of
from sparsejax.post_training.results import StackReport
from sparsejax.post_training.targets import Target, names_of
from sparsejax.types import Array

UNSEEN = ('refuse', 'magnitude', 'dense')

_stacked = jax.jit(stack_of)


@dataclasses.dataclass
class Solver:
  """A `Solver` prunes units by a recipe and keeps the rows of the report.

  `unseen` decides about a matrix without a row of data. `chosen`: masks that were chosen before, by path, or empty.
  `done(unit, solved, row)` is called after each unit.
  """

  recipe: Recipe
  targets: Mapping[str, Target]
  unseen: str
  chosen: Mapping[str, Array]
  done: Callable[[Unit, Solved, StackReport], None]
  rows: dict[Unit, StackReport] = dataclasses.field(default_factory=dict)

  def __call__(self, unit: Unit, statistic: Any) -> Solved:
    """Returns the unit pruned; `statistic` is `None` for a unit that no batch reached."""
    began, target = time.perf_counter(), self.targets[unit[0]]
    own = next(iter(target.arrangements.values()))
    part = target.at(target.array, unit[1])
    empty = np.ones(own.shape[0], bool) if statistic is None else np.asarray(statistic.rows) == 0
    self._refuse_unseen(target, unit, empty)
    stack = _stacked(own.stack(part), own.stack(target.at(target.kept, unit[1])))
    statistic = _alike(statistic, stack.dense.dtype)
    choose = Chooser(target.pattern, target.leaf.sparsity, own.groups)
    started = self._chosen(target, unit, stack, choose, statistic, empty)
    made = started if empty.all() else _merged(empty, started, self.recipe.repaired(started, choose, statistic))
    _refuse_failed(target, unit, made)
    solved, row = self._finished(target, unit, part, (stack, started, made), statistic)
    row = row._replace(seconds=time.perf_counter() - began, note=self._note(empty))
    self.rows[unit] = row
    self.done(unit, solved, row)
    return solved

  def _refuse_unseen(self, target: Target, unit: Unit, empty: np.ndarray) -> None:
    if not empty.any() or self.unseen != 'refuse':
      return
    matrix = int(empty.argmax()) if empty.size > 1 else None
    raise errors.at_leaf('prune', names_of(target, unit[1], matrix), target.array.shape,
                         'no row of the calibration data reached it (0 rows). Give data that reach it, or pass '
                         "unseen='magnitude' to prune such matrices by magnitude, or unseen='dense' to leave them.")

  def _note(self, empty: np.ndarray) -> str:
    which = ', '.join(map(str, np.flatnonzero(empty))) if empty.size > 1 else ''
    how = {'magnitude': 'pruned by magnitude', 'dense': 'left dense'}.get(self.unseen, '')
    return f'no rows{f" for matrices {which}" * bool(which)}: {how}' if empty.any() else ''

  def _chosen(self, target: Target, unit: Unit, stack: Stack, choose: Chooser, statistic: Any, empty: np.ndarray
              ) -> Stack:
    """Returns the stack with its first mask; matrices without rows have what `unseen` says."""
    if unit[0] in self.chosen:
      own = next(iter(target.arrangements.values()))
      return stack.kept(own.stack(target.at(self.chosen[unit[0]], unit[1])) & stack.mask)
    made = stack if empty.all() else self.recipe.chosen(stack, choose, statistic)
    if not empty.any():
      return made
    other = stack if self.unseen == 'dense' else stack.kept(choose(jnp.abs(stack.dense), stack.mask))
    return _merged(empty, other, made)

  def _finished(self, target: Target, unit: Unit, part: Array, stacks: tuple[Stack, Stack, Stack], statistic: Any
                ) -> tuple[Solved, StackReport]:
    own, (stack, started, made) = next(iter(target.arrangements.values())), stacks
    back = lambda array: own.part(array, part.shape)
    mask, w = back(made.mask), back(made.w)
    changed = bool(_moved(made))
    weights = jnp.where(w == part.astype(w.dtype), part, w.astype(part.dtype)) if changed else part
    if made.factors is None:
      weights = jnp.where(mask, weights, jnp.zeros((), part.dtype))
      made = _as_stored(target, unit, weights, made) if changed and w.dtype != part.dtype else made
    else:
      _refuse_inner_layers(target)
    first = started if self.recipe.score is not None else stack.kept(made.mask)
    repaired = changed or bool(jnp.any(first.mask != made.mask))
    before, after = _errors(statistic, stack, first, made)
    solved = Solved(weights, mask, back(first.w).astype(part.dtype) if repaired else None, after is None, made.factors)
    dead = 0 if statistic is None else int(jnp.sum(statistic.square == 0))
    rows = [0] if statistic is None else np.asarray(statistic.rows).tolist()
    return solved, StackReport(
        unit[0], unit[1], tuple(own.shape), target.pattern, target.leaf.sparsity, 1 - float(jnp.mean(made.mask)),
        min(rows), before, after, float(jnp.max(made.damping)), int(jnp.max(made.raised)), dead,
        each=tuple(rows) if len(rows) > 1 else ())

  def measured(self, solved: Mapping[Unit, Solved]) -> None:
    """Completes the rows by the errors that were measured on the products."""
    for unit, each in solved.items():
      total, before, after = map(float, each.errors)
      if each.measured and total > 0:
        self.rows[unit] = self.rows[unit]._replace(before=before / total, after=after / total)


def _alike(statistic: Any, dtype: Any) -> Any:
  """Returns the statistic with its sums in the dtype of the weights, which decides how the unit is solved."""
  return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, statistic)


def _merged(which: np.ndarray, a: Stack, b: Stack) -> Stack:
  """Returns the matrices of `a` where `which`, and those of `b` elsewhere."""
  if not which.any():
    return b
  pick = lambda x, y: jnp.where(jnp.asarray(which).reshape(-1, *[1] * (x.ndim - 1)), x, y)
  return jax.tree.map(pick, a, b)


def _refuse_failed(target: Target, unit: Unit, made: Stack) -> None:
  """Raises `ValueError` if a factor failed at every damping, or if a repair did not keep to the mask."""
  failed = np.isnan(np.asarray(made.damping))
  matrix = int(failed.argmax()) if failed.size > 1 else None
  if failed.any():
    raise errors.at_leaf('prune', names_of(target, unit[1], matrix), target.array.shape,
                         'the Gram matrix of its inputs has no Cholesky factor, at any damping up to 1. Give more '
                         'data, look for inputs of very different scales, or take a recipe without a Gram matrix.')
  if not bool(_sound(made)):
    raise errors.at_leaf('prune', names_of(target, unit[1]), target.array.shape,
                         'a repair returned weights outside of its mask, or NaN. Leave the repair out.')


def _as_stored(target: Target, unit: Unit, weights: Array, made: Stack) -> Stack:
  """Returns the stack with the weights in the dtype of the parameter; raises `ValueError` for one that is too large."""
  stored = calibration.wide(next(iter(target.arrangements.values())).stack(weights))
  if not bool(jnp.all(jnp.isfinite(stored))):
    raise errors.at_leaf('prune', names_of(target, unit[1]), target.array.shape,
                         f'a repaired weight is too large for {weights.dtype}. Store the parameter in a wider dtype, '
                         'raise the damping, or take a recipe that repairs no weight (wanda).')
  return made._replace(w=stored)


@jax.jit
def _moved(made: Stack) -> Array:
  """Returns whether a repair moved any weight."""
  return jnp.any(made.w != jnp.where(made.mask, made.dense, 0))


@jax.jit
def _sound(made: Stack) -> Array:
  """Returns whether all weights are finite, and zero outside of the mask unless they are written as factors."""
  kept = made.mask if made.factors is None else True
  return jnp.all(jnp.isfinite(made.w) & ((made.w == 0) | kept))


def _refuse_inner_layers(target: Target) -> None:
  """Raises `ValueError` unless the layers of a parameter are its first axes, so that a packed leaf can hold factors."""
  axes = target.leaf.axes
  if tuple(sorted(axes.layer)) != tuple(range(len(axes.layer))) or axes.spatial or any(
      target.array.shape[a] > 1 for a in axes.spatial):
    raise errors.at_leaf('prune', target.path, target.array.shape, f'factors are stored for matrices, and for stacks '
                         f'whose layers come first, and its axes are {axes[:4]}. Leave it out of `where`.')


def _errors(statistic: Any, stack: Stack, first: Stack, made: Stack) -> tuple[float | None, float | None]:
  """Returns the relative squared errors before and after repair from a Gram matrix; `None` without one."""
  gram = getattr(statistic, 'gram', None)
  if gram is None:
    return None, None
  total, before, after = (float(_energy(w, gram)) for w in (stack.dense, stack.dense - first.w, stack.dense - made.w))
  return (before / total, after / total) if total > 0 else (0.0, 0.0)


@jax.jit
def _energy(w: Array, gram: Array) -> Array:
  """Returns the sum over matrices of the squares of the outputs, `tr(w G w^T)`."""
  return jnp.sum(jnp.matmul(w, gram, precision=lax.Precision.HIGHEST) * w)
