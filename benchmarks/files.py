"""Packs, checks and reports on a checkpoint of several gigabytes, and reads the peak memory of each command.

    python -m benchmarks.files --gigabytes 2 --tensor 64     # in megabytes; needs twice the disk
    python -m benchmarks files                               # the claims on 2 GB, and on a report in memory

Each command runs in a process of its own: first on a small tensor, whose memory counts as that of the program, and then
on the whole checkpoint. The numbers are the growth of the peak over the size of the largest tensor, and the
speed. The last number is the time over that of a plain copy, which ends on the disk, as the files of `pack` do.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Measurement
from sparsejax import io, reports, tables
from sparsejax.io import headers
from sparsejax.types import Axes

BAR = 1.3  # times the largest tensor, beyond the program
SPEED = 0.4  # GB/s of every command
HAND = 'by hand, half of FILE written, and the digests of both'
PASSES = 4  # times one pass over the weights, for a report in memory
# The peak is that of the program itself: `getrusage` hands down the peak of the process that started it.
COMMANDS = ('pack FILE OUT --pattern 2:4 --force', 'pack FILE OUT --pattern bitmask --force',
            'check FILE --pattern 2:4', 'report FILE')
PROGRAM = '''
import contextlib, io, json, pathlib, re, sys, time
from sparsejax import cli
peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])
command, one, whole = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()):
  assert cli.main(command.replace('FILE', one).split()) == 0
  before, start = peak(), time.perf_counter()
  assert cli.main(command.replace('FILE', whole).split()) == 0
print(json.dumps([peak() - before, time.perf_counter() - start]))
'''


def main(arguments: list[str] | None = None) -> int:
  """Measures every command, prints a table, and returns 1 if a command takes more memory than `BAR` allows."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.files', description=__doc__.partition('\n')[0])
  parser.add_argument('--gigabytes', type=float, default=2, help='the size of the checkpoint (2)')
  parser.add_argument('--tensor', type=float, default=64, help='the megabytes of each tensor (64)')
  parser.add_argument('--folder', help='where the files are written and removed (default: a temporary folder)')
  options = parser.parse_args(arguments)
  rows = of_commands(options.gigabytes, options.tensor, options.folder)
  print(timing.hardware())
  print(tables.aligned(('command', 'of a tensor', 'GB/s', 'copies'), [
      (command, *(f'{number:.2f}' for number in row)) for command, row in rows.items()]))
  return int(any(grown > BAR for grown, _, _ in rows.values()))


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields the claims on a report in memory, and on the commands, each of which runs once on 2 GB."""
  yield from of_reports(rounds)
  for command, (grown, speed, _) in of_commands(2, 64, None).items():
    yield Measurement(f'{command}: GB/s', speed, (speed,) * 2, SPEED, True, 1)
    if command == HAND:
      continue
    yield Measurement(f'{command}: peak over the largest tensor', grown, (grown,) * 2, BAR, False, 1)


def of_reports(rounds: int) -> Iterator[Measurement]:
  """Yields the claims on `report` without a state, over one pass that sums the weights of 4096 x 4096."""
  w = jnp.where((jnp.arange(4096) % 4 < 2)[:, None], jax.random.normal(jax.random.key(0), (4096, 4096)), 0)
  cases = {'float32, along axis 0': (w, 0), 'float32, along axis 1': (w.T, 1), 'bfloat16': (w.astype(jnp.bfloat16), 0)}
  contestants = {name: lambda w=w, axis=axis: reports.report({'w': w}, axes={'w': Axes((axis,), (1 - axis,))}).achieved
                 for name, (w, axis) in cases.items()}
  pass_over = jax.jit(jnp.sum)
  seconds = list(timing.take_turns({'pass': lambda: pass_over(w), **contestants}, rounds))
  for name in contestants:
    yield timing.claim(f'report of {name}: over one pass in float32', seconds, name, 'pass', PASSES, False)


def of_commands(gigabytes: float, megabytes: float, folder: str | None) -> dict[str, tuple[float, float, float]]:
  """Returns for each command the growth of the peak over a tensor, GB/s, and the time over that of a plain copy."""
  side = int((megabytes * 1e6 / 4) ** 0.5) // 64 * 64
  largest, count = 4 * side**2, max(1, round(gigabytes * 1e9 / (4 * side**2)))
  found = {}
  with tempfile.TemporaryDirectory(dir=folder) as directory:
    one, whole, out = (str(pathlib.Path(directory) / name) for name in ('one', 'whole', 'out'))
    write(one, 256, 1)
    write(whole, side, count)
    found[HAND] = 0.0, count * largest / 1e9 / half_written(whole, out), 0.0
    for command in COMMANDS:
      copy = copied(whole, out)
      grown, seconds = measured(command.replace('OUT', out), one, whole)
      found[command] = grown / largest, count * largest / 1e9 / seconds, seconds / copy
  return found


def half_written(path: str, target: str) -> float:
  """Returns the seconds in which half of the file at `path` is written, with the digests of both, and nothing packed.

  The bytes of every file of `io` are verified. Digests are computed in threads of their own, as `io` does.
  """
  start = time.perf_counter()
  with open(path, 'rb') as source, open(target, 'wb') as half, headers.Behind() as read, headers.Behind() as wrote:
    digests = hashlib.sha256(), hashlib.sha256()
    while block := source.read(1 << 22):
      read.call(digests[0].update, block)
      wrote.call(digests[1].update, block[:len(block) // 2])
      half.write(block[:len(block) // 2])
    half.flush()
    os.fsync(half.fileno())
    read.wait(), wrote.wait()
  return time.perf_counter() - start


def copied(path: str, target: str) -> float:
  """Returns the seconds of a copy of the file at `path`, block by block, which is on the disk at the end."""
  start = time.perf_counter()
  with open(path, 'rb') as source, open(target, 'wb') as copy:
    shutil.copyfileobj(source, copy, 1 << 24)
    os.fsync(copy.fileno())
  return time.perf_counter() - start


def write(path: str, side: int, count: int) -> None:
  """Writes a checkpoint of `count` matrices that are 2:4 along the rows, one after another."""
  def load(seed: int) -> np.ndarray:
    w = np.random.default_rng(seed).standard_normal((side, side), np.float32)
    w[2::4] = w[3::4] = 0
    return w

  dtype = np.dtype('float32')
  leaves = [io.Stored((side, side), dtype, lambda seed=seed: load(seed)) for seed in range(count)]
  io.save(path, {'layers': [{'kernel': leaf} for leaf in leaves]})


def measured(command: str, one: str, whole: str) -> tuple[float, float]:
  """Returns the bytes by which `command` on `whole` raises the peak over `command` on `one`, and the seconds."""
  argv = [sys.executable, '-c', PROGRAM, command, one, whole]
  done = subprocess.run(argv, capture_output=True, text=True, check=True)
  grown, seconds = json.loads(done.stdout)
  return grown, seconds


if __name__ == '__main__':
  sys.exit(main())
