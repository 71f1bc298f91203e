"""Arrays of any bits at all, NaN, subnormals and negative zeros among them, and what they are compared by."""

import numpy as np


def anything(shape, dtype, seed=0):
  dtype = np.dtype(dtype)
  raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
  return (raw % 2 if dtype.kind == 'b' else raw).view(dtype).reshape(shape)


def only(w, kept):
  """`w` where it is kept, +0.0 elsewhere."""
  integers = np.asarray(w).view(f'u{w.dtype.itemsize}')
  return np.where(kept, integers, np.zeros_like(integers)).view(w.dtype).reshape(w.shape)


def bits(w):
  return np.asarray(w).reshape(-1).view(f'u{np.dtype(w.dtype).itemsize}').tolist()
