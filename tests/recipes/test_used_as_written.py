"""What a recipe is told is used as it was written: ends within the training, coefficients by schedule, no idle key."""

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import NM, Channel, Unstructured, allocation, recipes, schedules, scores, states
from sparsejax.recipes.sentence import parameters

SGD = optax.sgd(0.1)
PARAMS = {'a': {'kernel': jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)},
          'b': {'kernel': jnp.asarray(np.random.default_rng(1).normal(size=(32, 8)), jnp.float32)}}
told = functools.partial(cases.read, total_steps=100)  # what a recipe needs, so that it can be made at all
every_recipe = pytest.mark.parametrize('name', recipes.TABLE)


def run(tx, steps, params=PARAMS, jit=True):
  """Returns the parameters after each update, with the parameters as gradients, and the last state."""
  def body(carry, _):
    params, state = carry
    updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  if jit:
    (_, state), seen = jax.jit(lambda params: jax.lax.scan(body, (params, tx.init(params)), None, steps))(params)
    return seen, state
  carry, seen = (params, tx.init(params)), []
  for _ in range(steps):
    carry, params = body(carry, None)
    seen.append(params)
  return jax.tree.map(lambda *x: jnp.stack(x), *seen), carry[1]


LATE = {'begin': 98, 'end': 101, 'ramp_steps': 101, 'refresh': schedules.once(101),
        'fraction': schedules.cosine(0.3, 0.0, end=101), 'decay': schedules.linear(end=101),
        'restriction': schedules.polynomial(power=4, end=101), 'shrink': schedules.linear(1.0, 0.9, end=101)}


@every_recipe
def test_a_schedule_that_outlasts_the_training_or_reaches_into_the_fine_tune_phase_is_refused(name):
  recipe, given = recipes.TABLE[name], told(name)
  for key in LATE.keys() & parameters(recipe).keys():
    if key != 'begin':
      with pytest.raises(ValueError, match=f'recipes.{name}: {key}=.* reaches step 101, beyond the 100 updates'):
        recipe(SGD, **given | {key: LATE[key]})
    if 'fine_tune_steps' in parameters(recipe):
      with pytest.raises(ValueError, match=f'recipes.{name}: {key}=.* beyond the 95 updates before .* fine-tune'):
        recipe(SGD, **given | {key: LATE[key], 'fine_tune_steps': 5})


def test_the_steps_of_a_decay_count_from_the_dense_phase():
  late = functools.partial(recipes.mdgf, SGD, decay=schedules.linear(end=90), total_steps=100)
  late(dense_steps=10)
  with pytest.raises(ValueError, match='reaches step 101'):
    late(dense_steps=11)
  with pytest.raises(ValueError, match='refresh=.* reaches step 101'):
    recipes.ste(SGD, refresh=schedules.every(2, end=90), dense_steps=11, total_steps=100)
  recipes.sr_ste(SGD, decoupled=True, learning_rate=schedules.cosine(end=100), total_steps=100, fine_tune_steps=5)


@pytest.mark.sampled(6)
@pytest.mark.parametrize('phases', [{}, {'dense_steps': 4}, {'dense_steps': 2, 'fine_tune_steps': 3}])
@pytest.mark.parametrize('name', ['mdgf', 'gradual_magnitude', 'set_'])
def test_by_default_everything_is_reached_within_the_training(name, phases):
  given = {'total_steps': 12} | phases | ({'key': jax.random.key(0)} if name == 'set_' else {})
  seen, state = run(recipes.TABLE[name](SGD, **given), given['total_steps'])
  sj.check(jax.tree.map(lambda x: x[-1], seen), state)
  if name == 'set_' and not phases:
    assert (np.asarray(seen['a']['kernel'][0] == 0) != np.asarray(seen['a']['kernel'][-1] == 0)).any(), 'never moved'


def test_a_decay_that_leaves_no_zero_is_refused_unless_it_is_meant_to_go_on():
  for decay in (optax.linear_schedule(1.0, 0.0, 5000), lambda step: 0.5, schedules.constant(0.5)):
    with pytest.raises(ValueError, match='recipes.mdgf: `decay` is still .* 300 updates.*fine_tune_steps='):
      recipes.mdgf(SGD, decay=decay, total_steps=300)
    recipes.mdgf(SGD, decay=decay, total_steps=300, fine_tune_steps=30)
  recipes.mdgf(SGD, decay=schedules.exponential(half_life=30), total_steps=300)
  recipes.mdgf(SGD, decay=optax.linear_schedule(1.0, 0.0, 300), total_steps=300)


def test_masks_are_chosen_at_the_written_steps_with_a_dense_phase_too():
  """`begin`, `end` and `every` count all updates."""
  for recipe, chosen in ((recipes.gradual_magnitude, [6, 9, 11]), (recipes.movement_pruning, [6, 9, 11, 12, 15])):
    seen, _ = run(recipe(SGD, 0.5, begin=3, end=11, every=3, dense_steps=5, total_steps=16), 16)
    zeros = [int(jnp.sum(w == 0)) for w in seen['a']['kernel']]
    assert [t for t in range(1, 17) if zeros[t - 1] != ([0] + zeros)[t - 1]] == [6, 9, 11], zeros
    assert zeros[-1] == 256 and chosen[:3] == [6, 9, 11]
  with pytest.raises(ValueError, match=r'recipes.gradual_magnitude: .*end=4.*dense phase is \(5 updates\)'):
    recipes.gradual_magnitude(SGD, 0.5, end=4, dense_steps=5)
  with pytest.raises(ValueError, match='recipes.rigl: every=9: the mask would never move before .* step 9'):
    recipes.rigl(SGD, every=9, end=9)
  with pytest.raises(ValueError, match='recipes.movement_pruning: initial=0.9 is above .* 0.5'):
    recipes.movement_pruning(SGD, 0.5, initial=0.9, total_steps=9)


IDLE = {
    'a learning rate of a coupled decay': (
        lambda: recipes.sr_ste(SGD, learning_rate=0.1), ['recipes.sr_ste: learning_rate=0.1', 'decoupled=True']),
    'a loss that nothing reads': (
        lambda: recipes.random_pruning(SGD, loss=jnp.sum),
        ['recipes.random_pruning: loss=', 'from_scores(scores.snip)']),
    'a temperature that the loss does not take': (
        lambda: recipes.grasp(SGD, loss=lambda params: 0.0, temperature=200.0), ['grasp: temperature=', 'keyword']),
    'shares of a fixed count': (
        lambda: recipes.rigl(SGD, pattern=NM(2, 4), allocation=allocation.erdos_renyi, end=9),
        ['recipes.rigl: allocation=', 'pattern says by itself']),
    'shares of several patterns': (
        lambda: recipes.snip(SGD, pattern={'**': Unstructured(0.5)}, allocation=allocation.erk), ['snip: allocation=']),
    'a number beside the numbers of the allocation': (
        lambda: recipes.snip(SGD, 0.5, allocation=allocation.custom({'**': 0.9})), ['snip: sparsity=0.5', 'its own']),
    'a memory that nothing reads': (
        lambda: recipes.gradual_magnitude(SGD, memory=scores.gradient_average(), end=9), ['memory=', 'pass score=']),
    'a sparsity that is not that of the pattern': (
        lambda: recipes.magnitude_at_init(SGD, 0.75, NM(2, 4)).init(PARAMS),
        ["parameters 'a/kernel' of shape (64, 8), 'b/kernel'", '2:4 keeps 0.5 of every group', 'sparsity=0.75']),
    'a sparsity of which groups of four keep as many': (
        lambda: recipes.magnitude_at_init(SGD, 0.4, NM(2, 4)).init(PARAMS), ['2:4 keeps 0.5', 'sparsity=0.4']),
}


@pytest.mark.parametrize('what', IDLE)
def test_a_key_without_effect_is_refused(what):
  make, says = IDLE[what]
  with pytest.raises(ValueError) as refusal:
    make()
  for part in says:
    assert part in str(refusal.value)


def test_what_is_the_same_may_be_said_twice():
  recipes.magnitude_at_init(SGD, 0.5, NM(2, 4)).init(PARAMS)
  recipes.rigl(SGD, pattern=NM(2, 4), allocation=allocation.uniform, end=9)
  recipes.random_pruning(SGD, loss=jnp.sum, allocation=allocation.from_scores(scores.snip))
  recipes.grasp(SGD, loss=lambda params, **options: 0.0, temperature=200.0)
  recipes.from_config(SGD, {'name': 'random_pruning'}, total_steps=9,
                      signals={'loss': jnp.sum, 'key': jax.random.key(0)})


# Coefficients.


def ramp(step):
  return 0.2 * jnp.minimum(1.0, step / 3)


# A coefficient by which the master shrinks after the optimizer's step is that of the step after it, one update ahead.
SCHEDULED = {'sr_ste': ('decay', {}, 0), 'sr_ste-decoupled': ('decay', {'decoupled': True}, 1),
             'sr_ste-rate': ('learning_rate', {'decoupled': True, 'decay': 0.5}, 1),
             'iterative_soft_shrinkage': ('shrink', {'total_steps': 18}, 1)}


@pytest.mark.parametrize('case', SCHEDULED)
def test_a_coefficient_is_a_number_or_a_schedule_and_inject_hyperparams_schedules_it_as_well(case):
  (key, given, ahead), recipe = SCHEDULED[case], recipes.TABLE[case.partition('-')[0]]
  number, _ = run(recipe(SGD, **given, **{key: 0.2}), 5)
  constant, _ = run(recipe(SGD, **given, **{key: schedules.constant(0.2)}), 5)
  scheduled, _ = run(recipe(SGD, **given, **{key: ramp}), 5)
  for x, y in zip(*map(jax.tree.leaves, (number, constant))):
    np.testing.assert_array_equal(x, y)
  assert any((x != z).any() for x, z in zip(*map(jax.tree.leaves, (number, scheduled))))
  for static in ((), ('inner', 'pattern')) if case == 'sr_ste' else ((),):
    injected, state = run(optax.inject_hyperparams(recipe, static)(
        SGD, **given, **{key: lambda step: ramp(step + ahead)}), 5)
    assert key in state.hyperparams and sj.masks(PARAMS, state)
    for x, y in zip(jax.tree.leaves(scheduled), jax.tree.leaves(injected)):
      np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)


@every_recipe
def test_inject_hyperparams_takes_every_recipe_as_it_is(name):
  """Patterns, allocations, scores and numbers that count are no schedules and no hyperparameters."""
  recipe, given = recipes.TABLE[name], told(name)
  quick = {'rounds': 2, 'candidates': 2, 'k': 1, 'every': 2}
  given |= {key: value for key, value in quick.items() if key in parameters(recipe)}
  state = jax.eval_shape(optax.inject_hyperparams(recipe)(SGD, **given).init, PARAMS)
  assert {*state.hyperparams} <= {'decay', 'gain', 'penalty', 'threshold', 'weight_decay', 'shrink', 'fraction',
                                  'momentum', 'temperature', 'learning_rate', 'alpha', 'gamma', 'lam'}
  own = jax.eval_shape(recipe(SGD, **given).init, PARAMS)
  assert jax.tree.leaves(state.inner_state) == jax.tree.leaves(own)
  for wrong in ({'total_steps': -1}, {'sparsity': 90}, {'sparsity': ramp}, {'pattern': None}):
    if wrong.keys() <= inspect.signature(recipe).parameters.keys():  # of all arguments, those that the recipe names
      with pytest.raises(ValueError, match=f'recipes.{name}: `{next(iter(wrong))}` must be'):
        optax.inject_hyperparams(recipe)(SGD, **given | wrong)


def test_inject_hyperparams_refuses_unknown_names_when_it_is_called():
  with pytest.raises(ValueError, match="recipes.sr_ste: unknown argument 'dekay'. Did you mean 'decay'"):
    optax.inject_hyperparams(recipes.sr_ste)(SGD, dekay=0.1)


def test_a_hyperparameter_is_changed_by_hand_without_compiling_again():
  tx, traces = optax.inject_hyperparams(recipes.sr_ste)(SGD, '2:4', decay=0.1), []

  @jax.jit
  def update(params, state):
    traces.append(1)
    return tx.update(params, state, params)

  params, state = PARAMS, tx.init(PARAMS)
  for decay in (0.1, 0.3):
    state.hyperparams['decay'] = jnp.asarray(decay)
    updates, state = update(params, state)
    params = optax.apply_updates(params, updates)
  assert len(traces) == 1
  other = run(recipes.sr_ste(SGD, decay=lambda step: jnp.where(step < 1, 0.1, 0.3)), 2)[0]
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(other)):
    np.testing.assert_allclose(x, y[-1], rtol=2e-6, atol=1e-7)
  assert states.project(PARAMS, state)


# Leaves of size zero.


@pytest.mark.parametrize('make', [
    lambda **options: recipes.magnitude_at_init(SGD, 0.5, **options),
    lambda **options: recipes.magnitude_at_init(SGD, pattern=Channel(0.5), **options),
    lambda **options: recipes.sr_ste(SGD, **options)], ids=['global', 'channel', 'sr_ste'])
def test_a_leaf_of_size_zero_changes_nothing(make):
  params = {'a': PARAMS['a'], 'c': {'kernel': PARAMS['a']['kernel'] * 2}}
  empty = {'b': {'kernel': jnp.zeros((0, 8))}}
  alone, _ = run(make(), 2, params)
  seen, state = run(make(where=sj.trees.named('kernel')), 2, params | empty)
  for key in params:
    np.testing.assert_array_equal(seen[key]['kernel'], alone[key]['kernel'])
  assert sj.masks(params | empty, state)['b']['kernel'].shape == ()
  assert 'nothing is kept of b' not in str(sj.report(jax.tree.map(lambda x: x[-1], seen), state))
