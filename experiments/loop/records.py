"""What a run measured: JSON lines that survive a kill and a resume, and the same numbers for TensorBoard."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorboardX

FILE = 'metrics.jsonl'


class Records:
  """Appends one line a step to `metrics.jsonl` and the means over seeds to a TensorBoard event file.

  `step` is where training resumes: lines beyond it, and a last one cut by a kill, are removed, for they will be written
  again. A context manager. A number that is not finite becomes `null`.
  """

  def __init__(self, directory: str | os.PathLike, step: int):
    self._path = pathlib.Path(directory) / FILE
    kept = [json.dumps(record) + '\n' for record in read(directory) if record['step'] <= step]
    write_whole(self._path, ''.join(kept))
    self._lines = self._path.open('a')
    self._board = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1, flush_secs=30)

  def __enter__(self) -> 'Records':
    return self

  def __exit__(self, *_) -> None:
    self._lines.close()
    self._board.close()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """One line: `step` and `values`, numbers or arrays `[seeds]`."""
    self._lines.write(json.dumps({'step': step, **{key: _plain(value) for key, value in values.items()}}) + '\n')
    self._lines.flush()
    for key, value in values.items():
      if np.isfinite(mean := np.mean(np.asarray(value, np.float64))):
        self._board.add_scalar(key, mean, step)


def read(directory: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """The whole lines of a run, in order."""
  path = pathlib.Path(directory) / FILE
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      yield json.loads(line)
    except json.JSONDecodeError:  # cut by a kill
      return


def write_whole(path: str | os.PathLike, text: str) -> None:
  """Writes the file so that nobody, not even after a kill, sees half of it."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  with part.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def _plain(value: Any) -> Any:
  value = np.asarray(value).tolist()
  finite = lambda x: x if not isinstance(x, float) or math.isfinite(x) else None
  return [finite(x) for x in value] if isinstance(value, list) else finite(value)
