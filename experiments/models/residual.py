"""Defines a small residual network for images, with batch norms.

    model = ResNet(num_classes=10)
    variables = model.init(jax.random.key(0), images)         # images: float[B, H, W, C]
    model.apply(variables, images)                            # float32[B, 10], with the recorded statistics
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sparsejax.types import Array


class ResNet(nn.Module):
  """A `ResNet` maps images `float[B, H, W, C]` to logits `float32[B, num_classes]`.

  Each stage is a residual block of two 3 x 3 convolutions. All stages but the first halve the resolution and
  double the width; a 1 x 1 convolution is the shortcut there. Reference: He et al. 2016, arXiv:1512.03385. `train`
  takes the statistics of the batch.
  """

  num_classes: int
  width: int = 16
  stages: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array, train: bool = False) -> Array:
    norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name=name)

    def conv(n: int, size: int, stride: int, name: str) -> nn.Module:
      return nn.Conv(n, (size, size), strides=stride, use_bias=False, dtype=self.dtype, name=name)

    x = nn.relu(norm('norm_in')(conv(self.width, 3, 1, 'conv_in')(images.astype(self.dtype))))
    for stage in range(self.stages):
      width, stride, place = self.width * 2**stage, 1 + (stage > 0), f'block_{stage}'
      h = nn.relu(norm(f'{place}_norm1')(conv(width, 3, stride, f'{place}_conv1')(x)))
      h = norm(f'{place}_norm2')(conv(width, 3, 1, f'{place}_conv2')(h))
      skip = x if stride == 1 else norm(f'{place}_norm3')(conv(width, 1, stride, f'{place}_conv3')(x))
      x = nn.relu(skip + h)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x.mean((1, 2))).astype(jnp.float32)
