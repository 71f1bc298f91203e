"""Switches neurons of gated layers off in any JAX function, in loops and under derivatives too: `ruled`.

    apply = ruled(model.apply, top_k(16))                 # trains as before: gradients flow through kept activations
    apply = ruled(model.apply, cats(0.5), thresholds)     # thresholds by path of `down`, as `sparsify` finds them

The operation that takes the activation gets it with zeros for the neurons that are off. Other uses of the activation
see it whole. Thresholds of a scan over layers are sliced with the weights of `up`, or of `down` in a plain layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax import ranking
from sparsejax.activation.places import Weights, places_of, refuse_unfit
from sparsejax.activation.rules import Rule, TopNeurons
from sparsejax.arguments import checked
from sparsejax.programs import jaxprs
from sparsejax.programs.evaluate import Operation, ValueRules, evaluate, rules_at
from sparsejax.programs.tracing import Program, trace
from sparsejax.types import Array, Predicate, PyTree

FUNCTION = 'activation.ruled'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Marked:
  """A `Marked` is an array of a program that carries the thresholds of the layer in which it will be used."""

  array: Array
  thresholds: Array


@checked
def ruled(apply: Callable[..., Any], rule: Rule | TopNeurons, thresholds: Mapping[str, Any] | None = None, *,
          where: Predicate | PyTree | None = None) -> Callable[..., Any]:
  """Returns `apply` with a rule for neurons on its gated layers; parameters, arguments and results stay as they are.

  `thresholds` has an array `[*layers, F]` for the path of `down` of each layer; `top_k` needs none. `where` picks
  layers by the path of `down`. The mask has no gradient, so that gradients flow through kept activations alone.
  Raises `ValueError` where the program has no gated layer, and for an activation that is not zero at zero. Raises
  `ValueError` for a `top_k` of more neurons than a layer has, and for thresholds of another model.
  """
  if not isinstance(rule, (Rule, TopNeurons)) or isinstance(rule, Rule) and not rule.neurons:
    raise ValueError(f'{FUNCTION}: the rule must be one for neurons, as in activation.top_k(16) or activation.cats(0.5)'
                     '; thresholds of inputs are in the parameters that activation.sparsify returns.')
  if isinstance(rule, Rule) and thresholds is None:
    raise ValueError(f'{FUNCTION}: {rule.name} needs `thresholds` by the path of `down`; activation.sparsify finds '
                     'them.')

  @functools.wraps(apply)
  def call(params: PyTree, *args: Any, **kwargs: Any) -> Any:
    program = trace(apply, (params, *args), kwargs)
    places, _ = places_of(FUNCTION, program, _abstract(params), where, neurons=True)
    refuse_unfit(FUNCTION, rule, places)
    if thresholds is not None:
      _refuse_others(places, thresholds)
    values = [_marked(places, thresholds or {}, path, array) if argument == 0 else array
              for path, argument, array in zip(program.paths, program.arguments, program.arrays)]
    results = evaluate(program, values, _rules(program, places, rule))
    return program.unflatten([_plain(result) for result in results])

  return call


def _abstract(params: PyTree) -> PyTree:
  """Returns the parameters with zeros for traced arrays: only known values can be found to be NaN."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, 'dtype') else leaf,
                      params)


def _refuse_others(places: Weights, thresholds: Mapping[str, Any]) -> None:
  """Raises `ValueError` for thresholds of another model."""
  for path, place in places.items():
    lead = [place.array.shape[a] for a in sorted(place.axes.layer)]
    wanted = (*lead, place.first.shape[2])
    found = jnp.shape(thresholds[path]) if path in thresholds else None
    if found != wanted:
      raise ValueError(f'{FUNCTION}: the thresholds of {path} must be {list(wanted)}, and are '
                       f'{"absent" if found is None else list(found)}: they are of another model, or of other layers. '
                       'Calibrate again, or pick layers with `where`.')


def _marked(places: Weights, thresholds: Mapping[str, Any], path: str, array: Array) -> Any:
  for place in places.values():
    assert place.layer is not None
    if path == (place.layer.up or place.path) and place.path in thresholds:
      return Marked(array, jnp.asarray(thresholds[place.path], jnp.float32))
  return array


def _plain(value: Any) -> Any:
  return value.array if isinstance(value, Marked) else value


def _rules(program: Program, places: Weights, rule: Any) -> ValueRules:
  """Returns the rules by which a program runs with its neurons switched off."""
  layers = {place.layer.address: place.layer for place in places.values() if place.layer is not None}
  within = rules_at(FUNCTION, program, {address: {layer.name: layer} for address, layer in layers.items()},
                    lambda eqn, values, here: [])

  def operation(eqn: Any, values: list[Any], here: Operation) -> Any:
    arrays = [_plain(value) for value in values]
    marks = [value.thresholds for value in values if isinstance(value, Marked)]
    if here.address in layers:
      operand = layers[here.address].operand
      arrays[operand] = switched(arrays[operand], rule, marks[0] if marks else None)
      return here.dense(arrays)
    if not marks or jaxprs.inner(eqn):
      return None
    return [Marked(result, marks[0]) for result in here.dense(arrays)]

  return dataclasses.replace(
      within, operation=operation, dense=lambda eqn, value, why: _plain(value), unstacked=_unstacked,
      concerns=lambda eqn, values, address: within.concerns(eqn, values, address) or any(
          isinstance(value, Marked) for value in values))


def _unstacked(value: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Returns the arrays that a scan slices, and the function that marks a slice again."""
  if not isinstance(value, Marked):
    return value, lambda array: array
  return (value.array, value.thresholds), lambda pair: Marked(*pair)


def switched(z: Array, rule: Any, thresholds: Array | None = None) -> Array:
  """Returns the activation `z [..., F]` with zeros for the neurons that a rule, with its thresholds `[F]`, skips."""
  if isinstance(rule, TopNeurons):
    sizes = lax.stop_gradient(jnp.abs(z.astype(jnp.float32)))
    kept = ranking.top_n_in_groups(sizes, rule.k, z.shape[-1], z.ndim - 1)
  else:
    limit = jnp.broadcast_to(thresholds, z.shape)  # type: ignore[arg-type]
    kept = ~(lax.stop_gradient(jnp.abs(z.astype(jnp.float32))) < limit)
  return jnp.where(kept, z, jnp.zeros((), z.dtype))
