"""Compares axes and multiply-adds with known answers: by the letters of `einsum`, by hand, by convention."""

import math
import string

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl
from programs import MATRIX, B, W, X, attention, axes, conv, dense, shaped, stack

from sparsejax import trees
from sparsejax.programs import Contractions, contractions


@pytest.mark.parametrize('name', programs.NAMED)
def test_axes_and_multiply_adds_are_those_known(name, standard_promotion):
  (apply, params, inputs), expected = programs.NAMED[name]()
  found = contractions(apply, params, *inputs)
  assert {path: found[path] for path in found} == {path: axes for path, (axes, _) in expected.items()}
  assert found.macs == {path: macs for path, (_, macs) in expected.items()}
  paths, leaves, _ = trees.flatten(params)
  assert set(found.elsewhere) | set(found) == {path for path, leaf in zip(paths, leaves) if hasattr(leaf, 'shape')}
  assert found.unread == found.unbounded == ()


@pytest.mark.parametrize('build', programs.FLAX)
def test_conventions_agree_with_the_program(build, standard_promotion):
  (apply, params, inputs), _ = build()
  found, conventional = contractions(apply, params, *inputs), trees.axes_by_path('test', None, params)
  for path, a in found.items():
    assert conventional[path].source == 'unknown' or conventional[path][:4] == a[:4], path
    assert trees.axes_of('test', found, path, found.shapes[path]) == a


@pytest.mark.parametrize('build', programs.FLAX)
def test_every_other_parameter_is_accounted_for(build, standard_promotion):
  (apply, params, inputs), _ = build()
  for path, where in contractions(apply, params, *inputs).elsewhere.items():
    assert path.rsplit('/', 1)[-1] in ('bias', 'scale', 'embedding') or 'WeightNorm' in path
    assert where.split()[0] in ('add', 'mul', 'gather', 'broadcast_in_dim', 'concatenate', 'jit', 'dot_general'), where


@pytest.mark.parametrize('build', [attention, conv, stack, programs.lstm, programs.nnx_attention])
def test_arrays_dtypes_and_shapes_give_the_same(build, standard_promotion):
  (apply, params, inputs), _ = build()
  floats = lambda tree, dtype: jax.tree.map(
    lambda x: jnp.ones(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), tree)
  reference = str(contractions(apply, params, *inputs))
  for dtype in (jnp.float32, jnp.bfloat16):
    assert str(contractions(apply, floats(params, dtype), *floats(inputs, dtype))) == reference


@pytest.mark.parametrize('build', [
    dense, attention, conv, programs.grouped_conv, programs.conv_transpose, stack, programs.equinox_conv])
def test_batch_and_length_scale_the_counts(build, standard_promotion):
  (apply, params, inputs), _ = build()
  doubled = jax.tree.map(lambda x: shaped(2 * x.shape[0], *x.shape[1:], dtype=x.dtype), inputs)
  one, two = contractions(apply, params, *inputs), contractions(apply, params, *doubled)
  assert two.total_macs == 2 * one.total_macs and two.other_macs == 2 * one.other_macs
  assert two.macs == {path: 2 * macs for path, macs in one.macs.items()}


def test_order_is_that_of_the_program(standard_promotion):
  params = {name: shaped(4, 4) for name in 'dacb'}
  found = contractions(lambda p, x: x @ p['c'] @ p['a'] @ p['d'] @ p['b'] @ p['a'], params, X)
  assert list(found) == ['c', 'a', 'd', 'b']


def test_what_no_parameter_takes_part_in_is_counted_apart(standard_promotion):
  found = contractions(programs.attend, {'qkv': shaped(4, 24)}, shaped(B, 5, 4))
  assert found.other_macs == 2 * B * 5 * 5 * 8 and found.total_macs == found.other_macs + B * 5 * 96
  lora = contractions(lambda p, x: x @ (p['w'] + p['a'] @ p['b']), {**W, 'a': shaped(4, 2), 'b': shaped(2, 6)}, X)
  assert lora.total_macs == B * 24 + 48 and lora.other_macs == 0


def test_nothing_is_executed(standard_promotion):
  n = 100_000
  found = contractions(lambda p, x: jnp.tanh(x @ p['w']) @ p['w'], {'w': shaped(n, n)}, shaped(n, n))
  assert found['w'] == MATRIX and found.total_macs == 2 * n ** 3  # Beyond 2**50, only Python integers are exact.


def test_static_arguments_and_any_result(standard_promotion):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train, mode='a'):
      x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))
      return {'y': x, 'mode': mode, 'none': None, 'shape': x.shape}
  variables = Model().init(jax.random.key(0), jnp.ones((1, 4)), False)
  for options in ({'train': False}, {'train': True, 'mode': 'b', 'rngs': {'dropout': jax.random.key(1)}}):
    assert list(contractions(Model().apply, variables, X, **options)) == ['params/Dense_0/kernel']
  assert list(contractions(lambda v, x: Model().apply(v, x, train=False), variables, X)) == ['params/Dense_0/kernel']


# Programs that have no answer.


def _half(p, x):
  return jnp.einsum('hbd,hdo->hbo', x, p['w'].reshape(2, 4, 6))


@pytest.mark.parametrize('apply, params, inputs, words', [
  (lambda p, x: x @ p['w'] @ p['w'].T, {'w': shaped(4, 6)}, (X,),
   ["'w' of shape (4, 6)", '(0,) with output (1,)', '(1,) with output (0,)', 'test_contractions.py', 'Leave it dense']),
  (_half, {'w': shaped(8, 6)}, (shaped(2, B, 4),), ['(8, 6)', 'part of axis 0 as layer and another as contracted']),
  (lambda p, x: programs.scan_over({'w': p['w'].reshape(9, 4, 4)}, x), {'w': shaped(36, 4)}, (X,), ['part of axis 0']),
  (lambda p, x: x @ p['w'].reshape(6, 4).T, W, (X,), ['part of axis 0 as contracted and another as output']),
], ids=['used both ways', 'partly batched', 'partly scanned', 'mixed by a reshape'])
def test_ambiguous_parameters_are_an_error_where_they_are_needed(apply, params, inputs, words, standard_promotion):
  found = contractions(apply, params, *inputs)
  assert 'w' in found and list(found) == ['w'] and found.macs['w'] == found.total_macs > 0
  assert '?' in str(found)
  for ask in (lambda: found['w'], lambda: trees.axes_of('test', found, 'w', params['w'].shape)):
    with pytest.raises(ValueError) as e:
      ask()
    for word in words:
      assert word in str(e.value)


def test_axes_of_length_one_never_disagree(standard_promotion):
  dot = lambda x, w: x @ w[0, 0]
  conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  found = contractions(lambda p, x: conv(x, p['w']) + dot(x, p['w']), {'w': shaped(1, 1, 4, 6)}, shaped(B, 8, 8, 4))
  assert found['w'] == programs.KERNEL and found.macs['w'] == 2 * B * 64 * 24


@pytest.mark.parametrize('apply, word', [
  (lambda p, x: x * p['w'], 'mul at'), (lambda p, x: x, 'nothing uses it'), (lambda p, x: (p['w'] * x).sum(), 'mul at'),
  (lambda p, x: p['w'][x[0, 0].astype(int)], 'dynamic_slice at'),
  (lambda p, x: lax.conv(p['w'][None, None], x[None, None], (1, 1), 'SAME'), 'conv_general_dilated at')])
def test_parameters_elsewhere_say_where(apply, word, standard_promotion):
  found = contractions(apply, {'w': shaped(4, 4)}, shaped(4, 4))
  assert 'w' not in found and found.get('w') is None and len(found) == 0 and word in found.elsewhere['w']
  with pytest.raises(KeyError, match='no contraction of the program'):
    found['w']


def test_loops_of_unknown_length_are_counted_once_and_named(standard_promotion):
  loop = lambda p, x: lax.while_loop(lambda x: (x @ p['v']).sum() < 9, lambda x: x @ p['w'], x)
  found = contractions(loop, {'w': shaped(4, 4), 'v': shaped(4, 2)}, X)
  assert found.macs == {'w': B * 16, 'v': B * 8} and found['w'] == found['v'] == MATRIX
  assert len(found.unbounded) == 1 and 'while' in found.unbounded[0] and 'rounds unknown' in str(found)
  empty = contractions(lambda p, x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x) @ p['w'], W, X)
  assert empty.unbounded == ()


def _kernel(x, w, o):
  o[...] = x[...] @ w[...]


@pytest.mark.parametrize('hidden', [
  lambda x, w: pl.pallas_call(_kernel, out_shape=jax.ShapeDtypeStruct((B, 6), jnp.float32), interpret=True)(x, w),
  lambda x, w: jax.pure_callback(np.matmul, jax.ShapeDtypeStruct((B, 6), jnp.float32), x, w),
  lambda x, w: jax.ffi.ffi_call('matmul', jax.ShapeDtypeStruct((B, 6), jnp.float32))(x, w),
  lambda x, w: jnp.pad(jnp.linalg.solve(w[:, :4], x.T).T, ((0, 0), (0, 2))),
  lambda x, w: jnp.pad(jnp.linalg.inv(w[:B, :B]), ((0, 0), (0, 3))),
  lambda x, w: lax.custom_linear_solve(lambda v: v @ jnp.eye(6), w[:B], solve=lambda matvec, v: v),
], ids=['pallas', 'callback', 'ffi', 'solve', 'inverse', 'solve by products'])
def test_what_cannot_be_read_is_named(hidden, standard_promotion):
  found = contractions(lambda p, x: hidden(x, p['w']) @ p['v'], {**W, 'v': shaped(6, 2)}, X)
  assert list(found) == ['v'] and found.total_macs == B * 12
  assert len(found.unread) == 1 and "'w'" in found.unread[0] and 'cannot be read' in str(found)
  assert found.elsewhere['w']


@pytest.mark.parametrize('gather', [False, True])
def test_shards_are_whole_parameters(gather, standard_promotion):
  mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec
  def body(w, x):
    return x @ (lax.all_gather(w, 'model', axis=1, tiled=True) if gather else w)
  apply = lambda p, x: jax.shard_map(
    body, mesh=mesh, in_specs=(spec(None, 'model'), spec('data')), out_specs=spec('data', None if gather else 'model'),
    check_vma=False)(p['w'], x)
  found = contractions(apply, {'w': shaped(4, 8)}, shaped(6, 4))
  assert found['w'] == MATRIX and found.total_macs == 6 * 4 * 8 * (4 if gather else 1)


def test_the_table_prints(standard_promotion):
  (apply, params, inputs), _ = stack()
  found = contractions(apply, params, *inputs)
  text = str(found)
  assert isinstance(found, Contractions)
  lines = text.splitlines()
  assert len(lines) == 1 + len(found) + 2 and len({len(line) for line in lines[:-2]}) == 1
  assert '6 4 8 32' in text and '1 2' in text and f'{found.total_macs:,}' in text
  assert lines[-1].startswith('looked up by data, not contracted: Embed_0/embedding: gather')


@pytest.mark.parametrize('name, path, contracted', [
  ('tied_embedding', 'Embed_0/embedding', True), ('stack', 'Embed_0/embedding', False), ('embeddings', 'e', False),
  ('embedding of one token', 'e', False)])
def test_rows_looked_up_by_data_are_named(name, path, contracted, standard_promotion):
  (apply, params, inputs), _ = programs.NAMED[name]()
  found = contractions(apply, params, *inputs)
  assert list(found.lookups) == [path] and found.lookups[path].split()[0] in ('gather', 'dynamic_slice')
  assert (path in found) == contracted


def test_lookups_inside_of_loops_and_branches_are_named(standard_promotion):
  in_scan = lambda p, tokens: lax.scan(lambda h, t: (jnp.tanh(h + p['e'][t]), None), jnp.zeros(4), tokens)[0]
  in_cond = lambda p, tokens: lax.cond(tokens[0] > 0, lambda: p['e'][tokens], lambda: jnp.zeros((B, 4)))
  for apply in (in_scan, in_cond):
    assert list(contractions(apply, {'e': shaped(9, 4)}, shaped(B, dtype=jnp.int32)).lookups) == ['e']


@pytest.mark.parametrize('name', ['positions', 'experts by index', 'expert by index', 'picked by a number', 'permuted',
                                  'layer by index'])
def test_picked_matrices_and_known_orders_are_no_lookups(name, standard_promotion):
  (apply, params, inputs), _ = programs.NAMED[name]()
  assert contractions(apply, params, *inputs).lookups == {}


# Laws.


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_einsum_letters_are_the_axes(data):
  """Checks that letters of both operands are contracted or layers, and that letters of the weight alone are outputs."""
  letters = string.ascii_lowercase[:6]
  size = dict(zip(letters, data.draw(st.permutations([2, 3, 4, 5, 6, 7]))))
  role = {c: data.draw(st.sampled_from(['contracted', 'output', 'layer', 'other'])) for c in letters}
  mix = lambda chosen: ''.join(data.draw(st.permutations(chosen)))
  w = mix([c for c in letters if role[c] != 'other'])
  x = mix([c for c in letters if role[c] != 'output'])
  out = mix([c for c in letters if role[c] != 'contracted'])
  if not any(role[c] == 'contracted' for c in letters):
    return
  dims = lambda word: tuple(size[c] for c in word)
  order = data.draw(st.permutations(range(len(w))))
  folds = data.draw(st.integers(0, len(w)))

  def apply(p, x_):  # transposes the weight, merges its first dimensions, and undoes both
    y = p['w'].transpose(order).reshape(-1, *dims([w[i] for i in order][folds:]))
    y = y.reshape([size[w[i]] for i in order]).transpose(np.argsort(order))
    return jnp.einsum(f'{w},{x}->{out}', y, x_)

  found = contractions(apply, {'w': shaped(*dims(w))}, shaped(*dims(x)))
  at = {r: tuple(i for i, c in enumerate(w) if role[c] == r) for r in ('contracted', 'output', 'layer')}
  assert found['w']._replace(contracted=tuple(sorted(found['w'].contracted))) == axes(**at)
  assert found.total_macs == found.macs['w'] == math.prod(size.values())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_reshape_of_rows_and_of_columns_is_seen_through(data):
  """Checks weights of any shape whose first axes make up the inputs, reshaped to other lengths and back."""
  factors = lambda: data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
  rows, columns, others = factors(), factors(), factors()
  rows, columns = [n for n in rows if n > 1] or [2], [n for n in columns if n > 1] or [2]
  n, m = math.prod(rows), math.prod(columns)
  between = [k for k in others if n % k == 0][:1]

  def apply(p, x):
    w = p['w'].reshape(*(between + [n // between[0]] if between else [n]), 1, m)
    return x @ w.reshape(n, m)

  found = contractions(apply, {'w': shaped(*rows, *columns)}, shaped(B, n))
  k = len(rows)
  assert found['w'] == axes(tuple(range(k)), tuple(range(k, k + len(columns)))) and found.total_macs == B * n * m
