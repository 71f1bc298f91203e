"""Tests that derivatives of products with packed weights, of every order and mode, are those of dense products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import packed
from sparsejax import formats, patterns
from sparsejax.formats import BlockSparseArray, CSCArray, NMArray, Sparse24Array
from sparsejax.types import Axes

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)


def kept(rows):
  """Returns a weight of which each of the given rows of every four is kept."""
  w = np.random.default_rng(1).standard_normal((8, 8)).astype('f4')
  return jnp.asarray(np.where(np.isin(np.arange(8) % 4, rows)[:, None], w, np.float32(0)))


# Name: op, implementation, packed weight. The first block row of the blocks is empty, so that filler blocks are stored.
CASES = {
    'N:M dense': (kernels_pallas.nm_matmul, 'dense', NMArray.from_dense(kept([0, 1]), 2, 4, 0)),
    'N:M xla': (kernels_pallas.nm_matmul, 'xla', NMArray.from_dense(kept([0, 3]), 2, 4, 0, width=4)),
    'blocks xla': (kernels_pallas.block_sparse_matmul, 'xla', BlockSparseArray.from_dense(
        jnp.asarray(np.where(np.arange(8) < 2, 0, kept([2, 3]).T).T, jnp.float32), block=(2, 4))),
    'csc xla': (kernels_pallas.unstructured_matmul, 'xla', CSCArray.from_dense(kept([1]))),
    'sparse24': (kernels_pallas.sparse24_matmul, 'xla', Sparse24Array.from_dense(kept([0, 1])))}


def trained(w):
  """Returns which values are no filler, in the shape of the values."""
  return w.kept[:, None, None] if isinstance(w, BlockSparseArray) else jnp.ones(w.values.shape, bool)


def derivatives(f, v, x):
  """Returns derivatives of `f(v, x)`, whose result is `[M, N]`, in all modes; the last two are under `vmap`."""
  loss = lambda v, x: jnp.sum(jnp.sin(f(v, x)))
  gradient = jax.grad(loss, (0, 1))
  squared = lambda v, x: sum(jnp.sum(g ** 2) for g in gradient(v, x))
  along = (jnp.cos(v), jnp.cos(x))
  return {'tangent': jax.jvp(f, (v, x), along)[1], 'gradient': gradient(v, x),
          'forward over reverse': jax.jvp(gradient, (v, x), along)[1],
          'reverse over reverse': jax.grad(squared, (0, 1))(v, x),
          'reverse over forward': jax.grad(lambda v, x: jax.jvp(loss, (v, x), (v, x))[1], (0, 1))(v, x),
          'jacobian': jax.jacfwd(lambda x: f(v, x))(x),
          'each': jax.vmap(gradient, (None, 0))(v, jnp.stack([x, -x])),
          'of each': jax.grad(lambda v: jnp.sum(jax.vmap(jax.grad(loss), (None, 0))(v, jnp.stack([x, -x])) ** 2))(v)}


def same(found, expected):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, expected)


@pytest.mark.parametrize('name', CASES)
def test_derivatives_of_every_order_and_mode_are_those_of_a_dense_product(name):
  op, way, w = CASES[name]
  is_trained = trained(w)

  @jax.jit
  def both(v, x):
    weight = lambda v: formats.with_values(w, jnp.where(is_trained, v, jax.lax.stop_gradient(v)))
    run = lambda v, x: op(x, formats.with_values(w, v), implementation=way)
    dense = lambda v, x: x @ weight(v).to_dense()
    transposes = [jax.linear_transpose(lambda x, f=f: f(v, x), x)(f(v, x)) for f in (run, dense)]
    return (derivatives(run, v, x), transposes[0]), (derivatives(dense, v, x), transposes[1])

  same(*both(w.values, X))


def attention(way):
  index = jnp.zeros((2, 2, 1), jnp.int32)
  as_heads = lambda a: a.reshape(1, -1, 2, 4)
  run = lambda v, x: kernels_pallas.block_sparse_attention(
      as_heads(x), as_heads(v), as_heads(v), index, block_q=2, block_k=2, implementation=way).reshape(x.shape)
  return run, X[:2].repeat(2, 0), X[:2] * 2


def few_inputs(way):
  run = lambda v, x: kernels_pallas.active_matmul(x, v, threshold=0.5, block=2, capacity=3, implementation=way)
  return run, jnp.where(jnp.arange(8) < 4, X, 0.1 * X), kept([0, 1])


@pytest.mark.parametrize('made', [attention, few_inputs])
def test_derivatives_of_other_ops_are_the_same_in_all_implementations(made):
  _, x, v = made(None)
  found, expected = (jax.jit(functools.partial(derivatives, made(way)[0]))(v, x) for way in ('xla', 'dense'))
  same(found, expected)


def test_hessians_of_packed_programs_are_those_of_dense_ones():
  w = kept([0, 1])
  small = formats.pack({'a': {'kernel': w}}, patterns.NM(2, 4))
  loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p['a']['kernel']) @ p['a']['kernel']))
  found = jax.jit(jax.hessian(lambda x: packed(loss)(small, x)))(X[0])
  expected = jax.jit(jax.hessian(lambda x: loss({'a': {'kernel': w}}, x)))(X[0])
  np.testing.assert_allclose(found, expected, atol=1e-4)


def by_jvp(inline):
  """Returns a product whose tangents are not those of the product; its rule repeats the product, or calls itself."""
  @jax.custom_jvp
  def product(w, x):
    return jnp.sin(x @ w)

  product.defjvp(lambda primals, tangents: (
      jnp.sin(primals[1] @ primals[0]) if inline else product(*primals), 3 * tangents[1] @ primals[0] ** 2))
  return product


def by_vjp(inline):
  @jax.custom_vjp
  def product(w, x):
    return jnp.sin(x @ w)

  product.defvjp(lambda w, x: (jnp.sin(x @ w) if inline else product(w, x), (w, x)),
                 lambda saved, dy: (jnp.zeros_like(saved[0]), jnp.cos(saved[1]) * (dy @ saved[0].T)))
  return product


@pytest.mark.parametrize('inline', [False, True])
@pytest.mark.parametrize('ruled', [by_jvp, by_vjp])
def test_second_derivatives_of_a_rule_of_ones_own_are_those_of_the_dense_program(ruled, inline):
  """A rule returns a value beside the derivative, and the second derivative needs the derivative of this value."""
  w, product = kept([0, 1]), ruled(inline)
  small = formats.pack({'a': {'kernel': w}}, patterns.NM(2, 4))
  apply = lambda p, x: jnp.sum(jnp.tanh(product(p['a']['kernel'], x)))
  twice = lambda apply, p: jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(apply, 1)(p, x))))(X)
  expected = twice(apply, {'a': {'kernel': w}})
  assert jnp.abs(expected).max() > 0.1
  np.testing.assert_allclose(twice(packed(apply), small), expected, atol=1e-4)


@pytest.mark.parametrize('kind', [patterns.NM(2, 4), 'csc', 'ell', patterns.Block((4, 4)), 'sparse24'])
def test_vmap_over_bfloat16_weights_has_gradients(kind):
  """XLA's CPU client has no batched product of 16-bit numbers that is summed in float32."""
  stack = jnp.stack([kept([0, 1]), -kept([0, 1])]).astype(jnp.bfloat16)
  stack = jnp.where(stack == 0, jnp.zeros((), stack.dtype), stack)
  small = formats.pack({'w': stack}, kind, where=lambda *_: True, axes={'w': Axes((1,), (2,), layer=(0,))})
  run = packed(lambda p, x: jax.vmap(lambda w: x @ w)(p['w']))
  loss = lambda v, x: jnp.sum(run(formats.with_values(small, v), x).astype(jnp.float32))
  by_value, by_input = jax.grad(loss, (0, 1))(formats.values(small), X.astype(jnp.bfloat16))
  np.testing.assert_array_equal(by_input, jnp.zeros_like(X))
  assert all(map(jnp.any, jax.tree.leaves(by_value)))


def test_a_direction_without_the_preferred_implementation_runs_its_first():
  """With many tokens, a CSC product of a weight that is half dense unpacks the weight, and its gradient cannot."""
  w = CSCArray.from_dense(kept([0, 2]))
  x = jnp.asarray(np.random.default_rng(2).standard_normal((600, 8)), jnp.float32)
  assert kernels_pallas.unstructured_matmul(x, w, explain=True)['cpu'].implementation == 'dense'
  packed_loss = lambda v: jnp.sum(kernels_pallas.unstructured_matmul(x, dataclasses.replace(w, values=v)) ** 2)
  dense_loss = lambda w: jnp.sum((x @ w) ** 2)
  gradient = dataclasses.replace(w, values=jax.grad(packed_loss)(w.values)).to_dense()
  same(gradient, jnp.where(w.to_dense() != 0, jax.grad(dense_loss)(w.to_dense()), 0))
