"""Tests the claims of papers: trains the runs of one config a claim, and judges their differences.

  python -m experiments.claims --workdir runs/claims [--only NAME ...] [--data_dir DIRECTORY] [--set KEY=VALUE]

NAME is the name of a config in `experiments/configs/claims`, without `.py`. Runs that are not finished are trained.
Then the table is printed, and `claims.md`, `claims.json` and `claims.png` are written. The same command resumes a job
that was stopped.

Exit status: 0 done; 2 a claim could not be tested, and the table says so; 128 + signal: stopped, resumable.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence

from experiments import configs, tickets, train
from experiments.loop import commands, exits, training
from experiments.loop.stopping import StopRequest
from experiments.tables import claims as tables
from experiments.tables import pages

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
      status = max(status, ended.status)
      findings.append(tables.Finding(name, configs.module(claims[name]).CLAIM, ended.outcomes))
  pages.show(tables.page(findings, workdir), workdir, training.console())
  return status


def collected() -> dict[str, pathlib.Path]:
  """Returns the config of each claim by the claim's name, in alphabetical order."""
  return {path.stem: path for path in sorted(CONFIGS.glob('*.py')) if path.stem != '__init__'}


def _tested(config: pathlib.Path, workdir: pathlib.Path, request: StopRequest, options: argparse.Namespace,
            again: str) -> commands.Ended:
  """Runs the job of one config: rounds of pruning if the config has `tickets`, or else a comparison of runs."""
  def work() -> Mapping:
    loaded = configs.load(config, overrides(config, options.data_dir, options.set))
    job = train.compared if loaded.tickets is None else tickets.rounds
    return job(loaded, workdir, request)

  return commands.attempt(work, str(workdir), again)


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
