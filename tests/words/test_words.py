"""Checks the small words: the signals of scores, the shares of allocations, and the weights that an update returns."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax import allocation, counts, scores, updates
from sparsejax.patterns import NM, Block, Channel, Unstructured
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


def test_masks_of_random_scores_are_uniform_over_masks_of_their_count():
  """Counts how often places, and pairs of places, are kept together by 4000 keys, in numbers of standard deviations."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(4000))
  drawn = jax.jit(jax.vmap(lambda key: scores.random(jnp.zeros((8, 8)), Signals(key=key)).reshape(64)))(keys)
  kept = np.zeros((4000, 64), np.float32)
  np.put_along_axis(kept, np.argsort(drawn, 1)[:, :16], 1, 1)
  together, chance = kept.T @ kept / 4000, np.where(np.eye(64), 16 / 64, 16 * 15 / (64 * 63))
  off = (together - chance) / np.sqrt(chance * (1 - chance) / 4000)
  assert np.abs(off).max() < 5 and 0.9 < np.mean(off**2) < 1.1


def test_random_scores_of_neighbours_of_leaves_and_of_keys_are_unrelated():
  first, second = (scores.random(jnp.zeros((512, 512)), Signals(key=jax.random.key(i))) for i in range(2))
  pairs = [(first, second), (first, first.T), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]),
           (first[::2], first[1::2]), (first[:256], first[256:])]
  for a, b in pairs:
    assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 5 / np.sqrt(a.size)


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


SIZES = st.integers(1, 40)
LEAVES = st.dictionaries(
    st.sampled_from(['a', 'b', 'c', 'd', 'e']).map(lambda name: f'{name}/kernel'),
    st.tuples(SIZES, SIZES) | st.tuples(st.integers(1, 3), st.integers(1, 3), SIZES, SIZES), min_size=1)
STATIC = {
    'uniform': allocation.uniform, 'erdos_renyi': allocation.erdos_renyi, 'erk': allocation.erk,
    'uniform_plus': allocation.uniform_plus(),
}


@pytest.mark.parametrize('name', STATIC)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(LEAVES, st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))
def test_shares_are_as_much_as_asked_together_and_no_leaf_is_denser_than_dense(name, shapes, sparsity):
  leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
  shares, sizes = STATIC[name](leaves, sparsity), {path: math.prod(shape) for path, shape in shapes.items()}
  assert [*shares] == [*leaves] and all(-1e-9 <= share <= 1 for share in shares.values())
  zeros = sum(shares[path] * size for path, size in sizes.items())
  assert math.isclose(zeros, sparsity * sum(sizes.values()), rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.parametrize('sparsity', [0.5, 0.8, 0.9])
def test_uniform_plus_leaves_the_first_dense_and_the_last_denser_and_the_rest_make_up_for_it(sparsity):
  leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in (
      ('in/kernel', (3, 10)), ('a/kernel', (40, 40)), ('b/kernel', (40, 30)), ('head/kernel', (30, 4)))}
  shares = allocation.uniform_plus('in/*', 'head/*')(leaves, sparsity)
  assert shares['in/kernel'] == 0 and shares['head/kernel'] == pytest.approx(min(sparsity, 0.8))
  assert sparsity <= shares['a/kernel'] == shares['b/kernel'] <= 1
  sizes = [math.prod(leaf.shape) for leaf in leaves.values()]
  np.testing.assert_allclose(np.dot(sizes, [*shares.values()]), sparsity * sum(sizes), rtol=1e-12)
  for globs in ({'first': 'on/*'}, {'last': 'heads/*'}):
    with pytest.raises(ValueError, match="allocation.uniform_plus: unknown path '(on|heads)/.*Valid: a/kernel"):
      allocation.uniform_plus(**globs)(leaves, sparsity)
  with pytest.raises(ValueError, match=r'allocation.uniform_plus: sparsity 0.995 asks for 2[0-9]{3} zeros in the 2800 '
                                       "weights that are neither 'in/[*]' nor 'head/[*]'.*below 0.2, or leave out"):
    allocation.uniform_plus('in/*', 'head/*')(leaves, 0.995)


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


SHAPE, AXES = (2, 8, 6), Axes((1,), (2,), layer=(0,))
MOVED = {'unstructured': Unstructured(0.5), 'block': Block((2, 3), 0.5), 'channel': Channel(0.5), '2:4': NM(2, 4)}
PLAIN = st.sampled_from([0.0, 1.0, 2.0]) | st.integers(-9, 9).map(lambda n: n / 4)
# A unit that holds both NaN and infinity has no place of its own.
VALUES = st.sampled_from([np.nan, np.inf]).flatmap(
    lambda odd: hnp.arrays(np.float32, SHAPE, elements=PLAIN | st.just(odd)))
PAST = 1e33
finite = functools.partial(np.nan_to_num, nan=-1e30, posinf=1e30, neginf=-1e30)  # beside which all else is nothing


def best(pattern, values, kept):
  """Returns the mask of the best `kept` units of both layers, `[layer, in, out]`, written out."""
  if isinstance(pattern, Block):
    return oracle.blocks(values, kept, pattern.shape, AXES)
  if isinstance(pattern, Channel):
    return oracle.channels(values, kept, AXES)
  return oracle.best(values.reshape(2, -1), kept).reshape(SHAPE)


@functools.cache
def dropped_and_grown(name):
  """Returns `(mask, w, grad, fraction) -> mask`."""
  def run(mask, w, grad, fraction):
    select = counts.Selector(MOVED[name], None, AXES)
    update = updates.drop_and_grow(scores.gradient, lambda step: fraction)
    return update(mask, scores.magnitude(w), select, w, Signals(grad=grad, step=0, axes=AXES))

  return jax.jit(run)


@pytest.mark.parametrize('name', MOVED)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(VALUES, VALUES, st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_as_many_are_grown_as_dropped_the_worst_of_the_kept_for_the_best_of_the_rest(name, w, grad, seed, fraction):
  """Checks that the best kept weights survive, that the best of all other weights grow, and that the pattern holds."""
  pattern = MOVED[name]
  size, drawn = {'block': 6, 'channel': 8}.get(name, 1), np.random.default_rng(seed).normal(size=SHAPE)
  whole = lambda x: oracle.n_of_m(x, 2, 4, (1,)) if name == '2:4' else best(pattern, x, 24 // size)
  mask = whole(drawn)
  new = np.asarray(dropped_and_grown(name)(mask, w, grad, np.float32(fraction)))
  kept = 24 // size
  left = kept - math.floor(np.float32(fraction) * np.float32(kept))
  survivors = best(pattern, np.where(mask, finite(np.abs(w)), -PAST), left)
  growing = np.where(survivors, PAST, finite(np.abs(grad)))
  np.testing.assert_array_equal(new, whole(growing))
  assert np.all(new[survivors]) and np.all(new.sum((1, 2)) == mask.sum((1, 2)))
  if fraction == 0:
    np.testing.assert_array_equal(new, mask)
  if fraction == 1:
    np.testing.assert_array_equal(new, whole(finite(np.abs(grad))))


@functools.cache
def swapped():
  """Returns `(mask, scores, fraction) -> mask`, half of each layer."""
  select = lambda x: Unstructured(0.5)(x, None, AXES)
  return jax.jit(lambda mask, x, fraction: updates.swap(lambda step: fraction)(
      mask, x, select, x, Signals(step=0, axes=AXES)))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(VALUES, st.integers(0, 99),
                  st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]))
def test_a_swap_makes_a_part_of_the_changes_the_best_in_and_the_worst_out_in_each_layer(values, seed, fraction):
  mask, whole = (best(None, x, 24) for x in (np.random.default_rng(seed).normal(size=SHAPE), values))
  new = np.asarray(swapped()(mask, values, np.float32(fraction)))
  assert np.all(new.sum((1, 2)) == mask.sum((1, 2)))
  for old, now, all_, x in zip(mask, new, whole, finite(values)):
    come, go = all_ & ~old, old & ~all_
    most = math.ceil(np.float32(fraction) * np.float32(come.sum()))
    flat = lambda x: x.reshape(1, -1)
    taken = oracle.best(flat(np.where(come, x, -PAST)), most).reshape(x.shape)
    left = oracle.best(flat(np.where(go, -x, -PAST)), most).reshape(x.shape)
    np.testing.assert_array_equal(now, (old | taken) & ~left)
  if fraction in (0, 1):
    np.testing.assert_array_equal(new, whole if fraction else mask)


ROOMS = st.lists(st.tuples(st.integers(0, 2**26), st.sampled_from([0.0, np.nan, np.inf, 3e38, 1e-40, 1.0]) | st.floats(
    0, 10, width=32)), min_size=1, max_size=5)
share = jax.jit(updates.shared_out)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(ROOMS, st.floats(0, 1))
def test_what_is_grown_is_shared_out_to_the_last_one_and_fits(rooms, part):
  room, weights = np.int32([n for n, _ in rooms]), np.float32([w for _, w in rooms])
  total = int(part * int(room.sum(dtype=np.int64)))
  given = np.asarray(share(np.int32(total), weights, room))
  assert given.dtype == np.int32 and np.all((given >= 0) & (given <= room)) and given.sum(dtype=np.int64) == total


def test_shares_are_in_the_ratio_of_their_weights_where_there_is_room():
  given = np.asarray(share(np.int32(10_000), np.float32([1, 2, 5, 0, np.nan]), np.int32([9_999] * 5)))
  np.testing.assert_array_equal(given, [1250, 2500, 6250, 0, 0])
  np.testing.assert_array_equal(share(np.int32(100), np.float32([1, 1, 2]), np.int32([99, 5, 99])), [31, 5, 64])
  np.testing.assert_array_equal(share(np.int32(2**24 + 3), np.float32([1.0]), np.int32([2**25])), [2**24 + 3])
