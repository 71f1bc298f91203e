"""Records what a run measures: JSON lines that survive a kill and a resume, and the same numbers for TensorBoard.

    with Records(directory, step=0) as record:
      record.write(10, {'loss': np.array([2.3, 2.2]), 'learning_rate': 1e-3})
    next(read(directory))    # {'step': 10, 'loss': [2.3, 2.2], 'learning_rate': 0.001}

A writer is a function that gets the same numbers, means over the seeds, for another board. W&B takes three lines:

    import wandb
    wandb.init(project='sparse')
    config.writers = (lambda run, step, numbers: wandb.log({f'{run}/{key}': x for key, x in numbers.items()}),)
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorboardX

FILE = 'metrics.jsonl'

Writer = Callable[[str, int, Mapping[str, float]], Any]  # (run, step, numbers)


class Records:
  """A `Records` is a context manager that appends one line a step to `metrics.jsonl`.

  `step` is the step at which training resumes. Lines of later steps, and a last line that a kill cut, are removed: the
  resumed run writes them again. A number that is not finite becomes `null`. The means over the seeds also go to a
  TensorBoard event file, and to each of `writers` with the name of `directory`.
  """

  def __init__(self, directory: str | os.PathLike[str], step: int, writers: Sequence[Writer] = ()):
    self._writers = writers
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
    """Appends one line: `step` and `values`, which are numbers or arrays `[seeds]`."""
    plain = {key: np.asarray(value).tolist() for key, value in values.items()}
    self._lines.write(json.dumps(_strict({'step': step, **plain})) + '\n')
    self._lines.flush()
    means = {key: float(np.mean(np.asarray(value, np.float64))) for key, value in values.items()}
    for key, mean in means.items():
      if np.isfinite(mean):
        self._board.add_scalar(key, mean, step)
    for writer in self._writers:
      try:
        writer(self._path.parent.name, step, means)
      except Exception as error:
        raise ValueError(f'config: a function of writers failed with {type(error).__name__}: {error}') from error


def read(directory: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """Yields the records of a run in order, up to the first line that a kill cut or that is damaged."""
  for record in lines(pathlib.Path(directory) / FILE):
    if not isinstance(record.get('step'), int):
      return
    yield record


def lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the objects of a file of JSON lines, up to the first line that a kill cut or that is damaged."""
  for line in path.read_bytes().splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:
      return
    if not isinstance(record, dict):
      return
    yield record


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any] | None:
  """Returns the object in the JSON file `path`, or `None` if there is no file.

  Raises `ValueError` with the file's name and the `remedy` if the file holds anything else.
  """
  path = pathlib.Path(path)
  try:
    found = json.loads(path.read_text()) if path.exists() else None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged ({error}). {remedy}') from error
  if not isinstance(found, dict | None):
    raise ValueError(f'{path} is damaged: it holds no JSON object. {remedy}')
  return found


def write_whole(path: str | os.PathLike[str], text: str) -> None:
  """Writes `text` to the file `path` atomically: no reader, even after a kill, sees half of it."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  with part.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def write_json(path: str | os.PathLike[str], tree: Any) -> None:
  """Writes `tree` as indented JSON, atomically. A float that is not finite becomes `null`: JSON has no NaN."""
  write_whole(path, json.dumps(_strict(tree), indent=2) + '\n')


def append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Appends `record` as one line to a file of JSON lines, and waits until the line is on the disk."""
  with path.open('a') as file:
    file.write(json.dumps(_strict(record)) + '\n')
    file.flush()
    os.fsync(file.fileno())


def _strict(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {key: _strict(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_strict(value) for value in tree]
  return None if isinstance(tree, float) and not math.isfinite(tree) else tree
