"""Tests that a run that was killed, stopped or out of room, and resumed, ends with the bits of an undisturbed run."""

import ctypes
import errno
import functools
import gc
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time
import warnings

import jax
import jobs
import numpy as np
import pytest

from experiments.loop import commands
from sparsejax import io

RUN, STEPS = 'MdGf', 36
KILLS = 2  # of each run, or more until one hit a checkpoint that was being written
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
    """Starts a process, kills the process if its moment has come, or ends with the last kill. Never waits."""
    if self.job is None:
      self.before, self.at, self.job = whole(self.workdir), None, started(self.folder, self.name)
      self.writing = self.kills % 2  # every second kill while a checkpoint is written
      self.steps, self.delay = self.chance.randint(0, 2), self.chance.uniform(0, 0.02)
      return
    assert self.job.running(), self.job.wait()
    if self.at is None:
      if self._there():
        self.at = time.monotonic() + (self.delay / 5 if self.writing else self.delay)
    elif time.monotonic() >= self.at:
      self.end()

  def _there(self):
    """Returns whether it is time: the first kill may come before any checkpoint, the others come after a new one."""
    if self.kills == 0:
      return lines(self.workdir) > self.steps
    return whole(self.workdir) > self.before and (not self.writing or unfinished(self.workdir))

  def end(self):
    self.job.signal(signal.SIGKILL)
    code, out, _ = self.job.wait()
    assert code == -signal.SIGKILL
    if self.before:
      assert f'resumed at step {self.before}' in out  # No complete checkpoint was lost.
    assert whole(self.workdir) >= self.before
    self.kills, self.during, self.job = self.kills + 1, self.during + bool(unfinished(self.workdir)), None
    self.done = self.kills >= KILLS and self.during > 0


@pytest.fixture(scope='module')
def killed(folder, pytestconfig):
  """Returns the workdirs of the runs that were killed again and again, and not resumed after their last kill."""
  seeds = range(1, 6 if pytestconfig.getoption('--cells') == 'all' else 2)
  victims = [Victim(folder, f'killed-{seed}', seed) for seed in seeds]
  end = time.monotonic() + len(victims) * jobs.PATIENCE
  try:
    while not all(victim.done for victim in victims):
      assert time.monotonic() < end, [(victim.kills, victim.during) for victim in victims]
      for victim in victims:
        if not victim.done:
          victim.step()
      time.sleep(0.002)
  finally:
    for victim in victims:
      if victim.job:
        victim.job.kill()
  return [victim.workdir for victim in victims]


# A run has all misfortunes in turn, so that few processes are started: kills, a signal, a write that fails.


@pytest.fixture(scope='module', params=[(signal.SIGTERM, 'SIGTERM'), (signal.SIGINT, 'Ctrl-C')], ids=lambda p: p[1])
def stopped(request, folder, killed):
  """Returns the workdir of a run that was killed and then stopped by a signal, and the step at which it stopped."""
  number, name = request.param
  workdir = shutil.copytree(killed[0], folder / f'stopped-{name}')
  before = whole(workdir)
  with jobs.together(started(folder, workdir.name)) as (job,):
    jobs.until(lambda: whole(workdir) > before, job)
    job.signal(number)
    code, out, err = job.wait()
  assert (code, err) == (128 + number, '') and f'Stopped by {name}, {RUN} is saved.' in out
  assert f'--workdir {workdir}' in out.split('Resume with:')[1] and f'resumed at step {before}' in out
  assert not unfinished(workdir) and before < whole(workdir) == lines(workdir) < STEPS
  return workdir, whole(workdir)


def test_killed_again_and_again(folder, alone, killed):
  for workdir in killed[1:]:  # The first is resumed below, after more misfortunes.
    with jobs.together(started(folder, workdir.name)) as (job,):
      assert job.wait()[::2] == (0, '')
    same(workdir, alone)


def small_files():
  """Limits every file of this process to 12,000 bytes: the kernel refuses a larger write, whichever library makes it.
  """
  resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


@pytest.mark.sampled(1)
def test_killed_and_stopped_and_out_of_room_it_ends_in_the_same_bits(folder, alone, stopped):
  """A write that fails is said in one line and loses nothing."""
  workdir, good = stopped
  with jobs.together(started(folder, workdir.name, before=small_files)) as (job,):
    code, out, err = job.wait()
  assert code == 2 and f'resumed at step {good}' in out
  assert err.startswith('error: ') and err.count('\n') == 1 and 'Make room and give the same command again' in err, err
  assert whole(workdir) >= good
  with jobs.together(started(folder, workdir.name)) as (job,):
    assert job.wait()[::2] == (0, '')
  same(workdir, alone)


# A full disk.


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


def on_a_small_disk(disk):
  """Runs the caller in a fork on a small disk, mounted on `disk` for this process alone, and again after making room.

  Does nothing but say `forbidden` where the kernel lets no ordinary user mount in a namespace.
  """
  maps = {'uid_map': f'0 {os.getuid()} 1', 'setgroups': 'deny', 'gid_map': f'0 {os.getgid()} 1'}
  try:
    if ctypes.CDLL(None).unshare(0x10000000 | 0x20000):  # CLONE_NEWUSER | CLONE_NEWNS
      raise PermissionError('unshare')
    for name, text in maps.items():
      pathlib.Path('/proc/self', name).write_text(text)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=760k', 'tmpfs', disk], check=True)
  except (OSError, AttributeError, subprocess.CalledProcessError):
    os.write(1, b'forbidden')
    os._exit(0)
  for _ in range(2):
    if not (child := os.fork()):
      return
    os.write(1, f'status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n'.encode())
    subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
  shutil.copytree(disk / 'run', f'{disk}-run')
  os._exit(0)


def test_a_full_disk_is_said_in_a_line_and_loses_nothing(folder, alone):
  disk = folder / 'disk'
  disk.mkdir()
  job = jobs.Job(disk, *arguments(folder, 'disk/run'), cache=folder / 'cache',
                 before=functools.partial(on_a_small_disk, disk))
  with jobs.together(job):
    _, out, err = job.wait()
  if out == 'forbidden':
    pytest.skip('this user may not mount a file system in a namespace')
  first, second = out.split('status 2\n')
  assert 'status 0' in second and 'resumed at step' in second and 'resumed' not in first, (out, err)
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert 'Make room and give the same command again' in err
  same(folder / 'disk-run', alone)
