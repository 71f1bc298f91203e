"""Says what look-ups, updates and random values do to dimensions and zeros."""

from typing import Any

from sparsejax.programs import jaxprs, sizes
from sparsejax.programs.follow import Position
from sparsejax.structured.dimensions import Dim
from sparsejax.structured.reading import Reading, Rule, Symbolic

Facts = list[Symbolic]


def _shape(eqn: Any, i: int = 0) -> tuple[int, ...]:
  return eqn.outvars[i].aval.shape


def _gather(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Passes what is picked whole; pins what is indexed. The dimensions of the indices follow."""
  (x, indices), numbers, shape = facts, jaxprs.gather_numbers(eqn), _shape(eqn)
  collapsed, batching = tuple(numbers.collapsed_slice_dims), tuple(numbers.operand_batching_dims)
  why = ('its entries are looked up', eqn)
  lengths, whole = eqn.invars[0].aval.shape, sizes.picked_sizes(eqn)
  for i in range(len(x.dims)):
    if i in collapsed or i not in batching and whole[i] != lengths[i]:
      reading.variables.pin(x.dims[i], why)
  kept = dict(zip(numbers.offset_dims, (i for i in range(len(x.dims)) if i not in collapsed + batching)))
  rows = [j for j in range(len(shape)) if j not in kept]
  for i, k in zip(batching, numbers.start_indices_batching_dims):
    reading.variables.unify(x.dims[i], indices.dims[k], ('', eqn))
  if indices.dims:
    reading.variables.pin(indices.dims[-1], why)
  dims = [x.dims[kept[j]] if j in kept and whole[kept[j]] == lengths[kept[j]] else
          reading.pinned_dim((here.address, j), n, why) if j in kept else indices.dims[rows.index(j)]
          for j, n in enumerate(shape)]
  return [reading.wider(x, dims, [dims[j] for j in rows])._replace(value=x.value)]


def _dynamic_slice(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  x, why = facts[0], ('its entries are picked by an index', eqn)
  dims = [_picked(reading, dim, here, (j, n), why) if n != old else dim for j, (dim, n, old) in enumerate(
      zip(x.dims, _shape(eqn), eqn.invars[0].aval.shape))]
  return [reading.wider(x, dims)]


def _picked(reading: Reading, dim: Dim, here: Position, name: tuple[int, int], why: tuple[str, Any]) -> Dim:
  reading.variables.pin(dim, why)
  return reading.pinned_dim((here.address, name), name[1], why)


def _dynamic_update_slice(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  x, new, why = facts[0], facts[1], ('a part of it is replaced', eqn)
  for a, b, n, m in zip(x.dims, new.dims, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape):
    _paired(reading, a, b, n == m, why)
  return [reading.together((x, new), tuple(map(reading.variables.resolved, x.dims)))]


def _paired(reading: Reading, a: Dim, b: Dim, alike: bool, why: tuple[str, Any]) -> None:
  """Unifies two dimensions that are alike, and pins both otherwise."""
  if alike:
    reading.variables.unify(a, b, why)
    return
  reading.variables.pin(a, why)
  reading.variables.pin(b, why)


def _scatter(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  x, _, new = facts
  numbers, why = sizes.scatter_numbers(eqn), ('some of its entries are replaced', eqn)
  outside = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
  window = [i for i in range(len(x.dims)) if i not in outside]
  shapes = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
  for i, j in zip(window, numbers.update_window_dims):
    _paired(reading, x.dims[i], new.dims[j], shapes[0][i] == shapes[1][j], why)
  for dim in (*(x.dims[i] for i in outside), *facts[1].dims,
              *(dim for j, dim in enumerate(new.dims) if j not in numbers.update_window_dims)):
    reading.variables.pin(dim, why)
  return [reading.together((x, new), tuple(map(reading.variables.resolved, x.dims)))]


def _random(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Pins random values: an array of another shape has other values."""
  return reading.unknown(eqn, facts, here, 'random values depend on the shape; trace the function without randomness')


PICKING: dict[str, Rule] = {
  'gather': _gather, 'dynamic_slice': _dynamic_slice, 'dynamic_update_slice': _dynamic_update_slice,
  **dict.fromkeys(('scatter', 'scatter-add', 'scatter_add', 'scatter-sub', 'scatter-mul', 'scatter_mul'), _scatter),
  **dict.fromkeys(('random_bits', 'random_seed', 'random_wrap', 'random_unwrap', 'random_split', 'random_fold_in',
                   'threefry2x32', 'rng_bit_generator', 'random_gamma', 'random_clone'), _random)}
