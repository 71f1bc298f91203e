"""Verifies what a recipe is told, for all recipes in the same way, before the recipe composes its words.

    @sentence('refresh')  # the options of `transforms.sparsify` that the recipe sets itself
    def asp(inner: Inner, pattern: Patterns = NM(2, 4), **options: Any) -> Optimizer: ...

A decorated recipe refuses values that do not fit their kind (`arguments.KINDS`) and unknown names. A schedule that ends
after the training is refused, and so is an argument that another argument leaves without effect. The coefficients of a
recipe are the hyperparameters of `optax.inject_hyperparams(recipe)`; all other arguments are handed on unchanged.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sparsejax import allocation, arguments, patterns, schedules, scores, transforms
from sparsejax.types import says

F = TypeVar('F', bound=Callable[..., Any])
# Words of `sparsify` that a recipe chooses by itself.
OWN = ('memory', 'start', 'first', 'pause', 'name', 'probe')
_OPTIONS = {p.name: p.default for p in inspect.signature(transforms.sparsify).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in OWN}


def sentence(*sets: str) -> Callable[[F], F]:
  """Returns the decorator of recipes that verifies their arguments. `sets`: options that the recipe sets itself."""
  def decorate(recipe: F) -> F:
    name, own = arguments.public_name(recipe), inspect.signature(recipe)

    @functools.wraps(recipe)
    def call(*args: Any, **kwargs: Any) -> Any:
      made = recipe(**told(name, parameters(call), own.bind_partial(*args).arguments | kwargs))
      return transforms.under_name(made, recipe.__name__)

    call.__kwdefaults__ = recipe.__kwdefaults__
    call.sets, call.__signature__ = sets, Signature([*own.parameters.values()])
    call.__signature__.function = name
    return call

  return decorate


def parameters(recipe: Callable[..., Any]) -> dict[str, Any]:
  """Maps the names of what a recipe takes to the defaults: its own, and the options that it hands to `sparsify`."""
  own = inspect.signature(recipe).parameters.values()
  named = {p.name: p.default for p in own if p.kind is not p.VAR_KEYWORD}
  handed_on = _OPTIONS if len(named) < len(own) else {}
  return {name: default for name, default in handed_on.items() if name not in getattr(recipe, 'sets', ())} | named


def told(recipe: str, defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the verified arguments of a recipe by name. Raises `ValueError` for what the recipe would not use."""
  values = {name: value.value if isinstance(value, Unchanged) else value for name, value in values.items()}
  if 'options' not in defaults:
    values |= values.pop('options', {})  # inject_hyperparams hands `**options` on as one dict
  arguments.known(recipe, values, defaults)
  values = {name: arguments.verified(recipe, name, value, defaults[name]) for name, value in values.items()}
  if 'pattern' in values:
    values['pattern'] = patterns.parse(values['pattern'])
  refuse_late(recipe, {name: value for name, value in values.items() if value is not defaults[name]})
  refuse_unused(recipe, defaults, values)
  return values


def refuse_late(recipe: str, values: Mapping[str, Any]) -> None:
  """Raises `ValueError` for a step number, or a schedule, beyond the end of training or into the fine-tune phase.

  `values`: without defaults, which fit themselves into the training.
  """
  total, tuned, dense = (values.get(name) for name in ('total_steps', 'fine_tune_steps', 'dense_steps'))
  for name, value in values.items() if total else ():
    reach = value if name in ('begin', 'end', 'ramp_steps') else schedules.reach(value)
    since_dense = name in ('refresh', 'ramp_steps') or (recipe, name) == ('recipes.mdgf', 'decay')
    reach = reach and reach + (dense or 0) * since_dense
    most = total - (0 if name == 'learning_rate' else tuned or 0)  # of the optimizer, which goes on to the end
    if reach and reach > most:
      raise ValueError(f'{recipe}: {name}={arguments.shown(value)} reaches step {reach}, beyond the {most} updates '
                       'before training or its fine-tune phase ends. Let it end earlier, or raise total_steps.')


def refuse_unused(recipe: str, defaults: Mapping[str, Any], values: Mapping[str, Any]) -> None:
  """Raises `ValueError` for an argument that is given and that another argument leaves without effect, see `UNUSED`."""
  for name, value in values.items():
    if value is not None and value is not defaults[name] and (why := _unused(recipe, name, {**defaults, **values})):
      raise ValueError(f'{recipe}: {name}={arguments.shown(value)} would have no effect: {why}, or leave it out.')


def without_effect(recipe: Callable[..., Any], name: str, values: Mapping[str, Any]) -> bool:
  """Returns whether the other `values` leave the argument `name` of a recipe without effect."""
  return bool(_unused(arguments.public_name(recipe), name, {**parameters(recipe), **values}))


def _unused(recipe: str, name: str, values: Mapping[str, Any]) -> str:
  unused, why = UNUSED.get(f'{recipe}.{name}') or UNUSED.get(name) or (None, '')
  return why if unused and unused(values) else ''


def _counts_are_fixed(values: Mapping[str, Any]) -> bool:
  """Whether the pattern says by itself how much every leaf keeps."""
  pattern = values.get('pattern')
  own = isinstance(pattern, Mapping) or getattr(pattern, 'fixed', False)
  return values.get('sparsity') is None and own and values['allocation'] is not allocation.uniform


# Arguments that another argument may leave without effect: when, and what to do instead of leaving the argument out.
UNUSED: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    'recipes.sr_ste.learning_rate': (lambda values: not values['decoupled'],
                      'it scales the decay that is decoupled from the gradient; pass decoupled=True'),
    'recipes.random_pruning.loss': (
        lambda values: not getattr(values['allocation'], 'score', None),
        'the allocation looks at no gradient; pass allocation=allocation.from_scores(scores.snip)'),
    'allocation': (_counts_are_fixed, 'the pattern says by itself how much each leaf keeps; take another pattern'),
    'sparsity': (lambda values: says(values.get('allocation'), allocation.OF_ITS_OWN),
                 'the allocation has its own number for each leaf; take another allocation'),
    'recipes.gradual_magnitude.memory': (lambda values: values['score'] is scores.magnitude,
                                         'no score reads it; pass score= too'),
}


@dataclasses.dataclass(frozen=True)
class Unchanged:
  """An `Unchanged` holds an argument that is no hyperparameter, which `optax.inject_hyperparams` then hands on."""

  value: Any


class Signature(inspect.Signature):
  """A `Signature` binds the arguments of a recipe as `optax.inject_hyperparams` needs them.

  optax takes all callables for schedules, and all numbers for hyperparameters, while only the coefficients of a recipe
  are (`Kind.coefficient` of `argument_kinds`). `bind` verifies all other arguments and puts each into an `Unchanged`.
  """

  function = 'recipes'

  def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    bound = super().bind(*args, **kwargs)
    bound.apply_defaults()
    arguments.known(self.function, bound.arguments.get('options', {}), [*_OPTIONS, *self.parameters])
    for name, value in bound.arguments.items():
      kind = arguments.kind_of(self.function, name)
      if kind is None or kind.coefficient and callable(value):
        continue
      value = arguments.verified(self.function, name, value, self.parameters[name].default)
      bound.arguments[name] = value if kind.coefficient else Unchanged(value)
    return bound
