"""Starts `experiments.train` in processes of its own, within a second: forks of a process that has imported everything.

The forks are real processes, with real signals and exit statuses; only their imports were done before.

    with together(Job(tmp_path / 'job', '--config', path, '--workdir', tmp_path / 'run')) as (job,):
      job.signal(signal.SIGTERM)
      status, out, err = job.wait()
"""

import contextlib
import importlib
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time

from experiments.data import digits

FORKS = multiprocessing.get_context('forkserver')
PATIENCE = 300  # seconds, for a loaded machine; only a broken test waits so long


def config(run, steps, **changes):
  """Returns the text of a config of a small run: two seeds, measured every step and saved every second step."""
  lines = [f'  config.{key} = {value!r}\n' for key, value in changes.items()]
  return f"""
from experiments.configs import default

def get_config():
  config = default.get_config()
  config.seeds = (3, 5)
  config.steps = {steps}
  config.batch_size = 8
  config.model = {{'name': 'mlp', 'widths': (32, 32)}}
  sparse = {{'pattern': '1:4', 'where': ['fc*/kernel'], 'dense_steps': 0.1, 'fine_tune_steps': 0.2}}
  config.recipes = {{{run!r}: {{'name': 'mdgf', **sparse, 'decay': {{'name': 'linear', 'begin': 0.0, 'end': 0.5}}}}}}
  config.measure_every = 1
  config.checkpoint_every = 2
{''.join(lines)}  return config
"""


def folder(place, config):
  """Returns `place` after writing the config and the data that jobs train on."""
  (place / 'config.py').write_text(config)
  digits.prepared(place / 'data')
  return place


class Job:
  """A `Job` is one process of `python -m experiments.<program>`. Its output goes to `place.out` and `place.err`."""

  def __init__(self, place, *arguments, devices=1, cache=None, before=None, program='train'):
    FORKS.set_forkserver_preload(['experiments.train', 'experiments.sweep', 'matplotlib.pyplot'])
    self.arguments = [*map(str, arguments)]
    self._out, self._err = (pathlib.Path(f'{place}.{name}') for name in ('out', 'err'))
    environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags(devices)}
    self._process = FORKS.Process(
        target=_main, args=(self.arguments, environment, cache, before, program, self._out, self._err))
    self._process.start()

  def signal(self, number):
    os.kill(self._process.pid, number)

  def running(self):
    return self._process.exitcode is None

  def wait(self):
    """Returns the exit status, the standard output and the standard error."""
    self._process.join(PATIENCE)
    assert not self.running(), (self._out.read_text(), self._err.read_text())
    return self._process.exitcode, self._out.read_text(), self._err.read_text()

  def kill(self):
    self._process.kill()
    self._process.join()


def flags(devices=1):
  """Returns the XLA flags of the tests for `devices` devices: programs compared bit for bit are compiled alike."""
  return os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')


@contextlib.contextmanager
def together(*jobs):
  """Yields the jobs, and kills those that still run at the end."""
  try:
    yield jobs
  finally:
    for job in jobs:
      job.kill()


def until(condition, *jobs):
  """Waits until `condition()` is true, or one of `jobs` has ended."""
  end = time.monotonic() + PATIENCE
  while not condition() and all(job.running() for job in jobs) and time.monotonic() < end:
    time.sleep(0.001)


def port():
  with socket.socket() as free:
    free.bind(('', 0))
    return free.getsockname()[1]


def _main(arguments, environment, cache, before, program, out, err):
  for number, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
  os.environ.update(environment)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  import jax
  for name, value in (('jax_disable_most_optimizations', True),
                      ('jax_compilation_cache_dir', cache and str(cache)),
                      ('jax_persistent_cache_min_compile_time_secs', 0.0),
                      ('jax_persistent_cache_min_entry_size_bytes', -1)):
    jax.config.update(name, value)
  if before:
    before()
  sys.exit(importlib.import_module(f'experiments.{program}').main(arguments))
