"""Stands in for values that attention may never need: scores between two products, and masks.

A stand-in computes its array only where the program needs one. `Pending` is a value between the two products of
attention. `Known` is a value that does not depend on the inputs, such as a causal mask, and can be computed while the
program is traced. `Masks` is a mask that several smaller masks make together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.programs import factors, jaxprs
from sparsejax.programs.factors import Dims
from sparsejax.types import Array


@jax.tree_util.register_static
@dataclasses.dataclass(eq=False)
class Known:
  """A `Known` stands in for an array that is computed of constants only. `stage()` stages its operations."""

  stage: Callable[[], Array]
  _concrete: Any = None

  def dense(self) -> Array:
    return self.stage()

  def concrete(self) -> np.ndarray:
    """Returns the array itself, computed while the program is traced."""
    if self._concrete is None:
      with jax.ensure_compile_time_eval():
        self._concrete = np.asarray(self.stage())
    return self._concrete


@dataclasses.dataclass(eq=False)
class Masks:
  """A `Masks` stands in for the conjunction of masks. Each part is an array or a `Known`, and broadcasts to `shape`.

  `dtype` is that of the array: programs turn masks into numbers and back.
  """

  parts: tuple[Any, ...]
  shape: tuple[int, ...]
  dtype: Any = np.dtype(bool)

  def dense(self) -> Array:
    whole = jnp.ones((), bool)
    for part in self.parts:
      whole = whole & as_array(part)
    return jnp.broadcast_to(whole, self.shape).astype(self.dtype)


@dataclasses.dataclass(eq=False)
class Pair:
  """A `Pair` is the product of queries and keys: its operands, and the equation at `address`."""

  address: jaxprs.Address
  eqn: Any
  operands: tuple[Array, Array]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.eqn.outvars[0].aval.shape

  @property
  def numbers(self) -> tuple[jaxprs.Numbers, jaxprs.Numbers]:
    return jaxprs.dot_numbers(self.eqn)

  def free(self, side: int) -> list[int]:
    """Returns the dimensions of an operand that are neither contracted nor numbered by both operands."""
    numbers = self.numbers[side]
    return [i for i in range(self.operands[side].ndim) if i not in (*numbers.contracted, *numbers.batch)]

  def axes(self, side: int) -> list[int]:
    """Returns the axes of the scores that the free dimensions of an operand become."""
    first = len(self.numbers[0].batch) + (len(self.free(0)) if side else 0)
    return list(range(first, first + len(self.free(side))))


@dataclasses.dataclass(frozen=True)
class Edited:
  """An `Edited` is an edit of scores whose array has the dimensions `dims` of the scores, or length 1."""

  kind: str
  array: Any
  dims: Dims


@dataclasses.dataclass(eq=False)
class Pending:
  """A `Pending` stands in for a value between the two products of attention.

  `stage` is 'scores', 'largest' (the maximum of a row), 'shifted', 'exps', 'total' (the sum of a row), 'inverse', or
  'weights'. `dims` tells how the dimensions run over the axes of the scores. `scale` multiplies the scores before all
  `edits`. `along` are the axes of the scores that the softmax runs over.
  """

  stage: str
  pair: Pair
  dims: Dims
  compute: Callable[[], Array]
  scale: float = 1.0
  edits: tuple[Edited, ...] = ()
  along: frozenset[int] = frozenset()
  _array: Any = None

  def dense(self) -> Array:
    if self._array is None:
      self._array = self.compute()
    return self._array

  def to(self, compute: Callable[[], Array], **changes: Any) -> 'Pending':
    return dataclasses.replace(self, compute=compute, _array=None, **changes)


STAND_INS = (Known, Masks, Pending)


def as_array(value: Any) -> Any:
  """Returns the array that a value stands for."""
  return value.dense() if isinstance(value, STAND_INS) else value


def own_axes(shape: tuple[int, ...]) -> Dims:
  """Returns the dimensions of the scores themselves; a dimension of length 1 has no factor."""
  return tuple(dim if n != 1 else () for dim, n in zip(factors.whole(shape), shape))


def constant(value: Any) -> float | None:
  """Returns the one number that a value repeats, if the value is known at trace time, otherwise `None`."""
  if isinstance(value, (jax.core.Tracer, Masks, Pending)) or not isinstance(value, Known) and np.ndim(value):
    return None
  array = np.asarray(value.concrete() if isinstance(value, Known) else value).reshape(-1)
  return float(array[0]) if array.size and (array == array[0]).all() else None
