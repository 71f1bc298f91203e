"""Checks leaves that are ranked together, redistribution between layers, floors, and the choice of the first masks."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparsejax as sj
from sparsejax import allocation, recipes, schedules, scores, selections, starts
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.types import Axes, Signals

AXES = {'a/kernel': Axes((0,), (1,)), 'b/kernel': Axes((1,), (2,), layer=(0,)),
        'c/kernel': Axes((2,), (3,), spatial=(0, 1))}
SHAPES = {'a/kernel': (8, 6), 'b/kernel': (3, 8, 6), 'c/kernel': (2, 1, 4, 6)}  # 8 weights a channel, all of them
PATTERNS = {'unstructured': Unstructured(), 'block': Block((4, 3)), 'channel': Channel()}


def drawn(seed, kind):
  """Numbers for each leaf: with many ties, some NaN, a stack whose layers differ."""
  rng = np.random.default_rng(seed)
  draw = {'ties': lambda s: rng.integers(-2, 3, s) / 2, 'normal': rng.normal, 'nan': rng.normal}[kind]
  leaves = {path: np.float32(draw(size=s) if kind != 'ties' else draw(s)) for path, s in SHAPES.items()}
  leaves['b/kernel'] *= np.float32([1, 2, 0.5]).reshape(3, 1, 1)
  if kind == 'nan':
    leaves['a/kernel'][:, :2] = leaves['c/kernel'][..., 1, 4] = np.nan
  return leaves


@functools.cache
def ranked(name, shares, score, sparsity):
  """`weights -> masks`, leaves ranked together."""
  shares = {'global': allocation.global_, 'lamp': allocation.lamp,
            'from_scores': lambda: allocation.from_scores(scores.gradient)}[shares]()
  selection = selections.leafwise(PATTERNS[name], score=score, sparsity=sparsity, allocation=shares)

  def run(weights, grads):
    leaves = selection.plan(weights, AXES).leaves
    signals = [Signals(grad=g, step=0, axes=AXES[path]) for path, g in grads.items()]
    masks = [jnp.ones_like(w, bool) for w in weights.values()]
    return selection.select(leaves, [*weights.values()], masks, signals)[0]

  return jax.jit(run)


def units(name, values, axes):
  """The sums of what is pruned whole, and of which layer each one is, `[units]` each."""
  pool = PATTERNS[name].pooled(values, axes)
  layer = np.zeros(pool.scores.shape, int)
  for a in pool.layers:
    layer = layer * pool.scores.shape[a] + np.indices(layer.shape)[a]
  return np.asarray(pool.scores, np.float64).reshape(-1), layer.reshape(-1)


def lamp(x):
  """Returns the scores of Lee et al. 2021, equation 1, of one layer."""
  x = np.nan_to_num(x)
  return np.float32([v * v / sum(u * u for j, u in enumerate(x) if (abs(u), -j) >= (abs(v), -i))
                     if v else 0 for i, v in enumerate(x)])


def best_counts(name, values, sparsity, normalise=None):
  """Returns how many units each layer of each leaf keeps, by sorting all units, the earlier of equals first."""
  columns = [units(name, np.abs(x), AXES[path]) for path, x in values.items()]
  if normalise:
    for x, layer in columns:
      for i in range(layer.max() + 1):
        x[layer == i] = normalise(x[layer == i])
  everything = np.concatenate([x for x, _ in columns])
  mask = oracle.best(everything, everything.size - round(sparsity * everything.size))
  parts = np.split(mask, np.cumsum([x.size for x, _ in columns])[:-1])
  return [np.bincount(layer, part, layer.max() + 1).astype(int) for (_, layer), part in zip(columns, parts)]


def assert_kept(name, masks, weights, counts):
  """Asserts that each layer keeps as many units as counted, the best of the layer by |w|."""
  for (path, w), mask, count in zip(weights.items(), masks, counts):
    axes = AXES[path]
    alone = [np.abs(w)] if not axes.layer else list(np.abs(w))
    inside = Axes((0,), (1,)) if axes.layer else axes
    for x, found, n in zip(alone, [mask] if not axes.layer else mask, count):
      if name == 'block':
        expected = oracle.blocks(x, n, (4, 3), inside)
      elif name == 'channel':
        expected = oracle.channels(x, n, inside)
      else:
        expected = oracle.best(x.reshape(-1), n).reshape(x.shape)
      np.testing.assert_array_equal(found, expected, err_msg=path)


@pytest.mark.parametrize('kind', ['normal', 'ties', 'nan'])
@pytest.mark.parametrize('name', PATTERNS)
def test_leaves_ranked_together_keep_what_everything_sorted_would(name, kind):
  """Checks that the count of the whole is exact, with ties from the earlier leaf and the lower index, and NaN last."""
  for seed, sparsity in ((0, 0.6), (1, 0.6)):
    weights = drawn(seed, kind)
    masks = ranked(name, 'global', scores.magnitude, sparsity)(weights, weights)
    counts = best_counts(name, weights, sparsity)
    assert_kept(name, masks, weights, counts)
    total, size = sum(SHAPE.size for SHAPE in masks), {'block': 12, 'channel': 8}.get(name, 1)
    assert sum(int(mask.sum()) for mask in masks) == size * (total // size - round(sparsity * (total // size)))


@pytest.mark.parametrize('name', ['block'])
def test_other_scores_may_say_how_many_and_the_recipes_own_which(name):
  weights, grads = drawn(0, 'normal'), drawn(1, 'normal')
  masks = ranked(name, 'from_scores', scores.magnitude, 0.6)(weights, grads)
  assert_kept(name, masks, weights, best_counts(name, grads, 0.6))
  assert np.any(np.concatenate(best_counts(name, grads, 0.6)) != np.concatenate(best_counts(name, weights, 0.6)))


@pytest.mark.parametrize('kind', ['normal', 'ties'])
@pytest.mark.parametrize('name', ['unstructured', 'channel'])
def test_lamp_ranks_each_layer_by_what_is_left_of_it(name, kind):
  """A layer of a stack is one by itself: twice its weights are the same to it."""
  weights = drawn(4, kind)
  masks = ranked(name, 'lamp', scores.magnitude, 0.7)(weights, weights)
  counts = best_counts(name, weights, 0.7, lamp)
  assert_kept(name, masks, weights, counts)
  louder = weights | {'b/kernel': weights['b/kernel'] * np.float32([4, 1, 16]).reshape(3, 1, 1)}
  for mask, other in zip(masks, ranked(name, 'lamp', scores.magnitude, 0.7)(louder, louder)):
    np.testing.assert_array_equal(mask, other)
  assert min(count.min() for count in counts) > 0  # the largest of a layer scores 1


def test_a_ramp_of_leaves_ranked_together_is_exact_at_its_end_and_what_is_pruned_stays_so():
  params = {path: jnp.asarray(w) for path, w in drawn(5, 'normal').items()}
  tx = recipes.gradual_magnitude(optax.sgd(0.5), 0.9, every=1, end=4, allocation=allocation.global_(), axes=AXES)
  state, update, size = tx.init(params), jax.jit(tx.update), sum(math.prod(s) for s in SHAPES.values())
  seen = [sj.masks(params, state)]
  for seed in range(5):
    moves, state = update({path: jnp.asarray(w) for path, w in drawn(seed, 'normal').items()}, state, params)
    params = optax.apply_updates(params, moves)
    seen.append(sj.masks(params, state))
  kept = [sum(int(m.sum()) for m in masks.values()) for masks in seen]
  assert kept == [size - round(size * 0.9 * (1 - (1 - min(t / 4, 1)) ** 3)) for t in range(6)]
  for before, after in zip(seen, seen[1:]):
    assert not any(np.any(after[path] & ~before[path]) for path in SHAPES)


@functools.cache
def moving(pattern):
  tx = recipes.snfs(optax.sgd(0.01), pattern=pattern, every=2, end=9, fraction=schedules.constant(0.5), axes=AXES,
                    key=jax.random.key(0))
  return tx.init, jax.jit(tx.update)


@pytest.mark.parametrize('name, pattern', [('unstructured', Unstructured(0.8)), ('block', Block((4, 3), 0.5))])
@pytest.mark.parametrize('broken', [None, np.nan, np.inf])
def test_sparse_momentum_keeps_the_count_of_all_layers_together(name, pattern, broken):
  """Checks every update, whatever the gradients, and that layers with a large momentum grow."""
  params = {path: jnp.asarray(w) for path, w in drawn(6, 'normal').items()}
  init, update = moving(pattern)
  state = init(params)
  first = jax.device_get(sj.masks(params, state))
  for t in range(8):
    params, grads = jax.device_get(params), drawn(t, 'normal')
    grads['b/kernel'] = grads['b/kernel'] * np.float32([0.1, 20, 0.1]).reshape(3, 1, 1)
    if broken is not None and t == 1:
      grads['a/kernel'][0, 0] = broken
    before = jax.device_get(sj.masks(params, state))
    moved = {path: w - 0.01 * grads[path] for path, w in params.items()}
    moves, state = update(grads, state, params)
    params = optax.apply_updates(params, moves)
    masks = jax.device_get(sj.masks(params, state))
    assert sum(int(m.sum()) for m in masks.values()) == sum(int(m.sum()) for m in first.values())
    changed = any(np.any(masks[path] != before[path]) for path in SHAPES)
    assert changed <= (t % 2 == 1) and changed >= (t == 1), t
    for path, mask in masks.items():
      if name == 'unstructured':  # the larger half of what was kept stays
        size = np.where(before[path], np.abs(np.nan_to_num(moved[path], nan=0.0)), -1).reshape(-1, 48)
        for x, old, new in zip(size, np.reshape(before[path], (-1, 48)), np.reshape(mask, (-1, 48))):
          assert np.all(new[oracle.best(x, old.sum() - old.sum() // 2)])
      assert {*np.unique(units(name, np.asarray(mask), AXES[path])[0])} <= {0, 12 if name == 'block' else 1}
  if broken is None and name == 'unstructured':  # of blocks there are too few for shares of them
    grown = np.sum(masks['b/kernel'], (1, 2)) - np.sum(first['b/kernel'], (1, 2))
    assert grown[1] > 0 and all(np.sum(masks[path]) < np.sum(first[path]) for path in ('a/kernel', 'c/kernel'))


@pytest.mark.parametrize('least, floor', [(0.005, 1), (0.1, 5), (0.5, 25)])
@pytest.mark.parametrize('threshold', [-1.0, 0.5, 1e9])
def test_a_threshold_leaves_a_floor_of_the_best_in_every_layer(least, floor, threshold):
  """Checks that int(48 least) + 1 of 48 weights of a layer are kept, and all weights that score above the threshold."""
  selection = selections.score_threshold(scores.magnitude, schedules.constant(threshold), least=least)
  w = drawn(7, 'ties')['b/kernel']
  leaves = selection.plan({'b/kernel': w}, AXES).leaves
  (mask,), _ = selection.select(leaves, [jnp.asarray(w)], [None], [Signals(step=0, axes=AXES['b/kernel'])])
  kept = oracle.best(np.abs(w).reshape(3, -1), floor).reshape(w.shape)
  np.testing.assert_array_equal(mask, kept | (np.abs(w) > threshold))
  assert leaves[0].sparsity is None and leaves[0].pattern is None


REFUSED = {
    'N:M': ({'pattern': NM(2, 4), 'sparsity': 0.5}, ["'a/kernel' of shape (8, 6)", '2:4 fixes how many', 'uniform']),
    'channels of unequal size': (
        {'pattern': Channel(0.5)}, ["'d/kernel' of shape (4, 6)", 'channel 0.5 has 4 weights here and 8 in',
                                    "'a/kernel'", 'uniform or erk']),
    'no sparsity': ({'pattern': Unstructured()}, ['ranked together share one number', '`sparsity=`']),
    'one of each, no sparsity': (
        {'pattern': {'a/*': Unstructured(0.5), '**': Block((4, 3), 0.5)}}, ['share one number', '`sparsity=`']),
    'one of each': ({'pattern': {'a/*': Unstructured(), '**': Block((4, 3))}, 'sparsity': 0.5},
                    ["'b/kernel'", '4x3 has 12 weights here and 1 in', "'a/kernel'"]),
}


@pytest.mark.parametrize('update', ['reselect', 'prune_to'])
@pytest.mark.parametrize('name', list(PATTERNS))
def test_one_ranking_of_all_leaves_gives_the_masks_of_a_second_one_in_each_leaf(name, update):
  word = getattr(sj.updates, update)
  plain = lambda *arguments: word(*arguments)  # without the fact that saves the second ranking
  before = [jnp.asarray(np.random.default_rng(i).random(w.shape) < 0.7) for i, w in enumerate(drawn(3, 'nan').values())]

  @jax.jit
  def masks(weights):
    found = []
    for each in (word, plain):
      selection = selections.leafwise(PATTERNS[name], update=each, sparsity=0.5, allocation=allocation.global_())
      leaves = selection.plan(weights, AXES).leaves
      signals = [Signals(step=0, axes=leaf.axes) for leaf in leaves]
      found.append(selection.select(leaves, [*weights.values()], before, signals)[0])
    return found

  for kind in ('ties', 'nan'):
    weights = drawn(3, kind)
    once, twice = masks(weights)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert any(not np.all(mask) for mask in once) and any(map(np.any, once)), kind


@pytest.mark.parametrize('what', REFUSED)
@pytest.mark.parametrize('shares', [allocation.global_(), allocation.lamp(), allocation.from_scores(scores.random)],
                         ids=['global', 'lamp', 'from_scores'])
def test_what_cannot_be_ranked_together_is_refused(what, shares):
  options, says = REFUSED[what]
  shapes = {path: SHAPES[path] for path in ('a/kernel', 'b/kernel')} | {'d/kernel': (4, 6)}
  arrays = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
  with pytest.raises(ValueError) as refusal:
    selections.leafwise(allocation=shares, **options).plan(arrays, AXES | {'d/kernel': Axes((0,), (1,))})
  assert all(part in str(refusal.value) for part in says), str(refusal.value)


@pytest.mark.parametrize('name', ['uniform', 'erk', 'global', 'lamp', {'a/*': 0.2, '**': 0.8}])
def test_allocations_go_by_name(name):
  asked = {} if isinstance(name, dict) else {'sparsity': 0.5}
  tx = recipes.from_config(optax.sgd(0.1), {'name': 'magnitude_at_init', 'allocation': name} | asked,
                           total_steps=9, axes=AXES)
  params = {path: jnp.asarray(w) for path, w in drawn(8, 'normal').items()}
  zeros = {path: int(jnp.sum(~m)) for path, m in sj.masks(params, tx.init(params)).items()}
  if isinstance(name, dict):
    assert zeros == {'a/kernel': round(0.2 * 48), 'b/kernel': 3 * round(0.8 * 48), 'c/kernel': round(0.8 * 48)}
  else:
    assert abs(sum(zeros.values()) - 120) <= (0 if name in ('global', 'lamp') else 2)
  assert allocation.named(allocation.erk) is allocation.erk and allocation.named(allocation.lamp()) == allocation.lamp()


# How the first masks come about.


@pytest.mark.parametrize('rounds', [1, 2, 3])
def test_a_probe_looks_at_the_point_of_the_masks_before_as_many_times_as_asked(rounds):
  place, probe = (lambda masks: [10.0 * masks[0] + 3]), (lambda params: [params[0] * params[0]])
  choose = lambda masks, probe=None, step=0, key=None: [masks[0] / 7 + probe[0] + step + key]
  expected = [jnp.float32(2.0)]
  for round in range(1, rounds + 1):
    expected = choose(expected, probe(place(expected)), jnp.float32(round), 0.5)
  found = starts.probed(probe, rounds)(
      lambda masks, probe, step, key: choose(masks, probe, jnp.asarray(step, jnp.float32), key), place,
      [jnp.float32(2.0)], 0.5)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize('losses, best', [
    ([3, 1, 2], 1), ([2, 1, 1], 1), ([np.nan, 5, 4], 2), ([np.nan, np.nan, np.inf], 0), ([7, -np.inf, np.nan], 1)])
def test_the_best_candidate_has_the_lowest_loss_and_the_first_of_equals_and_nan_is_none(losses, best):
  key = jax.random.key(3)
  keys = jax.random.split(key, 3)
  draw = lambda key: jax.random.uniform(key, (4,))
  candidates = jnp.stack([draw(k) for k in keys])
  loss = lambda params: jnp.asarray(losses, jnp.float32)[jnp.argmin(jnp.sum(jnp.abs(candidates - params[None]), 1))]
  found = starts.best_of(loss, 3)(lambda masks, key: draw(key), lambda masks: masks, None, key)
  np.testing.assert_array_equal(found, candidates[best])


def test_random_search_keeps_the_nodes_of_the_lowest_initial_loss():
  params = {'a': {'kernel': jnp.asarray(drawn(9, 'normal')['a/kernel'])}}
  loss = lambda p: jnp.sum(jnp.sin(5 * p['a']['kernel']))
  tx = recipes.random_search(optax.sgd(0.1), loss=loss, candidates=40, key=jax.random.key(1))
  mask = np.asarray(sj.masks(params, tx.init(params))['a']['kernel'])
  assert mask.sum() == 24 and np.all(mask.sum(0) % 8 == 0)
  nodes = np.float32([np.isin(range(6), subset) for subset in itertools.combinations(range(6), 3)])
  losses = nodes @ np.sin(5 * params['a']['kernel']).sum(0)  # of all 20 subsets; 40 draws hit one of the best 5
  assert nodes[np.argsort(losses)[:5]].tolist().count(mask[0].astype(np.float32).tolist()) == 1


X, T = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
LINEAR = {'a': {'kernel': jnp.asarray(drawn(10, 'normal')['a/kernel'][:4])},
          'b': {'kernel': jnp.asarray(drawn(11, 'normal')['a/kernel'][:6, :4]), 'bias': jnp.asarray([0.5, -1, 2, 0.1])}}


def linear(params, x=X):
  return x @ params['a']['kernel'] @ params['b']['kernel'] + params['b']['bias'][None]


def test_synaptic_flow_is_the_flow_through_absolute_weights():
  """Has R = 1' |A| |B| 1 + |b| 1: dR/d|A| = 1 (|B| 1)', dR/d|B| = (1' |A|)' 1'; signs of the weights do not matter."""
  a, b = (np.abs(LINEAR[name]['kernel']) for name in 'ab')
  probe = starts.synaptic_flow(lambda p: linear(p, jnp.ones((1, 4))))
  found = probe(LINEAR)
  np.testing.assert_allclose(found['a']['kernel'], np.broadcast_to(b.sum(1), (4, 6)), rtol=1e-5)
  np.testing.assert_allclose(found['b']['kernel'], np.broadcast_to(a.sum(0)[:, None], (6, 4)), rtol=1e-5)
  for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(probe(jax.tree.map(jnp.negative, LINEAR)))):
    np.testing.assert_array_equal(leaf, other)


def test_the_hessian_times_the_gradient_of_two_linear_layers():
  """Has L = |x A B + b - t|^2 / 2, E its residual: g_A = x'E B', and H g through d(E B') along (g_A, g_B, no bias)."""
  loss = lambda p: 0.5 * jnp.sum(jnp.square(linear(p) - T))
  a, b = (np.asarray(LINEAR[name]['kernel'], np.float64) for name in 'ab')
  residual = X @ a @ b + np.asarray(LINEAR['b']['bias']) - T
  ga, gb = X.T @ residual @ b.T, (X @ a).T @ residual
  moved = X @ ga @ b + X @ a @ gb
  found = starts.hessian_gradient(loss)(LINEAR)
  np.testing.assert_allclose(found['a']['kernel'], X.T @ (moved @ b.T + residual @ gb.T), rtol=1e-4)
  np.testing.assert_allclose(found['b']['kernel'], (X @ ga).T @ residual + (X @ a).T @ moved, rtol=1e-4)


def test_a_probe_that_is_given_is_given_whatever_the_parameters():
  assert starts.of(LINEAR)(None) is LINEAR
  tx = recipes.iterative_magnitude(optax.sgd(0.1), 0.5, ticket=LINEAR)
  fresh = jax.tree.map(jnp.ones_like, LINEAR)
  for name, mask in sj.masks(fresh, tx.init(fresh)).items():
    expected = sj.masks(LINEAR, recipes.magnitude_at_init(optax.sgd(0.1), 0.5).init(LINEAR))[name]['kernel']
    np.testing.assert_array_equal(mask['kernel'], expected)
