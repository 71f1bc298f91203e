"""Tests the claims of papers: trains the runs of one config a claim, and judges their differences.

  python -m experiments.claims --workdir runs/claims [--only NAME ...] [--data_dir DIRECTORY] [--set KEY=VALUE]

NAME is the name of a config in `experiments/configs/claims`, without `.py`. The runs of a config are a sweep: each has
its learning rate tuned on the validation split, with the same budget. Runs that are not finished are trained.
Then the table is printed, and `claims.md`, `claims.json` and `claims.png` are written. The same command resumes a job
that was stopped.

Exit status: 0 done; 2 a claim could not be tested, and the table says so; 128 + signal: stopped, resumable.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence

from experiments import configs, protocols, sweep, tasks, tickets
from experiments.loop import commands, exits, training
from experiments.loop.outcomes import Outcome, Outcomes
from experiments.loop.stopping import StopRequest
from experiments.sweep import rates
from experiments.tables import claims as tables
from experiments.tables import pages
from experiments.tables.sweeps import Line

CONFIGS = pathlib.Path(__file__).parent / 'configs' / 'claims'


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  claims = collected()
  options = _parsed(arguments, list(claims))
  workdir, again = pathlib.Path(options.workdir), commands.command('claims', arguments)
  status, findings = 0, []
  with StopRequest() as request:
    for name in options.only or claims:
      ended = _tested(claims[name], workdir / name, request, options, again)
      if ended.status not in (0, commands.REFUSED):
        return ended.status
      outcomes, missing = ended.outcomes or ({}, {})
      status = max(status, ended.status, commands.REFUSED if missing else 0)
      findings.append(tables.Finding(name, configs.module(claims[name]).CLAIM, outcomes, missing))
  pages.show(tables.page(findings, workdir), workdir, training.console())
  return status


def collected() -> dict[str, pathlib.Path]:
  """Returns the config of each claim by the claim's name, in alphabetical order."""
  return {path.stem: path for path in sorted(CONFIGS.glob('*.py')) if path.stem != '__init__'}


def _tested(config: pathlib.Path, workdir: pathlib.Path, request: StopRequest, options: argparse.Namespace,
            again: str) -> commands.Ended:
  """Runs the job of one config; what it gives are the outcomes by run, and why runs have none.

  The job is rounds of pruning if the config has `tickets`, and tasks one after the other if the config has `tasks`.
  The job is a protocol if the config has `protocol`. Otherwise the job is the sweep of the config's runs. The config's
  grid tunes all but rounds of pruning.
  """
  def work() -> tuple[Outcomes, Mapping[str, str]]:
    loaded, grid = sweep.load(config, overrides(config, options.data_dir, options.set))
    if loaded.tasks is not None:
      return rates.tuned(tasks.trained, loaded, workdir, grid, request), {}
    if loaded.protocol is not None:
      return rates.tuned(protocols.finished, loaded, workdir, grid, request), {}
    if loaded.tickets is not None:
      return tickets.rounds(loaded, workdir, request), {}
    return outcomes_of(sweep.found(loaded, workdir, grid, request).tested)

  return commands.attempt(work, str(workdir), again)


def outcomes_of(lines: Sequence[Line]) -> tuple[dict[str, Outcome], dict[str, str]]:
  """Returns the outcome of each finished run of a sweep, by run, and why the others have none."""
  done = {line['recipe']: {**line, 'task': line['metric_task'], 'test': line['scores']}
          for line in lines if line['status'] == 'done'}
  return done, {line['recipe']: f'{line["status"]}: {line["reason"]}' for line in lines if line['status'] != 'done'}


def overrides(config: pathlib.Path, data_dir: str | None, changes: Sequence[str]) -> list[str]:
  """Returns `changes`, and before them where the data are: not for the digits, which would be written there."""
  place = data_dir and configs.load(config).data.name != 'digits'
  return [*([f'data.data_dir={data_dir}'] if place else []), *changes]


def _parsed(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m experiments.claims', description='Tests claims of papers.',
                                   allow_abbrev=False)
  parser.add_argument('--workdir', required=True, help='where the runs and the results go, and resume from')
  parser.add_argument('--only', nargs='+', choices=names, metavar='NAME', help=f'of {", ".join(names)}')
  parser.add_argument('--data_dir', help='where the data sets are, except for the digits')
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='change one value of each config')
  return parser.parse_args(arguments)


if __name__ == '__main__':
  exits.leave(main)
