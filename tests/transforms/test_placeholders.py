"""Checks that an optimizer that is made once takes what only the start needs from `init`, and what moved names do."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import recipes, starts, transforms

LIKE = {'a': {'kernel': cases.F32((8, 6))}, 'b': {'kernel': cases.F32((12, 4))}}
PARAMS, SGD = cases.random(0, like=LIKE), optax.sgd(0.1)


def loss(params):
  return sum(jnp.sum(jnp.cos(3 * w)) for w in jax.tree.leaves(params))


def colder(params, temperature=1.0):
  return loss(params) / temperature


VALUES = {'loss': loss, 'outputs': lambda params: jnp.stack([jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params)]),
          'ticket': cases.random(1, like=LIKE), 'key': jax.random.key(3)}
MADE = {
    'snip': ({'loss'}, functools.partial(recipes.snip, SGD, 0.5)),
    'robust_at_init': ({'loss'}, functools.partial(recipes.robust_at_init, SGD, 0.5)),
    'synflow': ({'outputs'}, functools.partial(recipes.synflow, SGD, 0.5, rounds=3)),
    'iterative_magnitude': ({'ticket'}, functools.partial(recipes.iterative_magnitude, SGD, 0.5)),
    'random_search': ({'loss', 'key'}, functools.partial(recipes.random_search, SGD, candidates=3)),
    'random_pruning': ({'key'}, functools.partial(recipes.random_pruning, SGD, 0.5)),
    'rigl': ({'key'}, functools.partial(recipes.rigl, SGD, 0.5, total_steps=9)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize('name', MADE)
def test_a_value_given_to_init_is_that_given_to_the_recipe(name):
  names, make = MADE[name]
  values = {key: VALUES[key] for key in names}
  tx = make(**{key: starts.given(key) for key in names})
  assert set(transforms.placeholders(tx)) == names and transforms.placeholders(make(**values)) == ()
  expected = make(**values).init(PARAMS)
  cases.assert_same(tx.init(PARAMS, **values), expected)
  cases.assert_same(jax.jit(lambda params: tx.init(params, **values))(PARAMS), expected, 1e-6)  # of fused products
  assert not all(bool(jnp.all(mask)) for mask in jax.tree.leaves(expected.masks))


def test_a_placeholder_may_be_held_in_a_partial():
  make = functools.partial(recipes.grasp, SGD, 0.5, temperature=2.0)
  cases.assert_same(make(loss=starts.given('loss')).init(PARAMS, loss=colder), make(loss=colder).init(PARAMS))


def test_keys_are_given_to_init_under_vmap():
  tx = recipes.random_pruning(SGD, 0.5, key=starts.given('key'))
  keys = jax.random.split(jax.random.key(0), 3)
  states = jax.vmap(lambda key: tx.init(PARAMS, key=key))(keys)
  for i, key in enumerate(keys):
    cases.assert_same(jax.tree.map(lambda x, i=i: x[i], states), recipes.random_pruning(SGD, 0.5, key=key).init(PARAMS))


def test_a_configuration_hands_placeholders_on():
  signals = {name: starts.given(name) for name in ('loss', 'outputs', 'key')}
  tx = recipes.from_config(SGD, {'name': 'snip', 'sparsity': 0.5}, total_steps=9, signals=signals)
  assert transforms.placeholders(tx) == ('key', 'loss')
  cases.assert_same(tx.init(PARAMS, loss=loss, key=VALUES['key']),
                    recipes.snip(SGD, 0.5, loss=loss, key=VALUES['key']).init(PARAMS))
  assert transforms.placeholders(recipes.from_config(SGD, {'name': 'dense'}, total_steps=9, signals=signals)) == ()
  assert transforms.placeholders(SGD) == ()


@pytest.mark.parametrize('make, values, words', [
    (lambda: recipes.snip(SGD, 0.5, loss=starts.given('loss'), key=starts.given('key')), {'loss': loss},
     ["starts.given stands for 'key'", 'nothing fills it', 'tx.init(params, key=..., loss=...)']),
    (lambda: recipes.snip(SGD, 0.5, loss=starts.given('loss')), {},
     ["stands for 'loss'", 'tx.init(params, loss=...)']),
    (lambda: recipes.snip(SGD, 0.5, loss=starts.given('loss')), {'loss': loss, 'key': 1},
     ["init got 'key'", "(placeholders: 'loss')", "key=starts.given('key')"]),
    (lambda: recipes.ste(SGD), {'loss': loss}, ["init got 'loss'", '(placeholders: none)']),
    (lambda: recipes.dense(SGD), {'loss': loss}, ["init got 'loss'", '(placeholders: none)']),
    (lambda: transforms.sparsify(SGD, sj.flows.hard(), sj.selections.leafwise(sj.NM(2, 4)),
                                 start=lambda choose, place, masks, key: starts.given('loss')(masks)), {},
     ["starts.given('loss')", 'before `init` filled it', 'types.Bound']),
])
def test_what_is_missing_or_too_much_is_refused_by_name(make, values, words):
  with pytest.raises(ValueError) as refusal:
    make().init(PARAMS, **values)
  assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_recipes_do_not_hand_on_what_they_choose_themselves():
  assert {'memory', 'start', 'first', 'pause'}.isdisjoint(recipes.arguments(recipes.snip))
  assert 'memory' in recipes.arguments(recipes.gradual_magnitude)  # its own argument
  assert recipes.TABLES['train'] is recipes.TABLE


@pytest.mark.parametrize('module, name, now', [
    (recipes, 'model_soup', sj.metrics.model_soup), (recipes, 'bdwp_backward', sj.states.bdwp_backward),
    (recipes, 'freeze_net_trained', sj.formats.freeze_net_trained),
    (sj.states, 'freeze_net_trained', sj.formats.freeze_net_trained), (transforms, 'gated', transforms.updating),
    (sj.reports, 'Row', sj.reports.LeafReport)])
def test_a_name_that_moved_works_and_warns(module, name, now):
  with pytest.warns(DeprecationWarning, match=f'{name} is now .*{now.__name__}; the former name goes with the next'):
    assert getattr(module, name) is now
  with pytest.raises(AttributeError, match=f"has no attribute '{name}s'"):
    getattr(module, f'{name}s')


def test_a_pattern_from_outside_is_one_line_of_the_table(monkeypatch):
  rows = sj.patterns.Spelling(r"rows(\d+)", lambda n: sj.Block((1, n)), ("rows8",))
  monkeypatch.setitem(sj.patterns.TABLE, "rows", rows)
  assert sj.patterns.parse('rows4') == sj.Block((1, 4))
  with pytest.raises(ValueError, match="Did you mean 'rows8'"):
    sj.patterns.parse('row8')
  mask = sj.patterns.parse("rows2")(jnp.arange(8.0).reshape(2, 4), 1)
  np.testing.assert_array_equal(mask, [[0, 0, 0, 0], [0, 0, 1, 1]])
