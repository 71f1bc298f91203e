"""Draws sparsities, matrices, curves over steps, trade-offs and intervals. Needs matplotlib, which `import` leaves out.

    with plot.saved('training.png', 1, 2) as axes:
      plot.sparsity(sj.report(params, state), axes[0, 0])
      plot.over_steps(records, 'flips', axes[0, 1], label='SR-STE')

Each function draws on the matplotlib axes that it is given, and returns the axes. Without axes, it draws on the current
axes of pyplot, as in a notebook.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparsejax.arguments import checked
from sparsejax.types import Array, Schedule

__all__ = ['intervals', 'matrix', 'over_steps', 'palette', 'saved', 'schedule', 'sparsity', 'trade_off']

MISSING = "sparsejax.plot: matplotlib cannot be imported. Run: pip install 'sparsejax[plot]'"
KEPT, PRUNED, ZERO = '#1f3b5c', '#f2f0ea', '#c9c6be'


@checked
@contextlib.contextmanager
def saved(path: str | os.PathLike[str], rows: int = 1, columns: int = 1, *, dpi: float = 120,
          **options: Any) -> Iterator[Any]:
  """Yields the axes of a new figure, `[rows, columns]`, each with a grid, and then saves the figure at `path`.

  `options` go to `Figure.subplots` and `Figure`: `figsize` in inches, `height_ratios`, `sharex` and others. Neither
  pyplot nor its backend is touched. Raises `ImportError` if matplotlib is missing.
  """
  figure_class = _figure_class()
  own = {name: options.pop(name) for name in ('figsize', 'facecolor') if name in options}
  figure = figure_class(layout='constrained', **own)
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for axis in axes.flat:
    axis.grid(alpha=0.3)
  yield axes
  figure.savefig(path, dpi=dpi)


@checked
def sparsity(report: Any, axis: Any = None) -> Any:
  """Draws one bar a parameter, the achieved sparsity, with a mark at the sparsity that was asked.

  `report` is that of `sj.report`, of `sj.check`, or of a result of `sj.prune`.
  Sparsities are fractions of zeros, from 0 to 1. A parameter that breaks its pattern has a red bar.
  """
  axis, rows = _axes(axis), report.rows
  places = np.arange(len(rows))
  colours = ['tab:red' if getattr(row, 'problem', '') else KEPT for row in rows]
  axis.barh(places, [row.achieved for row in rows], color=colours)
  asked = [(place, row.asked) for place, row in zip(places, rows) if row.asked is not None]
  axis.plot([share for _, share in asked], [place for place, _ in asked], '|', color='tab:orange', markersize=18,
            markeredgewidth=3)
  axis.set_yticks(places, [row.path for row in rows])
  axis.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel='sparsity (bar: achieved, mark: asked)')
  return axis


@checked
def matrix(w: Array, axis: Any = None, *, limit: float | None = None) -> Any:
  """Draws a mask or weights as a picture, one pixel an entry; leading axes are joined to rows.

  A mask (`bool`) is dark where weights are kept. Weights are red above zero and blue below, and exact zeros are grey.
  `limit` is the absolute value of the darkest colour, by default the largest in `w`.
  """
  axis, values = _axes(axis), np.asarray(w)
  values = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
  if values.dtype == bool:
    shown, options = values, {'cmap': _colours([PRUNED, KEPT]), 'vmin': 0, 'vmax': 1}
  else:
    values = values.astype(np.float64)
    limit = limit or float(np.nanmax(np.abs(values), initial=0)) or 1.0
    shown = np.ma.masked_equal(values, 0.0)
    options = {'cmap': 'RdBu_r', 'vmin': -limit, 'vmax': limit}
  axis.imshow(shown, aspect='equal', interpolation='nearest', **options)
  axis.set(xticks=[], yticks=[], facecolor=ZERO)
  axis.grid(False)
  return axis


@checked
def over_steps(records: Iterable[Mapping[str, Any]], key: str, axis: Any = None, *, window: int = 1, band: bool = True,
               **style: Any) -> Any:
  """Draws a recorded quantity over the steps: the mean over the seeds, in a band from the lowest to the highest seed.

  A record maps `'step'` to a number and `key` to a number or to an array `[seeds]`. Records that lack the key, or hold
  `None`, are left out. `window`: the number of records in a running average, at most a fifth of all. `style` goes to
  `plot`. Without any record nothing is drawn.
  """
  axis = _axes(axis)
  kept = [(record['step'], np.atleast_1d(np.asarray(record.get(key)))) for record in records]
  kept = [(step, values) for step, values in kept if None not in values.tolist()]
  if not kept:
    return axis
  steps, values = np.array([step for step, _ in kept]), np.array([v for _, v in kept], np.float64)
  window = min(window, max(1, len(steps) // 5))
  average = lambda column: np.convolve(column, np.ones(window) / window, 'valid')
  line, = axis.plot(steps[window - 1:], average(values.mean(1)), **style)
  if band and values.shape[1] > 1:
    axis.fill_between(steps[window - 1:], average(values.min(1)), average(values.max(1)), color=line.get_color(),
                      alpha=0.15, linewidth=0)
  return axis


@checked
def schedule(value: Schedule, steps: int, axis: Any = None, **style: Any) -> Any:
  """Draws a schedule, a function of the step, from step 0 to `steps`."""
  axis, at = _axes(axis), np.unique(np.linspace(0, steps, 200).astype(int))
  axis.plot(at, [float(value(int(step))) for step in at], **style)
  axis.set_xlabel('step')
  return axis


@checked
def trade_off(costs: Sequence[float] | float, means: Sequence[float] | float,
              halves: Sequence[float] | float | None = None, axis: Any = None, **style: Any) -> Any:
  """Draws points of quality against cost, each with a bar of half an interval, `halves`, up and down.

  Without `halves`, and where they are NaN, as of a single seed, no bar is drawn. `style` goes to `errorbar`;
  `linestyle='-'` joins the points.
  """
  axis = _axes(axis)
  axis.errorbar(costs, means, yerr=None if halves is None else np.nan_to_num(np.asarray(halves, np.float64)), **{
      'fmt': 'o', 'linestyle': '', 'capsize': 3, **style})
  return axis


@checked
def intervals(names: Sequence[str], values: Sequence[float], ends: Sequence[tuple[float, float]], axis: Any = None, *,
              colours: Sequence[str] | None = None, marks: Sequence[str] | None = None,
              bars: Sequence[float] | None = None) -> Any:
  """Draws one row a name, from the top: a mark at the value, and a line from one end of its interval to the other.

  `bars` are the values that the rows are compared to, each a short vertical line. `colours` and `marks` are
  matplotlib's, one for each row.
  """
  axis = _axes(axis)
  for place, (value, (low, high)) in enumerate(zip(values, ends)):
    colour = colours[place] if colours else KEPT
    axis.plot(np.nan_to_num([low, high], nan=value), [place, place], color=colour, linewidth=2)
    axis.plot(value, place, marks[place] if marks else 'o', color=colour)
    if bars:
      axis.plot([bars[place]] * 2, [place - 0.5, place + 0.5], color='black', linewidth=1)
  axis.set_yticks(range(len(names)), names)
  axis.set_ylim(len(names) - 0.5, -0.5)
  axis.grid(False, axis='y')
  return axis


@checked
def palette(names: Iterable[str]) -> dict[str, tuple[Any, str]]:
  """Returns a colour and a style of line for each name: ten colours, and then the same in dashes and in dots."""
  _figure_class()
  import matplotlib
  colours = matplotlib.colormaps['tab10']
  return {name: (colours(i % 10), ('-', '--', ':')[i // 10 % 3]) for i, name in enumerate(names)}


def _axes(axis: Any) -> Any:
  if axis is not None:
    return axis
  _figure_class()
  from matplotlib import pyplot
  return pyplot.gca()


def _figure_class() -> Any:
  """Returns matplotlib's `Figure`. The import takes a second, which only pictures need."""
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(MISSING) from error
  return Figure


def _colours(names: Sequence[str]) -> Any:
  from matplotlib.colors import ListedColormap
  return ListedColormap(list(names))
