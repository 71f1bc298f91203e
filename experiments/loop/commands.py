"""Runs the job of a command: its options, its exit status, and one line on the terminal where the job ends early.

    def job(config, workdir, request):
      return run(config, workdir, request)

    exits.leave(lambda: main(None, 'train', job))

Exit status: 0 done; 1 another process is gone, resumable; 2 refused, with the reason in one line; 128 + signal: stopped
by Ctrl-C or SIGTERM, resumable.
"""

import argparse
import logging
import os
import pathlib
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import configs
from experiments.loop import checkpoints, hosts, outcomes, training
from experiments.loop.stopping import StopRequest

REFUSED, INTERRUPTED = 2, 130  # exit status

Job = Callable[[Any, pathlib.Path, StopRequest], Any]  # (config, workdir, request) -> what the job found


class Ended(NamedTuple):
  """An `Ended` says how a job ended. `patience` is how many seconds this process waits for the others to end too."""

  status: int
  outcomes: Any
  patience: int


def main(arguments: Sequence[str] | None, program: str, job: Job,
         load: Callable[[str, Sequence[str]], Any] = configs.load) -> int:
  """Runs `job` as `python -m experiments.<program>`, by default with the arguments of the process. Returns the status.

  `load` makes the first argument of `job` from the path of the config and the changes of `--set`.
  """
  options = _parsed(arguments, program)
  again = command(program, arguments) + (', and every other process with its own' if options.distributed else '')

  def work() -> Any:
    config, workdir = load(options.config, options.set), pathlib.Path(options.workdir)
    if options.distributed:
      hosts.join(options.distributed, workdir / 'logs')
    with StopRequest() as request:
      return job(config, workdir, request)

  ended = attempt(work, options.workdir, again, options.traceback)
  return hosts.leave(ended.status, ended.patience)


def attempt(work: Callable[[], Any], workdir: str, again: str, shows_traceback: bool = False) -> Ended:
  """Calls `work`. Says why in one line if `work` is stopped or refused; `again` is the command that resumes.

  An exception that is no refusal is raised, or, in one of several processes, printed: the others have to learn of it.
  """
  outcomes.commit()
  for name in ('absl', 'asyncio'):  # Orbax and TFDS log their every step, and also what they raise.
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    return Ended(0, work(), hosts.JOIN)
  except training.Stopped as stopped:
    training.console().print(f'{stopped} Resume with: {again}', markup=False, highlight=False, soft_wrap=True)
    return Ended(stopped.status, None, hosts.JOIN)
  except KeyboardInterrupt:
    hosts.say(f'Interrupted at once: what follows the last checkpoint is lost. Resume with: {again}')
    return Ended(INTERRUPTED, None, 0)
  except Exception as error:
    if hosts.lost(error):
      hosts.end()
    if shows_traceback or not isinstance(error, (ValueError, OSError, FloatingPointError)):
      if hosts.alone():
        raise
      traceback.print_exc()
    if checkpoints.no_room(error):  # Orbax never awaits its other writes, which Python would tell at exit.
      warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    hosts.say(f'error: {_reason(error, workdir)}')
    return Ended(REFUSED, None, hosts.LEAVE)


def command(program: str, arguments: Sequence[str] | None) -> str:
  """Returns the command line that runs `program` with `arguments` again, for a shell."""
  python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
  return shlex.join([python, '-m', f'experiments.{program}', *(sys.argv[1:] if arguments is None else arguments)])


def _parsed(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog=f'python -m experiments.{program}', allow_abbrev=False,
                                   description='Trains the runs of a config.')
  parser.add_argument('--config', required=True, help='a Python file with get_config(); see experiments/configs')
  parser.add_argument('--workdir', required=True, help='where checkpoints, metrics and results go, and resume from')
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='change one value of the config')
  parser.add_argument('--data_dir', action='append', dest='set', type='data.data_dir={}'.format, metavar='DIRECTORY',
                      help='where the data sets are: the same as --set data.data_dir=DIRECTORY')
  parser.add_argument('--distributed', nargs='?', const='auto', metavar='HOST:PORT,PROCESS,COUNT',
                      help='be one of several processes, each started with this command: PROCESS of them, from 0 to '
                      'COUNT - 1, number 0 on HOST; without a value JAX asks Slurm, Open MPI, Kubernetes or the TPU')
  parser.add_argument('--traceback', action='store_true', help='show where in the code a refusal comes from')
  return parser.parse_args(arguments)


def _reason(error: Exception, workdir: str) -> str:
  """Returns the error in one line, with the remedy where a library reports a full disk."""
  line = ' '.join(str(error).split())
  if not checkpoints.no_room(error):
    return line
  return (f'no room is left for {workdir} ({line}). Make room and give the same command again: '
          'it goes on from the last checkpoint.')
