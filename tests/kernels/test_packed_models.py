"""Tests that models run on packed parameters as they do on dense parameters, and say which op they call."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import sparsejax as sj
from kernels_pallas import models, packed
from sparsejax import formats

KEY = jax.random.key(0)
BLOCK = sj.Block((4, 4), 0.5)


@pytest.fixture(autouse=True)
def ordinary(standard_promotion):
  """Returns nothing; allows JAX's ordinary promotion, which models outside of this library need."""


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def pruned(w, pattern, at):
  """Returns `w` with every second block zero, so that all matrices of a stack store as many blocks.

  For an `NM` pattern, returns `w` with the smaller half of each group zero.
  """
  if isinstance(pattern, sj.NM):
    return w * pattern(jnp.abs(w), None, at)
  places = np.indices(w.shape)
  along = lambda axes: np.ravel_multi_index([places[a] for a in axes], [w.shape[a] for a in axes])
  return np.asarray(w) * ((along(at.contracted) // 4 + along(at.output) // 4) % 2 == 0)


def sparse(apply, params, x, pattern):
  """Returns the parameters pruned to the pattern, dense and packed along the axes that the program contracts."""
  axes = sj.contractions(apply, params, x)
  picked = lambda path, w: path in axes and sj.trees.matrices(path, w)
  names, leaves, treedef = sj.trees.flatten(params)
  dense = treedef.unflatten([pruned(w, pattern, axes[name]) if name in axes else w
                             for name, w in zip(names, leaves)])
  return dense, formats.pack(dense, pattern, where=picked, axes=axes)


def linen(model, x):
  return model.apply, jax.jit(model.init)(KEY, x), x


class Attention(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(num_heads=2)(x)


class General(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.DenseGeneral(8, axis=(-2, -1))(nn.relu(nn.DenseGeneral((2, 4))(x)))


class Mixed(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.remat(nn.Dense)(8, dtype=jnp.bfloat16)(nn.Dense(8)(x))


class Layer(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return nn.relu(nn.Dense(8)(x)), None


class Scanned(nn.Module):

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(nn.remat(Layer), variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
    return layers()(x, None)[0]


class Ensemble(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.vmap(nn.Dense, in_axes=0, variable_axes={'params': 0}, split_rngs={'params': True})(8)(x)


def of_nnx(net, x):
  graphdef, state = nnx.split(net)
  return (lambda state, x: nnx.merge(graphdef, state)(x)), state, x


class NnxNet(nnx.Module):

  def __init__(self, rngs):
    self.up = nnx.Linear(8, 16, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
    self.conv = nnx.Conv(16, 8, (1, 1), rngs=rngs)

  def __call__(self, x):
    return self.conv(self.attention(self.up(x))[:, None])


def of_equinox(net, x):
  arrays, static = eqx.partition(net, eqx.is_array)
  return (lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)), arrays, x


def of_haiku(x):
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 12])(x)))
  return net.apply, net.init(KEY, x), x


def plain(params, x):
  for w in params['layers']:
    x = jnp.tanh(x @ w)
  return jnp.einsum('bi,hoi->bho', x, params['heads'])


MODELS = {
  'Dense': lambda: linen(nn.Dense(8), normal(3, 8)),
  'DenseGeneral': lambda: linen(General(), normal(3, 8)),
  'MultiHeadDotProductAttention': lambda: linen(Attention(), normal(2, 3, 8)),
  'Conv 1x1': lambda: linen(nn.Conv(8, (1, 1), strides=(2, 3)), normal(2, 4, 5, 8)),
  'bfloat16, remat': lambda: linen(Mixed(), normal(3, 8)),
  'nn.scan, remat': lambda: linen(Scanned(), normal(3, 8)),
  'nn.vmap': lambda: linen(Ensemble(), normal(3, 2, 8)),
  'NNX': lambda: of_nnx(NnxNet(nnx.Rngs(0)), normal(2, 3, 8)),
  'Equinox MLP': lambda: of_equinox(eqx.nn.MLP(8, 4, 8, 2, key=KEY), normal(3, 8)),
  'Equinox Conv2d 1x1': lambda: of_equinox(eqx.nn.Conv2d(8, 4, 1, stride=2, key=KEY), normal(2, 8, 3, 4)),
  'Haiku': lambda: of_haiku(normal(3, 8)),
  'plain': lambda: (plain, {'layers': [normal(8, 8), normal(8, 8)], 'heads': normal(2, 4, 8)}, normal(3, 8)),
}
NM = sj.NM(2, 4)
CASES = [(name, BLOCK) for name in MODELS] + [(name, NM) for name in ('DenseGeneral', 'nn.scan, remat', 'plain')]


def assert_close(a, b, atol=1e-5):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol, rtol=1e-5)


def ops(explanation):
  return {row.op for row in explanation}


@pytest.mark.sampled
@pytest.mark.parametrize('model, pattern', CASES, ids=lambda case: str(case))
def test_a_model_is_the_dense_model_and_unpacks_nothing(model, pattern):
  apply, params, x = MODELS[model]()
  dense, small = sparse(apply, params, x, pattern)
  expected = jax.jit(apply)(dense, x)
  assert_close(jax.jit(packed(apply))(small, x), expected, 3e-2 if expected.dtype == jnp.bfloat16 else 1e-5)
  explained = packed(apply, explain=True)(small, x)
  names, leaves, _ = sj.trees.flatten(small, is_leaf=formats.is_packed)
  assert sorted(row.path for row in explained) == sorted(n for n, w in zip(names, leaves) if formats.is_packed(w))
  assert ops(explained) == {'nm_matmul' if pattern == NM else 'block_sparse_matmul'}, str(explained)


def a_weight(*shape, axes=-2, seed=1):
  """Returns a weight of which every second block of 4x4 is stored."""
  axes = (axes,) if isinstance(axes, int) else axes
  contracted = tuple(a % len(shape) for a in axes)
  at = sj.types.Axes(contracted, tuple(a for a in range(len(shape)) if a not in contracted))
  return formats.BlockSparseArray.from_dense(pruned(normal(*shape, seed=seed), BLOCK, at), block=(4, 4), axes=axes)


def a_stack(n, *shape):
  """Returns a packed stack of `n` different matrices."""
  at = sj.types.Axes((1,), (2,), layer=(0,))
  return formats.BlockSparseArray.from_dense(pruned(normal(n, *shape), BLOCK, at), block=(4, 4), axes=at)


@jax.custom_jvp
def thrice(w, x):
  return x @ w


thrice.defjvp(lambda primals, tangents: (primals[1] @ primals[0], 3 * (
    primals[1] @ tangents[0] + tangents[1] @ primals[0])))


@jax.custom_vjp
def fivefold(w, x):
  return x @ w


fivefold.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, dy: (5 * kept[1].T @ dy, 5 * dy @ kept[0].T))


def rounds(w, x):
  return jax.lax.while_loop(lambda c: c[0] < jnp.int32(3) + 0 * w.shape[0], lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)),
                            (jnp.int32(0), x))[1]


def layers(w, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w, reverse=True)


# Programs that keep their weight packed: a function that makes the weight and x, and the program.
PACKED = {
  'transposed': (lambda: (a_weight(12, 8, axes=-1), normal(3, 8)), lambda w, x: x @ w.T),
  'first operand': (lambda: (a_weight(12, 8, axes=-1), normal(8, 5)), lambda w, x: w @ x),
  'first operand, vector': (lambda: (a_weight(12, 8, axes=-1), normal(8)), lambda w, x: w @ x),
  'outputs split': (lambda: (a_weight(8, 12), normal(3, 8)), lambda w, x: jnp.einsum(
      'bi,iho->hbo', x, w.reshape(8, 3, 4))),
  'outputs split and swapped': (lambda: (a_weight(8, 12), normal(3, 8)), lambda w, x: jnp.einsum(
      'bi,ioh->bho', x, w.reshape(8, 3, 4).transpose(0, 2, 1)) @ jnp.ones((4, 2))),
  'contraction split and swapped': (lambda: (a_weight(8, 12), normal(3, 4, 2)), lambda w, x: jnp.einsum(
      'bij,jio->bo', x, w.reshape(2, 4, 12))),
  'contraction merged': (lambda: (a_weight(2, 4, 12, axes=(0, 1)), normal(3, 8)), lambda w, x: x @ w.reshape(8, 12)),
  'contraction merged in another order': (lambda: (a_weight(2, 4, 12, axes=(1, 0)), normal(3, 8)),
                                          lambda w, x: x @ w.reshape(8, 12)),
  'all merged and split again': (lambda: (a_weight(8, 12), normal(3, 8)), lambda w, x: x @ jnp.squeeze(
      w.reshape(-1).reshape(8, 1, 12), 1)),
  'batch of a stack': (lambda: (a_stack(3, 8, 12), normal(3, 5, 8)), lambda w, x: jnp.einsum('eio,ebi->beo', w, x)),
  'batch of length one': (lambda: (a_weight(8, 12), normal(1, 5, 8)), lambda w, x: jnp.einsum(
      'eio,ebi->beo', w[None], x)),
  'mixed dtypes': (lambda: (a_weight(8, 12), normal(3, 8).astype(jnp.bfloat16)), lambda w, x: jax.lax.dot_general(
      x, w.astype(jnp.bfloat16), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)),
  'scan': (lambda: (a_stack(3, 8, 8), normal(2, 8)), layers),
  'scan over x': (lambda: (a_weight(8, 8), normal(2, 3, 8)), lambda w, x: jax.lax.scan(
      lambda c, x: (jnp.tanh((c + x) @ w), None), x[0], x)[0]),
  'while': (lambda: (a_weight(8, 8), normal(2, 8)), rounds),
  'cond': (lambda: (a_weight(8, 8), normal(2, 8)), lambda w, x: jax.lax.cond(
      x[0, 0] > 0, lambda: x @ w, lambda: x @ w.reshape(8, 8) + 1)),
  'jit, remat': (lambda: (a_weight(8, 8), normal(2, 8)), jax.jit(jax.checkpoint(lambda w, x: jnp.sin(x @ w)))),
  'custom_jvp': (lambda: (a_weight(8, 8), normal(2, 8)), thrice),
  'custom_vjp': (lambda: (a_weight(8, 8), normal(2, 8)), fivefold),
  'stop_gradient, named': (lambda: (a_weight(8, 8), normal(2, 8)), lambda w, x: x @ jax.lax.stop_gradient(w)
                           + x @ checkpoint_name(w, 'w')),
}


@pytest.mark.parametrize('arrays, apply', PACKED.values(), ids=PACKED)
def test_values_and_gradients_of_a_program_that_keeps_its_weight_packed(arrays, apply):
  """Checks that gradients are those of the dense program at the stored values, by the program's own rules too."""
  w, x = arrays()
  explained = packed(apply, explain=True)(w, x)
  assert ops(explained) == {'block_sparse_matmul'}, str(explained)
  ours = loss(packed(apply), lambda v: formats.with_values(w, v), apply is rounds)
  theirs = loss(apply, lambda v: formats.with_values(w, v).to_dense(), apply is rounds)
  assert_close(ours(w.values, x), theirs(w.values, x), 1e-4)


def loss(apply, weight, forward_only):
  """Returns a function that computes the result, a scalar of it, and the derivatives by both arguments."""
  def scalar(v, x):
    y = apply(weight(v), x)
    return sum(jnp.sum(jnp.sin(each.astype(jnp.float32))) for each in jax.tree.leaves(y)), y

  return jax.jit(scalar if forward_only else jax.value_and_grad(scalar, (0, 1), has_aux=True))


# Programs that unpack their weight, with the primitive that unpacks it and a part of the reason.
UNPACKED = {
  'elementwise': (lambda: (a_weight(8, 12), normal(3, 8)), lambda w, x: x @ (2 * w), 'mul', 'no product'),
  'sum': (lambda: (a_weight(8, 12), normal(3, 8)), lambda w, x: x.sum() * w.sum(), 'reduce_sum', 'no product'),
  'other axis': (lambda: (a_weight(8, 12), normal(3, 12)), lambda w, x: x @ w.T, 'dot_general', 'along [0]; give pack'),
  'part of the axis': (lambda: (a_weight(8, 12), normal(3, 2)), lambda w, x: jnp.einsum(
      'bi,ijo->bjo', x, w.reshape(2, 4, 12)), 'dot_general', 'in part'),
  'mixed by a reshape': (lambda: (a_weight(8, 12), normal(3, 6)), lambda w, x: x @ w.reshape(6, 16), 'reshape',
                         'no product'),
  'kernel 1x3': (lambda: (a_weight(1, 3, 4, 4, axes=(0, 1, 2)), normal(1, 1, 3, 4)),
                 lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=(
                     'NHWC', 'HWIO', 'NHWC')), 'conv_general_dilated', 'only plain 1x1'),
  'stack as one': (lambda: (a_stack(3, 8, 12), normal(5, 8)), lambda w, x: jnp.einsum('bi,eio->beo', x, w),
                   'dot_general', 'is a stack'),
  'rows of a matrix': (lambda: (a_weight(12, 8, axes=-1), normal(3, 8)), lambda w, x: jax.lax.scan(
      lambda c, row: (c + x @ row, None), jnp.zeros(3), w)[0], 'scan', 'not of a stack'),
  'carried': (lambda: (a_weight(8, 8), normal(8, 8)), lambda w, x: jax.lax.fori_loop(0, 2, lambda i, w: w @ x, w),
              'scan', 'from round to round'),
  'integers': (lambda: (formats.BlockSparseArray.from_dense(np.eye(8, dtype=np.int32), block=(4, 4)),
                        jnp.ones((3, 8), jnp.int32)), lambda w, x: x @ w, 'dot_general', 'no op for int32'),
  'bitmask': (lambda: (formats.BitmaskArray.from_dense(np.eye(8, dtype=np.float32)), normal(3, 8)), lambda w, x: x @ w,
              'dot_general', "'bitmask' does not say"),
  'precision': (lambda: (a_weight(8, 12), normal(3, 8)), lambda w, x: jnp.dot(x, w, precision='highest'),
                'dot_general', 'HIGHEST'),
  'result': (lambda: (a_weight(8, 8), normal(8, 8)), lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: x),
             'cond', 'one of its results'),
}


@pytest.mark.parametrize('arrays, apply, primitive, why', UNPACKED.values(), ids=UNPACKED)
def test_what_unpacks_a_weight_is_said(arrays, apply, primitive, why):
  w, x = arrays()
  rows = [row for row in packed(apply, explain=True)({'a': w}['a'], x) if row.op == 'unpacked']
  assert [(row.path, row.primitive, why in row.why) for row in rows] == [('', primitive, True)]
  assert_close(jax.jit(packed(apply))(w, x), apply(w.to_dense(), x))


def test_two_packed_operands_are_one_product():
  a, b = a_weight(8, 8, seed=1), a_weight(8, 12, seed=2)
  run = lambda p: p['a'] @ p['b']
  assert [(row.path, row.op) for row in packed(run, explain=True)({'a': a, 'b': b, 'c': b})] == [
      ('a', 'unpacked'), ('b', 'block_sparse_matmul'), ('c', 'unused')]
  assert_close(packed(run)({'a': a, 'b': b, 'c': b}), a.to_dense() @ b.to_dense())


@pytest.mark.parametrize('kind, op', [('2:4', 'nm_matmul'), ('csc', 'unstructured_matmul'),
                                      ('sparse24', 'sparse24_matmul')])
def test_each_format_has_its_op(kind, op):
  w = np.where((np.arange(128) % 4 < 2)[:, None], normal(128, 128), np.float32(0))
  small, x = formats.pack({'w': w.astype(jnp.bfloat16)}, kind)['w'], normal(3, 128).astype(jnp.bfloat16)
  assert ops(packed(jnp.dot, explain=True)(x, small)) == {op}
  assert_close(packed(jnp.dot)(x, small), jnp.dot(x, w.astype(jnp.bfloat16)), 0.1)


def test_vmap_over_inputs_and_over_stacks_of_parameters():
  stack, x = a_stack(3, 8, 12), normal(3, 5, 8)
  run, dense = packed(lambda w, x: jnp.tanh(x @ w)), jnp.tanh(jnp.einsum('ebi,eio->ebo', x, stack.to_dense()))
  assert_close(jax.jit(jax.vmap(run))(stack, x), dense)
  first = jax.tree.map(lambda a: a[0], stack)
  assert_close(jax.jit(jax.vmap(run, (None, 0)))(first, x[0]), dense[0])


def test_an_equinox_module_with_packed_weights_is_jitted_and_differentiated_as_any_other():
  """Checks `eqx.filter_jit` and `eqx.filter_grad`, which leave the indices of packed weights out by themselves."""
  net, x = eqx.nn.MLP(8, 4, 8, 2, key=KEY), normal(3, 8)
  apply, arrays, _ = of_equinox(net, x)
  static, (dense, small) = eqx.filter(net, eqx.is_array, inverse=True), sparse(apply, arrays, x, sj.NM(2, 4))
  whole = eqx.combine(dense, static), eqx.combine(small, static, is_leaf=formats.is_packed)
  loss = lambda net: jnp.sum(jax.vmap(net)(x) ** 2)
  assert_close(eqx.filter_jit(packed(loss))(whole[1]), loss(whole[0]))
  slopes = eqx.combine(eqx.filter_grad(packed(loss))(whole[1]), whole[1]), eqx.filter_grad(loss)(whole[0])
  for found, expected, w in zip(*(slope.layers for slope in slopes), dense.layers):
    assert_close(found.weight.to_dense(), expected.weight * (w.weight != 0))
    assert_close(found.bias, expected.bias)


def test_shard_map_inside_and_outside():
  """Checks a sharded program that runs on packed weights, and a program on packed weights that is sharded."""
  mesh, place = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
  weights, x = {'a': a_weight(8, 8, seed=1), 'b': a_weight(8, 12, seed=2)}, normal(16, 8)
  apply = lambda weights, x: jnp.tanh(x @ weights['a']) @ weights['b']
  over = lambda run: jax.shard_map(run, mesh=mesh, in_specs=(place(), place('data')), out_specs=place('data'))
  expected = apply(formats.unpack(weights), x)
  for run in (packed(over(apply)), over(packed(apply))):
    assert_close(jax.jit(run)(weights, x), expected)
  assert ops(packed(over(apply), explain=True)(weights, x)) == {'block_sparse_matmul'}
  loss = lambda run, values: jnp.sum(run(formats.with_values(weights, values), x) ** 2)
  slopes = [jax.jit(jax.grad(loss, 1), static_argnums=0)(run, formats.values(weights))
            for run in (packed(over(apply)), packed(apply))]
  jax.tree.map(assert_close, *slopes)
  split = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(place(None, 'data'), place()),
                        out_specs=place(None, 'data'))
  row, = packed(split, explain=True)(weights['a'], x)
  assert (row.op, row.why) == ('unpacked', 'a mesh shards it')


def test_other_arguments_are_handed_on_and_packed_leaves_come_back():
  """Checks options, functions, keyword arguments, tracers from outside, and a packed leaf that is returned as it is."""
  w, x = a_weight(8, 8), normal(3, 8)

  def apply(params, x, activation, *, train, bias=None):
    y = activation(x @ params['w']) if train else x
    return {'w': params['w'], 'y': y if bias is None else y + bias, 'flat': params['w'].reshape(-1)}

  found = packed(apply)({'w': w}, x, jnp.tanh, train=True, bias=1.0)
  assert isinstance(found['w'], formats.BlockSparseArray) and isinstance(found['flat'], jax.Array)
  assert_close(found['y'], jnp.tanh(x @ w.to_dense()) + 1)
  slope = jax.grad(lambda b: packed(lambda w, x: jnp.sum(x @ w * b))(w, x))(jnp.float32(2))
  assert_close(slope, jnp.sum(x @ w.to_dense()), 1e-4)
  assert not packed(jnp.dot, explain=True)(x, x.T)


def test_a_named_implementation_runs_or_raises():
  w, x = a_weight(8, 8), normal(3, 8)
  assert_close(packed(jnp.dot, implementation='dense')(x, w), x @ w.to_dense())
  with pytest.raises(ValueError, match='block_sparse_matmul: unknown implementation.*xla'):
    packed(jnp.dot, implementation='cuda')(x, w)


def test_what_is_computed_again_is_still_computed_again():
  run = packed(jax.checkpoint(lambda w, x: jnp.sin(x @ w)))
  jaxpr = jax.make_jaxpr(run)(a_weight(8, 8), normal(2, 8)).jaxpr
  assert {'checkpoint', 'remat', 'remat2'} & {eqn.primitive.name for eqn in jaxpr.eqns}


def test_a_fault_inside_of_an_op_is_an_error_and_a_refusal_is_a_reason(monkeypatch):
  w, x = a_weight(8, 12), normal(3, 8)

  def faulty(x, w, *, implementation=None, explain=False):
    raise ValueError('a fault')

  monkeypatch.setitem(models.OPS, 'block_sparse', models.Op(faulty, lambda x, w: None))
  for explain in (False, True):
    with pytest.raises(ValueError, match='a fault'):
      packed(jnp.dot, explain=explain)(x, w)
  asked = []
  monkeypatch.setitem(models.OPS, 'block_sparse', models.Op(faulty, lambda x, w: asked.append((x, w)) or 'no'))
  use, = packed(jnp.dot, explain=True)(x, w)
  assert (use.op, use.why) == ('unpacked', 'no') and asked[0][0].shape == (3, 8) and asked[0][1].shape == (8, 12)
  assert_close(packed(jnp.dot)(x, w), x @ w.to_dense())


def test_refusals_are_asked_about_one_matrix_of_a_stack(monkeypatch):
  asked = []
  op = models.OPS['block_sparse']
  monkeypatch.setitem(models.OPS, 'block_sparse', op._replace(refusal=lambda x, w: asked.append((x.shape, w.shape))))
  packed(lambda w, x: jnp.einsum('eio,ebi->beo', w, x))(a_stack(3, 8, 12), normal(3, 5, 8))
  assert asked == [((5, 8), (8, 12))]


def test_an_op_from_outside_is_one_entry_of_a_table(monkeypatch):
  w, x = a_weight(8, 12), normal(3, 8)

  def negated(x, w, *, implementation=None, explain=False):
    return 'always' if explain else -formats.matmul(x, w)

  monkeypatch.setitem(models.OPS, 'block_sparse', models.Op(negated, lambda x, w: None))
  assert_close(packed(jnp.dot)(x, w), -x @ w.to_dense())
  use, = packed(jnp.dot, explain=True)(x, w)
  assert (use.op, use.why) == ('negated', 'always') and 'always' in str(packed(jnp.dot, explain=True)(x, w))


@pytest.mark.parametrize('implementation', [None, 'xla'])
def test_a_format_without_an_op_is_unpacked_and_said_to_be(monkeypatch, implementation):
  w, x = a_weight(8, 12), normal(3, 8)
  monkeypatch.delitem(models.OPS, 'block_sparse')
  use, = packed(jnp.dot, implementation=implementation, explain=True)(x, w)
  assert (use.op, use.why) == ('unpacked', "no op for the format 'block_sparse'")
  assert_close(packed(jnp.dot, implementation=implementation)(x, w), x @ w.to_dense())
