"""Runs an `LM` token by token, with a cache for each layer, of which a rule of `attention.decode` reads a part.

    generate = Stepper(params, decoder(decode.quest(keep=256)), capacity=4096)
    state = generate.start(batch=1)
    logits, state = generate.fed(state, prompt)              # every token of a prompt `int[B, n]`
    tokens, state = generate.continued(state, logits[:, -1], 32)
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import transformer
from kernels_pallas.decoding import Decoder
from sparsejax.attention.decode import Cache
from sparsejax.types import Array

Params = Mapping[str, Any]


class LayerState(NamedTuple):
  """A `LayerState` is the cache of a layer, and the newest key before it is smeared or rotated, `[B, heads, d]`."""

  cache: Cache
  key: Array


class Stepper(NamedTuple):
  """A `Stepper` is a trained `LM` without `scan`, by its parameters, with one decoder for all layers or for each."""

  params: Params
  decoding: Decoder | tuple[Decoder, ...]
  capacity: int

  def start(self, batch: int) -> tuple[LayerState, ...]:
    """Returns an empty cache for each layer."""
    _, heads, size = self.params['block_0']['attention']['query']['kernel'].shape
    return tuple(LayerState(each.start(batch, self.capacity, heads, size), jnp.zeros((batch, heads, size)))
                 for each in _of_layers(self.decoding, self.params))

  def fed(self, state: tuple[LayerState, ...], tokens: Array) -> tuple[Array, tuple[LayerState, ...]]:
    """Returns the logits after each of `tokens`, `float32[B, n, vocabulary]`, and the state with all of them."""
    return _fed(self.decoding, self.params, state, tokens)

  def continued(self, state: tuple[LayerState, ...], logits: Array, count: int
                ) -> tuple[Array, tuple[LayerState, ...]]:
    """Returns the `count` likeliest tokens one after the other, `int32[B, count]`, and the state with them.

    `logits`, `[B, vocabulary]`, are those after the last token so far.
    """
    return _continued(self.decoding, self.params, state, logits, count)


@functools.partial(jax.jit, static_argnums=0)
def _fed(decoding: Any, params: Params, state: Any, tokens: Array) -> tuple[Array, Any]:
  run = lambda state, token: step(decoding, params, state, token)[::-1]
  state, logits = jax.lax.scan(run, state, tokens.T)
  return logits.swapaxes(0, 1), state


@functools.partial(jax.jit, static_argnums=(0, 4))
def _continued(decoding: Any, params: Params, state: Any, logits: Array, count: int) -> tuple[Array, Any]:
  def run(carry, _):
    state, logits = carry
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    logits, state = step(decoding, params, state, token)
    return (state, logits), token

  (state, _), tokens = jax.lax.scan(run, (state, logits), None, count)
  return tokens.T, state


def step(decoding: Decoder | tuple[Decoder, ...], params: Params, state: tuple[LayerState, ...],
         token: Array) -> tuple[Array, tuple[LayerState, ...]]:
  """Returns the logits after `token`, `int[B]`, and the state with it."""
  x, after = params['embed']['embedding'][token], []
  for layer, (each, before) in enumerate(zip(_of_layers(decoding, params), state)):
    own = params[f'block_{layer}']
    attended, now = _attended(each, own['attention'], before, _normed(own['norm1'], x))
    after.append(now)
    x = x + attended
    hidden = nn.gelu(_dense(own['mlp']['fc1'], _normed(own['norm2'], x)), approximate=True)
    x = x + _dense(own['mlp']['fc2'], hidden)
  return _dense(params['head'], _normed(params['norm'], x)), tuple(after)


def _attended(decoding: Decoder, params: Params, state: LayerState, x: Array) -> tuple[Array, LayerState]:
  q, key, v = (jnp.einsum('bw,whd->bhd', x, params[name]['kernel']) + params[name]['bias'][None]
               for name in ('query', 'key', 'value'))
  recall = 'smear' in params
  k = transformer.smeared(key, state.key, params['smear']) if recall else key
  turned = transformer.partly_rotated_at if recall else transformer.rotated_at
  q, k = (turned(a[:, None], state.cache.length[:, None])[:, 0] for a in (q, k))
  cache = decoding.extend(state.cache, k[:, None], v[:, None])
  y = jnp.einsum('bhd,hdw->bw', decoding.step(q, cache), params['out']['kernel']) + params['out']['bias'][None]
  return y, LayerState(cache, key)


def _normed(params: Params, x: Array) -> Array:
  return nn.LayerNorm().apply({'params': params}, x)


def _dense(params: Params, x: Array) -> Array:
  return x @ params['kernel'] + params['bias'][None]


def _of_layers(decoding: Decoder | tuple[Decoder, ...], params: Params) -> tuple[Decoder, ...]:
  depth = sum(name.startswith('block_') for name in params)
  return (decoding,) * depth if isinstance(decoding, Decoder) else decoding
