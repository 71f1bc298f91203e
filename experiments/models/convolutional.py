"""Defines small image models in Flax Linen: a perceptron and two convolutional networks.

    model = CNN(num_classes=10)
    params = model.init(jax.random.key(0), images)['params']  # images: float[B, H, W, C]
    model.apply({'params': params}, images)                   # float32[B, 10]

The path of every convolution kernel contains `conv`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsejax.types import Array


class Perceptron(nn.Module):
  """A `Perceptron` maps `float[B, ...]` to logits `float32[B, num_classes]` by dense layers with ReLU.

  The default is LeNet-300-100. Reference: LeCun et al. 1998, Gradient-based learning applied to document recognition.
  The activation is ReLU, unlike the paper's sigmoid. `gain` is the initial `E[fan_in w^2]` of the hidden layers. At 2,
  the edge of chaos, activations neither vanish nor explode.
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
  """A `CNN` maps images `float[B, H, W, C]` to logits `float32[B, num_classes]`.

  The network has 3 x 3 convolutions with ReLU and no normalization, then the mean over all positions. All convolutions
  but the first have stride 2.
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
  """A `SuperResolution` maps images `float[B, H, W, channels]` to twice their size, `float32[B, 2H, 2W, channels]`.

  The network is a small EDSR baseline. Each residual block has two 3 x 3 convolutions without normalization. A skip
  connection spans all blocks, and a pixel shuffle follows. Reference: Lim et al. 2017, arXiv:1707.02921. Unlike in the
  paper, the output is added to the bicubic image, so that training starts from interpolation and is measured against
  it.
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
  """Maps `[B, H, W, 4C]` to `[B, 2H, 2W, C]`: channel `(2i + j) C + c` becomes pixel `(i, j)` of a 2 x 2 square."""
  batch, height, width, features = x.shape
  squares = x.reshape(batch, height, width, 2, 2, features // 4)
  return squares.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, features // 4)
