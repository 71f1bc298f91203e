"""Holds the architectures of Torch-Pruning's benchmarks in Flax form, tiny, for `groups` to take apart."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def norm(x):
  return nn.BatchNorm(use_running_average=True)(x)


class Residual(nn.Module):
  """A block of a ResNet; with another width or stride, the shortcut is a 1x1 convolution."""

  width: int
  stride: int = 1

  @nn.compact
  def __call__(self, x):
    y = nn.relu(norm(nn.Conv(self.width, (3, 3), (self.stride,) * 2, use_bias=False)(x)))
    y = norm(nn.Conv(self.width, (3, 3), use_bias=False)(y))
    if x.shape != y.shape:
      x = norm(nn.Conv(self.width, (1, 1), (self.stride,) * 2, use_bias=False)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
    for width, stride in ((4, 1), (6, 2)):
      x = Residual(width, stride)(x)
    return nn.Dense(3)(x.mean((1, 2)))


class DenseNet(nn.Module):
  """Each layer reads the concatenation of all layers before; a transition halves channels and resolution."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    for _ in range(2):
      y = nn.Conv(6, (1, 1))(nn.relu(norm(x)))
      x = jnp.concatenate([x, nn.Conv(2, (3, 3))(nn.relu(norm(y)))], -1)
    x = nn.avg_pool(nn.Conv(4, (1, 1))(nn.relu(norm(x))), (2, 2), (2, 2))
    return nn.Dense(3)(nn.relu(norm(x)).reshape(x.shape[0], -1))


class Inception(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    branches = [nn.Conv(2, (1, 1))(x), nn.Conv(4, (3, 3))(nn.relu(nn.Conv(2, (1, 1))(x))),
                nn.Conv(2, (1, 1))(nn.max_pool(x, (3, 3), padding='SAME'))]
    x = nn.relu(norm(jnp.concatenate(branches, -1)))
    return nn.Dense(3)(x.mean((1, 2)))


class MobileNet(nn.Module):
  """Inverted residuals: expand, depthwise, squeeze and excite, project."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu6(norm(nn.Conv(4, (3, 3), (2, 2))(x)))
    for _ in range(2):
      y = nn.relu6(norm(nn.Conv(8, (1, 1))(x)))
      y = nn.relu6(norm(nn.Conv(8, (3, 3), feature_group_count=8)(y)))
      y = y * nn.hard_sigmoid(nn.Dense(8)(nn.relu(nn.Dense(2)(y.mean((1, 2), keepdims=True)))))
      x = x + norm(nn.Conv(4, (1, 1))(y))
    return nn.Dense(3)(x.mean((1, 2)))


class EncoderBlock(nn.Module):
  heads: int = 2

  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x)))), None


class ViT(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (4, 4), (4, 4))(x)
    x = x.reshape(x.shape[0], -1, 8)
    token = self.param('token', nn.initializers.normal(1.0), (1, 1, 8))
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
    x = x + self.param('positions', nn.initializers.normal(1.0), (1, 5, 8))
    for _ in range(2):
      x, _ = EncoderBlock()(x)
    return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class ScannedViT(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (4, 4), (4, 4))(x).reshape(x.shape[0], -1, 8)
    blocks = nn.scan(nn.remat(EncoderBlock), variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
    return nn.Dense(3)(nn.LayerNorm()(blocks()(x, None)[0].mean(1)))


def rotated(x, theta=100.0):
  """Returns queries or keys `[batch, tokens, heads, width]` with rotary positions."""
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Decoder(nn.Module):
  """A decoder of the Llama kind: grouped-query attention, rotary positions, gated MLP, RMSNorm, tied embedding."""

  layers: int = 2
  width: int = 16
  heads: int = 4
  kv_heads: int = 2
  hidden: int = 10
  vocabulary: int = 11

  @nn.compact
  def __call__(self, tokens):
    dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
    embed = nn.Embed(self.vocabulary, self.width)
    x, size = embed(tokens), self.width // self.heads
    batch, length = tokens.shape
    for i in range(self.layers):
      y = nn.RMSNorm()(x)
      q = rotated(dense(self.heads * size, f'q{i}')(y).reshape(batch, length, self.heads, size))
      k = rotated(dense(self.kv_heads * size, f'k{i}')(y).reshape(batch, length, self.kv_heads, size))
      v = dense(self.kv_heads * size, f'v{i}')(y).reshape(batch, length, self.kv_heads, size)
      k, v = (jnp.repeat(z, self.heads // self.kv_heads, 2) for z in (k, v))
      a = jnp.einsum('bqhd,bkhd->bhqk', q, k) / jnp.sqrt(size)
      a = jnp.where(jnp.tril(jnp.ones((length, length), bool)), a, -1e9)
      y = jnp.einsum('bhqk,bkhd->bqhd', nn.softmax(a), v).reshape(batch, length, -1)
      x = x + dense(self.width, f'o{i}')(y)
      y = nn.RMSNorm()(x)
      y = nn.silu(dense(self.hidden, f'gate{i}')(y)) * dense(self.hidden, f'up{i}')(y)
      x = x + dense(self.width, f'down{i}')(y)
    return embed.attend(nn.RMSNorm()(x))


class UNet(nn.Module):
  """An encoder and a decoder with a skip connection, GroupNorm, and a transposed convolution."""

  @nn.compact
  def __call__(self, x):
    skip = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)))
    x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(skip))
    x = nn.relu(nn.ConvTranspose(4, (2, 2), (2, 2))(x))
    return nn.Conv(1, (1, 1))(nn.relu(nn.Conv(4, (3, 3))(jnp.concatenate([x, skip], -1))))


IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
# Maps the name of an architecture to the module, and to the input.
TABLE = {
  'resnet': (ResNet(), IMAGE), 'densenet': (DenseNet(), IMAGE), 'inception': (Inception(), IMAGE),
  'mobilenet': (MobileNet(), IMAGE), 'vit': (ViT(), IMAGE), 'scanned vit': (ScannedViT(), IMAGE),
  'decoder': (Decoder(), TOKENS), 'unet': (UNet(), IMAGE)}


def filled(struct, key, most=11):
  """Returns random values: integers below `most`, or floats of which none is zero."""
  if jnp.issubdtype(struct.dtype, jnp.integer):
    return jax.random.randint(key, struct.shape, 0, most)
  return jax.random.normal(key, struct.shape, struct.dtype)


def variables_of(module, x):
  """Returns random variables, norm statistics and biases too, so that nothing is zero by accident."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  leaves, treedef = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return treedef.unflatten([abs(filled(leaf, key)) * 0.4 + 0.1 if leaf.ndim == 1 else filled(leaf, key) * 0.4
                            for leaf, key in zip(leaves, keys)])
