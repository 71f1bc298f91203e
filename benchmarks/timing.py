"""Measures on a noisy machine: the contestants take turns, and the result is the median of ratios paired by round.

    seconds = take_turns({'dense': lambda: dense(x, w), 'packed': lambda: op(x, sparse)}, rounds=20)
    claim('times faster than dense', seconds, 'dense', 'packed', bar=1.4).holds
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Measurement(NamedTuple):
  """A `Measurement` compares a measured number with a bar.

  A claim holds if `measured` is at least `bar`, or, where `at_least` is `False`, at most `bar`.
  """

  what: str
  measured: float
  spread: tuple[float, float]  # 10th and 90th percentile of the paired ratios
  bar: float
  at_least: bool
  rounds: int

  @property
  def holds(self) -> bool:
    return self.measured >= self.bar if self.at_least else self.measured <= self.bar


def take_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1,
               clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
  """Yields, for each round, the seconds of one call of each contestant. A first call of each compiles and warms up.

  The order of the contestants rotates from round to round, so that a slow moment of the machine does not always hit the
  same contestant. `calls` is the number of calls in a row, of which the median counts. With several calls, small
  operands are in the cache, as they are not after another contestant's turn. `time.process_time` as the `clock` counts
  the seconds of all cores together, without those of other processes.
  """
  names = list(contestants)
  for call in contestants.values():
    jax.block_until_ready(call())
  for i in range(rounds):
    seconds = {}
    for name in names[i % len(names):] + names[:i % len(names)]:
      taken = []
      for _ in range(calls):
        start = clock()
        jax.block_until_ready(contestants[name]())
        taken.append(clock() - start)
      seconds[name] = float(np.median(taken))
    yield seconds


def claim(what: str, rounds: Iterable[dict[str, float]], over: str, under: str, bar: float,
          at_least: bool = True) -> Measurement:
  """Returns the claim on `over / under`, paired by round: the median, and the 10th and the 90th percentile."""
  ratios = [seconds[over] / seconds[under] for seconds in rounds]
  low, median, high = np.percentile(ratios, [10, 50, 90])
  return Measurement(what, float(median), (float(low), float(high)), bar, at_least, len(ratios))


def with_gradients(product: Callable[..., jax.Array]) -> Callable[..., tuple[Any, Any, Any]]:
  """Returns the compiled `step(x, w, dy, *rest)`: `product(x, w, *rest)`, and the gradients of `x` and `w` for `dy`."""
  def step(x, w, dy, *rest):
    y, back = jax.vjp(lambda x, w: product(x, w, *rest), x, w)
    return y, *back(dy)

  return jax.jit(step)


def environment() -> dict[str, str]:
  """Returns where a number was measured: `device` (the CPU with its cores, or the accelerator), `jax`, and `commit`."""
  device = jax.devices()[0]
  name = f'{_cpu_name()}, {len(os.sched_getaffinity(0))} cores' if device.platform == 'cpu' else device.device_kind
  commit = output('git', 'rev-parse', '--short', 'HEAD')
  changed = commit != 'unknown' and output('git', 'diff', '--name-only', 'HEAD', '--', '*.py')
  return {'device': name, 'jax': jax.__version__, 'commit': f'{commit} and changes' if changed else commit}


def hardware() -> str:
  """Returns the line that stands beside a number: device, version of JAX, and commit."""
  here = environment()
  return f'{here["device"]}, jax {here["jax"]}, commit {here["commit"]}'


def output(*command: str) -> str:
  """Returns what a command prints, or 'unknown' if the command cannot run or fails."""
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def _cpu_name() -> str:
  try:
    with open('/proc/cpuinfo') as f:
      return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
