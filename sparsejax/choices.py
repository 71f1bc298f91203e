"""Computes the same of all sparse leaves by as few programs as possible: the masks that a selection chooses.

    def chosen(alike, row):
      mask, w, count, size = row
      return alike.pattern(alike.ranked(jnp.abs(w), size), count, alike.leaf.axes)

    masks = choices.each(chosen, leaves, patterns, rows, words=(scores.magnitude,))

Leaves of one kind share a program, see `kinds`. If the words are elementwise, leaves of several shapes share a program
as well. Each leaf is then written as a row, and all rows have one width, see `rows`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import kinds, patterns, ranking, rows
from sparsejax.states import SparseLeaf
from sparsejax.types import ELEMENTWISE, Array, Asked, Axes, Pattern, PyTree, says


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
  as_row = lambda fact, row: rows.as_row(row, *fact)
  facts = [(leaves[i].shape, width) for i, width in widths.items()]
  for (i, width), row_of in zip(widths.items(), kinds.each(as_row, facts, [arguments[i] for i in widths], inline=True)):
    written[i] = row_of
    row = dataclasses.replace(found[i].leaf, shape=(width,), axes=Axes((), (0,)))
    found[i] = Alike(row, found[i].pattern, True)
  told = [(*row, np.int32(size if alike.padded else 0)) for row, size, alike in zip(written, sizes, found)]
  results = kinds.each(function, found, told, shared, lambda alike: loop and _ranks(alike))
  return [rows.from_rows(result, leaf.shape, widths[i]) if i in widths else result
          for i, (result, leaf) in enumerate(zip(results, leaves))]


def stacks(leaves: Sequence[SparseLeaf], own: Sequence[Pattern], arguments: Sequence[tuple[Any, ...]]) -> bool:
  """Returns whether `each` stacks the arguments of every leaf with those of others. Words may make larger stacks."""
  return kinds.all_loop(_alike(leaves, own), arguments, _ranks)


def _alike(leaves: Sequence[SparseLeaf], own: Sequence[Pattern]) -> list[Alike]:
  return [Alike(dataclasses.replace(leaf, path='', asked=Asked()), pattern) for leaf, pattern in zip(leaves, own)]


def _ranks(alike: Alike) -> bool:
  """Returns whether the pattern ranks a whole leaf by a loop, and not groups of a few neighbours."""
  return not getattr(alike.pattern, 'fixed', False)


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
