"""Cuts trained models by structured recipes and shows one table: accuracy, size and measured speed of dense and cut.

    python -m experiments.structured resnet --workdir runs/resnet [--data_dir DIR] [--methods oto,hap] [--seeds 0,1,2]
    python -m experiments.structured vit --workdir runs/vit [--left 0.5,0.7] [--steps 400] [--width 16]
    python -m experiments.structured encoder --workdir runs/encoder [--data_dir DIR]
    python -m experiments.structured detector --workdir runs/detector [--steps 200] [--width 8]
    python -m experiments.structured wide --workdir runs/wide           # or gated; [--steps 600] [--seeds 0,1,2,3,4]

`resnet` and `vit` are trained first, on CIFAR-10 in `DIR` or on the digits. `encoder` is the pretrained encoder, on
SST-2 in `DIR` or on lines of the standard library. `detector` finds pasted digits, see `detection`. `wide` and `gated`
train replacements of dense layers on the digits, see `replacing`. Finished cells are lines of `cells.jsonl` and are
skipped.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments.loop import commands, outcomes, training
from experiments.loop.stopping import StopRequest
from experiments.structured import detection, engine, replacing
from experiments.structured.detection import Canvases
from experiments.structured.engine import METHODS, CutCell, Trained
from experiments.structured.replacing import Replacements
from experiments.structured.subjects import SUBJECTS, RunSizes
from experiments.sweep.ledger import Line, locked
from experiments.tables import cuts, pages
from sparsejax import errors, recipes

ENCODER = RunSizes(batch=16, steps=60, tuned=24, rate=1e-4, tests=512, samples=2)
SIZES = {'resnet': RunSizes(), 'vit': RunSizes(), 'encoder': ENCODER, 'detector': Canvases(), 'wide': Replacements(),
         'gated': Replacements()}
# Some tables have one cell a seed. The first function trains all models of the seed, and the second makes the page.
BY_SEED: dict[str, tuple[Callable[[Any, int], Any], Callable[[Sequence[Line]], pages.Page]]] = {
  'detector': (detection.detected, cuts.detector_page), 'wide': (replacing.wide, cuts.replaced_page),
  'gated': (replacing.gated, cuts.replaced_page)}
TABLES = (*SUBJECTS, *BY_SEED)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  given = _parsed(arguments)
  fields = SIZES[given.table]._fields
  own = {name: value for name, value in vars(given).items() if name in fields and value is not None}

  def work() -> Any:
    with StopRequest() as request:
      return run(given.table, given.workdir, given.data_dir, sizes=SIZES[given.table]._replace(**own),
                 methods=given.methods.split(','), left=[float(each) for each in given.left.split(',')],
                 seeds=[int(seed) for seed in given.seeds.split(',')], request=request)

  return commands.attempt(work, given.workdir, commands.command('structured', arguments), given.traceback).status


def run(table: str, workdir: str, data_dir: str | None = None, *, sizes: Any = None,
        methods: Sequence[str] = METHODS, left: Sequence[float] = (0.5, 0.7), seeds: Sequence[int] = (0, 1, 2),
        request: StopRequest | None = None) -> list[Line]:
  """Cuts and measures what is not finished, writes and prints the table in `workdir`, and returns the lines.

  `left`: the fractions of the dense FLOPs that may be left. Raises `ValueError` for an unknown table or method, and
  where another process works in `workdir`. Raises `training.Stopped` where a signal stopped it.
  """
  if table not in TABLES:
    raise errors.unknown('structured', 'table', table, TABLES)
  for name in methods:
    if name not in recipes.STRUCTURED:
      raise errors.unknown('structured', 'method', name, recipes.STRUCTURED)
  place, console, request = pathlib.Path(workdir), training.console(), request or StopRequest()
  sizes, found = sizes or SIZES[table], []
  if table in BY_SEED:
    return _by_seed(table, place, sizes, seeds, console)
  with locked(place) as ledger, console.status('') as status:
    for seed in seeds:
      config, dense = {**engine.facts_of(sizes, table, data_dir), 'seed': seed}, None
      for cell in [CutCell(engine.DENSE, 1.0, seed), *(CutCell(name, part, seed) for part in left for name in methods)]:
        line = ledger.get(cell.place, config)
        if line is None:
          status.update(cell.place)
          dense = dense or Trained(SUBJECTS[table](sizes, data_dir, seed), sizes)
          line = ledger.add(cell.place, {**dense.measured(cell), 'environment': outcomes.environment(),
                                         'config': config})
        found.append(line)
        if request.received:
          raise training.Stopped(cell.place, request)
  pages.show(cuts.page(table, sorted(found, key=lambda line: -line['left'])), place, console)
  return found


def _by_seed(table: str, place: pathlib.Path, sizes: Any, seeds: Sequence[int], console: Any) -> list[Line]:
  """Trains the models of each seed that is not finished, shows the table, and returns the lines."""
  found, (train, page) = [], BY_SEED[table]
  with locked(place) as ledger:
    for seed in seeds:
      config, cell = {'table': table, **sizes._asdict(), 'seed': seed}, f'{table}/seed {seed}'
      found.append(ledger.get(cell, config) or ledger.add(cell, {
        **train(sizes, seed), 'environment': outcomes.environment(), 'config': config}))
  pages.show(page(found), place, console)
  return found


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m experiments.structured', allow_abbrev=False,
                                   description='Cuts trained models and measures dense and cut.')
  parser.add_argument('table', choices=TABLES, help='which model')
  parser.add_argument('--workdir', required=True, help='where finished cells and the table go, and what resumes')
  parser.add_argument('--data_dir', help='where CIFAR-10 or SST-2 is; by default, embedded data')
  parser.add_argument('--methods', default=','.join(METHODS), help='recipes, with commas')
  parser.add_argument('--left', default='0.5,0.7', help='fractions of the FLOPs, with commas')
  parser.add_argument('--seeds', default='0,1,2', help='seeds, with commas')
  for name, kind in (RunSizes.__annotations__ | Canvases.__annotations__ | Replacements.__annotations__).items():
    parser.add_argument(f'--{name}', type=float if kind in (float, 'float') else int, help='see RunSizes')
  parser.add_argument('--traceback', action='store_true', help='show where in the code a refusal comes from')
  return parser.parse_args(arguments)
