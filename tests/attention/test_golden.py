"""Tests builders and functions against numbers of the authors' code or formulas, computed on small inputs by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import normal

from sparsejax import attention
from sparsejax.attention import learned, masks


def site(q, k, v=None, *, causal=False, scale=1.0):
  """Returns a site of one example; `q` and `k` are `[heads, T, d]`."""
  q, k = (jnp.asarray(a, jnp.float32).swapaxes(0, 1)[None] for a in (q, k))
  return attention.AttentionSite(q, k, k if v is None else v, scale, causal, (), (), '', 'here', (0,))


def lasts(heads, period):
  """Returns the key blocks of the last query block of each head, of S2-Attention."""
  at = site(np.ones((heads, 8, 1)), np.ones((heads, 8, 1)), causal=True)
  mask = attention.sharded(local=1, period=period, block=1)(at).mask
  return [set(np.flatnonzero(m[-1])) for m in mask], mask


def test_s2_shards_strides_over_heads():
  last, mask = lasts(4, 4)
  assert last == [{0, 4, 7}, {3, 7}, {2, 6, 7}, {1, 5, 7}]
  np.testing.assert_allclose(mask.sum((1, 2)) / 36, [.5, .33333, .38889, .44444], atol=1e-5)
  assert (mask.any(0) == np.tril(np.ones((8, 8)))).all()
  dropped = ~mask & np.tril(np.ones((8, 8), bool), -1)  # A block once dropped is not used later.
  assert not (np.maximum.accumulate(dropped, 1) & mask).any()
  assert [set(np.flatnonzero(m[-1, :-1])) for m in lasts(2, 4)[1]] == [{0, 4}, {2, 6}]


def test_patterns_have_the_counts_of_their_names():
  at = site(np.ones((1, 8, 1)), np.ones((1, 8, 1)))
  count = lambda builder: int(builder(at).mask.sum())
  assert [count(b) for b in (attention.band(1, 1), attention.strided(4, block=1), attention.columns(2, 1),
                             attention.full(1), attention.empty(1), attention.sliding(2, 1))] == [22, 16, 16, 64, 0, 34]
  wide = attention.sliding(2, block=4)(at).mask
  assert wide.all() and count(attention.union(attention.columns(1, 1), attention.band(0, 1))) == 15


def test_lists_are_increasing_and_count_what_does_not_fit():
  mask = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
  for listed in (attention.of_mask(mask, 3), jax.jit(lambda m: attention.of_mask(m, 3))(mask)):
    assert listed.index.tolist() == [[1, 2, 2], listed.index[1].tolist(), [0, 1, 2]]
    assert listed.counts.tolist() == [2, 0, 3] and int(listed.overflow) == 1
  whole = attention.of_mask(mask)
  assert whole.index.shape == (3, 4) and whole.counts.tolist() == [2, 0, 4] and int(whole.overflow) == 0
  with pytest.raises(ValueError, match='a traced mask of shape .* needs capacity='):
    jax.jit(attention.of_mask)(mask)
  with pytest.raises(ValueError, match=r'must be an array \[..., nq, nk\], not int64\[2\]'):
    attention.of_mask(np.array([0, 1]))


def test_biformer_routes_by_means():
  q = [[[1, 0], [0, 1], [1, 1], [-1, 0]]]
  k = [[[1, .5], [0, 2], [-1, 0], [.5, .5]]]
  mask = attention.routed(2, block=1)(site(q, k)).mask[0, 0]
  assert [set(np.flatnonzero(row)) for row in mask] == [{0, 3}, {0, 1}, {0, 1}, {1, 2}]  # of equal blocks the first
  order = attention.windows(4, 4, 2)
  assert order[:4].tolist() == [0, 1, 4, 5] and sorted(order) == list(range(16))


K = [[1, .1, -2, .05], [.2, .3, 1, -.1], [-1.5, .2, .5, .1], [.3, -.1, 2.5, .2], [2, .1, -.2, -.05], [.1, .4, -.3, .15]]


def test_quest_bounds_the_scores_of_a_page():
  at = site([[[1, -.5, .8, 2]]], [K])
  scores = attention.page_scores(at.q, at.k, 2)[0, 0, 0]
  np.testing.assert_allclose(scores, [1.85, 2.75, 2.09], atol=1e-6)
  exact = np.asarray(at.scores())[0, 0, 0].reshape(3, 2).max(1)
  np.testing.assert_allclose(exact, [.65, 2.75, 1.69], atol=1e-6)
  assert np.flatnonzero(attention.quest(1, block=2)(at).mask[0, 0, 0]).tolist() == [1]


SEER = site([[[1, 0], [0, 1], [2, -1], [1, 1], [-1, .5], [0, 2]]],
            [[[.5, 1], [1, -1], [0, 2], [-1, 0], [3, .5], [1, 1]]], causal=True, scale=2 ** -.5)
GATE = {'key': jnp.array([[[1., 0], [0, 1], [.5, 0], [0, -.5]]])}


def test_seer_attention_distils_block_maxima():
  logits = learned.gate_logits(GATE, SEER, 2)
  np.testing.assert_allclose(jax.nn.softmax(logits)[0, 0], [[1, 0, 0], [.86485, .13515, 0], [.24267, .70089, .05645]],
                             atol=1e-5)
  target = learned.block_targets(SEER, 2)[0, 0]
  np.testing.assert_allclose(target, [[1, 0, 0], [.64252, .35748, 0], [.19591, .64684, .15726]], atol=1e-5)
  value, slope = jax.value_and_grad(learned.gate_loss)(GATE, SEER, 2)
  np.testing.assert_allclose(value, 3 * .02490, atol=3e-5)  # by rows; the authors divide by entries
  assert np.isfinite(slope['key']).all() and np.abs(slope['key']).max() > 0
  keeps = [attention.gated_blocks({'0': GATE}, keep=attention.kept_of_ratio(ratio, 3), block=2) for ratio in (.5, .75)]
  over = attention.gated_blocks({'0': GATE}, threshold=.4, capacity=2, block=2)
  for builder in (*keeps, over):
    assert builder(SEER).mask[0, 0].astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
  assert [attention.kept_of_ratio(r, 64) for r in (.1, .25, .5)] == [3, 8, 18]
  with pytest.raises(ValueError, match='give keep=, or threshold= with capacity='):
    attention.gated_blocks({'0': GATE}, threshold=.4)


def test_sparsifier_predicts_tokens():
  predictor = {'query': jnp.eye(2), 'key': jnp.eye(2), 'least': .1, 'floor': .05,
               'pool': jnp.array([[1, 0], [.5, .5], [0, 1], [.2, -.3]]),
               'basis': jnp.array([[.3, .02], [-.4, .1], [.01, .5], [.2, .2]])}
  at = site([[[1, 0], [0, 1], [2, 1], [-1, 1]]], [[[1, 1], [0, 2], [-1, .5], [.5, .5]]])
  scores = np.asarray(attention.predicted_scores(at.q, at.k, predictor, scale=1.0))[0, 0]
  shares = np.array([[.67918, .32082], [.99478, 0], [.18243, .81757]])
  np.testing.assert_allclose(scores[1:], shares @ np.array([[.3, 0], [.4, .1], [0, .5], [.2, .2]]).T, atol=1e-4)
  best = np.argsort(-scores[1:], kind='stable')[:, :2]
  assert [set(row) for row in best] == [{0, 1}, {0, 1}, {2, 3}]
  assert attention.predicted(predictor, keep=1, block=2)(at).mask.shape == (1, 1, 2, 2)


def test_sparse_d_keeps_the_blocks_with_most_weight():
  rows = np.array([[.4, .3, .1, .1, .05, .05], [.1, .1, .4, .3, .05, .05]])
  at = site(np.log(rows)[None], np.eye(6)[None])
  kept = lambda select, **o: attention.measured(select, block=2, **o)(at).mask[0, 0].astype(int).tolist()
  assert kept(.3) == [[1, 0, 0]] and kept(.5) == [[1, 1, 0]] and kept(1.0) == [[1, 1, 1]]
  assert kept(.3, prompt=4) == [[1, 0, 1]]
  ragged = site(np.log([[[.1, .1, .2, .2, .4]]]), np.eye(5)[None])  # the authors' padding hides the last token
  assert np.flatnonzero(attention.measured(.1, block=2)(ragged).mask).tolist() == [1]


def test_scatterbrain_corrects_random_features_on_the_listed_blocks():
  w = jnp.array([[1, .5], [-.5, 1.2]])
  q, k = jnp.array([[1, 0], [.5, -1]]), jnp.array([[.5, .5], [1, -1], [0, 2.]])
  root = 2 ** -.25
  low = lambda w: jnp.exp(jax.nn.logsumexp(attention.kernel_features(q * root, w)[:, None]
                                           + attention.kernel_features(k * root, w)[None], -1))
  np.testing.assert_allclose(low(w), [[.97111, .89416, .45688], [.71766, 1.29846, .21185]], atol=1e-5)
  index = masks.BlockIndex(np.array([[[0], [1]]], 'int32'), np.ones((1, 2), 'int32'), 0)
  full = lambda a: a[None, :, None]
  y = attention.scatter(full(q), full(k), full(jnp.eye(3)), index, w, block=1)[0, :, 0]
  np.testing.assert_allclose(y, [[.51317, .3222, .16463], [.18798, .75653, .05549]], atol=1e-5)
  exact = np.exp(np.asarray(q) @ np.asarray(k).T / np.sqrt(2))
  estimate = np.mean([low(attention.orthogonal(jax.random.key(i), 2, 512)) for i in range(24)], 0)
  np.testing.assert_allclose(estimate, exact, rtol=.08)
  large = attention.scatter(full(q * 300), full(k * 300), full(jnp.eye(3)), index, w, block=1)
  assert np.isfinite(large).all()
  with pytest.raises(ValueError, match='blocks of 2 must divide'):
    attention.scatter(full(q), full(k), full(k), index, w, block=2)


Q3 = jnp.array([[.1, .2], [.3, -.1], [0, .4]])
KEYS = jnp.array([[.2, .1], [-.3, .5], [.4, 0]]), jnp.array([[.5, -.2], [.1, .3], [0, .2]])
PAIRS = jnp.array([[1, 2], [3, 4], [5, 6.]]), jnp.array([[1, 0], [.5, 1], [2, -1.]])


@pytest.mark.parametrize('scale, expected', [
    (1.0, [[3.49935, .00671], [3.50366, .00303], [3.49665, .01016]]),
    (None, [[3.49968, .00334], [3.50182, .00148], [3.49839, .00498]])])
def test_kronecker_attention(scale, expected):
  y = attention.kronecker(Q3, KEYS, PAIRS, scale)
  np.testing.assert_allclose(y, expected, atol=1.5e-5)
  if scale:
    errors = [float(jnp.abs(attention.kronecker_by_powers(Q3, KEYS, PAIRS, g, scale) - y).max()) for g in (1, 2, 3)]
    np.testing.assert_allclose(errors, [4.6e-4, 1.1e-5, 1.9e-7], rtol=.3, atol=7e-7)


def test_a_softmax_of_two_passes_does_not_overflow():
  x = jnp.array([[1., 2, 3], [1000, 1001, 999], [-1000, -1000.5, 88], [1e4, -1e4, 0]])
  np.testing.assert_allclose(attention.two_pass_softmax(x), jax.nn.softmax(x), atol=2e-4)
  np.testing.assert_allclose(attention.two_pass_softmax(x[:1]), [[.09003, .24473, .66524]], atol=1e-5)


def test_a_shift_block_moves_channels():
  x = jnp.arange(1., 21).reshape(1, 5, 2, 2).transpose(0, 2, 3, 1)
  y = attention.shift(x, 5).transpose(0, 3, 1, 2).reshape(5, 4)
  assert y.tolist() == [[2, 0, 4, 0], [0, 5, 0, 7], [11, 12, 0, 0], [0, 0, 13, 14], [17, 18, 19, 20]]
  with pytest.raises(ValueError, match='10 channels in 12 parts'):
    attention.shift(jnp.ones((1, 2, 2, 10)))


def test_blocks_pool_over_their_own_tokens():
  x = normal((2, 5, 3, 2))
  mean, largest = jnp.split(attention.pool(x, 2, ('mean', 'max')), 2, -1)
  np.testing.assert_allclose(mean[:, 2], x[:, 4], rtol=1e-6)
  np.testing.assert_allclose(largest[:, 1], x[:, 2:4].max(1), rtol=1e-6)
  with pytest.raises(ValueError, match="unknown kind 'sum'. Valid: max, mean, min"):
    attention.pool(x, 2, ('sum',))
