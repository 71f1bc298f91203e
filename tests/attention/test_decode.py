"""Tests the rules of decoding on numbers of the papers' formulas, the cache, and a small model that generates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.lm import LM
from experiments.models.stepping import Stepper, read
from kernels_pallas import decoder
from sparsejax.attention import decode

# Six keys, a query and values, whose scores and result are those of Double Sparsity's and of Quest's formulas.
K = jnp.asarray([[1, .1, -2, .05], [.2, .3, 1, -.1], [-1.5, .2, .5, .1], [.3, -.1, 2.5, .2], [2, .1, -.2, -.05],
                 [.1, .4, -.3, .15]])[None, :, None]
Q, V = jnp.asarray([[[1, -.5, .8, 2]]]), jnp.arange(12.0).reshape(1, 6, 1, 2)
# SeerAttention's released class gave the probabilities that the test of this gate expects.
GATE = {'query': jnp.eye(2)[None, None], 'key': jnp.asarray([[[1, 0], [0, 1], [.5, 0], [0, -.5]]])}
PAIRS = jnp.asarray([[.5, 1], [1, -1], [0, 2], [-1, 0], [3, .5], [1, 1]])[None, :, None]


def filled(rule, k, v=V, capacity=8):
  cache = decode.empty_cache(rule, 1, capacity, 1, k.shape[-1], values=v.shape[-1])
  return decode.extended(rule, cache, k, v)


def test_channels_are_those_of_the_paper():
  order = lambda **more: decode.heavy_channels(K[0], 4, **more)[0].tolist()
  assert order() == [2, 0, 1, 3]
  with_queries = jnp.asarray([.85 / .85, .1 / .2, .86667 / 1.08333, 2.0])[None, None].repeat(6, 0)
  assert order(q=with_queries) == [2, 0, 3, 1]


def test_double_sparsity_lists_and_weighs_the_tokens_of_the_paper():
  rule = decode.double_sparsity([[2, 0]], keep=3)
  cache = filled(rule, K)
  np.testing.assert_allclose(rule.scores(cache.labels, Q)[0, 0, :6], [-.6, 1, -1.1, 2.3, 1.84, -.14], atol=1e-6)
  index, counts = decode.listed(rule, cache, Q)
  assert index.tolist() == [[[1, 3, 4]]] and counts.tolist() == [[3]]
  np.testing.assert_allclose(decoder(rule).step(Q, cache), [[[5.88520, 6.88520]]], atol=1e-5)
  whole = decode.every(8)
  np.testing.assert_allclose(decoder(whole).step(Q, filled(whole, K)), [[[5.72738, 6.72738]]], atol=1e-5)


def test_quest_bounds_the_products_of_a_page():
  rule = decode.quest(keep=4, page=2)
  cache = filled(rule, K)
  np.testing.assert_allclose(rule.scores(cache.labels, Q)[0, 0, :3], [1.85, 2.75, 2.09], atol=1e-6)
  assert decode.listed(rule, cache, Q)[0].tolist() == [[[2, 3, 4, 5]]]


def test_the_gate_has_the_probabilities_of_the_authors():
  rule = decode.seer(GATE, keep=4, page=2)
  cache = filled(rule, PAIRS)
  scores = rule.scores(cache.labels, jnp.asarray([[[-.5, 1.25]]]))[0, 0, :3]
  np.testing.assert_allclose(jax.nn.softmax(scores / 2**.5), [.24267, .70089, .05645], atol=1e-5)


RULES = {
    'double_sparsity': lambda keep: decode.double_sparsity([[2, 0]], keep, page=2), 'quest': lambda keep:
    decode.quest(keep, page=2), 'double_sparsity, tokens': lambda keep: decode.double_sparsity([[2, 0]], keep)}


@pytest.mark.parametrize('name', RULES)
def test_labels_and_lists_do_not_depend_on_how_tokens_came(name):
  """Checks tokens that come together or one by one. NaN ranks last, and the newest page is read."""
  rule = RULES[name](4)
  k = K.at[0, 2].set(jnp.nan)
  one, steps = filled(rule, k[:, :5], V[:, :5]), decode.empty_cache(rule, 1, 8, 1, 4, values=2)
  for i in range(5):
    steps = decode.extended(rule, steps, k[:, i:i + 1], V[:, i:i + 1])
  jax.tree.map(np.testing.assert_array_equal, one, steps)
  index, counts = decode.listed(rule, one, Q)
  used = index[0, 0, :int(counts[0, 0])].tolist()
  assert used == sorted(used) and 4 in used and 2 not in used and max(used) < 5
  assert len(used) == (4 if rule.page == 1 else 3)


def test_pages_of_the_gate_are_written_when_they_close():
  rule = decode.seer(GATE, keep=4, page=2)
  whole, steps = filled(rule, PAIRS[:, :5], V[:, :5]), decode.empty_cache(rule, 1, 8, 1, 2)
  for i in range(5):
    steps = decode.extended(rule, steps, PAIRS[:, i:i + 1], V[:, i:i + 1])
  np.testing.assert_array_equal(whole.labels, steps.labels)
  assert not whole.labels[0, 2:].any() and whole.labels[0, :2].any()


def test_a_full_cache_is_refused_and_under_jit_reported():
  rule = decode.quest(keep=2, page=2)
  cache = filled(rule, K)
  with pytest.raises(ValueError, match=r'3 more tokens do not fit into a cache of 8, which holds \[6\]; make'):
    decode.extended(rule, cache, K[:, :3], V[:, :3])
  over = jax.jit(lambda cache: decode.extended(rule, cache, K[:, :3], V[:, :3]))(cache)
  assert over.length.tolist() == [8] and over.lost.tolist() == [1]
  np.testing.assert_array_equal(over.k[:, :6], K)
  with pytest.raises(ValueError, match=r'is full, and lost \[1\] tokens of its examples; make a cache with a larger'):
    decode.check(over)
  assert decode.check(cache) is cache


@pytest.mark.parametrize('recall', [False, True])
def test_a_small_model_generates_with_a_cache(recall):
  """With every token listed the tokens are those of the whole model; so are those of a rule whose list is not full."""
  model = LM(16, width=32, depth=2, heads=2, recall=recall)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 16)
  params = model.init(jax.random.key(0), tokens)['params']
  whole = jax.jit(model.apply)({'params': params}, tokens)
  exact = Stepper(params, decoder(decode.every(16)), 16)
  logits, state = exact.fed(exact.start(2), tokens)
  np.testing.assert_allclose(logits, whole, atol=1e-5)
  rest, same = exact.fed(exact.reading(read(params, tokens[:, :7])), tokens[:, 7:])
  np.testing.assert_allclose(rest, whole[:, 7:], atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, state)
  more, state = exact.continued(state, logits[:, -1], 3)
  longer = jnp.concatenate([tokens, more], 1)
  following = jnp.argmax(jax.jit(model.apply)({'params': params}, longer)[:, -4:-1], -1)
  np.testing.assert_array_equal(more, following)
  assert [layer.cache.length.tolist() for layer in state] == [[15, 15]] * 2
  half = Stepper(params, decoder(decode.double_sparsity(np.arange(16).reshape(2, 8), 8, page=2)), 16)
  near, _ = half.fed(half.start(2), tokens)
  np.testing.assert_allclose(near[:, :8], whole[:, :8], atol=1e-5)
  assert np.abs(near[:, 9:] - whole[:, 9:]).max() > 1e-3


REFUSED = {
    'channels': (lambda: decode.double_sparsity([[0.5]], 4), 'must be numbers of channels, .* int.kv_heads, r'),
    'equal channels': (lambda: decode.double_sparsity([[1, 1]], 4), 'from 0 on and none twice'),
    'channels of another layer': (lambda: decode.empty_cache(decode.double_sparsity([[7]], 4), 1, 8, 1, 4),
                                  'calibrate them'),
    'pages': (lambda: decode.quest(keep=10, page=4), 'must be whole pages of 4; give 12'),
    'no tokens': (lambda: decode.quest(keep=0), 'decode.quest: `keep` must be a whole number, at least 1, .* not 0'),
    'a capacity': (lambda: decode.empty_cache(decode.quest(8, 4), 1, 10, 1, 4), 'whole pages of 4, .* give 12'),
    'a small capacity': (lambda: decode.empty_cache(decode.quest(8, 4), 1, 4, 1, 4), 'at least the 8 tokens .* give 8'),
    'a batch': (lambda: decode.empty_cache(decode.quest(8, 4), 0, 8, 1, 4), '`batch` must be a whole number'),
    'keys': (lambda: decode.extended(decode.quest(2, 2), filled(decode.quest(2, 2), K), K[..., :3], V),
             r'must be \[B, n, kv_heads, d\] like the cache'),
    'dtypes': (lambda: decode.extended(decode.quest(2, 2), filled(decode.quest(2, 2), K), K.astype('bfloat16'), V),
               'dtypes bfloat16 and float32 must be float32'),
    'a gate': (lambda: decode.seer({'query': jnp.ones((1, 1, 2, 2))}, 64), "must have 'query' .* and 'key'"),
    'a gate of another layer': (lambda: decode.empty_cache(decode.seer(GATE, 4, 2), 1, 8, 2, 2), 'train one for this'),
    'many channels': (lambda: decode.heavy_channels(K[0], 5), r'shape \(6, 1, 4\) must be .* at least the 5 channels'),
    'no rule': (lambda: decoder('quest'), r'must be a DecodeRule, as in decode.quest\(keep=1024\), not .quest'),
    'a cache of another rule': (lambda: decoder(decode.every(8)).step(Q, filled(decode.quest(2, 2), K)),
                                r'has labels float32\[1, 2, 1, 4, 4\], and those of the rule are float32\[1, 0\]'),
    'every token of a larger cache': (lambda: decode.empty_cache(decode.every(4), 1, 8, 1, 4),
                                      r'needs decode.every\(8\)'),
    'pages of another rule': (lambda: decode.extended(decode.quest(4, 4), filled(decode.quest(2, 2), K), K, V),
                              'make the cache by decode.empty_cache with this rule'),
    'no token': (lambda: decoder(decode.quest(2, 2)).step(Q, decode.empty_cache(decode.quest(2, 2), 1, 8, 1, 4)),
                 'the cache holds no token; store'),
    'a gate of other heads': (lambda: decoder(decode.seer(GATE, 2, 2)).step(
        PAIRS[:, :2, 0], filled(decode.seer(GATE, 2, 2), PAIRS)), '1 times 1 heads does not fit queries of 2 heads'),
    'queries': (lambda: decoder(decode.quest(2, 2)).step(Q[0], filled(decode.quest(2, 2), K)),
                r'`q` must be an array \[B, heads, d\]'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_what_to_give(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call()
