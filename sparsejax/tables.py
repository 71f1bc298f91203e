"""Aligns the columns of a table that is printed as plain text; every report of the library prints through `aligned`.

    aligned(('path', 'zeros'), [('mlp/kernel', '50 %'), ('head/kernel', '0 %')], right=[1])
"""

from collections.abc import Sequence


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
