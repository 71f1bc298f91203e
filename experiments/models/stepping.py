"""Runs an `LM` token by token, with a cache for each layer, of which a rule of `attention.decode` reads a part.

    generate = Stepper(params, decoder(decode.quest(keep=256)), capacity=4096)
    logits, state = generate.fed(generate.start(batch=1), prompt)   # every token of a prompt `int[B, n]`
    state = generate.reading(read(params, prompt))                  # the same by exact attention
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


class LayerPrompt(NamedTuple):
  """A `LayerPrompt` holds the keys and the values of a prompt in one layer, `[B, T, heads, d]`, and the newest key.

  `newest`, `[B, heads, d]`, is neither smeared nor rotated.
  """

  k: Array
  v: Array
  newest: Array


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

  def reading(self, prompt: tuple[LayerPrompt, ...]) -> tuple[LayerState, ...]:
    """Returns the state after a prompt that `read` has read."""
    empty = self.start(len(prompt[0].newest))
    return tuple(LayerState(each.extend(layer.cache, own.k, own.v), own.newest)
                 for each, layer, own in zip(_of_layers(self.decoding, self.params), empty, prompt))

  def fed(self, state: tuple[LayerState, ...], tokens: Array) -> tuple[Array, tuple[LayerState, ...]]:
    """Returns the logits after each of `tokens`, `float32[B, n, vocabulary]`, and the state with all of them."""
    return _fed(self.decoding, self.params, state, tokens)

  def continued(self, state: tuple[LayerState, ...], logits: Array, count: int
                ) -> tuple[Array, tuple[LayerState, ...]]:
    """Returns the `count` likeliest tokens one after the other, `int32[B, count]`, and the state with them.

    `logits`, `[B, vocabulary]`, are those after the last token so far.
    """
    return _continued(self.decoding, self.params, state, logits, count)


@jax.jit
def read(params: Params, tokens: Array) -> tuple[LayerPrompt, ...]:
  """Returns what each layer keeps of the prompts `tokens`, `int[B, T]`, with exact attention, example by example."""
  return jax.tree.map(lambda a: a[:, 0], jax.lax.map(lambda row: _read(params, row[None]), tokens))


def _read(params: Params, tokens: Array) -> tuple[LayerPrompt, ...]:
  x, prompts, positions = params['embed']['embedding'][tokens], [], jnp.arange(tokens.shape[1])[None]
  for layer in range(_depth(params)):
    own = params[f'block_{layer}']
    q, key, v = _heads(own['attention'], _normed(own['norm1'], x))
    q, k = _turned(own['attention'], q, key, transformer.shifted(key), positions)
    prompts.append(LayerPrompt(k, v, key[:, -1]))
    x = x + _out(own['attention'], jax.nn.dot_product_attention(q, k, v, is_causal=True))
    x = x + _mlp(own, x)
  return tuple(prompts)


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
  """Returns the logits after `token`, `int[B]`, and the state that holds the token."""
  x, after = params['embed']['embedding'][token], []
  for layer, (each, before) in enumerate(zip(_of_layers(decoding, params), state)):
    own = params[f'block_{layer}']
    attended, now = _attended(each, own['attention'], before, _normed(own['norm1'], x))
    after.append(now)
    x = x + attended
    x = x + _mlp(own, x)
  return _dense(params['head'], _normed(params['norm'], x)), tuple(after)


def _attended(decoding: Decoder, params: Params, state: LayerState, x: Array) -> tuple[Array, LayerState]:
  q, key, v = (each[:, None] for each in _heads(params, x))
  q, k = _turned(params, q, key, state.key[:, None], state.cache.length[:, None])
  cache = decoding.extend(state.cache, k, v)
  return _out(params, decoding.step(q[:, 0], cache)), LayerState(cache, key[:, 0])


# Each part of a layer takes tokens of any number of leading axes.


def _heads(params: Params, x: Array) -> tuple[Array, Array, Array]:
  """Returns queries, keys and values, `[..., heads, d]`."""
  def of(own: Params) -> Array:
    y = jnp.einsum('...w,whd->...hd', x, own['kernel'])
    return y + jnp.broadcast_to(own['bias'], y.shape)

  return of(params['query']), of(params['key']), of(params['value'])


def _turned(params: Params, q: Array, key: Array, before: Array, positions: Array) -> tuple[Array, Array]:
  """Returns queries and keys at their positions; a model that recalls mixes each key with the key `before` it."""
  recall = 'smear' in params
  k = transformer.smeared(key, before, params['smear']) if recall else key
  turned = transformer.partly_rotated_at if recall else transformer.rotated_at
  return turned(q, positions), turned(k, positions)


def _out(params: Params, y: Array) -> Array:
  y = jnp.einsum('...hd,hdw->...w', y, params['out']['kernel'])
  return y + jnp.broadcast_to(params['out']['bias'], y.shape)


def _mlp(params: Params, x: Array) -> Array:
  hidden = nn.gelu(_dense(params['mlp']['fc1'], _normed(params['norm2'], x)), approximate=True)
  return _dense(params['mlp']['fc2'], hidden)


def _normed(params: Params, x: Array) -> Array:
  return nn.LayerNorm().apply({'params': params}, x)


def _dense(params: Params, x: Array) -> Array:
  y = x @ params['kernel']
  return y + jnp.broadcast_to(params['bias'], y.shape)


def _depth(params: Params) -> int:
  return sum(name.startswith('block_') for name in params)


def _of_layers(decoding: Decoder | tuple[Decoder, ...], params: Params) -> tuple[Decoder, ...]:
  return (decoding,) * _depth(params) if isinstance(decoding, Decoder) else decoding
