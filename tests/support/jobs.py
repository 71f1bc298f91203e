"""The training program in processes of its own that start in a second: forks of one that has imported everything.

They are real processes, with real signals and exit statuses; only their imports were done before.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time

from experiments.data import digits

FORKS = multiprocessing.get_context('forkserver')
PATIENCE = 300  # seconds, for a loaded machine; nothing waits so long unless something is broken


def config(run, steps, **changes):
  """The text of a config: one small run of two seeds, measured at every step and saved at every second."""
  lines = [f'  config.{key} = {value!r}\n' for key, value in changes.items()]
  return f"""
from experiments.configs import default

def get_config():
  config = default.get_config()
  config.seeds = (3, 5)
  config.steps = {steps}
  config.batch_size = 8
  config.model = {{'name': 'vit', 'patch': 4, 'width': 16, 'depth': 1, 'heads': 2}}
  sparse = {{'pattern': '1:4', 'where': ['mlp/*/kernel'], 'dense_steps': 0.1, 'fine_tune_steps': 0.2}}
  config.recipes = {{{run!r}: {{'name': 'mdgf', **sparse, 'decay': {{'name': 'linear', 'begin': 0.0, 'end': 0.5}}}}}}
  config.measure_every = 1
  config.checkpoint_every = 2
{''.join(lines)}  return config
"""


def folder(place, config):
  """`place`, with the config and the data that jobs train on."""
  (place / 'config.py').write_text(config)
  digits.prepared(place / 'data')
  return place


class Job:
  """One process of `python -m experiments.train`. What it says goes to files beside `place`."""

  def __init__(self, place, *arguments, devices=1, cache=None, before=None):
    FORKS.set_forkserver_preload(['experiments.train'])
    self.arguments = [*map(str, arguments)]
    self._out, self._err = (pathlib.Path(f'{place}.{name}') for name in ('out', 'err'))
    environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags(devices)}
    self._process = FORKS.Process(
        target=_main, args=(self.arguments, environment, cache, before, self._out, self._err))
    self._process.start()

  def signal(self, number):
    os.kill(self._process.pid, number)

  def running(self):
    return self._process.exitcode is None

  def wait(self):
    """Exit status, standard output and standard error."""
    self._process.join(PATIENCE)
    assert not self.running(), (self._out.read_text(), self._err.read_text())
    return self._process.exitcode, self._out.read_text(), self._err.read_text()

  def kill(self):
    self._process.kill()
    self._process.join()


def flags(devices=1):
  """What tests give XLA, for so many devices: programs that are to give the same bits are compiled alike."""
  return os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')


@contextlib.contextmanager
def together(*jobs):
  """The jobs; none is left behind."""
  try:
    yield jobs
  finally:
    for job in jobs:
      job.kill()


def until(condition, *jobs):
  """Waits for `condition()`, or for the end of any of `jobs`."""
  end = time.monotonic() + PATIENCE
  while not condition() and all(job.running() for job in jobs) and time.monotonic() < end:
    time.sleep(0.001)


def port():
  with socket.socket() as free:
    free.bind(('', 0))
    return free.getsockname()[1]


def _main(arguments, environment, cache, before, out, err):
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
  from experiments import train
  if before:
    before()
  sys.exit(train.main(arguments))
