"""Puts off a product until the program multiplies its outputs, entry by entry, by an activation with zeros.

The columns of `up` in a gated layer, `act(gate(x)) * up(x)`, are needed where the activation is not zero. A weight of
`formats.ActiveArray.of(w, outputs=True)` gives no array, but a `Deferred`, which the multiplication completes:

    up = deferred(fit, product)                  # no weight is read yet
    up.times(z)                                  # z * up, of which only the outputs that z leaves are computed

Where one weight makes gate and up, the program takes two parts of the product. The part of the gate is computed whole,
and the other part waits. Few tokens then read the weights of the gate once, and of up those that are needed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import active, held
from kernels_pallas.held import Fitted
from sparsejax.formats import ActiveArray
from sparsejax.formats.arrays import static
from sparsejax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
  """A `Deferred` stands for `x [..., K]` times the transpose of `w [N, K]`, in `dtype`, which is not computed yet.

  `kept`, `(first, end)`, are the outputs that it stands for, of the N that lie together in memory.
  """

  x: Array
  w: Array
  path: str = static()
  sizes: tuple[int, ...] = static()
  dtype: Any = static()
  kept: tuple[int, int] = static()
  implementation: str | None = static()

  def part(self, outputs: range) -> 'Deferred':
    """Returns the product at some of its outputs. No copy of their weights is made."""
    first = self.kept[0]
    return dataclasses.replace(self, kept=(first + outputs.start, first + outputs.stop))

  @property
  def op(self) -> str:
    """The name of the op that computes all outputs."""
    return 'threshold_matmul' if self.kept == (0, len(self.w)) else 'active_outputs'

  def to_dense(self) -> Array:
    """Returns all outputs that the product stands for."""
    if self.op == 'active_outputs':
      ones = jnp.ones((*self.x.shape[:-1], self.kept[1] - self.kept[0]), bool)
      return self._outputs(ones, capacity=len(self.w))
    y = jax.lax.dot_general(self.x, self.w, (((self.x.ndim - 1,), (1,)), ((), ())),
                            preferred_element_type=jnp.promote_types(self.x.dtype, jnp.float32))
    return y.astype(self.dtype)

  def times(self, z: Array) -> Array:
    """Returns `z` times the outputs, which are computed in blocks where `z` is not zero."""
    return z * self._outputs(z != 0)

  def choices(self, z: Array) -> Any:
    """Returns the implementation that each platform would run."""
    return active.active_outputs(self.x, self.w, self._whole(z != 0), explain=True)

  def _outputs(self, mask: Array, **options: Any) -> Array:
    """Returns the outputs of a mask `bool[..., kept]`. Two parts of one dense product are one product after XLA."""
    y: Any = active.active_outputs(self.x, self.w, self._whole(mask), implementation=self.implementation, **options)
    return y[..., self.kept[0]:self.kept[1]].astype(self.dtype)

  def _whole(self, mask: Array) -> Array:
    """Returns the mask over all rows of the weight: rows outside of those kept are `False`."""
    before, after = self.kept[0], len(self.w) - self.kept[1]
    return jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(before, after)])


def deferred(fit: Fitted, x: Array, theirs: Any, held_first: bool, result: Any,
             implementation: str | None) -> Deferred | None:
  """Returns the product with a weight whose outputs may be skipped, or `None` for every other product.

  `result` is the abstract result of the product, of which the outputs must be the last dimension.
  """
  w = fit.held
  free = [dim for i, dim in enumerate(w.dims) if i not in fit.numbers.contracted]
  if not (isinstance(w.packed, ActiveArray) and w.packed.outputs) or held_first or fit.numbers.batch or len(free) != 1:
    return None
  values = w.packed.values.astype(x.dtype)
  return Deferred(held.rows_of(fit, x, theirs), values, w.path, w.packed.sizes, result.dtype, (0, len(values)),
                  implementation)
