"""Judges claims by the outcomes of their runs, and shows the verdicts with their intervals.

    verdicts([Finding('soup', claim, outcomes)])['soup'][0]['verdict']    # 'not reproduced'
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.configs.claims import Claim, Comparison, Scores
from experiments.loop import origins
from experiments.loop.outcomes import Outcomes
from experiments.tables import pages, paired, runs
from sparsejax import plot

Judgement = Mapping[str, Any]  # of one comparison, see `judged`

NOTE = ('Differences are of the seeds one by one, with the 95 % confidence interval of their mean (Student t). Test: '
        'half of the 95 % interval that comes from the choice of the test labels. It is an upper bound, because both '
        'runs have the same labels. p: of the difference to the bar, adjusted for all differences of this page '
        'together (Holm). Reproduced: above the bar, at 5 %; the opposite: below; not reproduced: not told from it; '
        'not testable: these runs cannot decide the claim, for the reason that is named.')
COLOURS = {'reproduced': 'C2', 'not reproduced': 'C7', 'the opposite': 'C3', 'not testable': 'C1'}


class Finding(NamedTuple):
  """A `Finding` holds a claim, the name of its config, the outcomes of its runs, and why runs have no outcome."""

  name: str
  claim: Claim
  outcomes: Outcomes
  missing: Mapping[str, str] = {}

  @property
  def judgements(self) -> list[dict[str, Any]]:
    """The judgements of the claim's comparisons, before they are adjusted for each other; none without outcomes."""
    scores = scored(self.outcomes) if self.outcomes else None
    return [self._judged(compare, scores) for compare in self.claim.comparisons] if scores else []

  def _judged(self, compare: Callable[[Scores], Comparison], scores: Scores) -> dict[str, Any]:
    try:
      return judged(compare(scores), scores, [need(scores) for need in self.claim.needs])
    except KeyError as error:  # A run that is not there, which is a mistake unless it is known why.
      run, = error.args
      if run not in self.missing:
        raise
      return {**EMPTY, 'what': run, 'reason': f'{run}: {self.missing[run]}'}


EMPTY = {'what': '-', 'unit': '-', 'more': None, 'less': None, 'difference': None, 'ci95': None, 'test95': None,
         'bar': 0.0, 'p': None, 'reason': None}


def scored(outcomes: Outcomes) -> Scores:
  """Returns the test scores of `outcomes` in the unit of their task, and the numbers of emptied layers."""
  task = runs.task_of(list(outcomes.values()))
  test = {run: task.scale * np.array(outcome['test'][task.name], np.float64) for run, outcome in outcomes.items()}
  labels = next(iter(outcomes.values())).get('labels') or {'count': None, 'chance': None}
  chance = None if task.unit != '%' or labels['chance'] is None else task.scale * labels['chance']
  return Scores(task.unit, test, {run: outcome['empty'] for run, outcome in outcomes.items()}, chance,
                labels['count'] if task.unit == '%' else None,
                {run: task.scale * np.array(outcome['quality']) for run, outcome in outcomes.items()
                 if outcome.get('quality')})


def judged(comparison: Comparison, scores: Scores, needs: Sequence[str | None] = ()) -> dict[str, Any]:
  """Returns the means of both sides, and the mean of their differences, seed by seed, with its intervals.

  `p` is the p-value of the difference to the bar, and `reason` why the two sides decide nothing, or `None`.
  """
  more, less = (np.asarray(side, np.float64) for side in (comparison.more, comparison.less))
  difference, half = pages.interval(more - less)
  p = paired.paired(more - comparison.bar, less).p
  lost = [run for run in comparison.trained if _at_chance(scores, run)]
  reasons = [*needs, f'{" and ".join(lost)} at chance level, {scores.chance:.1f} {scores.unit}' if lost else None,
             'one seed has no interval' if np.isnan(p) else None]
  sampled = scores.labels and comparison.unit == scores.unit
  return {'what': comparison.what, 'unit': comparison.unit, 'more': float(more.mean()), 'less': float(less.mean()),
          'difference': difference, 'ci95': half, 'bar': comparison.bar, 'p': p,
          'reason': '; '.join(filter(None, reasons)) or None,
          'test95': _sampling(more.mean(), less.mean(), scores.labels) if sampled else None}


def _at_chance(scores: Scores, run: str) -> bool:
  """Returns whether the best constant prediction is not below the 95 % interval of the mean quality of `run`."""
  if scores.chance is None:
    return False
  mean, half = pages.interval(scores.quality.get(run, scores.test[run]))
  return mean - (0 if np.isnan(half) else half) <= scores.chance


def _sampling(more: float, less: float, labels: int) -> float:
  """Returns half the 95 % interval of the difference of two percentages of `labels`, as if these were not shared."""
  return float(1.96 * np.sqrt(sum(max(side, 0) * max(100 - side, 0) for side in (more, less)) / labels))


def verdict(judgement: Judgement, adjusted: float) -> str:
  """Returns the verdict on one judgement, by its p-value adjusted for all others."""
  if judgement['reason'] is not None:
    return 'not testable'
  if not adjusted < paired.LEVEL:
    return 'not reproduced'
  return 'reproduced' if judgement['difference'] > judgement['bar'] else 'the opposite'


def verdicts(findings: Sequence[Finding]) -> dict[str, list[Judgement]]:
  """Returns the judgements of each finding, by name, with `p_holm` and `verdict`.

  The p-values of all comparisons that are testable are adjusted together.
  """
  found = {finding.name: finding.judgements for finding in findings}
  rows = [row for judgements in found.values() for row in judgements]
  adjusted = paired.holm([np.nan if row['reason'] is not None else row['p'] for row in rows])
  for row, value in zip(rows, adjusted):
    row |= {'p_holm': None if np.isnan(value) else value, 'verdict': verdict(row, value)}
  return found


def page(findings: Sequence[Finding], workdir: pathlib.Path) -> pages.Page:
  """Returns the page of `findings`: `claims.{md,json,png}` in `workdir`."""
  judgements, cells = verdicts(findings), []
  for finding in findings:
    cells += [[finding.name, *[''] * (len(COLUMNS) - 1)], *pages.table(COLUMNS, judgements[finding.name]).cells]
    cells += [] if finding.outcomes else [[finding.claim.title, *['-'] * (len(COLUMNS) - 2), 'not tested']]
  files = f'Files: {workdir}/claims.md, claims.json, claims.png.'
  reasons = [f'{finding.name}: {reason}.' for finding in findings for reason in _reasons(finding, judgements)]
  return pages.Page('claims', [pages.Table(list(COLUMNS), cells)], [NOTE, *reasons, files], judgements,
                    lambda path: draw(findings, judgements, path),
                    '\n\n'.join(['# Claims of papers, tested', NOTE, *(
                        _section(finding, judgements) for finding in findings)]))


def _reasons(finding: Finding, judgements: Mapping[str, Sequence[Judgement]]) -> list[str]:
  """Returns why runs have no outcome, and why comparisons are not testable, each reason once."""
  missing = [f'{run}: {reason}' for run, reason in finding.missing.items()]
  return list(dict.fromkeys([*missing, *(row['reason'] for row in judgements[finding.name] if row['reason'])]))


def _known(key: str, text: Callable[[Judgement], str]) -> Callable[[Judgement], str]:
  return lambda row: '-' if row[key] is None else text(row)


COLUMNS = {
    'more > less': lambda row: row['what'] + (f' {row["bar"]:+g}' if row['bar'] else ''),
    'more': _known('more', lambda row: f'{row["more"]:.2f}'),
    'less': _known('less', lambda row: f'{row["less"]:.2f}'),
    'difference': _known('difference', lambda row: pages.spread(row['difference'], row['ci95'], sign='+')),
    'test': _known('test95', lambda row: f'± {row["test95"]:.2f}'),
    'p (Holm)': _known('p_holm', lambda row: f'{row["p_holm"]:.2g}'),
    'unit': lambda row: row['unit'],
    'verdict': lambda row: row['verdict'],
}


def _section(finding: Finding, judgements: Mapping[str, Sequence[Judgement]]) -> str:
  """Returns the claim as Markdown: sentence, baselines, judgements, and where and how long the runs were trained."""
  claim, outcomes = finding.claim, finding.outcomes
  head = f'## {claim.title}\n\n{claim.sentence} {claim.reference}.'
  reasons = [f'{reason}.' for reason in _reasons(finding, judgements)]
  if not outcomes:
    return '\n\n'.join([head, 'Not tested.', *reasons])
  table = pages.markdown(pages.table(COLUMNS, judgements[finding.name]))
  return '\n\n'.join([head, _baselines(outcomes), table, *reasons, _measured(finding)])


def _measured(finding: Finding) -> str:
  """Returns on what, for how long and by which learning rates the runs of a finding were trained."""
  outcomes = finding.outcomes
  first = next(iter(outcomes.values()))
  places = dict.fromkeys(pages.machine(outcome['environment']) for outcome in outcomes.values())
  seconds = sum(outcome['seconds'] for outcome in outcomes.values())
  sentences = [f'`experiments/configs/claims/{finding.name}.py`: {len(first["seeds"])} seeds, {first["steps"]} steps, '
               f'{seconds:.0f} s of training on {"; ".join(places)}.']
  rates = [f'{run} {outcome["tuning"]["best"]:g}' for run, outcome in outcomes.items() if outcome.get('tuning')]
  if rates:
    tried = next(outcome['tuning'] for outcome in outcomes.values() if outcome.get('tuning'))
    grid = ', '.join(f'{rate:g}' for rate in tried['rates'])
    sentences.append(f'Learning rates, the best of {grid} on the validation split and '
                     f'{len(tried["seeds"])} other seeds for each run: {", ".join(rates)}.')
  return ' '.join([*sentences, *(text for run, outcome in outcomes.items()
                                 for text in origins.told(run, outcome.get('changes', [])))])


def _baselines(outcomes: Outcomes) -> str:
  """Returns a sentence on the scores of the runs that prune nothing, with the 95 % interval of the seeds' mean."""
  scores = scored(outcomes)
  score = lambda run: pages.spread(*pages.interval(scores.test[run]))
  chance = '' if scores.chance is None else f' A constant prediction: {scores.chance:.2f} {scores.unit}.'
  return 'Not pruned: ' + ', '.join(f'{run} {score(run)} {scores.unit}' for run, outcome in outcomes.items()
                                    if outcome['asked'] is None) + f'.{chance}'


def draw(findings: Sequence[Finding], judgements: Mapping[str, Sequence[Judgement]], path: pathlib.Path) -> None:
  """Draws one panel a tested claim: the differences, their intervals, and the bars that they have to be right of."""
  panels = [(finding.claim, [row for row in judgements[finding.name] if row['difference'] is not None])
            for finding in findings if finding.outcomes]
  heights = [1 + len(rows) for _, rows in panels] or [1]
  with plot.saved(path, len(heights), 1, figsize=(9, 0.45 * sum(heights)), height_ratios=heights) as axes:
    for axis, (claim, rows) in zip(axes[:, 0], panels):
      plot.intervals(
          [f'{row["what"]} ({row["unit"]})' for row in rows], [row['difference'] for row in rows],
          [(row['difference'] - row['ci95'], row['difference'] + row['ci95']) for row in rows], axis,
          colours=[COLOURS[row['verdict']] for row in rows], bars=[row['bar'] for row in rows])
      axis.set_title(claim.title, loc='left', fontsize='medium')
