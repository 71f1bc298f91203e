"""Advises before training how many bytes a pattern saves, and how much faster measured kernels are with it.

    found = sj.advise(params, '2:4', device='h200', tokens=4096)
    print(found)                # one row for each parameter
    found.sentence              # what to do, the last line of the table

`python benchmarks/kernels.py` measures the table of another CPU; the folder `TABLES` holds the tables.
"""

import warnings
from typing import Any

from sparsejax.advice.measured import TABLES, Measured, Speed, read_table
from sparsejax.advice.rows import Advice, ParameterAdvice, advise

__all__ = ['TABLES', 'Advice', 'Measured', 'ParameterAdvice', 'Speed', 'advise', 'read_table']


def __getattr__(name: str) -> Any:
  """Returns `ParameterAdvice` by its former name `Row`, with a warning."""
  if name != 'Row':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  warnings.warn('advice.Row is now advice.ParameterAdvice; the old name goes in the next release.', DeprecationWarning,
                stacklevel=2)
  return ParameterAdvice
