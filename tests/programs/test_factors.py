"""Tests the algebra of dimensions: moves deal factors out as `numpy` moves indices, and tell mixed factors apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from sparsejax.programs import factors, jaxprs, views
from sparsejax.programs.factors import Factor


def places(dims, shape):
  """Returns, for each entry of a value with exact dimensions, the place in the flat array of `shape` that it shows."""
  parts = [factor for dim in dims for factor in dim]
  grid = np.indices([factor.size for factor in parts]) if parts else np.zeros((0,), int)
  index = [np.zeros([factor.size for factor in parts], int) for _ in shape]
  for factor, along in zip(parts, grid):
    index[factor.axes[0]] += along * factor.stride
  return np.ravel_multi_index(index, shape).reshape(factors.shape_of(dims)) if shape else np.zeros((), int)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_exact_moves_are_those_of_the_array(data):
  shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
  dims, array = factors.whole(shape), np.arange(np.prod(shape)).reshape(shape)
  for _ in range(3):
    if data.draw(st.booleans()):
      order = data.draw(st.permutations(range(array.ndim)))
      dims, array = tuple(dims[i] for i in order), array.transpose(order)
    else:
      size = array.size
      lead = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
      new = data.draw(st.sampled_from([(lead, size // lead), (size,), (1, lead, 1, size // lead)]))
      dims, array = factors.reshaped(dims, new).dims, array.reshape(new)
    assert factors.shape_of(dims) == array.shape
    if not factors.exact(dims):
      return
    np.testing.assert_array_equal(places(dims, shape), array)


def test_a_reshape_that_straddles_mixes_and_keeps_the_axes():
  dims, gone = factors.reshaped(factors.whole((4, 6)), (6, 4))
  assert not factors.exact(dims) and not gone
  assert dims == ((Factor((0, 1), 6, None),), (Factor((0, 1), 4, None),))
  assert factors.exact(factors.reshaped(factors.whole((4, 6)), (8, 3)).dims)
  assert factors.reshaped(factors.whole((0, 6)), (6, 0)) is None


def test_what_is_stretched_or_dropped_is_gone():
  dims, gone = factors.broadcast(factors.whole((1, 6)), (0, 1), (5, 6))
  assert dims == ((Factor((), 5),), (Factor((1,), 6, 1),)) and gone == {0}
  assert factors.dropped(factors.whole((4, 6)), (0,)) == (((Factor((1,), 6, 1),),), {0})


@pytest.mark.parametrize('bind', [jnp.add, jnp.multiply, jnp.maximum, lambda a, b: lax.add_p.bind(a, b)])
def test_jax_stretches_lengths_of_one_inside_of_operations(bind, standard_promotion):
  """Shows that JAX emits no `broadcast_in_dim` here, and that the view is stretched."""
  eqn, = jax.make_jaxpr(bind)(jnp.ones((1, 6)), jnp.ones((4, 6))).jaxpr.eqns
  assert eqn.primitive.name in views.STRETCHING
  value, = views.shown(eqn, [views.Value(views.PARAMETER, (views.View('g', factors.whole((1, 6))),)), views.Value()])
  assert value.views[0].dims == ((Factor((), 4),), (Factor((1,), 6, 1),)) and value.views[0].gone == {0}


def test_a_row_that_is_written_into_an_array_is_not_stretched():
  eqn = jax.make_jaxpr(lambda a, row: lax.dynamic_update_slice(a, row, (jnp.int32(0), jnp.int32(0))))(
      jnp.ones((4, 6)), jnp.ones((1, 6))).jaxpr.eqns[-1]
  row = views.Value(views.PARAMETER, (views.View('g', factors.whole((1, 6))),))
  assert views.shown(eqn, [views.Value(), row, views.Value(), views.Value()])[0].views == ()


def test_the_parts_of_loops_are_told_by_their_ranks():
  jaxpr = jax.make_jaxpr(lambda w, x, s: lax.scan(lambda c, v: (c @ w, c.sum()), x, s, reverse=True))(
      jnp.ones((4, 4)), jnp.ones((2, 4)), jnp.ones((3, 5)))
  scan, *operands = jaxprs.scan_parts(jaxpr.jaxpr.eqns[-1], ['w', 'x', 's'])
  assert operands == [['w'], ['x'], ['s']] and (scan.length, scan.reverse) == (3, True)


def test_addresses_name_operations_inside_of_programs():
  jaxpr = jax.make_jaxpr(lambda x: lax.cond(x > 0, jnp.sin, lambda x: jax.jit(jnp.cos)(x), x))(1.0)
  found = {eqn.primitive.name: address for address, eqn in jaxprs.equations(jaxpr)}
  cond = found['cond']
  assert found['sin'][:2] == (*cond, 1) and found['cos'][:2] == (*cond, 0) and len(found['cos']) == len(cond) + 4
