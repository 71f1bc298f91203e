"""Trains every run of a config, one after the other, on the same data from the same initial weights, and compares them.

  python -m experiments.train --config experiments/configs/n_m/demo_vit_digits.py --workdir runs/demo [--set key=value]

The same command resumes a run that was stopped or killed, bit for bit, and prints the results of a finished one again.
On several hosts, or in several processes of one, each gets it with `--distributed`, and one shared `--workdir`.
Exit status: 0 done; 1 another process is gone, resumable; 2 refused, with the reason in one line; 128 + signal: stopped
by Ctrl-C or SIGTERM, resumable.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import pathlib
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import checkpoints, evaluate, hosts, outcomes, records
from experiments.loop.progress import Progress
from experiments.loop.runs import Run, Setup, batch, build, prepare, split
from experiments.loop.stopping import StopRequest
from experiments.tables import results
from sparsejax import metrics
from sparsejax.types import Array

Loop = Callable[[ConfigDict, pathlib.Path, StopRequest, str], int]  # (config, workdir, signals, command) -> exit status


def main(arguments: Sequence[str] | None = None, program: str = 'train', loop: Loop | None = None) -> int:
  """Runs `loop`, default `compare`, as `python -m experiments.<program>`. Returns the exit status."""
  asked = _parsed(arguments, program)
  for name in ('absl', 'asyncio'):  # Orbax and TFDS log their every step, and what they raise too
    logging.getLogger(name).setLevel(logging.CRITICAL)
  python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
  again = shlex.join([python, '-m', f'experiments.{program}', *(sys.argv[1:] if arguments is None else arguments)])
  again += ', and every other process with its own' if asked.distributed else ''
  patience = hosts.LEAVE
  try:
    config, workdir = configs.load(asked.config, asked.set), pathlib.Path(asked.workdir)
    if asked.distributed:
      hosts.join(asked.distributed, workdir / 'logs')
    with StopRequest() as signals:
      status, patience = (loop or compare)(config, workdir, signals, again), hosts.JOIN
  except KeyboardInterrupt:
    hosts.say(f'Interrupted at once: what follows the last checkpoint is lost. Resume with: {again}')
    status, patience = 130, 0
  except Exception as error:
    if hosts.lost(error):
      hosts.end()
    if asked.traceback or not isinstance(error, (ValueError, OSError, FloatingPointError)):
      if hosts.alone():
        raise
      traceback.print_exc()
    hosts.say(f'error: {_reason(error, asked.workdir)}')
    status = 2
  return hosts.leave(status, patience)


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


def compare(config: ConfigDict, workdir: pathlib.Path, signals: StopRequest, again: str) -> int:
  """Trains and tests each run that is not finished yet, then shows all of them. Returns the exit status."""
  if config.tickets is not None:
    raise ValueError('config: tickets is for rounds of pruning: give the same to python -m experiments.tickets.')
  workdir.mkdir(parents=True, exist_ok=True)
  hosts.check(configs.plain(config), workdir)
  console = rich.console.Console(file=None if hosts.leads() else io.StringIO())
  directories = {name: workdir / name for name in configs.runs(config)}
  todo = [name for name, directory in directories.items() if hosts.first(outcomes.read(directory, config) is None)]
  with Progress(len(todo), config.steps, console) as progress:
    say_what_changed(config, workdir, progress)
    progress.doing('reading data, tracing')
    setup = prepare(config) if todo else None
    runs = build(setup, directories) if todo else {}
    for run in runs.values():
      checkpoints.check(run.directory / 'checkpoints', run.state)
    if hosts.leads():
      records.write_whole(workdir / 'config.json', json.dumps(configs.plain(config), indent=2) + '\n')
    for name in todo:
      if not train(runs[name], setup, signals, progress):
        progress.say(f'Stopped by {signals.name}, {name} is saved. Resume with: {again}')
        return 128 + signals.received
      progress.doing(f'testing {name}')
      outcomes.write(runs[name], setup, progress.say)
  if hosts.leads():
    results.show([outcomes.read(directory, config) for directory in directories.values()], workdir, console)
  return 0


def train(run: Run, setup: Setup, signals: StopRequest, progress: Progress) -> bool:
  """Trains one run to its end, from its newest checkpoint if it has one. False if a signal stopped it, after saving.

  Raises `FloatingPointError` where the loss or a parameter is no longer finite; all that is saved is from before that.
  """
  config = setup.config
  with checkpoints.open_(run.directory / 'checkpoints') as saved:
    done, state, before = _resumed(run, saved, config, progress)
    progress.doing(f'compiling {run.name}')
    stopped = signals.agreed()
    step = run.step.compile() if done < config.steps and not stopped else None
    progress.start(run.name, done)
    losses, began = {}, time.monotonic() - before
    with records.Records(run.directory, done) if hosts.leads() else contextlib.nullcontext() as record:
      while done < config.steps and not stopped:
        state, loss, measured = step(state, batch(setup, done), np.int32(done))
        done += 1
        losses[done] = loss
        due = lambda every, done=done: done % every == 0 or done == config.steps
        waits = due(config.measure_every) or due(config.validate_every) or due(config.checkpoint_every)
        if waits:
          losses = _refuse_infinite(run, config, losses, saved.latest_step())
        numbers = _numbers(run, done, loss, measured) if due(config.measure_every) else {}
        if due(config.validate_every):
          numbers |= _validation(run, setup, state)
        if numbers and record:
          record.write(done, numbers)
          progress.advance(done, numbers)
        if due(config.checkpoint_every):
          _save(saved, done, state, config, time.monotonic() - began)
        stopped = signals.agreed() if waits or hosts.alone() else False
    _refuse_infinite(run, config, losses, saved.latest_step())
    _save(saved, done, state, config, time.monotonic() - began)  # nothing, unless a signal came between two of them
  return done == config.steps


def _resumed(run: Run, saved: Any, config: ConfigDict, progress: Progress) -> tuple[int, Any, float]:
  """Steps done, state, and the seconds that they took."""
  found = checkpoints.restore(saved, run.state, progress.say)
  if found is None:
    return 0, run.start(), 0.0
  done, state, meta = found
  if tuple(meta['seeds']) != tuple(config.seeds) or done > config.steps:
    raise ValueError(f'train: {saved.directory} holds step {done} of seeds {meta["seeds"]}; the config asks for '
                     f'{config.steps} steps of seeds {list(config.seeds)}. Give another --workdir.')
  progress.say(f'{run.name}: resumed at step {done}.')
  return done, state, meta['seconds']


def _save(saved: Any, done: int, state: Any, config: ConfigDict, seconds: float) -> None:
  checkpoints.save(saved, done, state, seconds=seconds, seeds=list(config.seeds))


def _refuse_infinite(run: Run, config: ConfigDict, losses: Mapping[int, Array], good: int | None) -> dict[int, Array]:
  """No losses, if all of them are finite. Raises `FloatingPointError` otherwise."""
  for step, loss in losses.items():
    bad = np.flatnonzero(~np.isfinite(loss))
    if len(bad):
      kept = 'nothing is saved yet' if good is None else f'the last good checkpoint, of step {good}, is kept'
      raise FloatingPointError(f'{run.name}: loss or parameters of seed {config.seeds[bad[0]]} are not finite at step '
                               f'{step}; {kept}. A lower optimizer.learning_rate or a clip may help.')
  return {}


def _numbers(run: Run, done: int, loss: Array, measured: Mapping[str, Array]) -> dict[str, Any]:
  """What is recorded of a measured step: numbers per seed, and the operations of this step relative to a dense one."""
  numbers = {'loss': loss, **measured}
  densities = np.mean(numbers.pop('densities'), axis=0)
  flops = metrics.flops(run.model.contractions, dict(zip(run.sparse, densities)))
  return {**numbers, 'training_flops': flops.training / flops.dense_training,
          'learning_rate': float(run.learning_rate(done - 1))}


def _validation(run: Run, setup: Setup, state: Any) -> dict[str, Any]:
  scores = evaluate.scores(setup.task, run.model.predict, state.params, split(setup, 'valid'))
  return {f'valid_{key}': value for key, value in scores.items()}


def _reason(error: Exception, workdir: str) -> str:
  """One line; with the remedy where libraries report a full disk."""
  line = ' '.join(str(error).split())
  if not checkpoints.no_room(error):
    return line
  return (f'no room is left for {workdir} ({line}). Make room and give the same command again: '
          'it goes on from the last checkpoint.')


def say_what_changed(config: ConfigDict, workdir: pathlib.Path, progress: Progress) -> None:
  path = workdir / 'config.json'
  if path.exists():
    for difference in configs.differences(json.loads(path.read_text()), configs.plain(config)):
      progress.say(f'Not as the last time: {difference}')


if __name__ == '__main__':
  sys.exit(main())
