"""Defines a graph convolutional network over `sparsejax.graphs`.

    weights = graphs.normalised(senders, receivers, nodes, mask)
    model = GraphConvolutions(num_classes=10)
    logits = model.apply(variables, x, senders, receivers, weights)           # float32[nodes, 10]
"""

import flax.linen as nn
import jax.numpy as jnp

from sparsejax import graphs
from sparsejax.types import Array


class GraphConvolutions(nn.Module):
  """A `GraphConvolutions` maps the features of nodes `[nodes, features]` to logits `float32[nodes, num_classes]`.

  Each layer is a matrix and one step of messages, with ReLU between layers (Kipf and Welling 2017, 1609.02907).
  `weights`: the result of `graphs.normalised`.
  """

  num_classes: int
  width: int = 64
  depth: int = 2

  @nn.compact
  def __call__(self, x: Array, senders: Array, receivers: Array, weights: graphs.Convolved) -> Array:
    for layer in range(self.depth):
      last = layer == self.depth - 1
      x = nn.Dense(self.num_classes if last else self.width, use_bias=False, name=f'layer_{layer}')(x)
      x = graphs.propagate(x, senders, receivers, weights)
      x = x + self.param(f'bias_{layer}', nn.initializers.zeros, x.shape[-1:])[None]
      x = x if last else nn.relu(x)
    return x.astype(jnp.float32)
