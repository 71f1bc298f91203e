"""Tells which parameters of operations name sizes, and runs operations on smaller arrays.

Besides `jaxprs`, only this module knows how JAX names parameters.

An operation such as `reshape` holds the lengths of its result as a parameter. `RESIZED` maps each such operation to a
function that binds the operation anew, with the parameters that belong to the smaller arrays.

    slices(eqn)                                                  # [range(0, 4), range(2, 12, 2)] of a `slice`
    RESIZED['reshape'](eqn, [x], Sizes(operands, [(2, 12)]))     # the `reshape` of a smaller `x`
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.programs import jaxprs
from sparsejax.types import Array


class Sizes(NamedTuple):
  """A `Sizes` says what is kept of the operands and of the results of one operation.

  `operands` and `results` hold, for each array, one `bool[n]` for each of its dimensions: whether an index is kept.
  """

  operands: Sequence[Sequence[np.ndarray]]
  results: Sequence[Sequence[np.ndarray]]


def kept_shape(kept: Sequence[np.ndarray]) -> tuple[int, ...]:
  """Returns the shape of what is kept of an array."""
  return tuple(int(np.count_nonzero(dim)) for dim in kept)


def taken(x: Array, kept: Sequence[np.ndarray]) -> Array:
  """Returns what is kept of a whole array. Raises `ValueError` for an array of another shape."""
  if np.shape(x) != tuple(map(len, kept)):
    raise ValueError(f'sizes.taken: an array of shape {np.shape(x)} is not the whole of shape {tuple(map(len, kept))}; '
                     'the operation before has no function in RESIZED. Please report the program.')
  for axis, dim in enumerate(kept):
    if not dim.all():
      x = jnp.take(x, np.flatnonzero(dim), axis)
  return x


def slices(eqn: Any) -> list[range]:
  """Returns the indices of each dimension that a `slice` keeps."""
  p = eqn.params
  steps = p['strides'] or (1,) * len(p['start_indices'])
  return [range(*each) for each in zip(p['start_indices'], p['limit_indices'], steps)]


def split_sizes(eqn: Any) -> tuple[int, tuple[int, ...]]:
  """Returns the axis of a `split`, and the lengths of its parts."""
  return eqn.params['axis'], tuple(eqn.params['sizes'])


def last_parts(eqn: Any) -> list[range] | None:
  """Returns which indices of the last dimension each result of a `slice` or `split` keeps.

  Returns `None` for other operations, for steps other than 1, and where another dimension loses indices.
  """
  shape = eqn.invars[0].aval.shape if eqn.invars else ()
  if eqn.primitive.name == 'split':
    axis, lengths = split_sizes(eqn)
    ends = list(itertools.accumulate(lengths))
    return [range(end - n, end) for n, end in zip(lengths, ends)] if axis == len(shape) - 1 else None
  if eqn.primitive.name != 'slice' or not shape:
    return None
  *others, last = slices(eqn)
  whole = all(len(kept) == n for kept, n in zip(others, shape))
  return [last] if whole and last.step == 1 else None


def padding(eqn: Any) -> list[tuple[int, int, int]]:
  """Returns how many entries a `pad` adds to each dimension: before, after, and between two entries."""
  return [(int(low), int(high), int(inside)) for low, high, inside in eqn.params['padding_config']]


def along(eqn: Any) -> tuple[int, ...]:
  """Returns the dimensions along which a reduction, a sort, a cumulative operation or a `rev` runs."""
  p = eqn.params
  for name in ('axes', 'dimensions', 'axis', 'dimension'):
    if name in p:
      return tuple(p[name]) if isinstance(p[name], (tuple, list)) else (p[name],)
  return (len(eqn.invars[0].aval.shape) - 1,)


def repeats(eqn: Any) -> tuple[int, ...]:
  """Returns how often a `tile` repeats each dimension."""
  return tuple(eqn.params['reps'])


def iota_dimension(eqn: Any) -> int:
  return eqn.params['dimension']


def windowed(eqn: Any) -> list[bool]:
  """Returns which dimensions a `reduce_window` changes: a window, a stride, padding or dilation does."""
  p = eqn.params
  fields = zip(p['window_dimensions'], p['window_strides'], p['padding'], p['base_dilation'], p['window_dilation'])
  return [(window, stride, *pad, base, wide) != (1, 1, 0, 0, 1, 1) for window, stride, pad, base, wide in fields]


def picked_sizes(eqn: Any) -> tuple[int, ...]:
  """Returns the lengths of what a `gather` or a `dynamic_slice` picks, one for each dimension of the operand."""
  return tuple(eqn.params['slice_sizes'])


def scatter_numbers(eqn: Any) -> Any:
  """Returns the `jax.lax.ScatterDimensionNumbers` of a scatter."""
  return eqn.params['dimension_numbers']


def ragged_numbers(eqn: Any) -> tuple[tuple[int, ...], ...]:
  """Returns the contracted, the batch and the ragged dimensions of a ragged product, and those of its groups.

  In order: contracted of both operands, batch of both operands, ragged of the left one, groups of the right one.
  """
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  return (*map(tuple, (*contracted, *batch)), tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions))


# Operations on smaller arrays.


def _again(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
  results = eqn.primitive.bind(*values, **{**eqn.params, **changed})
  return list(results) if eqn.primitive.multiple_results else [results]


def _reshape(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  return _again(eqn, values, new_sizes=kept_shape(sizes.results[0]))


def _broadcast(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  return _again(eqn, values, shape=kept_shape(sizes.results[0]))


def _slice(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  """Takes the kept entries among the sliced ones, wherever these entries are in the smaller array."""
  x = values[0]
  for axis, (indices, operand, result) in enumerate(zip(slices(eqn), sizes.operands[0], sizes.results[0])):
    places = (np.cumsum(operand) - 1)[np.asarray(indices, int)[result]]
    x = _picked(x, places, axis)
  return [x]


def _picked(x: Array, places: np.ndarray, axis: int) -> Array:
  """Returns the entries at `places`, by a slice if they are neighbours."""
  if np.array_equal(places, np.arange(places[0], places[0] + len(places))):
    return lax.slice_in_dim(x, int(places[0]), int(places[-1]) + 1, axis=axis)
  return jnp.take(x, places, axis)


def _split(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  axis, _ = split_sizes(eqn)
  return _again(eqn, values, sizes=tuple(int(np.count_nonzero(result[axis])) for result in sizes.results))


def _gathered(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  """Picks all that is left of the dimensions that were picked whole."""
  picked, operand = picked_sizes(eqn), sizes.operands[0]
  new = tuple(int(np.count_nonzero(dim)) if n == len(dim) else n for n, dim in zip(picked, operand))
  return _again(eqn, values, slice_sizes=new)


def _tiled(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  pairs = zip(kept_shape(sizes.results[0]), kept_shape(sizes.operands[0]))
  return _again(eqn, values, reps=tuple(result // operand for result, operand in pairs))


def _convolved(eqn: Any, values: Sequence[Any], sizes: Sizes) -> list[Any]:
  numbers = jaxprs.convolution(eqn)
  groups = values[0].shape[numbers.lhs[1]] // values[1].shape[numbers.rhs[1]]
  return _again(eqn, values, feature_group_count=groups)


def with_kernel(eqn: Any, x: Any, weight: Any) -> Any:
  """Returns the convolution of `eqn` with a kernel that has another number of outputs."""
  return _again(eqn, [x, weight])[0]


def at_center(eqn: Any, x: Any, weight: Any) -> Any:
  """Returns the convolution of `eqn` with a kernel of one tap, which stands where the centre of the old kernel stood.

  Of an even length, the centre is the tap before the middle.
  """
  numbers = jaxprs.convolution(eqn)
  lengths = [eqn.invars[1].aval.shape[i] for i in numbers.rhs[2:]]
  before = [(n - 1) // 2 * apart for n, apart in zip(lengths, numbers.apart)]
  after = [(n - 1) * apart - b for n, apart, b in zip(lengths, numbers.apart, before)]
  padding = tuple((low - b, high - a) for (low, high), b, a in zip(numbers.padding, before, after))
  return _again(eqn, [x, weight], padding=padding)[0]


Resized = Callable[[Any, Sequence[Any], Sizes], list[Any]]
RESIZED: dict[str, Resized] = {
  'reshape': _reshape, 'broadcast_in_dim': _broadcast, 'slice': _slice, 'split': _split, 'gather': _gathered,
  'dynamic_slice': _gathered, 'tile': _tiled, 'conv_general_dilated': _convolved}
