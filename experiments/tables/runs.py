"""Compares the runs of a config: scores, sparsity, FLOPs and files in two tables, and a picture of the training.

    outcomes = training.run(config, workdir, request)
    pages.show(page(list(outcomes.values()), workdir), workdir, training.console())
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.loop import origins, records, tasks
from experiments.loop.outcomes import Outcome
from experiments.tables import pages
from sparsejax import plot

Numbers = Mapping[str, Any]  # of one run, see `rows`


def page(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> pages.Page:
  """Returns the page of `outcomes`, the first of which is the baseline: `results.{md,csv,json,png}` in `workdir`."""
  numbers = rows(outcomes)
  written = [{key: value for key, value in outcome.items() if key != 'directory'} for outcome in outcomes]
  columns = {  # The cells and the spaces between them make just 80 characters.
      'run': lambda row: row['run'],
      **score_columns(task_of(outcomes), baseline=numbers[0]),
      'sparsity\nasked': lambda row: percent(row['asked']),
      'sparsity\nachieved': lambda row: percent(row['achieved']),
      'train\nFLOPs': lambda row: f'{row["training_flops"]:.3f}',
      'infer\nFLOPs': lambda row: f'{row["inference_flops"]:.3f}',
      'time': lambda row: f'{row["seconds"]:.0f} s',
  }
  tables = [pages.table(columns, numbers), pages.table(FILES, outcomes)]
  return pages.Page('results', tables, _notes(outcomes, workdir), {'rows': numbers, 'outcomes': written},
                    lambda path: draw(outcomes, path), rows=list(seed_rows(outcomes)))


def task_of(outcomes: Sequence[Outcome]) -> tasks.Task:
  """Returns the task of the runs."""
  return tasks.named(outcomes[0].get('task', 'classification'))  # The oldest outcomes do not name their task.


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
  """Returns one row of numbers a run. Differences to the first run, the baseline, are taken seed by seed."""
  name = task_of(outcomes).name
  base = np.array(outcomes[0]['test'][name])
  numbers = []
  for outcome in outcomes:
    score, score_ci = pages.interval(outcome['test'][name])
    difference, difference_ci = pages.interval(np.array(outcome['test'][name]) - base)
    loss, loss_ci = pages.interval(outcome['test']['loss'])
    numbers.append({
        'run': outcome['name'], name: score, f'{name}_ci95': score_ci, 'difference': difference,
        'difference_ci95': difference_ci, 'loss': loss, 'loss_ci95': loss_ci,
        **{key: outcome[key] for key in ('asked', 'achieved', 'training_flops', 'inference_flops', 'seconds')}})
  return numbers


def seed_rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
  """Yields a row for each seed of each run, for the CSV: the test numbers of the seed, and the numbers of its run."""
  for outcome in outcomes:
    shared = {key: outcome[key] for key in (
        'steps', 'asked', 'achieved', 'training_flops', 'inference_flops', 'seconds')}
    for i, seed in enumerate(outcome['seeds']):
      scores = {key: values[i] for key, values in outcome['test'].items()}
      yield {'run': outcome['name'], 'seed': seed, **scores, **shared}


def score_columns(task: tasks.Task, baseline: Numbers) -> pages.Columns:
  """Returns the columns of the test score, its difference to the row `baseline`, and the test loss."""
  score = lambda row: pages.spread(row[task.name], row[f'{task.name}_ci95'], task.scale)
  difference = lambda row: pages.spread(row['difference'], row['difference_ci95'], task.scale, '+')
  return {f'test\n{task.name} {task.unit}': score,
          'difference': lambda row: 'baseline' if row is baseline else difference(row),
          'test\nloss': lambda row: f'{row["loss"]:.4f}'}


def percent(fraction: float | None) -> str:
  """Returns `fraction` as a percentage, and a dash for `None`."""
  return '-' if fraction is None else f'{fraction:.2%}'


def _packed(key: str) -> pages.Cell:
  """Returns the cell of a number of bytes of the packed file, a dash for a run that has no packed file."""
  return lambda outcome: f'{outcome["packed"][key]:,}' if outcome['packed'] else '-'


FILES = {
    'run': lambda outcome: outcome['name'],
    'parameters': lambda outcome: f'{outcome["checkpoint"]["dense_bytes"]:,}',
    'checkpoint': lambda outcome: f'{outcome["checkpoint"]["bytes"]:,}',
    'dense file': _packed('dense_bytes'),
    'packed file': _packed('bytes'),
    'sparse part': _packed('sparse_dense_bytes'),
    'packed': _packed('sparse_bytes'),
    'predictions': lambda outcome: 'equal' if outcome['packed'] else '-',
}


def _notes(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> list[str]:
  first, task = outcomes[0], task_of(outcomes)
  params = f'{workdir}/<run>/{first["checkpoint"]["path"]}/params'
  packed = any(outcome['packed'] for outcome in outcomes)
  files = params + (', dense.safetensors and packed.safetensors' if packed else '')
  return [
      f'{first["steps"]} steps, seeds {", ".join(map(str, first["seeds"]))}. ±: 95 % confidence interval (Student t). '
      f'Difference: in {task.difference} to {first["name"]}, seed by seed. Loss: in {task.loss_unit}.',
      'Sparsity: fraction of zeros in the sparse parameters. FLOPs: of all contractions, over dense; in training '
      'the mean over the steps by the densities there, with (2 density + 1) / 3 on a sparse product.',
      'Time: training without compilation, all seeds together, on '
      f'{pages.machine(outcomes[-1]["environment"])}.',
      f'Files: bytes, all seeds, in {files}. Orbax compresses, the dense and the packed file are not compressed; '
      'sparse part: the sparse parameters alone, dense and packed. Predictions on the test set: the packed file, read '
      'back, against the checkpoint, read back, bit for bit.',
      f'Picture: {workdir / "results.png"}. Tables: {workdir / "results.md"}, results.json, results.csv (a row '
      'for each seed).',
      *(line for outcome in outcomes for line in origins.told(outcome['name'], outcome.get('changes', [])))]


def draw(outcomes: Sequence[Outcome], path: pathlib.Path) -> None:
  """Draws the validation score, flip rate and gradient noise over the steps: the seeds' mean in a band of all seeds."""
  task = task_of(outcomes)
  with plot.saved(path, 1, 3, figsize=(15, 4.5)) as axes:
    score, flips, noise = axes[0]
    for i, outcome in enumerate(outcomes):
      lines, colour = list(records.read(outcome['directory'])), f'C{i}'
      plot.over_steps(lines, f'valid_{task.name}', score, color=colour, label=outcome['name'])
      plot.over_steps(lines, 'noise_kept', noise, color=colour)
      if outcome['asked'] is not None:  # A run that prunes nothing has no mask.
        plot.over_steps(lines, 'flips', flips, color=colour)
        plot.over_steps(lines, 'noise_pruned', noise, band=False, color=colour, linestyle=':')
    if reached := [y for line in score.lines for y in line.get_ydata()]:
      score.set_ylim(bottom=np.quantile(reached, 0.1))  # The lowest first steps would squeeze the later steps.
    flips.set_yscale('symlog', linthresh=1e-5)
    noise.set_yscale('log')
    for axis, title in ((score, f'validation {task.name}'), (flips, 'mask entries flipped by a step, fraction'),
                        (noise, 'gradient noise: variance of |gradient|')):
      axis.set(title=title, xlabel='step')
    score.legend(loc='lower right')
    styles = [noise.plot([], [], color='grey', linestyle=style)[0] for style in ('-', ':')]
    noise.legend(styles, ['kept', 'pruned weights'])
