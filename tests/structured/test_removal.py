"""Tests cut and what belongs to it: units that are zero, states, files, proofs, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped_programs import ints, params_of

import sparsejax as sj
from sparsejax.structured import cut, cut_state, groups, load, masks, prove, save

pytestmark = pytest.mark.usefixtures('standard_promotion')
X = ints((2, 4), 7)
HALF = {'a:1': np.array([True, False, True, False, True, False])}


def apply(p, x):
  return jax.nn.relu(x @ p['a'] + p['b']) @ p['c']


def params():
  return {name: w + 3 for name, w in params_of({'a': (4, 6), 'b': (6,), 'c': (6, 3)}).items()}


@functools.cache
def found():
  return groups(apply, params(), X)


def zeroed(**units):
  return {name: w.at[units[name]].set(0) if name in units else w for name, w in params().items()}


# Which units go.


@pytest.mark.parametrize('weights, gone', [
  (zeroed(a=np.s_[:, 2], b=2), [2]),  # what produces a unit is zero
  (zeroed(c=4), [4]),  # nobody reads the unit
  (zeroed(a=np.s_[:, 1:3], b=np.s_[1:3], c=np.s_[0:2]), [0, 1, 2]),
  (zeroed(b=np.s_[:]), []),  # biases begin with zeros
])
def test_without_keep_the_units_go_that_change_nothing(weights, gone):
  small = cut(found(), weights)
  assert small.kept == {} if not gone else np.flatnonzero(~small.kept['a:1']).tolist() == gone
  np.testing.assert_array_equal(small.apply(small.params, X), apply(weights, X))


def test_a_unit_that_is_only_partly_zero_is_refused_with_the_reason():
  with pytest.raises(ValueError, match=r"unit 3 of group 'a:1' is zero in 'a:1' but not in 'b:0', 'c:0': both "
                                       'factors of a product are not zero'):
    cut(found(), zeroed(a=np.s_[:, 3]))


def test_zeros_before_an_activation_that_is_not_zero_there_are_no_reason_to_go():
  """A sigmoid of a removed channel is 1/2: the consumer has to be zero."""
  sigmoid = lambda p, x: jax.nn.sigmoid(x @ p['a']) @ p['c']
  weights = {'a': params()['a'].at[:, 2].set(0), 'c': params()['c']}
  own = groups(sigmoid, weights, X)
  with pytest.raises(ValueError, match="unit 2 of group 'a:1' is zero in 'a:1' but not in 'c:0'"):
    cut(own, weights)
  small = cut(own, {**weights, 'c': weights['c'].at[2].set(0)})
  assert small.params['a'].shape == (4, 5)


def test_scale_and_bias_of_a_norm_are_enough():
  """The kernel before the norm need not be zero, as when the scales of a norm are trained towards zero."""
  scaled = lambda p, x: jax.nn.relu((x @ p['a'] - p['m']) * jax.lax.rsqrt(p['v'] + 1e-6) * p['s'] + p['b']) @ p['c']
  weights = {**params(), **{name: jnp.arange(1.0, 7) for name in 'mvs'}}
  weights = {**weights, 's': weights['s'].at[jnp.array([1, 4])].set(0), 'b': weights['b'].at[1].set(0)}
  small = cut(groups(scaled, weights, X), weights)
  assert np.flatnonzero(~small.kept['a:1']).tolist() == [1] and small.params['v'].shape == (5,)


def test_the_user_gets_the_own_function_only_if_its_program_is_the_same():
  assert cut(found(), params(), HALF).apply is apply
  mean = lambda p, x: apply(p, x) + jnp.mean(x @ p['a'], -1, keepdims=True)
  small = cut(groups(mean, params(), X), params(), HALF)
  assert small.apply is not mean
  masked = jax.tree.map(jnp.multiply, params(), masks(found(), HALF))
  np.testing.assert_allclose(small.apply(small.params, X), mean(masked, X), rtol=1e-6)
  assert not np.allclose(mean(small.params, X), mean(masked, X))  # it would divide by 3 and not by 6


def test_another_batch_is_traced_anew_and_derivatives_are_those_of_the_masked_model():
  def heads(p, x):  # the reshape names the number of heads, so that the function cannot run on smaller parameters
    h = jax.nn.relu((x @ p['a'] + p['b']).reshape(x.shape[0], 3, 2))
    return (h * jax.nn.silu(h)).reshape(x.shape[0], 6) @ p['c']

  own = groups(heads, params(), X)
  keep = {name: np.arange(group.size) > 0 for name, group in own.items()}
  small = cut(own, params(), keep)
  masked = jax.tree.map(jnp.multiply, params(), masks(own, keep))
  loss = lambda f, p, x: jnp.sum(f(p, x) ** 2)
  for x in (X, ints((5, 4), 8)):
    value, grads = jax.jit(jax.value_and_grad(functools.partial(loss, small.apply)))(small.params, x)
    whole, wide = jax.jit(jax.value_and_grad(functools.partial(loss, heads)))(masked, x)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), grads, cut(own, wide, keep).params)
  rows = jax.vmap(small.apply, (None, 0))(small.params, X[:, None])
  np.testing.assert_allclose(rows[:, 0], small.apply(small.params, X), rtol=1e-5)


def test_masks_prune_what_is_cut():
  mask = masks(found(), HALF)
  assert mask['a'].shape == (4, 6) and (mask['a'] == HALF['a:1']).all() and (mask['c'].T == HALF['a:1']).all()
  kept = masks(found(), {'a:1': np.ones(6, bool)})
  assert all(leaf.shape == () and leaf for leaf in kept.values())


# Proofs.


def test_a_proof_has_the_difference_and_its_bound():
  small = cut(found(), params(), HALF)
  proof = prove(found(), params(), small, X)
  assert str(proof).startswith('largest difference') and proof.difference <= proof.bound < 0.1
  assert prove(found(), params(), small, X, exact=True).bound == 0


def test_a_wrong_cut_is_not_proven():
  small = cut(found(), params(), HALF)
  with pytest.raises(ValueError, match='structured.prove: the smaller model computes something else'):
    prove(found(), params(), small._replace(params={**small.params, 'b': small.params['b'] + 1}), X)
  with pytest.raises(ValueError, match='computes something else'):
    prove(found(), params(), small._replace(params={**small.params, 'b': small.params['b'] * jnp.nan}), X)


def test_parameters_of_another_structure_and_other_results_are_refused():
  small = cut(found(), params(), HALF)
  with pytest.raises(ValueError, match="structured.prove: unknown parameter of the cut 'a'"):
    prove(found(), {'b': params()['b']}, small, X)
  with pytest.raises(ValueError, match="structured.prove: the cut was made of 6 positions along axis 1 of 'a'"):
    prove(found(), {**params(), 'a': params()['a'][:, :3]}, small, X)
  with pytest.raises(ValueError, match='structured.prove: the models give 1 and 2 arrays'):
    prove(found(), params(), small._replace(apply=lambda params, x: (x, x)), X)


def test_equal_bits_of_16_bit_floats_are_not_asked_for():
  small = lambda tree: jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)
  own = groups(apply, small(params()), small(X))
  done = cut(own, small(params()), HALF)
  assert prove(own, small(params()), done, small(X)).bound > 0.1
  with pytest.raises(ValueError, match='exact.*16-bit floats'):
    prove(own, small(params()), done, small(X), exact=True)


# States and files.


@pytest.mark.sampled(3)
@pytest.mark.parametrize('make', [
  lambda: optax.adamw(1e-2), lambda: optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9)),
  lambda: optax.multi_transform({'w': optax.adam(1e-2), 'b': optax.sgd(1e-2)}, {'a': 'w', 'b': 'b', 'c': 'w'}),
  lambda: sj.recipes.sr_ste(optax.adam(1e-2), pattern=sj.Unstructured(0.5), where=sj.trees.named('a')),
], ids=['adamw', 'chain', 'partitioned', 'sr_ste'])
def test_training_goes_on_with_a_cut_state_as_with_masked_parameters(make):
  tx, keep = make(), masks(found(), HALF)
  masked = jax.tree.map(jnp.multiply, params(), keep)
  loss = lambda f, p: jnp.sum(jnp.sin(f(p, X)))

  def step(f, p, state):
    grads = jax.grad(functools.partial(loss, f))(p)
    if f is not small.apply:
      grads = jax.tree.map(jnp.multiply, grads, keep)
    updates, state = tx.update(grads, state, p)
    return optax.apply_updates(p, updates), state

  small = cut(found(), masked, HALF)
  small = small._replace(apply=lambda p, x: apply(p, x))
  state = tx.init(masked)
  wide, state = step(apply, masked, state)
  wide = jax.tree.map(jnp.multiply, wide, keep)
  narrow, own = cut(found(), wide, HALF).params, cut_state(found(), state, small.kept)
  narrow, own = step(small.apply, narrow, own)
  assert {leaf.shape for leaf in jax.tree.leaves(own)}.isdisjoint({(4, 6), (6, 3), (6,)})
  if make().init(masked) and 'Sparse' not in str(type(state)):
    expected, _ = step(apply, wide, state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), narrow,
                 cut(found(), expected, HALF).params)
  else:
    assert sj.report(narrow, own).achieved == 0.5


@pytest.mark.parametrize('state, why', [
  (lambda: optax.adam(1e-2).init({'other': jnp.ones(3)}), 'the state of another model'),
  (lambda: (optax.adam(1e-2).init(params()), {'d': jnp.ones(5)}), "'1/d'.*belongs to no parameter"),
  (lambda: {'a': jnp.ones(4), 'c': params()['c']}, "'a' of shape .4,.: its parameter has shape .4, 6."),
])
def test_a_state_that_does_not_fit_is_refused(state, why):
  with pytest.raises(ValueError, match=why):
    cut_state(found(), state(), cut(found(), params(), HALF).kept)


def test_a_small_model_comes_back_without_the_large_one(tmp_path):
  small = cut(found(), params(), HALF)
  save(tmp_path / 'small.safetensors', small)
  again = load(tmp_path / 'small.safetensors', apply)
  assert {name: leaf.shape for name, leaf in again.params.items()} == {'a': (4, 3), 'b': (3,), 'c': (3, 3)}
  np.testing.assert_array_equal(again.apply(again.params, X), small.apply(small.params, X))
  sj.io.save(tmp_path / 'other.safetensors', params())
  with pytest.raises(ValueError, match='structured.load: .*other.safetensors.* does not say what was kept'):
    load(tmp_path / 'other.safetensors', apply)


# Bad input.


@pytest.mark.parametrize('keep, why', [
  ({'a:1': np.ones(5, bool)}, r"group 'a:1' is bool\[5\], but the group has 6 units"),
  ({'a:1': np.ones(6)}, r'float64\[6\].*give bool\[6\]'),
  ({'a:1': np.zeros(6, bool)}, 'keeps none of its 6 units'),
  ({'b:0': np.ones(6, bool)}, "unknown group 'b:0'.*Valid: a:1"),
  ([np.ones(6, bool)], '`keep` must be a mapping from names of groups'),
])
def test_a_bad_keep_is_refused(keep, why):
  with pytest.raises(ValueError, match=why):
    cut(found(), params(), keep)


def test_layers_of_a_stack_keep_equally_many_units():
  stack = lambda p, x: jax.lax.scan(lambda x, q: (x + jax.nn.relu(x @ q['a']) @ q['c'], None), x, p)[0]
  weights = params_of({'a': (2, 4, 6), 'c': (2, 6, 4)})
  own, keep = groups(stack, weights, X), np.stack([np.arange(6) < 4, np.arange(6) > 1])
  small = cut(own, weights, {'a:2': keep})
  assert small.params['a'].shape == (2, 4, 4) and small.kept['c:1'].shape == (2, 6)
  assert prove(own, weights, small, X).holds and prove(own, weights, cut(own, weights, {'a:2': keep[0]}), X).holds
  assert cut_state(own, optax.adam(1e-2).init(weights), small.kept)[0].mu['c'].shape == (2, 4, 4)
  with pytest.raises(ValueError, match='keeps between 3 and 4 units of a layer'):
    cut(own, weights, {'a:2': np.stack([keep[0], np.arange(6) < 3])})
  with pytest.raises(ValueError, match=r'bool\[3, 6\].*give bool\[6\] or bool\[2, 6\]'):
    cut(own, weights, {'a:2': np.ones((3, 6), bool)})


def test_groups_are_stale_after_a_cut():
  small = cut(found(), params(), HALF)
  with pytest.raises(ValueError, match=r"'a' of shape \(4, 3\): the groups were read with shape \(4, 6\).*again"):
    cut(found(), small.params, HALF)
  again = groups(small.apply, small.params, X)
  twice = cut(again, small.params, {'a:1': np.array([True, False, True])})
  np.testing.assert_allclose(twice.apply(twice.params, X), apply(twice.params, X), rtol=1e-6)


@pytest.mark.parametrize('weights, why', [
  (lambda: {'a': 1.0}, 'another structure'), (lambda: jax.eval_shape(params), 'a ShapeDtypeStruct cannot be cut'),
  (lambda: {**params(), 'a': params()['a'].T}, r"'a' of shape \(6, 4\)"),
  (lambda: jax.tree.map(jnp.zeros_like, params()), 'no unit of group .a:1. changes the result'),
])
def test_other_parameters_are_refused(weights, why):
  with pytest.raises(ValueError, match=why):
    cut(found(), weights(), None if 'no unit' in why else HALF)


def test_a_smaller_function_takes_the_smaller_parameters_only():
  heads = lambda p, x: apply(p, x) + jnp.mean(x @ p['a'])
  small = cut(groups(heads, params(), X), params(), HALF)
  with pytest.raises(ValueError, match=r"'a' of shape \(4, 6\): the smaller function keeps 3 of 6 positions of axis 1"):
    small.apply(params(), X)
