"""Defines `Wrapped`: a packed 2:4 matrix between two block-diagonal matrices, whose product has no zeros.

    wrapped = formats.Wrapped.of(core, left, right)       # `core` is an `NMArray` of `[K, N]`
    wrapped.to_dense()                                    # the product, as the program would see it

`recipes.armor` makes such leaves, and `kernels_pallas.packed` multiplies by the three factors in turn.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.formats import arrays
from sparsejax.formats.n_m import NMArray
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped(arrays.PackedArray):
  """A `Wrapped` stores a matrix `[K, N]` as `right^T core left^T`, or a stack of matrices, `[..., K, N]`.

  `values` holds the values of the core, and `held` the rest of the core, an `NMArray`. `left`, `[..., N / b, b, b]`,
  and `right`, `[..., K / b, b, b]`, hold the blocks of two block-diagonal matrices: in the order of ARMOR,
  `w^T = left core^T right` for `w^T` `[outputs, inputs]`. K and N are merged axes as in the core. Gradients flow to all
  three factors, and `formats.values` trains the core alone.
  """

  kind = 'wrapped'
  index_bytes = 1

  values: Array
  left: Array
  right: Array
  held: NMArray
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def of(cls, core: NMArray, left: Array, right: Array) -> 'Wrapped':
    """Returns the wrapped matrix. Raises `ValueError` unless the blocks of `left` and `right` make N and K."""
    made = cls(core.values, left, right, dataclasses.replace(core, values=None), core.roles)  # type: ignore[arg-type]
    if why := made.problem():
      raise arrays.Misfit('Wrapped.of', core.shape, why)
    return made

  @property
  def core(self) -> NMArray:
    """The packed core with its values."""
    roles: dict[str, Any] = {} if self.roles is None else {'roles': self.roles}  # a file keeps them here alone
    return dataclasses.replace(self.held, values=self.values, **roles)

  @property
  def axes(self) -> tuple[int, ...]:  # type: ignore[override]
    return self.held.axes

  @property
  def shape(self) -> tuple[int, ...]:
    return self.core.shape

  @property
  def leading(self) -> int:
    return self.core.leading

  @property
  def sizes(self) -> tuple[int, int]:
    """K and N."""
    shape = self.shape
    lengths = [shape[a] for a in self.axes]
    return math.prod(lengths), math.prod(shape[self.left.ndim - 3:]) // math.prod(lengths)

  @jax.jit
  def to_dense(self) -> Array:
    lead, core = self.left.ndim - 3, self.core.to_dense()
    order = [a + core.ndim for a in self.axes]
    order = [*range(lead), *order, *(a for a in range(lead, core.ndim) if a not in order)]
    moved = jnp.transpose(core, order)
    matrix = moved.reshape(*core.shape[:lead], *self.sizes).swapaxes(-1, -2)  # [N, K]
    dense = multiplied(multiplied(matrix, self.right).swapaxes(-1, -2), self.left.swapaxes(-1, -2))
    return jnp.transpose(dense.reshape(moved.shape), np.argsort(order).tolist()).astype(self.dtype)

  def arrays(self) -> dict[str, Array]:
    return {'values': self.values, 'left': self.left, 'right': self.right, 'indices': self.held.indices}

  def described(self) -> dict[str, Any]:
    return self.core.described()

  @classmethod
  def restored(cls, parts: Mapping[str, Array], shape: tuple[int, ...], about: Mapping[str, Any]) -> 'Wrapped':
    core = NMArray.restored({name: parts[name] for name in ('values', 'indices')}, shape, about)
    held: Any = dataclasses.replace(core, values=None)
    return cls(parts['values'], parts['left'], parts['right'], held)

  def problem(self) -> str | None:
    lead = self.core.leading
    for name, blocks, size in zip(('right', 'left'), (self.right, self.left), self.sizes):
      square = blocks.ndim == lead + 3 and blocks.shape[-1] == blocks.shape[-2]
      if not square or blocks.shape[:lead] != self.shape[:lead] or blocks.shape[-3] * blocks.shape[-1] != size:
        return f'{name} {list(blocks.shape)} has no square blocks that make a length of {size}.'
    return self.core.problem()


def multiplied(x: Array, blocks: Array) -> Array:
  """Returns `x` `[..., M, n b]` times the block-diagonal matrix of `blocks`, `[..., n, b, b]`, in the dtype of `x`."""
  n, b = blocks.shape[-3:-1]
  parts = x.reshape(*x.shape[:-1], n, b)
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  return product('...mnb,...nbc->...mnc', parts, blocks.astype(x.dtype)).reshape(x.shape)
