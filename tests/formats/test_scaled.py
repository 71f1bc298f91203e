"""Tests quantized packed arrays: zeros are exact for every quantizer, files are whole, and scales can be trained."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import formats, io
from sparsejax.formats import Scaled
from sparsejax.types import Axes

STACK = Axes((1,), (2,), layer=(0,))
CASES = {  # pattern, shape, axes, channels
    'nm': (sj.NM(2, 4), (16, 6), Axes((0,), (1,)), 6), 'stack': (sj.NM(2, 4), (2, 8, 6), STACK, 6),
    'heads': (sj.NM(2, 4), (2, 8, 6), Axes((0, 1), (2,)), 6),
    'blocks': (sj.Block((4, 1), 0.5), (16, 6), Axes((0,), (1,)), None),
    'anywhere': (sj.Unstructured(0.5), (16, 6), Axes((0,), (1,)), 1)}


def rounding(matrix, levels=7, zero_point=None):
  """Returns whole numbers from -levels to levels with a scale a channel; tiles of 4 entries if there are 8."""
  tiles = 2 if len(matrix) == 8 else 1
  parts = np.asarray(matrix).reshape(tiles, -1, matrix.shape[1])
  scale = np.maximum(np.abs(parts).max(1), 1e-9) / levels
  whole = np.rint(parts / scale[:, None]).astype(np.int32).reshape(matrix.shape)
  zero = None if zero_point is None else np.full(scale.shape, zero_point)
  return SimpleNamespace(qvalue=whole + (zero_point or 0), scale=jnp.float32(scale), zero_point=zero)


@functools.cache
def packed(name):
  pattern, shape, axes, _ = CASES[name]
  w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  w = jnp.asarray(np.where(np.asarray(pattern(jnp.abs(jnp.asarray(w)), None, axes)), w, 0))
  asked = 'bitmask' if name == 'anywhere' else pattern
  return w, formats.pack({'kernel': w}, asked, axes={'kernel': axes})['kernel']


@pytest.mark.sampled(4)
@pytest.mark.parametrize('name', CASES)
def test_what_was_pruned_stays_zero_and_the_rest_is_near(name, tmp_path):
  w, array = packed(name)
  small = Scaled.of(array, rounding)
  dense = np.asarray(small.to_dense())
  assert small.shape == w.shape and small.dtype == w.dtype and small.bits == 4 and small.nbytes < array.nbytes
  assert not np.any(dense[np.asarray(w) == 0]) and formats.axes_of(small) == formats.axes_of(array)
  assert np.max(np.abs(dense - np.asarray(w))) <= float(jnp.max(small.values)) / 2 + 1e-6
  channels = CASES[name][3]
  assert small.values.shape[-1] == (channels or array.values.shape[0])
  io.save(tmp_path / 'f', {'kernel': small})
  back = io.load(tmp_path / 'f')['kernel']
  assert np.array_equal(back.to_dense(), dense) and formats.axes_of(back) == formats.axes_of(small)


def test_zero_points_tables_and_dense_arrays_are_the_numbers_of_the_quantizer():
  w, array = packed('nm')
  plain = Scaled.of(array, rounding).to_dense()
  shifted = Scaled.of(array, lambda matrix: rounding(matrix, zero_point=9))
  assert np.array_equal(shifted.to_dense(), plain) and shifted.low == 2
  named = Scaled.of(array, lambda matrix: _counted(matrix), table=tuple(range(-7, 8)))
  assert np.array_equal(named.to_dense(), plain) and len(named.table) == 16
  dense = Scaled.of(w, rounding)
  assert dense.held is None and dense.values.shape == (1, 16) and not np.any(np.asarray(dense.to_dense())[w == 0])


def _counted(matrix):
  made = rounding(matrix)
  return SimpleNamespace(qvalue=made.qvalue + 7, scale=made.scale)


def test_scales_are_trained_and_leading_axes_come_and_go():
  w, array = packed('stack')
  small = {'kernel': Scaled.of(array, rounding)}
  slope = jax.grad(lambda v: jnp.sum(formats.unpack(formats.with_values(small, v))['kernel'] * w))(
      formats.values(small))['kernel']
  whole = np.asarray(small['kernel'].to_dense()) / np.repeat(np.asarray(small['kernel'].values), 8, 1)
  np.testing.assert_allclose(slope, np.sum(whole * w, 1, keepdims=True), rtol=1e-4)
  layer = jax.tree.map(lambda a: a[1], small['kernel'])
  assert np.array_equal(layer.to_dense(), small['kernel'].to_dense()[1]) and layer.leading == 0


@pytest.mark.parametrize('quantize, why', [
    (lambda m: SimpleNamespace(qvalue=jnp.where(m > 0, 0.5, -0.5), scale=jnp.ones((1, 1))), 'AQT with one bit.*GPTQ'),
    (lambda m: m, 'Return an object with `qvalue` and `scale`'),
    (lambda m: SimpleNamespace(qvalue=jnp.zeros(m.shape, jnp.int32), scale=jnp.ones((3, 1))), 'scales that divide'),
    (lambda m: SimpleNamespace(qvalue=jnp.zeros(m.shape), scale=jnp.ones((1, 1)), bias=[1.0]), 'and a bias'),
    (lambda m: SimpleNamespace(qvalue=jnp.arange(m.size).reshape(m.shape) * 9, scale=jnp.ones((1, 1))), 'fewer bits')])
def test_a_quantizer_that_loses_zeros_or_gives_something_else_is_refused(quantize, why):
  with pytest.raises(ValueError, match=why):
    Scaled.of(jnp.zeros((4, 16)), quantize)


def test_a_torn_file_and_a_second_quantization_are_refused(tmp_path):
  small = Scaled.of(packed('nm')[1], rounding)
  with pytest.raises(ValueError, match='quantized already'):
    Scaled.of(small, rounding)
  assert "codes" in type(small)(small.values, small.codes[:1], None, small.held, small.entries, 4, -7).problem()
  with pytest.raises(ValueError, match='traced'):
    jax.jit(lambda w: Scaled.of(w, rounding).values)(jnp.ones((4, 4)))


