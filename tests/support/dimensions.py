"""Lists all partners of a recipe: every optimizer and wrapper of optax, every container of parameters, every mesh.

The product of the lists with `recipes.TABLE` is the conformance table (`test_product`). An optimizer of a new optax is
listed at once if it needs nothing but a learning rate. `test_every_name_of_optax_is_in_the_table` asks for all others.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cases
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

from sparsejax import trees

SHAPES = {'stack': {'kernel': cases.F32((64, 8)), 'bias': cases.F32((8,))}, 'norm': {'scale': cases.F32((8,))}}

# Optimizers: functions from a recipe, which takes an optimizer, to the transform that a user would hold.

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]
on_matrices = functools.partial(jax.tree.map, lambda w: w.ndim > 1)
on_rest = functools.partial(jax.tree.map, lambda w: w.ndim < 2)
RATE = 0.1


def _inside(*members: optax.GradientTransformation) -> Callable[[Wrap], optax.GradientTransformation]:
  return lambda recipe: recipe(optax.chain(*members) if len(members) > 1 else members[0])


def public() -> dict[str, Any]:
  """Returns every public name of optax that returns a transform."""
  found = {}
  for module in (optax, contrib):
    for name in (name for name in dir(module) if not name.startswith('_') and name not in found):
      thing = getattr(module, name)
      if inspect.isfunction(thing) and 'GradientTransformation' in str(inspect.signature(thing).return_annotation):
        found[name] = thing
  return found


# Public names that have no entry, and why.
LEFT_OUT = {
    'lookahead': 'its parameters are pairs, of which it averages one into the other after the recipe',
    'differentially_private_aggregate': 'takes gradients with a batch axis; it goes before the recipe in a chain',
    'dpsgd': 'the same, and then sgd',
    'inject_stateful_hyperparams': 'another name of inject_hyperparams',
    'scale_by_muon': 'the part of muon that takes nothing but matrices',
}


def _automatic() -> dict[str, Callable[[Wrap], optax.GradientTransformation]]:
  """Returns the transforms that need nothing or a learning rate: optimizers alone, their parts before a step."""
  made = {}
  for name, function in public().items():
    if name in LEFT_OUT:
      continue
    needed = [p.name for p in inspect.signature(function).parameters.values()
              if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_rate = 'learning_rate' in inspect.signature(function).parameters
    if takes_rate and needed in ([], ['learning_rate']):
      made[name] = lambda recipe, f=function: recipe(f(learning_rate=RATE))
    elif not needed:
      made[name] = lambda recipe, f=function: recipe(optax.chain(f(), optax.scale(-RATE)))
  return made


def _by_kind(params: Any) -> Any:
  return jax.tree.map(lambda w: 'matrices' if w.ndim > 1 else 'rest', params)


OPTIMIZERS = _automatic() | {
    # Inside of the recipe.
    'adafactor': _inside(optax.adafactor(RATE, min_dim_size_to_factor=4)),
    'adamw': _inside(optax.adamw(RATE, mask=on_matrices)),
    'rmsprop': _inside(optax.rmsprop(RATE, centered=True, momentum=0.9)),
    'sgd': _inside(optax.sgd(optax.linear_schedule(0.3, 0.1, 9), momentum=0.9, nesterov=True)),
    'optimistic_adam': _inside(optax.optimistic_adam(RATE, 0.1)),
    'adaptive_grad_clip': _inside(optax.adaptive_grad_clip(0.1), optax.sgd(RATE)),
    'add_noise': _inside(optax.add_noise(0.01, 0.5, 0), optax.sgd(RATE)),
    'apply_every': _inside(optax.apply_every(2), optax.sgd(RATE)),
    'clip': _inside(optax.clip(0.5), optax.sgd(RATE)),
    'clip_by_block_rms': _inside(optax.clip_by_block_rms(0.5), optax.sgd(RATE)),
    'clip_by_global_norm': _inside(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    'conditionally_mask': _inside(optax.conditionally_mask(optax.sgd(RATE), lambda step, **_: step % 2 == 0)),
    'conditionally_transform': _inside(
        optax.conditionally_transform(optax.clip(0.1), lambda step, **_: step % 2 == 0), optax.sgd(RATE)),
    'ema': _inside(optax.ema(0.9), optax.sgd(RATE)),
    'flatten': _inside(optax.flatten(optax.adam(RATE))),
    'freeze': _inside(optax.adam(RATE), optax.freeze(on_rest)),
    'keep_params_nonnegative': _inside(optax.sgd(RATE), optax.keep_params_nonnegative()),
    'masked': _inside(optax.masked(optax.add_decayed_weights(0.1), on_matrices), optax.sgd(RATE)),
    'measure_with_ema': _inside(
        optax.measure_with_ema(functools.partial(jax.tree.map, jnp.square), 0.9), optax.sgd(RATE)),
    'mechanize': _inside(contrib.mechanize(optax.adam(RATE))),
    'multi_transform': _inside(
        optax.multi_transform({'matrices': optax.adam(RATE), 'rest': optax.sgd(RATE)}, _by_kind)),
    'partition': _inside(optax.partition({'matrices': optax.adam(RATE), 'rest': optax.sgd(RATE)}, _by_kind)),
    'reduce_on_plateau': _inside(optax.sgd(RATE), contrib.reduce_on_plateau(0.5, patience=1)),
    'sam': _inside(contrib.sam(optax.sgd(RATE), optax.sgd(0.1), sync_period=2)),
    'scale': _inside(optax.scale(-RATE)),
    'scale_by_learning_rate': _inside(optax.scale_by_learning_rate(RATE)),
    'scale_by_schedule': _inside(optax.scale_by_schedule(lambda step: -RATE)),
    'scale_by_distance_over_gradients': _inside(optax.scale_by_distance_over_gradients(), optax.scale(-1.0)),
    'scale_by_backtracking_linesearch': _inside(optax.sgd(RATE), optax.scale_by_backtracking_linesearch(3)),
    'scale_by_zoom_linesearch': _inside(optax.sgd(RATE), optax.scale_by_zoom_linesearch(3)),
    'schedule_free': _inside(contrib.schedule_free(optax.sgd(RATE), RATE)),
    'selective_transform': _inside(
        optax.selective_transform(optax.adam(RATE), freeze_mask=on_rest)),
    'snapshot': _inside(optax.snapshot('norm', optax.global_norm), optax.sgd(RATE)),
    'split_real_and_imaginary': _inside(contrib.split_real_and_imaginary(optax.adam(RATE))),
    'stateless': _inside(optax.stateless(lambda updates, params: jax.tree.map(lambda u: -RATE * u, updates))),
    'stateless_with_tree_map': _inside(optax.stateless_with_tree_map(lambda u, p: -RATE * u)),
    'trace': _inside(optax.trace(0.9), optax.scale(-RATE)),
    'dog': _inside(contrib.dog()),
    'dowg': _inside(contrib.dowg()),
    'galore': _inside(contrib.galore(RATE, rank=4, update_proj_gap=3)),
    # Around the recipe.
    'apply_if_finite': lambda recipe: optax.apply_if_finite(recipe(optax.adam(RATE)), 3),
    'chain': lambda recipe: optax.chain(optax.clip_by_global_norm(1.0), recipe(optax.adam(RATE))),
    'named_chain': lambda recipe: optax.named_chain(('clip', optax.clip(0.5)), ('sparse', recipe(optax.adam(RATE)))),
    'inject_hyperparams': lambda recipe: optax.inject_hyperparams(
        lambda learning_rate: recipe(optax.adam(learning_rate)))(optax.constant_schedule(RATE)),
    'MultiSteps': lambda recipe: optax.MultiSteps(recipe(optax.adam(RATE)), 2).gradient_transformation(),
    'masked around': lambda recipe: optax.masked(recipe(optax.adam(RATE)), on_matrices),
    'partition around': lambda recipe: optax.partition(
        {'matrices': recipe(optax.adam(RATE)), 'rest': optax.sgd(RATE)}, _by_kind),
    'with_extra_args_support': lambda recipe: optax.with_extra_args_support(recipe(optax.adam(RATE))),
    # Both.
    'inject_hyperparams inside': _inside(optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(RATE))),
    'MultiSteps inside': _inside(optax.MultiSteps(optax.adam(RATE), 2)),
    'apply_if_finite inside': _inside(optax.apply_if_finite(optax.adam(RATE), 3)),
}
# Sum over whole arrays, so that a mesh may change their last bits, and sometimes, not always, does.
SUMS = {'dog', 'dowg', 'scale_by_distance_over_gradients', 'mechanize', 'prodigy', 'dadapt_adamw', 'sam', 'fromage'}
NOT_WITH_NONE = {'galore', 'scale_by_galore'}
FUNCTIONS = {'sophia'}  # call a function of the parameters
LINE_SEARCHES = {'lbfgs', 'scale_by_lbfgs', 'scale_by_backtracking_linesearch', 'scale_by_zoom_linesearch'}


def extra(optimizer: str) -> dict[str, Any]:
  """The keyword arguments that a training loop gives to `update`."""
  if optimizer == 'sam':
    return {}  # says that it takes any, and then refuses them
  given = {'value': jnp.float32(1.0)}
  norm = lambda params: 0.01 * sum(jnp.sum(w.astype(jnp.float32) ** 2) for w in jax.tree.leaves(params))
  if optimizer in LINE_SEARCHES - {'scale_by_lbfgs'}:
    given['value_fn'] = norm
  return given | ({'obj_fn': norm} if optimizer in FUNCTIONS else {})


def fed(optimizer: str, tx: Any) -> Any:
  """`tx`, which also gets the gradient by the name that a line search wants."""
  if optimizer not in LINE_SEARCHES - {'scale_by_lbfgs'}:
    return tx
  return optax.GradientTransformationExtraArgs(
      tx.init, lambda grads, state, params, **given: tx.update(grads, state, params, grad=grads, **given))


# Containers: functions from a dict of arrays to what a library makes of them.


class Layer(NamedTuple):
  kernel: Any
  bias: Any


@flax.struct.dataclass
class Model:
  stack: Any
  norm: Any


class Linear(eqx.Module):
  kernel: Any
  bias: Any


CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    'dict': lambda params: params,
    'Linen variables': lambda params: {'params': params},
    'FrozenDict': flax.core.freeze,
    'nnx.State': lambda params: nnx.State(jax.tree.map(nnx.Param, params)),
    'Equinox module': lambda params: params | {'stack': Linear(**params['stack'])},
    'Haiku dict': lambda params: {'net/~/linear': params['stack'], 'net/~/layer_norm': params['norm']},
    'NamedTuple': lambda params: params | {'stack': Layer(**params['stack'])},
    'lists in a dict': lambda params: {'layers': [params['stack'], params['norm']]},
    'tuple': lambda params: (params,),
    'dataclass': lambda params: Model(**params),
    'with None': lambda params: params | {'frozen': None},
}


# The meshes have eight devices. A mesh says how the kernel, `[in, out]`, is sharded.


class Mesh(NamedTuple):
  """A `Mesh` says how the kernel is sharded, `None` for no mesh. `manual`: inside of `jax.shard_map`."""

  kernel: P | None
  kind: AxisType = AxisType.Auto
  manual: bool = False

  def make(self) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ('data', 'model'), axis_types=(self.kind,) * 2)

  def shardings(self, mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Returns a sharding for each leaf: that of the kernel, and replicated for all other leaves."""
    paths, leaves, treedef = trees.flatten(tree)
    lead = lambda leaf: (None,) * (np.ndim(leaf) - 2)
    return treedef.unflatten([NamedSharding(mesh, P(*lead(leaf), *self.kernel) if path.endswith('kernel') else P())
                              for path, leaf in zip(paths, leaves)])


MESHES = {
    'one device': Mesh(None),
    'data parallel': Mesh(P(None, None)),
    'tensor parallel': Mesh(P(None, 'model')),
    'tensor parallel, explicit': Mesh(P(None, 'model'), AxisType.Explicit),
    'fully sharded': Mesh(P('data', 'model')),
    'fully sharded, explicit': Mesh(P('data', 'model'), AxisType.Explicit),
    'shard_map': Mesh(P(None, 'model'), manual=True),
}
