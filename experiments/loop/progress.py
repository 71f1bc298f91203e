"""What training says while it lasts: a live bar on a terminal, now and then a plain line anywhere else."""

import datetime
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress

from experiments.loop.tasks import TASKS

QUIET = 5.0  # seconds from one plain line to the next
SHOWN = {'loss': 'loss {:.3f}', **{f'valid_{task.name}': f'valid {task.short}' for task in TASKS.values()},
         'sparsity': 'sparse {:.1%}', 'flips': 'flips {:.2%}'}


class Progress:
  """Steps done and time left over all `runs` of `steps` each, and the newest numbers of the one under way.

  A context manager; `say` works outside of it too.
  """

  def __init__(self, runs: int, steps: int, console: rich.console.Console):
    self._console, self._steps, self._left = console, steps, runs * steps
    self._worked, self._seconds, self._said = 0, 0.0, -QUIET
    columns = (rich.progress.BarColumn(bar_width=10), rich.progress.TextColumn('{task.description}', markup=False))
    self._bar = rich.progress.Progress(*columns, console=console, transient=True)
    self._task = self._bar.add_task('', total=max(self._left, 1))

  def __enter__(self) -> 'Progress':
    if self._console.is_terminal:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._console.is_terminal:
      self._bar.stop()

  def say(self, line: str) -> None:
    """One line that stays."""
    self._console.print(line, markup=False, highlight=False, soft_wrap=True)

  def doing(self, what: str) -> None:
    """What takes a while before or after the steps; shown where there is a bar."""
    self._bar.update(self._task, description=what)

  def start(self, run: str, done: int) -> None:
    """A run begins, or goes on after `done` steps: from here on time counts."""
    self._run, self._done, self._numbers, self._at = run, done, {}, time.monotonic()
    self._left -= done
    self._bar.update(self._task, advance=done, description=run)

  def advance(self, done: int, numbers: Mapping[str, Any]) -> None:
    """The run has done so many steps, with these numbers, single ones or one a seed."""
    steps, now = done - self._done, time.monotonic()
    self._worked, self._seconds = self._worked + steps, self._seconds + now - self._at
    self._done, self._at, self._left = done, now, self._left - steps
    self._numbers |= {key: np.mean(value) for key, value in numbers.items() if key in SHOWN}
    left = datetime.timedelta(seconds=round(self._left * self._seconds / self._worked))
    parts = [f'{self._run} {done}/{self._steps}']
    parts += [text.format(self._numbers[key]) for key, text in SHOWN.items() if key in self._numbers]
    line = '  '.join([*parts, f'{left} left'])
    self._bar.update(self._task, advance=steps, description=line)
    if not self._console.is_terminal and (now - self._said >= QUIET or done == self._steps):
      self._said = now
      self.say(line)
