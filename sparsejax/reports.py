"""Reports the sparsity that was asked and the sparsity that is there, for each parameter, and checks that they agree.

    print(sj.report(params, opt_state))
    sj.check(params, opt_state)                  # raises `ValueError` if a parameter breaks its pattern
    sj.check(params, sj.NM(2, 4)).rows[0].achieved
    sj.check(params, opt_state, axes=sj.contractions(apply, params, x))  # and that the masks follow the program
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments, census, errors, globs, patterns, states, trees, types
from sparsejax.patterns import NM
from sparsejax.tables import Report, number
from sparsejax.types import Array, Axes, Pattern, Predicate, PyTree

__all__ = ['LeafReport', 'Report', 'check', 'report']

COMMON = tuple(NM(n, m) for n, m in ((1, 32), (1, 16), (1, 8), (1, 4), (2, 8), (2, 4), (4, 8)))


class LeafReport(NamedTuple):
  """A `LeafReport` is the row of one parameter. `problem` is empty where the parameter keeps what was asked.

  `pattern` and `asked` are `None` where nothing was asked.
  """

  path: str
  shape: tuple[int, ...]
  pattern: Pattern | None
  axes: Axes
  asked: float | None
  achieved: float
  problem: str = ''

  @property
  def cells(self) -> tuple[str, ...]:
    """The row as the texts of a table."""
    along = f'{",".join(map(str, self.axes.contracted)) or "-"} ({self.axes.source})'
    shape, pattern = ' x '.join(map(str, self.shape)), str(self.pattern or '-')
    return (self.path, shape, pattern, along, number(self.asked), number(self.achieved), self.problem)


types.moved(__name__, {'Row': (LeafReport, 'reports.LeafReport')})


@arguments.checked
def report(params: PyTree, opt_state: Any = None, *, pattern: Pattern | Mapping[str, Pattern] | None = None,
           where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None) -> Report:
  """Reports asked and achieved sparsity of each sparse parameter, its pattern checked along the contraction axis.

  The second argument is an optimizer state or a pattern; `pattern` is another name for the latter. With a state, the
  recipe in the state says what was asked, and along which axes. `axes=sparsejax.contractions(...)` are compared with
  those, and each difference is a problem of the parameter. Without a state, `pattern` (or one pattern per
  glob) is asked of the leaves of `where`, along `axes` or else by the conventions; the default `where` is that of
  recipes. Without `pattern`, each row names the tightest common N:M that the parameter happens to keep.

  `along` says which axes were taken for the contraction, and whether they were traced, given or follow a convention. A
  note lists the parameters that may as well be lookup tables, for all that their names say. Parameters with more
  leading axes than the state was made with (a `vmap`ped ensemble) are checked member by member.
  """
  if _is_pattern(opt_state):
    if pattern is not None:
      raise ValueError(f'report: two patterns were asked, {opt_state} and {pattern}; pass one.')
    opt_state, pattern = None, opt_state
  if opt_state is not None:
    if (pattern, where) != (None, None):
      raise ValueError('report: what was asked is in the optimizer state; pass either it or pattern and where.')
    return with_note(params, _of_state(params, opt_state, axes))
  paths, leaves, _ = trees.flatten(params)
  picked = trees.select('report', trees.default_where(axes) if where is None else where, params)
  held = {path: leaf for path, leaf, pick in zip(paths, leaves, picked) if pick}
  arguments.refuse_unknown('report', held)
  arrays = {path: jnp.asarray(leaf) for path, leaf in held.items()}
  asked = trees.per_leaf('report', 'pattern', patterns.parse(pattern) if pattern else None, list(arrays))
  known = trees.axes_by_path('report', axes, params, arrays)
  rows = tuple(row_of_pattern(path, w, own, known[path]) for (path, w), own in zip(arrays.items(), asked))
  return with_note(params, Report(rows, asked=overall(rows, [row.asked for row in rows])))


def _is_pattern(asked: Any) -> bool:
  """Returns whether `asked` is a pattern, the text of one, or a dict of patterns, and no optimizer state."""
  parts = list(asked.values()) if isinstance(asked, Mapping) else [asked]
  return bool(parts) and all(isinstance(part, str) or hasattr(part, 'validate') for part in parts)


def with_note(params: PyTree, made: Report) -> Report:
  """Returns the report with a note on its rows that may be lookup tables instead of matrices."""
  conventional = {row.path for row in made.rows if row.axes.source == 'convention'}
  tables = [path for path in trees.undecided(params) if path in conventional]
  note = (f'matrices by their rank alone, which may be lookup tables: {errors.some(tables)}. Trace the program, '
          'axes=sparsejax.contractions(apply, params, x), or leave the tables out of `where`')
  return dataclasses.replace(made, notes=(*made.notes, note)) if tables else made


def row_of_pattern(path: str, w: Array, pattern: Pattern | None, axes: Axes) -> LeafReport:
  """Returns the row of a parameter of which `pattern` is asked; without it, the row names the tightest common N:M."""
  if pattern is None:
    possible = [each for each in COMMON if axes.contracted and not each.validate(w.shape, axes)]
    nonzeros, most = census.taken(w, axes, tuple({each.m for each in possible}))
    tightest = next((each for each in possible if most[each.m] <= each.n), None)
    return LeafReport(path, w.shape, tightest, axes, None, 1 - nonzeros / w.size if w.size else 0.0)
  return LeafReport(path, w.shape, pattern, axes, pattern.sparsity, _sparsity(w), pattern.violation(w, axes))


@arguments.checked
def check(params: PyTree, opt_state: Any = None, *, pattern: Pattern | Mapping[str, Pattern] | None = None,
          where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None) -> Report:
  """Returns the `report`. Raises `ValueError` that names every parameter that does not keep what was asked of it.

  `check(params, opt_state, axes=sparsejax.contractions(...))` also raises where the program contracts other axes than
  those that the masks were made along.
  """
  made = report(params, opt_state, pattern=pattern, where=where, axes=axes)
  if made.violations:
    lines = [f'\n  {row.path} {tuple(row.shape)}: {row.problem}' for row in made.violations]
    raise ValueError(f'check: {len(lines)} of {len(made.rows)} parameters do not keep their pattern:' + ''.join(lines))
  return made


def _of_state(params: PyTree, opt_state: Any, axes: Mapping[str, Axes] | None) -> Report:
  sparse, held = states.find(opt_state), states.by_path(params)
  for tree in (held, *(states.by_path(state.masks) for state in sparse)):
    arguments.refuse_unknown('report', {leaf.path: tree[leaf.path] for state in sparse for leaf in state.plan.leaves
                                        if leaf.path in tree})
  extra = jax.tree.leaves(sparse[0].step)[0].ndim  # the axes of a vmap around init and update
  project = states.project
  for _ in range(extra):
    project = jax.vmap(project)
  points = states.by_path(project(params, opt_state))
  rows, notes = [], []
  for state, around in zip(sparse, states.surroundings(opt_state)):
    added = _rows_of_state(state, held, points, around, extra)
    added = [row if axes is None else _compared(row, leaf.axes, axes) for row, leaf in zip(added, state.plan.leaves)]
    rows += added
    notes += _notes(state, added)
  asked = [leaf.asked.sparsity for state in sparse for leaf in state.plan.leaves]
  return Report(tuple(rows), tuple(dict.fromkeys(notes)), overall(rows, asked))


def _rows_of_state(state: states.SparseState, held: Mapping[str, Array], points: Mapping[str, Array], around: str,
                   extra: int) -> list[LeafReport]:
  """Returns the rows of one state. `held` are the user's parameters, `points` the sparse point of the state."""
  rows, masks, frozen = [], states.by_path(state.masks), _frozen(state)
  together = '' if frozen else _together(state, held, points)
  for leaf in state.plan.leaves:
    w, axes = held[leaf.path], _batched(leaf.axes, extra)
    if frozen:
      achieved, problem = 1 - float(jnp.mean(masks[leaf.path], dtype=jnp.float32)), ''
    else:
      point = points[leaf.path]
      achieved, problem = _sparsity(w), _revived(w, point, around) or _broken(leaf, w, point, axes) or together
    rows.append(LeafReport(leaf.path, w.shape, leaf.pattern, axes, leaf.sparsity, achieved, problem))
  return rows


def _compared(row: LeafReport, made: Axes, axes: Mapping[str, Axes]) -> LeafReport:
  """Returns the row with a problem if its masks were made along other axes than those in `axes`, a traced program's.

  `made`: the axes that the recipe took. Where they are unknown, no axis entered the mask and nothing is compared. Axes
  of length one do not count.
  """
  shape = row.shape[len(row.shape) - sum(map(len, made[:4])):]
  try:
    problem = '' if made.source == 'unknown' else _difference(made, axes, row.path, shape)
  except ValueError as refusal:
    problem = f'its axes cannot be compared: {refusal}'
  return row._replace(problem='; '.join(filter(None, (row.problem, problem))))


def _difference(made: Axes, axes: Mapping[str, Axes], path: str, shape: tuple[int, ...]) -> str:
  """Returns how the axes of one leaf differ from those in `axes`, or an empty string."""
  if not trees.names_in(axes, path):
    elsewhere = getattr(axes, 'elsewhere', {})
    places = [elsewhere[name] for name in globs.tails(path, elsewhere)]
    return trees.is_traced(axes) and ('the program contracts it nowhere' + ''.join(f' ({place})' for place in places) +
                                      '; leave it out of `where`') or ''
  found = trees.axes_of('check', axes, path, shape)
  wide, other = ([tuple(a for a in group if shape[a] != 1) for group in each[:4]] for each in (made, found))
  named = lambda each: ', '.join(f'{name} {group}' for name, group in zip(Axes._fields, each[:4]) if group)
  return '' if wide == other else (
      f'its masks were made along {named(made)} ({made.source}), and the program has {named(found)} ({found.source}); '
      'make the optimizer and its state with axes=sparsejax.contractions(...)')


def _notes(state: states.SparseState, rows: Sequence[LeafReport]) -> list[str]:
  """Returns what a reader of the rows of one state should know besides."""
  notes, masks = [], states.by_path(state.masks)
  if _frozen(state):
    notes.append('achieved: the fraction that is frozen at its first value, which is not zero')
  for row in rows:
    mask = masks[row.path]
    if not bool(jnp.all(jnp.any(mask, [a for a in range(mask.ndim) if a not in row.axes.layer]))):
      notes.append(f'nothing is kept of {row.path}, or of a layer of it')
    if row.problem and not jnp.any(jax.tree.leaves(state.step)[0]):
      notes.append('no update was made yet: sparsejax.project(params, opt_state) is where training starts')
  if state.plan.sparsity is not None:
    notes.append(f'asked of all of them together: {state.plan.sparsity:.4f}')
  return notes


def _frozen(state: states.SparseState) -> bool:
  return state.plan.flow is not None and state.plan.flow.frozen


def _batched(axes: Axes, extra: int) -> Axes:
  """Returns the axes of a leaf with `extra` more axes in front, which are layers."""
  shifted = Axes(*(tuple(a + extra for a in group) for group in axes[:4]), axes.source)
  return shifted._replace(layer=(*range(extra), *shifted.layer))


def overall(rows: Sequence[LeafReport], asked: Sequence[float | None]) -> float | None:
  """Returns the sparsity asked of all rows together, or `None` if nothing was asked of some of them."""
  if not rows or any(sparsity is None for sparsity in asked):
    return None
  sizes = [math.prod(row.shape) for row in rows]
  return sum(n * sparsity for n, sparsity in zip(sizes, asked)) / sum(sizes)


def _together(state: states.SparseState, held: Mapping[str, Array], point: Mapping[str, Array]) -> str:
  """Returns why the leaves of a state are less sparse than was asked of all of them together, or an empty string."""
  if state.plan.sparsity is None:
    return ''
  paths = [leaf.path for leaf in state.plan.leaves if leaf.asked.together]
  size = sum(held[path].size for path in paths)
  zeros = lambda tree: sum(int(jnp.sum(tree[path] == 0, dtype=jnp.int32)) for path in paths)
  least = math.floor(state.plan.sparsity * size) - 2 * jax.tree.leaves(state.step)[0].size  # a quantile is interpolated
  if zeros(held) >= least:
    return ''
  yet = 'not there yet (dense phase or ramp): ' if zeros(point) < least else ''
  return f'{yet}{zeros(held) / size:.4f} of all of them together are zero, {state.plan.sparsity:.4f} asked'


def _revived(w: Array, point: Array, around: str) -> str:
  """Returns how many pruned weights are not zero, and the likely cause, or an empty string."""
  revived = int(_count_revived(w, point))
  place = around and f', it is {around}'
  return revived and (
      f'{revived} pruned weights are not zero: something after the recipe changes its updates (make it the '
      f'outermost transform on its leaves{place}), or these are not the parameters of this state (of an average '
      'of them: sparsejax.apply_masks)') or ''


@jax.jit
def _count_revived(w: Array, point: Array) -> Array:
  return jnp.sum((point == 0) & (w != 0), dtype=jnp.int32)


def _broken(leaf: states.SparseLeaf, w: Array, point: Array, axes: Axes) -> str:
  """Returns how a leaf breaks its pattern, or an empty string."""
  if leaf.pattern is None or leaf.sparsity is None:
    return ''
  problem = leaf.pattern.violation(w, axes, leaf.sparsity)
  if problem and bool(jnp.any(point != 0)) and leaf.pattern.violation(point, axes, leaf.sparsity):
    return f'not there yet (dense phase or decay): {problem}'
  return problem


def _sparsity(w: Array) -> float:
  return 1 - census.taken(w, Axes((), ()))[0] / w.size if w.size else 0.0
