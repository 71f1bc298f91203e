"""Defines the transformer layers that `vit`, `lm` and `encoders` build their models from.

    layer = PreNormBlock(heads=4, ratio=4, causal=False, dtype=jnp.float32)
    params = layer.init(jax.random.key(0), x)['params']  # x: float[B, T, width]
    y, _ = layer.apply({'params': params}, x)            # float32[B, T, width]

Parameters are named so that `trees.named('mlp/*/kernel')` selects every feed-forward kernel, `block_0/mlp/fc1/kernel`
among them. With `scan=True` the blocks are one stack, `blocks/mlp/fc1/kernel`, whose leading axis is the layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsejax.types import Array


def rotated_at(x: Array, positions: Array) -> Array:
  """Returns `x` `[B, T, heads, D]` with the rotary position embedding of `positions`, `int[B, T]` or `int[1, T]`.

  The pair `(i, i + D/2)` of features at position `t` is rotated by `t / 10000^(2i/D)` radians. Reference: Su et al.
  2021, arXiv:2104.09864. The two halves of the features are paired, as in GPT-NeoX, while the paper pairs neighbours.
  """
  half = x.shape[-1] // 2
  frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
  cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def partly_rotated_at(x: Array, positions: Array) -> Array:
  """Returns `x` with the first quarter of the features of each head rotated by `rotated_at`.

  The other features are compared alike at any distance. Reference: Black et al. 2022, GPT-NeoX-20B, arXiv:2204.06745.
  """
  turned = x.shape[-1] // 4
  return jnp.concatenate([rotated_at(x[..., :turned], positions), x[..., turned:]], -1)


def causal_attention(query: Array, key: Array, value: Array, positions: Array | None = None,
                     rotated: Callable[[Array, Array], Array] = rotated_at) -> Array:
  """Returns causal dot-product attention, `[B, T, heads, D]`, with queries and keys `rotated` by their positions.

  The default positions are 0 to T - 1. Positions must increase: a token attends to the tokens that stand before it.
  """
  positions = jnp.arange(query.shape[1], dtype=jnp.int32)[None] if positions is None else positions
  query, key = (rotated(each, positions) for each in (query, key))
  return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def shifted(key: Array) -> Array:
  """Returns for each key of `[B, T, heads, D]` the key before it, and zeros for the first key."""
  return jnp.pad(key[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))


def smeared(key: Array, before: Array, gate: Array) -> Array:
  """Returns each key, `[..., heads, D]`, mixed with the key `before` it by a number for each head, `gate` `[heads, 1]`.

  A head can thus look for what follows a byte. Reference: Olsson et al. 2022, In-context Learning and Induction Heads,
  arXiv:2209.11895, argument 2.
  """
  own = jnp.broadcast_to(nn.sigmoid(gate), key.shape)
  return own * key + (1 - own) * before


class RecallAttention(nn.Module):
  """A `RecallAttention` is causal attention that learns to repeat a passage within few training steps.

  Keys are `smeared`, three quarters of the features have no position (`partly_rotated_at`), and the first kernel of the
  keys is that of the queries (Trockman & Kolter 2023, Mimetic Initialization, arXiv:2305.09828; the paper leaves noise
  between both). The first token has a key of zeros before it. `__call__` maps `x` `[B, T, width]` to the same shape.
  """

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, positions: Array | None = None) -> Array:
    dense = functools.partial(nn.DenseGeneral, (self.heads, x.shape[-1] // self.heads), dtype=self.dtype)
    query = dense(name='query')(x)
    alike = self.variables['params']['query']['kernel']
    key = dense(kernel_init=lambda *_: jnp.copy(alike), name='key')(x)
    gate = self.param('smear', nn.initializers.zeros, (self.heads, 1)).astype(key.dtype)
    key = smeared(key, shifted(key), gate)
    y = causal_attention(query, key, dense(name='value')(x), positions, partly_rotated_at)
    return nn.DenseGeneral(x.shape[-1], (-2, -1), dtype=self.dtype, name='out')(y)


class MLP(nn.Module):
  """An `MLP` computes two dense layers with a GELU between them: `width -> ratio * width -> width`.

  The GELU is exact if `exact`, else its tanh approximation.
  """

  ratio: int
  dtype: Any
  exact: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    hidden = nn.Dense(self.ratio * x.shape[-1], dtype=self.dtype, name='fc1')(x)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(nn.gelu(hidden, approximate=not self.exact))


class PreNormBlock(nn.Module):
  """A `PreNormBlock` is a transformer layer with a layer norm before attention and one before the `MLP`.

  `__call__` maps `x` `[B, T, width]` to `(x, None)`, the form that `nn.scan` requires. A causal layer takes positions.
  With `recall`, the attention is `RecallAttention`.
  """

  heads: int
  ratio: int
  causal: bool
  dtype: Any
  recall: bool = False

  @nn.compact
  def __call__(self, x: Array, positions: Array | None = None) -> tuple[Array, None]:
    norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
    if self.recall:
      attention = functools.partial(RecallAttention(self.heads, self.dtype, name='attention'), positions=positions)
    else:
      causal = functools.partial(causal_attention, positions=positions)
      attend = causal if self.causal else jax.nn.dot_product_attention
      attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, attention_fn=attend, name='attention')
    x = x + attention(norm('norm1')(x))
    return x + MLP(self.ratio, self.dtype, name='mlp')(norm('norm2')(x)), None


class PostNormBlock(nn.Module):
  """A `PostNormBlock` is BERT's transformer layer, with a layer norm after attention and one after the exact `MLP`.

  `__call__` maps `x` `[B, T, width]` to the same shape. Each token attends to the tokens where `mask` is true; the mask
  is `bool[B, 1, 1, T]`.
  """

  heads: int
  ratio: int
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    norm = lambda name: nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)
    attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name='attention')(x, mask=mask)
    x = norm('norm1')(x + attention)
    return norm('norm2')(x + MLP(self.ratio, self.dtype, exact=True, name='mlp')(x))


def stack(x: Array, model: nn.Module, causal: bool, positions: Array | None = None, recall: bool = False) -> Array:
  """Returns `x` `[B, T, width]` after `model.depth` blocks and a last layer norm, inside the model's `__call__`.

  Causal blocks rotate queries and keys by `positions`, `int[B, T]`, by default 0 to T - 1. With `recall` they have
  `RecallAttention`.

  `model` has the fields of `ViT` and `LM`. If `model.scan`, the blocks are one `nn.scan`, and the backward pass
  recomputes each block. Raises `ValueError` if the width is no multiple of the heads: of twice their number if
  `causal`, and of eight times if `recall`.
  """
  pairs, times = (8, 'eight times ') if recall else (2, 'twice ') if causal else (1, '')
  if x.shape[-1] % (pairs * model.heads):
    raise ValueError(f'models.{type(model).__name__}: width {x.shape[-1]} is no multiple of '
                     f'{times}the {model.heads} heads; change either.')
  arguments = (model.heads, model.mlp_ratio, causal, model.dtype, recall)
  if model.scan:
    scanned = nn.scan(nn.remat(PreNormBlock), variable_axes={'params': 0}, split_rngs={'params': True},
                      in_axes=nn.broadcast, length=model.depth)
    x, _ = scanned(*arguments, name='blocks')(x, positions)
  else:
    for layer in range(model.depth):
      x, _ = PreNormBlock(*arguments, name=f'block_{layer}')(x, positions)
  return nn.LayerNorm(dtype=model.dtype, name='norm')(x)
