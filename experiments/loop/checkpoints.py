"""Saves and restores checkpoints through Orbax: asynchronous, atomic, and bit for bit or refused.

    with checkpoints.open_(directory) as manager:
      checkpoints.save(manager, step, State(params, opt_state), seconds=12.5)
      step, state, meta = checkpoints.restore(manager, like, say=print)

A checkpoint holds the items `params`, `opt_state` and `meta`. All arrays have a leading seed axis. Orbax detects a
missing or truncated file, but not a flipped bit. Therefore `meta` also holds a fingerprint of the arrays.
"""

import contextlib
import errno
import gc
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

from experiments.loop import hosts
from sparsejax import errors, trees
from sparsejax.io import orbax
from sparsejax.types import Array, PyTree

KEEP = 2  # checkpoints of a run
CHECK = 'checksum'  # the key of the checksum of all other keys in `meta`


class State(NamedTuple):
  """A `State` holds the arrays that training changes, which are all that a checkpoint has to contain."""

  params: PyTree
  opt_state: PyTree


@contextlib.contextmanager
def open_(directory: str | os.PathLike[str]) -> Iterator[ocp.CheckpointManager]:
  """Yields Orbax's manager of the checkpoints of one run, which keeps the newest `KEEP`.

  Unfinished checkpoints of a process that was killed are removed. Raises `OSError` if `directory` cannot be a folder.
  """
  directory = pathlib.Path(directory).absolute()
  sys.unraisablehook, threading.excepthook = map(_without_late_errors, (sys.unraisablehook, threading.excepthook))
  # Orbax's own `cleanup_tmp_directories` deletes in the background, and may delete the new files of the same step.
  for unfinished in directory.glob('*.orbax-checkpoint-tmp*') if hosts.leads() else ():
    shutil.rmtree(unfinished)
  hosts.agreed(0)  # Before this, another process may still ask whether there are any checkpoints.
  # Orbax meets a file in the place of a folder only in its background threads, which then wait for each other.
  directory.mkdir(parents=True, exist_ok=True)
  handlers = {item: ocp.StandardCheckpointHandler() for item in State._fields} | {'meta': ocp.JsonCheckpointHandler()}
  options = ocp.CheckpointManagerOptions(max_to_keep=KEEP)
  with orbax.literal(directory.parent) as parent:
    with ocp.CheckpointManager(parent / directory.name, options=options, item_handlers=handlers) as manager:
      yield manager


def save(checkpoints: ocp.CheckpointManager, step: int, state: State, **meta: Any) -> None:
  """Starts to write the checkpoint of `step` in the background. If the checkpoint exists, `save` does nothing.

  A checkpoint that is not written completely is never restored. `meta` are further values for JSON. Raises `OSError` if
  the disk has no room for the checkpoint.
  """
  if step in checkpoints.all_steps():
    return
  # The room is checked beforehand, because each background writer that fails would print a traceback.
  needed = max(sum(leaf.nbytes for leaf in jax.tree.leaves(state)), _on_disk(checkpoints))
  free = shutil.disk_usage(checkpoints.directory).free
  if hosts.agreed(free < needed):
    raise OSError(f'checkpoints.save: no room for the checkpoint of step {step} in {_place(checkpoints)}: it may '
                  f'take {needed:,} bytes and {free:,} are free. Make room and give the same command again.')
  items = {item: ocp.args.StandardSave(tree) for item, tree in state._asdict().items()}
  meta = {**meta, 'fingerprint': fingerprint(state)}
  meta = ocp.args.JsonSave({**meta, CHECK: _checksum(meta)})
  checkpoints.save(step, args=ocp.args.Composite(**items, meta=meta))


def restore(checkpoints: ocp.CheckpointManager, like: State,
            say: Callable[[str], None]) -> tuple[int, State, dict[str, Any]] | None:
  """Returns step, state and meta of the newest undamaged checkpoint, or `None` if no checkpoint was ever saved.

  `like` has the shapes, dtypes and shardings of the state. A damaged checkpoint is reported to `say`, then moved to a
  directory `damaged` beside `checkpoints.directory`, and the checkpoint before it is read.

  Raises `ValueError` if the checkpoint belongs to another model. Also raises `ValueError` if all checkpoints are
  damaged, because a run of days should not start again by itself.
  """
  steps = sorted(checkpoints.all_steps(), reverse=True)
  for i, step in enumerate(steps):
    damage = refusal = None
    with _abandoned_reads_suppressed():
      try:
        saved = _saved_shapes(checkpoints, step)
        refusal = _mismatch(saved, like, _place(checkpoints))
        state, meta = _read(checkpoints, step, like) if refusal is None else (None, None)
      except Exception as error:  # Orbax and TensorStore raise many types, plain `Exception` among them.
        if hosts.lost(error):
          raise
        damage = _first_line(error)
    if hosts.agreed(damage is not None):
      say(f'The checkpoint of step {step} in {_place(checkpoints)} is damaged ({damage or "for another process"}).')
      continue
    if refusal is not None:
      raise refusal
    for damaged in steps[:i]:
      _set_aside(checkpoints, damaged)
    return step, state, meta
  if steps:
    raise ValueError(f'checkpoints.restore: no whole checkpoint is left in {_place(checkpoints)}. '
                     'Give another --workdir, or remove this one to start again.')
  return None


def check(directory: str | os.PathLike[str], like: State) -> None:
  """Raises `ValueError` if the newest checkpoint in `directory` belongs to another model or recipe than `like`."""
  if not pathlib.Path(directory).exists():
    return
  with open_(directory) as checkpoints:
    try:
      saved = _saved_shapes(checkpoints, checkpoints.latest_step())
    except Exception:  # No checkpoint exists, or the newest is damaged, which `restore` handles.
      return
    if refusal := _mismatch(saved, like, _place(checkpoints)):
      raise refusal


def newest(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any] | None]:
  """Returns step and meta of the newest checkpoint in `directory` whose meta is undamaged, or `(0, None)`."""
  if pathlib.Path(directory).is_dir():
    with open_(directory) as checkpoints:
      for step in sorted(checkpoints.all_steps(), reverse=True):
        with contextlib.suppress(Exception):  # `restore` reports a damaged meta.
          return step, _whole(checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta'])
  return 0, None


def fingerprint(tree: PyTree) -> int:
  """Returns 32 bits that any flipped bit and any swap of elements or arrays changes, and that no sharding changes."""
  # Each hash is awaited before the next, because concurrent collectives can block each other, and abort on a CPU.
  hashes = [jax.device_get(_hash(leaf)) for leaf in jax.tree.leaves(tree)]
  return zlib.crc32(np.array(hashes, np.uint32).tobytes())


@jax.jit
def _hash(leaf: Array) -> Array:
  """Returns the sum, `uint32[]`, of a hash of each element with its position. The sum is exact in any order.

  The function is compiled once per shape.
  """
  words = _words(leaf)
  place = jnp.uint32(0)
  for axis, size in enumerate(words.shape):
    place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  mixed = words ^ place * jnp.uint32(0x9E3779B1)
  mixed = (mixed ^ mixed >> 16) * jnp.uint32(0x85EBCA6B)  # the finalizer of Murmur3
  mixed = (mixed ^ mixed >> 13) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ mixed >> 16, dtype=jnp.uint32)


def _words(leaf: Array) -> Array:
  """Returns the bits of `leaf` as `uint32`, with a last axis of two for 64-bit types."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  return lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)


@contextlib.contextmanager
def _abandoned_reads_suppressed() -> Iterator[None]:
  """Suppresses what Python prints about each read that Orbax abandons when another read fails."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    yield
    gc.collect()
  finally:
    sys.unraisablehook = hook


def no_room(error: BaseException | None) -> bool:
  """Returns whether a write failed because the disk is full, or because a quota or a limit is reached."""
  return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or bool(
      re.search('No space left on device|Disk quota exceeded|File too large', str(error)))


def _without_late_errors(hook: Callable[[Any], None]) -> Callable[[Any], None]:
  """Returns `hook` without the tracebacks of background threads for errors that the main thread reports in a line.

  A thread of TensorStore may finish an abandoned read or write after the event loop was closed. A thread of TensorBoard
  raises its own error for a full disk, and for its own handle that was closed.
  """
  def filtered(report: Any) -> None:
    if str(report.exc_value) not in ('Event loop is closed', 'handle is closed') and not no_room(report.exc_value):
      hook(report)

  filtered.without_late_errors = True
  return hook if hasattr(hook, 'without_late_errors') else filtered


def _on_disk(checkpoints: ocp.CheckpointManager) -> int:
  """Returns the bytes of the newest checkpoint on disk, or 0. Many small files take more room than their arrays."""
  place = checkpoints.directory / str(checkpoints.latest_step())
  return sum(path.lstat().st_blocks * 512 for path in pathlib.Path(place).rglob('*'))


def _first_line(error: Exception) -> str:
  lines = str(error).splitlines()
  return f'{type(error).__name__}: {lines[0][:100]}' if lines else type(error).__name__


def _set_aside(checkpoints: ocp.CheckpointManager, step: int) -> None:
  """Moves a checkpoint to the directory `damaged`, so that its step can be saved again and nothing is lost."""
  aside = checkpoints.directory.parent / 'damaged' / str(step)
  if hosts.leads():
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    shutil.move(checkpoints.directory / str(step), aside)
  hosts.agreed(0)
  checkpoints.reload()


def _read(checkpoints: ocp.CheckpointManager, step: int, like: State) -> tuple[State, dict[str, Any]]:
  items = {item: ocp.args.StandardRestore(tree) for item, tree in like._asdict().items()}
  contents = checkpoints.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
  state, meta = State(*(contents[item] for item in State._fields)), _whole(contents['meta'])
  if fingerprint(state) != meta['fingerprint']:
    raise ValueError('the arrays are not those that were saved')
  return state, meta


def _whole(meta: dict[str, Any]) -> dict[str, Any]:
  """Returns `meta` without its checksum. Raises if `meta` is not what `save` wrote."""
  kept = {key: value for key, value in meta.items() if key != CHECK}
  if meta.get(CHECK, _checksum(kept)) != _checksum(kept):  # Older checkpoints have no checksum of their meta.
    raise ValueError('its meta is not what was saved')
  return kept


def _checksum(meta: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _place(checkpoints: ocp.CheckpointManager) -> pathlib.Path:
  """Returns the folder of the checkpoints under the name that the user gave it, for messages."""
  folder = pathlib.Path(checkpoints.directory)
  return orbax.behind(folder.parent) / folder.name


def _saved_shapes(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, jax.ShapeDtypeStruct]:
  metadata = checkpoints.item_metadata(step)
  names, leaves, _ = trees.flatten({item: metadata[item].tree for item in State._fields})
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in zip(names, leaves)}


def _mismatch(saved: dict[str, jax.ShapeDtypeStruct], like: State, directory: os.PathLike[str]) -> ValueError | None:
  """Returns the error that refuses a checkpoint with the arrays `saved`, or `None` if the arrays match `like`."""
  names, leaves, _ = trees.flatten(jax.eval_shape(_keys_as_data, like._asdict()))
  expected = dict(zip(names, leaves))
  remedy = f'Give another --workdir, or undo the change: {directory} belongs to another configuration.'
  for name, leaf in expected.items():
    stored = saved.get(name)
    if stored is None:
      return ValueError(f'checkpoints.restore: {name!r} of shape {leaf.shape} is not in the checkpoint. {remedy}')
    if (tuple(stored.shape), stored.dtype) != (leaf.shape, leaf.dtype):
      return errors.at_leaf('checkpoints.restore', name, leaf.shape,
                            f'the checkpoint has {stored.dtype}{list(stored.shape)}, the run {leaf.dtype}'
                            f'{list(leaf.shape)}. {remedy}')
  more = sorted(saved.keys() - expected.keys())
  return ValueError(f'checkpoints.restore: the checkpoint also holds {errors.some(more)}. {remedy}') if more else None


def _keys_as_data(tree: PyTree) -> PyTree:
  is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
