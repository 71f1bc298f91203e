"""Defines `ActiveArray`: a weight with a threshold for each input, below which a token skips the input.

    small = formats.ActiveArray.of(w, threshold)           # `w` dense `[K, N]` or packed, `threshold` `[K]`
    small.to_dense()                                       # `w`, bit for bit: the weight itself is not sparse
    y = kernels_pallas.packed(apply)({'kernel': small}, x)     # skips x[t, k] where |x[t, k]| < threshold[k]

`activation.sparsify` makes such leaves. Thresholds are a policy beside the weight, and files keep both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.arguments import is_known
from sparsejax.formats import arrays, misfits
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ActiveArray(arrays.MatrixArray):
  """An `ActiveArray` stores a matrix `[K, N]`, or a stack, with the threshold of each input, `[..., K]`, float32.

  A product skips entry k of a token where its magnitude is below `threshold[k]`. An infinite threshold skips all. Where
  `left`, `[..., K, r]`, and `right`, `[..., r, N]`, are given, what is skipped is multiplied by `left right` instead.
  `formats.unpack` and `formats.matmul` leave thresholds out, and so does an operation that unpacks the weight, which
  `kernels_pallas.packed(apply, explain=True)` lists.

  `values` is `[..., K, N]`. With `outputs=True`, outputs are skipped, and not inputs: a product leaves the outputs out
  that the program multiplies by zero. `values` is then `[..., N, K]`, so that an output is a row that lies together,
  and `threshold` is `[..., N]` and zero. With `held`, a packed array without its values, `values` are those of the
  packed array.
  """

  kind = 'active'
  product = 'threshold_matmul'
  matrix_rank = 2

  values: Array
  threshold: Array
  left: Array | None
  right: Array | None
  held: Any  # a `PackedArray`, or None
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  outputs: bool = arrays.static(default=False)
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def of(cls, weights: Any, threshold: Any = 0.0, left: Array | None = None, right: Array | None = None, *,
         axes: Axes | int | tuple[int, ...] = 0, outputs: bool = False) -> 'ActiveArray':
    """Returns the weight with thresholds: a number, or an array that broadcasts to `[..., K]`.

    `axes` are the contracted axes of a dense weight; the axes of a stack come first. A packed weight knows its own.
    Raises `ValueError` for axes of no matrix, for a threshold that is negative or NaN, and for parts of other shapes.
    """
    made = _around(weights) if isinstance(weights, arrays.PackedArray) else _of_dense(weights, axes, outputs)
    shape = (*made.shape[:made.ndim - len(made.sizes)], made.skippable)
    wanted = jnp.asarray(threshold, jnp.float32)
    if wanted.ndim > len(shape) or any(n not in (1, m) for n, m in zip(wanted.shape[::-1], shape[::-1])):
      raise arrays.Misfit('ActiveArray.of', made.shape, f'threshold {list(wanted.shape)} does not broadcast to '
                          f'{list(shape)}; give a number, or one threshold for each input.')
    made = dataclasses.replace(made, threshold=jnp.broadcast_to(wanted, shape), left=left, right=right)
    if is_known(made.threshold) and (why := made.problem()):
      raise arrays.Misfit('ActiveArray.of', made.shape, why)
    return made

  @property
  def leading(self) -> int:
    return self.threshold.ndim - 1

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.threshold.shape[:-1], *self.sizes)

  @property
  def pattern(self):
    return None if self.held is None else self.opened().pattern

  @property
  def skippable(self) -> int:
    """The number of inputs, or with `outputs` of outputs, that a token may skip."""
    return math.prod(self.output_sizes) if self.outputs else self.contracted_size

  def opened(self) -> Any:
    """Returns the packed array of the weight, without thresholds; only an array with `held` has one."""
    roles = {} if self.roles is None else {'roles': self.roles}  # a file keeps them here alone
    return dataclasses.replace(self.held, values=self.values, **roles)

  def coordinates(self) -> tuple[()]:
    return ()

  def scattered(self, values, coordinates):
    return values.T if self.outputs else values

  @jax.jit
  def to_dense(self) -> Array:
    return super().to_dense() if self.held is None else self.opened().to_dense()

  def arrays(self) -> dict[str, Array]:
    own = {name: getattr(self, name) for name in ('values', 'threshold', 'left', 'right')}
    held = {} if self.held is None else {f'held.{name}': part for name, part in self.held.arrays().items()}
    return {name: part for name, part in (own | held).items() if part is not None}

  def described(self) -> dict[str, Any]:
    about = super().described() | {'outputs': self.outputs}
    return about if self.held is None else about | {'held': {'kind': self.held.kind, **self.opened().described()}}

  @classmethod
  def restored(cls, parts: Mapping[str, Array], shape: tuple[int, ...], about: Mapping[str, Any]) -> 'ActiveArray':
    fields, held = cls.matrix_fields(shape, about), None
    if parts['threshold'].ndim != about['stacked'] + 1:
      raise ValueError(f'threshold {list(parts["threshold"].shape)} is of no stack of {about["stacked"]} axes')
    if 'held' in about:
      format_ = arrays.TABLE.get(about['held']['kind'])
      if format_ is None:
        raise ValueError(f'holds the unknown kind {about["held"]["kind"]!r}')
      inner = {name.removeprefix('held.'): part for name, part in parts.items() if name.startswith('held.')}
      whole: Any = format_.restored({**inner, 'values': parts['values']}, shape, about['held'])
      if why := whole.problem():
        raise ValueError(why)
      held = dataclasses.replace(whole, values=None)
    return cls(parts['values'], parts['threshold'], parts.get('left'), parts.get('right'), held, fields['axes'],
               fields['sizes'], bool(about['outputs']))

  def problem(self) -> str | None:
    lead, (k, n) = self.shape[:self.leading], (self.contracted_size, math.prod(self.output_sizes))
    wanted = (*lead, n, k) if self.outputs else (*lead, k, n)
    if self.held is None and self.values.shape != wanted:
      return f'values {list(self.values.shape)} are not {list(wanted)}, a matrix for each index of the stack.'
    if self.threshold.shape != (*lead, self.skippable) or self.threshold.dtype != jnp.float32:
      return (f'threshold {self.threshold.dtype}{list(self.threshold.shape)} is not '
              f'float32{[*lead, self.skippable]}, one for each input.')
    if not np.all(np.asarray(self.threshold) >= 0):
      return 'a threshold is negative or NaN; a threshold is at least 0, and infinite where nothing passes.'
    ranks = {part.shape[axis] for part, axis in ((self.left, -1), (self.right, -2)) if part is not None}
    own = [part is None or part.shape[:-2] == lead and part.shape[axis] == size
           for part, axis, size in ((self.left, -2, k), (self.right, -1, n))]
    if (self.left is None) != (self.right is None) or len(ranks) > 1 or not all(own) or ranks and self.outputs:
      return f'left and right are not [..., {k}, r] and [..., r, {n}], given together and for inputs.'
    return None


def _of_dense(w: Array, axes: Any, outputs: bool) -> ActiveArray:
  """Returns the dense array as the values of an `ActiveArray` without thresholds."""
  own = arrays.matrix_axes('ActiveArray.of', w, axes)
  if why := misfits.matrix_misfit(own) or misfits.dtype_misfit(w.dtype):
    raise arrays.Misfit('ActiveArray.of', w.shape, why)
  lead = [w.shape[a] for a in own.layer]
  _, k, n = arrays.matrix_sizes(w.shape, own)
  values = jnp.transpose(w, (*sorted(own.layer), *own.contracted, *sorted(own.output))).reshape(*lead, k, n)
  contracted, sizes = arrays.places(w.shape, own)
  made: Any = ActiveArray(jnp.swapaxes(values, -1, -2) if outputs else values, jnp.zeros((*lead, n if outputs else k)),
                          None, None, None, contracted, sizes, outputs)
  return arrays.with_axes(made, axes if isinstance(axes, Axes) else None)  # type: ignore[return-value]


def _around(packed: Any) -> ActiveArray:
  """Returns the packed array as the `held` of an `ActiveArray` without thresholds."""
  if not packed.axes or isinstance(packed, ActiveArray):
    raise arrays.Misfit('ActiveArray.of', packed.shape, f'the format {packed.kind!r} does not say which axes are '
                        'contracted, or has thresholds already. Take N:M, blocks, CSC or ELL, or unpack it.')
  lead = packed.shape[:packed.leading]
  size = math.prod(packed.shape[a] for a in packed.axes)
  plain = dataclasses.replace(packed, values=None, **({} if packed.roles is None else {'roles': None}))
  return ActiveArray(packed.values, jnp.zeros((*lead, size)), None, None, plain, tuple(packed.axes),
                     tuple(packed.shape[len(lead):]), roles=packed.roles)
