"""Tests which products end a program: heads of classifiers do, the last products of encoders and recurrences do not."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sparsejax.programs import trace
from sparsejax.programs.contractions import read
from sparsejax.programs.heads import ends

W, X, Y = jnp.ones((4, 4)), jnp.ones((2, 4)), jnp.ones((2, 4))
PARAMS = {'a': W, 'b': W, 'c': W, 'stack': jnp.ones((2, 4, 4))}


def normed(x):
  return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def encoder(p, x):
  return x + jnp.tanh(x @ p['a']) @ p['b']


def deep(p, x):
  return lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p['stack'])[0]


PROGRAMS = {
    'mlp': (lambda p, x, y: jnp.tanh(x @ p['a']) @ p['b'], {'b'}),
    'squared loss': (lambda p, x, y: jnp.mean((jnp.tanh(x @ p['a']) @ p['b'] - y) ** 2), {'b'}),
    'masked logits': (lambda p, x, y: jnp.where(y > 0, jnp.tanh(x @ p['a']) @ p['b'], -1e9), {'b'}),
    'two sums': (lambda p, x, y: x @ p['a'] + jnp.tanh(x) @ p['b'], {'a', 'b'}),
    'encoder': (lambda p, x, y: encoder(p, x), set()),
    'encoder with a norm behind': (lambda p, x, y: normed(encoder(p, x)), set()),
    'encoder with a head': (lambda p, x, y: normed(encoder(p, x)) @ p['c'], {'c'}),
    'scanned encoder': (lambda p, x, y: deep(p, x), set()),
    'scanned encoder with a head': (lambda p, x, y: jax.jit(deep)(p, x) @ p['c'], {'c'}),
    'recurrence': (lambda p, x, y: lax.scan(
        lambda h, x: (jnp.tanh(x @ p['a'] + h @ p['b']),) * 2, jnp.zeros(4), x)[1], set()),
    'experts': (lambda p, x, y: jnp.einsum('be,ebo->bo', jax.nn.softmax(y[:, :2]), x @ p['stack']), set()),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_head_ends_a_program_and_a_stream_does_not(name):
  apply, expected = PROGRAMS[name]
  program = trace(apply, (PARAMS, X, Y))
  found = ends(program)
  assert {path for path, uses in read(program).uses.items() for use in uses if use.address in found} == expected
