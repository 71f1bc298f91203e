"""Defines `Scaled`: a packed or dense array of whole numbers of a few bits, each times the scale of its group.

    packed = formats.pack(params, '2:4')['kernel']
    small = formats.Scaled.of(packed, functools.partial(qwix.quantize, qtype='int4', channelwise_axes=(1,)))
    small.codes, small.values             # four bits a kept weight; the scales, which can be trained
    small.opened()                        # the `NMArray` again, of rounded weights: the zeros are exact

The quantizer comes from the user: Qwix, AQT, or any function. Pruned weights are not shown to the quantizer, so that
pruned weights stay exactly zero even if the quantizer has no zero. Zeros that the format stores have to stay zero too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours
from sparsejax.arguments import is_known
from sparsejax.formats import arrays, misfits
from sparsejax.types import Array, Axes

# (matrix [entries, channels]) -> what has `qvalue` and `scale`, or a matrix of rounded weights
Quantizer = Callable[[Array], Any]
MOST = 8  # bits of a code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(arrays.PackedArray):
  """A `Scaled` stores the kept weights of a packed array, or all weights of a dense one, as codes and scales.

  The weights of one matrix are seen as `[entries, channels]`. A channel is an output of an N:M or ELL array, or a block
  of a `BlockSparseArray`. Of a dense array, a channel is a row along the last axis. Other arrays are one channel.
  `values` holds the scales, `[..., tiles, channels or 1]`: each tile of consecutive entries has its own. `zero` is
  `None`, or has the shape of `values`, and holds the code of zero. A weight is `values * (number - zero)`, where
  `number` is `low + code`, or entry `code` of `table` for numbers that are not evenly spaced.

  Codes have `bits` bits each. Every 8 consecutive entries become `bits` bytes of `codes`, as in `NMArray.indices`.
  `held` is the packed array without its values, `None` for a dense array. `entries` is the shape of the values of one
  matrix. The values of a packed array are those that are trained, so that `formats.values` trains the scales alone.
  """

  kind = 'scaled'
  index_bytes = 1

  values: Array
  codes: Array
  zero: Array | None
  held: Any  # a `PackedArray`, or None
  entries: tuple[int, ...] = arrays.static()
  bits: int = arrays.static()
  low: int = arrays.static(default=0)
  table: tuple[float, ...] = arrays.static(default=())
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def of(cls, weights: arrays.PackedArray | Array, quantize: Quantizer, table: tuple[float, ...] = ()) -> 'Scaled':
    """Returns the packed or dense array with quantized weights. Each matrix of a stack is quantized by itself.

    `quantize(matrix)` gets the weights of one matrix, `[entries, channels]`. The result has `qvalue`, `scale` and,
    perhaps, `zero_point`, as that of `qwix.quantize`, and of the `quant` of an AQT quantizer. `table` holds the numbers
    that `qvalue` counts, for nf4. Raises `ValueError` for traced weights, for codes of more than 8 bits, and for a
    quantizer that turns stored zeros into other numbers.
    """
    if isinstance(weights, Scaled):
      raise ValueError('Scaled.of: the array is quantized already; give the array before.')
    packed: Any = weights if isinstance(weights, arrays.PackedArray) else None
    values: Any = weights if packed is None else packed.values
    if not is_known(values):
      raise arrays.Misfit('Scaled.of', values.shape, misfits.TRACED)
    held = None if packed is None else dataclasses.replace(packed, values=None)
    lead = 0 if packed is None else packed.leading
    entries = tuple(values.shape[lead:])
    found = [_read(quantize, _matrix(held, each), table) for each in values.reshape(-1, *entries)]
    stacked = lambda parts: jnp.stack(parts).reshape(*values.shape[:lead], *parts[0].shape)
    numbers, scale = stacked([each.numbers for each in found]), stacked([each.scale for each in found])
    zero = None if found[0].zero is None else stacked([each.zero for each in found])
    codes, bits, low, table = _coded(numbers)
    stored = neighbours.encoded(codes, 1 << bits, codes.ndim - 2)
    made = cls(scale.astype(values.dtype), stored, zero, held, entries, bits, low, table,
               None if held is None else held.roles)
    _refuse_lost_zeros(values, made.opened() if held is None else made.opened().values)
    return made

  @property
  def axes(self) -> tuple[int, ...]:  # type: ignore[override]
    return self.held.axes if self.held is not None else ()

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self._abstract.shape)

  @property
  def leading(self) -> int:
    return self.values.ndim - 2

  @property
  def pattern(self):
    return None if self.held is None else self._abstract.pattern

  @property
  def _abstract(self) -> Any:
    """The array before it was quantized, without values."""
    like = jax.ShapeDtypeStruct((*self.values.shape[:-2], *self.entries), self.values.dtype)
    return like if self.held is None else dataclasses.replace(self.held, values=like)

  @property
  def _matrix_shape(self) -> tuple[int, int]:
    return jax.eval_shape(functools.partial(_matrix, self.held), jax.ShapeDtypeStruct(self.entries, jnp.float32)).shape

  def weights(self) -> Array:
    """Returns the rounded weights of each matrix, `[..., entries, channels]`. Differentiable in `values`."""
    length = self._matrix_shape[0]
    codes = neighbours.decoded(self.codes, length, 1 << self.bits, self.codes.ndim - 2).astype(jnp.int32)
    numbers = jnp.asarray(self.table, self.dtype)[codes] if self.table else (codes + self.low).astype(self.dtype)
    spread = lambda part: jnp.repeat(part, length // part.shape[-2], part.ndim - 2, total_repeat_length=length)
    if self.zero is not None:
      numbers = numbers - spread(self.zero.astype(self.dtype))
    return numbers * spread(self.values)

  def opened(self) -> Any:
    """Returns the packed array, or the dense array, with rounded weights. Differentiable in `values`."""
    back = functools.partial(_unmatrix, self.held, self.entries)
    for _ in range(self.leading):
      back = jax.vmap(back)
    values = back(self.weights())
    if self.held is None:
      return values
    roles = {} if self.roles is None else {'roles': self.roles}  # a file keeps them here alone
    return dataclasses.replace(self.held, values=values, **roles)

  @jax.jit
  def to_dense(self) -> Array:
    opened = self.opened()
    return opened if self.held is None else opened.to_dense()

  def arrays(self) -> dict[str, Array]:
    own = {'values': self.values, 'codes': self.codes} | ({} if self.zero is None else {'zero': self.zero})
    held = {} if self.held is None else {f'held.{name}': part for name, part in self.held.arrays().items()
                                         if part is not None}
    return own | held

  def described(self) -> dict[str, Any]:
    about = {'entries': list(self.entries), 'bits': self.bits, 'low': self.low, 'table': list(self.table)}
    if self.held is None:
      return about
    return about | {'held': {'kind': self.held.kind, **self._abstract.described()}}

  @classmethod
  def restored(cls, parts: Mapping[str, Array], shape: tuple[int, ...], about: Mapping[str, Any]) -> 'Scaled':
    entries, bits, low, table = tuple(about['entries']), about['bits'], about['low'], tuple(about['table'])
    arrays.refuse_other_numbers([bits, low, *entries])
    if not 0 <= bits <= MOST or table and len(table) != 1 << bits:
      raise ValueError(f'cannot have codes of {bits} bits with a table of {len(table)} numbers')
    inner = {name.removeprefix('held.'): part for name, part in parts.items() if name.startswith('held.')}
    values, held = parts['values'], None
    if 'held' in about:
      format_ = arrays.TABLE.get(about['held']['kind'])
      if format_ is None:
        raise ValueError(f'holds the unknown kind {about["held"]["kind"]!r}')
      like: Any = np.broadcast_to(np.zeros((), values.dtype), (*values.shape[:-2], *entries))
      whole: Any = format_.restored({**inner, 'values': like}, shape, about['held'])
      held = dataclasses.replace(whole, values=None)
    return cls(values, parts['codes'], parts.get('zero'), held, entries, bits, low, table)

  def problem(self) -> str | None:
    rows, channels = self._matrix_shape
    lead, tiles = self.values.shape[:-2], self.values.shape[-2] if self.values.ndim > 1 else 0
    codes = (*lead, self.bits * -(-rows // 8), channels)
    if self.codes.shape != codes or self.codes.dtype != jnp.uint8:
      return f'codes {self.codes.dtype}{list(self.codes.shape)} are not uint8{list(codes)}, {self.bits} bits a weight.'
    if not tiles or rows % tiles or self.values.shape[-1] not in (1, channels):
      return f'scales {list(self.values.shape)} do not divide {rows} entries and {channels} channels.'
    if self.zero is not None and self.zero.shape != self.values.shape:
      return f'zero {list(self.zero.shape)} has another shape than the scales {list(self.values.shape)}.'
    opened = self.opened()
    return None if self.held is None else opened.problem()


class _Numbers(NamedTuple):
  """A `_Numbers` holds what a quantizer made of one matrix: `numbers * scale`, or `(numbers - zero) * scale`."""

  numbers: Array
  scale: Array
  zero: Array | None


def _read(quantize: Quantizer, matrix: Array, table: tuple[float, ...]) -> _Numbers:
  """Returns the numbers that a quantizer makes of a matrix. Raises `ValueError` for a result of another kind."""
  made = quantize(matrix)
  if not hasattr(made, 'qvalue') or not hasattr(made, 'scale'):
    raise ValueError(f'Scaled.of: the quantizer returns a {type(made).__name__}. Return an object with `qvalue` and '
                     '`scale`, as qwix.quantize does.')
  scales = made.scale if isinstance(made.scale, list | tuple) else [made.scale]
  scale, numbers = functools.reduce(jnp.multiply, map(jnp.asarray, scales)), jnp.asarray(made.qvalue)
  fits = scale.ndim == 2 and scale.shape[1] in (1, matrix.shape[1]) and scale.shape[0] and (
      matrix.shape[0] % scale.shape[0] == 0)
  if numbers.shape != matrix.shape or not fits or getattr(made, 'bias', None):
    raise ValueError(f'Scaled.of: for a matrix {matrix.shape} of entries and channels, the quantizer gives numbers '
                     f'{numbers.shape} with scales {scale.shape}{" and a bias" * bool(getattr(made, "bias", None))}. '
                     'Give a number for each entry, scales that divide the entries, and no bias.')
  if table:
    numbers = jnp.asarray(table, jnp.float32)[numbers.astype(jnp.int32)]
  zero = getattr(made, 'zero_point', None)
  return _Numbers(numbers, scale, None if zero is None else jnp.asarray(zero).astype(jnp.int32))


def _coded(numbers: Array) -> tuple[Array, int, int, tuple[float, ...]]:
  """Returns the numbers as codes `uint8` from 0 on, the bits of a code, the number of code 0, and the table."""
  if jnp.issubdtype(numbers.dtype, jnp.integer):
    numbers = numbers.astype(jnp.int32)
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    bits = neighbours.width(high - low + 1)
    _refuse_wide(bits)
    return (numbers - low).astype(jnp.uint8), bits, low, ()
  values = np.unique(np.asarray(numbers, np.float32))
  bits = neighbours.width(len(values) or 1)
  _refuse_wide(bits)
  codes = jnp.searchsorted(jnp.asarray(values), numbers.astype(jnp.float32)).astype(jnp.uint8)
  return codes, bits, 0, tuple(np.pad(values, (0, (1 << bits) - len(values)), mode='edge').tolist())


def _refuse_lost_zeros(values: Array, rounded: Array) -> None:
  lost = int(jnp.sum((values == 0) & (rounded != 0)))
  if lost:
    raise arrays.Misfit('Scaled.of', values.shape, (
        f'the quantizer turns {lost} stored zeros into other numbers, as AQT with one bit does, which has no zero, and '
        'GPTQ after pruning, which moves all weights. Take a quantizer that keeps zeros, or round inside of the '
        'repair: repairs.columns(quantize=).'))


def _refuse_wide(bits: int) -> None:
  if bits > MOST:
    raise ValueError(f'Scaled.of: the quantizer gives numbers of {bits} bits, and at most {MOST} are stored. Ask the '
                     'quantizer for fewer bits.')


# The values of one matrix as `[entries, channels]`.


def _entry_axes(held: arrays.PackedArray | None, rank: int) -> list[int]:
  """Returns the axes of the values of one matrix that are entries of a channel, counted from the front."""
  if held is None:
    return [rank - 1][:rank]
  if hasattr(held, 'axis'):  # N:M
    return [held.axis + rank]
  return {3: [1, 2], 2: [0]}.get(rank, list(range(rank)))  # blocks; columns


def _matrix(held: arrays.PackedArray | None, values: Array) -> Array:
  own = _entry_axes(held, values.ndim)
  order = [*own, *(a for a in range(values.ndim) if a not in own)]
  return jnp.transpose(values, order).reshape(math.prod(values.shape[a] for a in own), -1)


def _unmatrix(held: arrays.PackedArray | None, entries: tuple[int, ...], matrix: Array) -> Array:
  """Returns the values of one matrix: the inverse of `_matrix`."""
  own = _entry_axes(held, len(entries))
  order = [*own, *(a for a in range(len(entries)) if a not in own)]
  return jnp.transpose(matrix.reshape([entries[a] for a in order]), np.argsort(order).tolist())
