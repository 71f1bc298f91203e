"""Tests that a `Sparse24Array` unpacks bit for bit and has the layout of the hardware, through transforms and files."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import formats, io
from sparsejax.formats import NMArray, Sparse24Array
from sparsejax.types import Axes

# A case is: shape, contracted axes, dtype. There are whole tiles, ragged edges, and every order of axes.
CASES = {
    'whole tiles': ((128, 64), (0,), 'bfloat16'),
    'several tiles': ((256, 192), (0,), 'float16'),
    'ragged': ((132, 70), (0,), 'float32'),
    'K no multiple of 4': ((30, 3), (0,), 'bfloat16'),
    'one weight': ((1, 1), (0,), 'float32'),
    '[out, in]': ((5, 160), (1,), 'int8'),
    'attention out': ((2, 36, 10), (0, 1), 'bfloat16'),
    'in the other order': ((6, 3, 20), (2, 0), 'float8_e4m3fn'),
    'many outputs': ((40, 3, 5), (0,), 'uint16'),
}
cases = pytest.mark.parametrize('shape, axes, dtype', CASES.values(), ids=CASES)


def bits(w):
  return np.asarray(w).view(f'u{np.dtype(w.dtype).itemsize}')


def weights(shape, axes, dtype, seed=0):
  """Returns any bits at all (NaN, subnormal, -0.0) in at most two places of every four, and +0.0 elsewhere."""
  rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
  integers = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(f'u{dtype.itemsize}').reshape(shape)
  order = [a for a in range(len(shape)) if a not in axes] + list(axes)
  flat = np.transpose(integers, order)
  moved = flat.reshape(-1, int(np.prod([shape[a] for a in axes])))
  padded = np.pad(moved, ((0, 0), (0, -moved.shape[1] % 4))).reshape(len(moved), -1, 4)
  place = np.argsort(np.argsort(rng.random(padded.shape), axis=-1), axis=-1)
  padded = np.where(place < rng.integers(0, 3, padded.shape[:2])[..., None], padded, np.zeros_like(padded))
  kept = padded.reshape(len(moved), -1)[:, :moved.shape[1]].reshape(flat.shape)
  return np.transpose(kept, np.argsort(order)).copy().view(dtype)


def by_thread(values, metadata):
  """Returns the padded `[N, K]` as the instruction reads it: thread by thread, through CUTLASS's `ELayout_64x32`.

  The layout is shape ((2, 2, 8, 4), (16, 2)), stride ((1024, 0, 1, 16), (64, 8)), over (thread, bits) into a
  column-major 64 x 32. The second of the thread's four digits has no stride, because half of the threads are not read.
  The sparsity selector says which half is read. The second of two instructions that share a register reads the other
  half.
  """
  n, k = values.shape[0], 2 * values.shape[1]
  whole, seen = np.zeros((n, k), values.dtype), np.zeros((n, k // 4), int)
  registers = np.asarray(metadata).view(np.uint32)
  for tile, depth, thread, register in np.ndindex(registers.shape):
    t0, t1, t2, t3 = thread & 1, thread >> 1 & 1, thread >> 2 & 7, thread >> 5
    word, instruction = int(registers[tile, depth, thread, register]), 2 * register + t1
    for v0, v1 in np.ndindex(4, 2):  # 16 bits describe 4 groups of four.
      place = 1024 * t0 + 0 * t1 + t2 + 16 * t3 + 64 * 4 * v0 + 8 * v1
      row, column = 64 * tile + place % 64, 128 * depth + 32 * instruction + place // 64
      nibble = word >> (16 * v1 + 4 * v0) & 15
      first, second = nibble & 3, nibble >> 2
      assert first < second, 'undefined behaviour on the hardware'
      whole[row, column + first], whole[row, column + second] = values[row, column // 2], values[row, column // 2 + 1]
      seen[row, column // 4] += 1
  assert (seen == 1).all()
  return whole


@cases
def test_the_round_trip_is_bit_for_bit(shape, axes, dtype):
  w = weights(shape, axes, dtype)
  packed = Sparse24Array.from_dense(jnp.asarray(w), axes)
  np.testing.assert_array_equal(bits(packed.to_dense()), bits(w))
  assert packed.shape == shape and packed.dtype == w.dtype and packed.problem() is None


@cases
def test_the_hardware_reads_these_weights(shape, axes, dtype):
  w = weights(shape, axes, dtype)
  packed = Sparse24Array.from_dense(jnp.asarray(w), axes)
  k = packed.contracted_size
  order = [a for a in range(len(shape)) if a not in axes] + list(axes)
  matrix = np.transpose(bits(w), order).reshape(-1, k)
  found = by_thread(bits(packed.values), packed.metadata)
  np.testing.assert_array_equal(found[:len(matrix), :k], matrix)
  assert not found[len(matrix):].any() and not found[:, k:].any()


@pytest.mark.parametrize('shape', [(256, 64), (24, 10)])
def test_it_is_the_n_m_array_of_the_same_weights(shape):
  w = jnp.asarray(weights(shape, (0,), 'bfloat16'))
  packed, other = Sparse24Array.from_dense(w), NMArray.from_dense(w, 2, 4, 0)
  half, n = shape[0] // 2, shape[1]
  np.testing.assert_array_equal(bits(packed.values)[:n, :half].T, bits(other.values))
  np.testing.assert_array_equal(np.asarray(packed.positions())[:n, :half].T, other.positions())


def test_bfloat16_takes_nine_sixteenths():
  packed = Sparse24Array.from_dense(jnp.zeros((512, 256), jnp.bfloat16))
  assert packed.nbytes * 16 == 512 * 256 * 2 * 9


def test_it_packs_under_jit_and_vmap():
  stack = jnp.asarray(np.stack([weights((36, 10), (0,), 'float32', seed) for seed in range(3)]))
  pack = lambda w: Sparse24Array.from_dense(w, check=False)
  batched = jax.jit(jax.vmap(pack))(stack)
  assert batched.shape == (3, 36, 10)
  for i, w in enumerate(stack):
    for name, part in pack(w).arrays().items():
      np.testing.assert_array_equal(bits(batched.arrays()[name][i]), bits(part))
  at_once = Sparse24Array.from_dense(stack, Axes(contracted=(1,), output=(2,), layer=(0,)))
  assert jax.tree.structure(at_once) == jax.tree.structure(batched)
  for dense in (batched.to_dense(), jax.vmap(Sparse24Array.to_dense)(batched), at_once.to_dense()):
    np.testing.assert_array_equal(bits(dense), bits(stack))


def test_without_a_check_every_four_keep_their_first_two():
  w = jnp.arange(1, 9, dtype=jnp.float32).reshape(8, 1)
  dense = Sparse24Array.from_dense(w, check=False).to_dense()
  assert dense[:, 0].tolist() == [1, 2, 0, 0, 5, 6, 0, 0]


def test_gradients_reach_the_values_and_matmul_is_that_of_the_dense_array():
  w, x = jnp.asarray(weights((20, 6), (0,), 'int8').astype(np.float32)), jnp.ones((3, 20))
  packed = Sparse24Array.from_dense(w)
  product = lambda values: formats.matmul(x, dataclasses.replace(packed, values=values))
  np.testing.assert_allclose(product(packed.values), x @ w, rtol=1e-6)
  gradient = jax.grad(lambda values: product(values).sum())(packed.values)
  expected = np.zeros(packed.values.shape)
  expected[:6, :10] = 3
  np.testing.assert_array_equal(gradient, expected)


@cases
def test_a_file_gives_it_back(shape, axes, dtype, tmp_path):
  w = weights(shape, axes, dtype)
  tree = {'a': Sparse24Array.from_dense(jnp.asarray(w), axes)}
  io.save(tmp_path / 'a.safetensors', tree)
  loaded = io.load(tmp_path / 'a.safetensors')
  assert isinstance(loaded['a'], Sparse24Array) and jax.tree.structure(loaded) == jax.tree.structure(tree)
  np.testing.assert_array_equal(bits(formats.unpack(loaded)['a']), bits(w))


def test_pack_knows_it_by_name():
  params = {'a': {'kernel': jnp.asarray(weights((2, 36, 10), (0, 1), 'float32')), 'bias': jnp.ones(10)}}
  axes = {'a/kernel': Axes((0, 1), (2,))}
  packed = formats.pack(params, 'sparse24', axes=axes)
  assert isinstance(packed['a']['kernel'], Sparse24Array) and packed['a']['kernel'].contracted_size == 72
  np.testing.assert_array_equal(bits(formats.unpack(packed)['a']['kernel']), bits(params['a']['kernel']))
  assert isinstance(jax.jit(lambda p: formats.pack(p, 'sparse24', axes=axes, check=False))(params)['a']['kernel'],
                    Sparse24Array)


def good(shape=(130, 70)):
  return Sparse24Array.from_dense(jnp.asarray(weights(shape, (0,), 'float32')))


def swapped(packed):
  """Returns the metadata with the places of the first group of four swapped, the greater first."""
  return packed.metadata.at[0, 0, 0, 0].set((packed.metadata[0, 0, 0, 0] & ~15) | 0b0001)


CORRUPT = {
    'places not increasing': (lambda p: {'metadata': swapped(p)}, 'increasing'),
    'places equal': (lambda p: {'metadata': p.metadata.at[1, 1, 127, 1].set(-1)}, 'increasing'),
    'another output': (lambda p: {'values': p.values.at[70, 0].set(1.0)}, 'not zero'),
    'deeper than K': (lambda p: {'values': p.values.at[0, 66].set(1.0)}, 'not zero'),
    'negative zero in the filling': (lambda p: {'values': p.values.at[127, 127].set(-0.0)}, 'not zero'),
    'behind K in its last four': (lambda p: {'values': p.values.at[:, 64:].set(1.0)}, 'not zero'),
    'values too short': (lambda p: {'values': p.values[:64]}, 'that takes values'),
    'metadata too short': (lambda p: {'metadata': p.metadata[:, :1]}, 'that takes values'),
    'metadata of another type': (lambda p: {'metadata': p.metadata.view(jnp.uint32)}, 'that takes values'),
}


@pytest.mark.parametrize('change, message', CORRUPT.values(), ids=CORRUPT)
def test_what_packing_never_makes_is_a_problem(change, message):
  packed = good()
  assert message in dataclasses.replace(packed, **change(packed)).problem()


@pytest.mark.parametrize('about, message', [
    ({'axes': [], 'stacked': 0}, 'cannot be sparse24'), ({'axes': [2], 'stacked': 0}, 'cannot be sparse24'),
    ({'axes': [-1], 'stacked': -1}, 'cannot be sparse24'), ({'axes': [0], 'stacked': 1}, 'cannot be sparse24'),
    ({'axes': [0, 0], 'stacked': 0}, 'cannot be sparse24'),
])
def test_absurd_descriptions_are_refused(about, message):
  packed = good()
  json.dumps(packed.described())
  with pytest.raises(ValueError, match=message):
    Sparse24Array.restored(packed.arrays(), packed.shape, about)


@pytest.mark.parametrize('call, message', [
    (lambda: Sparse24Array.from_dense(jnp.ones((8, 2))), '4 fours along axes (0,) have more than 2 nonzeros'),
    (lambda: jax.jit(Sparse24Array.from_dense)(jnp.zeros((8, 2))), 'with check=False'),
    (lambda: Sparse24Array.from_dense(jnp.zeros((8,)), 0), 'both contracted and output axes'),
    (lambda: Sparse24Array.from_dense(jnp.zeros((8, 2)), 5), 'are not different axes'),
    (lambda: Sparse24Array.from_dense(jnp.zeros((3, 3, 8, 2)), Axes((2,), (3,), spatial=(0, 1))), 'spatial axes'),
    (lambda: formats.pack({'a': {'kernel': jnp.ones((8, 2))}}, 'sparse24'), "'a/kernel'"),
])
def test_what_cannot_be_packed_is_refused_with_the_remedy(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
