"""Keeps what one run makes for the next run that needs the same: decoded data, models, traced and compiled programs.

    shared = Shared()
    step = shared.of('step', key, lambda: jitted.lower(state, batch))    # `key` equal to the last: the step of before
"""

from collections.abc import Callable
from typing import Any


class Shared:
  """A `Shared` keeps one thing of each kind, the last, so that memory does not grow with the number of runs."""

  def __init__(self):
    self._kept: dict[str, tuple[Any, Any]] = {}

  def of(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Returns the kept thing of this `kind` if it has this `key`, or else `make()`, which is then kept."""
    if kind not in self._kept or self._kept[kind][0] != key:
      self._kept.pop(kind, None)  # The old is freed before the new is made.
      self._kept[kind] = key, make()
    return self._kept[kind][1]
