"""Turns Ctrl-C and SIGTERM into a request that the training loop reads between two steps, to save before it exits.

    with StopRequest() as request:
      while not request.agreed():
        state = step(state)
"""

import signal
import threading

from experiments.loop import hosts


class StopRequest:
  """A `StopRequest` is a context manager that notes in `received` which signal asked the process to stop.

  `received` is `None` until SIGINT (Ctrl-C) or SIGTERM arrives. A second Ctrl-C raises `KeyboardInterrupt` at once.
  Leaving the context restores the former handlers. Outside of the main thread no handler is installed.
  """

  def __init__(self):
    self.received: int | None = None
    self._handlers: dict[int, object] = {}

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread.
      self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def agreed(self) -> bool:
    """Returns whether any process has received a signal. All processes call `agreed` at the same step.

    All processes get the same answer, and `received` becomes the largest signal number among the processes.
    """
    if number := hosts.agreed(self.received or 0):
      self.received = number
    return bool(number)

  def _receive(self, number: int, _) -> None:
    if self.received == number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = number

  @property
  def name(self) -> str:
    """The name of the received signal for messages: `Ctrl-C` or `SIGTERM`."""
    return 'Ctrl-C' if self.received == signal.SIGINT else signal.Signals(self.received).name
