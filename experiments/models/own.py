"""Takes in models of the user's own: Flax Linen, Flax NNX, Equinox and plain JAX, without a change to the models.

    config.model = lambda key: CNN(rngs=nnx.Rngs(key))                  # NNX
    config.model = lambda key: CNN(key)                                 # Equinox
    config.model = CNN(features=8)                                      # Flax Linen
    config.model = (init, apply)                                        # init(key) -> params, apply(params, inputs)

Parameters keep the paths that they have in the user's model, such as `layers/0/weight`, so `where` names them as usual.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from experiments import configs
from sparsejax import trees
from sparsejax.types import Array, PyTree

KINDS = ('a Flax Linen module, a function key -> NNX or Equinox module, or a pair (init, apply) with '
         'init(key) -> params and apply(params, inputs) -> outputs')


class Adapted(NamedTuple):
  """An `Adapted` is a model with the two methods of a Linen module that training calls; parameters are nested dicts."""

  init: Callable[[Array, Array], Mapping[str, PyTree]]  # (key, inputs) -> {'params': params}
  apply: Callable[[Mapping[str, PyTree], Array], Array]  # ({'params': params}, inputs) -> outputs


def adapted(given: Any) -> Adapted:
  """Returns the model `given` in the form that training calls; `given` may be wrapped in a `configs.Own`.

  An Equinox module is called on one example, under `jax.vmap`, as Equinox's own layers require. Give a pair (init,
  apply) to call a model otherwise. Raises `ValueError` for anything that is no model, and for a model with state
  besides its parameters, such as running statistics. If the model fails, the `ValueError` holds the model's error.
  """
  given = given.value if isinstance(given, configs.Own) else given
  model = _calling('the model', lambda: _adapted(given))
  return Adapted(lambda key, inputs: _with_parameters(_calling('init', lambda: model.init(key, inputs))),
                 lambda variables, inputs: _calling('apply', lambda: model.apply(variables, inputs)))


def _adapted(given: Any) -> Adapted:
  if isinstance(given, nn.Module):
    return _linen(given)
  if isinstance(given, tuple | list) and len(given) == 2 and all(map(callable, given)):
    return _functional(*given)
  if not callable(given) or isinstance(given, type) and issubclass(given, nn.Module):
    raise ValueError(f'models.own: {given!r} is no model; give {KINDS}.')
  made = given(jax.random.key(0))
  if isinstance(made, nn.Module):
    return _linen(made)
  if isinstance(made, nnx.Module):
    return _nnx(given)
  if not callable(made):
    raise ValueError(f'models.own: the function returns {type(made).__name__}, which is no model; give {KINDS}.')
  return _functional(given, lambda model, inputs: jax.vmap(model)(inputs))


def _linen(module: nn.Module) -> Adapted:
  def init(key: Array, inputs: Array) -> Mapping[str, PyTree]:
    variables = module.init(key, inputs)
    _refuse_state(set(variables) - {'params'})
    return {'params': variables['params']}

  return Adapted(init, module.apply)


def _nnx(make: Callable[[Array], nnx.Module]) -> Adapted:
  graph, first, rest = nnx.split(make(jax.random.key(0)), nnx.Param, ...)
  _refuse_state({type(leaf).__name__ for _, leaf in nnx.to_flat_state(rest)})
  names, _, treedef = trees.flatten(first)

  def init(key: Array, inputs: Array) -> Mapping[str, PyTree]:
    return {'params': _nested(dict(zip(names, jax.tree.leaves(nnx.split(make(key), nnx.Param, ...)[1]))))}

  def apply(variables: Mapping[str, PyTree], inputs: Array) -> Array:
    flat = _flat(variables['params'])
    return nnx.merge(graph, treedef.unflatten([flat[name] for name in names]))(inputs)

  return Adapted(init, apply)


def _functional(make: Callable[[Array], PyTree], call: Callable[[PyTree, Array], Array]) -> Adapted:
  """Returns the model whose parameters are the floating arrays of the pytree `make(key)`; all else stays as it is."""
  names, leaves, treedef = trees.flatten(make(jax.random.key(0)))
  chosen = {name for name, leaf in zip(names, leaves) if _is_parameter(leaf)}
  rest = dict(zip(names, leaves))

  def init(key: Array, inputs: Array) -> Mapping[str, PyTree]:
    made = dict(zip(names, jax.tree.leaves(make(key))))
    return {'params': _nested({name: leaf for name, leaf in made.items() if name in chosen})}

  def apply(variables: Mapping[str, PyTree], inputs: Array) -> Array:
    whole = rest | _flat(variables['params'])
    return call(treedef.unflatten([whole[name] for name in names]), inputs)

  return Adapted(init, apply)


def _calling(what: str, function: Callable[[], Any]) -> Any:
  """Returns `function()`, which runs the user's code. Raises `ValueError` with the error for whatever it raises."""
  try:
    return function()
  except Exception as error:
    if str(error).startswith('models.own: '):
      raise
    raise ValueError(f'models.own: {what} failed with {type(error).__name__}: {error}') from error


def _with_parameters(variables: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
  if not jax.tree.leaves(variables['params']):
    raise ValueError('models.own: the model has no floating parameter, so that there is nothing to train.')
  return variables


def _refuse_state(kinds: set[str]) -> None:
  if kinds:
    raise ValueError(f'models.own: the model has state besides its parameters ({", ".join(sorted(kinds))}), '
                     'which training would lose. Use a norm without running statistics, and no dropout.')


def _is_parameter(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts: the entry of `flat` at `a/b` is the entry `b` of the entry `a`."""
  nested: dict[str, Any] = {}
  for name, leaf in flat.items():
    *sections, last = name.split('/')
    inner = nested
    for section in sections:
      inner = inner.setdefault(section, {})
    inner[last] = leaf
  return nested


def _flat(nested: PyTree) -> dict[str, Any]:
  names, leaves, _ = trees.flatten(nested)
  return dict(zip(names, leaves))
