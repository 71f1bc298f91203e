"""Tells how far a long call is, in lines of text, through one hook that users may replace.

    with progress.listening():                 # lines on the standard error, at most one in five seconds
      packed = formats.pack(params, '2:4')     # pack 7/96 block_0/mlp/fc1/kernel
    with progress.listening(lines.append): ... # every line, to a function of one's own

Pruning, packing, reading, checking and writing files, sensitivities and sweeps tell the hook. Without one they are
silent. A call that has an argument `progress` takes a hook for itself.
"""

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ['counted', 'listening', 'on_standard_error', 'paced', 'replaced', 'tell']

Hook = Callable[[str], None]
Item = TypeVar('Item')
SECONDS = 5.0

_HOOK: contextvars.ContextVar[Hook | None] = contextvars.ContextVar('sparsejax.progress', default=None)


def paced(hook: Hook, seconds: float = SECONDS) -> Hook:
  """Returns a hook that hands on at most one line in `seconds`, and none in the first `seconds`."""
  last = time.monotonic()

  def hand_on(line: str) -> None:
    nonlocal last
    if time.monotonic() - last >= seconds:
      last = time.monotonic()
      hook(line)

  return hand_on


def on_standard_error(line: str) -> None:
  """Prints a line on the standard error."""
  print(line, file=sys.stderr)


@contextlib.contextmanager
def listening(hook: Hook | None = None) -> Iterator[None]:
  """Tells `hook` every line of the long calls inside of the context, also of calls that other functions make.

  `hook(line)` is any function of a text. By default, lines go to the standard error, at the pace of `paced`. A context
  inside of another replaces its hook.
  """
  if hook is not None and not callable(hook):
    raise ValueError(f'progress.listening: `hook` must be a function of a line of text, not {hook!r}.')
  token = _HOOK.set(hook or paced(on_standard_error))
  try:
    yield
  finally:
    _HOOK.reset(token)


def replaced(own: Hook | None = None) -> Hook | None:
  """Returns the hook of a call: its own, or else that of the context, or `None` where nobody listens."""
  return own or _HOOK.get()


def tell(line: str, own: Hook | None = None) -> None:
  """Hands a line to the hook of a call, see `replaced`."""
  if hook := replaced(own):
    hook(line)


def counted(what: str, items: Sequence[Item], name: Callable[[Item], str] = str) -> Iterator[Item]:
  """Yields the items, and tells after each item that it is done: `pack 7/96 block_0/mlp/fc1/kernel`."""
  for number, item in enumerate(items, 1):
    yield item
    tell(f'{what} {number}/{len(items)} {name(item)}')
