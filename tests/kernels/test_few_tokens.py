"""Tests products of few tokens, which read packed weights as they are stored: the numbers and gradients are dense ones.

`prepared` chooses the form of each leaf by a table of measured speeds, here a table that the test writes, or measures.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import MATRIX, UNSTRUCTURED, close, normal, value_and_gradients

import kernels_pallas
import sparsejax as sj
from kernels_pallas import packed, prepared
from kernels_pallas.preparing import TAKEN
from sparsejax import formats
from sparsejax.formats import ELLArray
from sparsejax.types import Axes


def n_m(n, m, k, outputs=6):
  kept = np.random.default_rng(n + m).random((k // m, m, outputs)).argsort(1) < n
  return np.where(kept.reshape(k, outputs), np.asarray(normal((k, outputs))), 0), sj.NM(n, m)


def anywhere(name):
  kept, shape, axes = UNSTRUCTURED[name]
  assert axes == MATRIX
  return np.where(kept(shape, axes), np.asarray(normal(shape)), 0), sj.Unstructured()


def uneven_blocks():
  kept = np.asarray([[1, 0, 1], [1, 0, 0], [1, 1, 0]], bool)
  return np.where(np.repeat(np.repeat(kept, 4, 0), 8, 1), np.asarray(normal((12, 24))), 0), sj.Block((4, 8))


# Each case has a format, and a function that returns the weight, whose zeros keep a pattern, and the pattern. Of the
# numbers M, 5 is no power of two, and 64 is beyond selection. The case 3:5 has 9 values, which no byte divides.
CASES = {
    '1:8': ('nm', lambda: n_m(1, 8, 24)), '2:4': ('nm', lambda: n_m(2, 4, 20)), '3:5': ('nm', lambda: n_m(3, 5, 15)),
    '1:1': ('nm', lambda: n_m(1, 1, 3)), '1:64': ('nm', lambda: n_m(1, 64, 128)),
    'anywhere': ('ell', lambda: anywhere('csc 90 %')), 'holes': ('ell', lambda: anywhere('csc with holes')),
    'nothing': ('ell', lambda: anywhere('csc, nothing')), 'uneven blocks': ('block_sparse', uneven_blocks)}
INPUTS = [(tokens, dtype) for tokens in (1, 16, 0) for dtype in ('float32', 'bfloat16')]
# Each case takes two of the inputs, which rotate, so that every input is taken by three cases.
PAIRS = [(name, *INPUTS[(2 * i + j) % len(INPUTS)]) for i, name in enumerate(CASES) for j in range(2)]


@pytest.mark.sampled(11)
@pytest.mark.parametrize('name, tokens, dtype', PAIRS)
def test_a_product_of_few_tokens_and_its_gradients_are_those_of_the_dense_weight(name, tokens, dtype):
  kind, make = CASES[name]
  dense, pattern = make()
  w = formats.TABLE[kind].from_pattern(jnp.asarray(dense, dtype), pattern, MATRIX)
  op = getattr(kernels_pallas, w.product)
  x, dy = normal((tokens, len(dense)), dtype, 1), normal((tokens, dense.shape[1]), dtype, 2)
  y, (dx, dv) = value_and_gradients(
      lambda x, v: op(x, formats.with_values(w, v), implementation='xla'), dy, x, w.values)
  wide = [np.asarray(a, np.float64) for a in (x, jnp.asarray(dense, dtype), dy)]
  assert (y.dtype, dx.dtype, dv.dtype, dv.shape) == (x.dtype, x.dtype, w.dtype, w.values.shape)
  close(y, wide[0] @ wide[1], len(dense), dtype)
  close(dx, wide[2] @ wide[1].T, dense.shape[1], dtype)
  stored = np.asarray(dataclasses.replace(w, values=jnp.ones_like(w.values)).to_dense(), bool)
  again = np.asarray(formats.with_values(w, dv).to_dense(), np.float64)
  close(again[stored], (wide[0].T @ wide[2])[stored], max(tokens, 1), dtype)
  if kind == 'ell':
    assert not dv[w.rows == len(dense)].any()  # slots without a weight


@pytest.mark.parametrize('name', ['1:8', '1:64', 'anywhere', 'holes'])
def test_nan_reaches_only_outputs_that_store_a_weight_for_it(name):
  kind, make = CASES[name]
  dense, pattern = make()
  w = formats.TABLE[kind].from_pattern(jnp.asarray(dense), pattern, MATRIX)
  x = normal((1, len(dense))).at[0, 2].set(jnp.nan)
  y = getattr(kernels_pallas, w.product)(x, w, implementation='xla')
  assert np.isnan(y)[0].tolist() == (dense[2] != 0).tolist()


# The format ELL.


@pytest.mark.parametrize('name', UNSTRUCTURED)
def test_slots_come_back_bit_for_bit(name):
  kept, shape, axes = UNSTRUCTURED[name]
  raw = np.random.default_rng(4).integers(1, 1 << 16, shape, np.uint16)
  w = np.where(kept(shape, axes), raw, 0).astype(np.uint16).view(jnp.bfloat16)
  small = ELLArray.from_dense(w, axes=axes, signed_zeros=True)
  assert small.problem() is None and (small.shape, small.dtype) == (w.shape, w.dtype)
  np.testing.assert_array_equal(np.asarray(small.to_dense()).view('u2'), w.view('u2'))


def test_slots_are_listed_as_documented_and_stacks_may_differ_in_their_counts():
  w = np.zeros((2, 3, 2), 'f4')
  w[0, 2, 0], w[0, 0, 0], w[0, 1, 1], w[1, 2, 1] = 1, 2, 3, 4
  small = ELLArray.from_dense(w, axes=Axes((1,), (2,), layer=(0,)))
  assert small.values.tolist() == [[[2, 3], [1, 0]], [[0, 4], [0, 0]]]
  assert small.rows.tolist() == [[[0, 1], [2, 3]], [[3, 2], [3, 3]]] and small.rows.dtype == np.uint16
  np.testing.assert_array_equal(small.to_dense(), w)
  masked = ELLArray.from_dense(w[0], np.eye(3, 2, dtype=bool))
  assert masked.values.tolist() == [[2, 3]] and masked.rows.tolist() == [[0, 1]]


@pytest.mark.parametrize('change, why', [
    (lambda p: {'rows': p.rows.astype(jnp.int32)}, 'rows have the dtype uint16'),
    (lambda p: {'values': p.values[1:]}, 'are not those of 20 x 24'),
    (lambda p: {'values': p.values[0], 'rows': p.rows[0]}, 'are not those of 20 x 24'),
    (lambda p: {'rows': p.rows + 1}, 'do not increase'), (lambda p: {'rows': p.rows[::-1]}, 'do not increase'),
    (lambda p: {'values': p.values + 1}, 'is not zero')])
def test_broken_slots_are_found(change, why):
  dense, pattern = anywhere('csc with holes')
  small = ELLArray.from_pattern(dense, pattern, MATRIX)
  assert why in dataclasses.replace(small, **change(small)).problem()


# The form of each leaf.

MEASURED = [  # (op, tokens, group, sparsity, times as fast as dense); 1.1 is not told from 1
    ('ell_matmul', 1, [1, 1], 0.5, 2.0), ('ell_matmul', 1, [1, 1], 1.0, 4.0), ('ell_matmul', 64, [1, 1], 0.5, 0.1),
    ('unstructured_matmul', 1, [1, 1], 0.5, 0.5), ('unstructured_matmul', 64, [1, 1], 0.5, 3.0),
    ('nm_matmul', 1, [4, 1], 0.5, 1.1), ('nm_matmul', 1, [8, 1], 0.875, 2.0), ('nm_matmul', 64, [8, 1], 0.875, 0.5),
    ('block_sparse_matmul', 1, [4, 8], 0.25, 1.2)]


@pytest.fixture
def folder(tmp_path):
  row = lambda op, m, block, sparsity, ratio: {
      'op': op, 'implementation': 'xla', 'm': m, 'k': 16, 'n': 16, 'block': block, 'sparsity': sparsity,
      'ratio_forward': ratio, 'hardware': 'a', 'jax': 'b', 'commit': 'c'}
  (tmp_path / 'cpu.json').write_text(json.dumps([row(*each) for each in MEASURED]))
  return tmp_path


def tree():
  """Returns packed leaves of every kind, and a dense leaf."""
  blocks, pattern = uneven_blocks()
  w = anywhere('csc with holes')[0]
  leaves = {'2:4': '2:4', '1:8': '1:8', 'bitmask': 'bitmask', 'csc': 'csc', 'ell': 'ell', 'sparse24': 'sparse24'}
  dense = {'2:4': n_m(2, 4, 24)[0], 'sparse24': n_m(2, 4, 24)[0], '1:8': n_m(1, 8, 24)[0]}
  params = {name: formats.pack({'kernel': dense.get(name, w)}, asked)['kernel'] for name, asked in leaves.items()}
  far = formats.pack({'kernel': np.eye(80, 8, dtype='f4')}, 'csc')['kernel']
  return {**params, 'blocks': formats.pack({'kernel': blocks}, pattern)['kernel'], 'again': params['csc'], 'far': far,
          'bias': jnp.ones(3)}


FORMS = {1: {'2:4': 'dense', '1:8': 'nm', 'bitmask': 'ell', 'csc': 'ell', 'ell': 'ell', 'sparse24': 'dense',
             'blocks': 'block_sparse', 'again': 'ell', 'far': 'dense'},
         64: {'2:4': 'dense', '1:8': 'dense', 'bitmask': 'csc', 'csc': 'csc', 'ell': 'csc', 'sparse24': 'dense',
              'blocks': 'dense', 'again': 'csc', 'far': 'dense'}}  # blocks were measured at one token alone


@pytest.mark.parametrize('tokens', FORMS)
def test_each_leaf_takes_the_fastest_form_and_keeps_its_weights(tokens, folder):
  params = tree()
  found = prepared(params, tokens=tokens, folder=folder)
  rows = prepared(params, tokens=tokens, folder=folder, explain=True)
  assert {row.path: row.form for row in rows} == FORMS[tokens]
  for row in rows:
    assert getattr(found[row.path], 'kind', 'dense') == row.form and (row.speed > 1) == (row.form != 'dense')
    assert row.why or row.form != 'dense'
  assert 'far' in str(rows) and 'not measured within 4 times of 80 x 8' in str(rows)
  assert found['again'] is found['csc'] and found['bias'] is params['bias']
  jax.tree.map(np.testing.assert_array_equal, formats.unpack(found), formats.unpack(params))


def test_forms_can_be_measured_here():
  """One token times 0.5 % of 4M weights is faster than dense on every machine; times half of some weights, on none."""
  w = np.random.default_rng(0).random((2048, 2048), np.float32)
  few, half = np.where(w < 0.005, w, 0), np.where(w < 0.5, w, 0)[:256, :256]
  axes = {'half': MATRIX, 'stack': Axes((1,), (2,), layer=(0,))}
  params = formats.pack({'half': half, 'stack': np.stack([few, few.T])}, 'csc', axes=axes)
  none, stack = prepared(params, tokens=1, measure=True, explain=True)
  assert none.form == 'dense' and none.speed == 1 and 'csc: 0' in none.why
  assert stack.form in ('ell', 'csc') and stack.speed > TAKEN and 'measured here' in stack.why
  found = prepared({'half': params['half']}, tokens=1, measure=True)
  np.testing.assert_array_equal(found['half'], half)


def test_a_program_runs_on_prepared_leaves(folder):
  params = {name: leaf for name, leaf in tree().items() if name in ('1:8', 'csc', '2:4')}
  apply = lambda params, x: jnp.concatenate([x[:, :w.shape[0]] @ w for w in params.values()], 1)
  x = normal((1, 24))
  found = prepared(params, tokens=1, folder=folder)
  close(packed(apply)(found, x), apply(formats.unpack(params), x), 24)
  assert [use.op for use in packed(apply, explain=True)(found, x)] == ['nm_matmul', 'ell_matmul']


def test_what_cannot_be_prepared_says_why(folder):
  params = {'csc': tree()['csc']}
  assert prepared(params, tokens=1, device='tpu', folder=folder)['csc'] is params['csc']
  assert 'nothing was measured on tpu' in str(prepared(params, tokens=1, device='tpu', folder=folder, explain=True))
  with pytest.raises(ValueError, match='prepared: `tokens` must be a whole number, at least 1, below 2.31, not 0'):
    prepared(params, tokens=0)
  with pytest.raises(ValueError, match='prepared: measure=True measures on the default device .* Leave `device`'):
    prepared(params, tokens=1, measure=True, device='cpu')
  with pytest.raises(ValueError, match="prepared: 'csc' of shape .* is traced; prepare parameters outside of jit"):
    jax.jit(lambda params: prepared(params, tokens=1))(params)
