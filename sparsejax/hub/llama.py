"""Runs models of Llama type (Touvron et al. 2023, 2302.13971): RMS norms, rotary positions, grouped queries, SwiGLU.

    logits = forward(config)(params, tokens, valid)     # float[B, T, vocab_size]
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.hub.layers import attended, causal, refuse_others
from sparsejax.types import Array

MATRICES = ('model.layers.*_proj.weight',)


def forward(config: Mapping[str, Any]) -> Callable[..., Array]:
  """Returns the decoder of a configuration. Positions count from the first token, valid or not."""
  refuse_others('llama', config, hidden_act='silu', attention_bias=False, mlp_bias=False, rope_scaling=None)
  base, epsilon = config.get('rope_theta', 10_000.0), config.get('rms_norm_eps', 1e-6)

  def apply(params: Mapping[str, Any], tokens: Array, valid: Array) -> Array:
    x, mask = params['model.embed_tokens.weight'][tokens], causal(valid)
    for i in range(config['num_hidden_layers']):
      x = _layer(params, f'model.layers.{i}.', x, mask, config, base, epsilon)
    head = params.get('lm_head.weight', params['model.embed_tokens.weight'])  # left out of files where both are tied
    return _norm(x, params['model.norm.weight'], epsilon) @ head.T

  return apply


def _layer(p: Mapping[str, Any], at: str, x: Array, mask: Array, config: Mapping[str, Any], base: float,
           epsilon: float) -> Array:
  dense = lambda name, x: x @ p[f'{at}{name}_proj.weight'].T
  heads, groups = config['num_attention_heads'], config.get('num_key_value_heads', config['num_attention_heads'])
  y = _norm(x, p[f'{at}input_layernorm.weight'], epsilon)
  split = lambda name, n: dense(f'self_attn.{name}', y).reshape(*x.shape[:2], n, -1)
  k, v = (jnp.repeat(each, heads // groups, 2) for each in (_rotated(split('k', groups), base), split('v', groups)))
  x = x + dense('self_attn.o', attended(_rotated(split('q', heads), base), k, v, mask).reshape(*x.shape[:2], -1))
  y = _norm(x, p[f'{at}post_attention_layernorm.weight'], epsilon)
  return x + dense('mlp.down', jax.nn.silu(dense('mlp.gate', y)) * dense('mlp.up', y))


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
  wide = x.astype(jnp.float32)
  scaled = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
  return scaled.astype(x.dtype) * weight.reshape(1, 1, -1)


def _rotated(x: Array, base: float) -> Array:
  """Returns `x` `[B, T, heads, D]` with features `i` and `i + D/2` rotated by the position times `base^(-2i/D)`."""
  half = x.shape[-1] // 2
  frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None]
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
