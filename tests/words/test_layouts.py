"""Checks on every layout that groups, blocks and channels lie along the right axes, eager, compiled and sharded."""

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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.patterns import NM, Block, Channel
from sparsejax.types import Axes

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


@pytest.mark.sampled(11)
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


@pytest.mark.sampled(8)
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


@pytest.mark.sampled(7)
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


@pytest.mark.sampled(6)
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


@pytest.mark.sampled(7)
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


def test_one_nonzero_occupies_a_block():
  nonzero = jnp.zeros((4, 6), bool).at[0, 1].set(True).at[3, 5].set(True)
  np.testing.assert_array_equal(Block((2, 3)).pooled(nonzero, Axes((0,), (1,)))[0] > 0, [[True, False], [False, True]])


@pytest.mark.sampled
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
