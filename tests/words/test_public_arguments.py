"""Tests a law over the signatures of all public functions: an argument of another kind is refused by name at once.

`tests/recipes/test_arguments.py` has the same law for recipes. An argument is verified before the others are looked at,
so that each function is called with one argument alone.
"""

import inspect
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
import sparsejax
from sparsejax import arguments
from sparsejax.argument_kinds import ANYTHING

BAD = (-1, 0, 2.5, math.nan, True, 'x', b'x', None, [1], (), {}, {'a': None}, object(), jnp.ones(3), lambda *_: 1,
       10**30)
# Words are called by the library, and some functions serve authors of words, formats and clients of programs.
WORDS = ('scores', 'updates', 'saliences', 'ranking', 'types', 'units')
OF_AUTHORS = {
    # The ops name the format that they take, see `tests/kernels`.
    'kernels_pallas': tuple({*kernels_pallas.__all__} - {'packed', 'prepared', 'decoder', 'once', 'sparse_attention'}),
    'activation': ('error_bound',), 'calibration': ('add', 'gram', 'magnitudes', 'moments'),
    'flows': ('bidirectional', 'forgotten', 'is_forgotten'),
    'formats': ('axes_of', 'is_packed', 'packings', 'unfit', 'with_axes'), 'patterns': ('kept_of', 'parse', 'units'),
    'post_training': ('stack_of',), 'progress': tuple(sparsejax.progress.__all__),
    'programs': ('evaluate', 'follow', 'trace', 'walk'), 'schedules': ('reach',),
    'starts': ('fill', 'names', 'of'), 'states': ('by_path', 'find', 'reproject', 'surroundings'),
    'transforms': ('under_name',),
    'trees': ('axes_by_path', 'conventional_axes', 'default_where', 'flatten', 'is_dense', 'matrices', 'over',
              'per_leaf', 'select', 'undecided')}
# The functions tell these arguments apart themselves: a state or a pattern, inputs of the user's own function.
TOLD_APART = {'opt_state', 'pack.state', 'prune.recipe', 'inputs', 'kwargs', 'axis', 'style', 'options', 'ticket'}
GIVEN = {**{name: getattr(sparsejax, name) for name in sparsejax.__all__}, 'kernels_pallas': kernels_pallas,
         'decode': sparsejax.attention.decode}
NUMBERS = 0, 1, 3, 0.5


def functions():
  """Maps full names to the public functions that users call."""
  found = {name: value for name, value in GIVEN.items() if inspect.isfunction(value)}
  for name, module in GIVEN.items():
    if isinstance(module, types.ModuleType) and name not in ('recipes', *WORDS):
      found |= {f'{name}.{own}': getattr(module, own) for own in module.__all__
                if inspect.isfunction(getattr(module, own)) and own not in OF_AUTHORS.get(name, ())}
  return found


FUNCTIONS = functions()


@pytest.mark.parametrize('full', FUNCTIONS)
def test_every_argument_of_a_public_function_has_a_kind_and_others_are_refused(full):
  function = FUNCTIONS[full]
  name = arguments.public_name(function)
  for key, parameter in inspect.signature(function).parameters.items():
    if {key, f'{function.__name__}.{key}'} & TOLD_APART:
      continue
    kind = arguments.kind_of(name, key)
    assert kind, f'{key} of {name} has no kind'
    others = [value for value in BAD if not kind.fits(value) and value is not parameter.default]
    assert others or kind is ANYTHING
    assert all(kind.fits(np.asarray(value)[()]) for value in NUMBERS if kind.fits(value)), f'{key}: a scalar of NumPy'
    for value in others if not kind.scheduled else ():
      with pytest.raises(ValueError, match=f'^{name}: `{key}` must be '):
        function(value) if parameter.kind is parameter.VAR_POSITIONAL else function(**{key: value})


def test_a_class_is_not_one_of_its_values():
  for given in ({'pattern': sparsejax.NM}, {'axes': {0: sparsejax.types.Axes((0,), (1,))}}):
    with pytest.raises(ValueError, match=f'^prune_weights: `{next(iter(given))}` must be '):
      sparsejax.prune_weights({'kernel': jnp.ones((4, 4))}, **{'pattern': '2:4'} | given)


def test_the_law_sees_the_tools():
  assert {'report', 'check', 'prune', 'io.load', 'structured.cut', 'metrics.barrier', 'plot.saved', 'formats.pack',
          'kernels_pallas.packed', 'trees.named', 'contractions',
          'decode.quest', 'kernels_pallas.decoder', 'tokens.stack'} <= {*FUNCTIONS} and len(FUNCTIONS) > 100
