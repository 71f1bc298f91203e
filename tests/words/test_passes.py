"""Passes over large leaves keep the same entries as a sort, on small leaves that hold every kind of tie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparsejax import passes, ranking, wholes

# Subnormals differ by their bits only: XLA:CPU compares them as zeros.
TINY = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 2e-40, 1.0, -1.0, 65504.0, 6e-5)
LEAVES = (  # of sizes that runs of 128 entries divide, and of others
    ((41,), jnp.float32), ((7, 5), jnp.bfloat16), ((3, 2, 64), jnp.float32), ((2, 128), jnp.float16),
    ((1, 1), jnp.float32))
WAYS = {'as on many devices': {'one_cpu': lambda: False}, 'as on one CPU': {'one_cpu': lambda: True},
        'small words': {'one_cpu': lambda: False, '_WORD': 3}}
# Words of three bits make large programs, so that one leaf of four bytes and one of two bytes have to do.
FEW = {'small words': LEAVES[:2]}


def tiny(shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(len(shape)).choice(np.float32(TINY), shape)).astype(dtype)


@pytest.fixture
def way(request, monkeypatch):
  """Counts in one of the ways; JAX keeps what was traced, and does not see the change."""
  for name, value in WAYS[request.param].items():
    monkeypatch.setattr(wholes, name, value)
  jax.clear_caches()
  yield request.param
  jax.clear_caches()


@pytest.mark.parametrize('way', WAYS, indirect=True)
def test_a_large_leaf_is_ranked_as_a_sort_ranks_it(way):
  for shape, dtype in FEW.get(way, LEAVES):
    scores = tiny(shape, dtype)
    counts = np.unique(np.linspace(0, scores.size, 12).astype(np.int32))
    select = lambda n, scores=scores: passes.top_n_of_large(scores, wholes.counted(wholes.count(n), scores.size))
    for n, mask in zip(counts, np.asarray(jax.jit(jax.vmap(select))(counts))):
      expected = oracle.best(np.asarray(scores, np.float32).reshape(-1), n).reshape(shape)
      np.testing.assert_array_equal(mask, expected, err_msg=f'{n} of {shape}')


@pytest.mark.parametrize('way', ['as on one CPU'], indirect=True)
@pytest.mark.parametrize('low, bits', [(1 << 29, 9), (-1 << 30, 12)])
def test_a_sample_that_misses_changes_no_bit(low, bits, way, monkeypatch):
  """The counts show that the last kept key is above or below the bracket, and all bits are settled."""
  monkeypatch.setattr(passes, '_bracket', lambda leaf, n: (jnp.int32(low), jnp.int32(2**bits - 1)))
  scores = tiny((41,))
  masks = jax.jit(jax.vmap(functools.partial(passes.top_n_of_large, scores)))(jnp.arange(0, 42, 3))
  for n, mask in zip(range(0, 42, 3), np.asarray(masks)):
    np.testing.assert_array_equal(mask, oracle.best(np.ravel(scores), n))


@pytest.mark.parametrize('way', ['as on one CPU'], indirect=True)
def test_a_bracket_of_a_sample_holds_the_key(way, monkeypatch):
  """A column out of ten is a hundred times as large: the sample has entries of every column."""
  monkeypatch.setattr(passes, '_SAMPLE', 512)
  scores = jnp.abs(jax.random.normal(jax.random.key(0), (512, 20))) * jnp.where(jnp.arange(20) % 10 == 0, 100, 1)[None]
  keys = np.sort(np.asarray(passes.order_keys(scores)).reshape(-1))[::-1]
  for n in (1, 1024, 5000, 10_000):
    low, span = passes._bracket(scores, jnp.int32(n))
    assert int(low) <= keys[n - 1] <= int(low) + int(np.uint32(span))


@pytest.mark.parametrize('way', ['as on one CPU'], indirect=True)
def test_few_runs_are_ranked_by_themselves(way):
  """Each score is there four times, in neighbours, so that a single run holds all scores at the cut."""
  values = jax.random.normal(jax.random.key(0), (64, 32))
  scores = jnp.repeat(values.at[0, :3].set(jnp.asarray([np.inf, -np.inf, np.nan])), 4, axis=1)
  counts = jnp.asarray([-1, 0, 1, 4, 5, 819, 820, 821, 5001, 8187, 8191, 8192])
  masks = jax.jit(jax.vmap(functools.partial(passes.top_n_of_large, scores)))(counts)
  for n, mask in zip(counts.tolist(), np.asarray(masks)):
    expected = oracle.best(np.ravel(scores), max(n, 0)).reshape(scores.shape)
    np.testing.assert_array_equal(mask, expected, err_msg=str(n))


@pytest.mark.parametrize('way', ['as on one CPU'], indirect=True)
def test_ties_are_cut_at_every_place(way):
  scores = jnp.asarray([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
  masks = jax.jit(jax.vmap(functools.partial(passes.top_n_of_large, scores)))(jnp.arange(7))
  for n, mask in enumerate(np.asarray(masks)):
    np.testing.assert_array_equal(mask.reshape(-1), oracle.best(np.ravel(scores), n))


def test_the_switch_by_size_changes_no_bit(monkeypatch):
  scores = tiny((256, 4)) * 2
  masks = []
  for large in (2048, 1):
    monkeypatch.setattr(ranking, 'LARGE', large)
    jax.clear_caches()
    masks.append(jax.jit(jax.vmap(lambda n: ranking.top_n(scores, n)))(jnp.asarray([0, 3, 300, 1024])))
  np.testing.assert_array_equal(*masks)
  jax.clear_caches()


@pytest.mark.parametrize('m, axis', [(4, 0), (4, 1), (8, 1), (128, 0)])
def test_groups_tell_subnormals_apart(m, axis):
  scores = tiny((m, 6) if axis == 0 else (6, m))
  chosen = jax.jit(jax.vmap(lambda n: ranking.top_n_in_groups(scores, n, m, axis)))
  for n, mask in zip((1, m // 2), np.asarray(chosen(jnp.asarray([1, m // 2])))):
    np.testing.assert_array_equal(mask, oracle.n_of_m(scores, n, m, (axis,)))
