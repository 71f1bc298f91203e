"""Runs models of BERT type (Devlin et al. 2019, 1810.04805): post-norm layers, learned positions, exact GELU.

    apply = forward(config)
    hidden = apply(params, tokens, valid)     # float[B, T, hidden_size], without pooler and head
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from sparsejax.hub.layers import attended, layer_norm, plus, refuse_others, rooted
from sparsejax.types import Array

MATRICES = ('*encoder.layer.*.attention.self.*.weight', '*encoder.layer.*.dense.weight')


def forward(config: Mapping[str, Any]) -> Callable[..., Array]:
  """Returns the encoder of a configuration. Dropout is off, and all tokens have type 0."""
  refuse_others('bert', config, hidden_act='gelu', position_embedding_type='absolute')
  epsilon, heads = config.get('layer_norm_eps', 1e-12), config['num_attention_heads']

  def apply(params: Mapping[str, Any], tokens: Array, valid: Array) -> Array:
    p = rooted(params, 'bert.')
    norm = lambda name, x: layer_norm(x, p[f'{name}.weight'], p[f'{name}.bias'], epsilon)
    table = lambda name: p[f'embeddings.{name}_embeddings.weight']
    x = table('word')[tokens] + table('position')[:tokens.shape[1]][None] + table('token_type')[0][None, None]
    x = norm('embeddings.LayerNorm', x)
    for i in range(config['num_hidden_layers']):
      x = _layer(p, f'encoder.layer.{i}.', x, valid[:, None, None], heads, norm)
    return x

  return apply


def _layer(p: Mapping[str, Any], at: str, x: Array, mask: Array, heads: int, norm: Callable[..., Array]) -> Array:
  dense = lambda name, x: plus(x @ p[f'{at}{name}.weight'].T, p[f'{at}{name}.bias'])
  split = lambda name: dense(f'attention.self.{name}', x).reshape(*x.shape[:2], heads, -1)
  y = attended(split('query'), split('key'), split('value'), mask).reshape(x.shape)
  x = norm(f'{at}attention.output.LayerNorm', x + dense('attention.output.dense', y))
  y = dense('output.dense', jax.nn.gelu(dense('intermediate.dense', x), approximate=False))
  return norm(f'{at}output.LayerNorm', x + y)
