"""Shows a sweep: the table of all cells with verdicts, the tuning, the pictures, and a row for each seed.

    pages.show(page(findings, workdir), workdir, console)
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.loop import tasks
from experiments.tables import pages, paired, sweep_pictures

Line = Mapping[str, Any]  # of one cell, see `experiments.sweep.engine`

AXES = ('task', 'data', 'model', 'recipe', 'pattern', 'learning_rate')


class Findings(NamedTuple):
  """A `Findings` holds the lines of all cells of a sweep, in the order of running, and what they were compared by.

  `metric` is `loss` or the name of the score. `overhead` is the time of the engine itself over that of the cells, or
  `None` if no cell ran.
  """

  lines: Sequence[Line]
  metric: str
  baseline: str
  overhead: float | None

  @property
  def tested(self) -> list[Line]:
    """The lines of the tested runs: first the runs of the same steps, then the runs of the same FLOPs."""
    return sorted((line for line in self.lines if line['phase'] != 'tuning'), key=lambda line: line['phase'] == 'flops')

  @property
  def lower_is_better(self) -> bool:
    """Whether a smaller number of the metric is better."""
    return self.metric == 'loss'

  def comparisons(self) -> dict[str, dict[str, Any]]:
    """Returns the comparison of each tested cell with its baseline, by cell, with verdicts that hold all together."""
    found = {}
    for line in self.tested:
      base = self.base(line)
      if base is not None and base is not line and line['status'] == base['status'] == 'done':
        pair = paired.paired(line['scores'][self.metric], base['scores'][self.metric])
        found[line['cell']] = {'baseline': base['cell'], 'difference': pair.difference, 'ci95': pair.half, 'p': pair.p}
    for row, adjusted in zip(found.values(), paired.holm([row['p'] for row in found.values()])):
      row |= {'p_holm': adjusted, 'verdict': paired.verdict(row['difference'], adjusted, self.lower_is_better)}
    return found

  def base(self, line: Line) -> Line | None:
    """Returns the line that `line` is compared with: the baseline of the same setting, or `None` if it did not run.

    The repeat at equal FLOPs of a baseline has the same steps as the baseline itself.
    """
    same = [other for other in self.tested if other['recipe'] == self.baseline and setting(other) == setting(line)
            and other['pattern'] in (None, line['pattern']) and other['learning_rate'] == line['learning_rate']]
    return next((other for other in same if other['phase'] == line['phase']), same[0] if same else None)


def setting(line: Line) -> str:
  """Returns task, data and model of a cell as one text, empty where the sweep has no such axes."""
  return ' '.join(line[axis] for axis in ('task', 'data', 'model') if line[axis])


def page(findings: Findings, workdir: pathlib.Path) -> pages.Page:
  """Returns the page of a sweep: `report.{md,csv,json,html,png}` and further pictures in `workdir`."""
  found = findings.comparisons()
  tables = [_table(columns, findings.tested) for columns in (_verdict_columns(findings, found), _cost_columns())]
  tables += [_tuning_table(findings)] if any(line['phase'] == 'tuning' for line in findings.lines) else []
  data = {'metric': findings.metric, 'baseline': findings.baseline, 'overhead': findings.overhead,
          'comparisons': found, 'lines': list(findings.lines)}
  return pages.Page('report', tables, _notes(findings, found, workdir), data,
                    lambda path: sweep_pictures.heat_map(findings, found, path), rows=list(rows(findings)),
                    pictures=sweep_pictures.pictures(findings), title='Sweep')


def rows(findings: Findings) -> Iterator[dict[str, Any]]:
  """Yields a row for each seed of each cell, and one row for a cell without numbers, for the CSV."""
  names = dict.fromkeys(name for line in findings.lines for name in line.get('scores', {}))
  for line in findings.lines:
    kept = {key: line.get(key) for key in (
        'cell', 'phase', *AXES, 'rate', 'steps', 'split', 'status', 'reason', 'asked', 'achieved', 'training_flops',
        'inference_flops')}
    for i, seed in enumerate(line['seeds'] if line['status'] == 'done' else [None]):
      yield {**kept, 'seed': seed, **{name: line['scores'][name][i] if seed is not None else None for name in names}}


def _verdict_columns(findings: Findings, found: Mapping[str, Mapping[str, Any]]) -> pages.Columns:
  compared = lambda cell: lambda line: cell(found[line['cell']]) if line['cell'] in found else '-'
  return {
      **_name_columns(),
      f'test\n{findings.metric}': lambda line: _spread(line, findings.metric) if line['status'] == 'done' else '-',
      f'minus\n{findings.baseline}': compared(lambda row: _number(row['difference'], row['ci95'], '+')),
      'p\n(Holm)': compared(lambda row: '-' if np.isnan(row['p_holm']) else f'{row["p_holm"]:.2g}'),
      'verdict': lambda line: _verdict(line, found, findings.baseline)}


def _cost_columns() -> pages.Columns:
  done = lambda cell: lambda line: cell(line) if line['status'] == 'done' else '-'
  return {
      **_name_columns(), 'steps': lambda line: f'{line["steps"]}',
      'rate': lambda line: f'{line["rate"]:g}' + ('!' if line.get('tuning', {}).get('edge') else ''),
      'sparsity': done(lambda line: '-' if line['achieved'] is None else f'{line["achieved"]:.1%}'),
      'train\nFLOPs': done(lambda line: f'{line["training_flops"]:.3f}'),
      'infer\nFLOPs': done(lambda line: f'{line["inference_flops"]:.3f}'),
      'seeds': lambda line: f'{len(line["seeds"])}', 'time': done(lambda line: f'{line["seconds"]:.0f} s')}


def _name_columns() -> pages.Columns:
  return {'recipe': lambda line: ' '.join(part for part in (line['recipe'], line['learning_rate']) if part),
          'pattern': lambda line: line['pattern'] or '-'}


def _table(columns: pages.Columns, lines: Sequence[Line]) -> pages.Table:
  """Returns the table of `lines`, with a row that names the setting and the phase above those that share both."""
  heads = lambda line: f'{setting(line)}{" (equal FLOPs)" if line["phase"] == "flops" else ""}'.strip()
  cells = []
  for head in dict.fromkeys(map(heads, lines)):
    cells += [[head, *[''] * (len(columns) - 1)]] if head else []
    cells += pages.table(columns, [line for line in lines if heads(line) == head]).cells
  return pages.Table(list(columns), cells)


def _verdict(line: Line, found: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
  if line['status'] != 'done':
    return line['status']
  return found[line['cell']]['verdict'] if line['cell'] in found else 'baseline' if line['recipe'] == baseline else '-'


def _number(mean: float, half: float, sign: str = '') -> str:
  return f'{mean:{sign}.4f}' + ('' if np.isnan(half) else f' ± {half:.4f}')


def _spread(line: Line, metric: str) -> str:
  return _number(*pages.interval(line['scores'][metric]))


def _tuning_table(findings: Findings) -> pages.Table:
  """Returns the table of the validation metric by learning rate, the best marked."""
  tuned = [line for line in findings.lines if line['phase'] == 'tuning']
  rates = list(dict.fromkeys(line['learning_rate'] for line in tuned))
  arms = dict.fromkeys((setting(line), line['recipe'], line['pattern']) for line in tuned)
  cells = []
  for arm in arms:
    of_arm = {line['learning_rate']: line for line in tuned if (setting(line), line['recipe'], line['pattern']) == arm}
    means = {rate: np.mean(line['scores'][findings.metric]) for rate, line in of_arm.items()
             if line['status'] == 'done'}
    best = (min if findings.lower_is_better else max)(means, key=means.get) if means else None
    cells.append([arm[0] or '-', arm[1], arm[2] or '-', *(
        f'{means[rate]:.4f}{"*" if rate == best else ""}' if rate in means
        else of_arm[rate]['status'] if rate in of_arm else '-' for rate in rates)])
  head = ['setting', 'recipe', 'pattern', *(f'valid {findings.metric}\nat {rate}' for rate in rates)]
  return pages.Table(head, cells)


def _notes(findings: Findings, found: Mapping[str, Any], workdir: pathlib.Path) -> list[str]:
  first = next((line for line in findings.tested if line['status'] == 'done'), None)
  unit = tasks.named(first['metric_task']).loss_unit if first and findings.metric == 'loss' else findings.metric
  notes = [f'Test {findings.metric} ({unit}): mean over the seeds ± its 95 % confidence interval (Student t). '
           f'Differences to {findings.baseline} are taken seed by seed. Verdicts hold together at 5 %: p-values of '
           f'{len(found)} comparisons, adjusted by Holm.',
           'FLOPs: of a training step, all contractions, over dense; the mean over the steps. Rate: peak of the '
           'learning rate' + ('; ! marks a best rate at the edge of the grid: a better one may lie beyond.' if any(
               line.get('tuning', {}).get('edge') for line in findings.tested) else '.'),
           *_budget(findings)]
  if first:
    wall, cpu = (sum(line[key] for line in findings.lines) for key in ('wall', 'cpu'))
    engine = '' if findings.overhead is None else f'; the engine itself added {findings.overhead:.2%}'
    notes.append(f'Trained on {pages.machine(first["environment"])}. {wall:.0f} s ({cpu:.0f} CPU s) for all cells, '
                 f'compilation and tests included{engine}.')
  missing = [line for line in findings.tested if line['status'] != 'done']
  notes += [f'{line["cell"]}: {line["status"]}: {line["reason"]}' for line in missing]
  return [*notes, f'Files in {workdir}: report.html (one file, opens offline), report.md, report.json, report.csv (a '
          'row for each seed), report*.png, cells.jsonl.']


def _budget(findings: Findings) -> list[str]:
  """Returns the sentence on the budget of the tuning, which is the same for every arm of a setting."""
  sentences = []
  for name in dict.fromkeys(map(setting, findings.tested)):
    tuned = [line['tuning'] for line in findings.tested if setting(line) == name and 'tuning' in line]
    if tuned:
      first = tuned[0]
      runs = len(first['rates']) * len(first['seeds'])
      sentences.append(
          f'Tuning{" of " + name if name else ""}: each recipe had the same budget on the validation split: '
          f'{len(first["rates"])} rates ({", ".join(f"{rate:g}" for rate in first["rates"])}) x {len(first["seeds"])} '
          f'seeds of their own x {first["steps"]} steps = {runs * first["steps"]:,} steps. Test was not read.')
  return sentences
