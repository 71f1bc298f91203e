"""The small words: what scores look at, how allocations share out, and what an update may and may not bring back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import allocation, scores, updates
from sparsejax.patterns import NM, Unstructured
from sparsejax.types import Axes, Signals

W = jnp.asarray([[1.0, -3.0, 0.5], [-2.0, 0.0, jnp.nan]])


def test_magnitude_and_gradient_are_absolute_values_in_float32():
  np.testing.assert_array_equal(scores.magnitude(W), [[1, 3, 0.5], [2, 0, np.nan]])
  np.testing.assert_array_equal(scores.gradient(jnp.zeros_like(W), Signals(grad=W)), [[1, 3, 0.5], [2, 0, np.nan]])
  narrow = W.astype(jnp.bfloat16)
  assert {scores.magnitude(narrow).dtype, scores.gradient(W, Signals(grad=narrow)).dtype} == {jnp.dtype('float32')}


def test_random_is_uniform_drawn_from_the_key_and_nothing_else():
  drawn = scores.random(jnp.zeros((64, 64), jnp.bfloat16), Signals(key=jax.random.key(1)))
  assert drawn.dtype == jnp.float32 and len(np.unique(drawn)) > 4000  # bfloat16 has 256 levels a binade
  np.testing.assert_array_equal(drawn, scores.random(jnp.ones((64, 64)), Signals(key=jax.random.key(1))))
  assert np.any(drawn != scores.random(jnp.ones((64, 64)), Signals(key=jax.random.key(2))))
  assert abs(float(drawn.mean()) - 0.5) < 0.02 and drawn.min() >= 0 and drawn.max() < 1


@pytest.mark.parametrize('score, message', [
    (scores.random, r'scores.random: needs a PRNG key; pass `key=jax.random.key\(seed\)`'),
    (scores.gradient, 'scores.gradient: needs the gradient of this leaf.*magnitude or random instead')])
def test_a_missing_signal_is_named(score, message):
  with pytest.raises(ValueError, match=message):
    score(W, Signals())


def test_allocations_share_out_by_path():
  leaves = {'a/kernel': W, 'b/kernel': W, 'head/kernel': W}
  assert allocation.uniform(leaves, 0.7) == {'a/kernel': 0.7, 'b/kernel': 0.7, 'head/kernel': 0.7}
  shares = allocation.custom({'head/*': 0.1, '**': 0.9})(leaves, 0.5)
  assert shares == {'a/kernel': 0.9, 'b/kernel': 0.9, 'head/kernel': 0.1}
  with pytest.raises(ValueError, match="allocation.custom: `sparsities` says nothing about 'b/kernel', 'head/kernel'"):
    allocation.custom({'a/*': 0.1})(leaves, 0.5)
  with pytest.raises(ValueError, match="allocation.custom: unknown path in `sparsities` 'heads/kernel'. Did you mean"):
    allocation.custom({'heads/kernel': 0.1, '**': 0.2})(leaves, 0.5)


SELECTIONS = {
    '2:4': lambda s: NM(2, 4)(s, None, Axes((1,), (0,))),
    'half of the leaf': lambda s: Unstructured(0.5)(s),
}


@pytest.mark.parametrize('name', SELECTIONS)
def test_reselect_forgets_and_prune_to_remembers(name):
  select = jax.jit(SELECTIONS[name])
  before, now = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
  mask = select(before)
  np.testing.assert_array_equal(updates.reselect(mask, now, select, None, None), select(now))
  np.testing.assert_array_equal(updates.prune_to(mask, now, select, None, None), mask)  # as many, so the same
  assert np.any(select(now) != mask)


@pytest.mark.parametrize('worst', [np.nan, -np.inf, -1e38])
def test_prune_to_prunes_the_worst_of_the_kept_before_bringing_anything_back(worst):
  """Pruned ones first, where they would win ties: [9, 8, 7, 6 | kept: 1, 2, 3, worst]."""
  row, mask = jnp.asarray([[9, 8, 7, 6, 1, 2, 3, worst]], jnp.float32), jnp.asarray([[False] * 4 + [True] * 4])
  select = lambda s, n: NM(n, 8)(s, None, Axes((1,), (0,)))
  keep = lambda n: updates.prune_to(mask, row, lambda s: select(s, n), None, None)[0].tolist()
  assert keep(3) == [False] * 4 + [True, True, True, False]
  assert keep(4) == [False] * 4 + [True] * 4
  assert keep(5)[4:] == [True] * 4 and sum(keep(5)) == 5
