"""Tests that a run that was killed, stopped or out of room, and resumed, ends with the bits of an undisturbed run."""

import errno
import gc
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
import warnings

import jax
import jobs
import numpy as np
import pytest

from experiments.loop import commands
from sparsejax import io

ROOT = pathlib.Path(__file__).parents[2]
RUN, STEPS = 'MdGf', 36
KILLS = 4  # of each run; half of the kills hit a checkpoint that is being written
CONFIG = jobs.config(RUN, STEPS, validate_every=18)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return jobs.folder(tmp_path_factory.mktemp('crash'), CONFIG)


def arguments(folder, workdir):
  return ['--config', str(folder / 'config.py'), '--workdir', str(folder / workdir), '--data_dir', str(folder / 'data')]


def started(folder, workdir, **options):
  return jobs.Job(folder / workdir, *arguments(folder, workdir), cache=folder / 'cache', **options)


@pytest.fixture(scope='module')
def alone(folder):
  """Returns the workdir of the run that nothing disturbs."""
  with jobs.together(started(folder, 'alone')) as (job,):
    code, _, err = job.wait()
  assert (code, err) == (0, '')
  return folder / 'alone'


def lines(workdir):
  path = workdir / RUN / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def unfinished(workdir):
  return list((workdir / RUN / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))


def whole(workdir):
  """Returns the step of the newest complete checkpoint, 0 if there is none."""
  return max((int(path.name) for path in (workdir / RUN / 'checkpoints').glob('*') if path.name.isdigit()), default=0)


def bits(workdir):
  """Returns every array of the last checkpoint as bytes, by item."""
  place = workdir / RUN / 'checkpoints' / str(STEPS)
  return {item: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(io.read(place, item))]
          for item in ('params', 'opt_state')}


def same(workdir, alone):
  assert bits(workdir) == bits(alone)
  for file in ('metrics.jsonl', 'packed.safetensors'):
    assert (workdir / RUN / file).read_bytes() == (alone / RUN / file).read_bytes()


class Victim:
  """A `Victim` is a run that is killed again and again, at random moments. Call `step` until `done`."""

  def __init__(self, folder, name, seed):
    self.folder, self.workdir, self.name, self.chance = folder, folder / name, name, random.Random(seed)
    self.job, self.kills, self.during, self.done = None, 0, 0, False

  def step(self):
    """Starts a process, kills the process if its moment has come, or notes its end. Never waits."""
    if self.job is None:
      self.before, self.at, self.job = whole(self.workdir), None, started(self.folder, self.name)
      self.writing = self.kills % 2  # every second kill while a checkpoint is written
      self.steps, self.delay = self.chance.randint(0, 2), self.chance.uniform(0, 0.05)
      return
    if not self.job.running():
      code, out, err = self.job.wait()
      assert (code, err) == (0, ''), (out, err)
      self.done = True
    elif self.kills < KILLS and self.at is None:
      there = unfinished(self.workdir) if self.writing else lines(self.workdir) > self.before + self.steps
      if there:
        self.at = time.monotonic() + (self.delay / 5 if self.writing else self.delay)
    elif self.kills < KILLS and time.monotonic() >= self.at:
      self.end()

  def end(self):
    self.job.signal(signal.SIGKILL)
    code, out, _ = self.job.wait()
    assert code == -signal.SIGKILL
    if self.before:
      assert f'resumed at step {self.before}' in out  # No complete checkpoint was lost.
    assert whole(self.workdir) >= self.before
    self.kills, self.during, self.job = self.kills + 1, self.during + bool(unfinished(self.workdir)), None


def test_killed_again_and_again(folder, alone, pytestconfig):
  seeds = range(1, 6 if pytestconfig.getoption('--cells') == 'all' else 3)
  victims = [Victim(folder, f'killed-{seed}', seed) for seed in seeds]
  end = time.monotonic() + len(victims) * jobs.PATIENCE
  try:
    while not all(victim.done for victim in victims):
      assert time.monotonic() < end, [(victim.kills, victim.during) for victim in victims]
      for victim in victims:
        if not victim.done:
          victim.step()
      time.sleep(0.0005)
  finally:
    for victim in victims:
      if victim.job:
        victim.job.kill()
  assert [victim.kills for victim in victims] == [KILLS] * len(victims)
  assert sum(victim.during for victim in victims) >= len(victims) // 2, [victim.during for victim in victims]
  for victim in victims:
    same(victim.workdir, alone)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(('number', 'name'), [(signal.SIGINT, 'Ctrl-C'), (signal.SIGTERM, 'SIGTERM')])
def test_stopped(folder, alone, number, name):
  workdir = folder / f'stopped-{name}'
  with jobs.together(started(folder, workdir.name)) as (job,):
    jobs.until(lambda: lines(workdir) >= 7, job)
    job.signal(number)
    code, out, err = job.wait()
  assert (code, err) == (128 + number, '') and f'Stopped by {name}, {RUN} is saved.' in out
  assert f'--workdir {workdir}' in out.split('Resume with:')[1]
  stopped = whole(workdir)
  assert not unfinished(workdir) and stopped == lines(workdir)
  with jobs.together(started(folder, workdir.name)) as (job,):
    code, out, err = job.wait()
  assert (code, err) == (0, '') and f'resumed at step {stopped}' in out
  same(workdir, alone)


# A full disk.


def small_files():
  """Limits every file of this process to 12,000 bytes: the kernel refuses a larger write, whichever library makes it.
  """
  resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


def test_a_write_that_fails_is_said_in_a_line_and_loses_nothing(folder, alone):
  workdir = folder / 'limited'
  with jobs.together(started(folder, 'limited')) as (job,):
    jobs.until(lambda: whole(workdir) >= 4, job)
    job.signal(signal.SIGTERM)
    assert job.wait()[0] == 128 + signal.SIGTERM
  good = whole(workdir)
  with jobs.together(started(folder, 'limited', before=small_files)) as (job,):
    code, out, err = job.wait()
  assert code == 2 and f'resumed at step {good}' in out
  assert err.startswith('error: ') and err.count('\n') == 1 and 'Make room and give the same command again' in err, err
  assert whole(workdir) >= good
  with jobs.together(started(folder, 'limited')) as (job,):
    assert job.wait()[::2] == (0, '')
  same(workdir, alone)


def test_writes_that_a_full_disk_left_behind_are_not_told(capsys):
  async def write_fragment():
    """Stands for a write of Orbax that nothing awaits."""

  left = []

  def work():
    left.append(write_fragment())
    raise OSError(errno.ENOSPC, 'No space left on device')

  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    assert commands.attempt(work, 'runs', 'again').status == commands.REFUSED
    left.clear()
    gc.collect()
  assert not told, [str(one.message) for one in told]
  assert capsys.readouterr().err.startswith('error: no room is left for runs')


FULL_DISK = """
mount -t tmpfs -o size=760k tmpfs "$0" || exit 99
"$@"; echo "status $?"; ls "$0"/run/MdGf/checkpoints
mount -o remount,size=100m "$0" && "$@"; echo "status $?"
cp -r "$0"/run "$0"-run
"""


def test_a_full_disk_is_said_in_a_line_and_loses_nothing(folder, alone):
  """Mounts a small disk in a namespace of its own; where the kernel forbids it to ordinary users, the test is skipped.
  """
  disk = folder / 'disk'
  disk.mkdir()
  mounting = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c']
  try:
    allowed = subprocess.run([*mounting, 'mount -t tmpfs tmpfs "$0"', str(disk)], capture_output=True).returncode == 0
  except FileNotFoundError:
    allowed = False
  if not allowed:
    pytest.skip('this user may not mount a file system in a namespace')
  command = [sys.executable, '-m', 'experiments.train', *arguments(folder, 'disk/run')]
  done = subprocess.run([*mounting, FULL_DISK, str(disk), *command], cwd=ROOT, env=environment(folder), text=True,
                        capture_output=True, timeout=2 * jobs.PATIENCE)
  first, second = done.stdout.split('status 2\n')
  assert 'status 0' in second and 'resumed at step' in second, done
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
  assert 'Make room and give the same command again' in done.stderr
  same(folder / 'disk-run', alone)


def environment(folder):
  return {**os.environ, 'XLA_FLAGS': jobs.flags(), 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
          'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
