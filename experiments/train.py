"""Trains every run of a config, one after the other, on the same data from the same initial weights; compares them.

  python -m experiments.train --config experiments/configs/n_m/demo_vit_digits.py --workdir runs/demo [--set key=value]

The same command resumes a run that was stopped or killed, bit for bit, and prints the results of a finished one again.
To train in several processes or on several hosts, start each process with `--distributed` and one shared `--workdir`.
The exit statuses are those of `experiments.loop.commands`.
"""

import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.loop import commands, exits, hosts, training
from experiments.loop.outcomes import Outcomes
from experiments.loop.stopping import StopRequest
from experiments.tables import pages
from experiments.tables import runs as tables


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  return commands.main(arguments, 'train', compared)


def compared(config: ConfigDict, workdir: pathlib.Path, request: StopRequest) -> Outcomes:
  """Trains and tests each run that is not finished, then shows all of them. Returns the outcomes by run.

  Raises `ValueError` for a config of `experiments.tickets`, and whatever `training.run` raises.
  """
  if config.tasks is not None:
    raise ValueError('config: tasks is for tasks one after the other: give the same to python -m experiments.tasks.')
  if config.protocol is not None:
    raise ValueError('config: protocol is for another command: give the same to python -m experiments.protocols.')
  if config.tickets is not None:
    raise ValueError('config: tickets is for rounds of pruning: give the same to python -m experiments.tickets.')
  outcomes = training.run(config, workdir, request)
  if hosts.leads():
    pages.show(tables.page(list(outcomes.values()), workdir), workdir, training.console())
  return outcomes


if __name__ == '__main__':
  exits.leave(main)
