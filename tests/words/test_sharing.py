"""Checks what divides a sparsity by measured numbers, what measures them, and what a sparse model is compared by."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import allocation, counts, losses, patterns, ranking, sensitivities
from sparsejax.patterns import Unstructured
from sparsejax.types import Axes


def sized(*sizes):
  return {f'layer_{i}/w': np.zeros(size) for i, size in enumerate(sizes)}


def shared(scores, most, sizes, sparsity, **options):
  named = {f'layer_{i}/w': score for i, score in enumerate(scores)}
  return [*allocation.shared_by(named, most, **options)(sized(*sizes), sparsity).values()]


@pytest.mark.parametrize('scores, most, sizes, sparsity, expected', [
    ((3, 1, 2), 0.6, (200, 200, 200), 0.5, (0.45, 0.55, 0.5)),  # the authors' code
    ((0, 0, 1, 1), 0.6, (100,) * 4, 0.5, (0.6, 0.6, 0.4, 0.4)),  # the authors' code
    ((1, 1, 1, 1), 0.8, (64, 256, 64, 128), 0.7, (0.59375, 0.75, 0.59375, 0.703125)),  # where the code keeps 5 too many
    ((1, 0, 0), 0.9, (10, 100, 100), 0.5, (0.0, 0.52, 0.53)),  # the first leaf is full
    ((0, 0), 0.5, (8, 24), 0.25, (0.25, 0.25)),
])
def test_sparsity_is_shared_out_by_scores(scores, most, sizes, sparsity, expected):
  found = shared(scores, most, sizes, sparsity)
  np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize('score', [None, 'x', -1, float('nan'), float('inf'), jnp.ones(2), [1], True, 10**30])
def test_a_score_that_is_no_number_is_refused(score):
  with pytest.raises(ValueError, match="allocation.shared_by: the score of 'layer_0/w' is .*; a score is a number"):
    allocation.shared_by({'layer_0/w': score}, 0.9)


def test_the_total_of_shares_is_exact_and_no_group_exceeds_the_most():
  rng = np.random.default_rng(0)
  for _ in range(20):
    sizes, scores = rng.integers(1, 400, 6), rng.exponential(size=6) * rng.integers(0, 2, 6)
    sparsity = rng.uniform(0, 0.8)
    groups = {f'layer_{i}/w': str(i // 2) for i in range(6)}
    found = shared(scores, 0.85, sizes, sparsity, groups=groups.get)
    kept = np.array([counts.kept_of(share, int(size)) for share, size in zip(found, sizes)])
    assert kept.sum() == sizes.sum() - round(sparsity * sizes.sum()) and min(found) >= 0
    assert (kept.reshape(3, 2).sum(1) >= 0.15 * sizes.reshape(3, 2).sum(1) - 1).all()


def test_a_knapsack_is_solved_exactly():
  costs, sizes = [[0, .1, .9], [0, .3, .5], [0, .05, .06]], [[80, 40, 20], [160, 80, 40], [40, 20, 10]]
  assert [allocation.knapsack(costs, sizes, budget) for budget in (150, 110, 80)] == [(1, 1, 1), (1, 2, 1), (2, 2, 1)]
  rng = np.random.default_rng(1)
  costs, sizes = rng.uniform(size=(5, 4)), rng.integers(1, 30, (5, 4))
  fits = {choice: sum(costs[range(5), choice]) for choice in itertools.product(range(4), repeat=5)
          if sum(sizes[range(5), choice]) <= 50}
  assert allocation.knapsack(costs, sizes, 50) == min(fits, key=fits.get)


def test_squarehead_is_the_formula_and_leaves_padding_and_the_teacher_out():
  state, teacher = jnp.array([[1., 2], [0, 1]]), jnp.array([[1., 1], [2, 0]])
  loss = losses.squarehead([state], [teacher])
  assert float(loss) == pytest.approx(.994819, abs=1e-6)
  padded = [jnp.concatenate([x, jnp.full((1, 2), jnp.nan)]) for x in (state, teacher)]
  padded = [jnp.where(jnp.isnan(x), big, x) for x, big in zip(padded, (7.0, 1e9))]
  assert float(losses.squarehead(padded[:1], padded[1:], jnp.array([True, True, False]))) == float(loss)
  assert not jnp.any(jax.grad(lambda t: losses.squarehead([state], [t]))(teacher))


def test_the_sensitivity_of_a_linear_loss_is_a_projection_of_its_gradient():
  params = {'a': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}, 'b': {'kernel': jnp.ones((2, 2))}}
  loss = lambda p, x: jnp.sum(x[:, None] * p['a']['kernel']) + 5 * jnp.sum(p['a']['bias']) + 0 * p['b']['kernel'].sum()
  found = sensitivities.zeroth_order(loss, params, [jnp.ones(3), 2 * jnp.ones(3)], jax.random.key(0))
  again = sensitivities.zeroth_order(loss, params, [jnp.ones(3), 2 * jnp.ones(3)], jax.random.key(0))
  assert [*found] == ['a/kernel', 'b/kernel'] and found == again and found['b/kernel'] == 0
  z = [jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), b), 1), (3, 2)) for b in (0, 1)]
  assert found['a/kernel'] == pytest.approx(float(abs(z[0].sum()) + 2 * abs(z[1].sum())), rel=1e-2)


@pytest.mark.parametrize('make, message', [
    (lambda: shared((1,), 0.5, (8, 8), 0.5), "unknown path without a score 'layer_1/w'"),
    (lambda: shared((1, 1), 0.5, (8, 8), 0.6), 'sparsity 0.6 is more than most=0.5'),
    (lambda: shared((1, -1), 0.5, (8, 8), 0.6), "the score of 'layer_1/w' is -1;"),
    (lambda: shared((1, 1), 5, (8, 8), 0.6), '`most` must be a number from 0 to 1'),
    (lambda: allocation.knapsack([[1]], [[5]], 4), 'the smallest choices have size 5, more than budget=4'),
    (lambda: allocation.knapsack([[1]], [[5, 6]], 9), 'layer 0 has 1 costs and 2 sizes'),
    (lambda: losses.squarehead([], []), 'squarehead: 0 states and 0 of the teacher'),
    (lambda: losses.squarehead([jnp.ones((2, 2))], [jnp.ones((2, 3))]), r'state 0 has shape \(2, 2\), the teacher'),
    (lambda: sensitivities.zeroth_order(lambda p, x: x, {'kernel': jnp.ones((2, 2))}, [], jax.random.key(0)),
     'there is no batch'),
    (lambda: sensitivities.zeroth_order(
        lambda p, x: x, {'kernel': jnp.ones((2, 2))}, [jnp.float32(np.nan)], jax.random.key(0)), 'is nan; it must be'),
])
def test_refusals_say_what_is_wrong(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_balanced_pattern_counts_each_output_by_itself():
  scores = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 10, 4)), jnp.float32)
  axes = Axes(contracted=(2,), output=(3,), spatial=(1,), layer=(0,))
  mask = Unstructured(0.6, balanced=True)(scores, None, axes)
  assert (np.asarray(mask).sum((1, 2)) == 12).all()
  for layer, column in itertools.product(range(2), range(4)):
    best = ranking.top_n(scores[layer, :, :, column], 12)
    assert np.array_equal(mask[layer, :, :, column], best)
  assert Unstructured(0.5, balanced=True).violation(mask.astype(jnp.float32), axes) == ''
  assert 'are kept' in Unstructured(0.7, balanced=True).violation(mask.astype(jnp.float32), axes)
  assert patterns.parse('unstructured balanced 0.6') == Unstructured(0.6, True) and str(
      Unstructured(0.6, True)) == 'unstructured balanced 0.6'
  assert 'lies along' in Unstructured(0.5, True).validate((4, 4), Axes((), (0, 1), source='unknown'))
