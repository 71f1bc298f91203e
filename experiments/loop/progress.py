"""Shows the progress of training: a live bar on a terminal, and a plain line every few seconds elsewhere.

    with Progress(runs=2, steps=100, console=rich.console.Console()) as progress:
      progress.start('SR-STE', done=0)
      progress.advance(10, {'loss': [0.7, 0.8], 'sparsity': 0.5})  # SR-STE 10/100  loss 0.750  sparse 50.0%  ... left
"""

import datetime
import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress

from experiments.loop import hosts
from experiments.loop.tasks import TASKS
from sparsejax import progress

QUIET = 5.0  # seconds between two plain lines
SHOWN = {'loss': 'loss {:.3f}', **{f'valid_{task.name}': f'valid {task.short}' for task in TASKS.values()},
         'sparsity': 'sparse {:.1%}', 'flips': 'flips {:.2%}'}


def heard(console: rich.console.Console) -> rich.console.Console:
  """Returns a console whose lines go to the hook of `sparsejax.progress.listening`, or else `console`.

  Only the leading process tells the hook.
  """
  hook = progress.replaced()
  return rich.console.Console(file=_Told(hook), width=1000) if hook and hosts.leads() else console


class _Told(io.TextIOBase):
  """A `_Told` is a file whose lines go to a hook."""

  def __init__(self, hook: progress.Hook):
    super().__init__()
    self._hook = hook

  def write(self, text: str) -> int:
    for line in text.splitlines():
      self._hook(line.rstrip())
    return len(text)


class Progress:
  """A `Progress` shows the finished steps, the time left over all `runs` of `steps` each, and the newest numbers.

  `Progress` is a context manager; `say` also works outside of the context.
  """

  def __init__(self, runs: int, steps: int, console: rich.console.Console):
    console = heard(console)
    self._console, self._steps, self._steps_left = console, steps, runs * steps
    self._timed_steps, self._seconds, self._last_line = 0, 0.0, -QUIET
    columns = (rich.progress.BarColumn(bar_width=10), rich.progress.TextColumn('{task.description}', markup=False))
    self._bar = rich.progress.Progress(*columns, console=console, transient=True)
    self._task = self._bar.add_task('', total=max(self._steps_left, 1))

  def __enter__(self) -> 'Progress':
    if self._console.is_terminal:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._console.is_terminal:
      self._bar.stop()

  def say(self, line: str) -> None:
    """Prints a line that stays on the screen."""
    self._console.print(line, markup=False, highlight=False, soft_wrap=True)

  def doing(self, work: str) -> None:
    """Describes, beside the bar, the work before or after the steps. Without a terminal, nothing is shown."""
    self._bar.update(self._task, description=work)

  def start(self, run: str, done: int) -> None:
    """Starts the clock of the run `run`, of which `done` steps were finished before."""
    self._run, self._done, self._numbers, self._clock = run, done, {}, time.monotonic()
    self._steps_left -= done
    self._bar.update(self._task, advance=done, description=run)

  def advance(self, done: int, numbers: Mapping[str, Any]) -> None:
    """Notes that the run has finished `done` steps, with the newest `numbers`: a scalar each, or one value per seed."""
    steps, now = done - self._done, time.monotonic()
    self._timed_steps, self._seconds = self._timed_steps + steps, self._seconds + now - self._clock
    self._done, self._clock, self._steps_left = done, now, self._steps_left - steps
    self._numbers |= {key: np.mean(value) for key, value in numbers.items() if key in SHOWN}
    left = datetime.timedelta(seconds=round(self._steps_left * self._seconds / self._timed_steps))
    parts = [f'{self._run} {done}/{self._steps}']
    parts += [text.format(self._numbers[key]) for key, text in SHOWN.items() if key in self._numbers]
    line = '  '.join([*parts, f'{left} left'])
    self._bar.update(self._task, advance=steps, description=line)
    if not self._console.is_terminal and (now - self._last_line >= QUIET or done == self._steps):
      self._last_line = now
      self.say(line)
