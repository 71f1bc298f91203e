"""Sums over the units of groups, and masks of weights from masks of units.

A unit is what can be removed together: a neuron, a head, a channel. `sparsejax.structured.groups` reads the groups from
a program. Each layer of a stack has units of its own: a row of units is one layer of a group, or the whole group.

    places = Places.of(groups, {'up/kernel': w, 'down/kernel': v})
    sizes = places.sums([jnp.square(w), jnp.square(v)])      # `float32[rows, units]`, padded with zeros
    masks = places.masks(sizes > 1)                          # one `bool` mask for each leaf
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors
from sparsejax.types import Array, Bound, Predicate

__all__ = ['Places', 'Row', 'UnitAxis', 'belongs']

PRODUCED, CONTRACTED, BESIDE = 'produced', 'contracted', 'beside'
SIDES = (PRODUCED, CONTRACTED, BESIDE)


class Row(NamedTuple):
  """A `Row` is one layer of a group, or a group without layers: `size` units, and the number of the group."""

  group: int
  size: int


class UnitAxis(NamedTuple):
  """A `UnitAxis` says which unit each position on one axis of a leaf belongs to: `labels`, `int[n]`, -1 for none.

  `leaf`: the number of the leaf. `row`: the first row of the group. `layers`: the number of layers, along the
  first axis of the leaf, or `None`. `side`: 'produced', 'contracted' or 'beside', as in `structured.Member`.
  """

  leaf: int
  axis: int
  labels: np.ndarray
  row: int
  layers: int | None
  side: str


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
  """The `Places` of groups are where the units of the groups lie in some leaves.

  `names`: the groups. `rows`: the rows of units. `paths`, `shapes`: paths and shapes of the leaves.
  """

  names: tuple[str, ...]
  rows: tuple[Row, ...]
  places: tuple[UnitAxis, ...]
  paths: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]

  @classmethod
  def of(cls, groups: Mapping[str, Any], arrays: Mapping[str, Any]) -> 'Places':
    """Returns the places of the units of `groups` in the leaves `arrays`.

    A leaf belongs to the parameter of its own path, or to the one parameter whose path ends in the path of the leaf: a
    program of Flax may read `params/up/kernel`, while the optimizer sees `up/kernel`. Statistics that are not among the
    leaves are left out. Raises `ValueError` for a weight that is not, and for a leaf of another shape.
    """
    rows: list[Row] = []
    places: list[UnitAxis] = []
    owner = _owners(groups, arrays)
    for number, group in enumerate(groups.values()):
      first = len(rows)
      rows += [Row(number, group.size)] * (group.layers or 1)
      for member in group.members:
        if member.path not in owner:
          continue
        leaf = owner[member.path]
        places += [UnitAxis(leaf, member.axis, labels, first, group.layers, member.side) for labels in member.labels]
    return cls(tuple(groups), tuple(rows), tuple(places), tuple(arrays), tuple(tuple(w.shape) for w in arrays.values()))

  @property
  def width(self) -> int:
    """The number of units in the longest row."""
    return max((row.size for row in self.rows), default=0)

  @functools.cached_property
  def real(self) -> np.ndarray:
    """The entries of `[rows, units]` that are units, and not padding: `bool[rows, units]`."""
    return np.arange(self.width) < np.array([[row.size] for row in self.rows])

  def sums(self, values: Sequence[Array], sides: Collection[str] = SIDES) -> Array:
    """Returns the sum of `values`, one array for each leaf, over the weights of each unit: `float32[rows, units]`.

    A weight that a unit reaches along two axes of a leaf counts twice. `sides`: the kinds of members that count.
    """
    total = jnp.zeros((len(self.rows), self.width), jnp.float32)
    for place in self.places:
      if place.side in sides:
        total = total.at[place.row:place.row + (place.layers or 1)].add(self._of_place(values[place.leaf], place))
    return total

  def _of_place(self, values: Array, place: UnitAxis) -> Array:
    """Returns the sums over the units at one place, `float32[layers or 1, units]`."""
    kept = (place.axis,) if place.layers is None else (0, place.axis)
    along = tuple(a for a in range(values.ndim) if a not in kept)
    each = _on_each_device(jnp.sum(values.astype(jnp.float32), along)).reshape(-1, len(place.labels))
    to = np.where(place.labels < 0, self.width, place.labels)
    if np.array_equal(to, np.arange(len(to))):
      return jnp.pad(each, ((0, 0), (0, self.width - len(to))))
    return jnp.zeros((len(each), self.width), jnp.float32).at[:, to].add(each, mode='drop')

  def masks(self, keep: Array) -> list[Array]:
    """Returns the mask of each leaf, `True` where no unit that goes has the weight. `keep`: `bool[rows, units]`."""
    found = self.spread(keep, outside=True)
    return [jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(mask, shape)
            for mask, shape in zip(found, self.shapes)]

  def spread(self, factors: Array | np.ndarray, sides: Collection[str] = SIDES, outside: float = 1
             ) -> list[Array | None]:
    """Returns, for each leaf, the product of the factors of its units, to broadcast; `None` without a unit.

    `factors`: `float32[rows, units]`. Positions without a unit have the factor `outside`.
    """
    found: list[Array | None] = [None] * len(self.shapes)
    for place in self.places:
      if place.side in sides:
        own = self._at(factors, place, outside)
        before = found[place.leaf]
        found[place.leaf] = own if before is None else before & own if own.dtype == bool else before * own
    return found

  def _at(self, values: Any, place: UnitAxis, outside: float) -> Array:
    """Returns what each position of a place has in `values`, shaped to broadcast against the leaf."""
    shape, layers, of = self.shapes[place.leaf], place.layers, np if isinstance(values, np.ndarray) else jnp
    own = of.where((place.labels < 0)[None], outside, values[place.row:place.row + (layers or 1), place.labels])
    own = own.astype(values.dtype)
    return own.reshape([n if a == place.axis or a == 0 and layers else 1 for a, n in enumerate(shape)])

  def refuse_shared(self, sides: Collection[str]) -> None:
    """Raises one `ValueError` for all leaves in which units of `sides` share weights: of two axes, or of two groups."""
    axes: dict[int, set[int]] = {}
    for place in self.places:
      if place.side in sides:
        axes.setdefault(place.leaf, set()).add(place.axis)
    shared = [errors.Problem(self.paths[i], self.shapes[i], f'units lie along the axes {sorted(own)}, so '
                             'that a weight is in two units. Leave a group out: pass a dict with the others.')
              for i, own in axes.items() if len(own) > 1]
    if shared:
      raise errors.at_leaves('sparsejax.units', shared)

  def refuse_groups_without(self, glob: str, leaves: Sequence[float]) -> None:
    """Raises `ValueError` for groups that lie in none of the leaves that are not zero in `leaves`."""
    having = {self.rows[place.row].group for place in self.places if leaves[place.leaf]}
    without = [name for number, name in enumerate(self.names) if number not in having]
    if without:
      raise ValueError(f'saliences.matching: {glob!r} matches no weight of {errors.some(without)}. Paths look like '
                       f'{errors.some(self.paths)}. Name others, or leave the groups out: pass a dict with the others.')

  def alive(self, masks: Sequence[Array]) -> Array:
    """Returns which units have a kept weight under the masks of the leaves: `bool[rows, units]`."""
    return self.sums(masks) > 0

  def rows_of(self, keep: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the kept units of each group, by its name, as `bool[rows, units]`: the inverse of `by_name`."""
    found = np.zeros((len(self.rows), self.width), bool)
    for i, row in enumerate(self.rows):
      own = np.asarray(keep[self.names[row.group]])
      first = next(j for j, other in enumerate(self.rows) if other.group == row.group)
      found[i, :row.size] = own if own.ndim == 1 else own[i - first]
    return found

  def by_name(self, keep: Any) -> dict[str, np.ndarray]:
    """Returns `keep`, `bool[rows, units]`, as `structured.cut` takes it: the kept units of each group, by its name."""
    found: dict[str, np.ndarray] = {}
    for number, name in enumerate(self.names):
      own = [i for i, row in enumerate(self.rows) if row.group == number]
      rows = np.asarray(keep)[own, :self.rows[own[0]].size]
      found[name] = rows[0] if len(own) == 1 else rows
    return found


def _on_each_device(x: Array) -> Array:
  """Returns the array unsharded: sums over units of several leaves are added, whatever mesh axes the leaves lie on."""
  sharding = jax.typeof(x).sharding
  if sharding.mesh.empty or not any(sharding.spec):
    return x
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*[None] * x.ndim))


def _owners(groups: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, int]:
  """Maps the path of each parameter of the groups to the number of its leaf, if the leaf is there."""
  number = {path: i for i, path in enumerate(arrays)}
  members = {member.path: member for group in groups.values() for member in group.members}
  found: dict[str, int] = {}
  for path, member in members.items():
    own = [leaf for leaf in arrays if path == leaf or path.endswith(f'/{leaf}')]
    exact = path if path in number else max(own, key=len, default=None)
    if exact is None and member.side == BESIDE:
      continue
    if exact is None:
      raise errors.unknown('sparsejax.units', 'parameter', path, arrays)
    if tuple(arrays[exact].shape) != tuple(member.shape):
      raise errors.at_leaf('sparsejax.units', exact, arrays[exact].shape, f'the groups were read with shape '
                           f'{tuple(member.shape)}. Groups belong to one model; call structured.groups again.')
    found[path] = number[exact]
  return found


def belongs(groups: Mapping[str, Any]) -> Predicate:
  """Returns the predicate `(path, leaf)` of the leaves with units of the groups, as `where=` of a recipe takes it."""
  return Bound(_belongs, (frozenset(member.path for group in groups.values() for member in group.members),))


def _belongs(path: str, leaf: Any, paths: Collection[str]) -> bool:
  floating = jnp.issubdtype(getattr(leaf, 'dtype', np.dtype(int)), jnp.floating)
  return floating and (path in paths or any(other.endswith(f'/{path}') for other in paths))
