"""Finds which weights of each group of M neighbours are not zero, and how many the fullest group has.

    groups = Grouping(2, 4, axes=(0,), width=1, outputs=())     # `w` is `[K, N]`, contracted along K
    occupied = grouping.occupied(w, groups, signed_zeros=False) # `uint8[K / 4, 1, N]`, a bit for each weight of a group
    grouping.fullest(occupied, groups) <= 2
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import neighbours
from sparsejax.formats import zeros
from sparsejax.types import Array


class Grouping(NamedTuple):
  """A `Grouping` says which groups of an array have `n` of `m`: along `axes`, in vectors of `width` along `outputs`."""

  n: int
  m: int
  axes: tuple[int, ...]
  width: int
  outputs: tuple[int, ...]

  def of(self, w: Array) -> tuple[Array, int]:
    """Returns `w` in groups of `m`, and the axis along which each group lies.

    Groups are `[..., K / m, m, ...]`, or with a `width` groups of vectors, `[..., K / m, m, N / width, width]`.
    """
    octets = self.m * (8 // math.gcd(self.n, 8))  # The indices of eight neighbours share bytes, across groups.
    if self.width == 1:
      return neighbours.split(neighbours.merged(w, self.axes, octets), self.m, min(self.axes)), min(self.axes) + 1
    whole = neighbours.undivided(w, self.axes, octets)
    vectors = neighbours.tiled(whole, self.axes, self.outputs, (self.m, self.width))[0]
    return vectors, vectors.ndim - 3

  def along(self, rank: int) -> int:
    """Returns the axis along which each group lies in arrays of `rank` axes that hold no vectors."""
    return min(self.axes) + 1 if self.width == 1 else rank - 2


@functools.partial(jax.jit, static_argnums=(1, 2))
def occupied(w: Array, groups: Grouping, signed_zeros: bool) -> Array:
  """Returns which weights, or vectors, of each group are not zero, as `neighbours.occupied` does."""
  grouped, axis = groups.of(w)
  bits = neighbours.bits(grouped)
  sign = bits.dtype.type(0 if signed_zeros else zeros.minus_zero(w.dtype))
  nonzero = bits & ~sign != 0
  return neighbours.occupied(nonzero if groups.width == 1 else jnp.any(nonzero, -1), axis)


@functools.partial(jax.jit, static_argnums=1)
def fullest(occupied: Array, groups: Grouping) -> Array:
  """Returns the largest number of nonzeros in a group."""
  return jnp.max(neighbours.numbers(occupied, groups.along(occupied.ndim)), initial=0)
