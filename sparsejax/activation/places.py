"""Finds the products whose inputs, or whose neurons, a rule may skip, and shows what each product is given.

    places, dense = places_of('activation.sparsify', program, params, None, neurons=False)
    steps = walked('activation.sparsify', program, arrays, places)      # stops at each product, `steps.site`
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.programs import jaxprs
from sparsejax.programs.arrangements import Arrangement, arrangement_of
from sparsejax.programs.contractions import Contractions, Use, read
from sparsejax.programs.evaluate import Operation, Walk, rules_at
from sparsejax.programs.gated import GatedLayer, layers_of
from sparsejax.programs.heads import ends
from sparsejax.programs.operands import Site
from sparsejax.programs.structures import Stop
from sparsejax.programs.tracing import Program
from sparsejax.types import Array, Axes, PyTree

Unit = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class SkippableWeight:
  """A `SkippableWeight` is a weight whose inputs are compared: of any product, or `down` of a gated `layer`.

  `uses` are its products with data by number, and `arrangements` show each as a stack of matrices `[L, R, K]`. `gone`
  are the axes that scans slice; each index of them is a unit.
  """

  path: str
  array: Array
  axes: Axes
  uses: Mapping[int, Use]
  arrangements: Mapping[int, Arrangement]
  layer: GatedLayer | None = None

  @property
  def gone(self) -> tuple[int, ...]:
    return self.first.gone

  @property
  def first(self) -> Arrangement:
    return next(iter(self.arrangements.values()))

  @property
  def address(self) -> jaxprs.Address:
    """The operation at which the weight is skipped in: of a gated layer, the one that takes the activation."""
    return next(iter(self.uses.values())).address if self.layer is None else self.layer.address

  @property
  def units(self) -> list[Unit]:
    return [(self.path, unit) for unit in itertools.product(*(range(self.array.shape[a]) for a in self.gone))]

  def part(self, unit: Unit) -> Array:
    """Returns one layer of the weight."""
    picked = dict(zip(self.gone, unit[1]))
    return self.array[tuple(picked.get(a, slice(None)) for a in range(self.array.ndim))]

  def stack(self, unit: Unit) -> Array:
    """Returns one layer of the weight as `[L, R, K]`."""
    return self.first.stack(self.part(unit))

  def joined(self, found: Mapping[Unit, Any]) -> np.ndarray:
    """Returns one array `[*layers, ...]` from the arrays `[L, ...]` of all units."""
    sizes = [self.array.shape[a] for a in self.axes.layer]
    each = [np.asarray(found[unit]) for unit in self.units]
    left = [self.axes.layer.index(a) for a in self.gone]
    rest = [n for i, n in enumerate(sizes) if i not in left]
    stack = np.stack(each).reshape(*(sizes[i] for i in left), *rest, *each[0].shape[1:])
    return np.moveaxis(stack, range(len(left)), left)

  def spread(self, thresholds: Any, number: int) -> Array:
    """Returns thresholds `[L, K]` with dimensions that broadcast to the operand of the product `number`."""
    own, use = self.arrangements[number], self.uses[number]
    numbers = jaxprs.dot_numbers(own.eqn)
    mine, weight = numbers[1 - use.operand], numbers[use.operand]
    part = [n for a, n in enumerate(self.array.shape) if a not in own.gone]
    full = own.operand(own.part(jnp.broadcast_to(jnp.asarray(thresholds)[:, None], own.shape), part))
    paired = sorted(zip(mine.batch + mine.contracted, weight.batch + weight.contracted))
    kept = sorted(w for _, w in paired)
    full = full[tuple(slice(None) if i in kept else 0 for i in range(full.ndim))]
    shape = [1] * len(own.eqn.invars[1 - use.operand].aval.shape)
    for m, w in paired:
      shape[m] = full.shape[kept.index(w)]
    return jnp.transpose(full, [kept.index(w) for _, w in paired]).reshape(shape)


Weights = Mapping[str, SkippableWeight]  # by path


def places_of(function: str, program: Program, params: PyTree, where: Any, neurons: bool
              ) -> tuple[dict[str, SkippableWeight], dict[str, str]]:
  """Returns the places by path, in the order of the program, and the reason for each product that is left dense.

  Without `where`, all products with data are taken, but for the head, look-ups and those that cannot be: the reasons
  tell. A parameter that `where` picks and that has no such product is refused. With `neurons`, the paths are those of
  `down` of gated layers.
  """
  found, layers = read(program), {layer.down: layer for layer in layers_of(program)} if neurons else {}
  if neurons and not layers:
    raise ValueError(f'{function}: the program has no gated layer, down(act(gate(x)) * up(x)) or down(act(gate(x))), '
                     'with three parameters of their own. Take a rule for inputs, as activation.teal(0.5).')
  leaves, default = dict(zip(*trees.flatten(params)[:2])), trees.default_where(found)
  if where is None and not any(default(path, leaf) for path, leaf in leaves.items() if hasattr(leaf, 'dtype')):
    raise ValueError(f'{function}: the program multiplies no matrix of floats among its parameters with data as it is. '
                     'Weights that are computed first, from integers for example, have no inputs to skip.')
  picked = dict(zip(leaves, trees.select(function, default if where is None else where, params)))
  eqns = dict(jaxprs.equations(program))
  made: dict[str, Any] = {}
  left_out = 'left out by `where`' if where is not None else 'looked up too, or no matrix of floats'
  for path in [path for path in found if not neurons or path in layers]:
    made[path] = _place(found, eqns, path, leaves[path], layers.get(path)) if picked[path] else left_out
  if where is None and not neurons:
    head = _head(program, found)
    made |= {head: 'the last product of the program'} if head in made and len(made) > 1 else {}
  elif where is not None:
    _refuse(function, {path: own for path, own in made.items() if picked[path]}, picked, leaves)
  dense = {path: own for path, own in made.items() if isinstance(own, str)}
  places = {path: own for path, own in made.items() if not isinstance(own, str)}
  if not places:
    reasons = '; '.join(f'{path}: {why}' for path, why in dense.items())
    raise ValueError(f'{function}: no product of the program can skip inputs. {reasons}.')
  for path, place in places.items():
    if place.layer is not None and place.layer.at_zero != 0:
      raise errors.at_leaf(function, path, place.array.shape, f'the activation of {place.layer.name} is '
                           f'{place.layer.at_zero} at zero, not 0, at {place.layer.place}: a neuron that is switched '
                           'off is not zero there. Leave the layer out of `where`, or take a rule for inputs.')
  return places, dense


def refuse_unfit(function: str, rule: Any, places: Weights) -> None:
  """Raises one `ValueError` that lists the weights which a number of the rule exceeds, such as the k of `top_k`."""
  problems = [errors.Problem(path, place.array.shape, why) for path, place in places.items()
              if (why := rule.unfit(place.first.shape))]
  if problems:
    raise errors.at_leaves(function, problems)


def _refuse(function: str, made: Mapping[str, Any], picked: Mapping[str, bool], leaves: Mapping[str, Any]) -> None:
  absent = 'no product of the program has inputs to skip in it. Leave it out of `where`.'
  reasons = {path: made.get(path, absent) for path, pick in picked.items() if pick}
  problems = [errors.Problem(path, leaves[path].shape, why) for path, why in reasons.items() if isinstance(why, str)]
  if problems:
    raise errors.at_leaves(function, problems)


def _place(found: Contractions, eqns: Mapping[Any, Any], path: str, array: Array, layer: GatedLayer | None) -> Any:
  """Returns the place of a parameter, or the reason why it has none."""
  uses = {i: use for i, use in enumerate(found.uses[path]) if use.data}
  if path in found.ambiguous or not uses:
    return found.ambiguous.get(path, 'no product takes it with data')
  axes = found[path]
  made: dict[int, Any] = {i: arrangement_of(use, eqns[use.address], array.shape) for i, use in uses.items()}
  problem = next((own for own in made.values() if isinstance(own, str)), '')
  if not problem and any(eqns[use.address].primitive.name != 'dot_general' for use in uses.values()):
    problem = 'it is no plain product of matrices; a convolution or a ragged product reads all of it'
  if not problem and len({own.gone for own in made.values()}) > 1:
    problem = 'products take different layers of it at once'
  if not problem and any(len(use.view.loops) != len(made[i].gone) for i, use in uses.items()):
    problem = 'the program picks layers of it by a number; scan over the layers'
  if not problem and sorted(axes.layer) != list(range(len(axes.layer))):
    problem = f'its axes {axes.layer} of a stack do not come first'
  if not problem and layer is not None:
    problem = _unlike(layer, uses, next(iter(made.values())), eqns)
  return problem or SkippableWeight(path, array, axes, uses, made, layer)


def _unlike(layer: GatedLayer, uses: Mapping[int, Use], own: Arrangement, eqns: Mapping[Any, Any]) -> str:
  """Returns why the neurons of a layer are not the last axis of its activation, or an empty string."""
  operand = 1 - layer.down_use.operand
  numbers, shape = jaxprs.dot_numbers(own.eqn)[operand], own.eqn.invars[operand].aval.shape
  if len(uses) > 1:
    return 'several products take it'
  if own.shape[0] != 1 or numbers.contracted != (len(shape) - 1,):
    return 'its neurons are not the last axis of the activation'
  if eqns[layer.address].invars[layer.operand].aval.shape != shape:
    return 'the program moves the activation between gate and down'
  return '' if layer.up_use is None or layer.up_use.view.loops == layer.down_use.view.loops else (
      'up and down lie in different loops')


def _head(program: Program, found: Contractions) -> str | None:
  """Returns the path of the parameter in the last product with data, if the product ends the program."""
  uses = [(use.address, path) for path, uses in found.uses.items() for use in uses if use.data]
  address, path = max(uses, default=((), None))
  return path if address in ends(program) else None


class Seen(NamedTuple):
  """A `Seen` is one product of a unit while the program runs.

  `x`: the operand that is compared, an activation for rules of neurons. `up`: the product that multiplies the
  activation, or `None`. `rows(array, valid)` returns an array like `x` as rows `[L, T, K]`, and which of them count,
  `bool[L, T]` or `None`. `answered(x)` returns the results of the operation with another `x`.
  """

  place: SkippableWeight
  number: int
  unit: Unit
  x: Array
  up: Array | None
  site: Site
  answered: Callable[[Array], list[Any]]

  def rows(self, array: Array, valid: Array | None = None) -> tuple[Array, Array | None]:
    own = dataclasses.replace(self.place.arrangements[self.number], eqn=self.site.eqn)
    return own.rows(array, self.site.others, valid)


def walked(function: str, program: Program, arrays: Sequence[Any], places: Weights) -> Walk:
  """Returns a walk through a program that stops with a `Seen` at each product, layer by layer.

  An answer is the results of the operation, or `None` for its own. Of a gated layer, the walk stops where the
  activation is taken.
  """
  sites: dict[jaxprs.Address, dict[Any, Any]] = {}
  for place in places.values():
    if place.layer is not None:
      sites[place.layer.address] = {place.path: (place, next(iter(place.uses)))}
    else:
      sites |= {use.address: {(place.path, number): (place, number)} for number, use in place.uses.items()}

  def rule(eqn: Any, values: list[Any], here: Operation) -> Stop:
    (place, number), = sites[here.address].values()
    return Stop(_seen(place, number, eqn, values, here),
                lambda answer: here.dense(values) if answer is None else answer)

  return Walk(program, arrays, rules_at(function, program, sites, rule, keeps=lambda eqn: False))


def _seen(place: SkippableWeight, number: int, eqn: Any, values: list[Any], here: Operation) -> Seen:
  layer, use = place.layer, place.uses[number]
  index = tuple(here.steps[loop] for loop in use.view.loops)
  operand = 1 - use.operand if layer is None else layer.operand
  x = values[operand]
  answered = lambda other: here.dense([other if i == operand else value for i, value in enumerate(values)])
  # The product by which the neurons of a layer are numbered comes later, and has the activation's shape.
  eqn, operands = (eqn, values) if layer is None else (place.arrangements[number].eqn, [x, x])
  up = None if layer is None or layer.up is None else values[1 - operand]
  site = Site(place.path, number, index, here.steps, use, eqn, operands, here.dense)
  return Seen(place, number, (place.path, index), x, up, site, answered)
