"""Judges claims by the outcomes of their runs, and shows the verdicts with their intervals.

    judged(Comparison('sparse > dense', '%', [97.0, 96.5], [96.0, 95.9]))['verdict']    # 'not reproduced'
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.configs.claims import Claim, Comparison, Scores
from experiments.loop import origins
from experiments.loop.outcomes import Outcomes
from experiments.tables import pages, runs
from sparsejax import plot

Judgement = Mapping[str, Any]  # of one comparison, see `judged`

NOTE = ('Differences are of the seeds one by one, with the 95 % confidence interval of their mean (Student t). '
        'Reproduced: the interval lies above 0, or above the bar that is named; the opposite: below; not reproduced: '
        'it holds it, so that these runs do not tell the two apart.')
COLOURS = {'reproduced': 'C2', 'not reproduced': 'C7', 'the opposite': 'C3'}


class Finding(NamedTuple):
  """A `Finding` holds a claim, the name of its config, and the outcomes of its runs: `None` if they were refused."""

  name: str
  claim: Claim
  outcomes: Outcomes | None

  @property
  def judgements(self) -> list[Judgement]:
    """The judgements of the claim's comparisons; none without outcomes."""
    return [judged(compare(scored(self.outcomes))) for compare in self.claim.comparisons] if self.outcomes else []


def scored(outcomes: Outcomes) -> Scores:
  """Returns the test scores of `outcomes` in the unit of their task, and the numbers of emptied layers."""
  task = runs.task_of(list(outcomes.values()))
  test = {run: task.scale * np.array(outcome['test'][task.name], np.float64) for run, outcome in outcomes.items()}
  return Scores(task.unit, test, {run: outcome['empty'] for run, outcome in outcomes.items()})


def judged(comparison: Comparison) -> dict[str, Any]:
  """Returns the means of both sides, the mean of their differences with its 95 % interval, and the verdict.

  The differences are taken seed by seed.
  """
  more, less = (np.asarray(side, np.float64) for side in (comparison.more, comparison.less))
  difference, half = pages.interval(more - less)
  return {'what': comparison.what, 'unit': comparison.unit, 'more': float(more.mean()), 'less': float(less.mean()),
          'difference': difference, 'ci95': half, 'bar': comparison.bar,
          'verdict': verdict(difference, half, comparison.bar)}


def verdict(difference: float, half: float, bar: float = 0.0) -> str:
  """Returns whether the interval of a difference lies above `bar`, below `bar`, or on both sides of it.

  A single seed has no interval (`half` is NaN), so nothing is reproduced by it.
  """
  if difference - half > bar:
    return 'reproduced'
  return 'the opposite' if difference + half < bar else 'not reproduced'


def page(findings: Sequence[Finding], workdir: pathlib.Path) -> pages.Page:
  """Returns the page of `findings`: `claims.{md,json,png}` in `workdir`. Without outcomes a claim is "not tested"."""
  judgements = {finding.name: finding.judgements for finding in findings}
  cells = []
  for finding in findings:
    cells += [[finding.name, *[''] * 5], *pages.table(COLUMNS, judgements[finding.name]).cells]
    cells += [] if finding.outcomes else [[finding.claim.title, *'----', 'not tested']]
  files = f'Files: {workdir}/claims.md, claims.json, claims.png.'
  return pages.Page('claims', [pages.Table(list(COLUMNS), cells)], [NOTE, files], judgements,
                    lambda path: draw(findings, path),
                    '\n\n'.join(['# Claims of papers, tested', NOTE, *map(_section, findings)]))


COLUMNS = {
    'more > less': lambda row: row['what'] + (f' {row["bar"]:+g}' if row['bar'] else ''),
    'more': lambda row: f'{row["more"]:.2f}',
    'less': lambda row: f'{row["less"]:.2f}',
    'difference': lambda row: pages.spread(row['difference'], row['ci95'], sign='+'),
    'unit': lambda row: row['unit'],
    'verdict': lambda row: row['verdict'],
}


def _section(finding: Finding) -> str:
  """Returns the claim as Markdown: sentence, baselines, judgements, and where and how long the runs were trained."""
  claim, outcomes = finding.claim, finding.outcomes
  head = f'## {claim.title}\n\n{claim.sentence} {claim.reference}.'
  if not outcomes:
    return f'{head}\n\nNot tested.'
  first = next(iter(outcomes.values()))
  places = dict.fromkeys(pages.machine(outcome['environment']) for outcome in outcomes.values())
  seconds = sum(outcome['seconds'] for outcome in outcomes.values())
  measured = (f'`experiments/configs/claims/{finding.name}.py`: {len(first["seeds"])} seeds, {first["steps"]} steps, '
              f'{seconds:.0f} s of training on {"; ".join(places)}.')
  for run, outcome in outcomes.items():
    measured = ' '.join([measured, *origins.told(run, outcome.get('changes', []))])
  return '\n\n'.join([head, _baselines(outcomes), pages.markdown(pages.table(COLUMNS, finding.judgements)), measured])


def _baselines(outcomes: Outcomes) -> str:
  """Returns a sentence on the scores of the runs that prune nothing, with the 95 % interval of the seeds' mean."""
  scores = scored(outcomes)
  score = lambda run: pages.spread(*pages.interval(scores.test[run]))
  return 'Not pruned: ' + ', '.join(f'{run} {score(run)} {scores.unit}' for run, outcome in outcomes.items()
                                    if outcome['asked'] is None) + '.'


def draw(findings: Sequence[Finding], path: pathlib.Path) -> None:
  """Draws one panel a tested claim: the differences, their intervals, and the bars that they have to be right of."""
  panels = [(finding.claim, finding.judgements) for finding in findings if finding.outcomes]
  heights = [1 + len(judgements) for _, judgements in panels] or [1]
  with plot.saved(path, len(heights), 1, figsize=(9, 0.45 * sum(heights)), height_ratios=heights) as axes:
    for axis, (claim, judgements) in zip(axes[:, 0], panels):
      plot.intervals(
          [f'{row["what"]} ({row["unit"]})' for row in judgements], [row['difference'] for row in judgements],
          [(row['difference'] - row['ci95'], row['difference'] + row['ci95']) for row in judgements], axis,
          colours=[COLOURS[row['verdict']] for row in judgements], bars=[row['bar'] for row in judgements])
      axis.set_title(claim.title, loc='left', fontsize='medium')
