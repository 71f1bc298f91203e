"""All runs side by side: a table on the terminal, as Markdown, CSV and JSON, and a picture of how they got there."""

import csv
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import rich.box
import rich.console
import rich.table
import scipy.stats

from experiments.loop import records, tasks

HEAD = ('run', 'test\n{} {}', 'difference', 'test\nloss', 'sparsity\nasked', 'sparsity\nachieved', 'train\nFLOPs',
        'infer\nFLOPs', 'time')  # with the cells just 80 columns
FILES = ('run', 'parameters', 'checkpoint', 'packed file', 'sparse part', 'packed', 'predictions')


def interval(values: Sequence[float]) -> tuple[float, float]:
  """The mean and half the 95 % confidence interval, by Student's t over the seeds; NaN for fewer than two."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return float(values.mean()), float('nan')
  spread = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(spread)


def rows(outcomes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row of numbers a run. Differences are seed by seed to the first run, the baseline."""
  name = _task(outcomes).name
  base = np.array(outcomes[0]['test'][name])
  table = []
  for outcome in outcomes:
    score, score_ci = interval(outcome['test'][name])
    difference, difference_ci = interval(np.array(outcome['test'][name]) - base)
    loss, loss_ci = interval(outcome['test']['loss'])
    table.append({
        'run': outcome['name'], name: score, f'{name}_ci95': score_ci, 'difference': difference,
        'difference_ci95': difference_ci, 'loss': loss, 'loss_ci95': loss_ci, 'asked': outcome['asked'],
        'achieved': outcome['achieved'], 'training_flops': outcome['training_flops'],
        'inference_flops': outcome['inference_flops'], 'seconds': outcome['seconds']})
  return table


def show(outcomes: Sequence[dict[str, Any]], workdir: pathlib.Path, console: rich.console.Console) -> None:
  """Prints the tables of scores and of files; writes `results.{md,csv,json,png}` in `workdir`."""
  table, notes, task = rows(outcomes), _notes(outcomes, workdir), _task(outcomes)
  head = [name.format(task.name, task.unit) for name in HEAD]
  tables = [(head, [_cells(task, i, row) for i, row in enumerate(table)]), (FILES, list(map(_files, outcomes)))]
  for head, cells in tables:
    console.print('', drawn(head, cells))
  console.print('\n' + '\n'.join(notes), markup=False, highlight=False, soft_wrap=True)
  written = [*(markdown(head, cells) for head, cells in tables), '\n'.join(f'- {note}' for note in notes)]
  records.write_whole(workdir / 'results.md', '\n\n'.join(written) + '\n')
  results = {'rows': table, 'outcomes': [{k: v for k, v in o.items() if k != 'directory'} for o in outcomes]}
  records.write_whole(workdir / 'results.json', json.dumps(strict(results), indent=2) + '\n')
  with (workdir / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)
  draw(outcomes, workdir / 'results.png')


def _task(outcomes: Sequence[dict[str, Any]]) -> tasks.Task:
  return tasks.named(outcomes[0].get('task', 'classification'))  # there was no other


def drawn(head: Sequence[str], cells: Sequence[Sequence[str]]) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False)
  for i, name in enumerate(head):
    table.add_column(name, justify='right' if i else 'left', no_wrap=True)
  for line in cells:
    table.add_row(*line)
  return table


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  head = [name.replace('\n', ' ') for name in head]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (head, ['---'] * len(head), *cells))


def _cells(task: tasks.Task, place: int, row: dict[str, Any]) -> list[str]:
  share = lambda x: '-' if x is None else f'{x:.2%}'
  return [
      row['run'], spread(task.scale, row[task.name], row[f'{task.name}_ci95']),
      'baseline' if place == 0 else spread(task.scale, row['difference'], row['difference_ci95'], '+'),
      f'{row["loss"]:.4f}', share(row['asked']), share(row['achieved']),
      f'{row["training_flops"]:.3f}', f'{row["inference_flops"]:.3f}', f'{row["seconds"]:.0f} s']


def spread(scale: float, mean: float, ci: float, sign: str = '') -> str:
  """A mean and half its interval, `scale` times as large; the mean alone where there is no interval."""
  return f'{scale * mean:{sign}.2f}' + ('' if np.isnan(ci) else f' ± {scale * ci:.2f}')


def _files(outcome: dict[str, Any]) -> list[str]:
  saved, packed = outcome['checkpoint'], outcome['packed']
  first = [outcome['name'], f'{saved["dense_bytes"]:,}', f'{saved["bytes"]:,}']
  if packed is None:
    return first + ['-'] * (len(FILES) - 3)
  return first + [f'{packed[key]:,}' for key in ('bytes', 'sparse_dense_bytes', 'sparse_bytes')] + ['equal']


def _notes(outcomes: Sequence[dict[str, Any]], workdir: pathlib.Path) -> list[str]:
  seeds, machine, saved = outcomes[0]['seeds'], outcomes[-1]['environment'], outcomes[0]['checkpoint']['path']
  task = _task(outcomes)
  files = f'{workdir}/<run>/{saved}/params' + (' and packed.safetensors' if any(o['packed'] for o in outcomes) else '')
  return [
      f'{outcomes[0]["steps"]} steps, seeds {", ".join(map(str, seeds))}. ±: 95 % confidence interval (Student t). '
      f'Difference: in {task.difference} to {outcomes[0]["name"]}, seed by seed. Loss: in {task.loss_unit}.',
      'Sparsity: fraction of zeros in the sparse parameters. FLOPs: of all contractions, over dense; in training '
      'the mean over the steps by the densities there, with (2 density + 1) / 3 on a sparse product.',
      f'Time: training without compilation, all seeds together, on {machine["platform"]} ({machine["device"]}), '
      f'{machine["cpus"]} CPUs, jax {machine["jax"]}, commit {machine["commit"] or "unknown"}.',
      f'Files: bytes, all seeds, in {files}. Orbax compresses, the packed file does not; sparse part: the sparse '
      'parameters alone, dense and packed. Predictions on the test set: the packed file, read back, against the '
      'checkpoint, read back, bit for bit.',
      f'Picture: {workdir / "results.png"}. Tables: {workdir / "results.md"}, results.csv, results.json.']


def draw(outcomes: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """The validation score, flip rate and gradient noise over the steps: the seeds' mean, in a band of all of them."""
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  task = _task(outcomes)
  figure, (score, flips, noise) = plt.subplots(1, 3, figsize=(15, 4.5), layout='constrained')
  reached = []
  for i, outcome in enumerate(outcomes):
    reached.extend(_plot(score, outcome, f'valid_{task.name}', color=f'C{i}', label=outcome['name']))
    _plot(noise, outcome, 'noise_kept', color=f'C{i}')
    if outcome['asked'] is not None:  # what prunes nothing has no mask
      _plot(flips, outcome, 'flips', color=f'C{i}')
      _plot(noise, outcome, 'noise_pruned', band=False, color=f'C{i}', linestyle=':')
  score.set_ylim(bottom=np.quantile(reached, 0.1))  # the first steps would squeeze what follows
  flips.set_yscale('symlog', linthresh=1e-5)
  noise.set_yscale('log')
  titles = (f'validation {task.name}',
            'mask entries flipped by a step, fraction',
            'gradient noise: variance of |gradient|')
  for axis, title in zip((score, flips, noise), titles):
    axis.set_title(title)
    axis.set_xlabel('step')
    axis.grid(alpha=0.3)
  score.legend(loc='lower right')
  noise.legend([plt.Line2D([], [], color='grey', linestyle=style) for style in ('-', ':')], ['kept', 'pruned weights'])
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _plot(axis: Any, outcome: dict[str, Any], key: str, band: bool = True, **style: Any) -> Sequence[float]:
  """Draws one quantity of one run, and returns its means."""
  lines = [line for line in records.read(outcome['directory']) if None not in np.atleast_1d(line.get(key))]
  if not lines:
    return []
  steps, values = [line['step'] for line in lines], np.array([line[key] for line in lines], np.float64)
  axis.plot(steps, values.mean(1), **style)
  if band:
    axis.fill_between(steps, values.min(1), values.max(1), color=style['color'], alpha=0.15, linewidth=0)
  return values.mean(1).tolist()


def strict(tree: Any) -> Any:
  """JSON has no NaN."""
  if isinstance(tree, dict):
    return {key: strict(value) for key, value in tree.items()}
  if isinstance(tree, list):
    return [strict(value) for value in tree]
  return None if isinstance(tree, float) and not np.isfinite(tree) else tree
