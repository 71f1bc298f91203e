"""Stores experts in planes of bits, of which the first planes are the same weights with fewer bits (D2MoE).

    store = nested(w)                       # w: [E, ...]; 8 planes of one bit a weight
    store.at(4)                             # float32[E, ...] from the first four planes
    store.nbytes(4)                         # what has to be read for them
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import ARRAY
from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['Nested', 'nested']

BITS = 8
arguments.declare('nested', w=ARRAY)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nested:
  """A `Nested` holds arrays `[E, ...]` as 8 planes of bits, the highest first, `uint8[8, E, ceil(size / 8)]`.

  `scale` and `low`, `float32[E]`, map codes to values. `kept`, `uint8[E, ceil(size / 8)]`, has a bit for each weight
  that is not zero. To raise the bits of an expert, read only the planes that are missing.
  """

  planes: Array
  scale: Array
  low: Array
  kept: Array
  shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  def at(self, bits: int) -> Array:
    """Returns the weights, `float32`, from the first `bits` planes, each at the middle of the codes that share them.

    Without the middle the values would be too low on average. Zeros are exact. Raises `ValueError` unless `bits` is
    from 1 to 8.
    """
    _refuse(bits)
    size = math.prod(self.shape[1:])
    planes = jnp.unpackbits(self.planes[:bits], axis=-1, count=size).astype(jnp.float32)
    steps = 2.0 ** jnp.arange(BITS - 1, BITS - 1 - bits, -1, dtype=jnp.float32)
    codes = jnp.tensordot(steps, planes, 1) + (2 ** (BITS - bits) - 1) / 2
    kept = jnp.unpackbits(self.kept, axis=-1, count=size)
    return jnp.where(kept > 0, codes * self.scale[:, None] + self.low[:, None], 0).reshape(self.shape)

  def nbytes(self, bits: int) -> int:
    """Returns the bytes of one expert at `bits` bits: its planes, its zeros, and two numbers."""
    _refuse(bits)
    return (bits + 1) * self.kept.shape[-1] + 8


@checked
def nested(w: Array) -> Nested:
  """Returns the arrays of experts `[E, ...]` in codes of 8 bits, evenly spaced from the least to the largest weight.

  Each expert has its own scale. `b` bits of a code q are `q >> (8 - b)`, so that all widths share one store. Weights
  that are zero stay exactly zero, which an affine code alone cannot hold; the bit for each costs an eighth of a byte.
  Raises `ValueError` for arrays without an axis of experts or without weights, and for known weights that are not
  finite.
  """
  if w.ndim < 2 or not w.size:
    raise ValueError(f'moe.nested: an array of shape {w.shape}; give [E, ...], with the experts along axis 0.')
  if arguments.is_known(w) and not bool(jnp.all(jnp.isfinite(w))):
    raise ValueError('moe.nested: a weight is NaN or infinite, so that its expert would have no scale; give finite '
                     'weights.')
  flat = w.reshape(len(w), -1).astype(jnp.float32)
  low, high = jnp.min(flat, 1), jnp.max(flat, 1)
  scale = jnp.where(high > low, (high - low) / (2**BITS - 1), 1)
  codes = jnp.round((flat - low[:, None]) / scale[:, None]).astype(jnp.uint8)
  planes = [(codes >> bit) & 1 for bit in range(BITS - 1, -1, -1)]
  packed = jnp.packbits(jnp.stack([*planes, (flat != 0).astype(jnp.uint8)]), axis=-1)
  return Nested(packed[:BITS], scale, low, packed[BITS], w.shape)


def _refuse(bits: int) -> None:
  if bits not in range(1, BITS + 1):
    raise ValueError(f'moe.Nested: {bits} bits; the store has 1 to {BITS}.')
