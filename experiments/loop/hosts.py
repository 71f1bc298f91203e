"""Connects several processes that train as one through `jax.distributed`, and reports in a line when a process is lost.

A single process needs no connection, and each function returns at once. Several processes must call `agreed`, `first`
and `gathered` in the same order, because each call waits for all processes.
"""

import ctypes
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import configs

JOIN = 300  # seconds that a process waits for the other processes, at the start and at the end
SILENCE = 60  # seconds without a heartbeat after which a process counts as lost
LEAVE = 10  # seconds that a process which refuses waits for the other processes to refuse too
LOST = 1  # the exit status after another process was lost


def join(where: str, directory: pathlib.Path) -> None:
  """Joins this process to the others. `where` is `HOST:PORT,PROCESS,COUNT`, or `auto` for a cluster that JAX detects.

  After `join`, the output of C++ goes to a file in `directory`. JAX writes a page of such output and aborts when
  another process is lost. Raises `ValueError` for another `where`, and if process 0 cannot listen at HOST:PORT.
  """
  place = _place(where)
  log = _redirect_cpp(directory)
  _on_abort(f'error: the other processes did not join within {JOIN} seconds. Start every process, each with its own '
            f'number and all with the same address and count. Details: {log}')
  # JAX's preemption service would replace the handler of SIGTERM in `stopping`.
  jax.config.update('jax_enable_preemption_service', False)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)  # JAX waits in C++, where Python's handler never runs.
  try:
    jax.distributed.initialize(**place, initialization_timeout=JOIN, heartbeat_timeout_seconds=SILENCE,
                               shutdown_timeout_seconds=JOIN)
    log = log.replace(log.with_name(f'process_{jax.process_index()}.log'))
  except ValueError as error:
    raise ValueError('--distributed: JAX finds no cluster here (Slurm, Open MPI, TPU, Kubernetes); '
                     'give --distributed HOST:PORT,PROCESS,COUNT.') from error
  except RuntimeError as error:
    raise ValueError(f'--distributed: process 0 cannot listen at {where.partition(",")[0]} ({error}). '
                     'If the port is in use, give all processes another port.') from error
  finally:
    signal.signal(signal.SIGINT, ctrl_c)
  _on_abort(f'error: process {jax.process_index()} stops, because another process is gone. The steps after the last '
            f'checkpoint are lost; to go on from there, give every process its command again. Details: {log}')


def alone() -> bool:
  """Returns whether this process trains by itself."""
  return not jax.distributed.is_initialized() or jax.process_count() == 1


def leads() -> bool:
  """Returns whether this process prints and writes, as process 0 and a single process do."""
  return alone() or jax.process_index() == 0


def agreed(value: int) -> int:
  """Returns the largest `value`, an `int32`, among all processes, after every process has called `agreed`."""
  return int(value) if alone() else int(multihost_utils.process_allgather(np.int32(value)).max())


def first(value: int) -> int:
  """Returns the `value`, an `int32`, of process 0."""
  return agreed(value if leads() else np.iinfo(np.int32).min)


def gathered(text: str) -> list[str]:
  """Returns the `text` of each process, in the order of the processes."""
  if alone():
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  padded = np.zeros(agreed(len(content)), np.uint8)
  padded[:len(content)] = content
  return [bytes(row).rstrip(b'\0').decode() for row in multihost_utils.process_allgather(padded)]


def check(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Raises `ValueError` unless all processes have the same config and see the same files in `workdir`."""
  if alone():
    return
  leaders, *others = map(json.loads, gathered(json.dumps(config)))
  for process, other in enumerate(others, 1):
    # Each host may have its data in another directory.
    changes = [line for line in configs.differences(leaders, other) if not line.startswith('data.data_dir: ')]
    if changes:
      raise ValueError(f'--distributed: process {process} has another config than process 0 ({changes[0]}); '
                       'give all processes the same --config and --set.')
  token = workdir / f'.shared_{first(zlib.crc32(os.urandom(8)) >> 2)}'
  if leads():
    token.touch()
  agreed(0)
  blind = agreed(0 if token.exists() else jax.process_index())
  if leads():
    token.unlink()
  if blind:
    raise ValueError(f'--distributed: process {blind} does not see the files of process 0 in {workdir}; '
                     'all processes need one --workdir, on a file system that they share.')


def lost(error: BaseException) -> bool:
  """Returns whether JAX, Gloo or NCCL reports by `error` that another process is lost."""
  pattern = r'Gloo|NCCL|UNAVAILABLE:|ABORTED:|CANCELLED:|DEADLINE_EXCEEDED:|[Cc]oordination service'
  return not alone() and re.search(pattern, str(error)) is not None


def say(line: str) -> None:
  """Prints one line on standard error, unless another process has printed the same line."""
  if alone():
    print(line, file=sys.stderr)
    return
  try:
    _client().key_value_set(f'said/{line}', '')
  except RuntimeError as error:
    if 'ALREADY_EXISTS' in str(error):
      return
  print(f'{line} (process {jax.process_index()})', file=sys.stderr)


def leave(status: int, patience: int) -> int:
  """Returns `status` when all processes have called `leave`; after `patience` seconds, exits with `status` instead.

  A `patience` of 0 exits at once. A single process returns at once.
  """
  if alone():
    return status
  try:
    if not patience:
      raise TimeoutError
    _client().wait_at_barrier('leave', patience * 1000)
    jax.distributed.shutdown()
  except (RuntimeError, ValueError, TimeoutError):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # An ordinary exit would wait for the other processes in C++, and then abort.
  return status


def _place(where: str) -> dict[str, Any]:
  """Returns the arguments of `jax.distributed.initialize` for `where`. Raises `ValueError` for another form."""
  if where == 'auto':
    return {}
  match = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', where)
  if not match or not int(match[2]) < int(match[3]):
    raise ValueError(f'--distributed: {where!r} is not HOST:PORT,PROCESS,COUNT with PROCESS from 0 to COUNT - 1, such '
                     'as localhost:1234,0,2 and localhost:1234,1,2; HOST is that of process 0.')
  return {'coordinator_address': match[1], 'process_id': int(match[2]), 'num_processes': int(match[3]),
          'cluster_detection_method': 'deactivate'}


def _redirect_cpp(directory: pathlib.Path) -> pathlib.Path:
  """Points the file descriptors of standard output and error at a log file, and returns the path of this file.

  Python's streams `sys.stdout` and `sys.stderr` keep their former targets.
  """
  directory.mkdir(parents=True, exist_ok=True)
  log = directory / f'process_on_{socket.gethostname()}_{os.getpid()}.log'
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    stream.flush()
    number = stream.fileno()
    setattr(sys, name, os.fdopen(os.dup(number), 'w', buffering=1, encoding=stream.encoding, errors=stream.errors))
    os.dup2(file, number)
  os.close(file)
  return log


_last_words = b''
_dying = threading.Lock()


def end() -> None:
  """Prints that another process is lost, and exits with `LOST`. An abort in C++ also calls `end`, from any thread."""
  if not _dying.acquire(blocking=False):
    time.sleep(LEAVE)  # Another thread is ending this process.
  cursor = b'\r\x1b[K\x1b[?25h' if os.isatty(sys.stderr.fileno()) and leads() else b''  # A live bar hides the cursor.
  os.write(sys.stderr.fileno(), cursor + _last_words)
  os._exit(LOST)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _abort(_: int) -> None:
  end()


def _on_abort(words: str) -> None:
  """Makes an abort in C++, which Python cannot catch, print `words` and exit with status `LOST`."""
  global _last_words
  _last_words = f'{words}\n'.encode()
  ctypes.CDLL(None).signal(signal.SIGABRT, _abort)


def _client() -> Any:
  # JAX has no public access to the service that joins the processes. Orbax imports the same module.
  from jax._src import distributed
  return distributed.global_state.client
