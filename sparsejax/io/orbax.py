"""Reads Orbax checkpoints of unknown structure as NumPy arrays, whatever the number of devices that saved them.

A folder holds a tree (`StandardCheckpointer`, `PyTreeCheckpointer`), several items (`Composite`), or the steps of a
`CheckpointManager`.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from sparsejax import errors
from sparsejax.io import headers
from sparsejax.types import PyTree

_TREES = ('StandardCheckpointHandler', 'PyTreeCheckpointHandler')  # the handlers that save trees


def read(path: str | os.PathLike[str], item: str | None = None) -> PyTree:
  """Returns the parameters of the newest complete step: the item `params`, or the only item, or `item`.

  `item` may also be a key at the top of the tree. If the tree has `params` beside an optimizer's state, only `params`
  is read from the disk. Raises `ValueError` if there is no checkpoint, if it is damaged, and if no item fits or several
  items do.
  """
  import orbax.checkpoint as ocp  # The import takes seconds; callers that read no checkpoint should not wait.

  step = _step(pathlib.Path(path).absolute(), ocp)
  items = _items(step)
  lost = [name for name in _written(step) if name not in items]
  if lost and item not in items and not {'params', 'default'} & items.keys():
    raise ValueError(f'io.read: {step} was saved with the items {errors.some(lost)}, which are incomplete or missing '
                     f'now; copy it again, or choose another item: {errors.some(items) or "there is none"}.')
  if not items:
    raise ValueError(f'io.read: {path} holds no complete Orbax checkpoint of a tree; in it there is '
                     f'{errors.some(sorted(os.listdir(path))) or "nothing"}.')
  name, key = _item(path, items, item)
  handler = ocp.PyTreeCheckpointHandler()
  with contextlib.closing(handler):
    with _readable(items[name]):
      tree = handler.metadata(items[name]).tree
    wanted, key = _wanted(path, tree, key, items)
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _readable(items[name]):
      args = ocp.args.PyTreeRestore(wanted, restore_args=arrays, partial_restore=True)
      tree = handler.restore(items[name], args=args)
  return _plain(tree if key is None else tree[key])


def _written(step: pathlib.Path) -> list[str]:
  """Returns the items of a step that were saved as trees, if Orbax wrote that down."""
  with contextlib.suppress(OSError, *headers.MALFORMED):
    handlers = headers.parsed((step / '_CHECKPOINT_METADATA').read_text())['item_handlers']
    return [name for name, handler in handlers.items() if str(handler).endswith(_TREES)]
  return []


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[None]:
  """Turns whatever Orbax raises over damaged files into a `ValueError` that names the folder."""
  try:
    yield
  except Exception as e:  # Libraries below Orbax raise errors of their own.
    reason = str(e).partition(' [tensorstore_spec')[0][:headers.MOST_TEXT]
    raise ValueError(f'io.read: Orbax cannot restore {folder}, which may be damaged: {reason}') from e


def at_top(path: Any, tree: PyTree, key: str, others: Iterable[str] = ()) -> Any:
  """Returns `tree[key]`. If there is no such key, raises `ValueError` listing the keys that there are, and `others`."""
  keys = list(tree) if isinstance(tree, dict) else []
  if key not in keys:
    raise errors.unknown('io.read', f'item of {path}', key, {*others, *map(str, keys)})
  return tree[key]


def _step(path: pathlib.Path, ocp: Any) -> pathlib.Path:
  """Returns the newest complete step of a `CheckpointManager`'s folder, and any other folder itself."""
  if _items(path) and (path / '_CHECKPOINT_METADATA').exists() or (path / '_METADATA').exists():
    return path
  steps = [pathlib.Path(step) for step in ocp.utils.checkpoint_steps_paths(path)]
  steps = {ocp.utils.step_from_checkpoint_name(step.name): step for step in steps if _items(step) or _written(step)}
  return steps[max(steps)] if steps else path


def _items(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the folders of the trees in one step, by name; a folder that is itself a tree has the name ''."""
  if (folder / '_METADATA').is_file():
    return {'': folder}
  return {entry.name: entry for entry in sorted(folder.iterdir()) if (entry / '_METADATA').exists()}


def _item(path: Any, items: dict[str, pathlib.Path], item: str | None) -> tuple[str, str | None]:
  """Returns the item to open, and the key of its tree to read, or `None` for the whole tree."""
  if item in items:
    return item, None
  usual = [name for name in ('params', 'default') if name in items] or list(items)
  if usual[0] not in ('params', 'default') and len(usual) > 1:
    raise ValueError(f'io.read: {path} holds several items, none of them `params`; choose one: {errors.some(usual)}.')
  return usual[0], item


def _wanted(path: Any, tree: PyTree, key: str | None, items: Iterable[str]) -> tuple[PyTree, str | None]:
  """Returns the part of the tree to restore, and its key: `params` if an optimizer's state is beside it."""
  if key is None and isinstance(tree, dict) and 'params' in tree and any(str(k).startswith('opt') for k in tree):
    key = 'params'
  return (tree, None) if key is None else ({key: at_top(path, tree, key, filter(None, items))}, key)


def _plain(tree: PyTree) -> PyTree:
  """Returns `tree` with numbers as arrays, and without the box `{'value': ...}` that NNX puts around each parameter."""
  if isinstance(tree, dict):
    return _plain(tree['value']) if list(tree) == ['value'] else {key: _plain(child) for key, child in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_plain(child) for child in tree]
  return np.asarray(tree) if isinstance(tree, (bool, int, float)) else tree
