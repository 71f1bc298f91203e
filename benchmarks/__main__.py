"""Measures what the README claims, on this CPU or on this GPU, and keeps the numbers in one file.

    python -m benchmarks [NAME ...] [--rounds 20] [--out FILE]    measures on this CPU, writes a section for each name
    python -m benchmarks gpu [--out CSV] [--table JSON]           measures the kernels on this GPU, writes a CSV
    python -m benchmarks record CSV [--out FILE]                  writes the CSV of a GPU as a section
    python -m benchmarks draw [NAME ...] [--folder docs/pictures] draws the sections as pictures

FILE is `benchmarks/results.md`. Measuring again replaces a section and leaves the rest of the file as it is.
"""

import argparse
import importlib
import pathlib
import sys

from benchmarks import pictures, results, timing
from sparsejax import errors, tables

SUITES = ('group_selection', 'selection', 'bandwidth', 'training_step', 'memory', 'kernels', 'packed_training',
          'compile_time', 'few_tokens', 'few_inputs', 'decoding', 'attention', 'packing', 'small_steps', 'large_trees',
          'files', 'post_training')
OUT = pathlib.Path('benchmarks/results.md')


def main(arguments: list[str] | None = None) -> int:
  """Runs the command that `arguments` name, `measure` by default, and returns its exit status."""
  arguments = sys.argv[1:] if arguments is None else arguments
  if not {'-h', '--help', 'measure', 'gpu', 'record', 'draw'} & set(arguments[:1]):
    arguments = ['measure', *arguments]
  options = _parser().parse_args(arguments)
  return options.run(options)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(required=True)

  def command(name, run, text):
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    return sub

  sub = command('measure', measure, 'measures on this CPU and writes a section for each benchmark')
  sub.add_argument('names', nargs='*', type=_suite, metavar='NAME',
                   help=f'which of {", ".join(SUITES)} (default: all)')
  sub.add_argument('--rounds', type=int, default=20, help='rounds over which a median is taken (default 20)')
  sub.add_argument('--out', default=OUT, type=_file, help=f'the file of results (default {OUT})')
  sub = command('gpu', measure_gpu, 'measures the kernels on this GPU and writes a CSV')
  sub.add_argument('--out', default='kernels.csv', help='the CSV to write (kernels.csv)')
  sub.add_argument('--table', help='the JSON to write for `sparsejax advise`: sparsejax/advice/tables/h200.json')
  sub = command('record', record, 'writes the CSV of a GPU as a section, named like the CSV')
  sub.add_argument('csv', type=_present, help='a CSV that `python -m benchmarks gpu` wrote')
  sub.add_argument('--out', default=OUT, type=_file, help=f'the file of results (default {OUT})')
  sub = command('draw', draw, 'draws the sections of the file of results as pictures')
  sub.add_argument('names', nargs='*', metavar='NAME', help='which sections (default: all)')
  sub.add_argument('--file', default=str(OUT), type=_present, help=f'the file of results (default {OUT})')
  sub.add_argument('--folder', default='docs/pictures', type=pathlib.Path, help='where the PNGs go (docs/pictures)')
  return parser


def _suite(name: str) -> str:
  if name not in SUITES:
    raise argparse.ArgumentTypeError(str(errors.unknown('benchmarks', 'benchmark', name, SUITES)))
  return name


def _file(name: str) -> pathlib.Path:
  path = pathlib.Path(name)
  if not path.parent.is_dir():
    raise argparse.ArgumentTypeError(f'{path}: there is no folder {path.parent}; make it first, or name another')
  return path


def _present(name: str) -> pathlib.Path:
  path = pathlib.Path(name)
  if not path.is_file():
    raise argparse.ArgumentTypeError(f'{path}: there is no such file; measure first, or name another')
  return path


def measure(options: argparse.Namespace) -> int:
  """Measures the benchmarks `options.names` on this CPU; returns 1 if a claim does not hold, else 0."""
  claims = []
  for name in options.names or SUITES:
    print(f'{name} ...', flush=True)
    section = []
    for claim in importlib.import_module(f'benchmarks.{name}').run(options.rounds):
      print(f'{claim.what}: {claim.measured:.3g}', flush=True)
      section.append(claim)
    results.write(options.out, name, section, timing.hardware())
    claims += section
  print(f'\n{timing.hardware()}\n\n{tables.aligned(results.HEAD, list(map(results.cells, claims)))}\n\n'
        f'written to {options.out}')
  return 0 if all(claim.holds for claim in claims) else 1


def measure_gpu(options: argparse.Namespace) -> int:
  """Measures the kernels on this GPU; returns 2 if there is no GPU, else 0."""
  return importlib.import_module('benchmarks.gpu').main(options.out, options.table)


def record(options: argparse.Namespace) -> int:
  """Writes the CSV of a GPU as a section; returns 1 if a case of the CSV failed, else 0."""
  section, failures = results.of_gpu(options.csv)
  print('\n'.join(failures), end='\n' if failures else '', file=sys.stderr)
  results.write(options.out, options.csv.stem, section.claims, section.hardware, section.spread)
  print(f'written to {options.out}')
  return 1 if failures else 0


def draw(options: argparse.Namespace) -> int:
  """Draws the sections `options.names` of the file of results, one PNG each; returns 2 for a name without a section."""
  sections = results.read(options.file.read_text())
  if unknown := set(options.names) - set(sections):
    print(f'{options.file} has no claims of {", ".join(sorted(unknown))}; it has {", ".join(sections)}',
          file=sys.stderr)
    return 2
  options.folder.mkdir(parents=True, exist_ok=True)
  for name in options.names or sections:
    pictures.draw(sections[name], options.folder / f'{name}.png')
  print(f'{len(options.names or sections)} pictures drawn into {options.folder}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
