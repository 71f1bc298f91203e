"""Checks metrics of predictions, of a sequence of tasks, of features, and of the loss around a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import metrics
from sparsejax.types import Axes

KEY = jax.random.key(0)
PROBS = jnp.array([[.9, .1], [.8, .2], [.65, .35], [.45, .55], [.5, .5], [0.0, 1]])
LABELS = jnp.array([0, 1, 0, 1, 1, 1])


def test_calibration_is_the_gap_of_each_bin_weighted_by_its_examples():
  found = metrics.calibration(PROBS, LABELS, bins=5)
  right = np.array([1, 0, 1, 1, 0, 1])  # equal probabilities predict the first class
  sure = np.array([.9, .8, .65, .55, .5, 1])
  place = np.array([4, 3, 3, 2, 2, 4])  # 0.8 is the upper end of its bin
  gaps = [abs(right[place == b].mean() - sure[place == b].mean()) for b in (2, 3, 4)]
  np.testing.assert_allclose([found.ece, found.mce], [np.dot(gaps, [2, 2, 2]) / 6, max(gaps)], rtol=1e-5)
  assert found.examples.tolist() == [0, 0, 2, 2, 2] and found.accuracy.tolist() == [0, 0, .5, .5, 1]
  sharp = jax.nn.one_hot(LABELS, 2)
  assert jax.jit(metrics.calibration)(sharp, LABELS).ece == 0


SCORES = jnp.array([[5.0, 4, 3, 2, 1], [1, 2, 3, jnp.nan, 5]])
SEEN = jnp.array([[True, False, False, False, False], [False] * 5])
TRUTH = jnp.array([[False, True, False, True, False], [True, False, False, True, False]])


def test_recall_and_gain_of_recommendations_without_what_was_seen():
  """User 0 gets items 1, 2, 3, and user 1 items 4, 2, 1: NaN ranks last, and what was seen is never shown."""
  assert metrics.recall_at(SCORES, SEEN, TRUTH, 3) == (2 / 2 + 0 / 2) / 2
  best = 1 + 1 / np.log2(3)
  np.testing.assert_allclose(metrics.ndcg_at(SCORES, SEEN, TRUTH, 3), (1 + 1 / np.log2(4)) / best / 2, rtol=1e-6)
  assert metrics.ndcg_at(SCORES, SEEN, TRUTH, 1) == 0.5, 'one of at most one hit'
  assert metrics.recall_at(SCORES[:1], SEEN[:1], TRUTH[:1], 5) == 1


def test_forgetting_and_backward_transfer_are_those_of_the_matrix():
  """Entries of tasks that are not trained yet are not read."""
  matrix = jnp.array([[.9, 9, 9], [.7, .8, 9], [.8, .5, .6]])
  found = metrics.forgetting(matrix)
  np.testing.assert_allclose(found, [(.8 + .5 + .6) / 3, (.1 + .3) / 2, (-.1 - .3) / 2], rtol=1e-5)
  assert metrics.forgetting(jnp.array([[.9]])) == (jnp.float32(.9), 0, 0)


def test_strength_sums_magnitudes_over_outputs():
  """The first numbers are those of the authors' code, of which the two best features are 0 and 2."""
  w = jnp.array([[.5, 0, -.2], [0, .1, 0], [-.4, .3, 0], [0, 0, 0]])
  found = metrics.strength({'in': {'kernel': w, 'bias': jnp.ones(3)}})
  assert [*found] == ['in/kernel']
  np.testing.assert_allclose(found['in/kernel'], [.7, .1, .7, 0], rtol=1e-6)
  stack = jax.random.normal(KEY, (2, 3, 4, 5))
  axes = {'stack': Axes((1, 3), (2,), layer=(0,))}
  np.testing.assert_allclose(metrics.strength({'stack': stack}, axes)['stack'],
                             np.abs(stack).sum(2).reshape(2, 15), rtol=1e-6)


A = {'x': jnp.array([1.0, 0.0]), 'y': jnp.array([2.0])}
B = {'x': jnp.array([-1.0, 0.0]), 'y': jnp.array([0.0])}


def test_a_barrier_of_one_layer_leaves_all_others_where_they_are():
  loss = lambda p: jnp.sum(jnp.square(jnp.square(p['x']) - 1)) + jnp.sum(jnp.square(p['y']))
  found = metrics.layer_barriers(loss, A, B)
  assert found['x'].height == 1 and found['x'].alpha == 0.5, 'a double well, with its top between'
  assert found['y'].height == 0 and found['x'].losses[0] == loss(A)
  both = metrics.layer_barriers(loss, A, B, {'all': ['x', 'y']})['all']
  assert both.height == metrics.barrier(loss, A, B).height


def test_sharpness_is_that_of_a_relative_move_and_zeros_stay():
  """Compares with a quadratic, of which the mean rise at the minimum is rho^2 w^2."""
  loss = lambda p: jnp.sum(jnp.square(p['x'])) + jnp.sum(jnp.square(p['y'])) / 4
  found = metrics.sharpness(lambda p: loss(jax.tree.map(jnp.subtract, p, A)), A, 0.1, KEY, samples=2000)
  np.testing.assert_allclose([found['x'], found['y']], [0.01, 0.01], rtol=0.15)
  worst = metrics.sharpness(loss, A, 0.1, KEY, worst=4)
  np.testing.assert_allclose([worst['x'], worst['y']], [0.21, 0.21], rtol=1e-4)
  off = metrics.sharpness(lambda p: 100 * p['x'][1] ** 2, A, 0.1, KEY, {'x': ['x']})
  assert off['x'] == 0, 'a weight of zero is not moved'


@pytest.mark.parametrize('call, said', [
    (lambda: metrics.calibration(PROBS * 3, LABELS), 'give jax.nn.softmax'),
    (lambda: metrics.calibration(PROBS, LABELS[:2]), 'at least one example'),
    (lambda: metrics.calibration(PROBS, LABELS + 9), 'give integers from 0 to'),
    (lambda: metrics.recall_at(SCORES[:0], SEEN[:0], TRUTH[:0], 1), 'of at least one user'),
    (lambda: metrics.recall_at(SCORES, SEEN, TRUTH.at[1].set(False), 2), '1 users have no item in `truth`: 1.'),
    (lambda: metrics.ndcg_at(SCORES, TRUTH, TRUTH, 2), 'in `truth` and in `seen`'),
    (lambda: metrics.recall_at(SCORES, SEEN, TRUTH, 6), 'a k of at most the items'),
    (lambda: metrics.forgetting(SCORES), 'a square matrix'),
    (lambda: metrics.layer_barriers(lambda p: 0.0, A, B, {'all': ['z']}), "unknown path in `groups` 'z'"),
    (lambda: metrics.sharpness(lambda p: 0.0, A, 0.0, KEY), '`rho` must be positive')])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
