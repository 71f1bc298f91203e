"""Tests that packed arrays become dense again bit for bit, pass every transformation, and refuse what does not fit."""

import dataclasses
import math
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from raw import ANYWHERE, anything, bits, only

import sparsejax as sj
from sparsejax import formats
from sparsejax.formats import BitmaskArray, NMArray, RelativeIndexArray
from sparsejax.types import Axes

# Each case holds n, m, shape, contracted axes and dtype. Cases of vectors also hold the width and the output axes in
# their order. The cases cover all group sizes that the code treats differently, and every order of axes.
CASES = {
    '2:4 Dense': (2, 4, (16, 6), (0,), 'bfloat16'),
    '1:8 Dense float32': (1, 8, (24, 5), (0,), 'float32'),
    '2:4 [out, in]': (2, 4, (3, 20), (1,), 'float16'),
    '3:7, no power of two': (3, 7, (21, 2), (0,), 'float32'),
    '1:1 has no bits': (1, 1, (5, 3), (0,), 'bfloat16'),
    '4:4 keeps all': (4, 4, (8, 3), (0,), 'float8_e4m3fn'),
    '1:3 one-dimensional': (1, 3, (27,), (0,), 'int8'),
    '2:4 convolution': (2, 4, (3, 3, 8, 5), (2,), 'float8_e5m2'),
    '2:8 scanned stack': (2, 8, (3, 16, 4), (1,), 'bfloat16'),
    '2:8 attention out': (2, 8, (2, 12, 5), (0, 1), 'float32'),
    '2:8 scanned attention out': (2, 8, (2, 4, 6, 5), (1, 2), 'bfloat16'),
    '1:6 not adjacent': (1, 6, (4, 5, 3), (0, 2), 'float32'),
    '1:6 in the other order': (1, 6, (2, 4, 3), (2, 1), 'int32'),
    '3:4 bool': (3, 4, (12, 2), (0,), 'bool'),
    '40:64 by bisection': (40, 64, (128, 3), (0,), 'bfloat16'),
    '7:300 in 16 bits': (7, 300, (2, 300), (1,), 'float32'),
    '700:1024': (700, 1024, (1024, 2), (0,), 'bfloat16'),
    'no weights': (2, 4, (4, 0), (0,), 'float32'),
    'vectors: 2:4x3 Dense': (2, 4, (16, 6), (0,), 'bfloat16', 3, (1,)),
    'vectors: 2:4x4 [out, in]': (2, 4, (8, 20), (1,), 'float16', 4, (0,)),
    'vectors: 1:8x2 query, across heads': (1, 8, (24, 2, 3), (0,), 'float32', 2, (1, 2)),
    'vectors: outputs in another order': (1, 8, (24, 2, 3), (0,), 'float32', 2, (2, 1)),
    'vectors: 2:8x5 scanned attention out': (2, 8, (2, 4, 6, 5), (1, 2), 'bfloat16', 5, (3,)),
    'vectors: 2:4x5 OIHW': (2, 4, (5, 8, 2, 3), (1,), 'float8_e5m2', 5, (0,)),
    'vectors: 1:6x5 not adjacent': (1, 6, (4, 5, 3), (0, 2), 'int32', 5, (1,)),
    'vectors: 40:64x2 by bisection': (40, 64, (128, 4), (0,), 'bfloat16', 2, (1,)),
    'vectors: 1:1x2 has no bits': (1, 1, (5, 4), (0,), 'float32', 2, (1,)),
    'vectors: 7:300x2': (7, 300, (4, 300), (1,), 'bool', 2, (0,)),
    'no vectors': (2, 4, (4, 0), (0,), 'float32', 3, (1,)),
}
cases = pytest.mark.parametrize(
    'n, m, shape, axes, dtype, width, outputs', [(*case, 1, ())[:7] for case in CASES.values()], ids=CASES)


def along(shape, axes, outputs):
  """Returns the argument `axes` of `from_dense`: `Axes` for vectors, else the contracted axes."""
  return Axes(axes, outputs, tuple(a for a in range(len(shape)) if a not in (*axes, *outputs))) if outputs else axes


def order(rank, axes):
  rest = [a for a in range(rank) if a not in axes]
  return [*rest[:min(axes)], *axes, *rest[min(axes):]]


def grouped(w, m, axes):
  """Returns `w` as `[..., K / m, ..., m]`: the contracted axes are merged, and the members of a group are last."""
  moved = np.transpose(w, order(w.ndim, axes))
  first, last = min(axes), min(axes) + len(axes)
  split = moved.reshape(*moved.shape[:first], math.prod(moved.shape[first:last]) // m, m, *moved.shape[last:])
  return np.moveaxis(split, first + 1, -1)


def weights(n, m, shape, axes, dtype, seed=0):
  """Returns weights with any bits (NaN, subnormal) at n or fewer positions of each group, +0.0 elsewhere."""
  rng = np.random.default_rng(seed)
  scores = grouped(rng.random(shape), m, axes)
  place = np.argsort(np.argsort(scores, axis=-1), axis=-1)
  kept = np.moveaxis(place < rng.integers(0, n + 1, place.shape[:-1])[..., None], -1, min(axes) + 1)
  sizes = [shape[a] for a in order(len(shape), axes)]
  return only(anything(shape, dtype, seed), np.transpose(kept.reshape(sizes), np.argsort(order(len(shape), axes))))


def vectors(n, m, shape, axes, dtype, width, outputs):
  """Returns weights with any bits in n or fewer vectors of `width` outputs of each group; some entries are zero."""
  if not outputs:
    return weights(n, m, shape, axes, dtype)
  front = [a for a in range(len(shape)) if a not in (*axes, *outputs)]
  order, lengths = [*front, *axes, *outputs], [[shape[a] for a in group] for group in (front, axes, outputs)]
  front, k, across = map(math.prod, lengths)
  kept = weights(n, m, (front, k, across // width), (1,), 'bool')
  kept = np.repeat(kept, width, -1).reshape(sum(lengths, [])).transpose(np.argsort(order))
  some = np.random.default_rng(1).random(shape) < 0.5
  return only(anything(shape, dtype, seed=1), kept & some)


def vector_layout(w, n, m, axes, width, outputs):
  """Returns the values in their usual layout, and the indices `[..., bytes, vectors]` of the vectors."""
  if not outputs:
    return layout(w, n, m, axes)[:2]
  front = [a for a in range(w.ndim) if a not in (*axes, *outputs)]
  lengths = [[w.shape[a] for a in group] for group in (front, axes, outputs)]
  moved = w.transpose([*front, *axes, *outputs]).reshape([math.prod(group) for group in lengths])
  stored = np.asarray(bits(moved), np.uint64).reshape(*moved.shape[:2], -1, width).any(-1).astype(np.uint8)
  _, indices, positions = layout(stored, n, m, (1,))
  place = np.repeat(positions, width, -1).reshape(len(moved), -1, n, moved.shape[-1])
  values = np.take_along_axis(moved.reshape(len(moved), -1, m, moved.shape[-1]), place, 2)
  values = values.reshape(*lengths[0], positions.shape[1], *lengths[2])
  rest = [a for a in range(w.ndim) if a not in axes]
  order = [[*front, 'K', *outputs].index(a) for a in (*rest[:min(axes)], 'K', *rest[min(axes):])]
  return values.transpose(order), indices.reshape(*lengths[0], *indices.shape[1:])


def layout(w, n, m, axes):
  """Returns values, indices and positions by the words of `NMArray`, one group after another."""
  groups = grouped(w, m, axes)
  positions = np.zeros((*groups.shape[:-1], n), np.int64)
  for at in np.ndindex(groups.shape[:-1]):
    filled = [i for i, b in enumerate(bits(groups[at])) if b]
    positions[at] = sorted((filled + [i for i in range(m) if i not in filled])[:n])
  values = np.take_along_axis(groups, positions, axis=-1)
  first = min(axes)
  values, positions = (np.moveaxis(a, -1, first + 1) for a in (values, positions))
  values, positions = (a.reshape(*a.shape[:first], -1, *a.shape[first + 2:]) for a in (values, positions))
  width = math.ceil(math.log2(m))
  eights = np.moveaxis(positions, first, -1)
  eights = np.pad(eights, [(0, 0)] * (eights.ndim - 1) + [(0, -eights.shape[-1] % 8)])
  eights = eights.reshape(*eights.shape[:-1], -1, 8)
  planes = [np.packbits(eights >> p & 1, axis=-1, bitorder='little') for p in range(width)]
  indices = np.concatenate([eights[..., :0].astype(np.uint8), *planes], axis=-1)
  indices = indices.reshape(*indices.shape[:-2], indices.shape[-2] * width)
  return values, np.moveaxis(indices, -1, first), positions


# Tests of N:M cover round trips, layout and size.


@pytest.mark.sampled(11)
@cases
def test_the_round_trip_is_bit_for_bit(n, m, shape, axes, dtype, width, outputs, tmp_path):
  w = vectors(n, m, shape, axes, dtype, width, outputs)
  packed = NMArray.from_dense(jnp.asarray(w), n, m, along(shape, axes, outputs), width=width)
  assert (packed.shape, packed.ndim, packed.dtype) == (w.shape, w.ndim, w.dtype)
  assert packed.problem() is None
  for dense in (packed.to_dense(), jax.jit(formats.unpack)(packed)):
    assert (dense.shape, dense.dtype) == (w.shape, w.dtype)
    assert bits(dense) == bits(w)
  sj.io.save(tmp_path / 'f', packed)
  assert same(jax.tree.map(np.asarray, packed), sj.io.load(tmp_path / 'f'))


@pytest.mark.sampled(11)
@cases
def test_the_layout_is_the_documented_one(n, m, shape, axes, dtype, width, outputs):
  w = vectors(n, m, shape, axes, dtype, width, outputs)
  packed = NMArray.from_dense(w, n, m, along(shape, axes, outputs), width=width)
  k, rest = math.prod(shape[a] for a in axes), math.prod(n for a, n in enumerate(shape) if a not in axes)
  length = math.ceil(k * n / m / 8) * math.ceil(math.log2(m))
  assert packed.nbytes == k * n // m * rest * w.dtype.itemsize + length * rest // width
  assert packed.positions().shape == packed.values.shape
  if w.size:
    values, indices = vector_layout(w, n, m, axes, width, outputs)
    assert packed.values.shape == values.shape and bits(packed.values) == bits(values)
    assert packed.indices.shape == indices.shape and bits(packed.indices) == bits(indices)


def test_what_is_not_of_vectors_is_described_as_before_there_were_any():
  """Tests that files of plain N:M have the same bytes as before vectors existed, and that older files are read."""
  packed = NMArray.from_dense(weights(2, 4, (8, 6), (0,), 'float32'), 2, 4, 0)
  assert packed.described() == {'n': 2, 'm': 4, 'axes': [0]}
  assert same(NMArray.restored(packed.arrays(), packed.shape, packed.described()), packed)


@pytest.mark.parametrize('pattern, most', [('2:4', 0.5626), ('1:8', 0.149)])
def test_bfloat16_is_as_small_as_promised(pattern, most):
  nm = sj.patterns.parse(pattern)
  w = weights(nm.n, nm.m, (128, 16), (0,), 'bfloat16')
  packed = formats.pack({'kernel': w}, pattern)
  assert formats.nbytes(packed) <= most * w.nbytes


SPECIAL = {
    'float32': [0x80000000, 0x7FC00001, 0x7F800001, 0xFF800000, 0x00000001, 0x807FFFFF, 0x7F800000],
    'bfloat16': [0x8000, 0x7FC1, 0x7F81, 0xFF80, 0x0001, 0x807F, 0x7F80],
    'float16': [0x8000, 0x7E01, 0x7C01, 0xFC00, 0x0001, 0x83FF, 0x7C00],
    'float8_e4m3fn': [0x80, 0x7F, 0xFF, 0x01, 0x87, 0x78, 0x08],
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize('dtype', SPECIAL)
@pytest.mark.parametrize('pattern', ['1:4', '40:160', *ANYWHERE])
def test_negative_zeros_subnormals_and_nan_payloads_survive(dtype, pattern):
  """Tests -0.0, quiet and signalling NaN, infinities and subnormals, which arithmetic would change."""
  w = np.zeros((320, 7), f'u{np.dtype(dtype).itemsize}')
  w[::160] = SPECIAL[dtype]
  w = w.view(dtype)
  packed = formats.pack({'kernel': jnp.asarray(w)}, pattern, signed_zeros=True)
  assert bits(jax.jit(lambda packed: formats.unpack(packed)['kernel'])(packed)) == bits(w)


BITS = hypothesis.strategies.sampled_from([0, 0, 0, 1, 0x8000, 0x7F81])


@hypothesis.given(hnp.arrays(np.uint16, (8, 3), elements=BITS))
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_bits_are_packed_or_refused(integers):
  w = integers.view('bfloat16')
  if (np.count_nonzero(integers.reshape(2, 4, 3), axis=1) > 2).any():
    with pytest.raises(ValueError, match='more than 2 nonzeros'):
      NMArray.from_dense(w, 2, 4, 0, signed_zeros=True)
  else:
    assert bits(NMArray.from_dense(w, 2, 4, 0, signed_zeros=True).to_dense()) == bits(w)
  for packed in ANYWHERE.values():
    assert bits(packed.from_dense(w, signed_zeros=True).to_dense()) == bits(w)


# Transformations.


@pytest.mark.parametrize('width', [1, 5])
def test_leading_axes_come_and_go(width):
  """Tests that a stack of layers packed at once equals the layers packed one by one, under vmap, scan and stacking."""
  w = jnp.asarray(vectors(2, 4, (3, 8, 5), (1,), 'float32', width, (2,)))
  stack = NMArray.from_dense(w, 2, 4, Axes((1,), (2,), layer=(0,)), width=width)
  each = [NMArray.from_dense(layer, 2, 4, 0, width=width) for layer in w]
  assert same(stack, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
  assert same(stack, jax.vmap(lambda layer: NMArray.from_dense(layer, 2, 4, 0, check=False, width=width))(w))
  assert bits(jax.vmap(formats.unpack)(stack)) == bits(w)
  assert bits(jax.lax.scan(lambda _, layer: (None, layer.to_dense()), None, stack)[1]) == bits(w)
  x = jnp.ones((2, 8))
  products = jax.lax.scan(lambda _, layer: (None, formats.matmul(x, layer)), None, stack)[1]
  assert products.shape == (3, 2, 5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('n, m, width', [(2, 4, 1), (40, 64, 1), (2, 4, 3)])
def test_gradients_reach_the_values(n, m, width):
  """Tests that gradients pass through packing, although the weights move as integers, which have no gradient."""
  w = jnp.asarray(np.random.default_rng(0).standard_normal((128, 3)), jnp.float32)
  w = jnp.where(sj.NM(n, m, width)(w, axes=Axes((0,), (1,))), w, 0)
  packed = NMArray.from_dense(w, n, m, 0, width=width)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 128)), jnp.float32)
  dense_gradient = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w)
  through = lambda product: jax.jit(jax.grad(
      lambda v: jnp.sum(jnp.sin(product(formats.with_values(packed, v))))))(packed.values)
  place = packed.positions().astype(jnp.int32) + jnp.repeat(jnp.arange(128 // m, dtype=jnp.int32) * m, n)[:, None]
  expected = jnp.take_along_axis(dense_gradient, place, axis=0)
  np.testing.assert_allclose(through(lambda p: x @ p.to_dense()), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(through(lambda p: formats.matmul(x, p)), expected, rtol=1e-5, atol=1e-5)
  packing = jax.jit(jax.grad(lambda w: jnp.sum(NMArray.from_dense(w, n, m, 0, False, width).values ** 2)))(w)
  np.testing.assert_allclose(packing, 2 * w, rtol=1e-6)


def test_gradients_reach_the_values_of_zeros_anywhere():
  """The base that fills the zeros has a gradient, too."""
  rng = np.random.default_rng(0)
  w, dense_gradient = (rng.standard_normal((64, 3)).astype(np.float32) for _ in range(2))
  w = jnp.asarray(np.where(rng.random(w.shape) < 0.5, w, 0))
  for packed in (kind.from_dense(w) for kind in ANYWHERE.values()):
    values, places = jax.tree.leaves(packed)
    again = jax.tree.structure(packed).unflatten
    flat = jax.grad(lambda v, again=again, at=places: jnp.sum(again([v, at]).to_dense() * dense_gradient))(values)
    np.testing.assert_allclose(flat, dense_gradient.reshape(-1)[w.reshape(-1) != 0], rtol=1e-6)
  to_base = jax.grad(lambda base: jnp.sum(packed.to_dense(base) * dense_gradient))(jnp.ones_like(w))
  np.testing.assert_allclose(to_base, jnp.where(w != 0, 0, dense_gradient), rtol=1e-6)


@pytest.mark.sampled(7)
@pytest.mark.parametrize('n, m, shape, axes', [
    (2, 4, (16, 6), (0,)), (2, 4, (6, 16), (1,)), (2, 8, (2, 12, 5), (0, 1)), (1, 6, (4, 5, 3), (0, 2)),
    (1, 8, (2, 16, 3), (1,)), (2, 4, (8, 2, 6), (0,))])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_matmul_is_that_of_the_dense_array(n, m, shape, axes, dtype):
  rng, width = np.random.default_rng(3), 4 if shape == (8, 2, 6) else 1
  kept = vectors(n, m, shape, axes, 'bool', width, (1, 2)) if width > 1 else weights(n, m, shape, axes, 'bool', seed=4)
  w = np.where(kept, rng.standard_normal(shape), 0).astype(dtype)
  k = math.prod(shape[a] for a in axes)
  x = rng.standard_normal((7, 2, k)).astype(dtype)
  moved = np.transpose(w, [*axes, *(a for a in range(w.ndim) if a not in axes)]).astype(np.float64)
  expected = np.tensordot(x.astype(np.float64), moved.reshape(k, *moved.shape[len(axes):]), 1)
  product = formats.matmul(jnp.asarray(x), NMArray.from_dense(w, n, m, axes, width=width))
  assert product.dtype == x.dtype and product.shape == expected.shape
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(np.asarray(product, np.float64), expected, rtol=2 * eps, atol=eps * math.sqrt(k))


def test_bfloat16_products_are_summed_in_float32():
  """Tests a sum of 256 ones and 1024 terms of 2^-8: a bfloat16 sum loses the small terms, whatever its order."""
  w = np.zeros((4096, 1), 'bfloat16')
  w[::16], w[1::4] = 1, 2**-8
  x, packed = jnp.ones((1, 4096), jnp.bfloat16), NMArray.from_dense(w, 2, 4, 0)
  assert float(formats.matmul(x, packed)[0, 0]) == 256 + 4
  assert 'preferred_element_type=float32' in str(jax.make_jaxpr(formats.matmul)(x, packed))  # No CPU sums in bfloat16.


@pytest.mark.sampled(4)
@pytest.mark.parametrize('mode', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('spec', [PartitionSpec(None, 'x'), PartitionSpec('x', None)], ids=['outputs', 'whole groups'])
@pytest.mark.parametrize('width', [1, 2])
def test_sharded_weights_are_packed_and_unpacked_where_they_are(mode, spec, width):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(mode,))
  w = vectors(2, 4, (256, 16), (0,), 'float32', width, (1,))
  w = jax.device_put(w, NamedSharding(mesh, spec))
  packed = NMArray.from_dense(w, 2, 4, 0, width=width)
  for leaf in (packed.values, packed.indices):
    assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    assert leaf.addressable_shards[0].data.size == leaf.size // 8
  for program in (jax.jit(formats.unpack).lower(packed),
                  jax.jit(lambda w: NMArray.from_dense(w, 2, 4, 0, False, width)).lower(w)):
    assert not re.search('all-gather|all-to-all|all-reduce|collective-permute', program.compile().as_text())
  assert bits(packed.to_dense()) == bits(w)


@pytest.mark.parametrize('n, m, most', [(2, 4, 0.5), (16, 32, 1.5), (64, 128, 6.5), (512, 1024, 6.5)])
def test_unpacking_takes_little_extra_memory(n, m, most):
  """Compares temporary bytes, as XLA counts them, with the bytes of the dense leaf; a one-hot of the positions takes m.

  Gathers, which only n above 32 needs, have indices of three int16 (JAX 0.10) or int32 (0.11) a weight.
  """
  w = weights(1, m, (2048, 64), (0,), 'bfloat16')
  program = jax.jit(formats.unpack).lower(NMArray.from_dense(w, n, m, 0)).compile()
  assert program.memory_analysis().temp_size_in_bytes <= most * w.nbytes


# Trees.


def params():
  kernel = lambda *shape: jnp.asarray(weights(2, 4, shape, (len(shape) - 2,), 'bfloat16'))
  return {'layers': [{'kernel': kernel(8, 6), 'bias': jnp.ones(6)}, {'kernel': kernel(8, 3), 'bias': jnp.zeros(3)}],
          'embed': {'table': jnp.ones((5, 8))}, 'conv': {'kernel': kernel(3, 3, 4, 2)}}


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
      jax.tree.map(lambda x, y: x.dtype == y.dtype and bits(x) == bits(y), a, b))


@pytest.mark.parametrize('pattern, kinds', [
    ({'layers/0/*': '2:4x6', '**': '2:4'},
     {'layers/0/kernel': sj.NM(2, 4, 6), 'layers/1/kernel': sj.NM(2, 4), 'conv/kernel': sj.NM(2, 4)}),
    (sj.NM(2, 4), {'layers/0/kernel': sj.NM(2, 4), 'layers/1/kernel': sj.NM(2, 4), 'conv/kernel': sj.NM(2, 4)}),
    ('4:8', ValueError),
    (sj.Unstructured(0.5), dict.fromkeys(['layers/0/kernel', 'layers/1/kernel', 'conv/kernel'], BitmaskArray)),
    ('bitmask', dict.fromkeys(['layers/0/kernel', 'layers/1/kernel', 'conv/kernel'], BitmaskArray)),
    ({'conv/*': 'bitmask', 'layers/1/*': '4:8', '**': '2:4'},
     {'layers/0/kernel': sj.NM(2, 4), 'layers/1/kernel': sj.NM(4, 8), 'conv/kernel': BitmaskArray}),
    ({'conv/*': 'relative_index', '**': '2:4'},
     {'layers/0/kernel': sj.NM(2, 4), 'layers/1/kernel': sj.NM(2, 4), 'conv/kernel': RelativeIndexArray})])
def test_pack_replaces_what_where_picks(pattern, kinds):
  tree = params()
  tree['layers'][0]['kernel'] = jnp.asarray(vectors(2, 4, (8, 6), (0,), 'bfloat16', 6, (1,)))
  if kinds is ValueError:
    with pytest.raises(ValueError, match=r"'conv/kernel' of shape \(3, 3, 4, 2\).* 8 divides"):
      formats.pack(tree, pattern)
    return
  packed = formats.pack(tree, pattern)
  names, leaves, _ = sj.trees.flatten(packed, is_leaf=formats.is_packed)
  found = {name: sj.NM(leaf.n, leaf.m, leaf.width) if isinstance(leaf, NMArray) else type(leaf)
           for name, leaf in zip(names, leaves) if formats.is_packed(leaf)}
  assert found == kinds
  assert same(formats.unpack(packed), tree)


def test_pack_groups_along_the_axes_it_is_given():
  """Tests that `axes` decides the axis of the groups, whatever the conventions say."""
  w = weights(1, 4, (3, 8), (1,), 'float32')
  axes = {'a/kernel': Axes((1,), (0,), source='traced')}
  packed = formats.pack({'a': {'kernel': w}}, '1:4', axes=axes)
  assert packed['a']['kernel'].axes == (-1,)
  assert bits(formats.unpack(packed)['a']['kernel']) == bits(w)


def test_a_packed_tree_is_a_pytree_of_arrays():
  packed = formats.pack(params(), '2:4')
  doubled = jax.tree.map(lambda leaf: leaf, packed)
  assert jax.tree.structure(doubled) == jax.tree.structure(packed)
  assert hash(jax.tree.structure(doubled)) == hash(jax.tree.structure(packed))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(packed))
  assert formats.nbytes(packed) == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
  abstract = jax.eval_shape(lambda p: formats.pack(p, '2:4', check=False), params())
  assert jax.tree.structure(abstract) == jax.tree.structure(packed)
  described = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
  assert described(abstract) == described(packed)


def test_orbax_saves_and_restores_a_packed_tree(tmp_path):
  packed = formats.pack(params(), {'conv/*': 'bitmask', 'layers/1/*': 'relative_index', '**': '2:4'})
  w = np.where(np.arange(64) % 4 < 2, np.ones((12, 64), np.float32), 0).T
  kinds = (sj.patterns.Block((4, 4)), sj.NM(2, 4, width=4), 'csc', 'sparse24', 'ell')
  packed = [packed, *(formats.pack({'kernel': w}, kind) for kind in kinds)]
  assert {leaf.kind for leaf in jax.tree.leaves(packed, is_leaf=formats.is_packed)
          if formats.is_packed(leaf)} == set(formats.TABLE)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'packed', packed)
    checkpointer.wait_until_finished()
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, packed)
    assert same(checkpointer.restore(tmp_path / 'packed', shapes), packed)


def test_without_a_check_each_group_keeps_its_first_nonzeros():
  w = jnp.asarray([[0, 5, 6, 7, 1, 0, 0, 0]], jnp.float32)
  kept = jax.jit(lambda w: NMArray.from_dense(w, 2, 4, 1, check=False).to_dense())(w)
  assert kept.tolist() == [[0, 5, 6, 0, 1, 0, 0, 0]]


# Each refusal names the place and the remedy.

CROWDED = np.ones((8, 3), np.float32)
CROWDED[:5, 1] = CROWDED[:, [0, 2]] = 0  # The second group of column 1 has three nonzeros.
NEGATIVE_ZERO = np.copysign(np.zeros((4, 2), np.float32), -1)


@pytest.mark.parametrize('call, message', [
    (lambda: formats.pack({'a': {'kernel': CROWDED}}, '2:4'),
     r"'a/kernel' of shape \(8, 3\): 1 of 6 groups of 4 along axes \(0,\) .* \[group 1, 1\], has 3.*project"),
    (lambda: NMArray.from_dense(np.ones((2, 3, 8)), 2, 4, 2), 'float64 would be truncated; set jax_enable_x64'),
    (lambda: NMArray.from_dense(NEGATIVE_ZERO, 2, 4, 0, signed_zeros=True), r'-0\.0: leave signed_zeros out'),
    (lambda: NMArray.from_dense(CROWDED, 2, 5, 0), r'shape \(8, 3\).* 5 divides.*pad'),
    (lambda: NMArray.from_dense(CROWDED, 0, 4, 0), 'at least 1'),
    (lambda: NMArray.from_dense(CROWDED, 2, 4, 0, width=3),
     r'1 of 2 groups of 4 along axes \(0,\) have more than 2 vectors of 3 .* \[group 1, 0\], has 3'),
    (lambda: NMArray.from_dense(CROWDED, 2, 4, 0, width=2), r'2:4x2 needs output axes that 2 divides.* have 3.*pad'),
    (lambda: NMArray.from_dense(CROWDED, 2, 4, (0, 1), width=2), 'lies along output axes, and there are none'),
    (lambda: formats.pack({'w': CROWDED}, '2:4x3'), "'w' of shape .* vectors of 3"),
    (lambda: NMArray.restored({'values': CROWDED, 'indices': CROWDED}, (8, 3), {
        'n': 2, 'm': 4, 'axes': [0], 'width': 3}), r'vectors of 3 along the axes \[\] of shape \(8, 3\)'),
    (lambda: NMArray.restored({'values': CROWDED, 'indices': CROWDED}, (8, 3), {
        'n': 2, 'm': 4, 'axes': [0], 'width': 3, 'outputs': [0]}), r'along the axes \[0\]'),
    (lambda: NMArray.from_dense(CROWDED, 5, 4, 0), '5:4'),
    (lambda: NMArray.from_dense(CROWDED, 2, 2048, 0), '1024'),
    (lambda: NMArray.from_dense(CROWDED, 2, 4, 2), r'axes \(2,\) are not different axes .* \(8, 3\)'),
    (lambda: NMArray.from_dense(CROWDED, 2, 4, (0, -2)), 'not different axes'),
    (lambda: NMArray.from_dense(CROWDED, 2, 4, ()), 'no axis is contracted'),
    (lambda: NMArray.from_dense(np.zeros((4, 2), 'complex64'), 2, 4, 0), 'complex64 cannot be packed'),
    (lambda: BitmaskArray.from_dense(np.zeros((4, 2), 'int4')), 'int4 cannot be packed'),
    (lambda: jax.jit(lambda w: NMArray.from_dense(w, 2, 4, 0))(CROWDED), 'check=False'),
    (lambda: jax.jit(lambda w: formats.pack({'w': w}, 'bitmask'))(CROWDED), "'w' of shape .*traced"),
    (lambda: jax.jit(RelativeIndexArray.from_dense)(CROWDED), r'RelativeIndexArray.* of shape \(8, 3\).*traced'),
    (lambda: jax.jit(lambda m: RelativeIndexArray.from_dense(CROWDED, m))(CROWDED != 0), r'mask .*traced'),
    (lambda: RelativeIndexArray.from_dense(CROWDED, CROWDED), r'mask of shape \(8, 3\) and dtype float32 must be bool'),
    (lambda: RelativeIndexArray.from_dense(CROWDED, CROWDED[:1] != 0), r'\(8, 3\): mask of shape \(1, 3\).*same shape'),
    (lambda: RelativeIndexArray.from_dense(CROWDED).to_dense(CROWDED[:1]), r'base of shape \(1, 3\).* shape \(8, 3\)'),
    (lambda: RelativeIndexArray.from_dense(CROWDED).to_dense(CROWDED.astype('int32')), 'dtype int32 .* dtype float32'),
    (lambda: formats.pack({'a': CROWDED}, '2:4', where=sj.trees.named('b')), "picks no parameter.*'a'"),
    (lambda: formats.pack({'a': CROWDED}, {'b': '2:4'}), "unknown path in `pattern` 'b'.*a"),
    (lambda: formats.pack({'a': CROWDED}, '2/4'), "unknown pattern '2/4'"),
    (lambda: formats.pack({'a': CROWDED}, 0.5), '`pattern` must be a pattern.*not 0.5'),
    (lambda: formats.pack(formats.pack(params(), 'bitmask'), '2:4'), "'conv/kernel'.*call unpack"),
    (lambda: formats.matmul(jnp.ones((2, 3)), NMArray.from_dense(np.zeros((8, 3), np.float32), 2, 4, 0)),
     r'x of shape \(2, 3\).* 8 .*\(8, 3\)'),
])
def test_what_cannot_be_done_is_refused_with_the_remedy(call, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()


@pytest.mark.parametrize('positions, valid', [
    ([0, 1, 2, 3], True), ([0, 4, 1, 3], True), ([1, 0, 2, 3], False), ([2, 2, 0, 1], False), ([0, 5, 0, 1], False)])
def test_indices_that_packing_never_makes_are_a_problem(positions, valid):
  """Tests 2:5 in three bits, where positions can be out of order, equal, or from 5 to 7."""
  planes = [sum((position >> p & 1) << i for i, position in enumerate(positions)) for p in range(3)]
  packed = NMArray(jnp.zeros(4), jnp.asarray(planes, jnp.uint8), 2, 5, (-1,), (10,))
  assert (packed.problem() is None) == valid
  padded = NMArray(jnp.zeros(4), jnp.asarray([planes[0] | 0x80, *planes[1:]], jnp.uint8), 2, 5, (-1,), (10,))
  assert 'zero bits' in padded.problem()


def test_vectors_that_do_not_fit_are_a_problem():
  packed = NMArray.from_dense(vectors(2, 4, (16, 6), (0,), 'float32', 3, (1,)), 2, 4, 0, width=3)
  put = lambda **changes: dataclasses.replace(packed, **changes).problem()
  assert packed.problem() is None
  assert 'indices uint8[2, 3]' in put(width=2) and 'do not make groups of 2:4x4' in put(width=4)
  assert 'take' in put(indices=packed.indices[:, :1]) and 'strictly increasing' in put(indices=packed.indices * 0)
  assert 'do not have the axes' in put(outputs=(-3,))


def test_the_bytes_of_numbers_are_those_of_their_arrays_and_nothing_else_has_bytes():
  w = NMArray.from_dense(jnp.ones((4, 2)).at[1::2].set(0), 1, 2, 0)
  tree = {'w': w, 'x': jnp.ones(3, jnp.bfloat16), 'n': [1, 2.5, True, np.float16(1)]}
  assert formats.nbytes(tree) == w.nbytes + 6 + (4 + 4 + 1 + 2)
  with pytest.raises(ValueError, match="formats.nbytes: leaf 'b/0' is no array and no number, but str"):
    formats.nbytes({'b': ['x'], 'a': 1})
