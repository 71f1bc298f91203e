"""Trains and tests every run of a config: the one function under the commands `train`, `tickets` and `claims`.

    with StopRequest() as request:
      outcomes = run(configs.load(path), pathlib.Path('runs/demo'), request)
    outcomes['SR-STE']['test']['accuracy']    # a number for each seed
"""

import contextlib
import functools
import io
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import rich.console
from ml_collections import ConfigDict

from experiments import configs
from experiments.data.batches import host_memory
from experiments.loop import checkpoints, evaluate, hosts, origins, outcomes, records, runs
from experiments.loop.progress import Progress
from experiments.loop.shared import Shared
from experiments.loop.stopping import StopRequest
from sparsejax import metrics
from sparsejax.types import Array


class Refused(ValueError):
  """`Refused` is raised before the first step, where the data, the model or a recipe refuses the config."""


class TooLarge(Refused):
  """`TooLarge` is raised where a step of all seeds needs more memory than the device has; `seeds` would fit."""

  def __init__(self, message: str, seeds: int):
    super().__init__(message)
    self.seeds = seeds


class Stopped(Exception):
  """`Stopped` is raised when a signal has stopped the run `name`, after its checkpoint is saved."""

  def __init__(self, name: str, request: StopRequest):
    super().__init__(f'Stopped by {request.name}, {name} is saved.')
    self.status = 128 + request.received


def run(config: ConfigDict, workdir: pathlib.Path, request: StopRequest, *,
        tickets: Mapping[str, runs.Ticket] = MappingProxyType({}), until: int | None = None,
        job: ConfigDict | None = None, scored: str = 'test', board: Progress | None = None,
        shared: Shared | None = None) -> outcomes.Outcomes:
  """Trains and tests each run of `config` that is not finished in `workdir`; returns the outcomes of all runs.

  The runs are trained one after the other, each in `workdir/<run>`, from its newest checkpoint if there is one. All
  runs are traced before the first one trains, so a config is refused at once (`ValueError`). `tickets` holds, by run
  name, where a run starts if not at the model's initial weights. `until` ends every run after that many steps; the
  schedules remain those of `config.steps` steps. `job` is the config of which `config` is a phase, by default `config`.
  Runs in `workdir` are compared with `job`, and `job` is written to `config.json` where a run is trained.

  `scored` is the split on which finished runs are tested. `board` shows the progress, by default a bar of this job.
  `shared` holds what earlier runs have made and this one may need again.

  Raises `Refused` where the data, the model or a recipe refuses the config, or where the memory is too small. Raises
  `ValueError` for a run in `workdir` that was trained under another config, see `origins.continued`. Raises
  `Stopped` if `request` stopped a run, and `FloatingPointError` if a loss or a parameter is not finite.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  hosts.check(configs.plain(config), workdir)
  job, ended = job or config, config if until is None else configs.changed(config, steps=until)
  directories = {name: workdir / name for name in configs.runs(config)}
  wanted = {name: configs.of_run(job, name) for name in directories}
  finished = lambda name: origins.is_finished(directories[name], wanted[name], ended.steps, job.resume_changed)
  todo = [name for name in directories if not hosts.first(finished(name))]
  with contextlib.nullcontext(board) if board else Progress(len(todo), ended.steps, console()) as progress:
    progress.doing('reading data, tracing')
    try:
      setup = runs.prepare(config, shared) if todo else None
      built = runs.build(setup, directories, tickets, shared) if todo else {}
    except ValueError as error:
      raise Refused(str(error)) from error
    for of_name in built.values():
      checkpoints.check(of_name.directory / 'checkpoints', of_name.state)
    if todo and hosts.leads():
      records.write_whole(workdir / 'config.json', json.dumps(configs.plain(job), indent=2) + '\n')
    for name in todo:
      train(built[name], setup._replace(config=ended), wanted[name], request, progress)
      progress.doing(f'testing {name}')
      outcomes.write(built[name], setup._replace(config=ended), progress.say, scored)
  hosts.agreed(0)  # The leading process has written all outcomes.
  return {name: outcomes.read(directory) for name, directory in directories.items()}


def console() -> rich.console.Console:
  """Returns the console of the leading process; the output of other processes is dropped."""
  return rich.console.Console(file=None if hosts.leads() else io.StringIO())


def train(run: runs.Run, setup: runs.Setup, wanted: Mapping[str, Any], request: StopRequest,
          progress: Progress) -> None:
  """Trains one run to its last step, from its newest checkpoint if there is one, and saves the state.

  `wanted` is the config of the run, as in `configs.of_run`, and is saved with the state.
  Raises `Stopped` if `request` stopped the run, after saving. Raises `FloatingPointError` where the loss or a parameter
  is no longer finite; every saved checkpoint is older.
  """
  config = setup.config
  with checkpoints.open_(run.directory / 'checkpoints') as saved:
    done, state, seconds, history = _resumed(run, saved, config, wanted, progress)
    save = functools.partial(checkpoints.save, saved, seeds=list(config.seeds), config=wanted, changes=history)
    progress.doing(f'compiling {run.name}')
    stopped = request.agreed()
    step = run.compiled() if done < config.steps and not stopped else None
    if step:
      _refuse_too_large(run.name, step, len(config.seeds))
    progress.start(run.name, done)
    losses, began = {}, time.monotonic() - seconds
    with records.Records(run.directory, done, config.writers) if hosts.leads() else contextlib.nullcontext() as record:
      while done < config.steps and not stopped:
        state, loss, measured = step(state, runs.batch(setup, done), np.int32(done), run.peak)
        done += 1
        losses[done] = loss
        measures, validates, saves = (done % every == 0 or done == config.steps for every in (
            config.measure_every, config.validate_every, config.checkpoint_every))
        waits = measures or validates or saves
        if waits:
          losses = _refuse_infinite(run.name, config, losses, saved.latest_step())
        numbers = _numbers(run, done, loss, measured) if measures else {}
        if validates:
          scores = evaluate.scores(setup.task, run.model.predict, state.params, runs.split(setup, 'valid'))
          numbers |= {f'valid_{key}': value for key, value in scores.items()}
        if numbers and record:
          record.write(done, numbers)
          progress.advance(done, numbers)
        if saves:
          save(done, state, seconds=time.monotonic() - began)
        stopped = request.agreed() if waits or hosts.alone() else False
    _refuse_infinite(run.name, config, losses, saved.latest_step())
    save(done, state, seconds=time.monotonic() - began)  # A signal may have come between two checkpoints.
  if done < config.steps:
    raise Stopped(run.name, request)


def free_memory() -> int:
  """Returns the bytes of memory that are free on the device, and on a CPU those that are available on the machine."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    return stats.get('bytes_limit', sys.maxsize) - stats.get('bytes_in_use', 0)
  return host_memory()


def _refuse_too_large(name: str, step: jax.stages.Compiled, seeds: int) -> None:
  """Raises `TooLarge` if the compiled step of all `seeds` needs more memory than is free."""
  sizes, free = step.memory_analysis(), free_memory()
  # The arguments of the step are the state, which is on the device already.
  needed = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes if sizes else 0
  if needed > free:
    raise TooLarge(f'{name}: a step of {seeds} seeds needs {needed:,} bytes beside its state, and {free:,} are free. '
                   'Train fewer seeds at a time, a smaller batch or a smaller model.', seeds * free // needed)


def _resumed(run: runs.Run, saved: Any, config: ConfigDict, wanted: Mapping[str, Any],
             progress: Progress) -> tuple[int, checkpoints.State, float, origins.History]:
  """Returns the number of steps done, the state after these steps, the seconds that they took, and the history."""
  restored = checkpoints.restore(saved, run.state, progress.say)
  if restored is None:
    return 0, run.start(), 0.0, []
  done, state, meta = restored
  history = origins.continued(run.directory, done, meta, wanted, config.steps, config.resume_changed)
  progress.say(f'{run.name}: resumed at step {done}.')
  if history != meta.get('changes', []):
    origins.refuse_other_recipe(state)
    progress.say(origins.told(run.name, history[-1:])[0])
    if hosts.leads():  # The outcome of the old config is not that of the checkpoints that follow.
      (run.directory / outcomes.FILE).unlink(missing_ok=True)
  return done, state, meta['seconds'], history


def _refuse_infinite(name: str, config: ConfigDict, losses: Mapping[int, Array], good: int | None) -> dict[int, Array]:
  """Returns an empty dict if all `losses`, by step, are finite. Raises `FloatingPointError` otherwise.

  `good` is the step of the newest checkpoint, or `None` if nothing is saved yet.
  """
  for step, loss in losses.items():
    bad = np.flatnonzero(~np.isfinite(loss))
    if len(bad):
      kept = 'nothing is saved yet' if good is None else f'the last good checkpoint, of step {good}, is kept'
      raise FloatingPointError(f'{name}: loss or parameters of seed {config.seeds[bad[0]]} are not finite at step '
                               f'{step}; {kept}. A lower optimizer.learning_rate or a clip may help.')
  return {}


def _numbers(run: runs.Run, done: int, loss: Array, measured: Mapping[str, Array]) -> dict[str, Any]:
  """Returns the record of a measured step: numbers per seed, and the step's FLOPs relative to those of a dense step."""
  numbers = {'loss': loss, **measured}
  densities = np.mean(numbers.pop('densities'), axis=0)
  flops = metrics.flops(run.model.contractions, dict(zip(run.sparse, densities)))
  return {**numbers, 'training_flops': flops.training / flops.dense_training,
          'learning_rate': float(run.learning_rate(done - 1))}
