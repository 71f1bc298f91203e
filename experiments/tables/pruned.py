"""Shows pruned copies of one model: a table of recipe by pattern, with intervals over the held-out examples.

    pages.show(page('encoder', lines, workdir), workdir, console)
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tables import pages
from sparsejax import plot
from sparsejax.post_training import essential_sparsity

Line = Mapping[str, Any]  # of one cell, see `experiments.pruning.engine`
NOTE = ('±: half the 95 % interval over the held-out examples (Student t), of one model and one draw of the '
        'calibration data. To dense: the difference to the dense model, example by example. Before and after: the '
        'squared change of the product of a matrix over the squared product, on the calibration rows, before and after '
        'repair; the mean over the matrices. Rows: the least number of calibration rows of a matrix. CPU s: of '
        'pruning.')


class Metric(NamedTuple):
  """A `Metric` is a column of the table: the name of the scores, the unit, and how a mean becomes a text."""

  head: str
  scale: float
  differs: bool  # whether a column with the difference to the dense model follows


METRICS: dict[str, dict[str, Metric]] = {
    'encoder': {'cosine': Metric('cosine', 1, False), 'accuracy': Metric('probe, %', 100, True)},
    'decoder': {'nats': Metric('nats a byte', 1, True)}}
METRICS['quantised'] = METRICS['essential'] = METRICS['encoder']


def page(table: str, lines: Sequence[Line], workdir: pathlib.Path) -> pages.Page:
  """Returns the page of `lines`, cells of one table: `pruned.{md,json,png}` in `workdir`."""
  dense = {line['seed']: line for line in lines if not line['pattern']}
  done = [line for line in lines if line['status'] == 'done']
  columns: dict[str, Callable[[Line], str]] = {
      'recipe': lambda line: line['recipe'], 'pattern': lambda line: line['pattern'] or '-'}
  if len(dense) > 1:
    columns['seed'] = lambda line: str(line['seed'])
  for name, metric in METRICS[table].items():
    columns |= _columns(name, metric, dense)
  if table == 'decoder':
    columns['perplexity'] = lambda line: f'{np.exp(np.mean(line["scores"]["nats"])):.3f}'
  if table == 'quantised':
    del columns['pattern']
    columns |= {'bits a weight': lambda line: f'{line["bits"]:.2f}' if 'bits' in line else '-',
                'file, %': lambda line: f'{100 * line["file"]:.1f}' if 'file' in line else '-'}
  else:
    columns |= {'before': lambda line: _number(line, 'before'), 'after': lambda line: _number(line, 'after'),
                'rows': lambda line: str(line.get('rows', '-'))}
  columns['CPU s'] = lambda line: f'{line["cpu"]:.0f}'
  notes = [*_facts(done), *_essential(table, done), NOTE, *_refused(lines)]
  return pages.Page('pruned', [pages.table(columns, done)], notes,
                    {'table': table, 'cells': [dict(line) for line in lines]},
                    lambda path: draw(table, done, path))


def announced(table: str, line: Line) -> str:
  """Returns the line of a cell that is finished now as one sentence."""
  if line['status'] != 'done':
    return f'{line["cell"]}: refused: {line["reason"]}'
  scores = ', '.join(f'{metric.head} {metric.scale * np.mean(line["scores"][name]):.4g}'
                     for name, metric in METRICS[table].items())
  return f'{line["cell"]}: {scores}, {line["cpu"]:.0f} CPU s'


def draw(table: str, lines: Sequence[Line], path: pathlib.Path) -> None:
  """Draws each metric over the sparsity, a curve for each recipe, or over the bits; the dense model is a line."""
  across = 'bits' if table == 'quantised' else 'achieved'
  with plot.saved(path, 1, len(METRICS[table]), figsize=(6 * len(METRICS[table]), 4.5)) as axes:
    for axis, (name, metric) in zip(axes.flat, METRICS[table].items()):
      mean = lambda line, name=name, scale=metric.scale: scale * np.mean(line['scores'][name])
      for recipe in dict.fromkeys(line['recipe'] for line in lines if line['pattern']):
        own = [line for line in lines if line['recipe'] == recipe and ':' not in line['pattern']]
        plot.trade_off([line[across] for line in own], list(map(mean, own)), axis=axis, linestyle='-', label=recipe)
      for line in lines:
        if not line['pattern']:
          axis.axhline(mean(line), color='gray', linestyle=':')
      axis.set_xlabel('bits a weight' if table == 'quantised' else 'sparsity')
      axis.set_ylabel(metric.head)
      axis.legend(fontsize='small')


def _columns(name: str, metric: Metric, dense: Mapping[int, Line]) -> dict[str, Callable[[Line], str]]:
  """Returns the columns of one metric: the mean, and the difference to the dense model of the same seed."""
  scores = lambda line: np.asarray(line['scores'][name])
  difference = lambda line: _spread(scores(line) - scores(dense[line['seed']]), metric.scale, '+')
  columns = {metric.head: lambda line: _spread(scores(line), metric.scale)}
  return columns | ({'to dense': lambda line: difference(line) if line['pattern'] else '-'} if metric.differs else {})


def _spread(values: np.ndarray, scale: float, sign: str = '') -> str:
  mean, half = (scale * x for x in pages.interval(values))
  digits = 1 if scale > 1 else 3
  return f'{mean:{sign}.{digits}f} ± {half:.{digits}f}'


def _number(line: Line, name: str) -> str:
  return f'{line[name]:.4f}' if name in line else '-'


def _facts(lines: Sequence[Line]) -> list[str]:
  """Returns sentences on data, sizes and machine, each once."""
  told = [', '.join(f'{key}: {value}' for key, value in line['facts'].items()) + '.' for line in lines]
  machines = [f'Ran on {pages.machine(line["environment"])}.' for line in lines]
  return [*dict.fromkeys(told), *dict.fromkeys(machines)]


def _essential(table: str, lines: Sequence[Line]) -> list[str]:
  """Returns a sentence for each metric and seed: the essential sparsity, and where the metric drops."""
  told = []
  for seed in dict.fromkeys(line['seed'] for line in lines if table == 'essential'):
    own = sorted((line for line in lines if line['seed'] == seed), key=_sparsity)
    for name, metric in METRICS[table].items():
      means = {_sparsity(line): float(np.mean(line['scores'][name])) for line in own}
      found = essential_sparsity(lambda sparsity: sparsity, means.__getitem__, list(means)[1:])
      drop = 'no drop' if found.drop is None else f'the drop at {found.drop}'
      told.append(f'{metric.head}, seed {seed}: within 1 % of the dense model up to sparsity {found.sparsity}, {drop}.')
  return told


def _sparsity(line: Line) -> float:
  return float(line['pattern'] or 0)


def _refused(lines: Sequence[Line]) -> list[str]:
  return [f'{line["cell"]}: refused: {line["reason"]}' for line in lines if line['status'] == 'refused']
