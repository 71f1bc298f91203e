"""Packs, checks and reports on a checkpoint of several gigabytes, and reads the peak memory of each command.

    python -m benchmarks.files --gigabytes 2 --tensor 64     # in megabytes; needs twice the disk

Each command runs in a process of its own: first on a small tensor, whose memory counts as that of the program, and then
on the whole checkpoint. The numbers are the growth of the peak over the size of the largest tensor, and the speed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import timing
from sparsejax import io, tables

BAR = 1.3  # times the largest tensor, beyond the program
COMMANDS = ('pack FILE OUT --pattern 2:4 --force', 'pack FILE OUT --pattern bitmask --force',
            'check FILE --pattern 2:4', 'report FILE')
PROGRAM = '''
import contextlib, io, json, resource, sys, time
from sparsejax import cli
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
  side = int((options.tensor * 1e6 / 4) ** 0.5) // 64 * 64
  largest, count = 4 * side**2, max(1, round(options.gigabytes * 1e9 / (4 * side**2)))
  with tempfile.TemporaryDirectory(dir=options.folder) as folder:
    one, whole, out = (str(pathlib.Path(folder) / name) for name in ('one', 'whole', 'out'))
    write(one, 256, 1)
    write(whole, side, count)
    rows = [measured(command.replace('OUT', out), one, whole) for command in COMMANDS]
  print(timing.hardware())
  print(f'{count} tensors of {largest / 1e6:.1f} MB')
  print(tables.aligned(('command', 'of a tensor', 'GB/s'), [
      (command, f'{grown / largest:.2f}', f'{count * largest / 1e9 / seconds:.2f}')
      for command, (grown, seconds) in zip(COMMANDS, rows)]))
  return int(any(grown > BAR * largest for grown, _ in rows))


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
