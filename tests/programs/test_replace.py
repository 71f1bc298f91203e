"""Tests that intermediates and operands take other values, and that unknown names and other shapes are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sparsejax.programs import replace

RNG = np.random.default_rng(0)
P = {'up': jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32),
     'down': jnp.asarray(RNG.standard_normal((6, 4)), jnp.float32)}
X = jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32)


def mlp(p, x):
  return checkpoint_name(jnp.tanh(x @ p['up']), 'hidden') @ p['down']


def test_a_named_intermediate_takes_a_value_or_a_function_of_it():
  ones = jnp.ones((3, 6))
  np.testing.assert_allclose(replace(mlp, {'hidden': ones})(P, X), ones @ P['down'], rtol=1e-5)
  halved = replace(mlp, {'hidden': lambda h: h / 2})
  np.testing.assert_allclose(jax.jit(halved)(P, X), mlp(P, X) / 2, rtol=1e-5)


def test_an_operand_is_named_by_the_parameter_and_the_number_of_its_use():
  twice = lambda p, x: x @ p['up'] + jnp.sin(x) @ p['up']
  second = replace(twice, {('up', 1): jnp.zeros_like(X)})
  np.testing.assert_allclose(second(P, X), X @ P['up'], rtol=1e-5)
  both = replace(mlp, {'hidden': lambda h: 2 * h, ('down', 0): lambda h: 3 * h})
  np.testing.assert_allclose(both(P, X), 6 * mlp(P, X), rtol=1e-5)


def test_an_array_that_is_both_operands_of_a_product_is_replaced_in_one():
  w, ones = P['up'][:, :4], jnp.ones((4, 4))
  square = lambda p, x: x @ (p['w'] @ p['w'])
  np.testing.assert_allclose(replace(square, {('w', 0): ones})({'w': w}, X), X @ (w @ ones), rtol=1e-4)
  np.testing.assert_allclose(replace(square, {('w', 1): ones})({'w': w}, X), X @ (ones @ w), rtol=1e-4)


def test_functions_of_one_operand_of_two_parameters_are_applied_one_after_the_other():
  apply = lambda p, x: x @ (p['a'] + p['b'])
  p = {'a': P['up'], 'b': 2 * P['up']}
  run = replace(apply, {('a', 0): lambda x: 2 * x, ('b', 0): lambda x: x + 1})
  np.testing.assert_allclose(run(p, X), apply(p, 2 * X + 1), rtol=1e-4)


@jax.custom_jvp
def _mlp(p, x):
  return mlp(p, x)


_mlp.defjvp(lambda primals, tangents: jax.jvp(mlp, primals, tangents))


@pytest.mark.parametrize('wrap', [
  jax.checkpoint, jax.jit, lambda f: lambda p, x: lax.cond(x[0, 0] < 99, f, f, p, x), lambda f: _mlp,
  lambda f: lambda p, x: lax.scan(lambda x, _: (f(p, x), None), x, length=2)[0]])
def test_values_and_gradients_reach_through_programs_inside(wrap):
  """A replaced value is a constant to the gradient, inside of remat, branches and loops too."""
  zero = replace(wrap(mlp), {'hidden': lambda h: 0 * h})
  y, slope = jax.value_and_grad(lambda x: zero(P, x).sum())(X)
  assert y == 0
  if wrap.__name__ != '<lambda>' or wrap(mlp) is not _mlp:
    assert not slope.any()


def test_unknown_keys_are_refused_with_the_valid_ones():
  for key in ('hiden', ('up', 1), ('wp', 0)):
    with pytest.raises(ValueError, match=r"replace: unknown intermediate .*\('down', 0\), \('up', 0\), hidden"):
      replace(mlp, {key: X})(P, X)
  with pytest.raises(ValueError, match=r"replace: the value for 'hidden' is float32\[3, 5\].*float32\[3, 6\]"):
    replace(mlp, {'hidden': jnp.ones((3, 5))})(P, X)
