"""A run that is killed, terminated, interrupted, and resumed each time, ends bit for bit as one that was left alone."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from experiments import digits
from sparsejax import io

ROOT = pathlib.Path(__file__).parent.parent
RUN, STEPS = 'MdGf', 40
CONFIG = f"""
from experiments.configs import default

def get_config():
  config = default.get_config()
  config.seeds = (3, 5)
  config.steps = {STEPS}
  config.batch_size = 8
  config.model = {{'name': 'vit', 'patch': 4, 'width': 16, 'depth': 1, 'heads': 2}}
  sparse = {{'pattern': '1:4', 'where': ['mlp/*/kernel'], 'dense_steps': 0.1, 'fine_tune_steps': 0.2}}
  config.recipes = {{'MdGf': {{'name': 'mdgf', **sparse, 'decay': {{'name': 'linear', 'begin': 0.0, 'end': 0.5}}}}}}
  config.measure_every = 1
  config.validate_every = 9
  config.checkpoint_every = 3
  return config
"""


def command(folder, workdir):
  """What trains in `workdir`, with its config and its data in `folder`."""
  config = folder / 'config.py'
  config.write_text(CONFIG)
  return [sys.executable, '-m', 'experiments.train', '--config', str(config), '--workdir', str(workdir),
          '--set', f'data.data_dir={folder / "data"}']


def started(arguments):
  return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def disturbed(arguments, workdir, number, at, delay):
  """Starts the command, sends signal `number` `delay` seconds after step `at`, and returns how it ended."""
  process = started(arguments)
  metrics = workdir / RUN / 'metrics.jsonl'
  while process.poll() is None and (not metrics.exists() or metrics.read_text().count('\n') < at):
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(number)
  out, err = process.communicate()
  return process.returncode, out, err


def bits(workdir):
  """Every array of the last checkpoint as bytes, by item."""
  place = workdir / RUN / 'checkpoints' / str(STEPS)
  return {item: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(io.read(place, item))]
          for item in ('params', 'opt_state')}


def test_stopped_four_times(tmp_path):
  workdir, alone = tmp_path / 'stopped', tmp_path / 'alone'
  digits.prepared(tmp_path / 'data')
  undisturbed = started(command(tmp_path, alone))  # meanwhile, on the other core
  arguments, chance = command(tmp_path, workdir), random.Random(20)
  moment = lambda least, most: (chance.randint(least, most), chance.uniform(0, 0.1))
  assert disturbed(arguments, workdir, signal.SIGKILL, *moment(1, 8))[0] == -signal.SIGKILL
  code, out, err = disturbed(arguments, workdir, signal.SIGTERM, *moment(9, 14))
  assert code == 128 + signal.SIGTERM and 'Stopped by SIGTERM' in out and not err, (out, err)
  code, out, err = disturbed(arguments, workdir, signal.SIGINT, *moment(18, 24))
  assert code == 128 + signal.SIGINT and f'--workdir {workdir}' in out.split('Resume with:')[1] and not err, (out, err)
  assert disturbed(arguments, workdir, signal.SIGKILL, *moment(27, 38))[0] == -signal.SIGKILL
  for process in (started(arguments), undisturbed):
    out, err = process.communicate()
    assert process.returncode == 0 and not err, (out, err)

  assert bits(workdir) == bits(alone)
  for file in ('metrics.jsonl', 'packed.safetensors'):
    assert (workdir / RUN / file).read_bytes() == (alone / RUN / file).read_bytes()
