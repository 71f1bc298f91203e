"""Draws a sweep: a heat map of recipes by patterns, quality against training FLOPs, and the curves of each setting."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tables import pages
from sparsejax import plot

Line = Mapping[str, Any]

MARKERS = 'osD^vP*X<>hp'
LABEL = {'facecolor': 'white', 'alpha': 0.6, 'linewidth': 0, 'boxstyle': 'round,pad=0.2'}  # legible on dark colours
WINDOW = 40  # records of a running average of the gradient noise, as in progressive gradient flow
# The keys of a record, the title above its panel, whether the axis is logarithmic, and the running average in records.
QUALITY = {True: ('valid', 'validation', False, 1), False: ('loss', 'training loss', False, WINDOW)}
FEW = 3  # records of the validation, below which they are no curve
CURVES = (
    ('flips', 'mask entries flipped by a step, fraction', True, 1),
    ('noise_received', 'variance of |gradient| that Adam receives', True, WINDOW),
    ('second_moment', "variance of Adam's second moment", True, WINDOW))


def pictures(findings: Any) -> list[pages.Picture]:
  """Returns the picture of quality against FLOPs, and one picture of the curves for each setting."""
  made = [pages.Picture('tradeoff', f'Test {findings.metric} against the FLOPs of the whole training, over those of '
                        'dense training at the tested steps. Bars: 95 % intervals. Hollow: at equal FLOPs.',
                        functools.partial(_trade_off, findings))]
  for name, lines in _settings(findings).items():
    if any(line['status'] == 'done' for line in lines):
      stem = '-'.join(['curves', *name.split()])
      made.append(pages.Picture(stem, f'Over the steps{" of " + name if name else ""}, means of the seeds, one row a '
                                'pattern. Noise: geometric mean over the layers that the config names, running average '
                                f'over up to {WINDOW} records.', functools.partial(_curves, findings, lines)))
  return made


def heat_map(findings: Any, found: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws one panel a setting: the test metric of each recipe and pattern, coloured by its difference to the baseline.

  Blue is better than the baseline and red is worse. A star marks a verdict, and grey a cell without numbers.
  """
  settings = _settings(findings)
  height = sum(1.2 + 0.32 * len(_recipes(lines)) for lines in settings.values())
  widest = max(len(_patterns(lines)) for lines in settings.values())
  with plot.saved(path, len(settings), 1, figsize=(3.5 + 1.3 * widest, max(2.5, height))) as axes:
    for axis, (name, lines) in zip(axes[:, 0], settings.items()):
      _heat(axis, findings, found, lines)
      axis.set_title(f'{name} test {findings.metric}'.strip() + f', colour: minus {findings.baseline}', loc='left',
                     fontsize='medium')


def _heat(axis: Any, findings: Any, found: Mapping[str, Mapping[str, Any]], lines: Sequence[Line]) -> None:
  recipes, patterns = _recipes(lines), _patterns(lines)
  colours = np.full((len(recipes), len(patterns)), np.nan)
  for line in lines:
    if line['phase'] != 'test':
      continue
    place = recipes.index(_label(line)), patterns.index(line['pattern'] or 'any')
    row = found.get(line['cell'], {})
    if line['status'] == 'done':
      colours[place] = row.get('difference', 0.0 if line['recipe'] == findings.baseline else np.nan)
      text = f'{np.mean(line["scores"][findings.metric]):.3f}'
      text += '*' if row.get('verdict') in ('better', 'worse') else ''
    else:
      text = line['status']
    axis.text(place[1], place[0], text, ha='center', va='center', fontsize='small', bbox=LABEL)
  limit = np.nanmax(np.abs(colours), initial=0) or 1.0
  axis.set_facecolor('0.85')
  axis.imshow(colours, cmap='RdBu_r' if findings.lower_is_better else 'RdBu', vmin=-limit, vmax=limit, aspect='auto',
              alpha=0.75)
  axis.set_xticks(range(len(patterns)), patterns)
  axis.set_yticks(range(len(recipes)), recipes)
  axis.grid(False)


def _trade_off(findings: Any, path: pathlib.Path) -> None:
  settings = _settings(findings)
  with plot.saved(path, 1, len(settings), figsize=(1.5 + 6 * len(settings), 5)) as axes:
    for axis, (name, lines) in zip(axes[0], settings.items()):
      colours, patterns = plot.palette(_recipes(lines)), _patterns(lines)
      longest = max(line['steps'] for line in lines if line['phase'] == 'test')
      for line in lines:
        if line['status'] == 'done':
          mean, half = pages.interval(line['scores'][findings.metric])
          plot.trade_off(line['training_flops'] * line['steps'] / longest, mean, half, axis,
                         fmt=MARKERS[patterns.index(line['pattern'] or 'any') % len(MARKERS)],
                         color=colours[_label(line)][0], fillstyle='none' if line['phase'] == 'flops' else 'full')
      handles = [axis.plot([], [], 's', color=colour, label=label)[0] for label, (colour, _) in colours.items()]
      handles += [axis.plot([], [], MARKERS[i % len(MARKERS)], color='grey', label=pattern)[0]
                  for i, pattern in enumerate(patterns)]
      axis.legend(handles=handles, fontsize='x-small', ncols=2)
      axis.set(title=name, xlabel='training FLOPs, relative', ylabel=f'test {findings.metric}')


def _curves(findings: Any, lines: Sequence[Line], path: pathlib.Path) -> None:
  """Draws one row a pattern; runs without a pattern, such as dense ones, are in every row."""
  done = [line for line in lines if line['status'] == 'done' and line['phase'] == 'test']
  shared = [line for line in done if line['pattern'] is None]
  patterns = [pattern for pattern in _patterns(done) if pattern != 'any'] or ['any']
  colours, quality = plot.palette(_recipes(lines)), f'valid_{findings.metric}'
  validated = min((len(_records(line['curve'], quality, False)) for line in done), default=0) >= FEW
  panels = (QUALITY[validated], *CURVES)
  with plot.saved(path, len(patterns), len(panels), figsize=(4.5 * len(panels), 3.2 * len(patterns) + 0.5)) as axes:
    for row, pattern in zip(axes, patterns):
      of_row = shared + [line for line in done if line['pattern'] == pattern]
      for axis, (key, title, logarithmic, window) in zip(row, panels):
        key = quality if key == 'valid' else key
        for line in of_row:
          colour, style = colours[_label(line)]
          plot.over_steps(_records(line['curve'], key, logarithmic), key, axis, window=window, color=colour,
                          linestyle=style, label=_label(line), linewidth=1.2)
        axis.set_title(f'{pattern}: {title}' if axis is row[0] else title, fontsize='medium')
        if logarithmic and axis.lines:
          axis.set_yscale('log')
      _from_the_tenth(row[0], findings.lower_is_better or not validated)
    axes[0, 0].legend(fontsize='x-small')
    for axis in axes[-1]:
      axis.set_xlabel('step')


def _records(curve: Mapping[str, Any], key: str, positive: bool) -> list[dict[str, Any]]:
  """Returns one record for each number of a curve; with `positive`, without those that have no logarithm."""
  return [{'step': step, key: value} for step, value in zip(curve['step'], curve.get(key, ()))
          if value is not None and (value > 0 or not positive)]


def _from_the_tenth(axis: Any, lower_is_better: bool) -> None:
  """Leaves the first steps out of the range of the axis, which would squeeze the later steps."""
  values = np.concatenate([line.get_ydata() for line in axis.lines]) if axis.lines else ()
  if len(values) > 10:
    cut = np.quantile(values, 0.9 if lower_is_better else 0.1)
    axis.set_ylim(**{'top' if lower_is_better else 'bottom': cut})


def _settings(findings: Any) -> dict[str, list[Line]]:
  """Returns the tested lines by the name of their setting."""
  settings: dict[str, list[Line]] = {}
  for line in findings.tested:
    name = ' '.join(line[axis] for axis in ('task', 'data', 'model') if line[axis])
    settings.setdefault(name, []).append(line)
  return settings


def _label(line: Line) -> str:
  return ' '.join(part for part in (line['recipe'], line['learning_rate']) if part)


def _recipes(lines: Sequence[Line]) -> list[str]:
  return list(dict.fromkeys(map(_label, lines)))


def _patterns(lines: Sequence[Line]) -> list[str]:
  """Returns the patterns in the order of the sparsity that was asked, and `any` first."""
  asked = {line['pattern'] or 'any': -1.0 if line['pattern'] is None else line.get('asked') or 0.0 for line in lines}
  return sorted(asked, key=asked.get)
