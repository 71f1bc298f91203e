"""Shows a product with a parameter as a stack of matrix products, whatever the layout of its operands.

An `Arrangement` splits the axes of a parameter into digits, so that every dimension of the product's weight is a
product of whole digits. Each digit has a role, and numbers matrices of the stack, outputs, taps or inputs.

    own = arrangement_of(site.use, site.eqn, params['kernel'].shape)
    own.stack(params['kernel'])                  # `[L, R, K]`
    own.rows(site.x, site.others)                # `Rows` with `x` of shape `[L, T, K]`: y = x w^T
    own.operand(params['kernel'])                # the weight as the product takes it, in the parameter's dtype
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sparsejax.programs import factors, jaxprs
from sparsejax.programs.contractions import Use
from sparsejax.programs.factors import Factor
from sparsejax.types import Array, Axes

MATRIX, OUTPUT, TAP, INPUT = range(4)  # the roles of digits, in the order of a stack `[L, R, K]`


class Digit(NamedTuple):
  """A `Digit` is `size` indices of an axis of a parameter, `stride` apart, with one role in a product."""

  role: int
  axis: int
  size: int
  stride: int


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """An `Arrangement` says how a parameter, or one layer of it, is the weight of a product and a stack of matrices.

  `dims` has the digits of each dimension of the weight. `gone` are the axes of which the program picked one index. The
  functions take and return the parameter without these axes (the *part*).
  """

  dims: tuple[tuple[Digit, ...], ...]
  gone: tuple[int, ...]
  axes: Axes
  eqn: Any = dataclasses.field(compare=False)
  operand_number: int = 1

  @functools.cached_property
  def digits(self) -> list[Digit]:
    """The digits of the part, in the order of its axes, major first."""
    return sorted((digit for dim in self.dims for digit in dim), key=lambda digit: (digit.axis, -digit.stride))

  @functools.cached_property
  def ordered(self) -> list[Digit]:
    """The digits in the order of a stack; feature groups come after layers, contracted axes as the program orders them.
    """
    place = lambda digit: self.axes.contracted.index(digit.axis) if digit.role == INPUT else digit.axis
    grouped = lambda digit: digit.role == MATRIX and digit.axis in self.axes.output
    return sorted(self.digits, key=lambda digit: (digit.role, grouped(digit), place(digit), -digit.stride))

  @property
  def shape(self) -> tuple[int, int, int]:
    """The shape of the stack, `(L, R, K)`."""
    return self._size(MATRIX), self._size(OUTPUT), self._size(TAP) * self._size(INPUT)

  @property
  def groups(self) -> int:
    """The number of consecutive matrices of the stack that are one matrix of the parameter."""
    return math.prod(d.size for d in self.digits if d.role == MATRIX and d.axis in self.axes.output)

  @property
  def row_key(self) -> tuple[Any, ...]:
    """The facts that two arrangements share if they show one operand as the same rows."""
    dims = tuple(tuple(digit for digit in dim if digit.role != OUTPUT) for dim in self.dims)
    return jaxprs.setting(self.eqn), dims, self.axes.contracted, self.operand_number, self.groups

  def _size(self, role: int) -> int:
    return math.prod(digit.size for digit in self.digits if digit.role == role)

  def stack(self, part: Array) -> Array:
    """Returns the part of the parameter as a stack `[L, R, K]`."""
    return _permuted(part, self.digits, self.ordered).reshape(self.shape)

  def part(self, stack: Array, like: Sequence[int]) -> Array:
    """Returns the part, of shape `like`, that a stack `[L, R, K]` shows: the inverse of `stack`."""
    return _permuted(stack, self.ordered, self.digits).reshape(tuple(like))

  def operand(self, part: Array) -> Array:
    """Returns the part as the product takes it."""
    flat = [digit for dim in self.dims for digit in dim]
    return _permuted(part, self.digits, flat).reshape([math.prod(d.size for d in dim) for dim in self.dims])

  def rows(self, x: Array, others: Sequence[Array], valid: Array | None = None) -> tuple[Array, Array | None]:
    """Returns the rows of the other operand, `[L, T, K]` or `[1, T, K]`, and which of them count, `bool[L, T]`.

    `valid` marks the entries of `x` that count. Its shape broadcasts to that of `x`, with length 1 along what is
    contracted. The second result is `None` if all rows count. In a batched product, rows of zeros do not count: experts
    with a fixed number of slots leave slots without a token empty.
    """
    return _ROWS[self.eqn.primitive.name](self, x, others, valid)


def _permuted(array: Array, digits: Sequence[Digit], wanted: Sequence[Digit]) -> Array:
  """Returns an array whose index consists of `digits` with an axis for each of the `wanted` digits."""
  split = array.reshape([digit.size for digit in digits])
  return jnp.transpose(split, [digits.index(digit) for digit in wanted])


def arrangement_of(use: Use, eqn: Any, shape: Sequence[int]) -> Arrangement | str:
  """Returns the arrangement of a parameter of this shape in one use, or the reason why there is none.

  The reason ends in a remedy.
  """
  if use.axes is None:
    return f'{use.place} {use.problem}. Leave the parameter out of `where`.'
  if not factors.exact(use.view.dims) or use.view.share != 1:
    return (f'{use.place} takes a part of the parameter, or several parameters at once, which is no matrix of it. '
            'Split or join the parameter before, or leave it out of `where`.')
  if eqn.primitive.name == 'ragged_dot_general' and (use.operand != 1 or not jaxprs.rows_in_groups(eqn)):
    return f'{use.place} has groups that are not groups of rows. Leave the parameter out of `where`.'
  if eqn.primitive.name == 'conv_general_dilated' and jaxprs.convolution(eqn).batch_groups != 1:
    return f'{use.place} has batch groups. Leave the parameter out of `where`.'
  contraction = jaxprs.CONTRACTIONS[eqn.primitive.name](eqn)
  dims = tuple(_digits(dim, role) for dim, role in zip(use.view.dims, contraction.roles[use.operand] or ()))
  if contraction.groups > 1:
    place = jaxprs.convolution(eqn).rhs[0]
    dims = (*dims[:place], _grouped(dims[place], contraction.groups), *dims[place + 1:])
  made = Arrangement(dims, tuple(sorted(use.view.gone)), use.axes, eqn, use.operand)
  if math.prod(made.shape) != math.prod(n for a, n in enumerate(shape) if a not in made.gone):
    return f'{use.place} takes a part of the parameter only. Split it before, or leave it out of `where`.'
  return made


_ROLES = {'layer': MATRIX, 'output': OUTPUT, 'spatial': TAP, 'contracted': INPUT}


def _digits(dim: Sequence[Factor], role: str) -> tuple[Digit, ...]:
  return tuple(Digit(_ROLES[role], f.axes[0], f.size, f.stride or 1) for f in dim if f.size != 1)


def _grouped(dim: Sequence[Digit], groups: int) -> tuple[Digit, ...]:
  """Returns the digits of the output dimension of a convolution, of which the major part numbers its groups."""
  made: list[Digit] = []
  for digit in dim:
    major = math.gcd(groups, digit.size) if groups % digit.size else digit.size
    minor = digit.size // major
    made += [digit._replace(role=MATRIX, size=major, stride=digit.stride * minor)] * (major > 1)
    made += [digit._replace(size=minor)] * (minor > 1)
    groups //= major
  return tuple(made)


def _arranged(own: Arrangement, x: Array, batch: Sequence[Sequence[Digit]], inputs: Sequence[Sequence[Digit]]) -> Array:
  """Returns `x`, of dimensions `[*batch, T, *inputs]`, as rows `[L, T, K]`. `inputs` is empty if K is left out."""
  first, last = [d for dim in batch for d in dim], [d for dim in inputs for d in dim]
  tokens = x.shape[len(batch)]
  split = x.reshape([d.size for d in first] + [tokens] + [d.size for d in last])
  order = lambda found: [found.index(d) for d in own.ordered if d in found]
  places = [*order(first), len(first), *(len(first) + 1 + i for i in order(last))]
  return jnp.transpose(split, places).reshape(math.prod(d.size for d in first), tokens, math.prod(d.size for d in last))


def _dot_rows(own: Arrangement, x: Array, others: Sequence[Array], valid: Array | None) -> tuple[Array, Array | None]:
  numbers = jaxprs.dot_numbers(own.eqn)
  mine, weight = numbers[1 - own.operand_number], numbers[own.operand_number]
  free = [i for i in range(x.ndim) if i not in mine.contracted + mine.batch]
  batch, inputs = [own.dims[i] for i in weight.batch], [own.dims[i] for i in weight.contracted]
  lengths = lambda places: [x.shape[i] for i in places]
  tokens = math.prod(lengths(free))
  moved = jnp.transpose(x, [*mine.batch, *free, *mine.contracted])
  rows = _arranged(own, moved.reshape(*lengths(mine.batch), tokens, *lengths(mine.contracted)), batch, inputs)
  filled = jnp.any(rows != 0, -1) if len(rows) > 1 else None
  if valid is None:
    return rows, filled
  counted = jnp.broadcast_to(valid, [1 if i in mine.contracted else n for i, n in enumerate(x.shape)])
  counted = jnp.transpose(counted, [*mine.batch, *free, *mine.contracted]).reshape(*lengths(mine.batch), tokens)
  counted = _arranged(own, counted, batch, ())[..., 0]
  return rows, counted if filled is None else counted & filled


def _ragged_rows(own: Arrangement, x: Array, others: Sequence[Array], valid: Array | None) -> tuple[Array, Array]:
  """Returns all rows once, and for each matrix the rows of its group."""
  ends, place = jnp.cumsum(others[0]), jnp.arange(len(x))[None]
  members = (place < ends[:, None]) & (place >= (ends - others[0])[:, None])
  if valid is not None:
    members &= jnp.broadcast_to(valid, (len(x), 1))[None, :, 0]
  return _arranged(own, x, (), (own.dims[1],)), _arranged(own, members, (own.dims[0],), ())[..., 0]


def _convolved_rows(own: Arrangement, x: Array, others: Sequence[Array], valid: Array | None
                    ) -> tuple[Array, Array | None]:
  """Returns the patches of the input: a row for each image and position, of taps and features."""
  asked = jaxprs.convolution(own.eqn)
  window = [math.prod(d.size for d in own.dims[i]) for i in asked.rhs[2:]]
  patches = lax.conv_general_dilated_patches(  # `[batch, feature * taps, *positions]`
      jnp.transpose(x, asked.lhs), window, asked.strides, asked.padding, asked.dilation, asked.apart,
      precision=lax.Precision.HIGHEST)
  images, positions = len(patches), math.prod(patches.shape[2:])
  split = patches.reshape(images, asked.groups, -1, math.prod(window), positions)
  rows = jnp.transpose(split, (1, 0, 4, 3, 2)).reshape(asked.groups, images * positions, math.prod(window), -1)
  inputs = [tuple(d for i in asked.rhs[2:] for d in own.dims[i]), own.dims[asked.rhs[1]]]
  groups = [tuple(d for d in own.dims[asked.rhs[0]] if d.role == MATRIX)]
  counted = None
  if valid is not None:
    one = jnp.broadcast_to(valid, [n if i == asked.lhs[0] else 1 for i, n in enumerate(x.shape)]).reshape(1, images, 1)
    counted = jnp.broadcast_to(one, (1, images, positions)).reshape(1, -1)
  return _arranged(own, rows, groups, inputs), counted


_ROWS = {'dot_general': _dot_rows, 'ragged_dot_general': _ragged_rows, 'conv_general_dilated': _convolved_rows}
