"""Defines a small detector without anchors, of the kind of YOLOv8: convolutions with batch norms, and split blocks.

    model = Detector()
    variables = model.init(jax.random.key(0), images)         # images: float[B, H, W, 1]
    model.apply(variables, images)                            # float32[B, H / 4, W / 4, 15]
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sparsejax.types import Array

CLASSES, BOX = 10, 4  # a cell of the grid predicts whether it holds a centre, a box and a class


class Detector(nn.Module):
  """A `Detector` maps images `float[B, H, W, C]` to a grid of predictions, one cell for 4 x 4 pixels.

  A block splits its channels in two halves, convolves one of them, and joins all (C2f). `train` takes the statistics of
  the batch. Reference: the architecture of YOLOv8, much smaller, with one scale and without distribution focal loss.
  """

  width: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array, train: bool = False) -> Array:
    def conv(x: Array, features: int, size: int, stride: int, name: str) -> Array:
      x = nn.Conv(features, (size, size), strides=stride, use_bias=False, dtype=self.dtype, name=f'{name}_conv')(x)
      norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f'{name}_norm')
      return nn.silu(norm(x))

    x = conv(images.astype(self.dtype), self.width, 3, 2, 'stem')
    for block in range(2):
      x = conv(x, self.width * 2, 3, 2 - block, f'block_{block}_in')
      first, second = jnp.split(x, 2, -1)
      third = conv(second, self.width, 3, 1, f'block_{block}_inside')
      x = conv(jnp.concatenate([first, second, third], -1), self.width * 2, 1, 1, f'block_{block}_out')
    return nn.Conv(1 + BOX + CLASSES, (1, 1), dtype=self.dtype, name='head')(x).astype(jnp.float32)
