"""Tests that a `CSCArray` unpacks bit for bit, stores its columns as documented, and refuses broken arrays."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import UNSTRUCTURED, close, normal

from sparsejax import formats, io
from sparsejax.formats import CSCArray
from sparsejax.types import Axes


def stack():
  """Returns two matrices with equally many nonzeros."""
  w = np.zeros((2, 6, 5), 'f4')
  w[0].flat[[0, 7, 29]], w[1].flat[[3, 8, 9]] = (1, 1e-40, 2), (np.nan, 3, 4)
  return w


@pytest.mark.sampled
@pytest.mark.parametrize('name', UNSTRUCTURED)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_columns_come_back_bit_for_bit(name, dtype, tmp_path):
  kept, shape, axes = UNSTRUCTURED[name]
  raw = np.random.default_rng(4).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
  bits = lambda a: np.asarray(a).view(f'u{np.dtype(dtype).itemsize}')
  w = np.where(kept(shape, axes), bits(raw.view(dtype).reshape(shape)), 0).astype(f'u{raw.shape[-1]}').view(dtype)
  masked = CSCArray.from_dense(raw.view(dtype).reshape(shape), kept(shape, axes), axes)
  for packed in (CSCArray.from_dense(w, axes=axes), masked):
    assert packed.problem() is None and (packed.shape, packed.dtype) == (w.shape, w.dtype)
    for dense in (packed.to_dense(), jax.jit(formats.unpack)(packed)):
      np.testing.assert_array_equal(bits(dense), bits(w))
    io.save(tmp_path / 'f', {'w': packed})
    again = io.load(tmp_path / 'f')['w']
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    for found, saved in zip(jax.tree.leaves(again), jax.tree.leaves(packed)):
      assert found.dtype == saved.dtype and np.asarray(found).tobytes() == np.asarray(saved).tobytes()
  assert packed.nbytes == packed.values.size * (w.dtype.itemsize + 12) + 4 * (
      packed.contracted_size + math.prod(packed.output_sizes) + 2)


def test_columns_are_listed_as_documented():
  w = np.zeros((3, 4), 'f4')
  w[2, 0], w[0, 1], w[2, 1], w[1, 3] = 1, 2, 3, 4
  packed = CSCArray.from_dense(w)
  assert packed.values.tolist() == [1, 2, 3, 4] and packed.rows.tolist() == [2, 0, 2, 1]
  assert packed.cols.tolist() == [0, 1, 1, 3] and packed.starts.tolist() == [0, 1, 3, 3, 4]
  assert packed.order.tolist() == [1, 3, 0, 2] and packed.row_starts.tolist() == [0, 1, 2, 4]
  masked = CSCArray.from_dense(w, np.eye(3, 4, dtype=bool))
  assert masked.values.tolist() == [2 * 0, 0, 3 * 0] and masked.rows.tolist() == masked.cols.tolist() == [0, 1, 2]


def test_stacks_of_columns_and_pack():
  w = stack()
  packed = CSCArray.from_dense(w, axes=Axes((1,), (2,), layer=(0,)))
  assert packed.values.shape == (2, 3) and packed.problem() is None
  np.testing.assert_array_equal(np.asarray(packed.to_dense()).view('u4'), w.view('u4'))
  np.testing.assert_array_equal(jax.vmap(lambda p: p.to_dense())(packed), w)
  tree = {'a': {'kernel': w[0]}, 'b': np.ones(3, 'f4')}
  found = formats.pack(tree, 'csc')
  assert isinstance(found['a']['kernel'], CSCArray)
  np.testing.assert_array_equal(formats.unpack(found)['a']['kernel'], w[0])
  x = normal((4, 6))
  close(formats.matmul(x, found['a']['kernel']), np.asarray(x, np.float64) @ w[0], 6)


BROKEN = {
    'rows': (lambda p: {'rows': p.rows.at[0].set(99)}, 'rows are not all from 0 to 19'),
    'order of places': (lambda p: {'cols': p.cols[::-1]}, 'not in the order of their columns'),
    'order': (lambda p: {'order': p.order[::-1]}, 'its order do not list'),
    'starts': (lambda p: {'starts': p.starts.at[3].add(1)}, 'its starts do not'),
    'row_starts': (lambda p: {'row_starts': p.row_starts.at[3].add(1)}, 'its row_starts do not'),
    'dtype': (lambda p: {'rows': p.rows.astype(jnp.int16)}, 'its rows int16'),
    'length': (lambda p: {'values': p.values[1:]}, r'must be int32\['),
}


@pytest.mark.parametrize('what', BROKEN)
def test_broken_columns_are_found(what):
  kept, shape, axes = UNSTRUCTURED['csc with holes']
  packed = CSCArray.from_dense(normal(shape), kept(shape, axes), axes)
  change, why = BROKEN[what]
  assert packed.problem() is None
  assert re.search(why, dataclasses.replace(packed, **change(packed)).problem())


ONES = jnp.ones((16, 8))
REFUSED = {
    'columns: mask': (lambda: CSCArray.from_dense(ONES, np.ones((4, 2), bool)), r'mask of shape \(4, 2\)'),
    'columns: mask of numbers': (lambda: CSCArray.from_dense(np.ones((4, 4), 'f4'), np.ones((4, 4))), 'must be bool'),
    'columns: traced': (lambda: jax.jit(CSCArray.from_dense)(ONES), 'CSCArray.from_dense: .*traced'),
    'columns: too many': (lambda: CSCArray.from_dense(jax.ShapeDtypeStruct((2**16, 2**15), 'f4')), '2.31 weights'),
    'columns: counts': (lambda: CSCArray.from_dense(np.stack([np.eye(4), np.ones((4, 4))]).astype('f4'), axes=Axes(
        (1,), (2,), layer=(0,))), "different numbers of nonzeros, '16', '4'; pack them one by one"),
    'columns: taps': (lambda: CSCArray.from_dense(jnp.ones((3, 3, 4, 4)), axes=Axes((2,), (3,), (0, 1))), 'spatial'),
    'columns: file': (lambda: CSCArray.restored({}, (4, 4), {'axes': [0, 1], 'stacked': 0}), 'cannot be csc along'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_why_and_what_can(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()
