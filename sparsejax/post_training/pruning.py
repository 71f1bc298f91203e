"""Prunes a trained model in one call: any JAX function, its parameters, a few batches, and a recipe.

    recipe = Recipe(sj.Unstructured(0.5), score=scores.wanda, statistic=calibration.moments)
    result = prune(model.apply, variables, batches, recipe)
    result.params, result.masks, print(result.report)
    prune_weights(params, sj.NM(2, 4))                     # by magnitude, without data
"""

import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import allocation as allocations
from sparsejax import arguments, calibration, errors, formats, patterns, scores, selections, trees
from sparsejax.plans import SparseLeaf
from sparsejax.post_training import memory
from sparsejax.post_training.cohorts import Sequential, cohorts_of
from sparsejax.post_training.finished import Finished, fingerprint_of
from sparsejax.post_training.lockstep import Lockstep, Solved, Unit
from sparsejax.post_training.recipe import Recipe
from sparsejax.post_training.results import Pruned, StackReport, report_of
from sparsejax.post_training.solving import UNSEEN, Solver
from sparsejax.post_training.targets import Target, targets, words_of
from sparsejax.programs.calls import BatchWalk, Calls, calls_of, validity
from sparsejax.programs.operands import walk
from sparsejax.progress import replaced
from sparsejax.tables import Report
from sparsejax.types import Array, Axes, Pattern, Predicate, PyTree, Signals


@arguments.checked
def prune(apply: Callable[..., Any], params: PyTree, batches: Iterable[Any], recipe: Recipe, *,
          where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None, keep: Any = None,
          sequential: Sequential = 'weight', valid: Iterable[Array] | None = None, unseen: str = 'refuse',
          memory_limit: int | None = None, workdir: str | None = None,
          progress: Callable[[str], None] | None = None) -> Pruned:
  """Prunes the matrices of a trained model by a recipe that looks at what the matrices are given on a few batches.

  `apply(params, *inputs)`: any JAX function whose first argument holds the parameters. `batches`: a sequence or an
  iterator. A tuple in it is positional arguments, a dict is keyword arguments, anything else is one argument. Batches
  may have different shapes. `params` and the batches are never changed, and may be sharded.

  The program runs operation by operation, and all batches go in lock-step. Products are seen through `jit`, `scan`,
  `remat`, `cond`, `while` and custom derivatives. Each layer of a scan is a matrix of its own, and so is each expert of
  a batched or ragged product. A weight that is used several times is pruned once, on the rows of all its uses.

  `where` picks the parameters to prune. By default, these are all that the program contracts, without those of which it
  also looks up rows, and without the head. The head is the parameter of the last product, unless the result goes into
  another product or is added to a residual stream. The report lists the others.
  `axes` are compared with those of the program, which decide.
  `keep` says where weights are pruned already, and stay zero. By default, and with 'zeros', this is every zero. A tree
  of masks says it by `False`. With `keep=False`, zeros are ordinary weights.
  `sequential`: 'weight' measures each matrix with all earlier matrices pruned. 'dense' measures all matrices with dense
  weights. A function `path -> key` measures the paths with one key together, such as those of a block.
  `valid` has one `bool` array a batch, whose shape begins the shapes of the inputs (`[batch, position]`). Rows that
  come from invalid positions do not count. `unseen` decides about a matrix that no row reached: 'refuse', 'magnitude'
  (prunes it by magnitude) or 'dense' (leaves it).
  `memory_limit`: bytes, by default the free memory. The need is estimated first. `workdir` is a folder that keeps each
  finished matrix, so that a call that was killed goes on. `progress(text)` is called first, and after each matrix.
  The default is the hook of `sj.progress.listening`.

  Raises `ValueError` for data that say nothing or are not finite, and for products that take other values than those of
  a parameter. Pattern, recipe and repairs may refuse a matrix, too. All messages name the path.
  """
  began = time.perf_counter()
  _check(recipe, unseen)
  for name, value in (('apply', apply), ('memory_limit', memory_limit), ('workdir', workdir), ('progress', progress)):
    arguments.verified('prune', name, value, None)
  calls = calls_of('prune', apply, params, batches, valid)
  made, dense = targets('prune', calls.programs[0], params, recipe, where, axes, keep)
  calls.refuse_other_programs('prune', {path: [(use.address, use.operand) for use in target.uses.values()]
                                        for path, target in made.items()})
  statistic, cohorts = recipe.statistic or calibration.moments, cohorts_of(calls.programs[0], made, sequential)
  need = memory.estimate(calls.programs, made, cohorts, statistic, recipe.repairs)
  memory.refuse_if_too_large(need, memory_limit)
  units = [(path, unit) for path, target in made.items() for unit in target.units]
  tell = _Told(replaced(progress) or (lambda text: None), len(units))
  tell.began(len(calls.programs), need)
  folder = _folder(workdir, params, calls, made, (recipe, sequential, unseen))
  solver = Solver(recipe, made, unseen, _competed(recipe, made), functools.partial(_done, tell, folder))
  walks = [BatchWalk(i, walk(program, arrays, function='prune', paths=made), validity('prune', program, valid))
           for i, (program, arrays, valid) in enumerate(zip(calls.programs, calls.arrays, calls.valid))]
  steps = Lockstep(walks, made, cohorts, statistic, solver)
  for unit, (solved, row) in (folder.read(units) if folder else {}).items():
    steps.solved[unit], solver.rows[unit] = solved, row
  tell.number = len(steps.solved)
  steps.run()
  for unit in units:
    if unit not in steps.solved:
      steps.solved[unit] = solver(unit, None)
  solver.measured(steps.solved)
  rows = tuple(solver.rows[unit] for unit in steps.solved)
  return _result(params, made, steps.solved, report_of(rows, dense, need, time.perf_counter() - began))


@arguments.checked
def prune_weights(params: PyTree, pattern: Pattern | Mapping[str, Pattern] | str, *,
                  where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None) -> Pruned:
  """Prunes trained weights by magnitude, without data: `prune_weights(params, sj.Unstructured(0.5))`.

  `pattern` has the sparsity; a dict has a pattern by glob. `where` picks the parameters to prune, by default those of
  training recipes. `axes`: `sj.contractions(...)`, or axes by path; by default, the conventions. Exact counts, ties
  keep the lower index, NaN is pruned first. Zeros that are there already count, and their masks are `False`. Raises
  `ValueError` as training recipes do.
  """
  began = time.perf_counter()
  paths, leaves, structure = trees.flatten(params)
  picked = trees.select('prune_weights', trees.default_where(axes) if where is None else where, params)
  held = {path: leaf for path, leaf, pick in zip(paths, leaves, picked) if pick}
  arguments.refuse_unknown('prune_weights', held)
  arrays = {path: jnp.asarray(leaf) for path, leaf in held.items()}
  pattern = patterns.parse(pattern)
  own = trees.axes_by_path('prune_weights', axes, params, arrays)
  selection = selections.leafwise(pattern)  # type: ignore[arg-type]
  plan = selection.plan(arrays, own).leaves
  chosen = dict(zip(arrays, _selected(selection, plan, list(arrays.values()))))
  masks = {path: mask & (arrays[path] != 0) for path, mask in chosen.items()}  # zeros are pruned already, as in `prune`
  each = dict(zip(arrays, trees.per_leaf('prune_weights', 'pattern', pattern, list(arrays))))
  rows = tuple(StackReport(leaf.path, (), _sizes(leaf), each[leaf.path], leaf.sparsity,
                           1 - float(jnp.mean(masks[leaf.path]))) for leaf in plan)
  new = {path: jnp.where(masks[path], w, jnp.zeros((), w.dtype)) for path, w in arrays.items()}
  return Pruned(structure.unflatten([new.get(path, leaf) for path, leaf in zip(paths, leaves)]),
                structure.unflatten([masks.get(path, True) for path in paths]),
                report_of(rows, seconds=time.perf_counter() - began))


def _selected(selection: selections.Selection, plan: Sequence[SparseLeaf], arrays: list[Array]) -> list[Array]:
  """Returns the masks that a selection chooses by the weights alone."""
  kept = [jnp.ones(w.shape, bool) for w in arrays]
  signals = [Signals(step=jnp.zeros((), jnp.int32)) for _ in arrays]
  return selection.select(plan, arrays, kept, signals)[0]


def _sizes(leaf: SparseLeaf) -> tuple[int, int, int]:
  """Returns how many matrices, outputs and inputs a leaf has; all axes of a leaf of unknown axes are outputs."""
  size = lambda axes: int(np.prod([leaf.shape[a] for a in axes], dtype=np.int64))
  return size(leaf.axes.layer), size(leaf.axes.output), size((*leaf.axes.spatial, *leaf.axes.contracted))


def _check(recipe: Recipe, unseen: str) -> None:
  if not isinstance(recipe, Recipe):
    raise ValueError('prune: the fourth argument is a recipe, as in sj.post_training.Recipe(sj.Unstructured(0.5)), '
                     f'not a {type(recipe).__name__}.')
  if unseen not in UNSEEN:
    raise errors.unknown('prune', '`unseen`', unseen, UNSEEN)
  if isinstance(recipe.allocation, allocations.Ranked) and (recipe.statistic or recipe.score is not scores.magnitude):
    raise ValueError('prune: an allocation that ranks all leaves together needs all scores at once, and this recipe '
                     'prunes one matrix after the other. Take sparsities by leaf, as in allocation.custom.')


def _competed(recipe: Recipe, made: Mapping[str, Target]) -> dict[str, Array]:
  """Returns the masks of a recipe that ranks all leaves together, before the program runs; else nothing."""
  if not isinstance(recipe.allocation, allocations.Ranked):
    return {}
  arrays = [target.array for target in made.values()]
  return dict(zip(made, _selected(words_of(recipe), [target.leaf for target in made.values()], arrays)))


class _Told:
  """A `_Told` tells the progress of a call to the user's function, in plain text."""

  def __init__(self, progress: Callable[[str], None], total: int):
    self.progress, self.total, self.number = progress, total, 0

  def began(self, batches: int, need: int) -> None:
    self.progress(f'{self.total} matrices, {batches} batches, about {need:,} bytes')

  def done(self, row: StackReport) -> None:
    self.number += 1
    error = '' if row.after is None else f', error {row.after:.3g}'
    self.progress(f'{self.number}/{self.total} {row.name}: {row.achieved:.4f} zero{error}, {row.rows} rows, '
                  f'{row.seconds:.2f} s')


def _done(tell: _Told, folder: Finished | None, unit: Unit, solved: Solved, row: StackReport) -> None:
  if folder is not None:
    folder.keep(unit, solved, row)
  tell.done(row)


def _folder(workdir: str | None, params: PyTree, calls: Calls, made: Mapping[str, Target], words: Any
            ) -> Finished | None:
  if workdir is None:
    return None
  leaves = [(target.leaf, target.pattern) for target in made.values()]
  kept = [target.kept for target in made.values()]
  fingerprint = fingerprint_of((params, calls.given, calls.valid, kept), (leaves, *words))
  return Finished(pathlib.Path(workdir), fingerprint, made)


def _result(params: PyTree, made: Mapping[str, Target], solved: Mapping[Unit, Solved], report: Report) -> Pruned:
  """Returns the tree with the pruned parameters, sharded as before, and the masks."""
  weights: dict[str, Any] = {}
  masks: dict[str, Any] = {}
  for path, target in made.items():
    like = lambda array, target=target: _alike(target.joined(array), target.array)
    own = {unit: solved[path, unit] for unit in target.units}
    if any(each.factors is not None for each in own.values()):
      weights[path], masks[path] = _packed(target, own), True
      continue
    weights[path] = like({unit: each.part for unit, each in own.items()})
    masks[path] = like({unit: each.mask for unit, each in own.items()})
  paths, leaves, structure = trees.flatten(params)
  return Pruned(structure.unflatten([weights.get(path, leaf) for path, leaf in zip(paths, leaves)]),
                structure.unflatten([masks.get(path, True) for path in paths]), report)


def _packed(target: Target, solved: Mapping[Any, Solved]) -> formats.Wrapped:
  """Returns the wrapped parameter of the factors of its units; a unit without factors gets identities."""
  arrangement, dtype = next(iter(target.arrangements.values())), target.array.dtype
  some = next(each.factors for each in solved.values() if each.factors is not None)
  identity = lambda blocks: jnp.broadcast_to(jnp.eye(blocks.shape[-1], dtype=blocks.dtype), blocks.shape)
  found = {unit: each.factors or some._replace(left=identity(some.left), right=identity(some.right),
                                               core=arrangement.stack(each.part)) for unit, each in solved.items()}
  core = target.joined({unit: arrangement.part(each.core, target.at(target.array, unit).shape)
                        for unit, each in found.items()})
  packed = formats.with_axes(formats.NMArray.from_dense(core.astype(dtype), 2, 4, target.leaf.axes), target.leaf.axes)
  lead = [target.array.shape[a] for a in sorted(target.leaf.axes.layer)]
  left, right = (jnp.stack([getattr(each, name) for each in found.values()]).reshape(
      *lead, *getattr(some, name).shape[1:]).astype(dtype) for name in ('left', 'right'))
  return formats.Wrapped.of(packed, left, right)  # type: ignore[arg-type]


def _alike(array: Array, other: Array) -> Array:
  return jax.device_put(array, other.sharding)
