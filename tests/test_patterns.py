"""Patterns: groups lie along the contraction and cross nothing else, counts are exact, refusals say the way out."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax import patterns
from sparsejax.patterns import NM, Staged, Unstructured
from sparsejax.types import Axes

LAW = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
SCORES = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0]) | st.floats(-4, 4, width=16)

# What holds a weight, its shape, its axes, and a group size that divides the contraction and nothing it may cross into.
LAYOUTS = {
    'Dense [in, out]': ((12, 5), Axes((0,), (1,)), 4),
    'Equinox [out, in]': ((5, 12), Axes((1,), (0,)), 4),
    'query [in, heads, head_dim]': ((12, 2, 3), Axes((0,), (1, 2)), 4),
    'attention out [heads, head_dim, out]': ((4, 3, 5), Axes((0, 1), (2,)), 6),
    'the same, flattened head_dim first': ((4, 3, 5), Axes((1, 0), (2,)), 6),
    'contracted axes apart [in, out, in]': ((4, 5, 3), Axes((0, 2), (1,)), 6),
    'contracted axes apart, last first': ((4, 5, 3), Axes((2, 0), (1,)), 6),
    'HWIO': ((2, 3, 8, 5), Axes((2,), (3,), spatial=(0, 1)), 4),
    'OIHW': ((5, 8, 2, 3), Axes((1,), (0,), spatial=(2, 3)), 4),
    'scanned Dense [layer, in, out]': ((3, 12, 5), Axes((1,), (2,), layer=(0,)), 4),
    'scanned attention out [layer, heads, head_dim, out]': ((2, 4, 3, 5), Axes((1, 2), (3,), layer=(0,)), 6),
    'vector [in]': ((12,), Axes((0,), ()), 4),
    'everything contracted': ((4, 6), Axes((0, 1), ()), 8),
}


@functools.lru_cache
def masks_of(layout):
  """`(scores, counts) -> masks` of one layout, with `n` traced."""
  _, axes, m = LAYOUTS[layout]
  return jax.jit(jax.vmap(lambda scores, n: NM(n, m)(scores, None, axes), (None, 0)))


@pytest.mark.parametrize('layout', LAYOUTS)
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_groups_lie_along_the_contraction(layout, data):
  shape, axes, m = LAYOUTS[layout]
  assert NM(1, m).validate(shape, axes) is None
  scores, counts = data.draw(hnp.arrays(np.float32, shape, elements=SCORES)), np.arange(m + 1)
  for n, mask in zip(counts, masks_of(layout)(scores, counts)):
    np.testing.assert_array_equal(mask, oracle.n_of_m(scores, n, m, axes.contracted), err_msg=f'{n}:{m}')
    np.testing.assert_array_equal(np.sum(mask), scores.size * n // m)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_nothing_is_crossed(layout):
  """Other scores in one row, one tap or one layer leave the mask everywhere else as it was; so do other places."""
  shape, axes, m = LAYOUTS[layout]
  rng = np.random.default_rng(0)
  scores, other = rng.normal(size=(2, *shape)).astype(np.float32)
  select = lambda s: np.asarray(masks_of(layout)(s, np.arange(m + 1))[m // 2])
  for axis in (*axes.output, *axes.spatial, *axes.layer):
    there = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]) == 1
    found = select(np.where(there, other, scores))
    np.testing.assert_array_equal(found, np.where(there, select(other), select(scores)))
    order = rng.permutation(shape[axis])
    np.testing.assert_array_equal(select(np.take(scores, order, axis)), np.take(select(scores), order, axis))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_excess_is_how_many_too_many_each_group_keeps(layout):
  shape, axes, m = LAYOUTS[layout]
  rng = np.random.default_rng(1)
  kept = rng.random(shape) < 0.5
  count = len(axes.contracted)
  rows = np.moveaxis(kept, axes.contracted, range(kept.ndim - count, kept.ndim)).reshape(-1, m)
  expected = np.maximum(rows.sum(1) - 2, 0)
  excess = jax.jit(lambda kept, n: NM(n, m).excess(kept, axes))
  found = excess(kept, 2)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(expected))
  mask = masks_of(layout)(rng.random(shape, np.float32), np.arange(m + 1))[2]
  assert not np.any(excess(mask, 2)) and np.all(excess(mask, 1) == 1)


def test_excess_says_where():
  kept = jnp.ones((8, 3), bool).at[4:, 1].set(False)
  np.testing.assert_array_equal(NM(1, 4).excess(kept, Axes((0,), (1,))), [[3, 3, 3], [3, 0, 3]])
  np.testing.assert_array_equal(NM(2, 4).excess(kept.T, Axes((1,), (0,))), [[2, 2], [2, 0], [2, 2]])


@LAW
@hypothesis.given(st.sampled_from([(40,), (3, 4, 5)]).flatmap(lambda s: hnp.arrays(np.float32, s, elements=SCORES)),
                  st.floats(0, 1))
def test_unstructured_keeps_exactly_its_share(scores, sparsity):
  kept = round((1 - sparsity) * scores.size)
  expected = oracle.best(scores.reshape(-1), kept).reshape(scores.shape)
  np.testing.assert_array_equal(unstructured(jnp.asarray(scores), kept), expected)


@jax.jit
def unstructured(scores, kept):
  return Unstructured()(scores, 1 - kept / scores.size)


def test_a_fixed_share_is_rounded_half_to_even():
  shares = (0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.95, 0.98, 1.0)  # of 10: 10, 9.5, 9, 7, 5, 1, 0.5, 0.2, 0 are kept
  masks = jax.jit(lambda s: [Unstructured(share)(s) for share in shares])(jnp.arange(10.0))
  assert [int(mask.sum()) for mask in masks] == [10, 10, 9, 7, 5, 1, 0, 0, 0]


def test_sparsity_may_be_given_bound_or_traced():
  scores = jax.random.normal(jax.random.key(0), (8, 8))
  by_hand = oracle.best(scores.reshape(-1), 16).reshape(8, 8)
  axes = Axes((0,), (1,))
  given = jax.jit(lambda s: (Unstructured(0.75)(s), Unstructured()(s, 0.75)))(scores)
  for mask in (*given, jax.jit(Unstructured(0.1))(scores, 0.75)):
    np.testing.assert_array_equal(mask, by_hand)
  one_of_four = oracle.n_of_m(scores, 1, 4, (0,))
  traced = jax.jit(lambda s, sparsity: NM(2, 4)(s, sparsity, axes))(scores, 0.75)
  for mask in (NM(1, 4)(scores, None, axes), NM(2, 4)(scores, 0.75, axes), traced):
    np.testing.assert_array_equal(mask, one_of_four)


def test_a_stage_is_its_pattern_and_only_one_runs():
  scores, axes = jax.random.normal(jax.random.key(0), (32, 3)), Axes((0,), (1,))
  stages = (NM(8, 32), NM(4, 16), NM(2, 8), NM(1, 4))
  staged = jax.jit(lambda s, i: Staged(stages, i)(s, None, axes))
  for i, stage in enumerate(stages):
    np.testing.assert_array_equal(staged(scores, i), oracle.n_of_m(scores, stage.n, stage.m, (0,)))
  assert 'cond[' in str(jax.make_jaxpr(lambda i: Staged(stages, i)(scores, None, axes))(1))
  assert str(Staged(stages, 0)) == '8:32 -> 4:16 -> 2:8 -> 1:4'
  assert Staged(stages, 0).validate((16, 3), axes) == NM(8, 32).validate((16, 3), axes) is not None
  assert Staged(stages, 0).validate((32, 3), axes) is None


def test_patterns_are_values():
  assert NM(2, 4) == NM(2, 4) != NM(1, 4) and hash(NM(2, 4)) == hash(NM(2, 4))
  assert Unstructured(0.5) == Unstructured(0.5) != Unstructured() and len({Unstructured(), Unstructured()}) == 1
  assert [str(p) for p in (NM(2, 4), Unstructured(), Unstructured(0.9))] == ['2:4', 'unstructured', 'unstructured 0.9']
  assert NM(2, 8).sparsity == 0.75 and NM(2, 8).static
  traced = NM(jnp.int32(2), 8)
  assert traced.sparsity is None and not traced.static and str(traced) == 'n:8'
  assert NM(np.int64(2), 4).sparsity == 0.5


@pytest.mark.parametrize('text, pattern', [
    ('2:4', NM(2, 4)), (' 1 : 8 ', NM(1, 8)), ('unstructured', Unstructured()), ('Unstructured', Unstructured()),
    (NM(1, 2), NM(1, 2))])
def test_patterns_are_read_from_text(text, pattern):
  assert patterns.parse(text) == pattern


REFUSED = [
    (lambda: NM(3, 2), 'NM: 3:2 keeps 3 of 2; n must be from 0 to m'),
    (lambda: NM(-1, 2), 'n must be from 0 to m'),
    (lambda: NM(1, 0), 'NM: m must be a whole number from 1 to 1024, not 0'),
    (lambda: NM(1, 1025), 'not 1025'),
    (lambda: NM(1, 4.0), 'not 4.0'),
    (lambda: NM(0.5, 4), 'n must be a whole number, not 0.5; give sparsity to Unstructured'),
    (lambda: NM(None, 4), 'n must be a whole number, not None'),
    (lambda: NM('2', 4), "n must be a whole number, not '2'"),
    (lambda: Unstructured(1.5), 'sparsity is the fraction of zeros, from 0 to 1, not 1.5'),
    (lambda: Unstructured(-0.1), 'not -0.1'),
    (lambda: Unstructured(90), 'not 90'),
    (lambda: patterns.parse('2:'), r"unknown pattern '2:'.* Did you mean '2:4'.* Valid: 1:8, 2:4, N:M, unstructured"),
    (lambda: patterns.parse('unstructed'), "Did you mean 'unstructured'"),
    (lambda: patterns.parse('5:4'), 'NM: 5:4 keeps 5 of 4'),
]


@pytest.mark.parametrize('make, message', REFUSED)
def test_refusals_say_what_is_wrong_and_what_is_right(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('pattern, shape, axes, words', [
    (NM(2, 4), (6, 8), Axes((0,), (1,)), ['2:4', 'axes (0,) (convention) have 6', 'all_but', 'to 8', '(say 3)']),
    (NM(1, 8), (3, 4, 8), Axes((0, 1), (2,), source='traced'), ['axes (0, 1) (traced) have 12', 'to 16', '(say 6)']),
    (NM(2, 4), (7, 8), Axes((0,), (1,)), ['have 7', 'pad the axis to 8.']),  # nothing but 1 divides 7: none is proposed
    (NM(2, 4), (8,), Axes((), (0,)), ['no axis is contracted', '2:4', 'leave the leaf out of `where`']),
])
def test_validate_says_why_and_the_way_out(pattern, shape, axes, words):
  why = pattern.validate(shape, axes)
  assert all(word in why for word in words), why


def test_a_proposed_group_size_is_one_that_fits():
  for length in range(1, 60):
    why = NM(1, 16).validate((length, 2), Axes((0,), (1,)))
    assert (why is None) == (length % 16 == 0)
    if why and 'say' in why:
      proposed = int(why.split('(say ')[1].split(')')[0])
      assert NM(1, proposed).validate((length, 2), Axes((0,), (1,))) is None
