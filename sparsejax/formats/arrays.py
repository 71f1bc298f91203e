"""What all packed arrays share: the interface that `pack`, `io` and the kernels rely on, and what refuses a weight.

What counts as zero is the bit pattern of `+0.0`: `-0.0`, NaN payloads and subnormals are values and survive.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours
from sparsejax.types import Array, Axes

static = functools.partial(dataclasses.field, metadata={'static': True})
BY_KIND: dict[str, type['PackedArray']] = {}


class Misfit(ValueError):
  """An array that cannot be stored in a format: `why`, with the remedy."""

  def __init__(self, function: str, shape: tuple[int, ...], why: str):
    super().__init__(f'{function}: array of shape {tuple(shape)}: {why}')
    self.why = why


class PackedArray:
  """A dense array stored as several plain ones; a pytree, of which `values` is the part that gradients flow to.

  A format is a registered dataclass of this class: its fields that are not static are arrays, and a file stores each
  of them under its name. `kind` is the format's name there. `described` is what the file has to say beside the arrays
  and the dense shape, in JSON; `restored` is the way back.
  """

  kind: ClassVar[str]

  def __init_subclass__(cls, kind: str | None = None) -> None:
    if kind is not None:  # as it is for what several formats share
      cls.kind, BY_KIND[kind] = kind, cls

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> np.dtype:
    return self.values.dtype

  @property
  def nbytes(self) -> int:
    """The bytes of all its arrays."""
    return nbytes(self)

  def arrays(self) -> dict[str, Array]:
    """The arrays it consists of, by the names of the fields."""
    return {name: getattr(self, name) for name in self.names()}

  @classmethod
  def names(cls) -> list[str]:
    """The fields that are arrays."""
    return [field.name for field in dataclasses.fields(cls) if not field.metadata.get('static')]

  def described(self) -> dict[str, Any]:
    return {}

  @classmethod
  def restored(cls, parts: Mapping[str, Array], shape: tuple[int, ...], about: Mapping[str, Any]) -> Self:
    """The packed array of these `arrays()`; `about` has what `described` gave. `ValueError` if that is absurd."""
    return cls(**parts, shape=shape)

  def to_dense(self) -> Array:
    """The dense array, bit for bit. Differentiable in `values`."""
    raise NotImplementedError

  def problem(self) -> str | None:
    """Why this concrete packed array is not one that `from_dense` makes, or `None`. For arrays of untrusted files."""
    raise NotImplementedError


class MatrixArray(PackedArray):
  """A matrix `[K, N]`, or a stack of such, `[..., K, N]`, with `stored` axes of `values` for each matrix.

  Every format of it has two static fields. `sizes` is the dense shape without the leading axes of a stack, which may
  come and go (`vmap`, `scan`); `axes` are those of its axes, counted from the end, that are contracted and, in this
  order, make up K. The others make up N.
  """

  stored: ClassVar[int]

  def __init_subclass__(cls, kind: str | None = None, stored: int = 0) -> None:
    super().__init_subclass__(kind)
    cls.stored = stored

  @property
  def shape(self) -> tuple[int, ...]:
    """The dense shape."""
    return (*self.values.shape[:-self.stored], *self.sizes)

  @property
  def contracted(self) -> int:
    """K, the length of the contraction."""
    return math.prod(self.sizes[a] for a in self.axes)

  @property
  def output_sizes(self) -> tuple[int, ...]:
    """The lengths of the axes that are not contracted; N is their product."""
    return tuple(n for a, n in enumerate(self.sizes) if a - len(self.sizes) not in self.axes)

  def to_dense(self) -> Array:
    return _dense(self)

  def places(self) -> Any:
    """Where each of its values is, for `placed`."""
    raise NotImplementedError

  def placed(self, values: Array, places: Any) -> Array:
    """`[..., K, N]` of these `values`, or of their bits, at these `places`; of itself it looks at no array."""
    raise NotImplementedError

  def described(self) -> dict[str, Any]:
    return {'axes': [a + self.ndim for a in self.axes], 'stacked': self.values.ndim - self.stored}

  @classmethod
  def restored(cls, parts, shape, about):
    return cls(**parts, **cls.matrix_of(shape, about))

  @classmethod
  def matrix_of(cls, shape: tuple[int, ...], about: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The fields `axes` and `sizes` that `described` told of in `about`."""
    axes, lead = about['axes'], about['stacked']
    if lead < 0 or not axes or not set(axes) < set(range(lead, len(shape))) or len(set(axes)) < len(axes):
      raise ValueError(f'cannot be {cls.kind} along the axes {axes} of shape {shape}, of which {lead} are of a stack')
    return {'axes': tuple(a - len(shape) for a in axes), 'sizes': tuple(shape[lead:])}


@jax.jit
def _dense(packed: MatrixArray) -> Array:
  sizes, lead = packed.sizes, packed.values.ndim - packed.stored
  whole = neighbours.exactly(packed.placed, packed.values, packed.places())
  whole = whole.reshape(*whole.shape[:lead], *(sizes[a] for a in packed.axes), *packed.output_sizes)
  outputs = [a for a in range(-len(sizes), 0) if a not in packed.axes]
  back = np.argsort([a + len(sizes) for a in (*packed.axes, *outputs)])
  return jnp.transpose(whole, (*range(lead), *(lead + back)))


def of_kind(kind: str) -> type[PackedArray] | None:
  """The format of this name, or `None`."""
  return BY_KIND.get(kind)


def nbytes(tree: Any) -> int:
  """Bytes of all arrays in `tree`, packed or not."""
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


TRACED = ('its values are not known here (traced, or a mere shape), so its zeros cannot be counted. Pack outside of '
           'jit, vmap and grad, or, for N:M, with check=False: then each group keeps its first N nonzeros only.')


def contracted(function: str, w: Array, axes: Axes | int | tuple[int, ...]) -> tuple[int, ...]:
  """The contracted axes, counted from the front."""
  axes = axes.contracted if isinstance(axes, Axes) else (axes,) if isinstance(axes, int) else tuple(axes)
  if not all(-w.ndim <= a < w.ndim for a in axes) or len({a % w.ndim for a in axes}) != len(axes):
    raise ValueError(f'{function}: axes {axes} are not different axes of an array of shape {tuple(w.shape)}.')
  return tuple(a % w.ndim for a in axes)


def matrix_axes(function: str, w: Array, axes: Axes | int | tuple[int, ...]) -> Axes:
  """Contracted, output and layer axes of an array that is used as a matrix, counted from the front."""
  if isinstance(axes, Axes):
    taps = tuple(a for a in axes.spatial if w.shape[a] == 1)  # of a 1x1 convolution
    front = lambda group: contracted(function, w, tuple(group))
    return Axes(front((*taps, *axes.contracted)), front(axes.output), front(a for a in axes.spatial if a not in taps),
                front(axes.layer))
  picked = contracted(function, w, axes)
  return Axes(picked, tuple(a for a in range(w.ndim) if a not in picked))


def matrices(w: np.ndarray, at: Axes) -> np.ndarray:
  """`[layers, K, N]` of an array with the `matrix_axes` `at`."""
  lengths = [math.prod(w.shape[a] for a in axes) for axes in (at.layer, at.contracted, at.output)]
  return np.transpose(w, (*at.layer, *at.contracted, *sorted(at.output))).reshape(lengths)


def matrix_misfit(at: Axes) -> str | None:
  """Why axes, those of `matrix_axes`, do not make a matrix or a stack of such."""
  if at.spatial:
    return f'its spatial axes {at.spatial} are not of length one; only 1x1 convolutions are products of matrices.'
  if sorted(at.layer) != list(range(len(at.layer))):
    return f'its axes {at.layer} of a stack must come first; move them there.'
  if not at.contracted or not at.output:
    return 'a matrix has both contracted and output axes; leave it out of `where`.'
  return None


def dtype_misfit(dtype: np.dtype) -> str | None:
  bits = 8 if jnp.issubdtype(dtype, jnp.bool_) else None
  if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer):
    bits = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits
  if bits not in (8, 16, 32, 64):
    return f'dtype {dtype} cannot be packed; real numbers of 8, 16, 32 and 64 bits can. Leave it out of `where`.'
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    return f'dtype {dtype} would be truncated; set jax_enable_x64, or cast it to 32 bits first.'
  return None


def mask_misfit(w: Array, mask: Array | None) -> str | None:
  if mask is not None and (tuple(mask.shape) != tuple(w.shape) or mask.dtype != bool):
    return f'mask of shape {tuple(mask.shape)} and dtype {mask.dtype} must be bool of the same shape.'
  return None if mask is None or concrete(mask) else TRACED


def host_misfit(w: Array) -> str | None:
  if w.size >= 2**31:
    return 'it has 2^31 weights or more; leave it out of `where`.'
  return dtype_misfit(w.dtype) or (None if concrete(w) else TRACED)


def concrete(w: Array) -> bool:
  return not isinstance(w, (jax.core.Tracer, jax.ShapeDtypeStruct))
