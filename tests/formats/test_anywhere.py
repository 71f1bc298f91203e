"""Tests that `BitmaskArray` and `RelativeIndexArray` are laid out as documented, small, and dense again bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raw import anything, bits, only

from sparsejax import formats
from sparsejax.formats import BitmaskArray, RelativeIndexArray


def gaps_between(places):
  """Returns the code of the positions by the words of `RelativeIndexArray`, one position after another."""
  code, reached = [], 0
  for place in places:
    while place - reached >= 255:
      code, reached = [*code, 255], reached + 255
    code, reached = [*code, place - reached], place + 1
  return code


PLACES = {  # maps each format to its index array, as a function of which entries are stored
    BitmaskArray: lambda stored: np.packbits(stored, bitorder='little').tolist(),
    RelativeIndexArray: lambda stored: gaps_between(np.flatnonzero(stored).tolist()),
}


@pytest.mark.sampled(12)
@pytest.mark.parametrize('shape, dtype, share', [
    ((7, 5), 'bfloat16', 0.9), ((3, 3, 2, 4), 'float32', 0.5), ((64,), 'float8_e4m3fn', 0.1), ((), 'float32', 0.0),
    ((4, 4), 'int16', 1.0), ((9, 3), 'bool', 0.5), ((0, 3), 'float32', 0.5), ((), 'int8', 1.0),
    ((50, 90), 'bfloat16', 0.996), ((8, 8), 'float8_e8m0fnu', 0.5)])
@pytest.mark.parametrize('kind', PLACES)
def test_every_bit_is_kept_of_zeros_anywhere(kind, shape, dtype, share):
  w = only(anything(shape, dtype), np.random.default_rng(1).random(shape) >= share)
  packed, stored = kind.from_dense(jnp.asarray(w)), np.array(bits(w), bool)
  values, places = jax.tree.leaves(packed)
  assert (packed.shape, packed.ndim, packed.dtype) == (w.shape, w.ndim, w.dtype)
  assert places.dtype == jnp.uint8 and places.tolist() == PLACES[kind](stored)
  assert bits(values) == [b for b in bits(w) if b]
  assert packed.nbytes == stored.sum() * w.dtype.itemsize + len(places)
  assert packed.problem() is None
  for dense in (packed.to_dense(), jax.jit(formats.unpack)(packed)):
    assert dense.shape == w.shape and dense.dtype == w.dtype and bits(dense) == bits(w)


@pytest.mark.parametrize('shape', [(24,), (8, 3), (2, 3, 4)])
@pytest.mark.parametrize('kind', PLACES)
def test_one_subnormal_alone_is_kept(kind, shape):
  """Tests a single value: compilers broadcast it, and flush a subnormal if they then treat the bits as a number."""
  w = (np.arange(24, dtype=np.uint16) == 5).astype(np.uint16).reshape(shape).view('bfloat16')
  assert bits(kind.from_dense(w).to_dense()) == bits(w)


@pytest.mark.parametrize('places, code', [
    ([], []), ([0], [0]), ([254], [254]), ([255], [255, 0]), ([256], [255, 1]), ([510], [255, 255, 0]),
    ([7, 263, 264], [7, 255, 0, 0]), ([0, 1, 999], [0, 0, 255, 255, 255, 232]), ([999], [255, 255, 255, 234]),
    (range(1000), [0] * 1000)])
def test_gaps_of_255_and_more_go_on(places, code):
  w = np.zeros((10, 100), np.float32)
  w.flat[list(places)] = range(1, len(places) + 1)
  packed = RelativeIndexArray.from_dense(w)
  assert packed.gaps.tolist() == code and packed.problem() is None and bits(packed.to_dense()) == bits(w)
  endless = RelativeIndexArray(packed.values, np.append(packed.gaps, np.uint8(255)), (10, 200))
  assert 'gaps end' in endless.problem()


SPREADS = {
    'at random': lambda size, kept: np.random.default_rng(0).choice(size, kept, replace=False),
    'side by side, at the end': lambda size, kept: size - 1 - np.arange(kept),
    'evenly': lambda size, kept: np.arange(kept) * 100,
    'with long gaps while there is room': lambda size, kept: np.union1d(
        far := np.arange(255, size, 256)[:kept], np.setdiff1d(np.arange(size), far)[len(far) - kept:]),
}


@pytest.mark.parametrize('size', [100, 10_000, 500_000])
@pytest.mark.parametrize('spread', SPREADS)
def test_one_value_in_a_hundred_is_as_small_as_promised(size, spread):
  w = np.zeros(size, np.float32)
  w[SPREADS[spread](size, size // 100)] = 1
  assert np.count_nonzero(w) == size // 100
  share = RelativeIndexArray.from_dense(w).nbytes / w.nbytes
  assert share <= 0.0135 < BitmaskArray.from_dense(w).nbytes / w.nbytes / 3
  if spread == 'at random' and size == 500_000:
    np.testing.assert_allclose(share, 0.0127, atol=5e-5)


@pytest.mark.sampled(10)
@pytest.mark.parametrize('shape, share', [
    ((), 0.5), ((0, 2), 0.5), ((30, 50), 0.0), ((30, 50), 1.0), ((3, 5, 7, 11), 0.99)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float8_e4m3fn', 'bool'])
def test_what_a_mask_leaves_out_comes_from_the_base(shape, share, dtype):
  """Tests the case of FreezeNet: few entries were trained, all others keep their initial values, of any bits."""
  before, after = anything(shape, dtype, 3), anything(shape, dtype, 4)
  mask = np.asarray(np.random.default_rng(5).random(shape) >= share)
  trained = np.where(mask, after, before)
  packed = RelativeIndexArray.from_dense(jnp.asarray(trained), jnp.asarray(mask))
  assert packed.values.shape == (mask.sum(),) and packed.problem() is None
  assert packed.gaps.tolist() == gaps_between(np.flatnonzero(mask).tolist())
  for unpacked in (packed.to_dense(before), jax.jit(lambda p, base: p.to_dense(base))(packed, before)):
    assert unpacked.shape == shape and unpacked.dtype == before.dtype and bits(unpacked) == bits(trained)
  assert bits(packed.to_dense()) == [b if kept else 0 for b, kept in zip(bits(trained), mask.reshape(-1))]
