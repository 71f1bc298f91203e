"""The section and the picture of what a GPU gave: `python -m benchmarks.gpu kernels.csv [--out FILE]`.

The CSV is that of `python -m kernels_pallas.bench`, which needs no more than the library where it runs.
"""

import argparse
import csv
import pathlib
import sys

from benchmarks import __main__ as benchmarks
from benchmarks import timing


def claims(rows: list[dict[str, str]]) -> list[timing.Claim]:
  """One for each row that was measured; from the least to the most of its rounds."""
  number = lambda row, name: float(row[name])
  return [timing.Claim(f'{row["kernel"]}, {row["shape"]}, {row["sparsity"].replace("%", " %")} zero: '
                       f'{number(row, "sparse_us"):,.0f} us, dense {number(row, "dense_us"):,.0f}, ideal '
                       f'{number(row, "ideal"):.3g}', number(row, 'speedup'),
                       (number(row, 'least'), number(row, 'most')), number(row, 'bar'), True, int(row['rounds']))
          for row in rows if not row['failure']]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks.gpu', description=__doc__.split('\n\n')[0])
  parser.add_argument('csv', type=pathlib.Path, help='what kernels_pallas.bench wrote')
  parser.add_argument('--out', default='benchmarks/results.md', type=pathlib.Path, help='the file the section goes to')
  args = parser.parse_args(argv)
  with open(args.csv, newline='') as file:
    rows = list(csv.DictReader(file))
  if failed := [row for row in rows if row['failure']]:
    print('\n'.join(f'not measured: {row["kernel"]}, {row["shape"]}, {row["sparsity"]}: {row["failure"]}'
                    for row in failed), file=sys.stderr)
  first = rows[0]
  hardware = (f'{first["device"]}, driver {first["driver"]}, jax {first["jax"]}, bfloat16, commit {first["commit"]}: '
              'times faster than dense')
  benchmarks.write(args.out, args.csv.stem, claims(rows), hardware, 'least to most')
  print(f'written to {args.out} and the picture beside it')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
