"""Laws over signatures: whatever a recipe or a word takes is verified where it enters, and used as it was written."""

import functools
import inspect
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import NM, Block, Unstructured, allocation, arguments, flows, recipes, schedules, scores, starts, updates
from sparsejax.recipes.sentence import parameters

SGD = optax.sgd(0.1)
every_recipe = pytest.mark.parametrize('name', recipes.TABLE)


told = functools.partial(cases.read, total_steps=100)  # what a recipe needs, so that it can be made at all


def annotated(name, parameter):
  """The annotation of a parameter as text, from the recipe's own signature or else from that of `sparsify`."""
  for function in (recipes.TABLE[name], sj.transforms.sparsify):
    found = inspect.signature(function).parameters.get(parameter)
    if found is not None:
      return inspect.formatannotation(found.annotation)
  raise AssertionError(parameter)


NAN, INF = math.nan, math.inf
FUNCTION = scores.magnitude
OF_NUMBERS = (NAN, INF, -INF, '0.9', True, {'name': 'linear'}, (0.5,), np.ones(3), SGD)
BAD = {
    'int': (-5, 2.5, 90.5, FUNCTION, *OF_NUMBERS), 'float': (-0.1, FUNCTION, *OF_NUMBERS),
    'float | collections': (-0.1, *OF_NUMBERS), 'collections': (0.5, 3, True, 'linear', NAN),
    'bool': (1, 0.0, 'yes', FUNCTION), 'str': (3, True, FUNCTION)}


def bad_values(name, parameter):
  """Values of the wrong kind, by the annotation alone."""
  text = annotated(name, parameter).replace(' | None', '')
  if parameter == 'where':  # a bool is a prefix of every pytree
    return 0.5, 3, NAN
  bad = next((values for kind, values in sorted(BAD.items(), key=lambda each: -len(each[0]))
              if text.startswith(kind)), ())
  fractions = (90, 1.5) if parameter in ('sparsity', 'initial', 'threshold', 'fraction', 'momentum', 'shrink') else ()
  return bad + fractions + (() if parameters(recipes.TABLE[name])[parameter] is None or not bad else (None,))


@every_recipe
def test_every_parameter_has_a_kind_and_refuses_what_is_none(name):
  recipe, given = recipes.TABLE[name], told(name)
  recipe(SGD, **given)
  for parameter in parameters(recipe):
    assert arguments.kind_of(f'recipes.{name}', parameter), f'{parameter} of {name} has no kind'
    for value in bad_values(name, parameter):
      try:
        recipe(SGD, **given | {parameter: value})
      except ValueError as problem:
        refusal = problem
      else:
        raise AssertionError(f'{name}({parameter}={value!r}) passed')
      text = str(refusal)
      assert text.startswith(f'recipes.{name}: `{parameter}` must be '), (parameter, value, text)
      assert arguments.shown(value) in text and '<function' not in text


def test_the_law_over_signatures_sees_numbers_and_words():
  seen = {(name, parameter) for name, recipe in recipes.TABLE.items() for parameter in parameters(recipe)
          if bad_values(name, parameter)}
  assert {('snip', 'sparsity'), ('rigl', 'every'), ('st3', 'ramp_steps'), ('sr_ste', 'decay'), ('sr_ste', 'decoupled'),
          ('mdgf', 'decay'), ('mdgf', 'gradient'), ('snfs', 'momentum'), ('asp', 'dense_steps'), ('grasp', 'loss'),
          ('synflow', 'rounds'), ('global_sparse_momentum', 'weight_decay'), ('ste', 'refresh')} <= seen
  assert len(seen) > 150


@every_recipe
def test_functions_take_what_they_are_called_with_and_schedules_begin_in_range(name):
  recipe, given = recipes.TABLE[name], told(name)
  for parameter in parameters(recipe):
    kind, wrong = arguments.kind_of(f'recipes.{name}', parameter), []
    wrong += [(lambda *, no_place: 0.5, 'does not take')] if kind.takes else []
    wrong += [(lambda step, x=x: x, 'at step 0') for x in (NAN, -1.0, jnp.ones(3), 1j)] if kind.first else []
    for function, why in wrong:
      with pytest.raises(ValueError, match=f'recipes.{name}: `{parameter}` must be .*the function <lambda> .*{why}'):
        recipe(SGD, **given | {parameter: function})


@every_recipe
def test_numbers_go_in_as_numpy_and_as_arrays_but_are_not_traced_where_they_count(name):
  recipe, given = recipes.TABLE[name], told(name)
  for parameter in {'sparsity', 'fine_tune_steps', 'every', 'total_steps'} & {*parameters(recipe)}:
    value = {'sparsity': 0.5, 'every': 2, 'fine_tune_steps': 3, 'total_steps': 90}[parameter]
    for array in (np.asarray(value), jnp.asarray(value)):
      recipe(SGD, **given | {parameter: array})
    with pytest.raises(ValueError, match=f'recipes.{name}: `{parameter}` decides shapes or counts.*JAX cannot trace'):
      jax.eval_shape(lambda x, parameter=parameter: recipe(SGD, **given | {parameter: x}) and x, jnp.asarray(value))


@every_recipe
def test_a_recipe_refuses_other_optimizers_names_and_its_own_words(name):
  recipe, given = recipes.TABLE[name], told(name)
  with pytest.raises(ValueError, match=f'recipes.{name}: `inner` must be an optimizer of optax.*, not 0.001'):
    recipe(1e-3, **given)
  for unknown in ('sparsty', 'memory', 'start', 'first', 'pause', *recipe.sets):
    if unknown not in parameters(recipe):
      with pytest.raises(ValueError, match=f"recipes.{name}: unknown argument '{unknown}'.*Valid: .*inner"):
        recipe(SGD, **given, **{unknown: 1})
  assert recipe.__name__ == name and recipe.__doc__ and inspect.signature(recipe) is inspect.signature(recipe)
  assert [p for p in inspect.signature(recipe).parameters] == [*inspect.signature(recipe.__wrapped__).parameters]


def test_every_option_that_a_recipe_takes_can_be_given():
  """No option is handed on twice, or overridden by a word of the recipe."""
  values = {'where': None, 'axes': None, 'refresh': schedules.every(3), 'slots': 'kept', 'allow_empty': True,
            'key': jax.random.key(1), 'fine_tune_steps': 3, 'total_steps': 90}
  for name, recipe in recipes.TABLE.items():
    for option in values.keys() & parameters(recipe).keys():
      recipe(SGD, **told(name) | {option: values[option]})


WORDS = {
    'schedules.linear': (lambda x: schedules.linear(x, end=5), (NAN, '1', True, FUNCTION)),
    'schedules.cubic': (lambda x: schedules.cubic(end=x), (-1, 2.5, NAN, '5', True, None)),
    'schedules.every': (schedules.every, (0, -1, 2.5, True, '3')),
    'schedules.once': (schedules.once, (-1, 0.5, True)),
    'schedules.stepwise': (lambda x: schedules.stepwise([1, 2], [0, x]), (2.5, -1, '3', True)),
    'schedules.exponential': (schedules.exponential, (0.0, -1, NAN, INF, '1')),
    'schedules.density_decay': (lambda x: schedules.density_decay(x, end=3), (90, -0.1, NAN)),
    'schedules.constant': (schedules.constant, (NAN, '1', FUNCTION)),
    'flows.sr_ste': (flows.sr_ste, (-1, NAN, INF, '1', True)),
    'flows.soft_shrink': (flows.soft_shrink, (1.5, -0.1, NAN, '1')),
    'flows.on_the_edge': (flows.on_the_edge, (0.0, -1, NAN)),
    'scores.gradient_average': (scores.gradient_average, (1.0, -0.1, NAN, '0.9')),
    'updates.swap': (updates.swap, (0.5, None)),
    'starts.best_of': (lambda x: starts.best_of(FUNCTION, x), (0, -1, 2.5, True)),
    'starts.probed': (lambda x: starts.probed(FUNCTION, x), (0, 2.5, '1')),
    'selections.leafwise': (lambda x: sj.selections.leafwise(Unstructured(0.5), sparsity=x), (90, -0.1, NAN, '0.9')),
    'selections.global_threshold': (lambda x: sj.selections.global_threshold(schedules.constant(0.5), x), (90, NAN)),
    'transforms.sparsify': (lambda x: sj.transforms.sparsify(
        SGD, flows.hard(), sj.selections.leafwise(NM(2, 4)), dense_steps=x), (-1, 2.5, None, True, NAN)),
    'allocation.uniform': (lambda x: allocation.uniform({}, x), (90, -0.1, NAN, '0.9', True)),
    'allocation.erk': (lambda x: allocation.erk({}, x), (90, -0.1, NAN)),
    'allocation.custom': (lambda x: allocation.custom({'**': x}), (90, -0.1, NAN, '0.9', None)),
    'Unstructured': (Unstructured, (90, -0.1, NAN, '0.9', True)),
    'Block': (lambda x: Block((x, 4), 0.5), (0, -1, 2.5, True, '3')),
    'NM': (lambda x: NM(x, 4), (5, -1, 0.5, True, '3', None, FUNCTION)),
}


@pytest.mark.parametrize('name', WORDS)
def test_words_refuse_what_is_no_number_of_theirs(name):
  make, bad = WORDS[name]
  for value in bad:
    with pytest.raises(ValueError, match=name):
      make(value)
