"""Compares metrics with numpy, and operations counted from a traced program with formulas by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import metrics


def test_density_counts_what_is_not_zero():
  w = jnp.asarray([[0.0, -0.0, 1.0, jnp.nan]])
  params = {'a': {'w': w}, 'b': jnp.zeros((3, 5), jnp.bfloat16), 'c': jnp.ones(())}
  found = jax.jit(metrics.density)(params)
  assert {path: float(x) for path, x in found.items()} == {'a/w': 0.5, 'b': 0.0, 'c': 1.0}
  assert all(x.dtype == jnp.float32 and x.shape == () for x in found.values())


def test_density_of_many_weights_is_not_rounded_away():
  """2^25 + 1 ones are not countable one by one in float32; the fraction has to be right to its own precision."""
  w = jnp.ones((2**25 + 8,), jnp.bfloat16).at[: 2**24].set(0)
  np.testing.assert_allclose(metrics.density({'w': w})['w'], (2**24 + 8) / (2**25 + 8), rtol=1e-6)


def test_sad_counts_differing_bits_and_their_share():
  rng = np.random.default_rng(0)
  before, after = rng.random((2, 2, 12, 5)) < 0.5
  masks = lambda m: {'x': jnp.asarray(m[0]), 'y': [jnp.asarray(m[1, :3])], 'dense': jnp.ones((), bool)}
  found = jax.jit(metrics.sad)(masks(before), masks(after))
  assert set(found) == {'x', 'y/0'}  # a dense leaf has no mask
  np.testing.assert_array_equal(found['x'].count, np.sum(before[0] != after[0]))
  np.testing.assert_allclose(found['x'].fraction, np.mean(before[0] != after[0]), rtol=1e-6)
  np.testing.assert_array_equal(found['y/0'].count, np.abs(before[1, :3].astype(int) - after[1, :3].astype(int)).sum())
  assert metrics.sad(masks(before), masks(before))['x'] == (0.0, 0.0)


def test_sad_takes_the_masks_of_a_state():
  params = {'w': jnp.arange(1.0, 17.0).reshape(4, 4), 'b': jnp.ones(4)}
  tx = sj.recipes.ste(optax.sgd(1.0), sj.NM(2, 4))
  state = tx.init(params)
  before = sj.masks(params, state)
  grads = {'w': jnp.zeros((4, 4)).at[3, 0].set(100.0).at[0, 1].set(100.0), 'b': jnp.zeros(4)}
  updates, state = tx.update(grads, state, params)
  after = sj.masks(optax.apply_updates(params, updates), state)
  # Column 0 kept 9 and 13; 13 - 100 is the largest still. Column 1 kept 10 and 14; 2 - 100 comes in for 10.
  assert metrics.sad(before, after) == {'w': (2.0, 2 / 16)}


def test_gradient_variance_is_numpys_over_kept_and_pruned():
  rng = np.random.default_rng(0)
  g, m = rng.normal(size=(8, 6)).astype(np.float32) * 1e-3 + 1, rng.random((8, 6)) < 0.3
  grads = {'w': jnp.asarray(g), 'b': jnp.ones(3)}
  found = jax.jit(metrics.gradient_variance)(grads, {'w': jnp.asarray(m), 'b': jnp.ones((), bool)})
  assert set(found) == {'w'}
  # Two passes are needed: a single pass in float32 loses a variance of 1e-6 beside a mean of 1.
  expected = [np.abs(part).var(dtype=np.float64) for part in (g[m], g[~m])]
  np.testing.assert_allclose(found['w'], expected, rtol=1e-4)
  everything = metrics.gradient_variance(grads, {'w': jnp.ones((8, 6), bool), 'b': jnp.ones((), bool)})['w']
  np.testing.assert_allclose(everything.kept, g.var(dtype=np.float64), rtol=1e-4)
  assert np.isnan(everything.pruned)
  narrow = metrics.gradient_variance({'w': grads['w'].astype(jnp.bfloat16)}, {'w': jnp.asarray(m)})['w']
  assert narrow.kept.dtype == jnp.float32


def masks(*kept):
  """Masks of two leaves of 64 x 48, of which that many entries are kept at random, and of a dense one."""
  rng = np.random.default_rng(kept)
  drawn = (rng.permutation(64 * 48).reshape(64, 48) < count for count in kept)
  return {'x': jnp.asarray(next(drawn)), 'y': [jnp.asarray(next(drawn))], 'dense': jnp.ones((), bool)}


def test_kept_counts_and_collapsed_names_the_empty():
  tree = masks(300, 0)
  counts, flags = jax.jit(metrics.kept)(tree), jax.jit(metrics.collapsed)(tree)
  assert counts == {'x': 300, 'y/0': 0} and {path: bool(flag) for path, flag in flags.items()} == {
      'x': False, 'y/0': True}
  nan = jnp.zeros((2, 2)).at[0, 1].set(jnp.nan)
  params = {'a': {'kernel': jnp.zeros((4, 4)), 'bias': jnp.zeros(4)}, 'b': {'kernel': nan}, 'step': jnp.zeros((), int)}
  assert metrics.kept(params) == {'a/kernel': 0, 'b/kernel': 1}  # a bias may be zero, and NaN is not
  assert [path for path, none in metrics.collapsed(params).items() if none] == ['a/kernel']


def test_the_overlap_of_unrelated_masks_is_that_of_chance():
  """The mean of 40 draws, whose standard error is 1.7 % by the hypergeometric distribution."""
  found = [metrics.overlap(masks(300, 600), masks(600, 300 + i))['x'] for i in range(40)]
  np.testing.assert_allclose([each.chance for each in found], 300 * 600 / (64 * 48), rtol=1e-6)
  np.testing.assert_allclose(np.mean([each.ratio for each in found]), 1, atol=0.06)
  assert np.std([each.count for each in found]) > 1  # not one draw forty times


@pytest.mark.parametrize('a, b, count, chance, ratio, jaccard', [
    ([1, 1, 0, 0], [1, 1, 0, 0], 2, 1, 2, 1), ([1, 1, 0, 0], [0, 0, 1, 1], 0, 1, 0, 0),
    ([1, 1, 1, 0], [0, 0, 1, 1], 1, 1.5, 2 / 3, 0.25), ([1] * 4, [0, 1, 0, 0], 1, 1, 1, 0.25),
    ([0] * 4, [1, 0, 0, 0], 0, 0, np.nan, 0), ([0] * 4, [0] * 4, 0, 0, np.nan, np.nan)])
def test_overlap_is_the_formula(a, b, count, chance, ratio, jaccard):
  tree = lambda mask: {'w': jnp.asarray([mask], bool), 'dense': jnp.ones((), bool)}
  found = metrics.overlap(tree(a), tree(b))
  assert set(found) == {'w'}
  np.testing.assert_allclose(found['w'], [count, chance, ratio, jaccard], rtol=1e-6)
  jitted = jax.jit(metrics.overlap)(tree(b), tree(a))['w']  # overlap is symmetric
  np.testing.assert_allclose(jitted, found['w'], rtol=1e-6)
  assert {x.dtype for x in jitted} == {jnp.dtype('float32')}


def test_the_itop_rate_starts_as_the_density_and_only_grows():
  seen, step = masks(300, 600), jax.jit(lambda seen, now: (now := metrics.union(seen, now), metrics.itop_rate(now)))
  static, rate = step(seen, seen)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), static, seen))  # a static mask explores nothing
  np.testing.assert_allclose(rate.layers['x'], 300 / (64 * 48), rtol=1e-6)
  np.testing.assert_allclose(rate.pooled, 900 / (2 * 64 * 48), rtol=1e-6)
  for i in range(3):
    now = masks(300, 601 + i)
    before, (seen, rate) = (seen, rate), step(seen, now)
    assert rate.layers.keys() == {'x', 'y/0'} and rate.pooled > before[1].pooled
    for new, old, current in zip(*map(jax.tree.leaves, (seen, before[0], now))):
      np.testing.assert_array_equal(new, np.asarray(old) | np.asarray(current))
  np.testing.assert_allclose(metrics.itop_rate(seen).pooled, rate.pooled, rtol=1e-6)
  full = jax.tree.map(jnp.ones_like, seen)
  assert metrics.itop_rate(full).pooled == 1 and np.isnan(metrics.itop_rate({'dense': jnp.ones((), bool)}).pooled)


def test_the_itop_rate_is_that_of_the_authors_code():
  """Has the masks of two layers at the start and after two updates by ITOP's code, which prints 13/18, then 16/18."""
  rows = lambda *strings: jnp.asarray([[c == '1' for c in row] for row in strings])
  first, *later = [{'w1': rows(*w1), 'w2': rows(*w2)} for w1, w2 in (
      (('1101', '0110', '1001'), ('101', '011')), (('1110', '1110', '1000'), ('101', '011')),
      (('1110', '0100', '1110'), ('111', '001')))]
  after = metrics.union(first, later[0])
  np.testing.assert_allclose(metrics.itop_rate(after).pooled, 13 / 18, rtol=1e-6)
  rate = metrics.itop_rate(metrics.union(after, later[1]))
  np.testing.assert_allclose([rate.pooled, *rate.layers.values()], [16 / 18, 11 / 12, 5 / 6], rtol=1e-6)


@pytest.mark.parametrize('metric', [metrics.sad, metrics.overlap, metrics.union])
def test_masks_of_another_model_are_refused(metric):
  with pytest.raises(ValueError, match=rf"metrics.{metric.__name__}: parameter 'w' of shape \(1, 4\).*\(3, 4\)"):
    metric({'w': jnp.ones((1, 4), bool)}, {'w': jnp.ones((3, 4), bool)})


A, B = ({'w': jnp.asarray(w, jnp.float32), 'b': [jnp.asarray(b, jnp.float32)]} for w, b in (
    ([[1.0, 0.0], [0.0, -2.0]], 0.5), ([[-1.0, 3.0], [0.0, 0.0]], 1.5)))
square = lambda p: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))


@pytest.mark.parametrize('points', [2, 5, 11])
def test_a_convex_loss_has_no_barrier(points):
  found = metrics.barrier(square, A, B, points)
  assert found.height == 0 and found.alpha == 0 and found.losses.shape == (points,)
  assert (found.losses[0], found.losses[-1]) == (square(A), square(B))
  np.testing.assert_allclose(metrics.barrier(lambda p: jnp.sum(p['w']) + p['b'][0], A, B).height, 0, atol=1e-6)


@pytest.mark.parametrize('jit', [False, True])
def test_the_barrier_of_a_double_well_is_known(jit):
  """Checks that `(x^2 - 1)^2 + tilt x` rises by 1 above the chord from -1 to 1, in the middle, for any tilt.

  The barrier of a concave quadratic is the gap between the quadratic and its chord.
  """
  wrap = jax.jit if jit else lambda f: f
  well = lambda p, tilt=0.0: jnp.sum(jnp.square(jnp.square(p['x']) - 1)) + tilt * jnp.sum(p['x'])
  ends = ({'x': jnp.asarray([-1.0])}, {'x': jnp.asarray([1.0])})
  for tilt in (0.0, 0.3):
    found = wrap(lambda a, b, tilt=tilt: metrics.barrier(lambda p: well(p, tilt), a, b, 9))(*ends)
    np.testing.assert_allclose([found.height, found.alpha], [1, 0.5], rtol=1e-6)
    x = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(found.losses, (x**2 - 1)**2 + tilt * x, atol=1e-6)
  found = wrap(lambda a, b: metrics.barrier(lambda p: -square(p), a, b, 5))(A, B)
  gap = square(jax.tree.map(lambda a, b: a - b, A, B)) / 4  # alpha (1 - alpha) |a - b|^2
  np.testing.assert_allclose([found.height, found.alpha], [gap, 0.5], rtol=1e-6)
  # Far from the middle: x^3 from 0 to -1 is alpha - alpha^3 above its chord, highest at 1 / sqrt(3).
  cubic = wrap(lambda a, b: metrics.barrier(lambda p: p['x'] ** 3, a, b, 101))
  found = cubic({'x': jnp.float32(0)}, {'x': jnp.float32(-1)})
  np.testing.assert_allclose([found.height, found.alpha], [2 / 3**1.5, 3**-0.5], atol=6e-3)


def test_only_what_is_zero_at_both_ends_is_zero_on_the_way():
  zeros = lambda p: jnp.sum(p['w'] == 0, dtype=jnp.float32)
  assert metrics.barrier(zeros, A, B, 4).losses.tolist() == [2, 1, 1, 2]


def test_a_barrier_keeps_dtypes_and_shows_nan():
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (A, B))
  seen = []
  found = metrics.barrier(lambda p: seen.append(jax.tree.map(jnp.result_type, p)) or square(p), *narrow)
  assert {x.name for x in jax.tree.leaves(seen)} == {'bfloat16'} and found.losses.dtype == jnp.float32
  found = metrics.barrier(lambda p: jnp.where(p['b'][0] == 1, jnp.nan, square(p)), A, B, 5)
  assert np.isnan(found.height) and found.alpha == 0.5


@pytest.mark.parametrize('loss, a, b, points, message', [
    (square, A, B, 1, 'points=1'), (square, A, B, 2**24 + 1, 'points=16777217'),
    (lambda p: p['w'], A, B, 3, r'shape \(2, 2\).* scalar'),
    (square, {'n': jnp.ones(2, int)}, {'n': jnp.ones(2, int)}, 3, "'n'.* int32 has no points between"),
    (square, {'n': jnp.ones((1, 2))}, {'n': jnp.ones((3, 2))}, 3, "'n' of shape .*one model")])
def test_a_barrier_without_a_line_is_refused(loss, a, b, points, message):
  with pytest.raises(ValueError, match=f'metrics.barrier: .*{message}'):
    metrics.barrier(loss, a, b, points)


def mlp(params, x):
  """Maps `[4, 8]` to `[4, 16]` and to `[4, 2]`, with a product of activations with themselves."""
  hidden = jnp.maximum(x @ params['up']['kernel'], 0)
  attended = (hidden @ hidden.T) @ hidden
  return attended @ params['down']['kernel']


PARAMS = {'up': {'kernel': jnp.zeros((8, 16))}, 'down': {'kernel': jnp.zeros((16, 2))}}
UP, DOWN, OTHER = 4 * 8 * 16, 4 * 16 * 2, 2 * 4 * 16 * 4  # multiply-adds


@pytest.fixture(scope='module')
def traced():
  return sj.contractions(mlp, PARAMS, jnp.zeros((4, 8)))


def test_flops_of_a_dense_program_are_twice_its_multiply_adds(traced):
  found = metrics.flops(traced)
  assert found.inference == found.dense_inference == 2 * (UP + DOWN + OTHER)
  assert found.training == found.dense_training == 6 * (UP + DOWN + OTHER)


@pytest.mark.parametrize('densities', [
    {'up/kernel': 0.25, 'down/kernel': 0.5}, {'params/up/kernel': 0.25, 'params/down/kernel': 0.5},
    {'up/kernel': np.float32(0.25), 'down/kernel': jnp.float32(0.5)}])
@pytest.mark.parametrize('input_gradient', ['sparse', 'dense'])
def test_flops_follow_the_densities(traced, densities, input_gradient):
  back = (0.25, 0.5) if input_gradient == 'sparse' else (1.0, 1.0)
  found = metrics.flops(traced, densities, input_gradient=input_gradient)
  assert found.inference == 2 * (0.25 * UP + 0.5 * DOWN + OTHER)
  assert found.training == 2 * ((0.25 + back[0] + 1) * UP + (0.5 + back[1] + 1) * DOWN + 3 * OTHER)
  assert found.dense_training == 6 * (UP + DOWN + OTHER) and found.dense_inference == 2 * (UP + DOWN + OTHER)


def test_flops_leave_alone_what_has_no_density(traced):
  assert metrics.flops(traced, {'up/kernel': 0.0}).inference == 2 * (DOWN + OTHER)
  assert metrics.flops(traced, {'kernel': 0.0, 'elsewhere': 0.0}).inference == 2 * OTHER
  with pytest.raises(ValueError, match="metrics.flops: input_gradient is 'sparse' or 'dense', not 'both'"):
    metrics.flops(traced, input_gradient='both')


def test_flops_take_the_density_of_a_trained_model(traced):
  tx = sj.recipes.ste(optax.sgd(1.0), sj.NM(1, 4))
  params = jax.tree.map(lambda w: jax.random.normal(jax.random.key(0), w.shape), PARAMS)
  sparse = sj.project(params, jax.jit(tx.init)(params))
  found = metrics.flops(traced, metrics.density(sparse))
  assert found.inference == 2 * (0.25 * (UP + DOWN) + OTHER)
