"""Advice before training: what a pattern saves in bytes, and what measured kernels gain from it."""

from sparsejax.advice.rows import TABLES, Advice, Measured, Row, advise, read_table

__all__ = ['TABLES', 'Advice', 'Measured', 'Row', 'advise', 'read_table']
