"""Computes products with N:M weights on TPUs, which have no hardware for N:M: weights are read from memory packed.

A tile of the weight is unpacked in VMEM. Eight positions share their bytes, and a register has eight sublanes. A byte
is copied to all sublanes and shifted by the number of each sublane, which gives one bit of eight positions.

Row e of the packed values becomes row e of m / n dense matrices. Row e of the s-th matrix holds the weight at position
s n + e % n of its group. The weight is one of the n values of the group, or zero. The values and positions of a group
are rotated, and a value is taken where its position matches. Values therefore move only within their group. The columns
of x, which is small, are brought into the order of these rows.
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

_TOKENS, _OUTPUTS, _DENSE = 256, 512, 1024  # of a tile, as a rule at most: tokens, outputs, and unpacked rows
_MOST_DENSE = 2048  # unpacked rows of the smallest tile, at most
_MOST_VALUES = 16  # n, at most: each value of a group is compared for every row of the group


def matmul(x: Array, w: NMArray, *, interpret: Any = False) -> Array:
  """Returns `x [M, K]` times `w [K, N]`, packed along K: `[M, N]` in x's dtype, summed in float32, for few tokens."""
  bits, slots, (entries, outputs) = neighbours.width(w.m), -(-w.m // w.n), w.values.shape
  tokens = mosaic_tpu.tile(x.shape[0], _TOKENS, mosaic_tpu.SUBLANES)
  rows, columns = _divisor(entries, _unit(w), _DENSE // slots), _divisor(outputs, mosaic_tpu.LANES, _OUTPUTS)
  octets, steps = rows // 8 * bits, entries // rows
  ordered = mosaic_tpu.filled(_ordered(x, w.n, w.m), 1, tokens)
  indices = jnp.repeat(w.indices, w.width, 1)  # Repeated positions are few bytes beside the values.
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
  """Returns why the product of `x` and `w` cannot run on a TPU, with the remedy, or `None`."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if w.values.ndim != 2 or w.axes != (-2,):
    return (f'it takes a matrix packed along the first of its two axes, not shape {w.shape} packed along {w.axes}; '
            'pack with axes=0, and multiply by the matrices of a stack one at a time, with vmap or scan')
  unit = _unit(w)
  if not 2 <= w.m <= 256 or w.n > _MOST_VALUES or -(-w.m // w.n) * unit > _MOST_DENSE:
    return f'{w.n}:{w.m} does not fit its tiles; 2:4, 1:4, 2:8, 4:8, 1:8, 8:16 and the like do'
  (entries, outputs), length = w.values.shape, w.m * unit // math.gcd(unit, w.n)
  if entries % unit or outputs % mosaic_tpu.LANES:
    return (f'a weight of shape {w.shape} does not divide into its tiles; for {w.n}:{w.m} they take a contracted '
            f'length that is a multiple of {length} and outputs that are a multiple of {mosaic_tpu.LANES}: pad with '
            'zeros')
  return None


def _kernel(x_ref, values_ref, indices_ref, y_ref, dense_ref, bytes_ref, sum_ref, *, n: int, bits: int, steps: int):
  step, rows = pl.program_id(2), values_ref.shape[0]

  @pl.when(step == 0)
  def zero():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  bytes_ref[...] = indices_ref[...].astype(jnp.int32)  # Mosaic can neither shift bytes nor read a row of them.
  few = math.lcm(mosaic_tpu.SUBLANES, n)

  def unpack(i, _):
    part = pl.ds(pl.multiple_of(i * few, few), few)
    positions = _positions(bytes_ref, i * (few // 8), few // 8, bits)
    _unpack(values_ref[part, :].astype(jnp.float32), positions, n, dense_ref, part)

  jax.lax.fori_loop(0, rows // few, unpack, None)
  for slot in range(dense_ref.shape[0]):
    sum_ref[...] += mosaic_tpu.dot(x_ref[slot], dense_ref[slot], 1, 0)

  @pl.when(step == steps - 1)
  def store():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _positions(bytes_ref: Any, first: Array, count: int, bits: int) -> Array:
  """Returns the positions, `[8 count, columns]`, that `neighbours.encoded` packed into `count * bits` rows of bytes."""
  sublane = jax.lax.broadcasted_iota(jnp.int32, (8, bytes_ref.shape[1]), 0)
  plane = lambda octet, p: ((bytes_ref[pl.ds((first + octet) * bits + p, 1), :] >> sublane) & 1) << p
  return jnp.concatenate([sum(plane(octet, p) for p in range(bits)) for octet in range(count)])


def _unpack(values: Array, positions: Array, n: int, dense_ref: Any, part: pl.Slice) -> None:
  """Writes the rows `part` of all dense matrices."""
  row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) % n
  back = lambda a, by: pltpu.roll(a, by % a.shape[0], 0)
  rotated = lambda a, by: jnp.where(row + by < n, back(a, -by), back(a, n - by)) if by else a
  group = [(rotated(values, by), rotated(positions, by)) for by in range(n)]
  for slot in range(dense_ref.shape[0]):
    weight = jnp.zeros_like(values)
    for value, position in group:
      weight = jnp.where(position == slot * n + row, value, weight)
    dense_ref[slot, part, :] = weight.astype(dense_ref.dtype)


def _ordered(x: Array, n: int, m: int) -> Array:
  """Returns `x [M, K]` as `[m / n, M, K n / m]`, with columns in the order of the rows of the dense matrices.

  m / n is rounded up; columns without an input are zero.
  """
  slots = -(-m // n)
  grouped = mosaic_tpu.filled(x.reshape(x.shape[0], -1, m), 2, n)
  return grouped.reshape(x.shape[0], -1, slots, n).transpose(2, 0, 1, 3).reshape(slots, x.shape[0], -1)


def _unit(w: NMArray) -> int:
  """Returns the packed rows of the smallest tile.

  The tile has whole groups, whole registers of x along lanes, and whole registers of bytes along sublanes.
  """
  return math.lcm(mosaic_tpu.LANES, 8 * 32 // math.gcd(neighbours.width(w.m), 32), w.n)


def _divisor(length: int, unit: int, most: int) -> int:
  """Returns the longest multiple of `unit`, at most `most`, or `unit` itself, that divides `length`."""
  return max(n for n in range(unit, max(unit, min(most, length)) + 1, unit) if length % n == 0)
