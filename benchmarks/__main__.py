"""Runs the benchmarks and writes what came out: `python -m benchmarks [NAME ...] [--rounds 20] [--out FILE]`.

Each has a section in the file and a picture beside it, written when it ends and replaced when it runs again; what else
the file says stays.
"""

import argparse
import pathlib
import re
import sys

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import group_selection, kernels, memory, packed_training, selection, timing, training_step

SUITES = {suite.__name__.split('.')[-1]: suite.run for suite in (
    group_selection, selection, training_step, memory, kernels, packed_training)}
TITLE = """# Measured by `make bench`

Contestants take turns; ratios are paired by round. `python -m benchmarks NAME` measures one section anew.
"""


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
  parser.add_argument('names', nargs='*', metavar='NAME', help=f'which of {", ".join(SUITES)} (default: all)')
  parser.add_argument('--rounds', type=int, default=20, help='rounds a median is taken of (default 20)')
  parser.add_argument('--out', default='benchmarks/results.md', type=pathlib.Path,
                      help='where the tables go, a section for each benchmark, its picture beside it')
  args = parser.parse_args(argv)
  if unknown := set(args.names) - set(SUITES):
    parser.error(f'unknown benchmark {", ".join(sorted(unknown))}; there are {", ".join(SUITES)}')
  if not args.out.parent.is_dir():
    parser.error(f'--out {args.out}: there is no folder {args.out.parent}; make it first, or name another')
  console = Console()
  claims = []
  with Progress(console=console, transient=True) as progress:
    for name in args.names or SUITES:
      task = progress.add_task(name, total=None)
      found = []
      for claim in SUITES[name](args.rounds):
        found.append(claim)
        progress.console.print(f'{claim.what}: {claim.measured:.3g}')
      progress.remove_task(task)
      claims += found
      write(args.out, name, found)
  console.print(_table(claims))
  console.print(f'written to {args.out} and the pictures beside it')
  return 0 if all(claim.holds for claim in claims) else 1


def write(out: pathlib.Path, name: str, claims: list[timing.Claim], hardware: str | None = None,
          spread: str = '10 to 90 %') -> None:
  """The section of this name instead of the one there is, or at the end; measured here, if not said where."""
  picture, hardware = out.with_name(f'{out.stem}-{name}.png'), hardware or timing.hardware()
  _draw(claims, picture, hardware, spread)
  rows = [(*HEAD[:2], spread, *HEAD[3:]), ('---',) * len(HEAD), *map(_cells, claims)]
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  section = f'## {name}\n\n{hardware}.\n\n{table}\n\n![{name}]({picture.name})\n\n'
  text = out.read_text() if out.exists() else TITLE
  own = re.search(rf'^## {name}\n.*?(?=^## |\Z)', text, re.MULTILINE | re.DOTALL)
  start, end = own.span() if own else (len(text), len(text))
  out.write_text(f'{text[:start].rstrip()}\n\n{section}{text[end:]}'.rstrip() + '\n')


def _cells(claim: timing.Claim) -> tuple[str, ...]:
  low, high = claim.spread
  bar = f'{"at least" if claim.at_least else "at most"} {claim.bar:g}'
  return (claim.what, f'{claim.measured:.4g}', f'{low:.4g} to {high:.4g}', bar, 'yes' if claim.holds else 'NO',
          str(claim.rounds))


HEAD = ('what', 'median', '10 to 90 %', 'bar', 'holds', 'rounds')


def _table(claims: list[timing.Claim]) -> Table:
  table = Table(*HEAD, title=timing.hardware())
  for claim in claims:
    table.add_row(*_cells(claim))
  return table


def _draw(claims: list[timing.Claim], path: pathlib.Path, hardware: str, spread: str) -> None:
  """How far above or below its bar each is, and its spread."""
  figure = Figure(figsize=(11, 1 + 0.28 * len(claims)), layout='constrained')
  axes = figure.add_subplot()
  for row, claim in enumerate(claims):
    color = 'tab:blue' if claim.holds else 'tab:red'
    axes.plot([end / claim.bar for end in claim.spread], [row, row], color=color, linewidth=2)
    axes.plot(claim.measured / claim.bar, row, 'o' if claim.at_least else 's', color=color)
  axes.axvline(1, color='black', linewidth=1)
  axes.set(xscale='log', ylim=(len(claims) - 0.5, -0.5))
  figure.suptitle(hardware, fontsize=10)
  figure.supxlabel(f'measured / bar, {spread}; round is to be right of 1, square left', fontsize=9)
  for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
    axis('{x:g}')
  axes.set_yticks(range(len(claims)), [claim.what for claim in claims], fontsize=7)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  sys.exit(main())
