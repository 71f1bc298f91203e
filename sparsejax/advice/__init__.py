"""Advises before training how many bytes a pattern saves, and how much faster measured kernels are with it.

    found = sj.advise(params, '2:4', device='h200', tokens=4096)
    print(found)                # one row for each parameter
    found.sentence              # what to do, the last line of the table

`python benchmarks/kernels.py` measures the table of another CPU; the folder `TABLES` holds the tables.
"""

from sparsejax.advice.arrays import tile_share, utilization
from sparsejax.advice.measured import TABLES, Measured, Speed, read_table
from sparsejax.advice.rows import Advice, ParameterAdvice, advise
from sparsejax.types import moved

__all__ = [
  'TABLES', 'Advice', 'Measured', 'ParameterAdvice', 'Speed', 'advise', 'read_table', 'tile_share', 'utilization']

moved(__name__, {'Row': (ParameterAdvice, 'advice.ParameterAdvice')})
