"""Tests the neural implant: filters that keep their centre, and the smaller program that computes with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import recipes, structured

pytestmark = pytest.mark.usefixtures('standard_promotion')
X = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))


def conv(x, w, stride=1, padding='SAME'):
  return jax.lax.conv_general_dilated(x, w, (stride,) * 2, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def apply(p, x, stride=1, padding='SAME'):
  h = jax.nn.relu(conv(x, p['a'], stride, padding))
  return jnp.mean(conv(h, p['b'], 1, padding), (1, 2)) @ p['o']


def params(size=3):
  shapes = {'a': (size, size, 3, 8), 'b': (3, 3, 8, 6), 'o': (6, 2)}
  return {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize('stride, padding, size', [(2, 'SAME', 3), (1, 'VALID', 4), (2, ((2, 0), (0, 1)), 4)])
def test_the_split_model_is_the_same_function_with_fewer_operations(stride, padding, size):
  p = params(size)
  for path, units in (('a', [1, 4, 5]), ('b', [0])):
    w = np.array(p[path])
    center = w[1, 1].copy()
    w[..., units] = 0
    w[1, 1][:, units] = center[:, units]
    p[path] = jnp.asarray(w)
  own = lambda p, x: apply(p, x, stride, padding)
  small = structured.split_centers(own, p, X)
  assert small.filters == {'a': 3, 'b': 1} and small.params['a']['full'].shape == (size, size, 3, 5)
  np.testing.assert_allclose(jax.jit(small.apply)(small.params, X), own(p, X), rtol=2e-4, atol=1e-4)
  before, after = (sj.contractions(f, q, X).total_macs for f, q in ((own, p), (small.apply, small.params)))
  assert after < before
  slope = jax.grad(lambda q: jnp.sum(small.apply(q, X)), allow_int=True)(small.params)
  assert np.asarray(slope['a']['center']).any()


def test_hap_leaves_the_centers_of_the_best_units_that_would_go():
  p = params()
  found = structured.groups(apply, p, X)
  loss = lambda p: jnp.mean(apply(p, X) ** 2)
  make = lambda implants: recipes.hap(optax.sgd(0.0), found, 0.5, loss=loss, samples=4, key=jax.random.key(1),
                                      implants=implants)
  keep, more = (structured.kept(found, make(implants).init(p).masks) for implants in (0.0, 3 / 7))
  gone = sum(int((~mask).sum()) for mask in keep.values())
  assert gone == 7 and sum(int((~mask).sum()) for mask in more.values()) == 4
  pruned = sj.apply_masks(p, make(3 / 7).init(p))
  small = structured.cut(found, pruned)
  split = structured.split_centers(small.apply, small.params, X)
  assert sum(split.filters.values()) == 3
  np.testing.assert_allclose(split.apply(split.params, X), apply(pruned, X), rtol=2e-4, atol=1e-4)


def test_bad_fractions_and_unknown_values_are_refused():
  found = structured.groups(apply, params(), X)
  with pytest.raises(ValueError, match='from 0 to below 1'):
    structured.implanted(found, 0.5, 1.0)
  with pytest.raises(ValueError, match='its values are not known'):
    jax.jit(lambda p: structured.split_centers(apply, p, X).params)(params())
  assert structured.split_centers(apply, params(), X).filters == {}
