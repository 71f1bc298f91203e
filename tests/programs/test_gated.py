"""Tests that gated layers are found in programs, with the value of the activation at zero."""

import jax
import jax.numpy as jnp
import pytest

from sparsejax.programs.gated import layers_of
from sparsejax.programs.tracing import trace

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
P = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in {
    'gate': (4, 6), 'up': (4, 6), 'down': (6, 4), 'bias': (6,), 'joined': (4, 12)}.items()}


def glu(act, p, x):
  return (act(x @ p['gate'] + p['bias'][None]) * (x @ p['up'])) @ p['down']


def joined(p, x):
  gate, up = jnp.split(x @ p['joined'], 2, -1)
  return (jax.nn.silu(gate) * up) @ p['down']


GLU, MLP, JOINED = ('gate', 'up', 'down'), ('gate', None, 'down'), ('joined', 'joined', 'down')
CASES = {
    'silu': (lambda p, x: glu(jax.nn.silu, p, x), GLU, 0.0), 'gelu': (lambda p, x: glu(jax.nn.gelu, p, x), GLU, 0.0),
    'exact gelu': (lambda p, x: glu(lambda a: jax.nn.gelu(a, approximate=False), p, x), GLU, 0.0),
    'relu': (lambda p, x: glu(jax.nn.relu, p, x), GLU, 0.0),
    'squared relu': (lambda p, x: glu(lambda a: jnp.square(jnp.maximum(a, 0)), p, x), GLU, 0.0),
    'sigmoid': (lambda p, x: glu(jax.nn.sigmoid, p, x), GLU, 0.5),
    'softplus': (lambda p, x: glu(jax.nn.softplus, p, x), GLU, 0.6931471824645996),
    'other order': (lambda p, x: ((x @ p['up']) * jax.nn.silu(x @ p['gate'])) @ p['down'], GLU, 0.0),
    'half precision': (lambda p, x: glu(lambda a: jax.nn.silu(a.astype(jnp.bfloat16)).astype(jnp.float32), p, x), GLU,
                       0.0),
    'plain': (lambda p, x: jax.nn.relu(x @ p['gate'] + p['bias'][None]) @ p['down'], MLP, 0.0),
    'scaled': (lambda p, x: (0.5 * jax.nn.relu(2 * (x @ p['gate']))).reshape(1, 2, 6) @ p['down'], MLP, 0.0),
    'remat': (lambda p, x: jax.checkpoint(lambda x: glu(jax.nn.silu, p, x))(x), GLU, 0.0),
    'linear': (lambda p, x: (2 * (x @ p['gate']) + p['bias'][None]) @ p['down'], None, None),
    'two gates': (lambda p, x: (jax.nn.silu(x @ p['gate']) * jnp.tanh(x @ p['up'])) @ p['down'], None, None),
    'residual': (lambda p, x: (jax.nn.relu(x @ p['gate']) + x @ p['up']) @ p['down'], None, None),
    'softmax': (lambda p, x: jax.nn.softmax(x @ p['gate']) @ p['down'], None, None),
    'scaled by data': (lambda p, x: (jax.nn.relu(x @ p['gate']) * x[:, :1]) @ p['down'], MLP, 0.0),
    'dropout': (lambda p, x: jnp.where(x[:, :1] > 0, jax.nn.relu(x @ p['gate']), 0.0) @ p['down'], MLP, 0.0),
    'dropout of a sigmoid': (lambda p, x: (jax.nn.sigmoid(x @ p['gate']) * x[:, :1]) @ p['down'], MLP, None),
    'filled by data': (lambda p, x: jnp.where(x[:, :1] > 0, jax.nn.relu(x @ p['gate']), 1.0) @ p['down'], None, None),
    'moved by data': (lambda p, x: (jax.nn.relu(x @ p['gate']) + x[:, :1]) @ p['down'], None, None),
    'divides data': (lambda p, x: (x[:, :1] / jax.nn.softplus(x @ p['gate'])) @ p['down'], None, None),
    'joined': (joined, JOINED, 0.0),
    'joined, sliced': (lambda p, x: ((h := x @ p['joined'])[:, 6:] * jax.nn.relu(h[:, :6])) @ p['down'], JOINED, 0.0),
    'one half twice': (lambda p, x: ((h := x @ p['joined'])[:, :6] * jax.nn.relu(h[:, :6])) @ p['down'],
                       ('joined', None, 'down'), 0.0),
    'every other': (lambda p, x: ((h := x @ p['joined'])[:, ::2] * jax.nn.relu(h[:, 1::2])) @ p['down'], None, None),
}


@pytest.mark.parametrize('name', CASES)
def test_layers_and_their_activation_at_zero(name):
  apply, wanted, at_zero = CASES[name]
  found = layers_of(trace(apply, (P, X)))
  names = [(layer.gate, layer.up, layer.down, layer.at_zero) for layer in found]
  assert names == ([(*wanted, at_zero)] if wanted else [])


def test_a_layer_in_a_scan_is_one_layer_with_the_loop_that_slices_it():
  apply = lambda p, x: jax.lax.scan(lambda h, w: (h + glu(jax.nn.silu, w, h), None), x, p)[0]
  stack = {name: jax.ShapeDtypeStruct((3, *w.shape), w.dtype) for name, w in P.items()}
  found = []
  jax.eval_shape(lambda: found.extend(layers_of(trace(apply, (stack, X)))))  # under another trace
  layer, = found
  assert (layer.down, layer.down_use.view.loops, layer.up_use.view.loops) == ('down', (0,), (0,))
