"""Shows the page of a job: its tables and notes on the terminal, and the same as Markdown, JSON, CSV and a picture.

    columns = {'run': lambda row: row['run'], 'loss': lambda row: f'{row["loss"]:.4f}'}
    page = Page('results', [table(columns, rows)], notes=['Loss: in nats.'], data={'rows': rows}, draw=draw)
    show(page, workdir, rich.console.Console())
"""

import base64
import csv
import errno
import html
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from experiments.loop import records

Cell = Callable[[Any], str]  # the text of one row in one column
Columns = Mapping[str, Cell]  # by the head of the column


class Table(NamedTuple):
  """A `Table` holds the heads of its columns and, row by row, its cells, all as text."""

  head: Sequence[str]
  cells: Sequence[Sequence[str]]


class Picture(NamedTuple):
  """A `Picture` is a further picture of a page: the file `<stem>-<name>.png`, which `draw(path)` draws, and a caption.
  """

  name: str
  caption: str
  draw: Callable[[pathlib.Path], None]


class Page(NamedTuple):
  """A `Page` says what a job found and where the findings go: `<stem>.md`, `.json`, `.png` and, with `rows`, `.csv`.

  `tables` and `notes` go to the terminal, and to the Markdown file unless `markdown` is given. `data` is the JSON.
  `draw(path)` draws the picture. With a `title`, `<stem>.html` holds tables, notes and all pictures in one file.
  """

  stem: str
  tables: Sequence[Table]
  notes: Sequence[str]
  data: Any
  draw: Callable[[pathlib.Path], None]
  markdown: str | None = None
  rows: Sequence[Mapping[str, Any]] = ()
  pictures: Sequence[Picture] = ()
  title: str | None = None


def show(page: Page, workdir: pathlib.Path, console: rich.console.Console) -> None:
  """Prints the tables and notes of `page`, and writes its files in `workdir`, unless `workdir` is read-only.

  The JSON file is written last, because a job counts as finished once it exists.
  """
  for printed in page.tables:
    console.print('', *_drawn(printed, console))
  say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
  say('\n' + '\n'.join(page.notes))
  try:
    _write(page, workdir)
  except OSError as error:
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
      raise
    say(f'Not written, because {workdir} is read-only: {error}.')


def _write(page: Page, workdir: pathlib.Path) -> None:
  place = lambda suffix: workdir / f'{page.stem}.{suffix}'
  listed = '\n'.join(f'- {note}' for note in page.notes)
  text = page.markdown or '\n\n'.join([*map(markdown, page.tables), listed])
  records.write_whole(place('md'), text + '\n')
  if page.rows:
    with place('csv').open('w', newline='') as file:
      writer = csv.DictWriter(file, page.rows[0])
      writer.writeheader()
      writer.writerows(page.rows)
  page.draw(place('png'))
  for picture in page.pictures:
    picture.draw(workdir / f'{page.stem}-{picture.name}.png')
  if page.title:
    records.write_whole(place('html'), _html(page, workdir))
  records.write_json(place('json'), page.data)


def _html(page: Page, workdir: pathlib.Path) -> str:
  """Returns the page as one HTML file that refers to nothing outside of the file: pictures are inside, as text."""
  shown = [(workdir / f'{page.stem}.png', ''), *((workdir / f'{page.stem}-{picture.name}.png', picture.caption)
                                                 for picture in page.pictures)]
  return '\n'.join([
      '<!doctype html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f'<title>{html.escape(page.title or "")}</title>', f'<style>{STYLE}</style>', '</head>', '<body>',
      f'<h1>{html.escape(page.title or "")}</h1>',
      *(f'<p>{html.escape(note)}</p>' for note in page.notes),
      *(_html_table(each) for each in page.tables),
      *(_html_picture(path, caption) for path, caption in shown), '</body>', '</html>', ''])


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222;
       background: #fff; }
div { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: pre-line; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
tr:hover td { background: #f3f6fa; } img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; }
figcaption { color: #555; }
"""


def _html_table(table: Table) -> str:
  row = lambda kind, cells: '<tr>' + ''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells) + '</tr>'
  return '\n'.join(['<div><table>', row('th', table.head), *(row('td', cells) for cells in table.cells),
                    '</table></div>'])


def _html_picture(path: pathlib.Path, caption: str) -> str:
  code = base64.b64encode(path.read_bytes()).decode()
  return (f'<figure><img alt="{html.escape(caption or path.stem)}" src="data:image/png;base64,{code}">'
          f'<figcaption>{html.escape(caption)}</figcaption></figure>')


def table(columns: Columns, rows: Sequence[Any]) -> Table:
  """Returns the table that has a column for each entry of `columns` and a line for each of `rows`."""
  return Table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def markdown(table: Table) -> str:
  """Returns `table` as Markdown."""
  head = [name.replace('\n', ' ') for name in table.head]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (head, ['---'] * len(head), *table.cells))


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and half the 95 % confidence interval, by Student's t over the seeds; NaN for fewer than two."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return float(values.mean()), float('nan')
  from scipy import special  # The import takes a second, which no command waits for before it has its results.
  half = special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(half)


def spread(mean: float, half: float, scale: float = 1, sign: str = '') -> str:
  """Returns `scale` times a mean and half its interval as text; the mean alone if `half` is NaN."""
  return f'{scale * mean:{sign}.2f}' + ('' if np.isnan(half) else f' ± {scale * half:.2f}')


def machine(environment: Mapping[str, Any]) -> str:
  """Returns the `environment` of an outcome in words: platform, device, CPUs, version of JAX, commit."""
  return (f'{environment["platform"]} ({environment["device"]}), {environment["cpus"]} CPUs, '
          f'jax {environment["jax"]}, commit {environment["commit"] or "unknown"}')


def _drawn(table: Table, console: rich.console.Console) -> list[rich.table.Table]:
  """Returns the table in as many parts as the console needs to cut nothing; each part begins with the first column."""
  count = len(table.head)
  free = console.options.update(width=10**4)
  fits = lambda wide: console.measure(_part(_columns(table, range(wide))), options=free).maximum <= console.width
  wide = next((wide for wide in range(count, 2, -1) if fits(wide)), min(count, 2))
  rest = [0, *range(wide, count)]
  return [_part(_columns(table, range(wide))), *(_drawn(_columns(table, rest), console) if wide < count else [])]


def _columns(table: Table, columns: Sequence[int]) -> Table:
  return Table([table.head[i] for i in columns], [[line[i] for i in columns] for line in table.cells])


def _part(table: Table) -> rich.table.Table:
  drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False)
  for i, name in enumerate(table.head):
    drawn.add_column(name, justify='right' if i else 'left', no_wrap=True)
  for line in table.cells:
    drawn.add_row(*line)
  return drawn
