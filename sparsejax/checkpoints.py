"""Opens the checkpoints of the command line, and reports on them or packs them with one leaf in memory at a time.

    opened = checkpoints.picked('model.safetensors', given=['c_attn/weight=0'])
    opened.params                                    # The leaves are not read yet.
    checkpoints.reported(opened, sj.NM(2, 4))          # At most one parameter is in memory.
    io.save('out', checkpoints.packed(opened, '2:4'))
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import census, errors, formats, io, patterns, progress, reports, trees
from sparsejax.formats.arrays import nbytes
from sparsejax.io import slots
from sparsejax.reports import LeafReport, Report
from sparsejax.types import Axes, Pattern, Predicate, PyTree


class Opened(NamedTuple):
  """An `Opened` checkpoint holds dense leaves that are not read yet, and what the options of a command say of them.

  `axes` maps the paths of the leaves that `where` picks to their axes. `notes` are for the reader of any result.
  """

  params: PyTree
  where: Predicate
  axes: dict[str, Axes]
  notes: tuple[str, ...]


def picked(path: str, item: str | None = None, *, where: Predicate | None = None, but: Sequence[str] = (),
           given: Sequence[str] = ()) -> Opened:
  """Returns the checkpoint at `path`; leaves that are packed there are unpacked when they are read.

  `where` picks the parameters, by default what is packed, and all matrices but those that an optimizer keeps. `but` are
  globs of parameters to leave out. `given` are texts 'GLOB=AXIS', or 'GLOB=AXIS,AXIS', of contracted axes. Of the other
  parameters a packed file says the axes, or else the conventions do.
  """
  stored = io.stored(path, item)
  params = unpacked(stored)
  names, leaves, _ = trees.flatten(params)
  kept_aside = slots.left_out({name: leaf.shape for name, leaf in zip(names, leaves)}) if where is None else []
  if where is None:
    where = _or_packed(stored, _without(kept_aside, trees.over(trees.matrices, params)))
  where = trees.all_but(*but, where=where) if but else where
  chosen = [name for name, pick in zip(names, trees.select('--where', where, params)) if pick]
  axes = trees.axes_by_path('--axis', None, params, chosen)
  axes |= {name: leaf.axes for name, leaf in zip(names, jax.tree.leaves(stored))
           if name in axes and getattr(leaf, 'axes', None)}
  axes |= _given(given, {name: leaf.shape for name, leaf in zip(names, leaves) if name in axes})
  note = f'left out, as an optimizer keeps them beside the parameters: {errors.some(kept_aside)}; --where picks them'
  return Opened(params, where, axes, (note,) if kept_aside else ())


def unpacked(tree: PyTree) -> PyTree:
  """Returns a tree of `io.stored` whose packed leaves become dense when they are read."""
  made: dict[int, Any] = {}  # A leaf that is in several places stays one leaf.
  return jax.tree.map(lambda leaf: made.setdefault(id(leaf), _dense(leaf)), tree)


def _dense(leaf: Any) -> Any:
  if not isinstance(leaf, io.Stored) or leaf.blocks:
    return leaf
  return dataclasses.replace(leaf, load=lambda: np.asarray(formats.unpack(leaf.load())), axes=None, index_bytes=0)


def _without(paths: Sequence[str], where: Predicate) -> Predicate:
  among = set(paths)
  return lambda path, leaf: path not in among and where(path, leaf)


def _or_packed(stored: PyTree, where: Predicate) -> Predicate:
  """Returns the predicate of the leaves that `where` picks, or that are packed, whatever their names are."""
  packed = {name for name, leaf in zip(*trees.flatten(stored)[:2]) if getattr(leaf, 'axes', None)}
  return lambda path, leaf: path in packed or where(path, leaf)


def _given(texts: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Axes]:
  """Returns the axes that the texts 'GLOB=AXIS' give to the parameters with these `shapes`."""
  axes = {}
  for text in texts:
    glob, equals, numbers = text.rpartition('=')
    if not equals:
      raise ValueError(f'--axis {text}: write GLOB=AXIS, as in "--axis {next(iter(shapes), "kernel")}=0".')
    chosen = [name for name in shapes if trees.matches(glob, name)]
    if not chosen:
      raise errors.unknown('--axis', 'parameter', glob, shapes)
    axes |= {name: _contracted(text, name, shapes[name], numbers.split(',')) for name in chosen}
  return axes


def _contracted(text: str, path: str, shape: tuple[int, ...], numbers: list[str]) -> Axes:
  try:
    contracted = tuple(range(len(shape))[int(number)] for number in numbers)
  except (ValueError, IndexError) as e:
    raise errors.at_leaf(f'--axis {text}', path, shape, f'the axes are the numbers 0 to {len(shape) - 1}.') from e
  if len(set(contracted)) < len(contracted):
    raise errors.at_leaf(f'--axis {text}', path, shape, 'the same axis is there twice; give each once.')
  return Axes(contracted, tuple(a for a in range(len(shape)) if a not in contracted), source='given')


def _refuse_unknown_axes(opened: Opened, bound: Sequence[str]) -> None:
  """Raises `ValueError` if axes of the parameters in `bound` are unknown, with the options that say them."""
  unknown = [path for path in bound if opened.axes[path].source == 'unknown']
  if not unknown:
    return
  ranks = {path: len(leaf.shape) for path, leaf in zip(*trees.flatten(opened.params)[:2])}
  globs = {'/'.join(path.split('/')[-2:]): ranks[path] for path in unknown}
  axes = {glob: _likely(glob, rank) for glob, rank in globs.items()}
  hint = ' GPT-2 stores c_attn, c_fc and c_proj as [in, out] in torch, and as [out, in] in Flax.'
  raise ValueError(
    f'--axis: which axis is contracted of {errors.some(unknown, 6)}? Neither name, rank nor container says so.'
    f'{hint if set(axes.values()) - {"AXIS"} else ""} Say which axis holds the inputs, counted from 0: '
    f'{" ".join(f"--axis {glob}={axis}" for glob, axis in axes.items())}. Or leave them out: --except '
    f'{" ".join(globs)}.')


def _likely(glob: str, rank: int) -> str:
  """Returns the contracted axis of GPT-2's layers, and the word AXIS for other parameters."""
  layer, _, name = glob.replace('.', '/').rpartition('/')
  conv1d = layer.rpartition('/')[2] in ('c_attn', 'c_fc', 'c_proj') and rank == 2
  return {'weight': '0', 'kernel': '1'}.get(name, 'AXIS') if conv1d else 'AXIS'


def reported(opened: Opened, pattern: Pattern | Mapping[str, Pattern] | None) -> Report:
  """Returns the `sparsejax.report` of the parameters that `where` picks; one block of one of them is read at a time."""
  leaves = dict(zip(*trees.flatten(opened.params)[:2]))
  asked = dict(zip(opened.axes, trees.per_leaf('report', 'pattern', pattern, list(opened.axes))))
  _refuse_unknown_axes(opened, [path for path, own in asked.items()
                                if own and own.validate(leaves[path].shape, opened.axes[path])])
  rows = tuple(_row(path, leaves[path], asked[path], opened.axes[path])
               for path in progress.counted('check', list(asked)))
  made = reports.with_note(opened.params, Report(rows, asked=reports.overall(rows, [row.asked for row in rows])))
  return dataclasses.replace(made, notes=(*made.notes, *opened.notes))


def _row(path: str, leaf: Any, pattern: Pattern | None, axes: Axes) -> LeafReport:
  """Returns the row of one parameter, from its blocks if they decide. A problem is told of the whole parameter."""
  row = lambda w: reports.row_of_pattern(path, jnp.asarray(w), pattern, axes)
  if not isinstance(leaf, io.Stored):
    return row(leaf)
  asked = [each for each in ([pattern] if pattern else reports.COMMON)
           if axes.contracted and not each.validate(leaf.shape, axes)]
  multiple = _rows_that_decide(pattern, axes)
  if not leaf.blocks or not leaf.size or not multiple:
    return row(leaf.load())
  nonzeros, groups = 0, tuple({each.m for each in asked})
  for block in leaf.in_multiples(multiple):
    more, most = census.taken(block, axes, groups)
    nonzeros += more
    asked = [each for each in asked if most[each.m] <= each.n]
  if pattern and not asked:
    return row(leaf.load())
  return LeafReport(path, leaf.shape, next(iter(asked), None), axes, pattern and pattern.sparsity,
                    1 - nonzeros / leaf.size)


def _rows_that_decide(pattern: Pattern | None, axes: Axes) -> int | None:
  """Returns a number of rows of which multiples keep the pattern if and only if the whole parameter does, or `None`."""
  if 0 in axes.contracted[1:] or not (pattern is None or isinstance(pattern, patterns.NM) and pattern.width == 1):
    return None
  return math.lcm(*(each.m for each in reports.COMMON)) if pattern is None else pattern.m


def packed(opened: Opened, pattern: Any, done: Callable[[int, int], None] = lambda before, after: None,
           signed_zeros: bool = False) -> PyTree:
  """Returns the tree for `io.save`, whose leaves are packed when they are written.

  `done` is called for each packed leaf with its bytes, dense and in the file. `signed_zeros` keeps `-0.0`.
  """
  plans = {path: plan._replace(axes=opened.axes[path], signed_zeros=signed_zeros)
           for path, plan in formats.packings(opened.params, pattern, where=opened.where).items()}
  _refuse_unknown_axes(opened, [path for path, plan in plans.items() if all(each.takes_axes for each in plan.formats)])
  if problems := formats.unfit(plans, opened.params):
    raise errors.at_leaves('pack', problems, f'--except {" ".join(problem.path for problem in problems)}')
  names, leaves, treedef = trees.flatten(opened.params)
  made: dict[Any, Any] = {}  # A leaf that is in several places is packed once.
  for name, leaf in zip(names, leaves):
    made.setdefault((id(leaf), name in plans), _later(plans[name], leaf, done) if name in plans else leaf)
  return treedef.unflatten([made[id(leaf), name in plans] for name, leaf in zip(names, leaves)])


def _later(plan: formats.Packing, leaf: Any, done: Callable[[int, int], None]) -> io.Stored:
  def packing() -> tuple[formats.PackedArray, Iterator[Mapping[str, Any]]]:
    small, blocks = plan.in_blocks(stored)
    done(leaf.size * leaf.dtype.itemsize, nbytes(small.in_files()))
    return small, blocks

  stored = leaf if isinstance(leaf, io.Stored) else io.Stored(leaf.shape, leaf.dtype, lambda: leaf)
  return io.Stored(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: plan.packed(stored.load()), packing=packing,
                   index_bytes=max(each.index_bytes for each in plan.formats))


def dense_nbytes(opened: Opened) -> int:
  """Returns the bytes of all leaves, dense."""
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(opened.params))
