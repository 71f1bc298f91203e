"""Products with N:M weights on TPUs, which have no hardware for them: what is read from memory is packed.

A tile of the weight is unpacked in VMEM. Eight positions share their bytes, and a register has eight sublanes: a byte
on all of them, shifted by the number of each, is a bit of eight positions. Row e of the packed values becomes row e of
m / n dense matrices, of which the s-th has what lies at position s n + e % n of the group: one of the group's n values,
found by comparing their positions with it, after they have been rotated. So values move within their group only, and
it is x, which is small, that is brought into the order of these rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from sparsejax import neighbours
from sparsejax.formats import NMArray
from sparsejax.types import Array

_TOKENS, _OUTPUTS, _DENSE = 256, 512, 1024  # of a tile: tokens, outputs and rows when unpacked, as a rule at most
_MOST_DENSE = 2048  # where a tile cannot be shorter
_MOST_VALUES = 16  # n: each value of a group is compared for every row of it


def matmul(x: Array, w: NMArray, *, interpret: Any = False) -> Array:
  """`x [M, K]` times `w [K, N]`, packed along K: `[M, N]` in x's dtype, summed in float32. Meant for few tokens."""
  bits, slots, (entries, outputs) = neighbours.width(w.m), -(-w.m // w.n), w.values.shape
  tokens = mosaic_tpu.tile(x.shape[0], _TOKENS, mosaic_tpu.SUBLANES)
  rows, columns = _divisor(entries, _unit(w), _DENSE // slots), _divisor(outputs, mosaic_tpu.LANES, _OUTPUTS)
  octets, steps = rows // 8 * bits, entries // rows
  ordered = mosaic_tpu.filled(_ordered(x, w.n, w.m), 1, tokens)
  indices = jnp.repeat(w.indices, w.width, 1)  # positions that outputs share: few bytes beside the values
  count = ordered.shape[1]
  call = pl.pallas_call(
      functools.partial(_kernel, n=w.n, bits=bits, steps=steps), grid=(count // tokens, outputs // columns, steps),
      in_specs=[pl.BlockSpec((slots, tokens, rows), lambda i, j, k: (0, i, k)),
                pl.BlockSpec((rows, columns), lambda i, j, k: (k, j)),
                pl.BlockSpec((octets, columns), lambda i, j, k: (k, j))],
      out_specs=pl.BlockSpec((tokens, columns), lambda i, j, k: (i, j)),
      scratch_shapes=[pltpu.VMEM((slots, rows, columns), x.dtype), pltpu.VMEM((octets, columns), jnp.int32),
                      pltpu.VMEM((tokens, columns), jnp.float32)],
      out_shape=mosaic_tpu.result((count, outputs), x.dtype, x, w.values, indices), interpret=interpret,
      name='nm_matmul', compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')))
  return call(ordered, w.values, indices)[:x.shape[0]]


def refusal(x: Array, w: NMArray) -> str | None:
  """Why the product of `x` and `w` cannot run on a TPU, with the remedy."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if w.values.ndim != 2 or w.axes != (-2,):
    return (f'it takes a matrix packed along the first of its two axes, not shape {w.shape} packed along {w.axes}; '
            'pack with axes=0, and take one of a stack at a time with vmap or scan')
  unit = _unit(w)
  if not 2 <= w.m <= 256 or w.n > _MOST_VALUES or -(-w.m // w.n) * unit > _MOST_DENSE:
    return f'{w.n}:{w.m} does not fit its tiles; 2:4, 1:4, 2:8, 4:8, 1:8, 8:16 and the like do'
  (entries, outputs), length = w.values.shape, w.m * unit // math.gcd(unit, w.n)
  if entries % unit or outputs % mosaic_tpu.LANES:
    return (f'a weight of shape {w.shape} does not divide into its tiles; for {w.n}:{w.m} they take a contracted '
            f'length that is a multiple of {length} and outputs that are a multiple of {mosaic_tpu.LANES}: fill up '
            'with zeros')
  return None


def _kernel(x_ref, values_ref, indices_ref, y_ref, dense_ref, bytes_ref, sum_ref, *, n: int, bits: int, steps: int):
  step, rows = pl.program_id(2), values_ref.shape[0]

  @pl.when(step == 0)
  def zero():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  bytes_ref[...] = indices_ref[...].astype(jnp.int32)  # registers of bytes can be neither shifted nor read by row
  few = math.lcm(mosaic_tpu.SUBLANES, n)

  def unpack(i, _):
    here = pl.ds(pl.multiple_of(i * few, few), few)
    positions = _positions(bytes_ref, i * (few // 8), few // 8, bits)
    _unpacked(values_ref[here, :].astype(jnp.float32), positions, n, dense_ref, here)

  jax.lax.fori_loop(0, rows // few, unpack, None)
  for slot in range(dense_ref.shape[0]):
    sum_ref[...] += mosaic_tpu.dot(x_ref[slot], dense_ref[slot], 1, 0)

  @pl.when(step == steps - 1)
  def store():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _positions(bytes_ref: Any, first: Array, count: int, bits: int) -> Array:
  """The positions, `[8 count, columns]`, in `count` times `bits` rows of bytes, as `neighbours.encoded` puts them."""
  sublane = jax.lax.broadcasted_iota(jnp.int32, (8, bytes_ref.shape[1]), 0)
  plane = lambda octet, p: ((bytes_ref[pl.ds((first + octet) * bits + p, 1), :] >> sublane) & 1) << p
  return jnp.concatenate([sum(plane(octet, p) for p in range(bits)) for octet in range(count)])


def _unpacked(values: Array, positions: Array, n: int, dense_ref: Any, here: pl.Slice) -> None:
  """Writes the rows `here` of all dense matrices."""
  row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) % n
  back = lambda a, by: pltpu.roll(a, by % a.shape[0], 0)
  rotated = lambda a, by: jnp.where(row + by < n, back(a, -by), back(a, n - by)) if by else a
  group = [(rotated(values, by), rotated(positions, by)) for by in range(n)]
  for slot in range(dense_ref.shape[0]):
    found = jnp.zeros_like(values)
    for value, position in group:
      found = jnp.where(position == slot * n + row, value, found)
    dense_ref[slot, here, :] = found.astype(dense_ref.dtype)


def _ordered(x: Array, n: int, m: int) -> Array:
  """`x [M, K]` as `[m / n, M, K n / m]`, zero where n does not divide m: columns in the order of the dense rows."""
  slots = -(-m // n)
  grouped = mosaic_tpu.filled(x.reshape(x.shape[0], -1, m), 2, n)
  return grouped.reshape(x.shape[0], -1, slots, n).transpose(2, 0, 1, 3).reshape(slots, x.shape[0], -1)


def _unit(w: NMArray) -> int:
  """Packed rows of the smallest tile: whole groups, whole registers of x along lanes, and of bytes along sublanes."""
  return math.lcm(mosaic_tpu.LANES, 8 * 32 // math.gcd(neighbours.width(w.m), 32), w.n)


def _divisor(length: int, unit: int, most: int) -> int:
  """The longest multiple of `unit` up to `most`, or else `unit`, that divides `length`."""
  return max(n for n in range(unit, max(unit, min(most, length)) + 1, unit) if length % n == 0)
