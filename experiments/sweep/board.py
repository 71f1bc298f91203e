"""Shows all cells of a sweep in one live table on a terminal, and a plain line every few seconds elsewhere.

    with Board(arms, runs=12, metric='loss', console=console) as board:
      board.begin(arm, 'test')
      board.finished(arm.place, line)
"""

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.live
import rich.table
import rich.text

from experiments.loop.progress import Progress, heard
from experiments.sweep.grids import Arm

WAITING, REFUSED, DIVERGED, DROPPED = '.', 'refused', 'diverged', 'dropped'
STYLES = {REFUSED: 'yellow', DIVERGED: 'red', DROPPED: 'dim', WAITING: 'dim'}


class Board:
  """A `Board` shows, for each arm, what is done: the metric, how far a run is, or why there is none.

  A `Board` takes the calls that `training.run` makes on a `Progress`. `spent` is the seconds of all cells so far, those
  of earlier processes included. `runs` is the number of all cells.
  """

  def __init__(self, arms: Sequence[Arm], runs: int, metric: str, console: rich.console.Console):
    self.spent = self.ran = self._wall = 0.0
    console = heard(console)
    self._arms, self._runs, self._metric, self._console = arms, runs, metric, console
    self._cells = {arm.place: WAITING for arm in arms}
    self._done, self._now, self._began = set(), '', time.monotonic()
    self._arm: Arm | None = None
    self._progress = Progress(1, 1, console)
    self._live = rich.live.Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True)

  def __enter__(self) -> 'Board':
    if self._console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    if self._console.is_terminal:
      self._live.stop()

  # `training.run` calls the methods that follow.

  def say(self, line: str) -> None:
    """Prints a line that stays on the screen."""
    self._progress.say(line)

  def doing(self, work: str) -> None:
    """Notes the work before or after the steps of a run."""
    self._now = work

  def start(self, run: str, done: int) -> None:
    """Starts the clock of a run, of which `done` steps were finished before."""
    self._progress = _Lines(self._arm.config.steps, self._console)
    self._progress.start(self._title, done)

  def advance(self, done: int, numbers: Mapping[str, Any]) -> None:
    """Notes that the run has finished `done` steps, with the newest `numbers`."""
    self._now = self._progress.described(done, numbers)
    if self._phase == 'test':
      self._cells[self._arm.place] = f'{done / self._arm.config.steps:.0%}'

  # The engine calls the methods that follow.

  def begin(self, arm: Arm, phase: str) -> None:
    """Notes that the cell `arm` runs now, in one of the phases `tuning`, `test` and `flops`."""
    self._arm, self._phase = arm, phase
    self._title = arm.place
    if phase == 'tuning':
      self._cells.update({place: f'tuning {arm.axes["learning_rate"]}' for place in self._cells
                          if arm.place.rpartition('/')[0] == place})

  def finished(self, place: str, line: Mapping[str, Any], ran: bool) -> None:
    """Notes the line of a finished cell, and whether the cell `ran` in this process."""
    self.ran += line['wall'] if ran else 0.0
    if place not in self._done:
      self._done.add(place)
      self.spent += line['cpu']
      self._wall += line['wall']
    if place in self._cells:
      self._cells[place] = _text(line, self._metric)
    if line['status'] != 'done' and place in self._cells:
      self.say(f'{place}: {line["status"]}: {line["reason"]}')

  def _table(self) -> rich.console.Group:
    """Returns the table of the arms that share task, data and model with the running arm, and a line on the whole."""
    section = lambda arm: [arm.axes[axis] for axis in ('task', 'data', 'model')]
    shown = [arm for arm in self._arms if self._arm is None or section(arm) == section(self._arm)]
    columns = list(dict.fromkeys(_column(arm) for arm in shown))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), show_edge=False,
                             title=' '.join(name for name in section(shown[0]) if name) or None, title_justify='left')
    for name in ['', *columns]:
      table.add_column(name, no_wrap=True, justify='right' if name else 'left')
    for recipe in dict.fromkeys(arm.axes['recipe'] for arm in shown):
      cells = {_column(arm): self._cells[arm.place] for arm in shown if arm.axes['recipe'] == recipe}
      table.add_row(recipe, *(rich.text.Text(cells.get(name, ''), STYLES.get(cells.get(name), '')) for name in columns))
    return rich.console.Group(table, rich.text.Text(self._summary(), no_wrap=True, overflow='ellipsis'))

  def _summary(self) -> str:
    seconds = time.monotonic() - self._began
    left = datetime.timedelta(seconds=round(self._wall / len(self._done) * (self._runs - len(self._done)))) if (
        self._done) else 'unknown time'
    elapsed = datetime.timedelta(seconds=round(seconds))
    return f'{len(self._done)} of {self._runs} cells, {elapsed} here, about {left} left. Now: {self._now}'


class _Lines(Progress):
  """A `_Lines` prints the lines of a `Progress`, without its bar, and returns them for the live table."""

  def __init__(self, steps: int, console: rich.console.Console):
    super().__init__(1, steps, console)
    self._last = ''

  def described(self, done: int, numbers: Mapping[str, Any]) -> str:
    """Advances, and returns the line that describes the run."""
    self.advance(done, numbers)
    return str(self._bar.tasks[0].description)


def _column(arm: Arm) -> str:
  return ' '.join(name for name in (arm.axes['pattern'] or 'any', arm.axes['learning_rate']) if name)


def _text(line: Mapping[str, Any], metric: str) -> str:
  if line['status'] != 'done':
    return line['status']
  values = line['scores'][metric]
  return f'{sum(values) / len(values):.4f}'
