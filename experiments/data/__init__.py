"""Loads data sets by name, in batches that are a pure function of the seed and the step.

    digits = data.load('digits', batch_size=64, seed=3)
    digits.train[1000]['inputs']  # float32[64, 8, 8, 1], the same in a resumed run
    digits.test[0]['weight']      # float32[64], 0 where the batch is padded
"""

from experiments.data.batches import Batch, Batches, Data
from experiments.data.images import PREPARATIONS
from experiments.data.sets import cache_directory, load, pixels

__all__ = ['PREPARATIONS', 'Batch', 'Batches', 'Data', 'cache_directory', 'load', 'pixels']
