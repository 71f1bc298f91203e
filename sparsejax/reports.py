"""What was asked and what is there, parameter by parameter; and a check that fails when they differ."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import flows, states, trees
from sparsejax.patterns import NM
from sparsejax.types import Array, Axes, Pattern, Predicate, PyTree

_COMMON = tuple(NM(n, m) for n, m in ((1, 32), (1, 16), (1, 8), (1, 4), (2, 8), (2, 4), (4, 8)))


class Row(NamedTuple):
  """One parameter. `pattern` and `asked` are `None` where nothing was asked; `problem` is empty where all is well."""

  path: str
  shape: tuple[int, ...]
  pattern: Any
  axes: Axes
  asked: float | None
  achieved: float
  problem: str = ''


@dataclasses.dataclass(frozen=True)
class Report:
  """The rows of the sparse parameters (of all matrices, where nothing was asked). Prints as a table."""

  rows: tuple[Row, ...]
  notes: tuple[str, ...] = ()
  asked: float | None = None  # of all rows together; `None` if nothing was asked of some of them

  @property
  def violations(self) -> list[Row]:
    return [row for row in self.rows if row.problem]

  @property
  def sizes(self) -> list[int]:
    return [math.prod(row.shape) for row in self.rows]

  @property
  def achieved(self) -> float:
    """The sparsity of all rows together."""
    return sum(n * row.achieved for n, row in zip(self.sizes, self.rows)) / max(sum(self.sizes), 1)

  def __str__(self) -> str:
    head = ('parameter', 'shape', 'pattern', 'along', 'asked', 'achieved', '')
    total = ('together', '', '', '', _share(self.asked), _share(self.achieved), '')
    lines = [head, *(_cells(row) for row in self.rows), total]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return '\n'.join([text[0], '-' * len(text[0]), *text[1:], *self.notes])


def _cells(row: Row) -> tuple[str, ...]:
  along = f'{",".join(map(str, row.axes.contracted)) or "-"} ({row.axes.source})'
  shape = ' x '.join(map(str, row.shape))
  return (row.path, shape, str(row.pattern or '-'), along, _share(row.asked), _share(row.achieved), row.problem)


def _share(sparsity: float | None) -> str:
  return '-' if sparsity is None else f'{sparsity:.4f}'


def report(
    params: PyTree, opt_state: Any = None, *, pattern: Pattern | Mapping[str, Pattern] | None = None,
    where: Predicate | PyTree = trees.matrices, axes: Mapping[str, Axes] | None = None,
) -> Report:
  """Asked and achieved sparsity of each sparse parameter, its pattern checked along the contraction axis.

  With an optimizer state, what was asked is what the recipe in it asked. Without one, `pattern` (or one per glob) on
  the leaves of `where`, or nothing: then each row names the tightest common N:M that the parameter happens to keep.
  `along` says which axes were taken for the contraction, and whether they were traced or follow the naming conventions.
  Parameters with leading axes more than the state was made with (a `vmap`ped ensemble) are checked member by member.
  """
  if opt_state is not None:
    if (pattern, where, axes) != (None, trees.matrices, None):
      raise ValueError('report: what was asked is in the optimizer state; pass either it or pattern, where and axes.')
    return _of_state(params, opt_state)
  paths, leaves, _ = trees.flatten(params)
  picked = trees.select('report', where, params)
  arrays = {path: jnp.asarray(leaf) for path, leaf, pick in zip(paths, leaves, picked) if pick}
  asked = dict(zip(arrays, trees.per_leaf('report', 'pattern', pattern, list(arrays))))
  rows = []
  for path, w in arrays.items():
    at = trees.axes_of('report', axes, path, w.shape)
    own = asked[path]
    if own is None:
      rows.append(Row(path, w.shape, _tightest(w, at), at, None, _sparsity(w)))
      continue
    rows.append(Row(path, w.shape, own, at, own.sparsity, _sparsity(w), own.violation(w, at)))
  return Report(tuple(rows), asked=_overall([(row, row.asked) for row in rows]))


def check(
    params: PyTree, opt_state: Any = None, *, pattern: Pattern | Mapping[str, Pattern] | None = None,
    where: Predicate | PyTree = trees.matrices, axes: Mapping[str, Axes] | None = None,
) -> Report:
  """`report`, but raises `ValueError` naming every parameter that does not keep what was asked of it."""
  found = report(params, opt_state, pattern=pattern, where=where, axes=axes)
  if found.violations:
    lines = [f'\n  {row.path} {tuple(row.shape)}: {row.problem}' for row in found.violations]
    raise ValueError(f'check: {len(lines)} of {len(found.rows)} parameters do not keep their pattern:' + ''.join(lines))
  return found


def _of_state(params: PyTree, opt_state: Any) -> Report:
  paths, leaves, _ = trees.flatten(params)
  held = dict(zip(paths, leaves))
  found = states.find(opt_state)
  extra = jax.tree.leaves(found[0].step)[0].ndim  # the axes of a vmap around init and update
  project = states.project
  for _ in range(extra):
    project = jax.vmap(project)
  names, points, _ = trees.flatten(project(params, opt_state))
  point = dict(zip(names, points))
  rows, notes, asked = [], [], []
  for state, around in zip(found, states.surroundings(opt_state)):
    frozen, masks = state.plan.flow == flows.frozen(), states.by_path(state.masks)
    together = '' if frozen else _together(state, held, point)
    if frozen:
      notes.append('achieved: the fraction that is frozen at its first value, which is not zero')
    for leaf in state.plan.leaves:
      at = Axes(*(tuple(a + extra for a in group) for group in leaf.axes[:4]), leaf.axes.source)
      at = at._replace(layer=(*range(extra), *at.layer))
      if frozen:
        share = 1 - float(jnp.mean(masks[leaf.path], dtype=jnp.float32))
        rows.append(Row(leaf.path, held[leaf.path].shape, leaf.pattern, at, leaf.sparsity, share))
      else:
        row = _row_of(leaf, held[leaf.path], point[leaf.path], at, around)
        rows.append(row._replace(problem=row.problem or together))
      if not bool(jnp.all(jnp.any(masks[leaf.path], [a for a in range(masks[leaf.path].ndim) if a not in at.layer]))):
        notes.append(f'nothing is kept of {leaf.path}, or of a layer of it')
      row = rows[-1]
      asked.append((row, leaf.sparsity if state.plan.sparsity is None else state.plan.sparsity))
      if rows[-1].problem and not jnp.any(jax.tree.leaves(state.step)[0]):
        notes.append('no update was made yet: sparsejax.project(params, opt_state) is where training starts')
    if state.plan.sparsity is not None:
      notes.append(f'asked of all of them together: {state.plan.sparsity:.4f}')
  return Report(tuple(rows), tuple(dict.fromkeys(notes)), _overall(asked))


def _overall(asked: list[tuple[Row, float | None]]) -> float | None:
  if not asked or any(sparsity is None for _, sparsity in asked):
    return None
  sizes = [math.prod(row.shape) for row, _ in asked]
  return sum(n * sparsity for n, (_, sparsity) in zip(sizes, asked)) / sum(sizes)


def _together(state: states.SparseState, held: Mapping[str, Array], point: Mapping[str, Array]) -> str:
  """Why the leaves of a state are not as sparse as was asked of all of them together; empty if they are."""
  if state.plan.sparsity is None:
    return ''
  paths = [leaf.path for leaf in state.plan.leaves]
  size = sum(held[path].size for path in paths)
  zeros = lambda tree: sum(int(jnp.sum(tree[path] == 0, dtype=jnp.int32)) for path in paths)
  least = math.floor(state.plan.sparsity * size) - 2 * jax.tree.leaves(state.step)[0].size  # a quantile is interpolated
  if zeros(held) >= least:
    return ''
  yet = 'not there yet (dense phase or ramp): ' if zeros(point) < least else ''
  return f'{yet}{zeros(held) / size:.4f} of all of them together are zero, {state.plan.sparsity:.4f} asked'


def _row_of(leaf: states.SparseLeaf, w: Array, point: Array, axes: Axes, around: str) -> Row:
  revived = int(jnp.sum((point == 0) & (w != 0), dtype=jnp.int32))
  if revived:
    at = around and f', it is {around}'
    problem = (f'{revived} pruned weights are not zero: something after the recipe changes its updates (make it the '
               f'outermost transform on its leaves{at}), or these are not the parameters of this state (of an average '
               'of them: sparsejax.apply_masks)')
  else:
    problem = '' if leaf.sparsity is None else leaf.pattern.violation(w, axes, leaf.sparsity)
    if problem and bool(jnp.any(point != 0)) and leaf.pattern.violation(point, axes, leaf.sparsity):
      problem = f'not there yet (dense phase or decay): {problem}'
  return Row(leaf.path, w.shape, leaf.pattern, axes, leaf.sparsity, _sparsity(w), problem)


def _tightest(w: Array, axes: Axes) -> NM | None:
  """The sparsest of the common patterns that `w` keeps, for a parameter of which nothing was asked."""
  fits = (p for p in _COMMON if axes.contracted and not p.validate(w.shape, axes) and not p.violation(w, axes))
  return next(fits, None)


def _sparsity(w: Array) -> float:
  return float(jnp.mean(w == 0, dtype=jnp.float32)) if w.size else 0.0
