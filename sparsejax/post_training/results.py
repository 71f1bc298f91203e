"""Holds the result of pruning a trained model: parameters, masks, and a report with a row for each matrix.

    result = sj.prune(apply, params, batches, recipe)
    print(result.report)
    result.report.rows[0].after                      # the relative squared error of the product, on calibration rows
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sparsejax.tables import Report
from sparsejax.types import Pattern, PyTree

_HEAD = ('parameter', 'stack', 'pattern', 'asked', 'achieved', 'rows', 'rows/input', 'before', 'after', 'damping',
         'raised', 'dead', 'seconds', '')


class StackReport(NamedTuple):
  """A `StackReport` is the row of one unit: a parameter, or one layer of it that the program takes by itself.

  `unit`: the index of the layer. `shape`: `(matrices, outputs, inputs)`. `asked`, `achieved`: fractions of zeros.
  `rows`: the least number of calibration rows of a matrix. `each`: the number of each matrix, such as of each expert;
  empty for a unit of one matrix. `before`, `after`: the squared error of the product over the
  squared dense product, on the calibration rows, with the mask alone and after the repairs. Both are `None` without
  data. `damping`, `raised`: the largest of a matrix. `dead`: the number of inputs that were zero in all rows. `note`
  says what else a reader must know.
  """

  path: str
  unit: tuple[int, ...]
  shape: tuple[int, ...]
  pattern: Pattern
  asked: float | None
  achieved: float
  rows: int | None = None
  before: float | None = None
  after: float | None = None
  damping: float = 0.0
  raised: int = 0
  dead: int = 0
  seconds: float = 0.0
  note: str = ''
  each: tuple[int, ...] = ()

  @property
  def name(self) -> str:
    return self.path + (f'[{", ".join(map(str, self.unit))}]' if self.unit else '')

  @property
  def cells(self) -> tuple[str, ...]:
    """The row as the texts of a table."""
    number = lambda value, form='.4f': '-' if value is None else format(value, form)
    share = None if self.rows is None else self.rows / self.shape[-1]
    rows = f'{self.rows}-{max(self.each)}' if len({*self.each}) > 1 else number(self.rows, 'd')
    return (self.name, ' x '.join(map(str, self.shape)), str(self.pattern), number(self.asked), number(self.achieved),
            rows, number(share, '.1f'), number(self.before, '.3g'), number(self.after, '.3g'),
            number(self.damping or None, '.3g'), str(self.raised or '-'), str(self.dead or '-'),
            number(self.seconds, '.2f'), self.note)


def report_of(rows: Sequence[StackReport], dense: dict[str, str] | None = None, memory: int = 0,
              seconds: float = 0.0) -> Report:
  """Returns the report of the units, in the order in which they were pruned, with notes on what a reader must know."""
  few = [row.name for row in rows if row.rows is not None and row.rows < row.shape[-1]]
  notes = [f'fewer rows than inputs: {", ".join(few)}; a repair then fits the sample'] * bool(few)
  notes += [f'left dense: {path} ({why})' for path, why in (dense or {}).items()]
  sizes = [math.prod(row.shape) for row in rows]
  asked = None if any(row.asked is None for row in rows) or not rows else (
      sum(n * (row.asked or 0.0) for n, row in zip(sizes, rows)) / max(sum(sizes), 1))
  return Report(tuple(rows), tuple(notes), asked, _HEAD, dense or {}, memory, seconds)


class Pruned(NamedTuple):
  """A `Pruned` is a model after pruning.

  `params`: like the parameters given; those that were not pruned are the same objects. `masks`: a tree like `params`
  of `bool` masks, `True` where kept, and of the scalar `True` for parameters that were not pruned.

  Parameters that `recipes.armor` wraps are `formats.Wrapped` with the mask `True`: `kernels_pallas.packed(apply)` runs
  them, and `formats.unpack` gives the dense products.
  """

  params: PyTree
  masks: PyTree
  report: Report
