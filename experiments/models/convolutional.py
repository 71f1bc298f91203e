"""Small image models in Flax Linen besides the Vision Transformer: a perceptron and two convolutional networks.

All compute in `dtype` and keep their parameters in float32. Every kernel of a convolution has `conv` in its path.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Perceptron(nn.Module):
  """Fully connected with ReLU: `float[B, ...]` to `float32[B, num_classes]` logits; as it is, LeNet-300-100.

  Reference: LeCun et al. 1998, Gradient-based learning applied to document recognition, with ReLU for the sigmoid.
  `gain`: the initial E[fan_in w^2] of the hidden layers; at 2, the edge of chaos, signals neither fade nor explode.
  """

  num_classes: int
  widths: tuple[int, ...] = (300, 100)
  gain: float = 2.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array) -> Array:
    x = images.astype(self.dtype).reshape(len(images), -1)
    init = nn.initializers.variance_scaling(self.gain, 'fan_in', 'truncated_normal')
    for layer, width in enumerate(self.widths):
      x = nn.relu(nn.Dense(width, dtype=self.dtype, kernel_init=init, name=f'fc{layer}')(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)


class CNN(nn.Module):
  """3 x 3 convolutions with ReLU, all but the first with stride 2, then the mean over all places.

  `float[B, H, W, C]` images to `float32[B, num_classes]` logits, without normalization.
  """

  num_classes: int
  widths: tuple[int, ...] = (16, 32, 64)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array) -> Array:
    x = images.astype(self.dtype)
    for layer, width in enumerate(self.widths):
      x = nn.relu(nn.Conv(width, (3, 3), strides=2 if layer else 1, dtype=self.dtype,
                          kernel_init=nn.initializers.he_normal(), name=f'conv{layer}')(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x.mean((1, 2))).astype(jnp.float32)


class SuperResolution(nn.Module):
  """Images twice as large: `float[B, H, W, channels]` to `float32[B, 2H, 2W, channels]`.

  The baseline of EDSR, made small: residual blocks of two 3 x 3 convolutions without normalization, a skip around all
  of them, then a pixel shuffle. Reference: Lim et al. 2017, arXiv:1707.02921; unlike it, the network is added to the
  bicubic image, so that it starts at, and is measured from, what interpolation gives.
  """

  channels: int
  width: int = 32
  depth: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array) -> Array:
    conv = lambda features, name: nn.Conv(features, (3, 3), dtype=self.dtype, name=name)
    first = x = conv(self.width, 'conv_in')(images.astype(self.dtype))
    for block in range(self.depth):
      hidden = nn.relu(conv(self.width, f'block_{block}_conv1')(x))
      x = x + conv(self.width, f'block_{block}_conv2')(hidden)
    x = pixel_shuffle(conv(4 * self.channels, 'conv_up')(x + first))
    return jax.image.resize(images, x.shape, 'bicubic').astype(jnp.float32) + x.astype(jnp.float32)


def pixel_shuffle(x: Array) -> Array:
  """`[B, H, W, 4C] -> [B, 2H, 2W, C]`: channel `(2i + j) C + c` is pixel `(i, j)` of each square of four."""
  batch, height, width, features = x.shape
  squares = x.reshape(batch, height, width, 2, 2, features // 4)
  return squares.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, features // 4)
