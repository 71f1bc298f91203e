"""Puts off a product until the program multiplies its outputs, entry by entry, by an activation with zeros.

The columns of `up` in a gated layer, `act(gate(x)) * up(x)`, are needed where the activation is not zero. A weight of
`formats.ActiveArray.of(w, outputs=True)` gives no array, but a `Deferred`, which the multiplication completes:

    up = deferred(fit, product)                  # no weight is read yet
    up.times(z, None)                            # z * up, of which only the outputs that z leaves are computed
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
  """A `Deferred` stands for `x [..., K]` times the transpose of `w [N, K]`, in `dtype`, which is not computed yet."""

  x: Array
  w: Array
  path: str = static()
  sizes: tuple[int, ...] = static()
  dtype: Any = static()

  def to_dense(self) -> Array:
    """Returns all outputs."""
    y = jax.lax.dot_general(self.x, self.w, (((self.x.ndim - 1,), (1,)), ((), ())),
                            preferred_element_type=jnp.promote_types(self.x.dtype, jnp.float32))
    return y.astype(self.dtype)

  def times(self, z: Array, implementation: str | None) -> Array:
    """Returns `z` times the outputs, which are computed in blocks where `z` is not zero."""
    named = implementation if implementation in ('xla', 'dense') else None
    return z * active.active_outputs(self.x, self.w, z != 0, implementation=named).astype(self.dtype)

  def choices(self, z: Array) -> Any:
    """Returns the implementation that each platform would run."""
    return active.active_outputs(self.x, self.w, z != 0, explain=True)


def deferred(fit: Fitted, x: Array, theirs: Any, held_first: bool, result: Any) -> Deferred | None:
  """Returns the product with a weight whose outputs may be skipped, or `None` for every other product.

  `result` is the abstract result of the product, of which the outputs must be the last dimension.
  """
  w = fit.held
  free = [dim for i, dim in enumerate(w.dims) if i not in fit.numbers.contracted]
  if not (isinstance(w.packed, ActiveArray) and w.packed.outputs) or held_first or fit.numbers.batch or len(free) != 1:
    return None
  return Deferred(held.rows_of(fit, x, theirs), w.packed.values.astype(x.dtype), w.path, w.packed.sizes, result.dtype)
