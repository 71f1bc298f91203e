"""Data sets: each batch is a pure function of the seed and the step."""

from experiments.data.batches import PREPARED, Batch, Batches, Data, cache_directory, load

__all__ = ['PREPARED', 'Batch', 'Batches', 'Data', 'cache_directory', 'load']
