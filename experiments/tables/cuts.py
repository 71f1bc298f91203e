"""Shows models that were cut: accuracy, size and measured speed by method and fraction of the FLOPs.

    pages.show(page('resnet', lines), workdir, console)
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tables import pages
from sparsejax import plot

Line = Mapping[str, Any]  # of one cell, see `experiments.structured.engine`
DETECTORS = ('dense', 'fine-tuned', 'distilled')
NOTE = ('±: half the 95 % interval over the seeds (Student t). Speed-up: the seconds of the dense model over those of '
        'the cut model, the median of interleaved runs on one machine, averaged over the seeds.')


def page(table: str, lines: Sequence[Line]) -> pages.Page:
  """Returns the page of `lines`: `cuts.{md,json,png}`, a row for each method and fraction."""
  rows = [[line for line in lines if (line['method'], line['left']) == key]
          for key in dict.fromkeys((line['method'], line['left']) for line in lines)]
  columns: dict[str, Callable[[Sequence[Line]], str]] = {
      'method': lambda own: own[0]['method'], 'FLOPs asked, %': lambda own: f'{100 * own[0]["left"]:.0f}',
      'accuracy, %': lambda own: _spread(own, 'accuracy', 100, 1), 'parameters': lambda own: _count(own, 'parameters'),
      'FLOPs': lambda own: _count(own, 'flops'), 'bytes': lambda own: _count(own, 'bytes'),
      'speed-up': lambda own: _spread(own, 'speed-up', 1, 2), 'seeds': lambda own: str(len(own))}
  machines = dict.fromkeys(f'Ran on {pages.machine(line["environment"])}.' for line in lines)
  facts = dict.fromkeys(', '.join(f'{key}: {value}' for key, value in line['config'].items() if key != 'seed') + '.'
                        for line in lines)
  return pages.Page('cuts', [pages.table(columns, rows)], [*facts, *machines, NOTE],
                    {'table': table, 'cells': [dict(line) for line in lines]}, lambda path: draw(rows, path))


def detector_page(lines: Sequence[Line]) -> pages.Page:
  """Returns the page of pruned detectors: `cuts.{md,json,png}`, a row for each model."""
  rows = [[line[name] for line in lines] for name in DETECTORS]
  columns: dict[str, Callable[[Any], str]] = {
      'detector': lambda own: DETECTORS[rows.index(own)], 'AP50, %': lambda own: _spread(own, 'AP50', 100, 1),
      'parameters': lambda own: _count(own, 'parameters'), 'seeds': lambda own: str(len(own))}
  machines = dict.fromkeys(f'Ran on {pages.machine(line["environment"])}.' for line in lines)
  facts = dict.fromkeys(', '.join(f'{key}: {value}' for key, value in line['config'].items() if key != 'seed') + '.'
                        for line in lines)
  return pages.Page('cuts', [pages.table(columns, rows)], [*facts, *machines],
                    {'cells': [dict(line) for line in lines]}, lambda path: _draw_bars(lines, DETECTORS, 'AP50', path))


def replaced_page(lines: Sequence[Line]) -> pages.Page:
  """Returns the page of networks that replace a dense one: `cuts.{md,json,png}`, a row for each network."""
  names = [name for name, own in lines[0].items() if isinstance(own, Mapping) and 'multiply-adds' in own]
  gain = lambda name: [{'accuracy': line[name]['accuracy'] - line['dense']['accuracy']} for line in lines]
  columns: dict[str, Callable[[Any], str]] = {
      'network': str, 'accuracy, %': lambda name: _spread([line[name] for line in lines], 'accuracy', 100, 1),
      'over dense, points': lambda name: '0' if name == 'dense' else _spread(gain(name), 'accuracy', 100, 1),
      'multiply-adds': lambda name: _count([line[name] for line in lines], 'multiply-adds'),
      'seeds': lambda name: str(len(lines))}
  machines = dict.fromkeys(f'Ran on {pages.machine(line["environment"])}.' for line in lines)
  facts = dict.fromkeys(', '.join(f'{key}: {value}' for key, value in line['config'].items() if key != 'seed') + '.'
                        for line in lines)
  return pages.Page('cuts', [pages.table(columns, names)], [*facts, *machines],
                    {'cells': [dict(line) for line in lines]}, lambda path: _draw_bars(lines, names, 'accuracy', path))


def _draw_bars(lines: Sequence[Line], names: Sequence[str], score: str, path: pathlib.Path) -> None:
  with plot.saved(path, 1, 1, figsize=(5, 4)) as axes:
    (axis,) = axes.flat
    axis.bar(names, [100 * float(np.mean([line[name][score] for line in lines])) for name in names])
    axis.set_ylabel(f'{score}, %')


def draw(rows: Sequence[Sequence[Line]], path: pathlib.Path) -> None:
  """Draws the accuracy over the speed-up, a curve for each method."""
  with plot.saved(path, 1, 1, figsize=(6, 4.5)) as axes:
    (axis,) = axes.flat
    mean = lambda own, name: float(np.mean([line[name] for line in own]))
    for method in dict.fromkeys(own[0]['method'] for own in rows):
      mine = [own for own in rows if own[0]['method'] == method]
      axis.plot([mean(own, 'speed-up') for own in mine], [100 * mean(own, 'accuracy') for own in mine], marker='o',
                label=method)
    axis.set_xlabel('speed-up over dense')
    axis.set_ylabel('accuracy, %')
    axis.legend(fontsize='small')


def _spread(lines: Sequence[Line], name: str, scale: float, digits: int) -> str:
  mean, half = (scale * x for x in pages.interval(np.array([line[name] for line in lines])))
  return f'{mean:.{digits}f}' + (f' ± {half:.{digits}f}' if np.isfinite(half) else '')


def _count(lines: Sequence[Line], name: str) -> str:
  return f'{np.mean([line[name] for line in lines]):,.0f}'
