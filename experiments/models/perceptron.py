"""Defines a perceptron of two hidden layers as two functions, for engines whose loops are not those of a config.

    params = start(seed, width=100)
    forward(params, x)    # logits [N, 10] of images [N, 64]
"""

import jax
import jax.numpy as jnp

from sparsejax.types import Array, PyTree


def start(seed: int, width: int, inputs: int = 64, outputs: int = 10) -> PyTree:
  """Returns the initial parameters of a perceptron of two hidden layers."""
  init, sizes = jax.nn.initializers.he_normal(), (inputs, width, width, outputs)
  keys = jax.random.split(jax.random.key(seed), 3)
  return {f'layer_{i}': {'kernel': init(keys[i], sizes[i:i + 2]), 'bias': jnp.zeros(sizes[i + 1])} for i in range(3)}


def forward(params: PyTree, x: Array) -> Array:
  """Returns the logits of images `[N, inputs]`."""
  for name in sorted(params):
    x = (x if name == 'layer_0' else jax.nn.relu(x)) @ params[name]['kernel'] + params[name]['bias']
  return x
