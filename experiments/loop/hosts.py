"""Several processes that train as one, through `jax.distributed`: joining, agreeing, and plain words when one is lost.

Alone, each function here answers at once. Otherwise all processes call `agreed`, `first` and `gathered` in one order.
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

JOIN = 300  # seconds that a process waits for the others, at the start and at the end
SILENCE = 60  # seconds without a sign of life after which a process counts as gone
LEAVE = 10  # seconds that a process which refuses waits for the others to refuse too
LOST = 1  # exit status


def join(where: str, directory: pathlib.Path) -> None:
  """Becomes one of several processes: `HOST:PORT,PROCESS,COUNT`, or `auto` where JAX can find that out by itself.

  From here on the output of C++ goes to a file in `directory`: when others are lost, JAX aborts with a page of it.
  Raises `ValueError` if `where` is neither, and if process 0 cannot listen at HOST:PORT.
  """
  place = _place(where)
  log = _redirect_cpp(directory)
  _on_abort(f'error: the other processes were not there within {JOIN} seconds. Is each of them started, with a number '
            f'of its own and the same address and count? Details: {log}')
  jax.config.update('jax_enable_preemption_service', False)  # its handler of SIGTERM would replace ours
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)  # JAX waits in C++, where Python's handler would never run
  try:
    jax.distributed.initialize(**place, initialization_timeout=JOIN, heartbeat_timeout_seconds=SILENCE,
                               shutdown_timeout_seconds=JOIN)
    log = log.replace(log.with_name(f'process_{jax.process_index()}.log'))
  except ValueError as error:
    raise ValueError('--distributed: JAX finds no cluster here (Slurm, Open MPI, TPU, Kubernetes); '
                     'give --distributed HOST:PORT,PROCESS,COUNT.') from error
  except RuntimeError as error:
    raise ValueError(f'--distributed: process 0 cannot listen at {where.partition(",")[0]} ({_one_line(error)}). '
                     'If the port is in use, give all processes another one.') from error
  finally:
    signal.signal(signal.SIGINT, ctrl_c)
  _on_abort(f'error: process {jax.process_index()} stops, because another process is gone. What follows the last '
            f'checkpoint is lost; to go on from there, give every process its command again. Details: {log}')


def alone() -> bool:
  return not jax.distributed.is_initialized() or jax.process_count() == 1


def leads() -> bool:
  """Is this the process that prints and writes?"""
  return alone() or jax.process_index() == 0


def agreed(value: int) -> int:
  """The largest `value`, an `int32`, of all processes, which thereby have all come here."""
  return int(value) if alone() else int(multihost_utils.process_allgather(np.int32(value)).max())


def first(value: int) -> int:
  """The `value` of process 0."""
  return agreed(value if leads() else np.iinfo(np.int32).min)


def gathered(text: str) -> list[str]:
  """The `text` of each process."""
  if alone():
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  padded = np.zeros(agreed(len(content)), np.uint8)
  padded[:len(content)] = content
  return [bytes(row).rstrip(b'\0').decode() for row in multihost_utils.process_allgather(padded)]


def check(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Raises `ValueError` unless all processes have the same config and see the same files in `workdir`."""
  leaders, *others = map(json.loads, gathered(json.dumps(config)))
  for process, other in enumerate(others, 1):
    # Where the data lie is each host's own affair.
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
  """Is this how JAX, Gloo and NCCL say that another process is gone?"""
  said = r'Gloo|NCCL|UNAVAILABLE:|ABORTED:|CANCELLED:|DEADLINE_EXCEEDED:|[Cc]oordination service'
  return not alone() and re.search(said, str(error)) is not None


def say(line: str) -> None:
  """One line on standard error, unless another process has just said the same."""
  if alone():
    print(line, file=sys.stderr)
  elif _nobody_said(line):
    print(f'{line} (process {jax.process_index()})', file=sys.stderr)


def leave(status: int, patience: int) -> int:
  """Returns `status` once all are about to leave. If they are not in `patience` seconds, ends the process with it."""
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
    os._exit(status)  # an ordinary end would wait for the others in C++, and then abort
  return status


def _place(where: str) -> dict[str, Any]:
  """The arguments of `jax.distributed.initialize`."""
  if where == 'auto':
    return {}
  match = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', where)
  if not match or not int(match[2]) < int(match[3]):
    raise ValueError(f'--distributed: {where!r} is not HOST:PORT,PROCESS,COUNT with PROCESS from 0 to COUNT - 1, such '
                     'as localhost:1234,0,2 and localhost:1234,1,2; HOST is that of process 0.')
  return {'coordinator_address': match[1], 'process_id': int(match[2]), 'num_processes': int(match[3]),
          'cluster_detection_method': 'deactivate'}


def _redirect_cpp(directory: pathlib.Path) -> pathlib.Path:
  """Points the file descriptors of standard output and error at a file, and Python's streams at what they were."""
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
  """Says that the others are gone, and ends this process. Also called, from any thread, when C++ aborts."""
  if not _dying.acquire(blocking=False):
    time.sleep(LEAVE)  # another thread is at it
  cursor = b'\r\x1b[K\x1b[?25h' if os.isatty(sys.stderr.fileno()) and leads() else b''  # a live bar hides it
  os.write(sys.stderr.fileno(), cursor + _last_words)
  os._exit(LOST)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _abort(_: int) -> None:
  end()


def _on_abort(words: str) -> None:
  """From now on an abort, which nothing in Python could catch, says `words` and exits with status `LOST`."""
  global _last_words
  _last_words = f'{words}\n'.encode()
  ctypes.CDLL(None).signal(signal.SIGABRT, _abort)


def _nobody_said(line: str) -> bool:
  try:
    _client().key_value_set(f'said/{line}', '')
  except RuntimeError as error:
    return 'ALREADY_EXISTS' not in str(error)
  return True


def _client() -> Any:
  from jax._src import distributed  # as Orbax does: there is no public way to the service that joins the processes
  return distributed.global_state.client


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split())
