"""Shows rounds of pruning and retraining: a table of the runs of each round, and the barriers between members.

    results = json.loads((workdir / 'results.json').read_text())
    pages.show(page(results, workdir), workdir, training.console())
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.loop import tasks
from experiments.tables import pages, runs
from sparsejax import plot

Results = Mapping[str, Any]  # the content of results.json, see `experiments.tickets`


def page(results: Results, workdir: pathlib.Path, soup: str) -> pages.Page:
  """Returns the page of `results`: `results.{md,json,png}` in `workdir`. `soup` is the file name of a round's soup."""
  outcomes, task = results['outcomes'], runs.task_of(results['outcomes'])
  numbers = [{**row, 'round': outcome['round']} for row, outcome in zip(runs.rows(outcomes), outcomes)]
  columns = {'run': lambda row: row['run'], 'round': lambda row: str(row['round']),
             **runs.score_columns(task, baseline=numbers[0]), 'sparsity': lambda row: runs.percent(row['achieved'])}
  dense, last = outcomes[0], outcomes[-1]
  notes = [f'{dense["steps"]} dense steps, {last["steps"]} in each round, seeds {", ".join(map(str, dense["seeds"]))}. '
           f'±: 95 % confidence interval (Student t). Difference: in {task.difference} to dense, seed by seed. '
           f'Loss: in {task.loss_unit}.',
           *(_barrier(results, barrier, task) for barrier in results['barriers']),
           f'Files in {workdir}: results.md, results.json, results.png; parameters in round-*/checkpoints'
           + (f' and round-*/{soup}.' if results['barriers'] else '.')]
  return pages.Page('results', [pages.table(columns, numbers)], notes, results, lambda path: draw(results, task, path))


def _barrier(results: Results, barrier: Mapping[str, Any], task: tasks.Task) -> str:
  """Returns a sentence on the soup of one round and on the barrier between its first two members."""
  *members, soup = (np.array(outcome['test'][task.name]) for outcome in results['outcomes']
                    if outcome['round'] == barrier['round'])
  gain = pages.spread(*pages.interval(soup - np.mean(members, axis=0)), task.scale, '+')
  height = np.array(barrier['height'], np.float64)
  return (f'Round {barrier["round"]}: the soup minus the mean of its members is {gain} {task.difference}; from member '
          f'0 to member 1 the barrier of the test loss is {height.mean():.4f} {task.loss_unit} in the mean, '
          f'{height.max():.4f} at most.')


def draw(results: Results, task: tasks.Task, path: pathlib.Path) -> None:
  """Draws the test scores over the rounds, means of the seeds, and the test loss on the way from member 0 to 1."""
  with plot.saved(path, 1, 1 + bool(results['barriers']), figsize=(13, 4.5)) as axes:
    scores, *ways = axes[0]
    for outcome in results['outcomes']:
      offset, colour = next((style for kind, style in STYLES.items() if kind in outcome['name']), (0, 'C0'))
      mean, half = pages.interval(outcome['test'][task.name])
      plot.trade_off(outcome['round'] + offset, task.scale * mean, task.scale * half, scores, color=colour)
    ticks = ['dense', *(f'round {i}\n{sparsity:.1%}' for i, sparsity in enumerate(results['sparsities'], 1))]
    scores.set_xticks(range(len(ticks)), ticks)
    scores.set_title(f'test {task.name}, {task.unit}' + (': members grey, soup orange' if results['barriers'] else ''))
    for axis in ways:
      for barrier in results['barriers']:
        losses = np.array(barrier['losses'], np.float64).mean(0)
        axis.plot(np.linspace(0, 1, len(losses)), losses, label=f'round {barrier["round"]}')
      axis.set_title('test loss from member 0 to member 1')
      axis.legend()


STYLES = {'soup': (0.1, 'C1'), 'member': (-0.1, 'C7')}  # horizontal offset and colour, by part of the name
