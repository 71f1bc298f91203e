"""Tests scores of tokens on small numbers of their formulas, and that `stack` computes no removed token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import normal

from sparsejax import tokens


def test_page_rank_and_its_mean_over_heads():
  attention = jnp.asarray([[.5, .3, .2], [.1, .8, .1], [.2, .6, .2]])
  np.testing.assert_allclose(tokens.page_rank(attention, 1), [.26667, .56667, .16667], atol=1e-5)
  np.testing.assert_allclose(tokens.page_rank(attention), [.18868, .67925, .13208], atol=1e-5)
  heads = jnp.asarray([[.2, .5, .3], [.1, .1, .8]])
  np.testing.assert_allclose(tokens.combined(heads), [.15811, .36056, .60415], atol=1e-5)
  spread = np.var(heads, -1)
  assert spread[0] < .05 < spread[1]
  np.testing.assert_allclose(tokens.combined(heads, most=.05), heads[0], atol=1e-6)
  np.testing.assert_allclose(tokens.combined(heads, most=0.0), tokens.combined(heads))


def test_the_elbow_of_shared_neurons():
  counts = jnp.asarray([[9, 8.5, 8, 3, 2.5, 2, 1.8, 1.5, 1.2, 1]])
  assert tokens.above_elbow(counts)[0].tolist() == [True] * 3 + [False] * 7
  h = jnp.asarray([[[1, 2, -1, 0], [3, -1, 2, 0], [1, 1, 1, -1]]])
  assert tokens.shared_neurons(h, 2).tolist() == [[2, 2, 3]]


def test_the_least_dissimilar_token_is_a_copy_of_a_more_important_one():
  keys = jnp.asarray([[[1, 0], [0, 1], [2, 0], [1, 1.0]]])
  scores = tokens.dissimilar(keys, jnp.asarray([[4.0, 3, 1, 2]]))
  np.testing.assert_allclose(scores, [[2, 2, 0, 1 - 2**-.5]], atol=1e-6)


def doubled(seen):
  def block(x, mask, place):
    seen.append(x.shape)
    return 2 * x, place
  return block


@pytest.mark.parametrize('skip', [False, True])
def test_blocks_see_the_tokens_of_the_highest_scores(skip):
  """The first token stays, NaN and padding go first, and the order of tokens is kept."""
  seen, x = [], normal((2, 6, 3))
  scores = jnp.asarray([[0, 5, 1, jnp.nan, 4, 9], [0, 1, 1, 1, 1, 9]])
  mask = jnp.asarray([[1] * 6, [1] * 5 + [0]], bool)
  at = lambda now: scores if now.shape[1] == 6 else scores[:, :now.shape[1]]
  y = jax.jit(tokens.stack([doubled(seen)] * 2, lambda i, now, signal: at(now), [4, 4], skip=skip))(x, mask)
  assert seen == [(2, 4, 3)] * 2
  place = [[0, 1, 4, 5], [0, 1, 2, 3]]
  if skip:
    wanted = x.at[jnp.arange(2)[:, None], jnp.asarray(place)].multiply(4)
    np.testing.assert_allclose(y.x, wanted, rtol=1e-6)
  else:
    assert y.place.tolist() == place and y.mask.all()
    np.testing.assert_array_equal(y.x, 4 * jnp.take_along_axis(x, jnp.asarray(place)[..., None], 1))


def test_fewer_tokens_are_fewer_operations():
  block = lambda x, mask, place: x @ jnp.ones((8, 8))
  cost = lambda keep: jax.jit(lambda x: tokens.stack([block] * 2, lambda *_: None, keep)(x).x).lower(
      jnp.ones((1, 64, 8))).cost_analysis()['flops']
  assert cost([16, 16]) < cost([64, 64]) / 3


def test_a_router_is_trained_by_the_loss_of_what_it_skips():
  router = tokens.router_of(jax.random.key(0), 4)
  factors = tokens.factors_of(jax.nn.softmax(normal((1, 2, 6, 6)), -1), 0.5)
  assert factors.shape == (1, 6, 4) and factors[0, :, 0].tolist() == pytest.approx([0, .2, .4, .6, .8, 1])
  run = lambda router: tokens.stack([doubled([])], lambda *_: tokens.routed_scores(router, factors), [3], skip=True)
  gradient = jax.grad(lambda router: jnp.sum(run(router)(jnp.ones((1, 6, 3))).x))(router)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


X, NOTHING = jnp.ones((1, 6, 3)), lambda *_: None
REFUSED = {
    'rising': (lambda: tokens.stack([doubled([])] * 2, NOTHING, [2, 4]), 'must not rise, as .2, 4. does'),
    'one number': (lambda: tokens.stack([doubled([])] * 2, NOTHING, [2]), 'for each of the 2 blocks'),
    'no token': (lambda: tokens.stack([doubled([])], NOTHING, [0]), 'at least 1, not .0.'),
    'many tokens': (lambda: tokens.stack([doubled([])], NOTHING, [7])(X), 'with at least the 7 tokens'),
    'more than there are': (lambda: tokens.kept_places(X[..., 0], X[..., 0] > 0, 7), 'must be .* to the 6 tokens'),
    'fewer than always': (lambda: tokens.kept_places(X[..., 0], X[..., 0] > 0, 2, 3), 'must be from `always`, 3'),
    'a mask of numbers': (lambda: tokens.stack([doubled([])], NOTHING, [2])(X, jnp.ones((1, 6))),
                          r'must be bool\[1, 6\]'),
    'a mask of other tokens': (lambda: tokens.stack([doubled([])], NOTHING, [2])(X, jnp.ones((1, 7), bool)),
                               r'mask bool\[1, 7\] must be bool\[1, 6\]'),
    'a router of other numbers': (lambda: tokens.routed_scores(tokens.router_of(jax.random.key(0), 4), X),
                                  'of 4 numbers'),
    'a bool': (lambda: tokens.stack([doubled([])], NOTHING, [True]), 'at least 1, not .True.'),
    'other scores': (lambda: tokens.stack([doubled([])], lambda *_: X, [2])(X), r'`scores` must be an array \[B, T\]'),
    'fewer tokens than given': (lambda: tokens.stack([lambda x, *_: x[:, :1]], NOTHING, [2])(X),
                                'block 0 returned x of shape .* must return all tokens'),
    'a token beyond': (lambda: tokens.shared_neurons(X, X.shape[1]), 'one of the 6 tokens'),
    'no router': (lambda: tokens.routed_scores({}, X), "the router has no 'into'; router_of makes one"),
    'attention': (lambda: tokens.page_rank(X), r'must be \[..., T, T\]'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_what_to_give(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call()
