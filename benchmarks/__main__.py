"""Runs the benchmarks and writes what came out: `python -m benchmarks [NAME ...] [--rounds 20] [--out FILE]`."""

import argparse
import pathlib
import sys

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import group_selection, kernels, memory, packed_training, selection, timing, training_step

SUITES = {suite.__name__.split('.')[-1]: suite.run for suite in (
    group_selection, selection, training_step, memory, kernels, packed_training)}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
  parser.add_argument('names', nargs='*', metavar='NAME', help=f'which of {", ".join(SUITES)} (default: all)')
  parser.add_argument('--rounds', type=int, default=20, help='rounds a median is taken of (default 20)')
  parser.add_argument('--out', default='benchmarks/results.md', help='where the table goes')
  args = parser.parse_args(argv)
  if unknown := set(args.names) - set(SUITES):
    parser.error(f'unknown benchmark {", ".join(sorted(unknown))}; there are {", ".join(SUITES)}')
  console = Console()
  claims = []
  with Progress(console=console, transient=True) as progress:
    for name in args.names or SUITES:
      task = progress.add_task(name, total=None)
      for claim in SUITES[name](args.rounds):
        claims.append(claim)
        progress.console.print(f'{claim.what}: {claim.measured:.3g}')
      progress.remove_task(task)
  console.print(_table(claims))
  pathlib.Path(args.out).write_text(_markdown(claims))
  console.print(f'written to {args.out}')
  return 0 if all(claim.holds for claim in claims) else 1


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


def _markdown(claims: list[timing.Claim]) -> str:
  rows = [HEAD, ('---',) * len(HEAD), *map(_cells, claims)]
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  how = f'{timing.hardware()}. Contestants take turns; ratios are paired by round.'
  return f'# Measured by `make bench`\n\n{how}\n\n{table}\n'


if __name__ == '__main__':
  sys.exit(main())
