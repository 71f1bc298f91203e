"""Writes and reads the file of results, which has one section for each benchmark.

    write('benchmarks/results.md', 'memory', [Measurement('extra bytes', 5.0, (5.0, 5.0), 5.001, False, 1)], 'an H200')
    section = read(pathlib.Path('benchmarks/results.md').read_text())['memory']
    section.claims[0].holds                                                          # True
"""

import csv
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.timing import Measurement

HEAD = ('what', 'median', '10 to 90 %', 'bar', 'holds', 'rounds')
TITLE = """# Measured by `make bench`

Contestants take turns; ratios are paired by round. `python -m benchmarks NAME` measures one section anew.
`python -m benchmarks draw` draws the sections as pictures.
"""


class Section(NamedTuple):
  """A `Section` holds the claims of one benchmark, the hardware line above the table, and what the spread means."""

  hardware: str
  spread: str
  claims: tuple[Measurement, ...]


def write(out: pathlib.Path, name: str, claims: Sequence[Measurement], hardware: str, spread: str = HEAD[2]) -> None:
  """Writes the section `name` of the file `out`: in place of the section of that name, or at the end.

  The rest of the file stays as it is. `hardware` says where the claims were measured, and `spread` which rounds the
  spread of a claim covers.
  """
  rows = [(*HEAD[:2], spread, *HEAD[3:]), ('---',) * len(HEAD), *map(cells, claims)]
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  text = out.read_text() if out.exists() else TITLE
  own = re.search(rf'^## {name}\n.*?(?=^## |\Z)', text, re.MULTILINE | re.DOTALL)
  start, end = own.span() if own else (len(text), len(text))
  out.write_text(f'{text[:start].rstrip()}\n\n## {name}\n\n{hardware}.\n\n{table}\n\n{text[end:]}'.rstrip() + '\n')


def cells(claim: Measurement) -> tuple[str, ...]:
  """Returns the row of a claim, as text, under `HEAD`."""
  low, high = claim.spread
  bar = f'{"at least" if claim.at_least else "at most"} {claim.bar:g}'
  told = (f'{claim.measured:.{digits}g}' for digits in range(4, 18))  # a number just behind the bar has more digits
  measured = next(text for text in told if claim._replace(measured=float(text)).holds == claim.holds)
  return (claim.what, measured, f'{low:.4g} to {high:.4g}', bar, 'yes' if claim.holds else 'NO', str(claim.rounds))


def read(text: str) -> dict[str, Section]:
  """Returns the sections of a file that `write` wrote, by name. Sections of prose and of other tables are left out."""
  return {name: section for name, section in map(_section, re.split(r'^## ', text, flags=re.MULTILINE)[1:]) if section}


def _section(text: str) -> tuple[str, Section | None]:
  """Returns the name of a section and its claims, or `None` where the section has no table of claims."""
  name, *rest = text.split('\n')
  table = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in rest if line.startswith('|')]
  if not table or (*table[0][:2], *table[0][3:]) != (*HEAD[:2], *HEAD[3:]):
    return name, None
  return name, Section(rest[1].removesuffix('.'), table[0][2], tuple(map(_claim, table[2:])))


def _claim(row: Sequence[str]) -> Measurement:
  what, measured, spread, bar, _, rounds = row
  low, high = spread.split(' to ')
  direction, number = bar.rsplit(' ', 1)
  return Measurement(what, float(measured), (float(low), float(high)), float(number), direction == 'at least',
                     int(rounds))


def table_row(op: Callable[..., Any], m: int, k: int, n: int, block: tuple[int, int], sparsity: float,
              implementation: str, ratios: Mapping[str, float]) -> dict[str, Any]:
  """Returns a row of a table for `sparsejax advise`, as `sparsejax.advice.Measured` reads it.

  `ratios` says how many times faster than dense the op is: 'forward', and perhaps 'train', with both gradients.
  """
  here = timing.environment()
  return {'op': op.__name__, 'implementation': implementation, 'm': m, 'k': k, 'n': n, 'block': list(block),
          'sparsity': sparsity, 'ratio_forward': round(ratios['forward'], 3),
          'ratio_train': round(ratios['train'], 3) if 'train' in ratios else None,
          'hardware': here['device'], 'jax': here['jax'], 'commit': here['commit']}


def write_table(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  """Writes the rows of a table as JSON, one a line."""
  path.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')


def update_table(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Writes `rows` into the table, in place of rows of the same products, and keeps all other rows."""
  product = lambda row: json.dumps([row[name] for name in ('op', 'm', 'k', 'n', 'block', 'sparsity')])
  new = {product(row) for row in rows}
  kept = json.loads(path.read_text()) if path.exists() else []
  write_table(path, [*(row for row in kept if product(row) not in new), *rows])


def of_gpu(path: pathlib.Path) -> tuple[Section, list[str]]:
  """Returns the section for a CSV of `python -m benchmarks gpu`, and a line for each case that failed.

  The spread of a claim goes from its least to its most ratio over the rounds.
  """
  with open(path, newline='') as file:
    rows = list(csv.DictReader(file))
  here = rows[0]
  hardware = (f'{here["device"]}, driver {here["driver"]}, jax {here["jax"]}, bfloat16, commit {here["commit"]}: '
              'times faster than dense')
  failures = [f'not measured: {row["kernel"]}, {row["shape"]}, {row["sparsity"]}: {row["failure"]}'
              for row in rows if row['failure']]
  return Section(hardware, 'least to most', tuple(_claim_of_gpu(row) for row in rows if not row['failure'])), failures


def _claim_of_gpu(row: Mapping[str, str]) -> Measurement:
  number = {name: float(row[name]) for name in ('sparse_us', 'dense_us', 'ideal', 'speedup', 'least', 'most', 'bar')}
  what = (f'{row["kernel"]}, {row["shape"]}, {row["sparsity"].replace("%", " %")} zero: '
          f'{number["sparse_us"]:,.0f} us, dense {number["dense_us"]:,.0f}, ideal {number["ideal"]:.3g}')
  return Measurement(what, number['speedup'], (number['least'], number['most']), number['bar'], True,
                     int(row['rounds']))
