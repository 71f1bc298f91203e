"""Tests that products with N:M and with unstructured weights are those with the dense masked weight, or refuse."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import (
  MATRIX,
  TOKENS,
  UNSTRUCTURED,
  WAYS,
  blocks,
  close,
  inputs,
  largest,
  largest_lowered,
  normal,
  value_and_gradients,
)

from kernels_pallas import active, block_sparse, n_m, sparse24, unstructured
from kernels_pallas.n_m import nm_matmul
from kernels_pallas.n_m import reference as n_m_reference
from kernels_pallas.unstructured import unstructured_matmul
from sparsejax import formats, patterns
from sparsejax.formats import CSCArray, NMArray, Sparse24Array
from sparsejax.types import Axes

# A product is: op, shape of the weight, contracted axes, mask, and the function that packs.

COLUMNS = (unstructured_matmul, lambda w, mask, axes: CSCArray.from_dense(w, mask, axes))


def of(n, m, width=1):
  """Returns, for N:M, the mask, and the function that packs."""
  pattern = patterns.NM(n, m, width)
  return (nm_matmul, lambda w, mask, axes: NMArray.from_dense(w, n, m, axes, width=width)), (
      lambda shape, axes: np.asarray(pattern(normal(shape, seed=3), None, axes)))


WEIGHTS = {
    '2:4': (*of(2, 4), (32, 31), MATRIX), '3:7': (*of(3, 7), (35, 6), MATRIX),
    '2:4x8': (*of(2, 4, 8), (32, 24), MATRIX), '2:4x32': (*of(2, 4, 32), (36, 96), MATRIX),
    '7:8x32, not worth it': (*of(7, 8, 32), (16, 32), MATRIX),
    '2:4 attention out': (*of(2, 4), (2, 8, 5), Axes((0, 1), (2,))),
    '1:4x32 query, across heads': (*of(1, 4, 32), (8, 4, 48), Axes((0,), (1, 2))),
    '1:4x6, outputs in another order': (*of(1, 4, 6), (8, 4, 9), Axes((0,), (2, 1))),
    '2:4x5 between': (*of(2, 4, 5), (4, 10, 6), Axes((0, 2), (1,))),
    **{name: (COLUMNS, *rest) for name, rest in UNSTRUCTURED.items()},
}
SOME = ('2:4', '2:4x32', 'csc 90 %')  # an example of each computation
some = pytest.mark.parametrize('name, way', [
    ('2:4', 'dense'), ('2:4x32', 'xla'), ('csc 90 %', 'xla'), ('csc 90 %', 'dense')])


def weight(name, dtype='float32'):
  """Returns the op, the weight as [K, *outputs], the packed weight, and a function that reshapes to [K, *outputs]."""
  (op, packing), kept, shape, axes = WEIGHTS[name]
  mask = kept(shape, axes)
  w = jnp.where(mask, normal(shape, dtype, seed=1), 0)
  others = [a for a in range(len(shape)) if a not in axes.contracted]
  k = math.prod(shape[a] for a in axes.contracted)
  matrix = lambda a: np.transpose(np.asarray(a, np.float64), (*axes.contracted, *others)).reshape(
      k, *(shape[a] for a in others))
  return op, matrix(w), packing(w, mask, axes), matrix


def product(x, w):
  return np.tensordot(np.asarray(x, np.float64), w, 1)


def test_many_tokens_are_multiplied_a_part_at_a_time():
  """The test has more bytes of x than the sparse routine takes at a time, and tokens that do not divide into parts."""
  w = np.where(np.random.default_rng(0).random((1100, 6)) < 0.1, normal((1100, 6), seed=1), 0)
  packed, x, dy = CSCArray.from_dense(w), normal((2001, 1100)), normal((2001, 6), seed=2)
  run = lambda x: unstructured_matmul(x, packed, implementation='xla')
  y, (dx,) = value_and_gradients(run, dy, x)
  close(y, product(x, w), 1100)
  close(dx, product(dy, w.T), 6)


XLA = ('3:7', '2:4x8', '1:4x32 query, across heads')


# The order of axes does not depend on the implementation, and the loops of 'xla' take seconds to compile.
@pytest.mark.sampled(12)
@pytest.mark.parametrize('name, way', [(name, way) for name in WEIGHTS for way in WAYS
                                       if 'csc' in name or way == 'dense' or name in XLA])
def test_products_and_gradients_are_those_of_the_dense_masked_weight(name, way):
  op, dense, packed, matrix = weight(name)
  k = len(dense)
  x = normal((3, 7, k))
  dy = normal((3, 7, *dense.shape[1:]), seed=5)
  run = lambda x, v: op(x, formats.with_values(packed, v), implementation=way)
  y, (dx, dv) = value_and_gradients(run, dy, x, packed.values)
  assert y.shape == dy.shape and y.dtype == x.dtype
  close(y, product(x, dense), k)
  close(dx, np.tensordot(np.asarray(dy, np.float64), np.moveaxis(dense, 0, -1), dense.ndim - 1), dense[0].size)
  dense_gradient = np.tensordot(np.asarray(x, np.float64), np.asarray(dy, np.float64), ((0, 1), (0, 1)))
  assert dv.shape == packed.values.shape and dv.dtype == packed.dtype
  # Every stored value has its gradient, and values that only pad a group have a gradient too.
  stored = matrix(dataclasses.replace(packed, values=jnp.ones_like(packed.values)).to_dense())
  close(matrix(formats.with_values(packed, dv).to_dense()), np.where(stored != 0, dense_gradient, 0), 21)


@pytest.mark.sampled
@inputs
@some
def test_any_number_of_tokens_in_any_dtype(name, way, dtype, tokens):
  op, dense, packed, _ = weight(name, dtype)
  x = normal((*TOKENS[tokens], len(dense)), dtype)
  def run(x, v):
    y = op(x, formats.with_values(packed, v), implementation=way)
    return y.astype('f4').sum(), y

  (dx, dv), y = jax.jit(jax.grad(run, (0, 1), has_aux=True))(x, packed.values)
  assert y.shape == (*TOKENS[tokens], *dense.shape[1:]) and y.dtype == x.dtype
  close(y, product(x, dense), len(dense), dtype)
  assert (dx.shape, dx.dtype, dv.shape, dv.dtype) == (x.shape, x.dtype, packed.values.shape, packed.dtype)
  if not TOKENS[tokens] or TOKENS[tokens][0]:
    close(dx, np.broadcast_to(dense.sum(-1), x.shape), dense[0].size, dtype)
  else:
    assert not np.any(dv)


@some
def test_the_dtypes_of_x_and_of_the_values_may_differ(name, way):
  op, dense, packed, _ = weight(name, 'float32')
  x = normal((5, len(dense)), 'bfloat16')
  dy = jnp.ones((5, *dense.shape[1:]), 'bfloat16')
  y, (dx, dv) = value_and_gradients(
      lambda x, v: op(x, formats.with_values(packed, v), implementation=way), dy, x, packed.values)
  assert (y.dtype, dx.dtype, dv.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  close(y, product(x, dense), len(dense), 'bfloat16')


@some
def test_vmap_over_inputs_weights_and_both(name, way):
  op, dense, packed, _ = weight(name)
  x, stack = normal((2, 5, len(dense))), jax.tree.map(lambda a: jnp.stack([a, a]), packed)
  stack = formats.with_values(stack, stack.values * jnp.asarray([1.0, -2.0]).reshape(2, *[1] * packed.values.ndim))
  run = lambda x, w: op(x, w, implementation=way)
  close(jax.jit(jax.vmap(run, (0, None)))(x, packed), product(x, dense), len(dense))
  close(jax.jit(jax.vmap(run, (None, 0)))(x[0], stack), [product(x[0], dense), product(x[0], -2 * dense)], len(dense))
  close(jax.jit(jax.vmap(run))(x, stack), [product(x[0], dense), product(x[1], -2 * dense)], len(dense))
  close(jax.lax.scan(lambda _, w: (None, run(x[0], w)), None, stack)[1][1], product(x[0], -2 * dense), len(dense))
  loss = lambda v, x: run(x, formats.with_values(packed, v)).sum()
  each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(packed.values, x)
  close(each.sum(0), jax.jit(jax.grad(loss))(packed.values, x), 10)


@pytest.mark.parametrize('name', SOME[1:])
def test_tokens_may_be_spread_over_devices(name):
  op, dense, packed, _ = weight(name)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  x = normal((16, 4, len(dense)))

  def loss(v, x):
    run = lambda x, v: jax.lax.psum(jnp.sin(op(x, formats.with_values(packed, v), implementation='xla')).sum(), 'data')
    return jax.shard_map(run, mesh=mesh, in_specs=(P('data'), P()), out_specs=P())(x, v)

  one = lambda v, x: jnp.sin(op(x, formats.with_values(packed, v), implementation='dense')).sum()
  for a, b in zip(*(jax.jit(jax.grad(f, (0, 1)))(packed.values, x) for f in (loss, one))):
    close(a, b, len(dense))


def test_n_m_makes_neither_the_dense_weight_nor_its_gradient():
  """Vectors make no dense array; unpacking makes at most a slab of 512 outputs of the dense gradient."""
  _, dense, packed, _ = weight('1:4x32 query, across heads')
  x = normal((3, len(dense)))
  loss = lambda x, v, way: jnp.sum(nm_matmul(x, formats.with_values(packed, v), implementation=way) ** 2)
  made = lambda way: largest_lowered(jax.jit(jax.grad(lambda x, v: loss(x, v, way), (0, 1))).lower(x, packed.values))
  assert made('xla') < dense.size <= made('dense')
  w = jnp.where(patterns.NM(1, 4)(normal((64, 1100))), 1.0, 0)
  packed, x, dy = NMArray.from_dense(w, 1, 4, 0), normal((3, 64)), normal((3, 1100))
  slab = lambda x, dy: n_m_reference.sampled_by_slab(x, dy, packed)
  assert largest(jax.make_jaxpr(slab)(x, dy).jaxpr) <= 64 * 512
  close(jax.jit(slab)(x, dy), n_m_reference.sampled(x, dy, packed), 3)


def test_unstructured_products_reach_the_sparse_routine_on_both_ways():
  _, w, packed, _ = weight('csc 90 %')
  x = normal((64, len(w)))
  count = lambda f: jax.jit(f).lower(x, packed).as_text().count('@cpu_csr_sparse_dense_ffi')
  run = lambda x, w: unstructured_matmul(x, w, implementation='xla')
  assert count(run) == 1
  assert count(jax.grad(lambda x, w: jnp.sin(run(x, w)).sum())) == 2
  dense = lambda x, w: unstructured_matmul(x, w, implementation='dense')  # `None` would choose the sparse routine.
  assert count(jax.grad(lambda x, w: jnp.sin(dense(x, w)).sum())) == 0


# Choices of `None`, and their reasons.

CHOICES = {
    'element-wise N:M': ('2:4', 300, 'dense', '1 outputs share .* CPUs N:M is faster than dense in vectors of 32 and'),
    'narrow vectors': ('2:4x8', 300, 'dense', '8 outputs share'), 'vectors': ('2:4x32', 300, 'xla', '50% are zero'),
    'few zeros': ('7:8x32, not worth it', 300, 'dense', '12% are zero, and vectors pay from 40%'),
    'unstructured': ('csc 90 %', 300, 'xla', '[89].% are zero, 300 tokens: the sparse routine of XLA on CPUs$'),
    'few tokens': ('csc 90 %', 8, 'xla', 'pays from 85% and 64 tokens on, and a weight that is left dense'),
    'half': ('csc 50 %', 300, 'dense', '300 tokens: unpacked; sparse pays from'),
}


@pytest.mark.parametrize('case', CHOICES)
def test_what_is_chosen_is_explained(case):
  name, tokens, chosen, why = CHOICES[case]
  op, dense, packed, _ = weight(name)
  x = normal((tokens, len(dense)))
  explained = op(x, packed, explain=True)
  assert explained['cpu'].implementation == chosen and re.search(why, explained['cpu'].reason), str(explained)
  text = lambda way: jax.jit(lambda x, w: op(x, w, implementation=way)).lower(x, packed).as_text(debug_info=False)
  assert text(None).count('dot_general') == text(chosen).count('dot_general')
  assert ('while' in text(None)) == ('while' in text(chosen))


# Refusals.

NM24, CSC = (weight(name)[2] for name in ('2:4', 'csc 90 %'))
HALF = jnp.ones((4, 16))
STACK = CSCArray.from_dense(np.ones((2, 6, 5), 'f4'), axes=Axes((1,), (2,), layer=(0,)))
REFUSED = {
    'N:M: another format': (lambda: nm_matmul(HALF, CSC), 'nm_matmul: .*formats.NMArray, not CSCArray; NMArray.from'),
    'N:M: length': (lambda: nm_matmul(HALF, NM24),
                    r'nm_matmul: x of shape \(4, 16\) must end in 32.*\(32, 31\).*reshape x'),
    'N:M: scalar': (lambda: nm_matmul(jnp.float32(1), NM24), r'x of shape \(\)'),
    'N:M: dtype': (lambda: nm_matmul(jnp.ones((4, 32), int), NM24), 'x has dtype int32; cast x to float32, bfloat16'),
    'N:M: stack': (lambda: nm_matmul(HALF, NMArray.from_dense(
        jnp.zeros((3, 16, 4)), 2, 4, Axes((1,), (2,), layer=(0,)), width=2)), r'\(3, 16, 4\) is a stack.*with vmap'),
    'N:M: name': (lambda: nm_matmul(jnp.ones((4, 32)), NM24, implementation='mosaic'),
                  "nm_matmul: unknown implementation 'mosaic'.*dense, mosaic_gpu, mosaic_tpu, xla"),
    'N:M: elsewhere': (lambda: nm_matmul(jnp.ones((4, 32)), NM24, implementation='mosaic_tpu'),
                       "'mosaic_tpu' cannot run this: it is for tpu, and the default device is cpu. 'xla', 'dense'"),
    'columns: another format': (lambda: unstructured_matmul(HALF, HALF), 'formats.CSCArray, not .*CSCArray.from_dense'),
    'columns: length': (lambda: unstructured_matmul(HALF, CSC), r'unstructured_matmul: x of shape .* end in 45'),
    'columns: stack': (lambda: unstructured_matmul(HALF, STACK), r'x of shape \(4, 16\)|is a stack'),
    'columns: a stack of the right length': (lambda: unstructured_matmul(jnp.ones((4, 6)), STACK),
                                           r'weight of shape \(2, 6, 5\) is a stack.*vmap'),
    'columns: name': (lambda: unstructured_matmul(jnp.ones((4, 45)), CSC, implementation='mosaic_gpu'),
                      "unknown implementation 'mosaic_gpu'.*None, dense, xla"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_why_and_what_can(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()


OPS = {'nm_matmul': (n_m, NM24), 'unstructured_matmul': (unstructured, CSC),
       'block_sparse_matmul': (block_sparse, blocks((32, 16), (8, 8), 'float32')),
       'sparse24_matmul': (sparse24, Sparse24Array.from_dense(jnp.zeros((32, 8)))),
       'active_matmul': (active, jnp.ones((32, 8)))}


@pytest.mark.parametrize('name', OPS)
def test_an_op_raises_exactly_what_its_refusal_says_of_shapes_alone(name):
  """A caller that asks `refusal` first therefore knows that any other `ValueError` of the op is a fault."""
  module, w = OPS[name]
  op = getattr(module, name)
  length = w.shape[0]
  given = lambda shape, dtype='float32': (jax.ShapeDtypeStruct(shape, dtype), jnp.ones(shape, dtype))
  for x, array in (given((4, length + 1)), given(()), given((4, length), 'int32'), given((length, 4), 'bfloat16')):
    reason = module.refusal(x, w)
    with pytest.raises(ValueError, match=f'^{re.escape(f"{name}: {reason}.")}$'):
      op(array, w)
  for x, array in (given((4, length)), given((length,), 'bfloat16'), given((0, length))):
    assert module.refusal(x, w) is None
    op(array, w)
