"""Checks that groups lie along the contraction alone, that counts are exact, and that refusals name the remedy."""

import functools
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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from sparsejax import counts, patterns, ranking
from sparsejax.patterns import NM, Block, Channel, Staged, Switch, Unstructured
from sparsejax.types import Axes

LAW = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
SCORES = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0]) | st.floats(-4, 4, width=16)

# A layout has a shape, axes, and a group size that divides the contraction and no axis that a group might cross into.
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


# Layouts, and a width that divides their outputs; of `query` one that crosses from head to head.
WIDTHS = {
    'Dense [in, out]': 5, 'Equinox [out, in]': 5, 'query [in, heads, head_dim]': 2,
    'attention out [heads, head_dim, out]': 5, 'contracted axes apart, last first': 5, 'HWIO': 5, 'OIHW': 5,
    'scanned Dense [layer, in, out]': 5, 'scanned attention out [layer, heads, head_dim, out]': 5,
}
groups_of = pytest.mark.parametrize('layout, width', [*((layout, 1) for layout in LAYOUTS), *WIDTHS.items()])
# Sums of these are exact, in any order.
QUARTERS = st.integers(-9, 9).map(lambda n: n / 4) | st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0])


@functools.lru_cache
def masks_of(layout, width):
  """Returns `(scores, counts) -> masks` of one layout, with `n` traced."""
  _, axes, m = LAYOUTS[layout]
  return jax.jit(jax.vmap(lambda scores, n: NM(n, m, width)(scores, None, axes), (None, 0)))


@groups_of
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_groups_lie_along_the_contraction(layout, width, data):
  shape, axes, m = LAYOUTS[layout]
  assert NM(1, m, width).validate(shape, axes) is None
  elements = SCORES if width == 1 else QUARTERS
  scores, counts = data.draw(hnp.arrays(np.float32, shape, elements=elements)), np.arange(m + 1)
  for n, mask in zip(counts, masks_of(layout, width)(scores, counts)):
    expected = (oracle.n_of_m(scores, n, m, axes.contracted) if width == 1
                else oracle.vectors_of_m(scores, n, m, width, axes))
    np.testing.assert_array_equal(mask, expected, err_msg=f'{n}:{m}')
    np.testing.assert_array_equal(np.sum(mask), scores.size * n // m)


@groups_of
def test_nothing_is_crossed(layout, width):
  """Other scores in one row, one tap or one layer leave the mask everywhere else as it was; so do other places."""
  shape, axes, m = LAYOUTS[layout]
  rng = np.random.default_rng(0)
  scores, other = rng.normal(size=(2, *shape)).astype(np.float32)
  select = lambda s: np.asarray(masks_of(layout, width)(s, np.arange(m + 1))[m // 2])
  for axis in (*(axes.output if width == 1 else ()), *axes.spatial, *axes.layer):
    there = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]) == 1
    found = select(np.where(there, other, scores))
    np.testing.assert_array_equal(found, np.where(there, select(other), select(scores)))
    order = rng.permutation(shape[axis])
    np.testing.assert_array_equal(select(np.take(scores, order, axis)), np.take(select(scores), order, axis))


@groups_of
def test_excess_is_how_many_too_many_each_group_keeps(layout, width):
  shape, axes, m = LAYOUTS[layout]
  rng = np.random.default_rng(1)
  kept = rng.random(shape) < 1 - 0.5 ** (1 / width)
  along = (*axes.contracted, *axes.output)
  moved = np.transpose(kept, [*(a for a in range(kept.ndim) if a not in along), *along])
  outputs = math.prod(shape[a] for a in axes.output)
  expected = np.maximum(moved.reshape(-1, m, outputs // width, width).any(-1).sum(1) - 1, 0)
  assert expected.any()
  excess = jax.jit(lambda kept, n: NM(n, m, width).excess(kept, axes))
  found = excess(kept, 1)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(expected, axis=None))
  mask = masks_of(layout, width)(rng.random(shape, np.float32), np.arange(m + 1))[2]
  assert not np.any(excess(mask, 2)) and np.all(excess(mask, 1) == 1)


def test_excess_says_where():
  kept = jnp.ones((8, 3), bool).at[4:, 1].set(False)
  np.testing.assert_array_equal(NM(1, 4).excess(kept, Axes((0,), (1,))), [[3, 3, 3], [3, 0, 3]])
  np.testing.assert_array_equal(NM(2, 4).excess(kept.T, Axes((1,), (0,))), [[2, 2], [2, 0], [2, 2]])
  np.testing.assert_array_equal(NM(1, 4, 3).excess(kept.at[5:, :].set(False), Axes((0,), (1,))), [[3], [0]])


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


# Block shapes that divide the layouts which have an output, as one contraction and one output each.
BLOCKS = {
    'Dense [in, out]': (4, 5), 'Equinox [out, in]': (3, 1), 'query [in, heads, head_dim]': (2, 3),
    'attention out [heads, head_dim, out]': (3, 5), 'the same, flattened head_dim first': (4, 1),
    'contracted axes apart [in, out, in]': (6, 5), 'contracted axes apart, last first': (4, 1), 'HWIO': (4, 5),
    'OIHW': (2, 5), 'scanned Dense [layer, in, out]': (6, 1),
    'scanned attention out [layer, heads, head_dim, out]': (6, 5),
}


@functools.lru_cache
def blocks_of(layout):
  """Returns `(scores, counts) -> masks` of one layout, with the count traced."""
  pattern, axes = Block(BLOCKS[layout]), LAYOUTS[layout][1]
  return jax.jit(jax.vmap(lambda scores, count: pattern(scores, count, axes), (None, 0)))


@pytest.mark.parametrize('layout', BLOCKS)
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_blocks_lie_along_contraction_and_output(layout, data):
  (shape, axes, _), block = LAYOUTS[layout], BLOCKS[layout]
  assert Block(block).validate(shape, axes) is None
  scores = data.draw(hnp.arrays(np.float32, shape, elements=QUARTERS.filter(lambda s: not 0 < abs(s) < 0.25)))
  layers = math.prod(shape[a] for a in axes.layer)
  count = scores.size // (block[0] * block[1]) // layers
  kept = np.linspace(0, count, 7).astype(int)
  for n, mask in zip(kept, blocks_of(layout)(scores, kept)):
    np.testing.assert_array_equal(mask, oracle.blocks(scores, n, block, axes), err_msg=f'{n} of {count}')
    np.testing.assert_array_equal(np.sum(mask), n * block[0] * block[1] * layers)


@pytest.mark.parametrize('layout', BLOCKS)
def test_occupied_blocks_are_those_that_are_kept(layout):
  (shape, axes, _), block = LAYOUTS[layout], BLOCKS[layout]
  scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  layer = math.prod(shape[a] for a in axes.layer) * block[0] * block[1]
  mask = blocks_of(layout)(scores, np.full(7, scores.size // layer - round(scores.size // layer / 2)))[3]
  sums, layers, _ = Block(block).pooled(mask, axes)
  occupied = sums > 0
  assert [occupied.shape[a] for a in layers] == [shape[a] for a in axes.layer]
  counts = jnp.sum(occupied, [a for a in range(occupied.ndim) if a not in layers])
  count = occupied.size // counts.size
  assert count * counts.size * block[0] * block[1] == mask.size and np.all(counts == count - round(count / 2))


@functools.lru_cache
def channels_of(layout):
  """Returns `(scores, counts) -> masks` of one layout, with the count traced."""
  axes = LAYOUTS[layout][1]
  return jax.jit(jax.vmap(lambda scores, count: Channel()(scores, count, axes), (None, 0)))


@pytest.mark.parametrize('layout', BLOCKS)
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_channels_are_kept_and_pruned_whole(layout, data):
  """Checks that a channel is all weights of an output index, through all taps, in each layer by itself."""
  shape, axes, _ = LAYOUTS[layout]
  assert Channel().validate(shape, axes) is None
  scores = data.draw(hnp.arrays(np.float32, shape, elements=QUARTERS))
  count = math.prod(shape[a] for a in axes.output)
  kept = np.linspace(0, count, 4).astype(int)
  for n, mask in zip(kept, channels_of(layout)(scores, kept)):
    np.testing.assert_array_equal(mask, oracle.channels(scores, n, axes), err_msg=f'{n} of {count}')
    np.testing.assert_array_equal(np.sum(mask), n * scores.size // count)


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


def test_one_nonzero_occupies_a_block():
  nonzero = jnp.zeros((4, 6), bool).at[0, 1].set(True).at[3, 5].set(True)
  np.testing.assert_array_equal(Block((2, 3)).pooled(nonzero, Axes((0,), (1,)))[0] > 0, [[True, False], [False, True]])


def test_a_block_sums_narrow_scores_in_float32_and_counts_its_own_sparsity():
  scores = jnp.ones((512, 8), jnp.bfloat16).at[3, 5].set(2)  # 2048 and 2049, the same number in bfloat16
  mask = jax.jit(Block((512, 4), 0.5))(scores)
  np.testing.assert_array_equal(mask, np.arange(8)[None] >= np.full((512, 1), 4))
  five = jnp.arange(10.0).reshape(5, 2)
  assert [int(Block((1, 2), share)(five).sum()) for share in (0.0, 0.1, 0.3, 0.5, 1.0)] == [10, 10, 6, 6, 0]


@pytest.mark.parametrize('select', [Block((4, 6), 0.7), NM(1, 4, 6)], ids=str)
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('shape, spec, axes', [
    ((64, 24), P('rows', 'columns'), Axes((0,), (1,))),
    ((3, 16, 4, 6), P(None, 'rows', 'columns'), Axes((1,), (2, 3), layer=(0,))),
    ((8, 2, 4, 6), P('rows', None, 'columns'), Axes((0, 1), (2, 3)))])
def test_sharded_blocks_are_the_same_bits_and_share_nothing_but_counts(kind, select, shape, spec, axes):
  """The blocks of 4 x 6 lie within the shards, of 16 x 12, of 4 x 12 and of 4 x 12 again; groups need no counts."""
  mesh = jax.make_mesh((4, 2), ('rows', 'columns'), axis_types=(kind,) * 2)
  scores = jax.random.normal(jax.random.key(1), shape)
  held = jax.device_put(scores, NamedSharding(mesh, spec))
  grouped, pruned = isinstance(select, NM), jax.jit(lambda s: select(s, None, axes))
  with jax.set_mesh(mesh):
    compiled = pruned.lower(held).compile()
    mask = compiled(held)
  text = compiled.as_text()
  assert ('all-reduce(' in text) != grouped
  assert not any(f' {name}(' in text for name in ('all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter'))
  assert mask.sharding.is_equivalent_to(held.sharding, len(shape))
  np.testing.assert_array_equal(mask, pruned(scores))


@pytest.mark.parametrize('select', [Block((4, 6), 0.7), NM(1, 4, 6)], ids=str)
def test_blocks_are_the_same_bits_eager_compiled_and_under_vmap(select):
  stack = jax.random.normal(jax.random.key(2), (2, 64, 24))
  eager = np.stack([select(s) for s in stack])
  np.testing.assert_array_equal(jax.jit(jax.vmap(select))(stack), eager)
  np.testing.assert_array_equal([jax.jit(select)(s) for s in stack], eager)


def test_a_recipe_trains_blocks_and_the_report_counts_them():
  """Checks two of five blocks, of which no whole number would be half."""
  params = {'kernel': jax.random.normal(jax.random.key(0), (10, 4))}
  tx = sparsejax.recipes.ste(optax.sgd(0.1), Block((2, 4), 0.5))
  state = tx.init(params)
  for seed in (1, 2):
    updates, state = jax.jit(tx.update)({'kernel': jax.random.normal(jax.random.key(seed), (10, 4))}, state, params)
    params = optax.apply_updates(params, updates)
  assert sparsejax.check(params, state).achieved == pytest.approx(0.4)
  sparsejax.check(params, pattern=Block((2, 4), 0.5))
  with pytest.raises(ValueError, match='3 blocks are kept, 2 asked'):
    sparsejax.check(params, pattern=Block((2, 4), 0.6))
  with pytest.raises(ValueError, match="'kernel' of shape .10, 4.: 2x4 has no sparsity; pass `sparsity=`"):
    sparsejax.recipes.ste(optax.sgd(0.1), '2x4').init(params)


def test_a_vector_sums_narrow_scores_in_float32():
  scores = jnp.ones((4, 256), jnp.bfloat16).at[2, 5].set(2)  # 256 and 257, the same number in bfloat16
  np.testing.assert_array_equal(jax.jit(NM(1, 4, 256))(scores), np.arange(4)[:, None] == np.full((1, 256), 2))


def test_a_recipe_trains_vectors_through_its_stages_and_the_report_counts_them():
  params = {'kernel': jax.random.normal(jax.random.key(0), (8, 6))}
  tx = sparsejax.recipes.sdgf_stepwise(optax.sgd(0.1), NM(1, 4, 3), total_steps=8, fine_tune_steps=2)
  state, nonzero = tx.init(params), []
  for seed in range(1, 9):
    updates, state = jax.jit(tx.update)({'kernel': jax.random.normal(jax.random.key(seed), (8, 6))}, state, params)
    params = optax.apply_updates(params, updates)
    vectors = np.asarray(params['kernel'] != 0).reshape(8, 2, 3)
    assert np.all(vectors.all(-1) == vectors.any(-1))
    nonzero.append(int(vectors.any(-1).sum()))
  assert set(nonzero) == {4, 8, 12} and nonzero[-1] == 4
  sparsejax.check(params, state)
  sparsejax.check(params, pattern=NM(1, 4, 3))
  with pytest.raises(ValueError, match='4 of 4 groups keep more than 1 of 4'):
    sparsejax.check({'kernel': jnp.ones((8, 6))}, pattern=NM(1, 4, 3))
  with pytest.raises(ValueError, match='2 of 4 groups keep more than 1 of 4'):  # 1:4 each column, but not the same
    sparsejax.check({'kernel': jnp.eye(8, 6)}, pattern=NM(1, 4, 3))


def test_a_stage_is_its_pattern_and_only_one_runs():
  scores, axes = jax.random.normal(jax.random.key(0), (32, 3)), Axes((0,), (1,))
  stages = (NM(8, 32), NM(4, 16), NM(2, 8), NM(1, 4))
  staged = jax.jit(lambda s, i: Switch(stages, i)(s, None, axes))
  for i, stage in enumerate(stages):
    np.testing.assert_array_equal(staged(scores, i), oracle.n_of_m(scores, stage.n, stage.m, (0,)))
  assert 'cond[' in str(jax.make_jaxpr(lambda i: Switch(stages, i)(scores, None, axes))(1))
  assert str(Switch(stages, 0)) == '8:32 -> 4:16 -> 2:8 -> 1:4'
  assert Switch(stages, 0).validate((16, 3), axes) == NM(8, 32).validate((16, 3), axes) is not None
  assert Switch(stages, 0).validate((32, 3), axes) is None
  survivors = jax.jit(lambda s, i: counts.Selector(Switch(stages, i), None, axes)(s, 0.5))
  assert [int(survivors(scores, i).sum()) for i in range(4)] == [12] * 4


def test_a_staged_pattern_is_its_target_but_for_the_pattern_at_a_step():
  stages, axes = (NM(2, 4), NM(1, 4)), Axes((0,), (1,))
  staged = Staged(NM(1, 4), lambda step: stages[int(step >= 5)])
  assert [staged.at(step) for step in (0, 4, 5)] == [NM(2, 4), NM(2, 4), NM(1, 4)]
  assert (str(staged), staged.sparsity, staged.static, staged.group) == ('1:4', 0.75, True, (4, 1))
  w = jnp.arange(16.0).reshape(8, 2) + 1
  np.testing.assert_array_equal(staged(w, None, axes), NM(1, 4)(w, None, axes))
  assert staged.violation(w, axes) == NM(1, 4).violation(w, axes) != ''
  assert counts.units(staged, (8, 2), axes) == (4, 1)
  wide = Staged(NM(1, 4), lambda step: NM(4, 16))
  assert wide.validate((8, 2), axes) == NM(4, 16).validate((8, 2), axes) is not None


@pytest.mark.parametrize('pattern, axes, expected', [
    (Unstructured(), Axes((1,), (2,), layer=(0,)), (96, 1)), (Block((4, 3)), Axes((1,), (2,), layer=(0,)), (8, 12)),
    (Block((4, 3), balanced=True), Axes((1,), (2,), layer=(0,)), (2, 12)), (NM(2, 4), Axes((1,), (2,)), (4, 1)),
    (Channel(), Axes((1,), (2,), layer=(0,)), (12, 8)), (NM(2, 4, 3), Axes((1,), (2,), layer=(0,)), (4, 3))], ids=str)
def test_units_are_those_that_a_count_is_out_of(pattern, axes, expected):
  """Checks how many units a leaf `[3, 8, 12]` has, and how many weights are in each unit."""
  assert counts.units(pattern, (3, 8, 12), axes) == expected
  assert counts.competes(pattern, (3, 8, 12), axes) == (not isinstance(pattern, NM) and 'balanced' not in str(pattern))


@pytest.mark.parametrize('pattern, sparsity, problem', [
    (NM(2, 4), None, ''), (NM(2, 4), 0.75, '4 of 4 groups keep more than 1 of 4, the first, (0, 0), keeps 2'),
    (Unstructured(0.5), None, ''), (Unstructured(0.5), 0.75, '8 weights are kept, 4 asked'),
    (Unstructured(), None, '')], ids=str)
def test_a_violation_is_of_the_sparsity_that_is_asked_or_of_the_patterns_own(pattern, sparsity, problem):
  w = jnp.where(NM(2, 4)(jax.random.normal(jax.random.key(0), (8, 2))), 1.0, 0.0)
  assert pattern.violation(w, Axes((0,), (1,)), sparsity) == problem


def test_patterns_are_values():
  assert NM(2, 4) == NM(2, 4) != NM(1, 4) and hash(NM(2, 4)) == hash(NM(2, 4))
  assert Unstructured(0.5) == Unstructured(0.5) != Unstructured() and len({Unstructured(), Unstructured()}) == 1
  assert [str(p) for p in (NM(2, 4), Unstructured(), Unstructured(0.9))] == ['2:4', 'unstructured', 'unstructured 0.9']
  assert NM(2, 8).sparsity == 0.75 and NM(2, 8).static
  traced = NM(jnp.int32(2), 8)
  assert traced.sparsity is None and not traced.static and str(traced) == 'n:8'
  assert NM(np.int64(2), 4).sparsity == 0.5
  assert NM(2, 4) == NM(2, 4, 1) != NM(2, 4, 2) == NM(2, 4, width=2) and str(NM(2, 4, 128)) == '2:4x128'
  assert Block([4, 8], 0.5) == Block((4, 8), 0.5) != Block((4, 8)) and len({Block((4, 8)), Block([4, 8])}) == 1
  assert Channel(0.5) == Channel(0.5) != Channel() and len({Channel(), Channel()}) == 1 and Channel().static
  assert [str(p) for p in (Channel(), Channel(0.5))] == ['channel', 'channel 0.5']
  assert [str(p) for p in (Block((4, 8)), Block((4, 8), 0.9))] == ['4x8', '4x8 0.9'] and Block((1, 1)).static


@pytest.mark.parametrize('text, pattern', [
    ('2:4', NM(2, 4)), (' 1 : 8 ', NM(1, 8)), ('unstructured', Unstructured()), ('Unstructured', Unstructured()),
    (NM(1, 2), NM(1, 2)), ('128x128', Block((128, 128))), (' 32 x 8 ', Block((32, 8))),
    ('2:4x128', NM(2, 4, 128)), (' 1 : 8 x 32 ', NM(1, 8, 32)), ('2:4x1', NM(2, 4)),
    ('channel', Channel()), ({'a': 'Channel', '**': '2:4'}, {'a': Channel(), '**': NM(2, 4)})])
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
    (lambda: NM(2, 4, 0), 'NM: width must be a whole number, at least 1, not 0'),
    (lambda: NM(2, 4, 1.5), 'not 1.5'),
    (lambda: patterns.parse('2:4x'), "unknown pattern '2:4x'"),
    (lambda: Unstructured(1.5), '`sparsity` must be the fraction of zeros, a number from 0 to 1, .*not 1.5'),
    (lambda: Unstructured(-0.1), 'not -0.1'),
    (lambda: Unstructured(90), 'not 90'),
    (lambda: patterns.parse('2:'),
     r"unknown pattern '2:'.* Did you mean '2:4'.* Valid: 128x128, 1:8, 2:4, 2:4x128, N:M, channel, unstr"),
    (lambda: patterns.parse('bitmask'), "unknown pattern 'bitmask'"),
    (lambda: patterns.parse('128*128'), "Did you mean '128x128'"),
    (lambda: patterns.parse('0x4'), r'Block: shape is two whole numbers.* as in \(128, 128\), not \(0, 4\)'),
    (lambda: Block((4, 4, 4)), r'not \(4, 4, 4\)'),
    (lambda: Block((4, 4.0)), r'not \(4, 4.0\)'),
    (lambda: Block((4, 4), 4), 'Block: `sparsity` must be the fraction of zeros, .*not 4'),
    (lambda: Block((4, 4))(jnp.ones((4, 4))), 'how many weights are kept. Give a sparsity'),
    (lambda: Channel(-0.5), 'Channel: `sparsity` must be the fraction of zeros, .*not -0.5'),
    (lambda: Channel()(jnp.ones((4, 4))), 'how many weights are kept. Give a sparsity'),
    (lambda: patterns.parse('channels'), "Did you mean 'channel'"),
    (lambda: patterns.parse('unstructed'), "Did you mean 'unstructured'"),
    (lambda: patterns.parse('5:4'), 'NM: 5:4 keeps 5 of 4'),
]


@pytest.mark.parametrize('make, message', REFUSED)
def test_refusals_say_what_is_wrong_and_what_is_right(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('pattern', [Unstructured(0.5), Block((2, 2), 0.5), Channel(0.5), NM(2, 4)])
def test_a_stack_of_no_layers_keeps_every_pattern(pattern):
  assert pattern.violation(jnp.zeros((0, 4, 4)), Axes((1,), (2,), layer=(0,))) == ''


@pytest.mark.parametrize('pattern, shape, axes, words', [
    (NM(2, 4), (6, 8), Axes((0,), (1,)), ['2:4', 'axes (0,) (convention) have 6', 'all_but', 'to 8', '(say 3)']),
    (NM(1, 8), (3, 4, 8), Axes((0, 1), (2,), source='traced'), ['axes (0, 1) (traced) have 12', 'to 16', '(say 6)']),
    (NM(2, 4), (7, 8), Axes((0,), (1,)), ['have 7', 'pad the axis to 8.']),  # nothing but 1 divides 7: none is proposed
    (NM(2, 4), (8,), Axes((), (0,)), ['no axis is contracted', '2:4', 'leave the leaf out of `where`']),
    (NM(2, 4, 8), (8, 20), Axes((0,), (1,)), [
        '2:4x8', 'axes (1,) (convention) have 20', 'all_but', '(say 5)', 'pad the axis to 24.']),
    (NM(2, 4, 8), (8, 2, 10), Axes((0,), (1, 2), source='traced'), ['axes (1, 2) (traced) have 20']),
    (NM(2, 4, 8), (6, 8), Axes((0,), (1,)), ['axes (0,) (convention) have 6']),
    (NM(2, 4, 8), (8,), Axes((0,), ()), ['2:4x8 lies along output axes', 'use 2:4.']),
    (Block((8, 8)), (12, 20), Axes((0,), (1,)), [
        '8x8', 'contracted (0,) and output (1,) (convention) have 12 and 20', 'all_but', '(say 6x5)', 'to 16 and 24']),
    (Block((4, 8), 0.5), (3, 4, 20), Axes((0, 1), (2,)), ['4x8 0.5', 'have 12 and 20', '(say 4x5)', 'to 12 and 24']),
    (Channel(0.5), (8,), Axes((0,), ()), ['channel 0.5', 'are (0,) and () (convention)', 'of `where`']),
    (Channel(), (8,), Axes((), (0,)), ['channel', 'are () and (0,)', 'leave the leaf out of `where`']),
    (Block((2, 2)), (8,), Axes((0,), ()), ['2x2', 'those are (0,) and ()', 'leave the leaf out of `where`']),
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
