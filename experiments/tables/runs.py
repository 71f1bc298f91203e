"""Compares the runs of a config: scores, sparsity, FLOPs and files in two tables, and a picture of the training.

    outcomes = training.run(config, workdir, request)
    pages.show(page(list(outcomes.values()), workdir), workdir, training.console())
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.loop import origins, records, tasks
from experiments.loop.outcomes import Outcome
from experiments.tables import pages, paired
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
      *(line for outcome in outcomes for line in origins.told(outcome['name'], outcome.get('changes', []))),
      *told_apart(outcomes), NEXT]


NEXT = ('Try next: --set KEY=VALUE with another --workdir changes one setting; python -m experiments.sweep compares '
        'recipes, patterns and learning rates; sparsejax advise FILE says what pays for a checkpoint of yours.')


def told_apart(outcomes: Sequence[Outcome]) -> list[str]:
  """Returns in a line each which runs the seeds tell apart, by the test score and with verdicts that hold all together.

  Each run is compared with the first, and with the first run before it that was asked for the same sparsity.
  """
  task, pairs = task_of(outcomes), []
  for i, outcome in enumerate(outcomes):
    alike = [other for other in outcomes[1:i] if None is not outcome['asked'] == other['asked']]
    pairs += [(outcome, other) for other in (*outcomes[:min(i, 1)], *alike[:1])]
  found = [paired.paired(*(side['test'][task.name] for side in pair)) for pair in pairs]
  adjusted = paired.holm([each.p for each in found])
  return [f'Shown: {run["name"]} against {other["name"]}: '
          f'{pages.spread(each.difference, each.half, task.scale, "+")} {task.difference}, '
          f'{paired.verdict(each.difference, p, lower_is_better=False)} by {len(run["seeds"])} seeds.'
          for (run, other), each, p in zip(pairs, found, adjusted)]


class Panel(NamedTuple):
  """A `Panel` is one plot of the picture: `key` names the recorded number, and `caption` says how to read the plot."""

  key: str
  title: str
  caption: str


PANELS = (
    Panel('left', 'size of pruned weights, over that of kept ones',
          'At 0 the model is sparse. A mask that decays lets\npruned weights fade; other masks cut them at once.'),
    Panel('flips', 'weights that enter or leave the mask in a step',
          'A fraction of all sparse weights. Where many flip,\nthe recipe has not settled which weights to keep.'),
    Panel('noise_kept', 'gradient noise: variance of |gradient|',
          'Solid: of kept weights; dotted: of pruned ones. More\nnoise: single weights are pulled harder than others.'),
)


def draw(outcomes: Sequence[Outcome], path: pathlib.Path) -> None:
  """Draws score, fading, flips and gradient noise over the steps: the seeds' mean in a band of all seeds."""
  task = task_of(outcomes)
  score = Panel(f'valid_{task.name}', f'validation {task.name}',
                'Higher is better. Line: mean of the seeds.\nBand: from the lowest to the highest seed.')
  with plot.saved(path, 2, 2, figsize=(11, 8.5)) as axes:
    panels = dict(zip((score, *PANELS), axes.flat))
    for i, outcome in enumerate(outcomes):
      _draw_run(panels, outcome, f'C{i}')
    for panel, axis in panels.items():
      axis.set(title=panel.title, xlabel=f'step\n\n{panel.caption}')
    _scaled(*panels.values())


def _draw_run(panels: Mapping[Panel, Any], outcome: Outcome, colour: str) -> None:
  lines, sparse = list(records.read(outcome['directory'])), outcome['asked'] is not None
  for panel, axis in panels.items():
    if sparse or panel.key not in ('left', 'flips'):  # A run that prunes nothing has no mask.
      plot.over_steps(lines, panel.key, axis, color=colour, label=outcome['name'])
    if sparse and panel.key == 'noise_kept':
      plot.over_steps(lines, 'noise_pruned', axis, band=False, color=colour, linestyle=':')


def _scaled(score: Any, left: Any, flips: Any, noise: Any) -> None:
  if reached := [y for line in score.lines for y in line.get_ydata()]:
    score.set_ylim(bottom=np.quantile(reached, 0.1))  # The lowest first steps would squeeze the later steps.
  left.set_ylim(bottom=0)
  flips.set_yscale('symlog', linthresh=1e-5)
  noise.set_yscale('log')
  score.legend(loc='lower right')
