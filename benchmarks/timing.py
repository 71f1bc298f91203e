"""Timing that survives a noisy machine: contestants take turns, and what counts is the median of paired ratios."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Claim(NamedTuple):
  """One line of the result: `measured` against the `bar`, and whether more or less is better."""

  what: str
  measured: float
  spread: tuple[float, float]  # 10th and 90th percentile of the paired ratios
  bar: float
  at_least: bool
  rounds: int

  @property
  def holds(self) -> bool:
    return self.measured >= self.bar if self.at_least else self.measured <= self.bar


def take_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1) -> Iterator[dict[str, float]]:
  """Seconds of one call of each, round after round, after one call each to compile and warm up.

  The order turns from round to round, so that a slow moment of the machine does not always hit the same one. With
  `calls`, the median of so many in a row: what is small is then in the cache, as it is not after another's turn.
  """
  names = list(contestants)
  for call in contestants.values():
    jax.block_until_ready(call())
  for i in range(rounds):
    seconds = {}
    for name in names[i % len(names):] + names[:i % len(names)]:
      taken = []
      for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(contestants[name]())
        taken.append(time.perf_counter() - start)
      seconds[name] = float(np.median(taken))
    yield seconds


def ratio(rounds: list[dict[str, float]], over: str, under: str) -> tuple[float, tuple[float, float]]:
  """Median and 10th to 90th percentile of `over / under`, paired by round."""
  ratios = [seconds[over] / seconds[under] for seconds in rounds]
  low, median, high = np.percentile(ratios, [10, 50, 90])
  return float(median), (float(low), float(high))


def hardware() -> str:
  """One line that a number can stand beside: device, cores, versions, commit."""
  device = jax.devices()[0]
  git = lambda *args: subprocess.run(['git', *args], capture_output=True, text=True, check=False)
  commit = git('rev-parse', '--short', 'HEAD').stdout.strip() or 'unknown'
  if git('diff', '--quiet', 'HEAD', '--', '*.py').returncode == 1:
    commit += ' and changes'
  cpu = f'{_cpu_name()}, {len(os.sched_getaffinity(0))} cores' if device.platform == 'cpu' else device.device_kind
  return f'{cpu}, jax {jax.__version__}, commit {commit}'


def _cpu_name() -> str:
  try:
    with open('/proc/cpuinfo') as f:
      return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
