"""Ends a process even where a library's threads wait for something that never comes.

    if __name__ == '__main__':
      leave(main)    # `sys.exit(main())`, at the latest `PATIENCE` seconds after `main` has ended
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

PATIENCE = 20  # seconds that the threads of libraries have to end after the work
AFTER_ERRORS = 3  # the same after an error, which may have left threads that wait for each other


def leave(main: Callable[[], int]) -> NoReturn:
  """Exits with the status that `main` returns, and with status 1 and a traceback if `main` raises.

  Python waits at the exit for every thread that is no daemon, without end. Orbax has threads that wait for each other
  after a failed write. Therefore a daemon ends the process after `PATIENCE` seconds, and sooner after an error.
  """
  status = 1
  try:
    status = main()
  finally:
    ending = threading.Timer(min(PATIENCE, AFTER_ERRORS) if status else PATIENCE, _end, [status])
    ending.daemon = True
    ending.start()
  sys.exit(status)


def _end(status: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(status)
