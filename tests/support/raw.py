"""Makes arrays of any bits, with NaN, subnormals and negative zeros, and compares trees of them bit for bit."""

import jax
import numpy as np
import pytest

from sparsejax import formats, io

ANYWHERE = {kind: formats.TABLE[kind] for kind in ('bitmask', 'relative_index')}  # for zeros anywhere, in files


def anything(shape, dtype, seed=0):
  """Returns an array of any bits but those of -0.0, which packing does not keep."""
  dtype = np.dtype(dtype)
  raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
  return (raw % 2 if dtype.kind == 'b' else positive(raw.view(dtype))).reshape(shape)


def positive(w):
  """Returns `w` with -0.0 as 0.0, found by the bits of the dtype's own -0.0; NaN and subnormals keep their bits."""
  integers, zero = w.view(f'u{w.dtype.itemsize}'), np.asarray(-0.0).astype(w.dtype)
  negative = zero.view(integers.dtype) if np.signbit(zero.astype(np.float64)) else integers.dtype.type(0)
  return np.where(integers == negative, integers.dtype.type(0), integers).view(w.dtype)


def only(w, kept):
  """Returns `w` where `kept` is `True`, and +0.0 elsewhere."""
  integers = np.asarray(w).view(f'u{w.dtype.itemsize}')
  return np.where(kept, integers, np.zeros_like(integers)).view(w.dtype).reshape(w.shape)


def bits(w):
  return np.asarray(w).reshape(-1).view(f'u{np.dtype(w.dtype).itemsize}').tolist()


def sparse(*shape, dtype='float32', seed=0):
  """Returns weights of which every other pair of rows is zero, which is 2:4 along the rows."""
  w = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
  w[..., 2::4, :] = w[..., 3::4, :] = 0
  return w


def same(a, b):
  raw = lambda tree: [(x.shape, x.dtype.name, np.asarray(x).astype(x.dtype.newbyteorder('<')).tobytes())
                      for x in jax.tree.leaves(tree)]
  return jax.tree.structure(a) == jax.tree.structure(b) and raw(a) == raw(b)


def refused(path, message=None, call=io.load):
  with pytest.raises(ValueError, match=message) as refusal:
    call(path)
  assert str(path) in str(refusal.value)
