"""Defines what all packed arrays share: the interface that `pack`, `io` and the kernels read, and the refusals.

A format of one's own is a registered dataclass of `PackedArray` and one line in `formats.TABLE`:

    packed = formats.NMArray.from_dense(w, 2, 4, axes=0)
    packed.shape, packed.axes, packed.leading   # the dense shape, the contracted axes, how many axes are a stack
    packed.to_dense()                           # `w`, bit for bit

A weight counts as zero if its bits are those of `0.0` or `-0.0`. NaN payloads and subnormals are values and survive.
With `signed_zeros=True`, `-0.0` is a value, too. Without it, `-0.0` is never stored, and becomes `0.0`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours, trees
from sparsejax.arguments import checked
from sparsejax.formats import zeros
from sparsejax.types import Array, Axes, Pattern

static = functools.partial(dataclasses.field, metadata={'static': True})
TABLE: dict[str, type['PackedArray']] = {}  # `formats.TABLE`, for formats that hold another


class Misfit(ValueError):
  """A `Misfit` says that a format cannot store an array; its `why` ends in the remedy."""

  def __init__(self, function: str, shape: tuple[int, ...], why: str):
    super().__init__(f'{function}: array of shape {tuple(shape)}: {why}')
    self.why = why


class PackedArray:
  """A `PackedArray` stores a dense array as several plain arrays; gradients flow to its `values`.

  A format is a registered dataclass of this class. Its fields that are not static are arrays, and a file stores each
  array under the name of its field. Each format says five facts about itself:

  `kind`: the name of the format in files and in `formats.TABLE`.
  `product`: the function of `kernels_pallas` that multiplies with the format; empty if there is none.
  `default_pattern`: the pattern that `kind` alone stands for in `pack`; `None` if `kind` alone says too little.
  `takes_axes`: whether packing needs to know the contracted axes of the array.
  `index_bytes`: the item size of the widest index array in a file.

  `roles`, a static field that defaults to `None`, says what each axis of the dense array means; see `axes_of`.
  """

  kind: ClassVar[str]
  product: ClassVar[str] = ''
  default_pattern: ClassVar[Pattern | None] = None
  takes_axes: ClassVar[bool] = False
  index_bytes: ClassVar[int] = 4

  roles: Axes | None = None  # The axes count from the end, so that leading axes may come and go.
  axes: tuple[int, ...] = ()  # The contracted axes, counted from the end; empty where the format does not know them.

  def __jax_array__(self) -> Array:
    raise ValueError(f'{type(self).__name__} of shape {self.shape} is packed; run kernels_pallas.packed(apply).')

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> np.dtype:
    return self.values.dtype

  @property
  def nbytes(self) -> int:
    """The bytes of all arrays of the format together."""
    return nbytes(self)

  @property
  def pattern(self) -> Pattern | None:
    """The pattern that the zeros of the array keep, without a sparsity, or `None` if the format does not know it."""
    return self.default_pattern

  @property
  def leading(self) -> int:
    """The number of leading dense axes of which each index is a packed array of its own, as in a stack of layers."""
    return 0

  def arrays(self) -> dict[str, Array]:
    """Returns the arrays of the format, by the names of their fields."""
    return {name: getattr(self, name) for name in self.names()}

  @classmethod
  def names(cls) -> list[str]:
    """Returns the names of the fields that are arrays."""
    return [field.name for field in dataclasses.fields(cls) if not field.metadata.get('static')]

  @classmethod
  def fits(cls, pattern: Any) -> bool:
    """Returns whether the format is made for `pattern`: `pack` takes the first format of `formats.TABLE` that fits.

    The default is for formats that are made for all patterns of the type of `default_pattern`, and for no others.
    """
    return cls.default_pattern is not None and isinstance(pattern, type(cls.default_pattern))

  @classmethod
  def from_pattern(cls, w: Array, pattern: Pattern, axes: Axes | None, check: bool = True, signed_zeros: bool = False
                   ) -> Self:
    """Packs `w`, whose zeros keep `pattern`; `axes` is `None` if the format takes none.

    `check=False` packs traced arrays in formats that can; other formats ignore `check`. `signed_zeros` keeps
    `-0.0`, here and in `pays` and `in_blocks`, and is passed only if it is asked. Raises `Misfit` if `w` cannot be
    packed.
    """
    raise NotImplementedError

  @classmethod
  def pays(cls, w: Array, pattern: Pattern, axes: Axes | None, signed_zeros: bool = False) -> bool:
    """Returns whether `pack` should take the format for `w`, or else try the next format that fits `pattern`."""
    return True

  @classmethod
  def in_blocks(cls, leaf: Any, pattern: Pattern, axes: Axes | None, signed_zeros: bool = False
                ) -> tuple[Self, Iterator[Mapping[str, Array]]]:
    """Packs a leaf of a file, an `io.Stored`, and returns the packed array, and the arrays of `in_files` in blocks.

    Each block holds the next rows of every array by name. The default is for formats that pack a whole leaf. Other
    formats read a block of the leaf when a block is asked for, and return a packed array whose arrays are mere shapes.
    """
    packed = cls.from_pattern(leaf.load(), pattern, axes, **({'signed_zeros': True} if signed_zeros else {}))
    return packed, iter([packed.in_files()])

  @classmethod
  def expected_nbytes(cls, shape: tuple[int, ...], dtype: Any, pattern: Pattern, axes: Axes | None,
                      sparsity: float) -> int:
    """Returns the bytes that a packed array will take, before there are values, for this fraction of zeros."""
    make = lambda w: cls.from_pattern(w, pattern, axes, check=False)
    return nbytes(jax.eval_shape(make, jax.ShapeDtypeStruct(shape, dtype)))

  def in_files(self) -> dict[str, Array]:
    """Returns the arrays that a file stores, by name. The default is for formats that store `arrays` as they are."""
    return self.arrays()

  def described(self) -> dict[str, Any]:
    """Returns what a file must say beside the arrays and the dense shape, as JSON; `restored` reads it."""
    return {}

  @classmethod
  def restored(cls, parts: Mapping[str, Array], shape: tuple[int, ...], about: Mapping[str, Any]) -> Self:
    """Returns the packed array of the arrays `parts` of `in_files`; `about` holds the entries of `described`.

    Raises `ValueError` if `about` cannot describe any array of this shape.
    """
    return cls(**parts, shape=shape)

  def to_dense(self) -> Array:
    """Returns the dense array, bit for bit. Differentiable in `values`."""
    raise NotImplementedError

  def to_dense_over(self, base: Array) -> Array:
    """Returns the dense array with the entries of `base` where the format stores none.

    Formats whose unstored entries mean zero ignore `base`.
    """
    return self.to_dense()

  def problem(self) -> str | None:
    """Returns why this concrete packed array, of an untrusted file, is none that packing makes, or `None`."""
    raise NotImplementedError


class MatrixArray(PackedArray):
  """A `MatrixArray` packs a matrix `[K, N]`, or a stack of matrices, `[..., K, N]`.

  Each format has two static fields. `sizes` is the dense shape without the leading axes of a stack: `vmap` and `scan`
  add and remove leading axes. `axes` lists the contracted axes, counted from the end; merged in this order they make K.
  The remaining axes make N. `matrix_rank` is the number of axes of `values` for each matrix.
  """

  matrix_rank: ClassVar[int]
  takes_axes: ClassVar[bool] = True

  @property
  def shape(self) -> tuple[int, ...]:
    """The dense shape."""
    return (*self.values.shape[:-self.matrix_rank], *self.sizes)

  @property
  def leading(self) -> int:
    return self.values.ndim - self.matrix_rank

  @property
  def contracted_size(self) -> int:
    """K, the length of the contraction."""
    return math.prod(self.sizes[a] for a in self.axes)

  @property
  def output_sizes(self) -> tuple[int, ...]:
    """The lengths of the axes that are not contracted; their product is N."""
    return tuple(n for a, n in enumerate(self.sizes) if a - len(self.sizes) not in self.axes)

  @jax.jit
  def to_dense(self) -> Array:
    sizes, lead, scattered = self.sizes, self.leading, self.scattered
    for _ in range(lead):
      scattered = jax.vmap(scattered)
    dense = neighbours.exactly(scattered, self.values, self.coordinates())
    dense = dense.reshape(*dense.shape[:lead], *(sizes[a] for a in self.axes), *self.output_sizes)
    outputs = [a for a in range(-len(sizes), 0) if a not in self.axes]
    order = np.argsort([a + len(sizes) for a in (*self.axes, *outputs)])
    return jnp.transpose(dense, (*range(lead), *(lead + order)))

  def coordinates(self) -> Any:
    """Returns where each of the `values` belongs in its matrix, in the form that `scattered` reads, with all layers."""
    raise NotImplementedError

  def scattered(self, values: Array, coordinates: Any) -> Array:
    """Returns one matrix `[K, N]` with its `values`, or their bits, at its `coordinates`, and zeros elsewhere.

    Reads no array of `self`. `to_dense` maps the function over the layers of a stack.
    """
    raise NotImplementedError

  def described(self) -> dict[str, Any]:
    return {'axes': [a + self.ndim for a in self.axes], 'stacked': self.leading}

  @classmethod
  def restored(cls, parts, shape, about):
    return cls(**parts, **cls.matrix_fields(shape, about))

  @classmethod
  def matrix_fields(cls, shape: tuple[int, ...], about: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the fields `axes` and `sizes` from the entries of `described` in `about`. Raises `ValueError`."""
    axes, lead = about['axes'], about['stacked']
    refuse_other_numbers([lead, *axes])
    if lead < 0 or not axes or not set(axes) < set(range(lead, len(shape))) or len(set(axes)) < len(axes):
      raise ValueError(f'cannot be {cls.kind} along the axes {axes} of shape {shape}, of which {lead} are of a stack')
    return {'axes': tuple(a - len(shape) for a in axes), 'sizes': tuple(shape[lead:])}


def refuse_other_numbers(numbers: Iterable[Any]) -> None:
  """Raises `ValueError` if one of the `numbers` that a file says is no whole number: JSON has fractions, too."""
  wrong = [n for n in numbers if type(n) is not int]
  if wrong:
    raise ValueError(f'has {wrong[0]!r} in the place of a whole number')


def axes_of(packed: PackedArray) -> Axes | None:
  """Returns what each axis of the dense array means, and who said so, or `None` if the packed array does not know.

  Axes are counted from the front. Leading axes that came after packing are layers.
  """
  if packed.roles is None:
    return None
  *groups, layer = (tuple(a + packed.ndim for a in group if a + packed.ndim >= 0) for group in packed.roles[:4])
  known = {a for group in (*groups, layer) for a in group}
  return Axes(*groups, (*(a for a in range(packed.ndim) if a not in known), *layer), packed.roles.source)


def with_axes(packed: PackedArray, axes: Axes | None) -> PackedArray:
  """Returns `packed` with `axes`, counted from the front, on record. Formats without the field `roles` keep none."""
  if axes is None or 'roles' not in {field.name for field in dataclasses.fields(packed)}:
    return packed
  groups = (tuple(a - packed.ndim for a in group) for group in axes[:4])
  return dataclasses.replace(packed, roles=Axes(*groups, axes.source))


@checked
def nbytes(tree: Any) -> int:
  """Returns the bytes of all arrays in `tree`, packed or not; a number is the array that JAX makes of it."""
  for path, leaf in zip(*trees.flatten(tree)[:2]):
    if not hasattr(leaf, 'dtype') and not isinstance(leaf, (bool, int, float, complex)):
      raise ValueError(f'formats.nbytes: leaf {path!r} is no array and no number, but {type(leaf).__name__}.')
  size = lambda x: (x.dtype if hasattr(x, 'dtype') else jax.dtypes.result_type(x)).itemsize
  return sum(math.prod(np.shape(x)) * size(x) for x in jax.tree.leaves(tree))


def contracted_axes(function: str, w: Array, axes: Axes | int | tuple[int, ...]) -> tuple[int, ...]:
  """Returns the contracted axes of `w`, counted from the front. Raises `ValueError` if `w` has no such axes."""
  axes = axes.contracted if isinstance(axes, Axes) else (axes,) if isinstance(axes, int) else tuple(axes)
  if not all(-w.ndim <= a < w.ndim for a in axes) or len({a % w.ndim for a in axes}) != len(axes):
    raise ValueError(f'{function}: axes {axes} are not different axes of an array of shape {tuple(w.shape)}.')
  return tuple(a % w.ndim for a in axes)


def matrix_axes(function: str, w: Array, axes: Axes | int | tuple[int, ...]) -> Axes:
  """Returns the contracted, output and layer axes of `w`, counted from the front.

  Spatial axes of length one, as of a 1x1 convolution, become contracted axes. If `axes` are not `Axes`, all axes that
  are not contracted are outputs.
  """
  if isinstance(axes, Axes):
    taps = tuple(a for a in axes.spatial if w.shape[a] == 1)
    front = lambda group: contracted_axes(function, w, tuple(group))
    return Axes(front((*taps, *axes.contracted)), front(axes.output), front(a for a in axes.spatial if a not in taps),
                front(axes.layer), axes.source)
  contracted = contracted_axes(function, w, axes)
  return Axes(contracted, tuple(a for a in range(w.ndim) if a not in contracted))


def from_end(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
  """Returns `axes`, counted from the front of `rank` axes, counted from the end."""
  return tuple(a - rank for a in axes)


def matrix_sizes(shape: tuple[int, ...], axes: Axes) -> tuple[int, int, int]:
  """Returns the number of layers, K and N of an array of `shape`."""
  layers, k, n = (math.prod(shape[a] for a in group) for group in (axes.layer, axes.contracted, axes.output))
  return layers, k, n


def as_matrices(w: np.ndarray, axes: Axes) -> np.ndarray:
  """Returns `w` as `[layers, K, N]`, for `axes` of `matrix_axes`."""
  return np.transpose(w, (*axes.layer, *axes.contracted, *sorted(axes.output))).reshape(matrix_sizes(w.shape, axes))


def places(shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the fields `axes` and `sizes` of a `MatrixArray` of this dense `shape`."""
  return from_end(axes.contracted, len(shape)), tuple(shape[len(axes.layer):])


def stored_entries(w: Array | np.ndarray, mask: Array | None = None, signed_zeros: bool = False) -> np.ndarray:
  """Returns which entries of `w` are stored, as a bool array on the host: `mask`, or else where `w` is not zero."""
  if mask is not None:
    return np.asarray(mask)
  w = np.asarray(w)
  if w.dtype.kind == 'f' and not signed_zeros:
    return w != 0  # NumPy compares only its own dtypes fast
  bits = w.view(f'u{w.dtype.itemsize}')
  stored, negative = bits != 0, zeros.minus_zero(w.dtype)
  if negative and not signed_zeros:
    stored &= bits != negative
  return stored


def entries_at(w: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns the entries of `w` at a mask, in row-major order: twice as fast as `w[kept]`, where few are kept."""
  return w.reshape(-1)[np.flatnonzero(kept)]


def with_layers(parts: Iterable[Any], shape: tuple[int, ...], axes: Axes) -> list[Array]:
  """Returns an array for each of `parts`, which hold one array for each layer, with the layers of the dense `shape`."""
  return [jnp.asarray(np.reshape(part, (*(shape[a] for a in axes.layer), *np.shape(part)[1:]))) for part in parts]


def as_rows(index: np.ndarray) -> np.ndarray:
  """Returns `[..., n]` as `[rows, n]`; n may be 0."""
  return index.reshape(math.prod(index.shape[:-1]), index.shape[-1])
