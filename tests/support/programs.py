"""Holds programs with known answers: the axes of each contracted parameter, and the number of multiply-adds."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

from sparsejax.types import Axes

B = 3  # batch


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def axes(contracted, output, layer=(), spatial=()):
  return Axes(contracted, output, spatial, layer, 'traced')


MATRIX = axes((0,), (1,))
TRANSPOSED = axes((1,), (0,))
STACKED = axes((1,), (2,), layer=(0,))
KERNEL = axes((2,), (3,), spatial=(0, 1))


def linen(module, *inputs, **options):
  variables = jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), *inputs)
  return functools.partial(module.apply, **options), variables['params'], inputs


def linen_case(module, *inputs, **options):
  apply, params, inputs = linen(module, *inputs, **options)
  return (lambda params, *inputs: apply({'params': params}, *inputs)), params, inputs


# Flax Linen. A case returns (apply, params, inputs), and the axes and multiply-adds of each contracted parameter.


def dense():
  return linen_case(nn.Dense(5), shaped(B, 4)), {'kernel': (MATRIX, B * 4 * 5)}


def dense_general():
  model = nn.Sequential([nn.DenseGeneral((2, 6)), nn.DenseGeneral(7, axis=(-2, -1))])
  return linen_case(model, shaped(B, 4)), {
    'layers_0/kernel': (axes((0,), (1, 2)), B * 4 * 12), 'layers_1/kernel': (axes((0, 1), (2,)), B * 12 * 7)}


def dense_general_batched():
  return linen_case(nn.DenseGeneral(7, axis=-1, batch_dims=(0,)), shaped(B, 2, 4)), {
    'kernel': (STACKED, B * 2 * 4 * 7)}


def attention():
  inner = axes((0,), (1, 2))
  return linen_case(nn.MultiHeadDotProductAttention(4), shaped(B, 5, 32)), {
    'query/kernel': (inner, B * 5 * 32 * 32), 'key/kernel': (inner, B * 5 * 32 * 32),
    'value/kernel': (inner, B * 5 * 32 * 32), 'out/kernel': (axes((0, 1), (2,)), B * 5 * 32 * 32)}


def conv():
  return linen_case(nn.Conv(6, (3, 2), (2, 1)), shaped(B, 8, 8, 4)), {'kernel': (KERNEL, B * 4 * 8 * 3 * 2 * 4 * 6)}


def grouped_conv():
  return linen_case(nn.Conv(6, (3, 3), feature_group_count=2), shaped(B, 8, 8, 4)), {
    'kernel': (KERNEL, B * 8 * 8 * 9 * 2 * 6)}


def depthwise_conv():
  return linen_case(nn.Conv(4, (3, 3), feature_group_count=4), shaped(B, 8, 8, 4)), {
    'kernel': (KERNEL, B * 8 * 8 * 9 * 4)}


def conv_1d():
  return linen_case(nn.Conv(6, (3,)), shaped(B, 8, 4)), {'kernel': (axes((1,), (2,), spatial=(0,)), B * 8 * 3 * 4 * 6)}


def conv_transpose():
  return linen_case(nn.ConvTranspose(6, (3, 3), (2, 2)), shaped(B, 8, 8, 4)), {
    'kernel': (KERNEL, B * 8 * 8 * 9 * 4 * 6)}


def conv_transpose_flipped():
  return linen_case(nn.ConvTranspose(6, (3, 3), transpose_kernel=True), shaped(B, 8, 8, 4)), {
    'kernel': (axes((3,), (2,), spatial=(0, 1)), B * 8 * 8 * 9 * 4 * 6)}


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(4, name='attention')(y, y)
    return x + nn.Dense(32, name='down')(nn.gelu(nn.Dense(64, name='up')(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Embed(11, 32)(x)
    blocks = nn.scan(nn.remat(Block), variable_axes={'params': 0}, split_rngs={'params': True}, length=6)
    return nn.Dense(10, name='head')(nn.LayerNorm()(blocks(name='blocks')(x, None)[0].mean(1)))


def stack():
  square = 6 * B * 5 * 32 * 32
  inner = axes((1,), (2, 3), layer=(0,))
  return linen_case(Stack(), shaped(B, 5, dtype=jnp.int32)), {
    'blocks/attention/query/kernel': (inner, square), 'blocks/attention/key/kernel': (inner, square),
    'blocks/attention/value/kernel': (inner, square),
    'blocks/attention/out/kernel': (axes((1, 2), (3,), layer=(0,)), square),
    'blocks/up/kernel': (STACKED, 2 * square), 'blocks/down/kernel': (STACKED, 2 * square),
    'head/kernel': (MATRIX, B * 32 * 10)}


class Tied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, 8)
    return embed.attend(nn.Dense(8)(embed(tokens)))


def tied_embedding():
  return linen_case(Tied(), shaped(B, 5, dtype=jnp.int32)), {
    'Dense_0/kernel': (MATRIX, B * 5 * 64), 'Embed_0/embedding': (TRANSPOSED, B * 5 * 8 * 11)}


def lstm():
  gates = [f'cell/{source}{gate}/kernel' for source in 'ih' for gate in 'ifgo']
  return linen_case(nn.RNN(nn.LSTMCell(6)), shaped(B, 5, 4)), {
    path: (MATRIX, 5 * B * (4 if '/i' in path else 6) * 6) for path in gates}


def lstm_with_joined_kernels():
  (apply, params, inputs), expected = lstm()
  return linen_case(nn.RNN(nn.OptimizedLSTMCell(6)), *inputs), expected


class Normalized(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.WeightNorm(nn.Dense(5))(x)


def flax_weight_norm():
  return linen_case(Normalized(), shaped(B, 4)), {'Dense_0/kernel': (MATRIX, B * 20)}


FLAX = [dense, dense_general, dense_general_batched, attention, conv, grouped_conv, depthwise_conv, conv_1d,
        conv_transpose, conv_transpose_flipped, stack, tied_embedding, lstm, lstm_with_joined_kernels, flax_weight_norm]


# Flax NNX and Equinox.


def nnx_case(make, *inputs):
  model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  return (lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)), state, inputs


def nnx_linear():
  return nnx_case(lambda rngs: nnx.Linear(4, 5, rngs=rngs), shaped(B, 4)), {'kernel': (MATRIX, B * 20)}


def nnx_attention():
  make = lambda rngs: nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
  _, expected = attention()
  return nnx_case(make, shaped(B, 5, 32)), expected


class Layers(nnx.Module):
  def __init__(self, rngs):
    make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0, out_axes=0)
    self.layers, self.dropout = nnx.split_rngs(splits=5)(make)(rngs), nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.dropout(step(x, self.layers))


def nnx_stack():
  return nnx_case(Layers, shaped(B, 4)), {'layers/kernel': (STACKED, 5 * B * 16)}


def nnx_module_as_it_is():
  model = nnx.eval_shape(lambda: nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
  return (lambda model, x: model(x), model, (shaped(B, 4),)), {'kernel': (MATRIX, B * 20)}


def equinox_case(make, *inputs, call=lambda model, x: jax.vmap(model)(x)):
  arrays, static = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(0)), lambda x: hasattr(x, 'shape'))
  return (lambda arrays, *inputs: call(eqx.combine(arrays, static), *inputs)), arrays, inputs


def equinox_linear():
  return equinox_case(lambda key: eqx.nn.Linear(4, 5, key=key), shaped(B, 4)), {'weight': (TRANSPOSED, B * 20)}


def equinox_conv():
  return equinox_case(lambda key: eqx.nn.Conv2d(4, 6, 3, padding=1, key=key), shaped(B, 4, 8, 8)), {
    'weight': (axes((1,), (0,), spatial=(2, 3)), B * 64 * 9 * 24)}


def equinox_mlp():
  return equinox_case(lambda key: eqx.nn.MLP(4, 5, 8, 2, key=key), shaped(B, 4)), {
    'layers/0/weight': (TRANSPOSED, B * 32), 'layers/1/weight': (TRANSPOSED, B * 64),
    'layers/2/weight': (TRANSPOSED, B * 40)}


def equinox_module_as_it_is():
  model = eqx.filter_eval_shape(lambda key: eqx.nn.MLP(4, 5, 8, 1, key=key), jax.random.key(0))
  return (lambda model, x: jax.vmap(model)(x), model, (shaped(B, 4),)), {
    'layers/0/weight': (TRANSPOSED, B * 32), 'layers/1/weight': (TRANSPOSED, B * 40)}


def equinox_ensemble():
  make = lambda key: eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 5, key=k))(jax.random.split(key, 7))
  call = lambda models, x: eqx.filter_vmap(lambda model, x: jax.vmap(model)(x))(models, x)
  return equinox_case(make, shaped(7, B, 4), call=call), {'weight': (axes((2,), (1,), layer=(0,)), 7 * B * 20)}


def convolution_ensemble():
  conv = lambda k, x: lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  return (lambda p, x: jax.vmap(conv)(p['k'], x), {'k': shaped(7, 3, 3, 4, 6)}, (shaped(7, B, 8, 8, 4),)), {
    'k': (axes((3,), (4,), layer=(0,), spatial=(1, 2)), 7 * B * 64 * 9 * 24)}


# Plain JAX: changes of a weight before its use.

W = {'w': shaped(4, 6)}
X = shaped(B, 4)
USED = {'w': (MATRIX, B * 24)}


def on_weight(change, params=W, expected=USED):
  """Returns a case of the program `x @ change(params)`."""
  return lambda: ((lambda p, x: x @ change(p), params, (X,)), expected)


@jax.custom_vjp
def _rounded(w):
  return jnp.round(w * 8) / 8


_rounded.defvjp(lambda w: (_rounded(w), None), lambda _, g: (g,))


@jax.custom_jvp
def _clipped(w):
  return jnp.clip(w, -1, 1)


_clipped.defjvp(lambda w, t: (_clipped(*w), t[0]))

MASK = np.arange(24).reshape(4, 6) % 2 == 0


def _n_m(w):
  groups = jnp.abs(w).reshape(1, 4, 6).transpose(2, 0, 1)
  kept = jnp.argsort(jnp.argsort(groups, axis=-1), axis=-1) >= 2
  return jnp.where(kept.transpose(1, 2, 0).reshape(4, 6), w, 0)


def _per_layer(p):
  return lax.map(lambda w: w / jnp.sqrt((w * w).sum()), p['w'])


WEIGHTS = {
  'mask': on_weight(lambda p: p['w'] * MASK.astype(np.float32)),
  'mask of the parameters': on_weight(lambda p: p['w'] * p['m'], {**W, 'm': shaped(4, 6, dtype=jnp.bool_)}),
  'mask of its own magnitudes': on_weight(lambda p: jnp.where(jnp.abs(p['w']) > 0.1, p['w'], 0)),
  'N:M by sorting': on_weight(lambda p: _n_m(p['w'])),
  'fake quantisation, custom_vjp': on_weight(lambda p: _rounded(p['w'])),
  'clipping, custom_jvp': on_weight(lambda p: _clipped(p['w'])),
  'straight-through': on_weight(lambda p: p['w'] + lax.stop_gradient(jnp.round(p['w']) - p['w'])),
  'clamp': on_weight(lambda p: lax.clamp(-1.0, p['w'], 1.0)),
  'integers with scales': on_weight(lambda p: p['q'].astype(jnp.float32) * p['scale'],
                                    {'q': shaped(4, 6, dtype=jnp.int8), 'scale': shaped(6)}, {'q': USED['w']}),
  'cast there and back': on_weight(lambda p: p['w'].astype(jnp.bfloat16).astype(jnp.float32)),
  'barrier': on_weight(lambda p: lax.optimization_barrier((p['u'], p['w']))[1], {**W, 'u': shaped(4, 6)}),
  'weight norm': on_weight(lambda p: p['g'] * p['w'] / jnp.linalg.norm(p['w'], axis=0), {**W, 'g': shaped(6)}),
  'scale of the inputs': on_weight(lambda p: p['g'][:, None] * p['w'], {**W, 'g': shaped(4)}),
  'softmax over the inputs': on_weight(lambda p: jax.nn.softmax(p['w'], axis=0)),
  'spectral norm': on_weight(
    lambda p: p['w'] / (p['u'] @ p['w'] @ (p['w'].T @ p['u'])), {**W, 'u': shaped(4)},
    {'u': (axes((0,), ()), 2 * 24), 'w': (MATRIX, B * 24 + 2 * 24)}),
  'LoRA': on_weight(lambda p: p['w'] + p['a'] @ p['b'], {**W, 'a': shaped(4, 2), 'b': shaped(2, 6)}, {
    'w': USED['w'], 'a': (TRANSPOSED, 4 * 2 * 6), 'b': (MATRIX, 4 * 2 * 6)}),
  'sum of two': on_weight(lambda p: p['w'] + p['u'], {**W, 'u': shaped(4, 6)}, {'w': USED['w'], 'u': USED['w']}),
  'noise': on_weight(lambda p: p['w'] + p['s'] * jax.random.normal(jax.random.key(0), (4, 6)),
                     {**W, 's': shaped(4, 6)}, {'w': USED['w'], 's': USED['w']}),
  'transposed': on_weight(lambda p: p['w'].T, {'w': shaped(6, 4)}, {'w': (TRANSPOSED, B * 24)}),
  'flat': on_weight(lambda p: p['w'].reshape(4, 6), {'w': shaped(2, 2, 3, 2)}, {'w': (axes((0, 1), (2, 3)), B * 24)}),
  'flat, other order': on_weight(lambda p: p['w'].transpose(1, 0, 2).reshape(4, 6), {'w': shaped(2, 2, 6)},
                                 {'w': (axes((1, 0), (2,)), B * 24)}),
  'split and merged': on_weight(lambda p: p['w'].reshape(2, 2, 3, 2)[:, :, ::-1].reshape(4, 6)),
  'no whole factors': on_weight(lambda p: p['w'].reshape(4, 6), {'w': shaped(4, 3, 2)}, {
    'w': (axes((0,), (1, 2)), B * 24)}),
  'mixed but alike': on_weight(lambda p: p['w'].reshape(4, 3, 4).reshape(4, 12), {'w': shaped(4, 2, 6)}, {
    'w': (axes((0,), (1, 2)), B * 48)}),
  'lengths of one': on_weight(lambda p: p['w'].reshape(1, 4, 1, 6)[0][:, 0]),
  'kernel of one tap': on_weight(lambda p: p['w'].reshape(4, 6), {'w': shaped(1, 1, 4, 6)}, {
    'w': (axes((2,), (3,), layer=(0, 1)), B * 24)}),
  'padded': on_weight(lambda p: jnp.pad(p['w'], ((0, 0), (0, 2))), expected={'w': (MATRIX, B * 4 * 8)}),
  'repeated': on_weight(lambda p: jnp.repeat(p['w'], 3, axis=1), expected={'w': (MATRIX, B * 4 * 18)}),
  'tiled': on_weight(lambda p: jnp.tile(p['w'], (1, 3)), expected={'w': (MATRIX, B * 4 * 18)}),
  'tiled and regrouped': on_weight(lambda p: jnp.tile(p['w'], (1, 3)).reshape(4, 3, 6)[:, 0]),
  'a length of one at the end': on_weight(lambda p: p['w'].reshape(4, 6), {'w': shaped(4, 6, 1)}, {
    'w': (axes((0,), (1,), layer=(2,)), B * 24)}),
  'one row broadcast': on_weight(lambda p: jnp.broadcast_to(p['g'][:, None], (4, 6)), {'g': shaped(4)}, {}),
  'permuted': on_weight(lambda p: p['w'][np.array([2, 0, 3, 1])]),
  'joined': on_weight(lambda p: jnp.concatenate([p['w'], p['u']], axis=1), {**W, 'u': shaped(4, 2)}, {
    'w': USED['w'], 'u': (MATRIX, B * 8)}),
  'cut and joined': on_weight(lambda p: jnp.concatenate([-p['w'][2:], p['w'][:2]])),
  'joined with a bias row': lambda: ((
    lambda p, x: jnp.concatenate([x, jnp.ones((B, 1))], 1) @ jnp.concatenate([p['w'], p['b'][None]]),
    {**W, 'b': shaped(6)}, (X,)), {'w': USED['w']}),
  'picked': on_weight(lambda p: p['w'][3], {'w': shaped(5, 4, 6)}, {'w': (STACKED, B * 24)}),
  'picked by a number': on_weight(lambda p: p['w'][jnp.int32(3)], {'w': shaped(5, 4, 6)}, {'w': (STACKED, B * 24)}),
  'unstacked': on_weight(lambda p: sum(jnp.unstack(p['w'])), {'w': shaped(5, 4, 6)}, {'w': (STACKED, B * 24)}),
  'changed layer by layer': on_weight(lambda p: _per_layer(p)[1], {'w': shaped(5, 4, 6)}, {'w': (STACKED, B * 24)}),
  'changed row by row': on_weight(lambda p: _per_layer(p)),
  'jit': on_weight(lambda p: jax.jit(lambda w: w * 2)(p['w'])),
  'either': on_weight(lambda p: lax.cond(p['w'].sum() > 0, lambda w: w, jnp.negative, p['w'])),
  'carried through a loop': on_weight(lambda p: lax.fori_loop(0, 3, lambda i, w: jnp.sin(w) * 2, p['w'])),
  'turned in every round': on_weight(lambda p: lax.fori_loop(0, 2, lambda i, w: w.T, p['w']), {'w': shaped(4, 4)}, {}),
  'factored': on_weight(lambda p: jnp.linalg.cholesky(p['w']), {'w': shaped(4, 4)}, {}),
}


# Plain JAX: places where a weight is used.


def case(apply, params, *inputs, **expected):
  return lambda: ((apply, params, inputs), expected)


def scan_over(p, x):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p['w'])[0]


def _nested(p, x):
  outer = lambda x, ws: (lax.scan(lambda x, w: (x @ w, None), x, ws)[0], None)
  return lax.scan(outer, x, p['w'])[0]


def _shared(p, x):
  return lax.scan(lambda x, _: (jnp.tanh(x @ p['w']), None), x, length=9)[0]


def _recurrent(p, x):
  h, _ = lax.scan(lambda h, x: (jnp.tanh(h + x), None), p['h'], x)
  return (h + p['b']) @ p['w']


def _branches(p, x):
  return lax.switch(x.sum().astype(int), [lambda x: x @ p['w'], lambda x: x @ p['u'] @ p['v'], lambda x: x @ p['w']], x)


def _fused(p, x):
  q, k, v = (x @ p['w'].reshape(4, 3, 2, 5)[:, i].reshape(4, 10) for i in range(3))
  return q + k + v


def _experts(p, x, groups):
  return lax.ragged_dot(lax.ragged_dot(x, p['up'], groups), p['down'], groups)


def attend(p, x):
  q, k, v = jnp.split(jnp.einsum('bti,io->bto', x, p['qkv']), 3, axis=-1)
  return jax.nn.softmax(jnp.einsum('btd,bsd->bts', q, k)) @ v


SQUARES = {'w': shaped(9, 4, 4)}
USES = {
  'either side': case(lambda p, x: p['w'] @ x, W, shaped(6, B), w=(TRANSPOSED, B * 24)),
  'einsum': case(lambda p, x: jnp.einsum('bdh,ohd->bo', x, p['w']), {'w': shaped(7, 3, 5)}, shaped(B, 5, 3),
                 w=(axes((1, 2), (0,)), B * 105)),
  'biases': case(lambda p, x: (x @ p['w'] + p['b']) @ p['v'] + p['c'],
                 {**W, 'b': shaped(6), 'v': shaped(6, 4), 'c': shaped(B, 4)}, X, w=USED['w'],
                 v=(MATRIX, B * 24)),
  'biases of one example': case(lambda p, x: (x @ p['w'] + p['b']) @ p['v'],
                                {**W, 'b': shaped(6), 'v': shaped(6, 4)}, shaped(4), w=(MATRIX, 24), v=(MATRIX, 24)),
  'embeddings': case(lambda p, i: p['e'][i] @ p['w'], {'e': shaped(9, 4), **W}, shaped(B, dtype=jnp.int32), **USED),
  'embedding of one token': case(lambda p, i: p['e'][i] @ p['w'], {'e': shaped(9, 4), **W}, shaped(dtype=jnp.int32),
                                 w=(MATRIX, 24)),
  'positions': case(lambda p, x: (x + p['e'][:B]) @ p['w'], {'e': shaped(9, 4), **W}, X, **USED),
  'time to features': case(lambda p, t: jnp.sin(t * p['f'] + p['b']) @ p['w'],
                           {'f': shaped(4), 'b': shaped(4), **W}, shaped(), w=(MATRIX, 24)),
  'learned queries': case(lambda p, x: jnp.tanh(p['q'] @ p['w'] + p['b']) @ x, {'q': shaped(5, 4), **W, 'b': shaped(6)},
                          shaped(6, B), q=(TRANSPOSED, 5 * 24), w=(MATRIX, 5 * 24)),
  'scan': case(scan_over, SQUARES, X, w=(STACKED, 9 * B * 16)),
  'scan in a scan': case(_nested, {'w': shaped(2, 5, 4, 4)}, X, w=(axes((2,), (3,), layer=(0, 1)), 10 * B * 16)),
  'scan over merged layers': case(lambda p, x: _nested({'w': p['w'].reshape(2, 5, 4, 4)}, x), {'w': shaped(10, 4, 4)},
                                  X, w=(STACKED, 10 * B * 16)),
  'shared by steps': case(_shared, {'w': shaped(4, 4)}, X, w=(MATRIX, 9 * B * 16)),
  'remat': case(jax.checkpoint(scan_over), SQUARES, X, w=(STACKED, 9 * B * 16)),
  'layer by index': case(lambda p, x: lax.fori_loop(0, 9, lambda i, x: x @ p['w'][i], x), SQUARES, X,
                         w=(STACKED, 9 * B * 16)),
  'switch': case(_branches, {**W, 'u': shaped(4, 8), 'v': shaped(8, 6)}, X, w=(MATRIX, 0),
                 u=(MATRIX, B * 32), v=(MATRIX, B * 48)),
  'members with inputs of their own': case(lambda p, x: jax.vmap(jnp.matmul)(x, p['w']), SQUARES, shaped(9, B, 4),
                                           w=(STACKED, 9 * B * 16)),
  'members with one input': case(lambda p, x: jax.vmap(lambda w: x @ w)(p['w']), SQUARES, X,
                                 w=(axes((1,), (0, 2)), 9 * B * 16)),
  'fused by reshape': case(_fused, {'w': shaped(4, 30)}, X, w=(MATRIX, B * 120)),
  'fused and picked': case(lambda p, x: sum(jnp.einsum('bi,iho->bho', x, p['w'][:, i]) for i in range(3)),
                           {'w': shaped(4, 3, 2, 5)}, X, w=(axes((0,), (2, 3), layer=(1,)), B * 120)),
  'fused by split': case(lambda p, x: sum(x @ w for w in jnp.split(p['w'], 3, axis=1)), {'w': shaped(4, 30)}, X,
                         w=(MATRIX, B * 120)),
  'grouped queries': case(lambda p, x: jnp.einsum('bi,iho->bho', x, jnp.repeat(p['w'], 4, axis=1)),
                          {'w': shaped(4, 2, 5)}, X, w=(axes((0,), (1, 2)), B * 160)),
  'attention': case(attend, {'qkv': shaped(4, 24)}, shaped(B, 5, 4), qkv=(MATRIX, B * 5 * 96)),
  'experts': case(_experts, {'up': shaped(5, 4, 6), 'down': shaped(5, 6, 4)}, shaped(12, 4), shaped(5, dtype=jnp.int32),
                  up=(STACKED, 12 * 24), down=(STACKED, 12 * 24)),
  'experts by index': case(lambda p, x, i: jnp.einsum('bi,bio->bo', x, p['w'][i]), {'w': shaped(5, 4, 6)}, X,
                           shaped(B, dtype=jnp.int32), w=(STACKED, B * 24)),
  'expert by index': case(lambda p, x, i: x @ p['w'][i], {'w': shaped(5, 4, 6)}, X, shaped(dtype=jnp.int32),
                          w=(STACKED, B * 24)),
  'experts stacked': case(lambda p, x, i: lax.ragged_dot(x, jnp.stack([p['w'], p['u']]), i), {**W, 'u': shaped(4, 6)},
                          shaped(8, 4), shaped(2, dtype=jnp.int32), w=(MATRIX, 4 * 24), u=(MATRIX, 4 * 24)),
  'experts stacked between': case(lambda p, x: jnp.einsum('bi,ieo->beo', x, jnp.stack([p['w'], p['u']], axis=1)),
                                  {**W, 'u': shaped(4, 6)}, X, w=USED['w'], u=USED['w']),
  'columns stacked': case(lambda p, x: x @ jnp.stack([p['a'], p['b']], 1), {'a': shaped(4), 'b': shaped(4)}, X,
                          a=(axes((0,), ()), B * 4), b=(axes((0,), ()), B * 4)),
  'experts of members': case(lambda p, x, i: jax.vmap(lambda w, x, i: x @ w[i])(p['w'], x, i),
                             {'w': shaped(7, 5, 4, 6)}, shaped(7, B, 4), shaped(7, dtype=jnp.int32),
                             w=(axes((2,), (3,), layer=(0, 1)), 7 * B * 24)),
  # JAX multiplies and adds shapes such as [1, 4, 6] and [7, 1, 1] without a `broadcast_in_dim`.
  'one member scaled for each': case(
    lambda p, x: jnp.matmul(x, p['w'][None] * np.arange(1, 8, dtype=np.float32)[:, None, None]), W, shaped(7, B, 4),
    w=(MATRIX, 7 * B * 24)),
  'one member shifted for each': case(
    lambda p, x: jnp.matmul(x, p['w'][None] + np.ones((7, 1, 1), np.float32)), W, shaped(7, B, 4),
    w=(MATRIX, 7 * B * 24)),
  'one member for all': case(lambda p, x: jnp.matmul(x, jnp.broadcast_to(p['w'][2:3], (7, 4, 6))),
                             {'w': shaped(5, 4, 6)}, shaped(7, B, 4), w=(STACKED, 7 * B * 24)),
  'alike at each tap': case(
    lambda p, x: lax.conv_general_dilated(x, jnp.broadcast_to(p['w'], (3, 3, 4, 6)), (1, 1), 'SAME',
                                          dimension_numbers=('NHWC', 'HWIO', 'NHWC')),
    W, shaped(B, 8, 8, 4), w=(MATRIX, B * 64 * 9 * 24)),
  'bias of a recurrent state': case(_recurrent, {'h': shaped(4), 'b': shaped(4), **W}, shaped(9, 4), w=(MATRIX, 24)),
  'rotation': case(lambda p, x: x @ (np.eye(4, dtype=np.float32) @ p['w']), W, X, w=(MATRIX, 4 * 24)),
  'penalty': case(lambda p, x: (x @ p['w'], jnp.sum((p['w'] @ p['w'].T) ** 2)), W, X, w=(MATRIX, B * 24 + 4 * 24)),
  'generator': case(lambda p, key: (jax.random.normal(key, (4,)) @ p['w'] + p['b']) @ p['v'],
                    {**W, 'b': shaped(6), 'v': shaped(6, 2)}, jax.random.key(0), w=(MATRIX, 24), v=(MATRIX, 12)),
  'dropped weights': case(lambda p, x, key: x @ (p['w'] * jax.random.bernoulli(key, 0.5, (4, 6))), W, X,
                          jax.random.key(0), **USED),
}

OTHERS = [nnx_linear, nnx_attention, nnx_stack, nnx_module_as_it_is, equinox_linear, equinox_conv, equinox_mlp,
          equinox_module_as_it_is, equinox_ensemble, convolution_ensemble]
NAMED = {**{f.__name__: f for f in FLAX + OTHERS}, **WEIGHTS, **USES}
