"""Mixes tokens in other ways than softmax attention: Kronecker attention, a softmax of two passes, shifted channels.

    y = kronecker(q, (k1, k2), (v1, v2))             # each query attends to all pairs of keys
    y = shift(images, parts=12)                      # channels move by one pixel, for nothing
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import POSITIVE, SERIES, TIMES, shaped
from sparsejax.arguments import checked
from sparsejax.types import Array

arguments.declare('two_pass_softmax', x=shaped('[..., n]'))
arguments.declare('shift', x=shaped('[..., height, width, channels]'))
arguments.declare('kronecker kronecker_by_powers', q=shaped('[n, d]'), keys=SERIES, pairs=SERIES,
                  degree=TIMES, scale=POSITIVE)


@checked
def kronecker(q: Array, keys: tuple[Array, Array], pairs: tuple[Array, Array], scale: float | None = None) -> Array:
  """Returns attention of `q [n, d]` to all pairs of keys, `[n, dv]`: the reference, with n^3 scores.

  The score of the pair (i, j) is the sum over channels of `q k1[i] k2[j]`, times `scale`, by default 1 / d. Its value
  is `v1[i] v2[j]`. Tensor attention (Alman and Song 2024, 2310.04064, definition 1.1).
  """
  (k1, k2), (v1, v2) = _two(q, keys, pairs)
  scale = 1 / q.shape[-1] if scale is None else scale
  scores = jnp.einsum('qd,id,jd->qij', q, k1, k2, precision='highest') * scale
  weights = jax.nn.softmax(scores.reshape(len(q), -1)).reshape(scores.shape)
  return jnp.einsum('qij,ie,je->qe', weights, v1, v2, precision='highest')


@checked
def kronecker_by_powers(q: Array, keys: tuple[Array, Array], pairs: tuple[Array, Array], degree: int,
                        scale: float | None = None) -> Array:
  """Returns `kronecker` with the exponential as its power series up to `degree`: linear in n, for small scores.

  Features are the monomials of the channels, `C(d + degree, degree)` of them. The sum over pairs is a product of two
  sums. The error is that of the power series (the same paper, theorem 1.3, builds on this).
  """
  (k1, k2), (v1, v2) = _two(q, keys, pairs)
  scale = 1 / q.shape[-1] if scale is None else scale
  of_q, of_1, of_2 = (_monomials(x, degree) for x in (q * scale, k1, k2))
  shares = jnp.asarray([_shares(q.shape[-1], degree)], jnp.float32)
  sums = (of_1.T @ v1) * (of_2.T @ v2)
  return ((of_q * shares) @ sums) / ((of_q * shares) @ (of_1.sum(0) * of_2.sum(0)))[:, None]


def _two(q: Array, keys: tuple[Array, Array], pairs: tuple[Array, Array]) -> tuple[Any, Any]:
  """Returns both pairs; raises `ValueError` unless they are two arrays of keys and two of values that fit."""
  shapes = [[jnp.shape(a) for a in each] for each in (keys, pairs)]
  if any(len(each) != 2 or any(len(shape) != 2 for shape in each) for each in shapes) or any(
      k[1] != q.shape[1] or k[0] != v[0] or v[1] != shapes[1][0][1] for k, v in zip(*shapes)):
    raise ValueError(f'attention.kronecker: q {q.shape}, keys {shapes[0]} and values {shapes[1]} must be [n, d], two '
                     'of [n, d] and two of [n, dv].')
  return tuple(keys), tuple(pairs)


def _powers(d: int, degree: int) -> list[tuple[int, ...]]:
  """Returns the channels of each monomial, with repeats."""
  return [c for g in range(degree + 1) for c in itertools.combinations_with_replacement(range(d), g)]


def _monomials(x: Array, degree: int) -> Array:
  return jnp.stack([jnp.prod(x[:, list(c)], 1) for c in _powers(x.shape[1], degree)], 1)


def _shares(d: int, degree: int) -> list[float]:
  """Returns 1 over the product of the factorials of the powers of each monomial, as in the multinomial series."""
  return [1 / math.prod(math.factorial(c.count(i)) for i in set(c)) for c in _powers(d, degree)]


@checked
def two_pass_softmax(x: Array) -> Array:
  """Returns the softmax over the last axis, without a pass for the maximum: `float32`, the shape of `x`.

  `e^x` is `p 2^n` with `n` the rounded `x log2(e)`. The sum is kept as such a pair too, so that nothing overflows
  (Dukhan and Ablavatski 2020, 2001.04438, algorithm 3). Powers below 2^-127 are zero. On CPUs XLA fuses the maximum
  into the first pass, so that no speed is to be expected.
  """
  p, n = _split(x.astype(jnp.float32))
  value, power = jax.lax.reduce((p, n), (jnp.float32(0), jnp.float32(-jnp.inf)), _sum, (x.ndim - 1,))
  return _times(p, n - power[..., None]) / value[..., None]


def _split(x: Array) -> tuple[Array, Array]:
  """Returns the arrays `p` and `n` of which `e^x` is `p 2^n`, where `n` is whole and `p` is near 1."""
  n = jnp.round(x * math.log2(math.e))
  return jnp.exp(jnp.where(jnp.isfinite(x), x - n * math.log(2), x)), n


def _times(p: Array, n: Array) -> Array:
  return jnp.where(n < -127, 0, p * jnp.exp2(jnp.maximum(n, -127)))


def _sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
  """Returns the sum of two numbers `p 2^n` as such a pair."""
  power = jnp.maximum(a[1], b[1])
  less = lambda n: jnp.where(n == power, 0, n - power)  # of two -inf too
  return _times(a[0], less(a[1])) + _times(b[0], less(b[1])), power


@checked
def shift(x: Array, parts: int = 12) -> Array:
  """Returns images `[..., height, width, channels]` with four groups of channels moved by one pixel.

  A group has `channels // parts` channels. The first moves left, the second right, the third up, the fourth down; zeros
  enter, and all other channels stay. ShiftViT (Wang et al. 2022, 2201.10801). The authors' code moves nothing if there
  are fewer channels than parts; here this is refused with `ValueError`.
  """
  size = x.shape[-1] // parts
  if size < 1 or parts < 4:
    raise ValueError(f'attention.shift: {x.shape[-1]} channels in {parts} parts leave no channel to move; give at '
                     'least 4 parts, and at most as many as channels.')
  moves = ((-2, -1), (-2, 1), (-3, -1), (-3, 1))
  moved = [_moved(x[..., i * size:(i + 1) * size], axis, step) for i, (axis, step) in enumerate(moves)]
  return jnp.concatenate([*moved, x[..., 4 * size:]], -1)


def _moved(x: Array, axis: int, step: int) -> Array:
  """Returns `x` moved by one place along an axis, backwards for -1, with zeros entering."""
  axis = axis % x.ndim
  n = x.shape[axis]
  kept = jax.lax.slice_in_dim(x, max(0, -step), n - max(0, step), axis=axis)
  return jnp.pad(kept, [(max(0, step), max(0, -step)) if i == axis else (0, 0) for i in range(x.ndim)])
