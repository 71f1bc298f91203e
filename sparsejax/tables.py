"""Aligns the rows of a table that is printed as plain text: every report of the library prints through `aligned`."""

from collections.abc import Sequence


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), rule: bool = True) -> str:
  """Returns the table as text: columns under their heads, two spaces between columns, no space at the end of a line.

  `right` holds the columns, counted from 0, that are aligned on the right, as numbers are. `rule` draws a line of
  dashes under the head.
  """
  lines = [tuple(map(str, line)) for line in (head, *rows)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  text = ['  '.join(cell.rjust(width) if i in right else cell.ljust(width)
                    for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
  return '\n'.join([text[0], '-' * max(map(len, text)), *text[1:]] if rule else text)
