"""Keeps the finished cells of a sweep as JSON lines, one sweep in a folder at a time.

    with locked(workdir) as ledger:
      ledger.add('SR-STE/1of8', {'status': 'done', ...})
    ledger['SR-STE/1of8']['status']    # 'done', also after a kill
"""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments import configs
from experiments.loop import records

FILE, LOCK = 'cells.jsonl', 'sweep.lock'

Line = Mapping[str, Any]  # of one cell, see `experiments.sweep.engine`


class Ledger:
  """A `Ledger` holds the line of each finished cell, by place, and writes new lines at once."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    found = list(records.lines(path))
    self._lines = {line['cell']: line for line in found}
    written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(written) > len(found) + 1:
      raise ValueError(f'sweep: line {len(found) + 1} of {path} is damaged. Remove the line: its cell runs again.')
    if len(written) > len(found):  # A line that a kill cut is removed, so that the next line does not continue it.
      records.write_whole(path, b''.join(written[:-1]).decode())

  def get(self, place: str, config: Mapping[str, Any]) -> Line | None:
    """Returns the line of a finished cell, or `None`. Raises `ValueError` if the cell had another config."""
    line = self._lines.get(place)
    if line is not None and (changes := configs.differences(line['config'], config)):
      raise ValueError(f'sweep: the cell {place} in {self._path} was finished under another config '
                       f'({"; ".join(changes[:6])}). Give another --workdir, or undo the change.')
    return line

  def add(self, place: str, line: Line) -> Line:
    """Appends the line of a finished cell to the file, and returns the line."""
    line = {'cell': place, **line}
    records.append(self._path, line)
    self._lines[place] = line
    return line


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[Ledger]:
  """Yields the ledger in `workdir`. Raises `ValueError` if another process has the ledger open."""
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / LOCK).open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # The system gives the lock back when the process is killed.
    except OSError as error:
      raise ValueError(f'sweep: another sweep runs in {workdir}. Wait for it, or give another --workdir.') from error
    yield Ledger(workdir / FILE)
