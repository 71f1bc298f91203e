"""Defines models whose activations are sparse by construction: CRATE, experts chosen before attention, and SparseJEPA.

    model = Crate(num_classes=10)
    params = model.init(jax.random.key(0), images)['params']   # images: float[B, H, W, C]
    ista(x, dictionary)                                         # one step of sparse coding, `[..., n]`
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsejax.activation import relu_router
from sparsejax.types import Array


def ista(x: Array, dictionary: Array, step: float = 0.1, penalty: float = 0.1) -> Array:
  """Returns one step of iterative soft thresholding towards a nonnegative sparse code, `[..., n]`.

  `x`: `[..., n]`, `dictionary`: `[n, n]`. The step is `relu(x + step (D^T x - D^T D x) - step penalty)`, with x as a
  column (CRATE, Yu et al. 2023, 2306.01129, and the authors' code). x is part of it: no residual is added.
  """
  change = x @ dictionary - (x @ dictionary.T) @ dictionary
  return jax.nn.relu(x + step * change - step * penalty)


def mssa(z: Array, u: Array, out: Array) -> Array:
  """Returns multi-head subspace self-attention, `[..., T, n]`, whose queries, keys and values are one projection.

  `z`: `[..., T, n]`, `u`: `[n, heads, d]`, `out`: `[heads, d, n]`. As in the authors' code `out` is learned; the paper
  (2306.01129) ties it to the transpose of `u`.
  """
  w = jnp.einsum('...tn,nhd->...htd', z, u)
  attention = jax.nn.softmax(jnp.einsum('...htd,...hsd->...hts', w, w) / jnp.sqrt(jnp.float32(u.shape[2])), -1)
  return jnp.einsum('...hts,...hsd,hdn->...tn', attention, w, out)


def coding_rate(z: Array, u: Array, eps: float = 0.5) -> Array:
  """Returns the coding rate of tokens in subspaces, `float32[heads]` (2306.01129).

  `z`: `[T, n]`, `u`: `[n, heads, d]`. The rate is half the log determinant of `I + d / (T eps^2) w^T w` for `w = z u`.
  """
  w = jnp.einsum('tn,nhd->htd', z, u)
  gram = jnp.einsum('hti,htj->hij', w, w) * (u.shape[2] / (len(z) * eps**2))
  return 0.5 * jnp.linalg.slogdet(jnp.eye(u.shape[2])[None] + gram)[1]


def latent_groups(z: Array, size: int) -> Array:
  """Returns the group lasso of latents `[..., n]`, `[]`: the mean of the sum of `sqrt(size)` times each group's norm.

  Groups are `size` neighbours. SparseJEPA (2504.16140) adds such a penalty to the loss of a joint-embedding predictor.
  No code is published, so that the form of the penalty is ours, and learned groups are left out.
  """
  if z.shape[-1] % size:
    raise ValueError(f'models.latent_groups: groups of {size} do not divide {z.shape[-1]} latents; take one that does.')
  norms = jnp.sqrt(jnp.sum(jnp.square(z.reshape(*z.shape[:-1], -1, size)), -1) + 1e-12)
  return jnp.sqrt(jnp.float32(size)) * jnp.mean(jnp.sum(norms, -1))


class CrateBlock(nn.Module):
  """A `CrateBlock` compresses tokens `[..., T, n]` towards subspaces, and then takes a step of sparse coding."""

  heads: int = 4
  step: float = 0.1
  penalty: float = 0.1

  @nn.compact
  def __call__(self, z: Array) -> Array:
    n = z.shape[-1]
    u = self.param('u', nn.initializers.lecun_normal(), (n, self.heads, n // self.heads))
    out = self.param('out', nn.initializers.lecun_normal(in_axis=(0, 1)), (self.heads, n // self.heads, n))
    dictionary = self.param('dictionary', nn.initializers.he_uniform(), (n, n))
    z = z + mssa(nn.LayerNorm(name='attention_norm')(z), u, out)
    return ista(nn.LayerNorm(name='coding_norm')(z), dictionary, self.step, self.penalty)


class Crate(nn.Module):
  """A `Crate` maps images `float[B, H, W, C]` to logits `float32[B, num_classes]` (2306.01129), with mean pooling."""

  num_classes: int
  patch: int = 2
  width: int = 32
  depth: int = 3
  heads: int = 4

  @nn.compact
  def __call__(self, images: Array) -> Array:
    x = nn.Conv(self.width, (self.patch, self.patch), (self.patch, self.patch), padding='VALID', name='embed')(images)
    x = x.reshape(len(x), -1, self.width)
    x = x + self.param('positions', nn.initializers.normal(0.5), (1, *x.shape[1:]))
    for i in range(self.depth):
      x = CrateBlock(self.heads, name=f'block_{i}')(x)
      self.sow('intermediates', 'code', x)
    return nn.Dense(self.num_classes, name='head')(x.mean(1)).astype(jnp.float32)


class EarlyRoutedBlock(nn.Module):
  """An `EarlyRoutedBlock` chooses the experts of its tokens before it attends, as SmallThinker does (2507.20984).

  The router reads the block's normed input, so that experts can be fetched while attention runs. Experts are ReGLU: a
  token skips experts, and neurons of the experts that it uses. With `early=False` the router reads what the experts
  read, as usual.
  """

  heads: int = 2
  experts: int = 4
  hidden: int = 16
  early: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    normed, n = nn.LayerNorm(name='attention_norm')(x), x.shape[-1]
    attended = x + nn.MultiHeadDotProductAttention(self.heads, name='attention')(normed)
    read = nn.LayerNorm(name='expert_norm')(attended)
    make: Any = nn.initializers.lecun_normal(batch_axis=0)
    gate, up, down = (self.param(name, make, (self.experts, *shape)) for name, shape in (
        ('gate', (n, self.hidden)), ('up', (n, self.hidden)), ('down', (self.hidden, n))))
    scores = relu_router(normed if self.early else read,
                         self.param('router', nn.initializers.lecun_normal(), (n, self.experts)),
                         self.param('scale', nn.initializers.ones, (self.experts,)))
    self.sow('intermediates', 'raw', scores.raw)
    hidden = jax.nn.relu(jnp.einsum('...tn,enf->...tef', read, gate)) * jnp.einsum('...tn,enf->...tef', read, up)
    return attended + jnp.einsum('...tef,efn,...te->...tn', hidden, down, scores.gates)
