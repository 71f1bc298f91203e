"""Finds which slices of which parameters go together, by reading the program of any JAX function.

A *unit* is a set of slices of parameters that can be removed together: smaller arrays then compute the same as zeros
in these slices. The units of one kind make a *group*: the neurons of a layer, the heads of an attention, the
channels of a residual stream. `docs/words.md` has the nouns.

    found = groups(model.apply, variables, x)
    print(found)                                 # group, units, weights a unit, members, what is pinned and why
    found['params/up/kernel:1'].units[0]         # {'params/up/kernel:1': (0,), 'params/down/kernel:0': (0,)}
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sparsejax import errors, tables
from sparsejax.arguments import checked
from sparsejax.globs import matches
from sparsejax.programs import jaxprs
from sparsejax.programs.contractions import Contractions, read
from sparsejax.programs.tracing import trace
from sparsejax.structured.dimensions import length
from sparsejax.structured.layers import layered
from sparsejax.structured.reading import Reading
from sparsejax.structured.rules import RULES
from sparsejax.types import PyTree
from sparsejax.units import BESIDE, CONTRACTED, PRODUCED


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """A `Member` says which positions of one axis of a parameter belong to which unit of a group.

  `labels` holds one `int[n]` for each place that the group has in the axis: the unit of each position, and -1 for a
  position of no unit. Most axes have one place. `side` is 'contracted' if a product contracts the axis. Other axes of
  such a parameter, and those of a look-up table, are 'produced'. Biases, norms and statistics are 'beside'.
  """

  path: str
  axis: int
  shape: tuple[int, ...]
  labels: tuple[np.ndarray, ...]
  side: str

  @property
  def name(self) -> str:
    return f'{self.path}:{self.axis}'

  def positions(self, unit: int) -> tuple[int, ...]:
    """Returns the positions on the axis that go with a unit."""
    return tuple(int(i) for i in np.flatnonzero(np.any([own == unit for own in self.labels], 0)))

  def kept(self, keep: np.ndarray) -> np.ndarray:
    """Returns which positions of the axis stay, `bool[n]`, if the units `keep`, `bool[units]`, stay.

    `bool[layers, units]` gives `bool[layers, n]`.
    """
    return np.all([(own < 0) | keep[..., own] for own in self.labels], 0)


@dataclasses.dataclass(frozen=True, eq=False)
class UnitGroup:
  """A `UnitGroup` is a set of units of one kind, and the axes of parameters in which the units have positions.

  `name`: the first produced member, such as 'up/kernel:1', or else the first member. A second group of the same axis
  ends in '#2'. `size`: the number of units. `layers`: if the members are stacks for a scan, and each layer may lose
  units of its own, equally many, the number of layers; otherwise `None`.
  """

  name: str
  size: int
  members: tuple[Member, ...]
  layers: int | None = None

  @functools.cached_property
  def units(self) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The units; each maps 'path:axis' to the positions that go together."""
    return tuple({member.name: member.positions(i) for member in self.members} for i in range(self.size))

  @property
  def weights(self) -> int:
    """The number of weights that go with the first unit."""
    masks: dict[str, Any] = {}
    for member in self.members:
      n = member.shape[member.axis]
      masks.setdefault(member.path, []).append((1 - len(member.positions(0)) / n, member.shape))
    return round(sum(np.prod(rows[0][1]) * (1 - np.prod([share for share, _ in rows])) for rows in masks.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Mapping[str, UnitGroup]):
  """Maps the name of each group to the `UnitGroup`, in the order of the parameters. Prints as a table.

  `apply`: the function that was read. `shapes`: the parameters, as `jax.ShapeDtypeStruct`s. `inputs`: the inputs, with
  such structs for arrays. `pinned`: for each axis of a parameter with positions that may not go, the reason. `unread`:
  the operations without a rule, in the program; nothing that goes through them is removed.
  """

  apply: Callable[..., Any]
  shapes: PyTree
  inputs: tuple[Any, ...]
  groups: Mapping[str, UnitGroup]
  pinned: Mapping[str, str]
  unread: tuple[str, ...]

  def __getitem__(self, name: str) -> UnitGroup:
    if name in self.pinned and name not in self.groups:  # of an axis of a group some positions may be pinned
      raise ValueError(f'structured.Groups: the units of {name!r} may not go: {self.pinned[name]}.')
    if name not in self.groups:
      raise errors.unknown('structured.Groups', 'group', name, self.groups)
    return self.groups[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.groups)

  def __len__(self) -> int:
    return len(self.groups)

  def __contains__(self, name: object) -> bool:
    return name in self.groups

  def only(self, *globs: str) -> 'Groups':
    """Returns the groups whose name matches one of `globs`; raises `ValueError` if there is none."""
    picked = {name: group for name, group in self.items() if any(matches(glob, name) for glob in globs)}
    if not picked:
      raise errors.unknown('structured.Groups.only', 'group', ' '.join(globs), self.groups)
    return dataclasses.replace(self, groups=picked)

  def __str__(self) -> str:
    ordered = lambda group: sorted(group.members, key=lambda member: (PRODUCED, CONTRACTED, BESIDE).index(member.side))
    rows = [(group.name, f'{group.size}' + f' in each of {group.layers} layers' * bool(group.layers),
             f'{group.weights:,}', _some(member.name for member in ordered(group))) for group in self.values()]
    lines = [tables.aligned(('group', 'units', 'weights a unit', 'members'), rows, right=(1, 2), rule=False)]
    reasons: dict[str, list[str]] = {}
    for name, why in self.pinned.items():
      reasons.setdefault(why.partition(' (')[0], []).append(name)
    lines += [f'pinned, {why}: {_some(names)}' for why, names in reasons.items()]
    return '\n'.join(lines + [f'no rule: {place}' for place in self.unread])


@checked
def groups(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> Groups:
  """Returns the groups of units that can be removed from the parameters of `apply(params, *inputs)`.

  Nothing is computed; arrays may be `jax.ShapeDtypeStruct`s. Values that are no arrays (`False`, a string) are passed
  to `apply` as they are. Every unit of a group can be removed: `cut` gives smaller parameters and a function that
  computes what `apply` computes with zeros in all positions of the removed units. An axis of which units may not go is
  in `pinned`, with the reason. The axis belongs to an input or to the result, or an operation has no rule. Or removal
  would not be exact, as under a softmax or in a variance of two passes.

  The rule is that of unification: sizes are variables, an operation makes them equal, a reshape splits them into
  products, and a concatenation joins them into sums. Torch-Pruning (Fang et al. 2023, DepGraph) follows dependencies
  between modules instead. OTO (Chen et al. 2021) asks that a zero producer gives zero. This function takes a unit as
  zero in all of its members, and checks every operation on the way.

  `apply` must be deterministic (no dropout): random values depend on the shape. Raises `ValueError` if `params` holds
  no array.
  """
  program = trace(apply, (params, *inputs))
  reading = Reading(program, RULES)
  if not any(argument == 0 for argument in program.arguments):
    raise ValueError('structured.groups: `params` holds no array; pass the parameters as the first argument.')
  reading.run()
  shaped = lambda tree: jax.tree.map(_struct, tree)
  found = _grouped(reading, read(program))
  return Groups(apply, shaped(params), tuple(map(shaped, inputs)), found, _reasons(reading), tuple(
      dict.fromkeys(reading.unread)))


def _some(names: Iterable[str], most: int = 6) -> str:
  names = list(names)
  return ' '.join(names[:most]) + f' and {len(names) - most} more' * (len(names) > most)


def _struct(leaf: Any) -> Any:
  if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype') or isinstance(leaf, np.generic):
    return leaf
  dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if isinstance(leaf, np.ndarray) else leaf.dtype
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _grouped(reading: Reading, uses: Contractions) -> dict[str, UnitGroup]:
  members: dict[int, list[Member]] = {v: [] for v in reading.free()}
  for path, dims in reading.parameters().items():
    shape = tuple(map(length, dims))
    for axis, dim in enumerate(dims):
      for v in reading.variables.leaves(dim):
        if v in members:
          labels = tuple(reading.variables.labels(dim, v))
          members[v].append(Member(path, axis, shape, labels, _side(uses, path, axis)))
  found: dict[str, UnitGroup] = {}
  layers = layered(reading)
  for v, own in members.items():
    first = next((member for member in own if member.side == PRODUCED), own[0]).name
    name = next(name for k in range(1, len(members) + 1) if (name := first + f'#{k}' * (k > 1)) not in found)
    found[name] = UnitGroup(name, reading.variables.sizes[v], tuple(own), layers.get(v))
  return found


def _side(uses: Contractions, path: str, axis: int) -> str:
  """Returns what an axis of a parameter is to the products of the program."""
  if path in uses.axes and axis in uses.axes[path].contracted:
    return CONTRACTED
  return PRODUCED if path in uses or path in uses.lookups else BESIDE


def _reasons(reading: Reading) -> dict[str, str]:
  """Maps each parameter axis with a pinned variable to the reason."""
  found: dict[str, str] = {}
  for path, dims in reading.parameters().items():
    for axis, dim in enumerate(dims):
      for v in reading.variables.leaves(dim):
        if reading.variables.pinned.get(v):
          found.setdefault(f'{path}:{axis}', _worded(*reading.variables.reasons[v]))
  return found


def _worded(why: str, eqn: Any) -> str:
  return why if eqn is None else f'{why} ({jaxprs.place(eqn)})'
