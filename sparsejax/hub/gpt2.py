"""Runs models of GPT-2 type (Radford et al. 2019): pre-norm layers, learned positions, fused projections `[in, out]`.

    logits = forward(config)(params, tokens, valid)     # float[B, T, vocab_size]
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.hub.layers import attended, causal, first_positions, heads_of, layer_norm, plus, refuse_others, rooted
from sparsejax.types import Array

MATRICES = ('*h.*.attn.c_*.weight', '*h.*.mlp.c_*.weight')
WORDS = 'wte.weight'


def forward(config: Mapping[str, Any]) -> Callable[..., Array]:
  """Returns the decoder of a configuration. Dropout is off. Positions count from the first token, valid or not."""
  refuse_others('gpt2', config, activation_function='gelu_new', scale_attn_weights=True,
          scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
  epsilon, heads = config.get('layer_norm_epsilon', 1e-5), config['n_head']

  def apply(params: Mapping[str, Any], tokens: Array, valid: Array) -> Array:
    p = rooted(params, 'transformer.')
    norm = lambda name, x: layer_norm(x, p[f'{name}.weight'], p[f'{name}.bias'], epsilon)
    x, mask = p['wte.weight'][tokens] + first_positions(p['wpe.weight'], tokens.shape[1]), causal(valid)
    for i in range(config['n_layer']):
      x = _layer(p, f'h.{i}.', x, mask, heads, norm)
    return norm('ln_f', x) @ p.get('lm_head.weight', p['wte.weight']).T  # tied heads are left out of files

  return apply


def _layer(p: Mapping[str, Any], at: str, x: Array, mask: Array, heads: int, norm: Callable[..., Array]) -> Array:
  dense = lambda name, x: plus(x @ p[f'{at}{name}.weight'], p[f'{at}{name}.bias'])
  q, k, v = (heads_of(part, heads) for part in jnp.split(dense('attn.c_attn', norm(f'{at}ln_1', x)), 3, -1))
  x = x + dense('attn.c_proj', attended(q, k, v, mask).reshape(x.shape))
  return x + dense('mlp.c_proj', jax.nn.gelu(dense('mlp.c_fc', norm(f'{at}ln_2', x)), approximate=True))
