"""Checks that a state is continued by its own recipe only: recipe, pattern, flow and leaves are its identity."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import flows, plans, recipes, schedules, scores, selections, states, transforms, trees

LIKE = {'fc': {'kernel': cases.F32((96, 4)), 'bias': cases.F32((4,))}, 'head': {'kernel': cases.F32((32, 4))}}
PARAMS = cases.random(0, like=LIKE)
SGD = optax.sgd(0.1)
PAIRS = [(a, b) for a in recipes.TABLE for b in recipes.TABLE if a != b]


@functools.cache
def made(name):
  """Returns the optimizer of a recipe in the table, and one of its states, with zeros for all but the identity."""
  tx = cases.CASES[name].make(axes=None)
  return tx, filled(jax.eval_shape(tx.init, PARAMS))


def filled(abstract):
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
  return state._replace(plan=state.plan.carrying(state.plan.fingerprint))


def through_a_file(state, blank):
  """Returns the arrays of `state` in the structure of `blank`, as tools that save nothing but arrays return them."""
  arrays, others = jax.tree.leaves(state), jax.tree.leaves(blank)
  if [x.shape for x in arrays] != [x.shape for x in others]:
    return None  # the tool itself refuses it
  return jax.tree.unflatten(jax.tree.structure(blank), arrays)


@pytest.mark.sampled(8)
@pytest.mark.parametrize('name', recipes.TABLE)
def test_every_other_recipe_refuses_a_state_and_names_both(name):
  """Tests the plan in one process, and the array from a file wherever the trees have the same structure."""
  _, old = made(name)
  seen = 0
  for other in recipes.TABLE:
    tx, blank = made(other)
    for state in (old, through_a_file(old, blank)) if other != name else ():
      if state is None:
        continue
      with pytest.raises(ValueError) as refusal:
        tx.update(PARAMS, state, PARAMS)
      text = str(refusal.value)
      assert f'made by {name} ' in text and f'This optimizer is {other} ' in text and 'tx.init(params)' in text
      seen += state is not old
      for tool in (sj.masks, sj.project, sj.report, sj.check) if state is not old else ():
        with pytest.raises(ValueError, match=f'made by {name} .*This optimizer is {other} '):
          tool(PARAMS, state)
  unlike_all_others = ('dass', 'dense', 'movement_pruning', 'snfs', 'soft_movement_pruning', 'sparcl', 'st3')
  assert seen or name in unlike_all_others


SAME = {
    'another coefficient': (recipes.sr_ste(SGD, decay=1e-4), recipes.sr_ste(SGD, decay=2e-4)),
    'another schedule': (recipes.mdgf(SGD, decay=lambda step: 1.0), recipes.mdgf(SGD, decay=schedules.constant(0.5))),
    'another end': (recipes.gradual_magnitude(SGD, 0.5, total_steps=10),
                    recipes.gradual_magnitude(SGD, 0.6, total_steps=20)),
    'a fine-tune phase': (recipes.ste(SGD), recipes.ste(SGD, total_steps=9, fine_tune_steps=3)),
    'another key': (recipes.set_(SGD, 0.5, total_steps=9, key=jax.random.key(0)),
                    recipes.set_(SGD, 0.5, total_steps=9, key=jax.random.key(1))),
    'the same choice of leaves, said otherwise': (
        recipes.ste(SGD), recipes.ste(SGD, where=trees.named('fc/kernel', 'head/kernel'))),
    'a pattern in quotes': (recipes.asp(SGD, '2:4'), recipes.asp(SGD, sj.NM(2, 4))),
    'no name': (transforms.sparsify(SGD, flows.hard(), selections.leafwise(sj.NM(2, 4))),
                transforms.sparsify(optax.sgd(0.2), flows.hard(), selections.leafwise(sj.NM(2, 4)))),
}
OTHER = {
    'pattern': (recipes.asp(SGD, sj.NM(2, 4)), recipes.asp(SGD, sj.NM(1, 4)), '2:4', '1:4'),
    'pattern under a moving mask': (recipes.ste(SGD, sj.NM(2, 4)), recipes.ste(SGD, sj.NM(2, 8)), '2:4', '2:8'),
    'block': (recipes.magnitude_at_init(SGD, 0.5, sj.Block((8, 2))), recipes.magnitude_at_init(SGD, 0.5), '8x2',
              'unstructured'),
    'sparsity of a mask that is chosen once': (
        recipes.magnitude_at_init(SGD, 0.5), recipes.magnitude_at_init(SGD, 0.9), 'at 0.5', 'at 0.9'),
    'flow': (recipes.mdgf(SGD), recipes.mdgf(SGD, gradient='straight_through'), 'decayed_gradient', 'whole_gradient'),
    'settling': (recipes.sr_ste(SGD), recipes.sr_ste(SGD, decoupled=True), 'refined', 'shrink_pruned'),
    'where': (recipes.ste(SGD), recipes.ste(SGD, where=trees.named('fc/kernel')), '2 leaves', '1 leaf'),
    'score of a sentence of one\'s own': (
        transforms.sparsify(SGD, flows.hard(), selections.leafwise(sj.NM(2, 4))),
        transforms.sparsify(SGD, flows.hard(), selections.leafwise(sj.NM(2, 4), score=scores.snip), dense_steps=1),
        'magnitude', 'snip'),
    'name': (transforms.sparsify(SGD, flows.hard(), selections.leafwise(sj.NM(2, 4)), name='mine'),
             transforms.sparsify(SGD, flows.hard(), selections.leafwise(sj.NM(2, 4))), 'mine of', 'sparsify of'),
    'axes of an axis-bound pattern': (
        recipes.ste(SGD, axes={path: sj.types.Axes((0,), (1,)) for path in ('fc/kernel', 'head/kernel')}),
        recipes.ste(SGD, axes={path: sj.types.Axes((1,), (0,)) for path in ('fc/kernel', 'head/kernel')}),
        'ste', 'an axis'),
}


@pytest.mark.parametrize('what', SAME)
def test_numbers_and_schedules_are_configuration(what):
  before, after = SAME[what]
  state = filled(jax.eval_shape(before.init, PARAMS))
  for each in (state, through_a_file(state, filled(jax.eval_shape(after.init, PARAMS)))):
    jax.eval_shape(after.update, PARAMS, each, PARAMS)
    plans.refuse_unless_of(jax.eval_shape(after.init, PARAMS).plan, each.plan.identity)


@pytest.mark.parametrize('what', OTHER)
def test_words_are_identity(what):
  before, after, *words = OTHER[what]
  for first, second, says in ((before, after, words), (after, before, words[::-1])):
    state, blank = (filled(jax.eval_shape(tx.init, PARAMS)) for tx in (first, second))
    for each in filter(None, (state, through_a_file(state, blank))):
      with pytest.raises(ValueError) as refusal:
        second.update(PARAMS, each, PARAMS)
      assert all(word in str(refusal.value) for word in says), str(refusal.value)
    with pytest.raises(ValueError, match='the state was made by'):
      jax.jit(second.update).lower(PARAMS, state, PARAMS)


def test_a_restored_state_of_another_identity_is_marked_under_jit_and_named_by_check():
  old, tx = recipes.ste(SGD), recipes.bdwp(SGD)  # the same words under two names
  state = through_a_file(jax.jit(old.init)(PARAMS), tx.init(PARAMS))
  updates, after = jax.jit(tx.update)(PARAMS, state, PARAMS)
  assert bool(jnp.isnan(updates['fc']['kernel']).all())
  with pytest.raises(ValueError, match='made by ste .* This optimizer is bdwp'):
    sj.check(optax.apply_updates(PARAMS, updates), after)
  updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
  assert not any(bool(jnp.isnan(u).any()) for u in jax.tree.leaves(updates))


def test_a_memory_of_another_kind_is_refused_in_words():
  old, tx = (recipes.movement_pruning(SGD, 0.5, end=9, score_optimizer=each) for each in (SGD, optax.adam(0.1)))
  with pytest.raises(ValueError, match='the memory in the state is .*EmptyState.*Adam'):
    tx.update(PARAMS, old.init(PARAMS), PARAMS)


def test_the_words_of_a_fingerprint_are_whole_or_end_in_dots():
  leaf = states.SparseLeaf('a/kernel', (8, 4), sj.types.Axes((0,), (1,)), sj.NM(2, 4))
  plan = states.Plan((leaf,), recipe='asp', words=('masked',))
  assert plans.text_of(plan.fingerprint) == plan.text == "asp of 2:4 by masked on 1 leaf, 'a/kernel'"
  long = states.Plan((leaf,), recipe='ä' * 200)
  assert plans.text_of(long.fingerprint) == 'ä' * 124 + '...' and long.fingerprint.shape == (plans.BYTES,)
  stacked = jax.vmap(recipes.ste(SGD).init)(jax.tree.map(lambda w: jnp.stack([w, w]), PARAMS))
  assert stacked.plan.identity.shape == (2, plans.BYTES) and states.find(stacked)
  with pytest.raises(ValueError, match='made by something that cannot be read'):
    plans.refuse_unless_of(plan, np.zeros(3, np.uint8))


def test_a_state_without_its_plan_is_refused():
  tx = recipes.ste(SGD)
  with pytest.raises(ValueError, match='the plan of the state is gone; a NoneType is in its place'):
    tx.update(PARAMS, tx.init(PARAMS)._replace(plan=None), PARAMS)


# Each entry changes a state, and has the words of the refusal.
CASTS = {
    'all of it to bfloat16': (lambda state: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state), 'master .* is bfloat16'),
    'a step as a float': (lambda state: state._replace(step=jnp.float32(2)), r'step of the state is float32\[\]'),
    'a step of two devices': (lambda state: state._replace(step=jnp.zeros(2, jnp.int32)), r'is int32\[2\]'),
    'no step': (lambda state: state._replace(step=None), 'step of the state is gone'),
    'no key': (lambda state: state._replace(key=None), 'PRNG key of the state is gone'),
    'a typed key': (lambda state: state._replace(key=jax.random.key(0)), r'PRNG key of the state is key<.*>\[\]'),
}


@pytest.mark.parametrize('cast', CASTS)
def test_a_state_that_was_cast_or_lost_an_array_is_refused(cast):
  change, says = CASTS[cast]
  tx = recipes.sr_ste(SGD, key=jax.random.key(0))
  with pytest.raises(ValueError, match=f'^sparsejax: .*{says}.*tx.init'):
    jax.eval_shape(tx.update, PARAMS, change(tx.init(PARAMS)), PARAMS)
