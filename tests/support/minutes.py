"""Counts the process-minutes of each family of tests, and says which families exceed what is written down for them.

    meter = minutes.Meter()
    ...  # a test
    meter.lap()  # CPU seconds since the last lap, those of the processes that the test started included
"""

import multiprocessing.forkserver
import os
import pathlib
import time

# Each family takes these process-minutes on two idle cores (AMD EPYC), with no compiled program in the cache.
BUDGETS = {
    'experiments': 8.5, 'kernels': 5.0, 'words': 4.5, 'transforms': 4.0, 'recipes': 3.5, 'post_training': 2.5,
    'house': 2.5, 'structured': 2.5, 'tools': 2.0, 'formats': 1.5, 'programs': 1.0, 'attention': 1.0,
    'activation': 0.5, 'moe': 0.5,
}
NEW = 1.5  # minutes of a family that has no line yet
WHOLE = 50  # minutes of all families: two processes for the 25 minutes that `make test` may take
ROOM = 4  # On a busy machine the same test takes several times the CPU seconds, because cores share caches and clocks.


class Meter:
  """A `Meter` tells the CPU seconds since it was last asked, of this process and of those that this process started."""

  def __init__(self):
    self._before = _seconds()

  def lap(self):
    now, before = _seconds(), self._before
    self._before = now
    return now - before


def exceeded(spent):
  """Returns a line for each family whose minutes exceed the room that a busy machine has. `spent`: minutes by family.
  """
  return [f'{family}: {minutes:.2f} process-minutes, more than {ROOM} times its budget of {budget(family)}. '
          'Make its tests cheaper, or move cells to --cells all (tests/support/minutes.py)'
          for family, minutes in spent.items() if minutes > ROOM * budget(family)]


def budget(family):
  return BUDGETS.get(family, NEW)


def _seconds():
  times = os.times()
  return time.process_time() + times.children_user + times.children_system + _of_forks()


def _of_forks():
  """Returns the CPU seconds of the server of forks (`jobs`) and of its forks that have ended, where Linux says them."""
  pid = getattr(multiprocessing.forkserver._forkserver, '_forkserver_pid', None)
  try:
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
  except OSError:
    return 0.0
  return sum(map(int, fields[11:15])) / os.sysconf('SC_CLK_TCK')
