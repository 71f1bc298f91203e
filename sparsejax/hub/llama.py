"""Runs models of Llama type (Touvron et al. 2023, 2302.13971): RMS norms, rotary positions, grouped queries, SwiGLU.

    logits = forward(config)(params, tokens, valid)     # float[B, T, vocab_size]
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import errors
from sparsejax.hub.layers import Required, attended, causal, heads_of, refuse_others, rooted
from sparsejax.types import Array

MATRICES = ('*layers.*_proj.weight',)
WORDS = 'embed_tokens.weight'


def forward(config: Mapping[str, Any]) -> Callable[..., Array]:
  """Returns the decoder of a configuration. Positions count from the first token, valid or not."""
  refuse_others('llama', config, hidden_act='silu', attention_bias=False, mlp_bias=False)
  angles, epsilon = angles_of(config), config.get('rms_norm_eps', 1e-6)

  def apply(params: Mapping[str, Any], tokens: Array, valid: Array) -> Array:
    p = rooted(params, 'model.')
    x, mask = p['embed_tokens.weight'][tokens], causal(valid)
    for i in range(config['num_hidden_layers']):
      x = _layer(p, f'layers.{i}.', x, mask, config, angles, epsilon)
    return _norm(x, p['norm.weight'], epsilon) @ p.get('lm_head.weight', p['embed_tokens.weight']).T  # or tied

  return apply


def _layer(p: Mapping[str, Any], at: str, x: Array, mask: Array, config: Mapping[str, Any],
           angles: Callable[[int, int], Array], epsilon: float) -> Array:
  dense = lambda name, x: x @ p[f'{at}{name}_proj.weight'].T
  heads, groups = config['num_attention_heads'], config.get('num_key_value_heads', config['num_attention_heads'])
  y = _norm(x, p[f'{at}input_layernorm.weight'], epsilon)
  split = lambda name, n: heads_of(dense(f'self_attn.{name}', y), n)
  k, v = (jnp.repeat(each, heads // groups, 2) for each in (_rotated(split('k', groups), angles), split('v', groups)))
  x = x + dense('self_attn.o', attended(_rotated(split('q', heads), angles), k, v, mask).reshape(*x.shape[:2], -1))
  y = _norm(x, p[f'{at}post_attention_layernorm.weight'], epsilon)
  return x + dense('mlp.down', jax.nn.silu(dense('mlp.gate', y)) * dense('mlp.up', y))


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
  wide = x.astype(jnp.float32)
  scaled = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
  return scaled.astype(x.dtype) * weight.reshape(1, 1, -1)


def angles_of(config: Mapping[str, Any]) -> Callable[[int, int], Array]:
  """Returns the function of T and of n that gives the angle of each position and feature, `float32[T, n]`.

  The angle of feature i is the position times `base^(-i/n)`. Configurations of `transformers` 5 hold the base, and how
  frequencies are scaled, in `rope_parameters`; those of older versions, in `rope_theta` and `rope_scaling`.
  """
  rope = {'rope_theta': config.get('rope_theta', 10_000.0), **(config.get('rope_scaling') or {}),
          **(config.get('rope_parameters') or {})}
  refuse_others('llama', rope, partial_rotary_factor=1.0)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in _SCALED:
    raise errors.unknown('hub.llama', '`rope_type`', kind, _SCALED)

  def angles(length: int, number: int) -> Array:
    frequencies = rope['rope_theta'] ** (-jnp.arange(number, dtype=jnp.float32) / number)
    return jnp.arange(length, dtype=jnp.float32)[:, None] * _SCALED[kind](frequencies, Required('the rope', rope))[None]

  return angles


def _by_wavelength(frequencies: Array, rope: Mapping[str, Any]) -> Array:
  """Returns low frequencies over `factor`, high frequencies as they are, and a mean of both between (Llama 3.1)."""
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  turns = rope['original_max_position_embeddings'] * frequencies / (2 * jnp.pi)
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return frequencies * (kept + (1 - kept) / rope['factor'])


_SCALED: dict[str, Callable[[Array, Mapping[str, Any]], Array]] = {
  'default': lambda frequencies, rope: frequencies,
  'linear': lambda frequencies, rope: frequencies / rope['factor'],
  'llama3': _by_wavelength,
}


def _rotated(x: Array, angles: Callable[[int, int], Array]) -> Array:
  """Returns `x` `[B, T, heads, D]` with features `i` and `i + D/2` rotated by the angles of their position."""
  own = angles(x.shape[1], x.shape[-1] // 2)
  cos, sin = jnp.cos(own)[None, :, None], jnp.sin(own)[None, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
