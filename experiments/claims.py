"""Claims of papers, whether they hold here: for each the runs of one config, their differences and a verdict.

  python -m experiments.claims --workdir runs/claims [--only 1 8] [--data_dir DIRECTORY] [--set KEY=VALUE]

Trains what is not finished yet, then prints the table and writes `claims.md`, `claims.json` and `claims.png`. The same
command goes on where it was stopped. Exit status: 0 done; 2 a claim could not be tested, which is said in the table;
128 + signal: stopped, resumable.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import rich.console

from experiments import configs, tickets, train
from experiments.loop import records, tasks
from experiments.tables import results

CONFIGS = pathlib.Path(__file__).parent / 'configs' / 'claims'
REFUSED = 2  # exit status

Outcome = Mapping[str, Any]  # of one run, as `experiments.outcomes` writes it
Outcomes = Mapping[str, Outcome]  # by run


class Comparison(NamedTuple):
  """It is claimed that `more` is larger than `less`, by more than `bar`: one number a seed each, in `unit`."""

  what: str
  unit: str
  more: Sequence[float]
  less: Sequence[float]
  bar: float = 0.0


class Claim(NamedTuple):
  """`sentence`: what is claimed, in our words. `config`: a file of `configs/claims`.

  `run(config, workdir, overrides)` gives the outcomes, after what is not finished of them. It raises `SystemExit` with
  the status where it was stopped or refused.
  """

  number: int
  title: str
  sentence: str
  reference: str
  config: str
  comparisons: Callable[[Outcomes], list[Comparison]]
  run: Callable[[pathlib.Path, pathlib.Path, Sequence[str]], Outcomes]


def trained(config: pathlib.Path, workdir: pathlib.Path, overrides: Sequence[str],
            program: Callable[[Sequence[str]], int] = train.main) -> Outcomes:
  """The outcomes of `experiments.train`, or of another program that writes its `results.json` like it."""
  changes = [part for override in overrides for part in ('--set', override)]
  if status := program(['--config', str(config), '--workdir', str(workdir), *changes]):
    raise SystemExit(status)
  return {outcome['name']: outcome for outcome in json.loads((workdir / 'results.json').read_text())['outcomes']}


def retrained(config: pathlib.Path, workdir: pathlib.Path, overrides: Sequence[str]) -> Outcomes:
  """The outcomes of `experiments.tickets`."""
  return trained(config, workdir, overrides, tickets.main)


# What is compared.


def better(outcomes: Outcomes, more: str, less: str, bar: float = 0.0) -> Comparison:
  """The test scores of two runs; `bar` in the score's unit."""
  task = tasks.named(outcomes[more]['task'])
  return Comparison(f'{more} > {less}', task.unit, scores(outcomes, more), scores(outcomes, less), bar)


def scores(outcomes: Outcomes, run: str) -> np.ndarray:
  """The test scores of the seeds in the score's unit."""
  task = tasks.named(outcomes[run]['task'])
  return task.scale * np.asarray(outcomes[run]['test'][task.name], np.float64)


def dynamic(outcomes: Outcomes) -> list[Comparison]:
  return [better(outcomes, f'{more}-{percent}', f'{less}-{percent}')
          for percent in (90, 95) for more, less in (('RigL', 'SET'), ('SET', 'static'))]


def large_sparse(outcomes: Outcomes) -> list[Comparison]:
  return [better(outcomes, f'sparse-{width}', f'dense-{width}') for width in (24, 12)]


def random_width(outcomes: Outcomes) -> list[Comparison]:
  gap = lambda width: scores(outcomes, f'dense-{width}') - scores(outcomes, f'ERK-{width}')
  shares = better(outcomes, 'ERK-48', 'uniform-48')
  closing = [Comparison(f'gap of ERK-{narrow} > gap of ERK-{wide}', shares.unit, gap(narrow), gap(wide))
             for narrow, wide in ((12, 24), (24, 48))]
  return [shares, *closing]


def random_search(outcomes: Outcomes) -> list[Comparison]:
  # "No better" can only be shown up to a margin: by less than one point of accuracy.
  return [better(outcomes, f'random-{percent}', f'search-{percent}', bar=-1.0) for percent in (75, 90)]


def movement(outcomes: Outcomes) -> list[Comparison]:
  return [better(outcomes, 'movement', 'magnitude')]


def soups(outcomes: Outcomes) -> list[Comparison]:
  members = [scores(outcomes, name) for name in outcomes if name.startswith('member-')]
  of_soup = scores(outcomes, 'soup')
  unit = tasks.named(outcomes['soup']['task']).unit
  return [Comparison('soup > mean of members', unit, of_soup, np.mean(members, axis=0))]


def freezing(outcomes: Outcomes) -> list[Comparison]:
  return [better(outcomes, 'FreezeNet', 'SNIP')]


def collapse(outcomes: Outcomes) -> list[Comparison]:
  emptier = lambda more, less: Comparison(
      f'empty: {more} > {less}', 'layers', outcomes[more]['empty'], outcomes[less]['empty'])
  return [emptier('SNIP-300', 'SynFlow-300'), better(outcomes, 'SynFlow-300', 'SNIP-300'),
          emptier('SNIP-300', 'robust-300'), better(outcomes, 'robust-300', 'SNIP-300'),
          better(outcomes, 'robust-deep', 'SNIP-deep')]


def shrinkage(outcomes: Outcomes) -> list[Comparison]:
  return [better(outcomes, f'ISS-P-{percent}', f'{other}-{percent}')
          for percent in (90, 95) for other in ('hard', 'once')]


CLAIMS = (
    Claim(1, 'Dynamic sparse training', 'At 90 and 95 % RigL is better than SET, and SET than a fixed random mask.',
          'Evci et al. 2020, Rigging the Lottery, 1911.11134, figure 2', 'dynamic_vit_digits', dynamic, trained),
    Claim(2, 'Large sparse, small dense',
          'With as many non-zero parameters, a large model pruned gradually is better than a small dense one.',
          'Zhu and Gupta 2017, 1710.01878', 'large_sparse_vit_digits', large_sparse, trained),
    Claim(3, 'Random pruning', 'At 95 % ERK is better than uniform shares, and the gap to dense closes with the width.',
          'Evci et al. 2020, 1911.11134, figure 2; Liu et al. 2022, Random Pruning, 2202.02643, figure 1',
          'random_width_vit_digits', random_width, trained),
    Claim(4, 'Random search', 'The best of many random subnetworks is no better than any one of them; here: it is '
          'better by less than one point of accuracy.', 'Farahani 2024, random search in node space',
          'random_search_vit_digits', random_search, trained),
    Claim(5, 'Movement pruning', 'In fine-tuning to 10 % of the weights movement is better than magnitude.',
          'Sanh et al. 2020, Movement Pruning, 2005.07683', 'movement_minilm_sst2', movement, trained),
    Claim(6, 'Sparse model soups', 'At 90 % the average of models that were retrained from one pruned model is better '
          'than these are in the mean.', 'Zimmer et al. 2023, Sparse Model Soups, 2306.16788', 'soup_vit_digits', soups,
          retrained),
    Claim(7, 'FreezeNet', 'With 1 % of the weights trained, the others frozen are better than the others zero (SNIP).',
          'Wimmer et al. 2020, FreezeNet, 2011.14087', 'freeze_cnn_mnist', freezing, trained),
    Claim(8, 'Layer collapse', 'SNIP empties whole layers, and nothing trains then, where SynFlow and robust pruning '
          'at initialisation do not; in a deep model the latter trains where SNIP does not.',
          'Tanaka et al. 2020, SynFlow, 2006.05467, figure 1; Hayou et al. 2021, Robust Pruning at Initialization, '
          '2002.08797', 'collapse_mlp_mnist', collapse, trained),
    Claim(9, 'Soft shrinkage', 'In 2x super-resolution shrinking a little at each step is better than setting to zero.',
          'Wang et al. 2023, ISS-P, 2303.09650', 'shrinkage_sr_digits', shrinkage, trained),
)


# What came out.


def judged(comparison: Comparison) -> dict[str, Any]:
  """The means of both sides, their difference seed by seed with its 95 % interval, and the verdict."""
  more, less = (np.asarray(side, np.float64) for side in (comparison.more, comparison.less))
  difference, half = results.interval(more - less)
  return {'what': comparison.what, 'unit': comparison.unit, 'more': float(more.mean()), 'less': float(less.mean()),
          'difference': difference, 'ci95': half, 'bar': comparison.bar,
          'verdict': verdict(difference, half, comparison.bar)}


def verdict(difference: float, half: float, bar: float = 0.0) -> str:
  """Of the claim that the difference is above `bar`: does its interval lie above it, below it, or on both sides?"""
  if difference - half > bar:
    return 'reproduced'
  return 'the opposite' if difference + half < bar else 'not reproduced'  # without an interval too: one seed


def main(arguments: Sequence[str] | None = None) -> int:
  asked = _parsed(arguments)
  workdir, status, found = pathlib.Path(asked.workdir), 0, []
  for claim in CLAIMS:
    if asked.only and claim.number not in asked.only:
      continue
    config = CONFIGS / f'{claim.config}.py'
    try:
      outcomes = claim.run(config, workdir / claim.config, [*_place(config, asked.data_dir), *asked.set])
    except SystemExit as stopped:
      if stopped.code != REFUSED:
        return stopped.code
      status, outcomes = REFUSED, None
    found.append((claim, outcomes))
  show(found, workdir, rich.console.Console())
  return status


def _place(config: pathlib.Path, data_dir: str | None) -> list[str]:
  """Where the config's data are; not of the digits, which are embedded and would be written there."""
  return [f'data.data_dir={data_dir}'] if data_dir and configs.load(config).data.name != 'digits' else []


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  numbers = [claim.number for claim in CLAIMS]
  parser = argparse.ArgumentParser(prog='python -m experiments.claims', description='Tests claims of papers.',
                                   allow_abbrev=False)
  parser.add_argument('--workdir', required=True, help='where the runs and the results go, and resume from')
  parser.add_argument('--only', type=int, nargs='+', choices=numbers, metavar='N', help=f'of {numbers}')
  parser.add_argument('--data_dir', help='where the data sets are, except for the digits')
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='change one value of each config')
  return parser.parse_args(arguments)


HEAD = ('#', 'more > less', 'more', 'less', 'difference', 'unit', 'verdict')


def show(found: Sequence[tuple[Claim, Outcomes | None]], workdir: pathlib.Path, console: rich.console.Console) -> None:
  """Prints the table and writes `claims.{md,json,png}`. Claims without outcomes are listed as not tested."""
  judgements = [(claim, [judged(one) for one in claim.comparisons(outcomes)] if outcomes else [])
                for claim, outcomes in found]
  lines = [[str(claim.number), *_cells(one)] for claim, ones in judgements for one in ones]
  lines += [[str(claim.number), claim.title, *'----', 'not tested'] for claim, ones in judgements if not ones]
  console.print('', results.drawn(HEAD, lines))
  sections = [_section(claim, ones, outcomes) for (claim, ones), (_, outcomes) in zip(judgements, found)]
  note = ('Differences are of the seeds one by one, with the 95 % confidence interval of their mean (Student t). '
          'Reproduced: the interval lies above 0, or above the bar that is named; the opposite: below; not reproduced: '
          'it holds it, so that these runs do not tell the two apart.')
  records.write_whole(workdir / 'claims.md', '\n\n'.join(['# Claims of papers, tested', note, *sections]) + '\n')
  records.write_whole(workdir / 'claims.json', json.dumps(
      results.strict({claim.number: ones for claim, ones in judgements}), indent=2) + '\n')
  draw([(claim, ones) for claim, ones in judgements if ones], workdir / 'claims.png')
  console.print(f'\n{note}\nFiles: {workdir}/claims.md, claims.json, claims.png.', markup=False, highlight=False,
                soft_wrap=True)


def _cells(one: Mapping[str, Any]) -> list[str]:
  what = one['what'] + (f' {one["bar"]:+g}' if one['bar'] else '')
  return [what, f'{one["more"]:.2f}', f'{one["less"]:.2f}', results.spread(1, one['difference'], one['ci95'], '+'),
          one['unit'], one['verdict']]


def _section(claim: Claim, ones: Sequence[Mapping[str, Any]], outcomes: Outcomes | None) -> str:
  """The claim as Markdown."""
  head = f'## {claim.number}. {claim.title}\n\n{claim.sentence} {claim.reference}.'
  if not outcomes:
    return f'{head}\n\nNot tested.'
  first = next(iter(outcomes.values()))
  place = lambda machine: (f'{machine["platform"]} ({machine["device"]}), {machine["cpus"]} CPUs, '
                           f'jax {machine["jax"]}, commit {machine["commit"] or "unknown"}')
  places = dict.fromkeys(place(outcome['environment']) for outcome in outcomes.values())
  seconds = sum(outcome['seconds'] for outcome in outcomes.values())
  measured = (f'`experiments/configs/claims/{claim.config}.py`: {len(first["seeds"])} seeds, {first["steps"]} steps, '
              f'{seconds:.0f} s of training on {"; ".join(places)}.')
  return '\n\n'.join([head, _baselines(outcomes), results.markdown(HEAD[1:], [_cells(one) for one in ones]), measured])


def _baselines(outcomes: Outcomes) -> str:
  """What the runs that prune nothing score, with the 95 % interval of the mean of the seeds."""
  score = lambda run: results.spread(1, *results.interval(scores(outcomes, run)))
  return 'Not pruned: ' + ', '.join(f'{run} {score(run)} {tasks.named(outcome["task"]).unit}'
                                    for run, outcome in outcomes.items() if outcome['asked'] is None) + '.'


def draw(judgements: Sequence[tuple[Claim, Sequence[Mapping[str, Any]]]], path: pathlib.Path) -> None:
  """One panel a claim: its differences with their intervals, and the line that they have to be right of."""
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  colours = {'reproduced': 'C2', 'not reproduced': 'C7', 'the opposite': 'C3'}
  heights = [1 + len(ones) for _, ones in judgements] or [1]
  figure, axes = plt.subplots(len(heights), 1, figsize=(9, 0.45 * sum(heights)), height_ratios=heights, squeeze=False,
                              layout='constrained')
  for axis, (claim, ones) in zip(axes[:, 0], judgements):
    for place, one in enumerate(ones):
      half = np.nan_to_num(one['ci95'])
      axis.errorbar(one['difference'], -place, xerr=half, fmt='o', capsize=3, color=colours[one['verdict']])
      axis.plot([one['bar']] * 2, [-place - 0.5, -place + 0.5], color='black', linewidth=1)
    axis.set_yticks(range(0, -len(ones), -1), [f'{one["what"]} ({one["unit"]})' for one in ones])
    axis.set_ylim(-len(ones) + 0.5, 0.5)
    axis.set_title(f'{claim.number}. {claim.title}', loc='left', fontsize='medium')
    axis.grid(alpha=0.3, axis='x')
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  sys.exit(main())
