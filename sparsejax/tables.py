"""Aligns the columns of a table that is printed as plain text; every report of the library prints through `aligned`.

    aligned(('path', 'zeros'), [('mlp/kernel', '50 %'), ('head/kernel', '0 %')], right=[1])

A `Report` is the table of asked and achieved sparsity that `sj.report`, `sj.check` and `sj.prune` return.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

__all__ = ['Report']


@dataclasses.dataclass(frozen=True)
class Report:
  """A `Report` holds a row for each sparse parameter, or for each unit that was pruned. Prints as a table.

  The rows are `LeafReport`s, or `StackReport`s after pruning. Each has a `shape`, the sparsity `achieved`, and its
  `cells` under `head`. `asked`: the sparsity asked of all rows together, or `None` if nothing was asked of some rows.
  `dense`: the reason for each matrix and look-up that `prune` left dense, by path. `memory`: the bytes that were
  expected at the peak of `prune`. `seconds`: the time of the whole call.
  """

  rows: tuple[Any, ...]
  notes: tuple[str, ...] = ()
  asked: float | None = None
  head: tuple[str, ...] = ('parameter', 'shape', 'pattern', 'along', 'asked', 'achieved', '')
  dense: dict[str, str] = dataclasses.field(default_factory=dict)
  memory: int = 0
  seconds: float = 0.0

  @property
  def violations(self) -> list[Any]:
    """The rows that do not keep what was asked."""
    return [row for row in self.rows if getattr(row, 'problem', '')]

  @property
  def sizes(self) -> list[int]:
    return [math.prod(row.shape) for row in self.rows]

  @property
  def achieved(self) -> float:
    """The sparsity of all rows together."""
    return sum(n * row.achieved for n, row in zip(self.sizes, self.rows)) / max(sum(self.sizes), 1)

  def __str__(self) -> str:
    total = {'parameter': 'together', 'asked': number(self.asked), 'achieved': number(self.achieved),
             'seconds': f'{self.seconds:.2f}'}
    lines = [*(row.cells for row in self.rows), tuple(total.get(name, '') for name in self.head)]
    right = [i for i, name in enumerate(self.head) if name in _NUMBERS] if 'seconds' in self.head else []
    return '\n'.join([aligned(self.head, lines, right=right), *self.notes])


_NUMBERS = {'asked', 'achieved', 'rows', 'rows/input', 'before', 'after', 'damping', 'raised', 'dead', 'seconds'}


def number(sparsity: float | None) -> str:
  """Returns a fraction as a table shows it, `-` for `None`."""
  return '-' if sparsity is None else f'{sparsity:.4f}'


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), rule: bool = True) -> str:
  """Returns the table as text, with two spaces between columns and no spaces at the end of a line.

  `head` holds the title of each column. `right` holds the indices, counted from 0, of the columns that are aligned on
  the right, for example columns of numbers. `rule` draws a line of dashes under the head. Cells are `printable`.
  """
  lines = [tuple(printable(str(cell)) for cell in line) for line in (head, *rows)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  text = ['  '.join(cell.rjust(width) if i in right else cell.ljust(width)
                    for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
  return '\n'.join([text[0], '-' * max(map(len, text)), *text[1:]] if rule else text)


def printable(text: str) -> str:
  """Returns `text` with control characters, and other characters that terminals act on, escaped as in Python."""
  return ''.join(letter if letter.isprintable() else letter.encode('unicode_escape').decode() for letter in text)
