"""Runs models of BERT type (Devlin et al. 2019, 1810.04805): post-norm layers, learned positions, exact GELU.

    apply = forward(config)
    hidden = apply(params, tokens, valid)     # float[B, T, hidden_size], without pooler and head
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from sparsejax.hub.layers import attended, first_positions, heads_of, layer_norm, plus, refuse_others, rooted
from sparsejax.types import Array

MATRICES = ('*encoder.layer.*.attention.self.*.weight', '*encoder.layer.*.dense.weight')
WORDS = 'embeddings.word_embeddings.weight'


def forward(config: Mapping[str, Any]) -> Callable[..., Array]:
  """Returns the encoder of a configuration. Dropout is off, and all tokens have type 0."""
  refuse_others('bert', config, hidden_act='gelu', position_embedding_type='absolute')
  epsilon, heads = config.get('layer_norm_eps', 1e-12), config['num_attention_heads']

  def apply(params: Mapping[str, Any], tokens: Array, valid: Array) -> Array:
    p = rooted({_present(name): value for name, value in params.items()}, 'bert.')
    norm = lambda name, x: layer_norm(x, p[f'{name}.weight'], p[f'{name}.bias'], epsilon)
    table = lambda name: p[f'embeddings.{name}_embeddings.weight']
    x = table('word')[tokens] + first_positions(table('position'), tokens.shape[1]) + table('token_type')[0][None, None]
    x = norm('embeddings.LayerNorm', x)
    for i in range(config['num_hidden_layers']):
      x = _layer(p, f'encoder.layer.{i}.', x, valid[:, None, None], heads, norm)
    return x

  return apply


def _present(name: str) -> str:
  """Returns the name that a tensor has today: files that were converted from TensorFlow have names of their own."""
  return name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')


def _layer(p: Mapping[str, Any], at: str, x: Array, mask: Array, heads: int, norm: Callable[..., Array]) -> Array:
  dense = lambda name, x: plus(x @ p[f'{at}{name}.weight'].T, p[f'{at}{name}.bias'])
  split = lambda name: heads_of(dense(f'attention.self.{name}', x), heads)
  y = attended(split('query'), split('key'), split('value'), mask).reshape(x.shape)
  x = norm(f'{at}attention.output.LayerNorm', x + dense('attention.output.dense', y))
  y = dense('output.dense', jax.nn.gelu(dense('intermediate.dense', x), approximate=False))
  return norm(f'{at}output.LayerNorm', x + y)
