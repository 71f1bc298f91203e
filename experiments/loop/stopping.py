"""Ctrl-C and SIGTERM as a question that the loop asks between steps, so that it can save before it leaves."""

import signal
import threading

from experiments.loop import hosts


class Signals:
  """Which signal asked to stop, if any. A context manager; a second Ctrl-C interrupts at once."""

  def __init__(self):
    self.received: int | None = None
    self._before: dict[int, object] = {}

  def __enter__(self) -> 'Signals':
    if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
      self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def agreed(self) -> bool:
    """Did any process receive one? All of them ask at the same step, and get the same answer."""
    if number := hosts.agreed(self.received or 0):
      self.received = number
    return bool(number)

  def _receive(self, number: int, _) -> None:
    if self.received == number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = number

  @property
  def name(self) -> str:
    return 'Ctrl-C' if self.received == signal.SIGINT else signal.Signals(self.received).name
