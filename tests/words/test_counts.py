"""Checks that patterns keep exactly the asked number of units, whole, each layer by itself, and take counts alone."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparsejax
from sparsejax import counts, patterns, ranking
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.types import Axes

LAW = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
SCORES = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0]) | st.floats(-4, 4, width=16)


@LAW
@hypothesis.given(st.sampled_from([(40,), (3, 4, 5)]).flatmap(lambda s: hnp.arrays(np.float32, s, elements=SCORES)),
                  st.floats(0, 1))
def test_unstructured_keeps_exactly_its_share(scores, sparsity):
  kept = round((1 - sparsity) * scores.size)
  expected = oracle.best(scores.reshape(-1), kept).reshape(scores.shape)
  np.testing.assert_array_equal(unstructured(jnp.asarray(scores), kept), expected)


@jax.jit
def unstructured(scores, kept):
  return Unstructured()(scores, kept)


def test_a_fixed_share_is_rounded_half_to_even():
  shares = (0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.95, 0.98, 1.0)  # of 10: 10, 9.5, 9, 7, 5, 1, 0.5, 0.2, 0 are kept
  masks = jax.jit(lambda s: [Unstructured(share)(s) for share in shares])(jnp.arange(10.0))
  assert [int(mask.sum()) for mask in masks] == [10, 10, 9, 7, 5, 1, 0, 0, 0]


def test_a_pattern_is_told_a_count_or_takes_its_own():
  scores = jax.random.normal(jax.random.key(0), (8, 8))
  by_hand = oracle.best(scores.reshape(-1), 16).reshape(8, 8)
  axes = Axes((0,), (1,))
  given = jax.jit(lambda s: (Unstructured(0.75)(s), Unstructured()(s, 16)))(scores)
  for mask in (*given, jax.jit(Unstructured(0.1))(scores, 16)):
    np.testing.assert_array_equal(mask, by_hand)
  one_of_four = oracle.n_of_m(scores, 1, 4, (0,))
  told = jax.jit(lambda s, sparsity: NM(2, 4)(s, counts.count_of(NM(2, 4), sparsity, s.shape, axes), axes))
  for mask in (NM(1, 4)(scores, None, axes), NM(2, 4)(scores, 1, axes), told(scores, 0.75)):
    np.testing.assert_array_equal(mask, one_of_four)


@pytest.mark.parametrize('pattern', [Unstructured(0.5), Block((4, 3), 0.5), Channel(0.5), NM(2, 4)], ids=str)
def test_a_sparsity_in_the_place_of_a_count_is_refused(pattern):
  with pytest.raises(ValueError, match='a count is a whole number of units, not 0.5. Give the sparsity to the pattern'):
    pattern(jnp.ones((8, 6)), 0.5)


SIZES = st.integers(1, 2**40) | st.sampled_from([1, 10, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**33])


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(SIZES, st.floats(0, 1, width=32))
def test_counts_of_any_leaf_are_exact_and_those_of_a_traced_share_as_exact_as_promised(size, share):
  kept = patterns.kept_of(share, size)
  assert kept == size - round(share * size) and patterns.kept_of(np.float32(share), size) == kept
  traced = patterns.kept_of(jnp.float32(share), size)
  off = abs(int(traced.high) * 2**31 + int(traced.low) - kept)
  assert off <= size / 2**23 if size > 2**24 else off <= 1
  for end in (0, 1):
    assert ranking.count(size - size * end) == patterns.kept_of(jnp.float32(end), size)


@pytest.mark.parametrize('pattern, units', [
    (Unstructured(0.5), 1), (Block((4, 3), 0.5), 12), (Channel(0.5), 12), (NM(1, 4), 1), (NM(1, 4, 3), 3)], ids=str)
@pytest.mark.parametrize('drop, fewer', [(0.0, 0.0), (0.3, 0.3), (0.99, 0.99), (1.0, 1.0)])
def test_a_drop_keeps_the_best_of_as_many_fewer_rounded_down(pattern, units, drop, fewer):
  """Checks a stack of two layers, `[layer, in, out]`. With N:M the best of the layer are kept, wherever they are."""
  axes = Axes((1,), (2,), layer=(0,))
  scores = np.random.default_rng(0).normal(size=(2, 12, 18)).astype(np.float32)
  mask = jax.jit(lambda s, drop: counts.Selector(pattern, None, axes)(s, drop))(scores, drop)
  whole = round((1 - pattern.sparsity) * scores[0].size / units)
  kept = whole - math.floor(np.float32(fewer) * np.float32(whole))
  if isinstance(pattern, Channel):
    expected = oracle.channels(scores, kept, axes)
  elif units > 1:
    expected = oracle.blocks(scores, kept, (units // 3, 3), axes)
  else:
    expected = oracle.best(scores.reshape(2, -1), kept).reshape(scores.shape)
  np.testing.assert_array_equal(mask, expected)
  assert np.all(np.sum(mask, (1, 2)) == kept * units)


TARGETS = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(SIZES, TARGETS)
def test_a_ramp_is_exact_at_its_end_and_never_comes_back(size, target):
  progress = np.float32([0, 1e-3, 0.1, 0.5, 0.9, 1 - 2**-20, 1 - 2**-24, 1, 1.5])
  found = jax.vmap(lambda p: counts.kept_of(target, size, p))(progress)
  kept = np.asarray(found.high, int) * 2**31 + np.asarray(found.low, int)
  assert kept[0] == size and np.all(np.diff(kept) <= 0)
  assert kept[-2] == kept[-1] == size - round(target * size) == patterns.kept_of(target, size)
  assert patterns.kept_of(target, size, 1) == patterns.kept_of(target, size, 1.0) == ranking.count(kept[-1])


def test_balanced_blocks_are_the_best_of_their_column():
  scores = jax.random.uniform(jax.random.key(0), (3, 16, 12))
  axes, sums = Axes((1,), (2,), (), (0,)), scores.reshape(3, 4, 4, 4, 3).sum((2, 4))
  mask = Block((4, 3), 0.5, balanced=True)(scores, None, axes).reshape(3, 4, 4, 4, 3)
  kept = np.asarray(mask.all((2, 4)))
  np.testing.assert_array_equal(kept, np.asarray(mask.any((2, 4))))
  np.testing.assert_array_equal(kept, np.argsort(np.argsort(-np.asarray(sums), 1), 1) < 2)
  assert (Block((4, 3), 0.5)(scores, None, axes).reshape(mask.shape) != mask).any()  # the best of all are others
  with pytest.raises(ValueError, match='4x3 balanced 0.5.*ranked together'):
    sparsejax.recipes.snip(optax.sgd(0.1), 0.5, Block((4, 3), 0.5, balanced=True)).init({'kernel': scores[0]})


@pytest.mark.parametrize('pattern', [Unstructured(0.5), Block((4, 3), 0.5), Channel(0.5)], ids=str)
@pytest.mark.parametrize('layer', [(0,), (2,), (3, 0)])
def test_every_layer_of_a_stack_is_as_sparse_as_asked_and_pruned_as_it_is_alone(pattern, layer):
  """Checks layers that differ by a factor of a hundred: ranked together, a whole layer would be gone."""
  others = tuple(a for a in range(2 + len(layer)) if a not in layer)
  axes = Axes(others[:1], others[1:], layer=layer)
  stack = np.random.default_rng(0).normal(size=(3, 2, 8, 6)[:len(layer)] + (8, 6)).astype(np.float32)
  stack *= 100.0 ** np.arange(len(stack)).reshape(-1, *[1] * (stack.ndim - 1))
  front = tuple(range(len(layer)))
  mask = jax.jit(lambda s: pattern(s, None, axes))(np.moveaxis(stack, front, layer))
  for i in np.ndindex(stack.shape[:-2]):
    alone = pattern(jnp.asarray(stack[i]), None, Axes((0,), (1,)))
    assert alone.mean() == 0.5
    np.testing.assert_array_equal(np.moveaxis(mask, layer, front)[i], alone)


def test_a_block_sums_narrow_scores_in_float32_and_counts_its_own_sparsity():
  scores = jnp.ones((512, 8), jnp.bfloat16).at[3, 5].set(2)  # 2048 and 2049, the same number in bfloat16
  mask = jax.jit(Block((512, 4), 0.5))(scores)
  np.testing.assert_array_equal(mask, np.arange(8)[None] >= np.full((512, 1), 4))
  five = jnp.arange(10.0).reshape(5, 2)
  assert [int(Block((1, 2), share)(five).sum()) for share in (0.0, 0.1, 0.3, 0.5, 1.0)] == [10, 10, 6, 6, 0]


def test_a_vector_sums_narrow_scores_in_float32():
  scores = jnp.ones((4, 256), jnp.bfloat16).at[2, 5].set(2)  # 256 and 257, the same number in bfloat16
  np.testing.assert_array_equal(jax.jit(NM(1, 4, 256))(scores), np.arange(4)[:, None] == np.full((1, 256), 2))


@pytest.mark.parametrize('pattern, axes, expected', [
    (Unstructured(), Axes((1,), (2,), layer=(0,)), (96, 1)), (Block((4, 3)), Axes((1,), (2,), layer=(0,)), (8, 12)),
    (Block((4, 3), balanced=True), Axes((1,), (2,), layer=(0,)), (2, 12)), (NM(2, 4), Axes((1,), (2,)), (4, 1)),
    (Channel(), Axes((1,), (2,), layer=(0,)), (12, 8)), (NM(2, 4, 3), Axes((1,), (2,), layer=(0,)), (4, 3))], ids=str)
def test_units_are_those_that_a_count_is_out_of(pattern, axes, expected):
  """Checks how many units a leaf `[3, 8, 12]` has, and how many weights are in each unit."""
  assert counts.units(pattern, (3, 8, 12), axes) == expected
  assert counts.competes(pattern, (3, 8, 12), axes) == (not isinstance(pattern, NM) and 'balanced' not in str(pattern))
