"""Checks `report` and `check`, and `project`, `masks` and `find`, on which both are built."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparsejax
from sparsejax import NM, Block, Unstructured, recipes, schedules, states, trees
from sparsejax.types import Axes

SHAPES = {'fc': {'kernel': cases.F32((16, 8)), 'bias': cases.F32((8,))}, 'head': {'kernel': cases.F32((24, 4))}}


def parameters(seed=0):
  return cases.random(seed, like=SHAPES)


def pruned(w, n, m, contracted=(0,)):
  """Returns `w` with the largest n of m kept, by the oracle."""
  return jnp.where(jnp.asarray(oracle.n_of_m(np.abs(w), n, m, contracted)), w, 0)


def trained(tx, params, steps=6, project=True):
  """Parameters and state after some updates in noise."""
  state = jax.jit(tx.init)(params)
  params = sparsejax.project(params, state) if project else params
  update = jax.jit(lambda params, state, grads: cases.step(tx, params, state, grads))
  for t in range(steps):
    params, state = update(params, state, parameters(t + 1))
  return params, state


# Reports come first.


def test_a_report_has_a_row_for_each_sparse_leaf_and_counts_all_of_them():
  pattern = {'head/kernel': NM(1, 8), '**': NM(2, 4)}
  params, state = trained(recipes.ste(optax.sgd(0.1), pattern), parameters())
  report = sparsejax.report(params, state)
  assert [(row.path, row.shape, row.pattern, row.asked, row.achieved, row.problem) for row in report.rows] == [
      ('fc/kernel', (16, 8), NM(2, 4), 0.5, 0.5, ''), ('head/kernel', (24, 4), NM(1, 8), 0.875, 0.875, '')]
  zeros = sum(int(np.sum(np.asarray(params[at]['kernel']) == 0)) for at in ('fc', 'head'))
  assert report.asked == report.achieved == pytest.approx(zeros / (128 + 96)) and not report.violations
  lines = str(report).splitlines()
  assert lines[0].split() == ['parameter', 'shape', 'pattern', 'along', 'asked', 'achieved']
  assert lines[2].split() == ['fc/kernel', '16', 'x', '8', '2:4', '0', '(convention)', '0.5000', '0.5000']
  assert lines[4].split() == ['together', '0.6607', '0.6607']
  assert sparsejax.check(params, state) == report


def test_the_axes_are_those_of_the_recipe_and_the_report_says_whose():
  """`weight` is `[out, in]` by convention; the program contracts its first axis, and the mask follows the program."""
  params = {'weight': parameters()['fc']['kernel']}
  axes = sparsejax.contractions(lambda params, x: x @ params['weight'], params, jnp.ones((2, 16)))
  params, state = trained_alone(recipes.asp(optax.sgd(0.1), NM(1, 16), axes=axes), params)
  (row,) = sparsejax.check(params, state).rows
  assert row.axes == Axes((0,), (1,), source='traced') and '0 (traced)' in str(sparsejax.report(params, state))
  assert np.all(np.sum(np.asarray(params['weight']) != 0, 0) == 1)
  with pytest.raises(ValueError, match=r"check: 1 of 1 .*\n.*weight \(16, 8\): 1:16 needs a contraction axis"):
    sparsejax.check(params, pattern=NM(1, 16))


def trained_alone(tx, params):
  state = jax.jit(tx.init)(params)
  return jax.jit(lambda *now: cases.step(tx, *now))(params, state, jax.tree.map(jnp.ones_like, params))


def test_without_a_state_each_row_names_the_tightest_common_pattern():
  params = parameters()
  params['fc']['kernel'] = pruned(params['fc']['kernel'], 2, 8)
  report = sparsejax.report(params)
  assert [(row.path, row.pattern, row.asked) for row in report.rows] == [
      ('fc/kernel', NM(2, 8), None), ('head/kernel', None, None)]
  assert report.asked is None and report.achieved == pytest.approx(96 / 224) and not report.violations


def test_a_pattern_without_a_state_is_checked_along_the_contraction():
  """Checks that 2:4 along the rows, where a mask on the last axis would put it, is not 2:4 to a matrix product."""
  params = parameters()
  right, wrong = (params | {'fc': {'kernel': pruned(params['fc']['kernel'], 2, 4, axes)}} for axes in ((0,), (1,)))
  where = trees.named('fc/kernel')
  assert sparsejax.check(right, pattern=NM(2, 4), where=where).achieved == 0.5
  with pytest.raises(ValueError, match=r'fc/kernel \(16, 8\): \d+ of 32 groups keep more than 2 of 4, the first, '):
    sparsejax.check(wrong, pattern=NM(2, 4), where=where)
  axes = {'fc/kernel': Axes((1,), (0,))}
  assert sparsejax.check(wrong, pattern=NM(2, 4), where=where, axes=axes).achieved == 0.5


def test_check_names_every_parameter_with_the_place_and_what_is_wrong():
  params = parameters()
  params['fc']['kernel'] = pruned(params['fc']['kernel'], 1, 4).at[4:8, 3].set(jnp.asarray([1.0, 0.0, 2.0, 0.0]))
  with pytest.raises(ValueError) as refusal:
    sparsejax.check(params, pattern={'fc/*': NM(1, 4), '**': Unstructured(0.75)})
  assert str(refusal.value).splitlines() == [
      'check: 2 of 2 parameters do not keep their pattern:',
      '  fc/kernel (16, 8): 1 of 32 groups keep more than 1 of 4, the first, (1, 3), keeps 2',
      '  head/kernel (24, 4): 96 weights are kept, 24 asked']


@pytest.mark.parametrize('pattern, problem', [
    (Unstructured(0.5), '128 weights are kept in layer 1, 64 asked'),
    (Block((4, 4), 0.5), '8 blocks are kept in layer 1, 4 asked')])
def test_a_stack_is_checked_layer_by_layer(pattern, problem):
  stack, axes = jnp.stack([jnp.zeros((16, 8)), jnp.ones((16, 8))]), {'kernel': Axes((1,), (2,), layer=(0,))}
  with pytest.raises(ValueError, match=problem):
    sparsejax.check({'kernel': stack}, pattern, axes=axes)
  even = jnp.where(pattern(stack, None, Axes((1,), (2,), layer=(0,))), 1.0, 0.0)
  assert sparsejax.check({'kernel': even}, pattern, axes=axes).achieved == 0.5


def test_a_group_may_keep_fewer():
  params = {'kernel': jnp.zeros((8, 4))}
  assert sparsejax.check(params, pattern=NM(2, 4)).achieved == 1.0


# Violations follow.


SPOILERS = {  # transforms that spoil the zeros, and how a report names them
    'rescaled': (lambda tx: optax.chain(tx, optax.scale(0.5)), 'it is member 1 of a chain, before EmptyState'),
    'scheduled': (lambda tx: optax.chain(optax.clip(9.0), tx, optax.scale_by_schedule(lambda t: 0.5), optax.identity()),
                  'it is member 2 of a chain, before ScaleByScheduleState and EmptyState'),
    'decayed': (lambda tx: optax.apply_if_finite(optax.chain(tx, optax.add_decayed_weights(-0.1)), 2),
                'it is in ApplyIfFiniteState, member 1 of a chain, before EmptyState'),
    'averaged': (lambda tx: optax.contrib.schedule_free(tx, 0.3), 'it is in ScheduleFreeState'),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize('recipe, spoiler', [
    (recipe, spoiler) for recipe in ('ste', 'asp', 'st3', 'mdgf-scaled-linear') for spoiler in SPOILERS
    if (recipe, spoiler) != ('asp', 'averaged')])  # weights that are always sent to zero are zero on average
def test_what_changes_the_updates_afterwards_is_found_and_named(recipe, spoiler):
  wrap, name = SPOILERS[spoiler]
  tx = wrap(cases.CASES[recipe].make(axes=None))
  params, state = trained(tx, parameters(), cases.STEPS, project=False)
  report = sparsejax.report(params, state)
  assert report.violations
  for row in report.violations:
    assert row.path in ('fc/kernel', 'head/kernel') and f'outermost transform on its leaves, {name})' in row.problem
    assert int(row.problem.split()[0]) > 0
  with pytest.raises(ValueError, match=r'check: .*\n  .*kernel .*are not zero: something after the recipe changes'):
    sparsejax.check(params, state)


@jax.tree_util.register_pytree_node_class
class Keyless:
  """A `Keyless` is a container that gives its member no key of its own."""

  def __init__(self, member):
    self.member = member

  def tree_flatten(self):
    return (self.member,), None

  @classmethod
  def tree_unflatten(cls, aux, children):
    return cls(*children)


def test_what_surrounds_a_recipe_is_named_through_a_container_without_keys():
  state = recipes.ste(optax.sgd(0.1)).init(parameters())
  chained = {'a': Keyless([optax.EmptyState(), (state, optax.ScaleByScheduleState(0))])}
  assert states.surroundings(chained) == ['member 1 of a chain, before ScaleByScheduleState']


def test_before_the_first_update_the_remedy_is_project():
  params, tx = parameters(), recipes.sr_ste(optax.sgd(0.1))
  state = tx.init(params)
  report = sparsejax.report(params, state)
  assert len(report.violations) == 2 and 'sparsejax.project(params, opt_state) is where training starts' in str(report)
  sparsejax.check(sparsejax.project(params, state), state)


@pytest.mark.parametrize('options', [{'decay': schedules.linear(end=50)}, {'dense_steps': 50}])
def test_a_mask_that_still_fades_is_not_there_yet(options):
  params, state = trained(recipes.mdgf(optax.sgd(0.1), **options), parameters())
  for row in sparsejax.report(params, state).violations:
    assert row.problem.startswith('not there yet (dense phase or decay): 32 of 32') or row.path == 'head/kernel'
  with pytest.raises(ValueError, match='check: 2 of 2'):
    sparsejax.check(params, state)


@pytest.mark.parametrize('sigma', [False, True])
def test_a_sparsity_of_all_leaves_together_is_checked_together(sigma):
  tx = recipes.st3(optax.sgd(0.1), 0.7, total_steps=6, sigma=sigma)
  params, state = trained(tx, parameters(), 3)
  early = sparsejax.report(params, state)
  assert early.asked == 0.7 and early.achieved < 0.69 and len(early.violations) == 2
  with pytest.raises(ValueError, match='not there yet .*: 0.[56].* of all of them together are zero, 0.7000 asked'):
    sparsejax.check(params, state)
  params, state = trained(tx, parameters(), 6)
  late = sparsejax.check(params, state)
  assert late.asked == 0.7 and late.achieved == pytest.approx(0.7, abs=2 / 224)
  assert 'asked of all of them together: 0.7000' in str(late)


def test_zeros_that_were_lost_on_the_way_are_found():
  """Checks that parameters of any origin, such as a merge or another run, are compared with the state."""
  params, state = trained(recipes.ste(optax.sgd(0.1)), parameters())
  params['head']['kernel'] = params['head']['kernel'] + 0.01
  assert [row.path for row in sparsejax.report(params, state).violations] == ['head/kernel']


def test_the_state_says_what_was_asked_and_nobody_else():
  params, state = trained(recipes.ste(optax.sgd(0.1)), parameters())
  for other in ({'pattern': NM(1, 4)}, {'where': trees.named('fc/*')}):
    with pytest.raises(ValueError, match='what was asked is in the optimizer state'):
      sparsejax.report(params, state, **other)


def test_a_recipe_that_prunes_nothing_reports_nothing():
  params, state = trained(recipes.dense(optax.sgd(0.1)), parameters())
  report = sparsejax.check(params, state)
  assert (report.rows, report.asked) == ((), None) and 'together' in str(report)


@pytest.mark.parametrize('cast', [np.asarray, lambda w: w.astype(jnp.bfloat16), lambda w: w.astype(jnp.float16)])
def test_parameters_may_be_cast_for_inference(cast):
  params, state = trained(recipes.ste(optax.sgd(0.1)), parameters())
  assert sparsejax.check(jax.tree.map(cast, params), state).achieved == 0.5


def test_an_ensemble_is_checked_member_by_member():
  tx = recipes.ste(optax.sgd(0.1), NM(1, 8))
  together = jax.tree.map(lambda *x: jnp.stack(x), *[parameters(seed) for seed in range(3)])
  step = jax.jit(jax.vmap(lambda p: cases.step(tx, p, tx.init(p), p)))
  params, state = step(together)
  report = sparsejax.check(params, state)
  assert [(row.shape, row.axes.contracted, row.axes.layer) for row in report.rows] == [
      ((3, 16, 8), (1,), (0,)), ((3, 24, 4), (1,), (0,))]
  params['fc']['kernel'] = params['fc']['kernel'].at[2, :8, 5].set(1.0)
  (row,) = sparsejax.report(params, state).violations
  assert row.problem.startswith('7 pruned weights are not zero')


# The functions of `states` come last.


def test_masks_are_true_where_kept_and_one_true_for_a_dense_leaf():
  params, state = trained(recipes.ste(optax.sgd(0.1)), parameters())
  masks = sparsejax.masks(params, state)
  assert jax.tree.structure(masks) == jax.tree.structure(params)
  np.testing.assert_array_equal(masks['fc']['kernel'], np.asarray(params['fc']['kernel']) != 0)
  assert masks['fc']['bias'].shape == () and masks['fc']['bias'].dtype == bool and masks['fc']['bias']
  masked = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, masks)
  cases.assert_same(masked, params)


def test_project_is_where_the_first_update_starts_from():
  """Projected or not, the next point is the same, because the master is."""
  tx, params = recipes.mdgf(optax.sgd(0.1), decay=schedules.linear(0.5, 0.0, end=4)), parameters()
  state = tx.init(params)
  point = sparsejax.project(params, state)
  expected = np.where(oracle.n_of_m(np.abs(params['fc']['kernel']), 2, 4, (0,)), 1.0, 0.5) * params['fc']['kernel']
  np.testing.assert_allclose(point['fc']['kernel'], expected, rtol=1e-6)
  np.testing.assert_array_equal(point['fc']['bias'], params['fc']['bias'])
  cases.assert_same(sparsejax.project(point, state), point)
  states = [cases.step(tx, start, state, parameters(1)) for start in (params, point)]
  for held, after in states:
    cases.assert_at_the_point(params, held, sparsejax.project(held, after))
  cases.assert_same(states[0][1], states[1][1])


def test_project_of_a_state_without_a_master_masks_what_is_held():
  params, tx = parameters(), recipes.asp(optax.sgd(0.1))
  point = sparsejax.project(params, tx.init(params))
  np.testing.assert_array_equal(point['fc']['kernel'], pruned(params['fc']['kernel'], 2, 4))


def test_find_sees_every_state_wherever_it_is_and_says_so_if_there_is_none():
  params = parameters()
  tx = recipes.ste(optax.sgd(0.1), where=trees.named('fc/kernel'))
  other = recipes.asp(optax.sgd(0.1), where=trees.named('head/kernel'))
  nested = {'a': [optax.chain(optax.clip(1.0), optax.apply_if_finite(tx, 2)).init(params)], 'b': (other.init(params),)}
  assert [state.plan.leaves[0].path for state in states.find(nested)] == ['fc/kernel', 'head/kernel']
  assert [row.path for row in sparsejax.report(sparsejax.project(params, nested), nested).rows] == [
      'fc/kernel', 'head/kernel']
  for look in (sparsejax.project, sparsejax.masks, sparsejax.report, sparsejax.check):
    with pytest.raises(ValueError, match='no SparseState in this optimizer state. Wrap the optimizer in a recipe'):
      look(params, optax.adam(0.1).init(params))
