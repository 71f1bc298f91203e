"""Draws images as large as the digits, of ten classes that are easy to tell, so that no data set has to be read."""

import numpy as np


def drawn(count, seed):
  """Returns images `float32[count, 8, 8, 1]` and labels: each class is bright in a place of its own.

  Class 3 is twice as common as the others.
  """
  labels = np.arange(count) % 11 % 10
  labels[::11] = 3
  images = np.random.default_rng(seed).random((count, 8, 8, 1), np.float32) / 2
  images[np.arange(count), labels % 8, labels // 8 * 4] += 1
  return images, labels
