"""Ends one run: tests the checkpoint on disk, packs and unpacks it, compares predictions, writes `outcome.json`.

    write(run, setup, say=print)
    outcome = read(run.directory, setup.config)
    outcome['test']['accuracy'], tested_parameters(outcome)    # a number for each seed; arrays [seeds, ...]
"""

import functools
import math
import os
import pathlib
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import jax

import sparsejax
from experiments.loop import checkpoints, evaluate, hosts, records, sharding
from experiments.loop.checkpoints import State
from experiments.loop.runs import Run, Setup, split
from sparsejax import formats, io, metrics, trees
from sparsejax.patterns import NM
from sparsejax.types import PyTree

FILE = 'outcome.json'
PACKED, DENSE = 'packed.safetensors', 'dense.safetensors'

Outcome = Mapping[str, Any]  # of one run, as `write` writes it
Outcomes = Mapping[str, Outcome]  # by run name, the baseline first


def read(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns the outcome of the run in `directory` with this `directory`, or `None` if the run is not finished.

  Raises `ValueError` for a damaged file.
  """
  outcome = records.read_json(directory / FILE, 'Remove the file, and the last checkpoint is tested again.')
  return None if outcome is None else {**outcome, 'directory': directory}


def tested_parameters(outcome: Outcome) -> PyTree:
  """Returns the tested parameters of a finished run, NumPy arrays `[seeds, ...]`.

  Raises `ValueError` if the checkpoint on disk no longer holds the very bits that were tested.
  """
  place = outcome['directory'] / outcome['checkpoint']['path']
  params = io.read(place, 'params')
  if checkpoints.fingerprint(params) != outcome['checkpoint'].get('fingerprint'):
    raise ValueError(f'{outcome["name"]}: the parameters in {place} are not those that were tested. Remove '
                     f'{outcome["directory"]} to train the run again.')
  return params


def write(run: Run, setup: Setup, say: Callable[[str], None], scored: str = 'test') -> None:
  """Tests the newest checkpoint, as it is on disk, once on the split `scored`; packs it if a pattern is N:M.

  The outcome holds the scores under the name of the split. With `valid` the test split is not read, and nothing is
  packed. Raises `ValueError` if the packed file gives other predictions than the checkpoint, in any bit.
  """
  with checkpoints.open_(run.directory / 'checkpoints') as saved:
    step, state, meta = checkpoints.restore(saved, run.state, say)
  place = run.directory / 'checkpoints' / str(step)
  scores = evaluate.scores(setup.task, run.model.predict, state.params, split(setup, scored))
  labels = evaluate.labels(split(setup, scored))
  fingerprint = checkpoints.fingerprint(state.params)
  sharded, state = state.params, sharding.gathered(state)
  report = sparsejax.report(state.params, state.opt_state)
  packed = _packed(run, setup, sharded, state, report) if scored == 'test' else None
  if not hosts.leads():
    return
  records.write_whole(run.directory / 'report.txt', f'{report}\n')
  records.write_json(run.directory / FILE, {
      'name': run.name, 'steps': step, 'seeds': list(setup.config.seeds), 'seconds': meta['seconds'],
      'task': setup.task_name, scored: {key: value.tolist() for key, value in scores.items()},
      'labels': labels, 'empty': _empty(run, state.params),
      'asked': report.asked, 'achieved': report.achieved if report.rows else None,
      'training_flops': _training_flops(run), 'inference_flops': _inference_flops(run, state),
      'checkpoint': {'path': f'checkpoints/{step}', 'bytes': _size(place / 'params'),
                     'dense_bytes': formats.nbytes(state.params), 'fingerprint': fingerprint},
      'packed': packed, 'environment': environment(), 'config': meta['config'], 'changes': meta['changes'],
  })


def environment() -> dict[str, Any]:
  """Returns the platform, the device, the number of CPUs, the version of JAX and the commit of this process."""
  device = jax.devices()[0]
  return {'platform': device.platform, 'device': device.device_kind, 'cpus': len(os.sched_getaffinity(0)),
          'jax': jax.__version__, 'commit': commit()}


@functools.cache
def commit() -> str | None:
  """Returns the commit of the code, as it was when this function was called first: commands call it as they start.

  A commit that a user makes during a training is not that of the code which trains. `None` without Git.
  """
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
  try:
    described = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
  except OSError:  # Git is not installed.
    return None
  return described.stdout.strip() or None


def _training_flops(run: Run) -> float:
  """Returns the mean FLOPs of a training step over those of a dense step.

  The FLOPs recorded at a step stand for all steps since the record before.
  """
  lines = [line for line in records.read(run.directory) if 'training_flops' in line]
  spans = [line['step'] - before for before, line in zip([0, *(line['step'] for line in lines)], lines)]
  return sum(span * line['training_flops'] for span, line in zip(spans, lines)) / sum(spans)


def _inference_flops(run: Run, state: State) -> float:
  densities = metrics.density(state.params)
  flops = metrics.flops(run.model.contractions, {path: densities[path] for path in run.sparse})
  return flops.inference / flops.dense_inference


def _empty(run: Run, params: PyTree) -> list[int]:
  """Returns, for each seed, how many of the sparse leaves have no weight left."""
  names, leaves, _ = trees.flatten(params)
  weights = [leaf for name, leaf in zip(names, leaves) if name in run.sparse]
  return sum((leaf == 0).reshape(len(leaf), -1).all(1).astype(int) for leaf in weights).tolist()


def _packed(run: Run, setup: Setup, params: PyTree, state: State, report: sparsejax.Report) -> dict[str, Any] | None:
  """Writes the parameters packed, reads the file back, and compares predictions. Returns `None` if no pattern is N:M.

  The same parameters are written dense beside the packed file, so that the sizes of two files can be compared.
  `params` are sharded; `state` holds the same parameters whole.
  """
  rows = {row.path: row for row in report.rows if isinstance(row.pattern, NM)}
  if not rows:
    return None
  path = run.directory / PACKED
  packed = formats.pack(state.params, {path: row.pattern for path, row in rows.items()},
                        where=lambda path, leaf: path in rows, axes={path: row.axes for path, row in rows.items()})
  if hosts.leads():
    io.save(path, packed)
    io.save(run.directory / DENSE, state.params)
  hosts.agreed(0)
  unpacked = sharding.sharded(formats.unpack(io.load(path)), params)
  if not evaluate.same_predictions(run.model.predict, params, unpacked, split(setup, 'test')):
    raise ValueError(f'{run.name}: the predictions of {path} are not those of the checkpoint; please report it.')
  small = [leaf for leaf in jax.tree.leaves(packed, is_leaf=formats.is_packed) if formats.is_packed(leaf)]
  return {'path': path.name, 'bytes': path.stat().st_size, 'dense_bytes': (run.directory / DENSE).stat().st_size,
          'sparse_bytes': formats.nbytes(small),
          'sparse_dense_bytes': sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in small)}


def _size(directory: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in pathlib.Path(directory).rglob('*') if path.is_file())
