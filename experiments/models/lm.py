"""Defines the decoder-only language model.

    model = LM(vocabulary=256)
    params = model.init(jax.random.key(0), tokens)['params']  # tokens: int[B, T]
    model.apply({'params': params}, tokens)                   # float32[B, T, 256]
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments.models import transformer
from sparsejax.types import Array


class LM(nn.Module):
  """An `LM` maps tokens `int[B, T]` to logits of each next token, `float32[B, T, vocabulary]`.

  The decoder has causal pre-norm blocks, rotary positions and an untied head, and accepts any length. The positions are
  0 to T - 1, unless tokens are `int[B, T, 2]`, each with its position; positions increase. `scan` stacks the blocks and
  recomputes each in the backward pass. With `recall`, the attention is `transformer.RecallAttention`. Raises
  `ValueError` if the width is no multiple of twice `heads`, or of eight times `heads` with `recall`.
  """

  vocabulary: int
  width: int = 128
  depth: int = 4
  heads: int = 4
  mlp_ratio: int = 4
  dtype: Any = jnp.float32
  scan: bool = False
  recall: bool = False

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    tokens, positions = (tokens, None) if tokens.ndim == 2 else (tokens[..., 0], tokens[..., 1])
    x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name='embed')(tokens)
    x = transformer.stack(x, self, causal=True, positions=positions, recall=self.recall)
    return nn.Dense(self.vocabulary, dtype=self.dtype, name='head')(x).astype(jnp.float32)
