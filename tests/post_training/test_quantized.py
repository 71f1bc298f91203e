"""Tests the small words of quantization, and the field's own quantizers on pruned weights."""

import functools
from types import SimpleNamespace

import aqt.jax.v2.aqt_quantizer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

import sparsejax as sj
from sparsejax import calibration, formats
from sparsejax.post_training import quantized

# Sheet of vectors: three bits, symmetric, a scale for each channel. Channels are columns here.
W = jnp.float32([[.9, -.35, 0, .1], [-.6, 0, .05, .25]]).T
DENSE = W.T  # of a dense array the channels are rows


def three_bits(matrix):
  scale = jnp.max(jnp.abs(matrix), 0, keepdims=True) / 3
  return SimpleNamespace(qvalue=jnp.round(matrix / jnp.where(scale == 0, 1, scale)).astype(jnp.int32), scale=scale)


def test_powers_and_residuals_are_the_numbers_of_the_formulas():
  plain = formats.Scaled.of(DENSE, quantized.power(three_bits, 1.0)).to_dense()
  np.testing.assert_allclose(plain, [[.9, -.3, 0, 0], [-.6, 0, 0, .2]], atol=1e-6)
  root = formats.Scaled.of(DENSE, quantized.power(three_bits, 0.5)).to_dense()
  np.testing.assert_allclose(root, [[.9, -.4, 0, .1], [-.6, 0, .066667, .266667]], atol=1e-5)
  found = formats.Scaled.of(DENSE, quantized.power(three_bits)).to_dense()
  assert float(jnp.sum(jnp.square(found - DENSE))) <= 0.003056
  terms = quantized.expanded(DENSE, three_bits, order=2)
  np.testing.assert_allclose(quantized.total(terms), [[.9, -.333333, 0, .1], [-.6, 0, .05, .25]], atol=1e-5)
  once = quantized.total(quantized.expanded(DENSE, three_bits, order=2, share=0.5))
  np.testing.assert_allclose(once, [[.9, -.333333, 0, .1], [-.6, 0, 0, .2]], atol=1e-5)


@pytest.mark.parametrize('make, why', [
    (lambda: quantized.power(three_bits, 0.0), 'above 0 and at most 1'),
    (lambda: quantized.expanded(DENSE, three_bits, order=0), 'at least 1'),
    (lambda: quantized.tree({'a': DENSE}, lambda m: m, where=lambda path, leaf: True), "'a'.*Return an object")])
def test_arguments_that_mean_nothing_are_refused(make, why):
  with pytest.raises(ValueError, match=why):
    make()


def pruned():
  w = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
  return sj.prune_weights({'kernel': jnp.asarray(w), 'bias': jnp.ones(16)}, sj.NM(2, 4)).params


@pytest.mark.sampled(3)
@pytest.mark.parametrize('form', [
    {'qtype': 'int8'}, {'qtype': 'int4', 'tiled_axes': {0: 16}}, {'qtype': 'int4', 'calibration_method': 'minmax'},
    {'qtype': 'float8_e4m3fn'}], ids=str)
def test_qwix_on_packed_values_is_qwix_on_the_dense_matrix(form, standard_promotion):
  """Groups of the packed values are groups of the matrix, so that both round alike, and zeros stay exact."""
  params = pruned()
  quantize = functools.partial(qwix.quantize, channelwise_axes=(1,), **form)
  small = quantized.tree(formats.pack(params, '2:4'), quantize)
  tiled = {'tiled_axes': {0: 32}} if 'tiled_axes' in form else {}
  whole = qwix.dequantize(qwix.quantize(params['kernel'], channelwise_axes=(1,), **{**form, **tiled}))
  np.testing.assert_allclose(small['kernel'].to_dense(), whole, atol=1e-6)
  assert not np.any(np.asarray(small['kernel'].to_dense())[params['kernel'] == 0]) and small['bias'] is params['bias']


def test_aqt_keeps_zeros_down_to_two_bits_and_is_refused_with_one(standard_promotion):
  make = aqt.jax.v2.aqt_quantizer.quantizer_make
  params, quantize = pruned(), lambda bits: lambda matrix: make(bits).quant(matrix, calibration_axes=(0,))[0]
  packed = formats.pack(params, '2:4')
  for bits in (4, 1):  # kept weights alone: even one bit, which has no zero, loses no zero
    dense = quantized.tree(packed, quantize(bits))['kernel'].to_dense()
    assert not np.any(np.asarray(dense)[params['kernel'] == 0])
  every = {'where': lambda path, leaf: leaf.ndim > 1}
  dense = np.asarray(quantized.tree(params, quantize(4), **every)['kernel'].to_dense())
  assert not np.any(dense[params['kernel'] == 0])
  with pytest.raises(ValueError, match="'kernel'.*AQT with one bit"):
    quantized.tree(params, quantize(1), **every)


def test_distilled_inputs_have_the_recorded_statistics_and_best_inputs_are_kept():
  mix = jnp.float32([[1, .5], [0, 2]])
  statistics = lambda x: {'mean': (x @ mix).mean(0), 'spread': (x @ mix).std(0)}
  recorded = {'mean': jnp.float32([1, -2]), 'spread': jnp.float32([.5, 3])}
  start = jax.random.normal(jax.random.key(0), (32, 2))
  found = calibration.distilled(statistics, recorded, start, steps=150, learning_rate=0.1)
  for name, value in statistics(found).items():
    np.testing.assert_allclose(value, recorded[name], atol=0.05)
  scaled = calibration.distilled(statistics, recorded, {'z': start, 'scale': jnp.ones((1, 2))},
                                 generate=lambda each: each['z'] * each['scale'], steps=3)
  assert scaled.shape == start.shape
  with pytest.raises(ValueError, match='Return the same tree'):
    calibration.distilled(statistics, [0], start)
  with pytest.raises(ValueError, match='zero has no slope'):  # and not the start, in silence
    calibration.distilled(lambda x: jnp.sqrt(jnp.var(0 * x, 0)), jnp.ones(2), start, steps=2)
