"""Tests training towards zero groups: what each recipe of the table promises, the words, and the published numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped_programs import params_of

import sparsejax as sj
from sparsejax import flows, penalties, recipes, saliences, schedules, starts, structured, transforms, units, updates

pytestmark = pytest.mark.usefixtures('standard_promotion')
X = jax.random.normal(jax.random.key(0), (8, 4))
Y = jnp.sin(X[:, :3] * 2)
STEPS, KEY = 12, jax.random.key(1)


def norm(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def apply(p, x):
  """Two dense layers with a norm, and a scanned stack of two residual layers without one of its own."""
  h = jax.nn.relu(norm(x @ p['in']['kernel'], p['in']['scale']) + p['in']['bias'])
  h = jax.nn.relu(norm(h @ p['mid']['kernel'], p['mid']['scale']))
  return h @ p['out']['kernel']


def stacked(p, x):
  def layer(h, w):
    return h + jax.nn.relu(h @ w['up']) @ w['down'], None
  return jax.lax.scan(layer, x, p)[0]


@functools.cache
def params():
  shapes = {'in': {'kernel': (4, 8), 'scale': (8,), 'bias': (8,)}, 'mid': {'kernel': (8, 6), 'scale': (6,)},
            'out': {'kernel': (6, 3)}}
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return treedef.unflatten([jax.random.normal(k, s) * 0.5 + (len(s) == 1) for k, s in zip(keys, leaves)])


@functools.cache
def found():
  return structured.groups(apply, params(), X)


def loss(p):
  return jnp.mean((apply(p, X) - Y) ** 2)


# Arguments that a recipe needs beside the groups, and the fraction of units that then is zero.
GIVEN = {
  'group_magnitude': {'total_steps': STEPS, 'every': 2}, 'group_taylor': {'total_steps': STEPS, 'every': 2},
  'oto': {'penalty': 1.0, 'epsilon': 0.99, 'begin': 2, 'end': 6}, 'hesso': {'begin': 2, 'steps': 4},
  'dhspg': {'begin': 2, 'steps': 4}, 'wgsef': {'kept': 7, 'learning_rate': 0.05, 'begin': 8},
  'norm_scale': {'begin': 6}, 'latency_aware': {'penalty': 1e-3, 'begin': 6},
  'hap': {'loss': loss, 'samples': 4, 'key': KEY},
}


def trained(tx, p, steps=STEPS, loss=loss):
  @jax.jit
  def run(p, state):
    def step(carry, _):
      moves, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
      return (optax.apply_updates(carry[0], moves), state), None
    return jax.lax.scan(step, (p, state), None, steps)[0]
  return run(p, tx.init(p))


@pytest.mark.sampled(6)
@pytest.mark.parametrize('name', recipes.STRUCTURED)
def test_every_recipe_trains_half_of_the_units_to_zero_and_cut_removes_exactly_those(name):
  assert GIVEN.keys() == recipes.STRUCTURED.keys()
  options = {} if name == 'wgsef' else {'sparsity': 0.5}
  p, state = trained(recipes.STRUCTURED[name](optax.sgd(0.05), found(), **options, **GIVEN[name]), params())
  keep = structured.kept(found(), p)
  assert sum(mask.size - mask.sum() for mask in keep.values()) == 7 and all(mask.any() for mask in keep.values())
  assert np.isfinite(loss(p)) and loss(p) < loss(params()) + 0.5
  small = structured.cut(found(), p)
  np.testing.assert_allclose(small.apply(small.params, X), apply(p, X), atol=1e-5)
  assert {name: len(mask) for name, mask in keep.items()} == {name: g.size for name, g in found().items()}
  assert small.params['in']['kernel'].shape[1] == keep['in/kernel:1'].sum()
  assert all(row.achieved > 0 for row in sj.report(p, state).rows)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('name', recipes.STRUCTURED)
def test_every_recipe_keeps_multiples(name):
  tx = recipes.STRUCTURED[name](optax.sgd(0.05), found(), budget=structured.flops(0.7), multiple_of=2, **GIVEN[name])
  kept = [int(mask.sum()) for mask in structured.kept(found(), trained(tx, params())[0]).values()]
  assert all(n % 2 == 0 < n for n in kept) and sum(kept) < 14


@pytest.mark.parametrize('name, options', [
  ('oto', {'penalty': 0.0, 'begin': 2, 'end': 4}),
  ('wgsef', {'penalty': 0.0, 'begin': 2, 'kept': 13, 'learning_rate': 0.05})])
def test_a_budget_is_reached_though_no_unit_comes_near_zero(name, options):
  recipe = recipes.STRUCTURED[name](optax.sgd(0.05), found(), budget=structured.flops(0.5), **options)
  left = {name: int(mask.sum()) for name, mask in structured.kept(found(), trained(recipe, params())[0]).items()}
  cost = structured.multiply_adds(found())
  assert cost(left) <= cost({}) / 2 < max(cost({**left, name: size + 1}) for name, size in left.items())


@pytest.mark.parametrize('options, counts', [
  ({}, {7}), ({'alone': True}, {7}), ({'multiple_of': 2}, {6}), ({'score': saliences.matching('scale')}, {7}),
])
def test_counts_hold_for_all_groups_together_or_each_alone(options, counts):
  selection = structured.grouped(found(), 0.5, **options)
  tx = transforms.sparsify(optax.sgd(0.1), flows.hard(), selection, where=units.belongs(found()),
                           refresh=schedules.once(0))
  keep = structured.kept(found(), tx.init(params()).masks)
  assert sum(mask.size - mask.sum() for mask in keep.values()) in counts
  if 'alone' in options:
    assert [mask.sum() for mask in keep.values()] == [4, 3]
  if 'multiple_of' in options:
    assert all(mask.sum() % 2 == 0 for mask in keep.values())


def test_each_layer_of_a_stack_loses_units_of_its_own_and_equally_many():
  p = {'up': jax.random.normal(KEY, (2, 4, 8)), 'down': jax.random.normal(KEY, (2, 8, 4))}
  groups = structured.groups(stacked, p, X)
  inside = {name: group for name, group in groups.items() if group.layers}
  tx = recipes.group_magnitude(optax.sgd(0.01), inside, 0.5, begin=1, end=1, total_steps=4)
  p, state = trained(tx, p, 3, lambda p: jnp.mean(stacked(p, X) ** 2))
  (keep,) = structured.kept(inside, state.masks).values()
  assert keep.shape == (2, 8) and keep.sum(1).tolist() == [4, 4] and (keep[0] != keep[1]).any()
  small = structured.cut(groups, p, structured.kept(inside, state.masks))
  assert small.params['up'].shape == (2, 4, 4)
  np.testing.assert_allclose(small.apply(small.params, X), stacked(p, X), atol=1e-5)


def test_leaves_are_found_where_the_program_has_them_deeper_in_its_variables():
  deep = structured.groups(lambda v, x: apply(v['params'], x), {'params': params()}, X)
  tx = recipes.hesso(optax.sgd(0.05), deep, 0.5, begin=1, steps=2)
  p, _ = trained(tx, params(), 4)
  assert sum((~mask).sum() for mask in structured.kept(deep, {'params': p}).values()) == 7


# Published numbers: a unit is a row of `x`, and all rows are one group of one matrix.


def rows(n, width):
  p = {'w': jnp.zeros((width, n)), 'v': jnp.zeros((n, 1))}
  return structured.groups(lambda p, x: jax.nn.relu(x @ p['w']) @ p['v'], p, jnp.zeros((1, width)))


def seen(x, grad=None, stats=None):
  """The units whose produced members are the rows of `x`; their consumers are zero."""
  x = np.asarray(x, np.float32)
  groups, of = rows(*x.shape), lambda y: None if y is None else jnp.asarray(y, jnp.float32).T
  leaves = {'v': jnp.zeros((len(x), 1)), 'w': of(x)}
  signals = [sj.types.Signals(grad=None if grad is None else jnp.zeros((len(x), 1)), stats=jnp.zeros((len(x), 1))),
             sj.types.Signals(grad=of(grad), stats=of(stats))]
  return groups, leaves, saliences.Units(units.Places.of(groups, leaves), list(leaves.values()), signals)


def test_half_space_projects_what_the_paper_projects():
  x = [[1, 2], [-.3, .1], [.05, -.02], [0, 0]]
  grad = [[.2, -.1], [-.5, .4], [.3, .3], [1, 1]]
  groups, leaves, _ = seen(x)
  pulled = jax.grad(penalties.group_norm(0.5, groups).value)(leaves)['w'].T
  trial = np.asarray(x) - 0.1 * (np.asarray(grad) + pulled)
  np.testing.assert_allclose(trial, [[.95764, 1.96528], [-.20257, .04419], [-.02642, -.03143], [-.1, -.1]], atol=1e-5)
  alive = np.array([[True, True, True, False]])
  for epsilon, left in ((0.0, [0, 1]), (0.5, [0, 1]), (0.9, [0])):
    _, _, own = seen(trial, stats=x)
    scores = saliences.half_space(epsilon)(own)
    keep = updates.below_zero()(alive, scores, lambda scores: jnp.zeros(scores.shape, bool), scores, None)
    assert np.flatnonzero(keep).tolist() == left
  near = penalties.group_norm(0.5, groups).prox({**leaves, 'w': (jnp.asarray(x) - 0.1 * jnp.asarray(grad)).T}, 0.1)
  assert np.asarray(near['w']).any(0).all()  # the proximal step zeroes none of them


def test_saliences_equal_those_of_the_published_code():
  _, _, own = seen([[1, 2], [-.3, .1], [.05, -.02]], grad=[[-.2, .05], [.5, .4], [.3, .3]])
  np.testing.assert_allclose(-saliences.redundancy(own)[0], [-.14193, -.30124, .77205], atol=2e-4)
  # trace and squared norm of three units of nine weights: 4, 1, 1/2 and 1, 9, 4
  w = np.eye(3, 9) * np.sqrt([[1], [9], [4]])
  _, _, own = seen(w, grad=np.eye(3, 9) * [[4], [1], [.5]])
  unit = saliences.hessian_trace(own)[0] * own.size[0]  # of the produced weights and one consumer
  np.testing.assert_allclose(unit, [4, 9, 2], rtol=1e-5)


@pytest.mark.parametrize('t, k, rate, expected', [
  ([3, -2, 1, .5], 2, .1, [2.72727, -1.73077, .73077, .23077]), ([3, -2, 1, .5], 2, 1, [1.5, -1, 0, 0]),
])
def test_the_prox_of_the_sparse_envelope_is_that_of_the_definition(t, k, rate, expected):
  groups, leaves, _ = seen(np.asarray(t)[:, None])
  penalty = penalties.sparse_envelope(1.0, groups, k)
  np.testing.assert_allclose(penalty.prox(leaves, rate)['w'][0], expected, atol=1e-5)


def test_the_value_of_the_sparse_envelope_and_of_its_groups():
  for k, value in ((1, 21.125), (2, 10.5625), (3, 7.625), (4, 7.125)):
    groups, leaves, _ = seen([[3.], [-2], [1], [.5]])
    assert np.isclose(penalties.sparse_envelope(1.0, groups, k).value(leaves), value)
  groups, leaves, _ = seen([[3, 4], [.6, .8], [.5, 0]])
  near = penalties.sparse_envelope(1.0, groups, 1).prox(leaves, 0.5)['w'].T
  np.testing.assert_allclose(near, [[2, 2.66667], [0, 0], [0, 0]], atol=1e-5)


@pytest.mark.parametrize('alpha, size', [([1, 1, 1, 1], 4), ([1, 0, 0, 0], 1), ([3, 4, 0, 0], 1.96), ([0, 0, 0, 0], 0)])
def test_the_effective_size_is_the_number_of_equal_units(alpha, size):
  groups, leaves, _ = seen(np.asarray(alpha)[:, None])
  (found,) = penalties.effective_sizes(groups, leaves).values()
  assert np.isclose(found, size)


def test_multiply_adds_are_products_of_the_sizes():
  cost = structured.multiply_adds(found())
  assert cost({}) == 8 * (4 * 8 + 8 * 6 + 6 * 3)
  assert cost({'in/kernel:1': 4, 'mid/kernel:1': 3}) == 8 * (4 * 4 + 4 * 3 + 3 * 3)
  with pytest.raises(ValueError, match="group.*'in/kernel'"):
    cost({'in/kernel': 4})


def test_what_fades_falls_along_a_line_to_zero_and_stays_there():
  factors = [float(schedules.fade(4, begin=3)(step)) for step in range(3, 9)]
  np.testing.assert_allclose(np.cumprod(factors), [.75, .5, .25, 0, 0, 0], atol=1e-6)


def test_the_trace_of_the_hessian_is_estimated_within_its_error():
  h = np.diag([1., 2, 3]) + 0.1
  quadratic = lambda p: 0.5 * p['w'] @ h @ p['w']
  probe = starts.hutchinson(quadratic, 400, KEY)({'w': jnp.ones(3)})
  assert abs(float(probe['w'].sum()) - np.trace(h)) < 3 * np.sqrt(2 * 0.06) / np.sqrt(400) + 1e-3


@pytest.mark.parametrize('penalty', ['l1', 'group_norm'])
def test_a_proximal_step_is_the_argmin_and_lmo_the_best_corner(penalty):
  groups, leaves, _ = seen([[1., 2], [-.3, .1], [.05, -.02]])
  own = penalties.l1(0.5) if penalty == 'l1' else penalties.group_norm(0.5, groups)
  near = own.prox(leaves, 0.3)
  worth = lambda x: sum(jnp.sum((x[k] - leaves[k]) ** 2) for k in x) / 2 + 0.3 * own.value(x)
  for seed in range(20):
    other = {k: w + 0.01 * jax.random.normal(jax.random.key(seed), w.shape) for k, w in near.items()}
    assert worth(near) <= worth(other) + 1e-6
  corner = own.lmo(leaves, 2.0)
  assert np.isclose(own.value(corner), 0.5 * 2.0) and sum(jnp.sum(corner[k] * leaves[k]) for k in leaves) < 0


def test_proximal_training_holds_exact_zeros_that_report_counts():
  tx = transforms.proximal(optax.sgd(0.05), penalties.l1(0.5), 0.05)
  p, state = trained(tx, params())
  assert (np.asarray(p['mid']['kernel']) == 0).sum() > 4 and np.asarray(p['in']['bias']).all()
  with pytest.raises(ValueError, match=r'no `prox`; use transforms.penalised'):
    transforms.proximal(optax.sgd(0.1), penalties.latency(1.0, found(), structured.multiply_adds(found())), 0.1)


# Bad input.


@pytest.mark.parametrize('call, said', [
  (lambda: structured.grouped({}, 0.5), 'there is no group'),
  (lambda: structured.grouped(found(), 0.99), '2 groups need 2'),
  (lambda: structured.grouped(found(), 50), 'fraction of zeros'),
  (lambda: structured.grouped('in/kernel:1', 0.5), 'groups of a program'),
  (lambda: recipes.hesso(optax.sgd(0.1), found()).init({'in': params()['in']}), "'mid/kernel'|'out/kernel'"),
  (lambda: recipes.group_magnitude(optax.sgd(0.1), found(), 0.5), 'pass total_steps='),
  (lambda: recipes.oto(optax.sgd(0.1), found(), budget=structured.flops(0.01), end=9), 'budget of 0.01 is .* costs'),
  (lambda: trained(recipes.norm_scale(optax.sgd(0.1), found(), scales='bias', begin=1), params(), 2), 'mid/kernel:1'),
  (lambda: recipes.oto(optax.sgd(0.1), found(), epsilons=1), 'epsilon'),
  (lambda: recipes.wgsef(optax.sgd(0.1), found(), 99, 0.1), 'kept=99 of 14 units in 2 groups'),
  (lambda: updates.below_zero(until='last'), 'until'),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()


def test_groups_that_share_weights_have_no_proximal_step():
  p = params_of({'w': (4, 3, 2), 'v': (3, 2, 4)})
  groups = structured.groups(lambda p, x: jnp.einsum('bhd,hdo->bo', jnp.einsum('bi,ihd->bhd', x, p['w']), p['v']), p, X)
  assert len(groups) == 2
  with pytest.raises(ValueError, match=r"'w'.*two units"):
    penalties.group_norm(1.0, groups).prox(p, 1.0)
