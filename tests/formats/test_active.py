"""Tests weights with thresholds: the weight comes back bit for bit, files are whole, and wrong parts are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import formats, io
from sparsejax.formats import ActiveArray
from sparsejax.types import Axes

STACK, HEADS = Axes((1,), (2,), layer=(0,)), Axes((0, 1), (2,), source='traced')


def drawn(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def over(pattern):
  mask = sj.patterns.parse(pattern)(jnp.abs(jnp.asarray(drawn(16, 8))), None, Axes((0,), (1,)))
  w = np.where(mask, drawn(16, 8), np.float32(0))
  packed = formats.pack({'kernel': jnp.asarray(w)}, pattern, axes={'kernel': Axes((0,), (1,))})['kernel']
  return w, ActiveArray.of(packed, np.arange(16) / 8)


def dense(shape, axes, threshold, outputs=False, rank=0):
  w = jnp.asarray(drawn(*shape))
  k, n = ActiveArray.of(w, axes=axes).values.shape[-2:]
  lead = shape[:len(axes.layer)]
  parts = (jnp.ones((*lead, k, rank)), jnp.ones((*lead, rank, n))) if rank else (None, None)
  return w, ActiveArray.of(w, threshold, *parts, axes=axes, outputs=outputs)


CASES = {
    'matrix': lambda: dense((4, 6), Axes((0,), (1,)), 0.5), 'transposed': lambda: dense((4, 6), Axes((1,), (0,)), 0.5),
    'heads': lambda: dense((2, 3, 5), HEADS, np.arange(6)), 'infinite': lambda: dense((4, 6), Axes((0,), (1,)), np.inf),
    'stack': lambda: dense((2, 4, 6), STACK, [[1.0], [2.0]], rank=2),
    'outputs': lambda: dense((2, 4, 6), STACK, 0.0, outputs=True),
    'over 2:4': lambda: over('2:4'), 'over blocks': lambda: over('4x2 0.5')}


@pytest.mark.parametrize('name', CASES)
def test_the_weight_comes_back_and_a_file_keeps_the_thresholds(name, tmp_path):
  w, small = CASES[name]()
  assert np.array_equal(small.to_dense(), w) and np.array_equal(formats.unpack({'k': small})['k'], w)
  assert (small.shape, small.dtype, small.leading) == (w.shape, w.dtype, small.threshold.ndim - 1)
  io.save(tmp_path / 'f', {'k': small})
  back = io.load(tmp_path / 'f')['k']
  assert jax.tree.structure(back) == jax.tree.structure(small) and formats.axes_of(back) == formats.axes_of(small)
  assert jax.tree.all(jax.tree.map(np.array_equal, back, small)) and np.array_equal(formats.unpack(back), w)


REFUSED = {
    'negative': (lambda: dense((4, 6), Axes((0,), (1,)), -1.0), 'a threshold is negative or NaN'),
    'NaN': (lambda: dense((4, 6), Axes((0,), (1,)), np.nan), 'a threshold is negative or NaN'),
    'another model': (lambda: dense((4, 6), Axes((0,), (1,)), np.ones(6)),
                      r'threshold \[6\] does not broadcast to \[4\]'),
    'stack': (lambda: dense((4, 2, 6), Axes((0,), (2,), layer=(1,)), 0.0),
              r'its axes \(1,\) of a stack must come first'),
    'left alone': (lambda: ActiveArray.of(jnp.ones((4, 6)), 0.0, jnp.ones((4, 2))),
                   r'left and right are not \[..., 4, r\]'),
    'ranks': (lambda: ActiveArray.of(jnp.ones((4, 6)), 0.0, jnp.ones((4, 2)), jnp.ones((3, 6))), 'given together'),
    'bitmask': (lambda: ActiveArray.of(formats.pack({'k': jnp.ones((4, 6))}, 'bitmask')['k']), "the format 'bitmask'"),
    'twice': (lambda: ActiveArray.of(ActiveArray.of(jnp.ones((4, 6)))), 'has thresholds already'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_parts_that_do_not_fit_are_refused_with_the_reason(name):
  make, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    make()


def test_thresholds_of_another_matrix_are_not_saved(tmp_path):
  _, small = CASES['matrix']()
  object.__setattr__(small, 'threshold', jnp.ones(5))
  with pytest.raises(ValueError, match=r"'k' of shape \(4, 6\): threshold float32\[5\] is not float32\[4\]"):
    io.save(tmp_path / 'f', {'k': small})
