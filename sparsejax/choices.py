"""Computes the same of all sparse leaves by as few programs as possible: the masks that a selection chooses.

    def chosen(alike, row):
      mask, w, count, size = row
      return alike.pattern(alike.ranked(jnp.abs(w), size), count, alike.leaf.axes)

    masks = choices.each(chosen, leaves, patterns, rows, words=(scores.magnitude,))

Leaves of one kind share a program, see `kinds`. If the words are elementwise, leaves of several shapes share a program
as well. Each leaf is then written as a row, and all rows have one width, see `rows`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from sparsejax import kinds, neighbours, patterns, ranking, rows
from sparsejax.states import SparseLeaf
from sparsejax.types import ELEMENTWISE, Array, Asked, Axes, Pattern, PyTree, says

_LONG = 16  # the programs of larger groups of neighbours are long
_JOINED = 1 << 17  # leaves of fewer entries are joined: a copy of them stays in a processor's cache


class Alike(NamedTuple):
  """An `Alike` is what leaves of one program have in common: a leaf without its path, and its pattern.

  `padded`: the leaves are rows `[width]`, of which only the first entries are those of the leaf.
  """

  leaf: SparseLeaf
  pattern: Pattern
  padded: bool = False

  def ranked(self, scores: Array, size: Array) -> Array:
    """Returns the scores by which entries are ranked: padding comes last, behind the `size` entries of the leaf."""
    return rows.padding_last(scores, size) if self.padded else scores


def each(function: Callable[[Alike, Any], PyTree], leaves: Sequence[SparseLeaf], own: Sequence[Pattern],
         arguments: Sequence[tuple[Any, ...]], shared: tuple[Any, ...] = (), *, words: Sequence[Any] = (),
         loop: bool = True) -> list[PyTree]:
  """Returns `function(alike, (*arguments[i], size, *shared))` of each leaf, in the shapes of the leaf.

  `own`: the pattern of each leaf. `size`: the number of entries of the leaf, if the leaf is padded. `words`: the words
  that `function` calls. `loop`: whether leaves that are ranked as a whole are computed one after the other.
  """
  found = _alike(leaves, own)
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  widths = _widths(found, sizes, arguments) if loop and all(says(word, ELEMENTWISE) for word in words) else {}
  written = list(arguments)
  for (i, width), row_of in zip(widths.items(), _written(widths, leaves, arguments)):
    written[i] = row_of
    row = dataclasses.replace(found[i].leaf, shape=(width,), axes=Axes((), (0,)))
    found[i] = Alike(row, found[i].pattern, True)
  told = [(*row, np.int32(size if alike.padded else 0)) for row, size, alike in zip(written, sizes, found)]
  results = kinds.each(function, found, told, shared, lambda alike: loop and _ranks(alike))
  return [rows.from_rows(result, leaf.shape, widths[i]) if i in widths else result
          for i, (result, leaf) in enumerate(zip(results, leaves))]


def at(pattern: Pattern, step: Any) -> Pattern:
  """Returns the pattern at `step`: the pattern itself, unless it changes over the steps."""
  return pattern.at(step) if hasattr(pattern, 'at') else pattern


Masks = Callable[[list[SparseLeaf], list[Pattern], list[Any]], list[Array]]


def by_stage(function: Masks, leaves: Sequence[SparseLeaf], own: Sequence[Pattern], rows: Sequence[PyTree], step: Any,
             *, words: Sequence[Any]) -> list[Array]:
  """Returns the masks `function(leaves, patterns, rows)`, with one branch for each stage of a pattern that has stages.

  In a branch, leaves have the pattern of the stage, so that masks are computed as without stages. Small leaves are
  joined before the branches, if `words` are elementwise: a group of neighbours knows nothing of other groups.
  """
  groups: dict[Any, list[int]] = {}
  for i, pattern in enumerate(own):
    groups.setdefault(id(pattern) if hasattr(pattern, 'at') else None, []).append(i)
  found: dict[int, Array] = {}
  for places in groups.values():
    mine, given, now = [leaves[i] for i in places], [rows[i] for i in places], at(own[places[0]], step)
    if hasattr(now, 'stages'):
      joins = all(says(word, ELEMENTWISE) for word in words)
      masks = _switched(function, now, mine, given, _joined(now.stages, mine, given) if joins else [])
    else:
      masks = function(mine, [own[i] for i in places], given)
    found |= zip(places, masks)
  return [found[i] for i in range(len(own))]


def _switched(function: Masks, pattern: Any, leaves: list[SparseLeaf], rows: list[PyTree], small: list[int]
              ) -> list[Array]:
  """Returns the masks by the stage of the pattern; the leaves at the places `small` are one matrix of their groups."""
  m = max(stage.group[0] for stage in pattern.stages)
  others = [i for i in range(len(leaves)) if i not in small]
  told, given = [leaves[i] for i in others], [rows[i] for i in others]
  if small:
    columns = [jax.tree.map(lambda x, axes=leaves[i].axes.contracted: neighbours.as_columns(x, axes, m), rows[i])
               for i in small]
    given.append(jax.tree.map(lambda *parts: lax.concatenate(parts, 1), *columns))
    told.append(SparseLeaf('', (m, sum(math.prod(leaves[i].shape) for i in small) // m), Axes((0,), (1,)), None,
                           Asked()))
  masks = lax.switch(pattern.index, [functools.partial(function, told, [stage] * len(told), given)
                                     for stage in pattern.stages])
  found = dict(zip(others, masks))
  if small:
    sizes = [math.prod(leaves[i].shape) // m for i in small]
    starts = kinds.opaque(np.cumsum([0, *sizes[:-1]]), masks[-1])
    for i, start, size in zip(small, starts, sizes):
      part = lax.dynamic_slice_in_dim(masks[-1], start, size, 1)
      found[i] = neighbours.from_columns(part, leaves[i].axes.contracted, leaves[i].shape)
  return [found[i] for i in range(len(leaves))]


def _joined(stages: Sequence[Pattern], leaves: list[SparseLeaf], rows: list[PyTree]) -> list[int]:
  """Returns the places of the small leaves that can be one matrix: of one dtype each, and not sharded."""
  m = max(stage.group[0] for stage in stages)
  if not all(isinstance(stage, patterns.NM) and stage.width == 1 and m % stage.m == 0 for stage in stages):
    return []
  kind = lambda row: (jax.tree.structure(row), *(x.dtype for x in jax.tree.leaves(row)))
  small = [i for i, (leaf, row) in enumerate(zip(leaves, rows)) if _is_small(leaf, row) and kind(row) == kind(rows[0])]
  return small if len(small) > 1 else []


def _is_small(leaf: SparseLeaf, row: PyTree) -> bool:
  """Returns whether a leaf has few weights, and every array of its row has its shape and is not sharded."""
  return math.prod(leaf.shape) < _JOINED and all(
      x.shape == leaf.shape and jax.typeof(x).sharding.mesh.size < 2 for x in jax.tree.leaves(row))


def stacks(leaves: Sequence[SparseLeaf], own: Sequence[Pattern], arguments: Sequence[tuple[Any, ...]]) -> bool:
  """Returns whether `each` stacks the arguments of every leaf with those of others. Words may make larger stacks."""
  return kinds.all_loop(_alike(leaves, own), arguments, _ranks)


def _written(widths: Mapping[int, int], leaves: Sequence[SparseLeaf], arguments: Sequence[PyTree]) -> list[PyTree]:
  """Returns the arguments of each leaf in `widths`, with each array of the leaf's shape as a row.

  Numbers stay as they are, so that `kinds.together` stacks known numbers while JAX traces.
  """
  flat = [jax.tree.flatten(arguments[i]) for i in widths]
  facts = [(leaves[i].shape, width) for i, width in widths.items()]
  is_own = [[np.shape(x) == shape for x in arrays] for (arrays, _), (shape, _) in zip(flat, facts)]
  own = [tuple(itertools.compress(arrays, mine)) for (arrays, _), mine in zip(flat, is_own)]
  as_row = lambda fact, arrays: rows.as_row(arrays, *fact)
  found = map(iter, kinds.each(as_row, facts, own, inline=True))
  return [jax.tree.unflatten(structure, [next(row) if mine else x for x, mine in zip(arrays, told)])
          for (arrays, structure), told, row in zip(flat, is_own, found)]


def _alike(leaves: Sequence[SparseLeaf], own: Sequence[Pattern]) -> list[Alike]:
  return [Alike(dataclasses.replace(leaf, path='', asked=Asked()), pattern) for leaf, pattern in zip(leaves, own)]


def _ranks(alike: Alike) -> bool:
  """Returns whether the pattern takes a loop or a long program for a leaf, and not a few operations."""
  return not getattr(alike.pattern, 'fixed', False) or getattr(alike.pattern, 'group', (1,))[0] > _LONG


def _widths(found: Sequence[Alike], sizes: Sequence[int], arguments: Sequence[Any]) -> dict[int, int]:
  """Returns the width of the row of each leaf that is written as one, by place.

  A row is a single matrix without structure, whose width is also that of a leaf of another shape. Leaves that cannot
  be stacked stay as they are, and so do large leaves, which have passes of their own.
  """
  if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
    return {}  # a draw then depends on how many draws there are
  fit = [i for i, (alike, size) in enumerate(zip(found, sizes)) if isinstance(alike.pattern, patterns.Unstructured)
         and not alike.pattern.balanced and not alike.leaf.axes.layer and 0 < size < ranking.LARGE
         and kinds.stackable(arguments[i])]
  widths = dict(zip(fit, rows.widths([sizes[i] for i in fit])))
  shapes: dict[int, set[Any]] = {}
  for i, width in widths.items():
    shapes.setdefault(width, set()).add(found[i].leaf.shape)
  return {i: width for i, width in widths.items() if len(shapes[width]) > 1}
