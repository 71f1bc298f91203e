"""Shows one model with sparse attention or activations: a table of rule by sparsity, and quality over bytes.

Each score also stands as its difference to the dense model, paired by example: the examples of one model differ far
more from one another than two rules differ on one example.

    pages.show(page('decoder', lines), workdir, console)
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tables import pages
from sparsejax import plot

Line = Mapping[str, Any]  # of one cell, see `experiments.frontier.engine`
ENCODER = {'cosine': 'cosine', 'accuracy': 'probe'}
SCORES = {'activation': ENCODER, 'encoder': ENCODER, 'decoder': {'nats': 'nats a byte', 'needle': 'needle'}}
DENSE = 'dense'
SPREAD = ('±: half the 95 % interval over the held-out examples (Student t), of one model and one draw of the data. '
          'Over dense: the difference to the dense model, example by example.')
ATTENTION = (f'{SPREAD} Achieved: the fraction of pairs of tokens that are not read. MB and GFLOP: of attention, for '
             'one sequence, by formula. Seconds: of one sequence, on a machine that was not idle. Needle: nats a byte '
             'of a passage that stood at the beginning of the window.')
ACTIVATION = (f'{SPREAD} Achieved: the fraction of inputs that a token skips, of the weights that the rule makes '
              'sparse, on held-out sentences with all products sparse. ppl is asked for a tenth of the sparsity, as a '
              'rise of the perplexity. Blocks: the fraction of blocks of 16 inputs that a token reads. MB: what one '
              'token reads of the matrices of all layers, from the compiled product in blocks. The product that the '
              'library chooses at this size is dense and reads all. GFLOP: of the inputs that are left.')
NOTES = {'activation': ACTIVATION, 'encoder': ATTENTION, 'decoder': ATTENTION}
READS = {'activation': 'MB of weights that one token reads', 'encoder': 'MB that attention reads',
         'decoder': 'MB that attention reads'}


def page(table: str, lines: Sequence[Line]) -> pages.Page:
  """Returns the page of `lines`, cells of one table: `frontier.{md,json,png}`."""
  columns: dict[str, Callable[[Line], str]] = {
      'rule': lambda line: line['rule'], 'sparsity': lambda line: f'{line["sparsity"]:g}',
      'achieved': lambda line: f'{line["achieved"]:.3f}'}
  if table == 'activation':
    columns['blocks'] = lambda line: f'{line["blocks"]:.3f}'
  dense = [line for line in lines if line['rule'] == DENSE]
  for name, head in SCORES[table].items():
    columns[head] = lambda line, name=name: '{:.4f} ± {:.4f}'.format(*pages.interval(np.asarray(line['scores'][name])))
    if dense:
      columns[f'{head} over dense'] = functools.partial(_told_over, dense=dense[0], name=name)
  if table == 'decoder':
    columns['perplexity'] = lambda line: f'{np.exp(np.mean(line["scores"]["nats"])):.3f}'
  columns |= {'MB': lambda line: f'{line["bytes"] / 1e6:.2f}', 'GFLOP': lambda line: f'{line["flops"] / 1e9:.3f}'}
  if all('cpu' in line for line in lines):
    columns |= {'CPU s': lambda line: f'{line["cpu"]:.4f}', 'wall s': lambda line: f'{line["wall"]:.4f}'}
  told = dict.fromkeys(', '.join(f'{key}: {value}' for key, value in line['facts'].items()) + '.' for line in lines)
  machines = dict.fromkeys(f'Ran on {pages.machine(line["environment"])}.' for line in lines)
  return pages.Page('frontier', [pages.table(columns, lines)], [*told, *machines, NOTES[table]],
                    {'table': table, 'cells': [dict(line) for line in lines]}, lambda path: draw(table, lines, path))


def announced(table: str, line: Line) -> str:
  """Returns the line of a cell that is finished now as one sentence."""
  scores = ', '.join(f'{head} {np.mean(line["scores"][name]):.4g}' for name, head in SCORES[table].items())
  return f'{line["cell"]}: {scores}, {line["achieved"]:.2f} not read, {line["bytes"] / 1e6:.2f} MB'


def _over(line: Line, dense: Line, name: str) -> tuple[float, float]:
  """Returns the mean difference of a score to that of the dense model, and half of its 95 % interval."""
  return pages.interval(np.subtract(line['scores'][name], dense['scores'][name]))


def _told_over(line: Line, dense: Line, name: str) -> str:
  return '-' if line['rule'] == DENSE else '{:+.4f} ± {:.4f}'.format(*_over(line, dense, name))


def draw(table: str, lines: Sequence[Line], path: pathlib.Path) -> None:
  """Draws each score's difference to the dense model over the megabytes that are read, a curve for each rule.

  Lines without a dense model among them are drawn with their scores.
  """
  dense = next((line for line in lines if line['rule'] == DENSE), None)
  with plot.saved(path, 1, len(SCORES[table]), figsize=(6 * len(SCORES[table]), 4.5)) as axes:
    for axis, (name, head) in zip(axes.flat, SCORES[table].items()):
      for rule in dict.fromkeys(line['rule'] for line in lines):
        own = [line for line in lines if line['rule'] == rule]
        means, halves = zip(*(_over(line, dense, name) if dense else pages.interval(np.asarray(line['scores'][name]))
                              for line in own))
        if rule == DENSE:
          axis.axhline(0.0, color='gray', linestyle=':', label=f'dense, {own[0]["bytes"] / 1e6:,.2f} MB')
        else:
          plot.trade_off([line['bytes'] / 1e6 for line in own], means, halves, axis=axis, linestyle='-', label=rule)
      axis.set_xlabel(READS[table])
      axis.set_ylabel(f'{head}, over dense' if dense else head)
      axis.legend(fontsize='small')
