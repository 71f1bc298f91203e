"""Exact-count selection against a numpy oracle that sorts: counts, ties, NaN, dtypes, and every way to run it."""

import contextlib
import functools
import math
import re

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

from sparsejax import ranking, wholes
from sparsejax.patterns import NM
from sparsejax.types import Axes

LAW = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Groups up to 64 are counted, larger ones bisected, 8 to 32 along the last axis have a third way: around each switch.
GROUPS = ((1, 2, 4, 8, 32, 33, 64, 65, 128, 1024), (3, 7, 8, 31, 32, 33, 64, 65, 100, 1000))  # along axis 0 and 1
AWKWARD = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 6e-5, -6e-5, 60000.0)
COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')


def awkward(shape, seed=0, dtype=jnp.float32):
  """Scores full of ties, zeros of both signs, infinities and NaN of both signs."""
  return jnp.asarray(np.random.default_rng(seed).choice(np.float32(AWKWARD), shape)).astype(dtype)


def collectives(compiled):
  return [name for name in COLLECTIVES if name in compiled.as_text()]


def most_moved(compiled):
  """Returns the number of elements of the largest result of a collective."""
  results = re.findall(rf'= (.*?) (?:{"|".join(COLLECTIVES)})(?:-start)?\(', compiled.as_text())
  shapes = [dimensions for result in results for dimensions in re.findall(r'\w+\[([\d,]*)\]', result)]
  return max(math.prod(int(n) for n in dimensions.split(',') if n) for dimensions in shapes)


@functools.lru_cache
def chosen_in_groups(m, axis):
  """`(scores, counts) -> masks`, compiled once for each shape; the counts are traced."""
  return jax.jit(jax.vmap(lambda scores, n: ranking.top_n_in_groups(scores, n, m, axis), (None, 0)))


quantile = jax.jit(ranking.quantile)


def counts_up_to(m):
  """Nine counts from 0 to `m`, always as many, so that nothing is compiled again."""
  return np.linspace(0, m, 9).astype(np.int32)


@pytest.mark.sampled(12)
@pytest.mark.parametrize('m, axis', [(m, axis) for axis in (0, 1) for m in GROUPS[axis]])
def test_every_count_of_a_group_is_exact_and_the_right_ones(m, axis):
  scores = awkward((m, 3) if axis == 0 else (3, m), seed=m)
  counts = np.arange(m + 1) if m < 40 else np.unique(np.linspace(0, m, 40).astype(np.int32))
  for n, mask in zip(counts, np.asarray(chosen_in_groups(m, axis)(scores, counts))):
    np.testing.assert_array_equal(mask.sum(axis), n)
    np.testing.assert_array_equal(mask, oracle.n_of_m(scores, n, m, (axis,)), err_msg=f'{n}:{m}')


def scores_in(shape, dtype):
  """Scores with no more ties than the dtype makes."""
  elements = st.sampled_from(AWKWARD) | st.floats(-8, 8, width=16)
  return hnp.arrays(np.float32, shape, elements=elements).map(lambda drawn: jnp.asarray(drawn).astype(dtype))


def scores_of(*shapes):
  """A shape among `shapes` and scores of it, in one of the dtypes."""
  kinds = st.tuples(st.sampled_from(shapes), st.sampled_from(DTYPES))
  return kinds.flatmap(lambda kind: scores_in(*kind))


@LAW
@hypothesis.given(scores_of((2, 6, 5), (2, 12, 1)), st.sampled_from([(3, 1), (6, 1), (2, 0), (1, -1)]))
def test_groups_equal_the_oracle_for_any_scores_and_dtype(scores, group):
  m, axis = group
  for n, mask in zip(counts_up_to(m), chosen_in_groups(m, axis)(scores, counts_up_to(m))):
    assert mask.dtype == bool and mask.shape == scores.shape
    np.testing.assert_array_equal(mask, oracle.n_of_m(scores, n, m, (axis,)))


# (shapes and dtypes of the leaves, the way of counting); leaves have equal dtypes or several.
# Words of three bits carry after 15 elements: leaves are counted in slabs, and leaves together in several sums.
LEAVES = {
    'one': ([((41,), jnp.float32)], 'as it is'),
    'one, as on one CPU': ([((3, 2, 4), jnp.float16)], 'one reduction'),
    'one, in small words': ([((9, 2, 4), jnp.float32)], 'small words'),
    'several of two bytes': ([(shape, jnp.bfloat16) for shape in ((3, 4), (2, 1, 5), (1,))], 'one reduction'),
    'of two bytes, but of two kinds': ([((5,), jnp.bfloat16), ((4,), jnp.float16)], 'as it is'),
    'a scalar, none, and dtypes mixed': (
        [((7,), jnp.float32), ((), jnp.bfloat16), ((0, 3), jnp.float16), ((2, 3), jnp.float16)], 'as it is'),
    'several, in small words': ([((5, 7), jnp.float32), ((13,), jnp.float32), ((2, 2), jnp.float32)], 'small words'),
}
WAYS = {'as it is': {}, 'one reduction': {'one_cpu': lambda: True}, 'small words': {'_WORD': 3}}


@pytest.fixture
def traced_anew():
  """For tests that change how the ranking counts: JAX keeps what was traced, and does not see such a change."""
  jax.clear_caches()
  yield
  jax.clear_caches()


@contextlib.contextmanager
def counting(way):
  with pytest.MonkeyPatch.context() as patch:
    for name, value in WAYS[way].items():
      patch.setattr(wholes, name, value)
    yield


@functools.lru_cache
def chosen_of_leaves(case):
  """`(leaves, counts) -> masks`, compiled once; the counts are traced."""
  return jax.jit(jax.vmap(ranking.top_n_of_leaves, (None, 0)))


@pytest.mark.sampled(5)
@pytest.mark.usefixtures('traced_anew')
@pytest.mark.parametrize('case', LEAVES)
@LAW
@hypothesis.given(st.data())
def test_leaves_taken_as_one_equal_the_oracle_at_every_count(case, data):
  kinds, way = LEAVES[case]
  leaves = [data.draw(scores_in(shape, dtype)) for shape, dtype in kinds]
  together = np.concatenate([np.asarray(leaf, np.float32).reshape(-1) for leaf in leaves])
  counts = counts_up_to(together.size)
  with counting(way):
    masks = chosen_of_leaves(case)(leaves, counts)
  assert [mask.shape[1:] for mask in masks] == [shape for shape, _ in kinds]
  for i, n in enumerate(counts):
    found = np.concatenate([np.asarray(mask[i]).reshape(-1) for mask in masks])
    np.testing.assert_array_equal(found, oracle.best(together, n), err_msg=f'{n} kept')


@pytest.mark.usefixtures('traced_anew')
@pytest.mark.parametrize('way', WAYS)
def test_of_many_equals_the_first_are_kept_at_every_count(way):
  """The cut within the ties goes through every place of every leaf."""
  leaves = [jnp.ones((3, 5)), jnp.asarray([2.0, 1.0, 0.0, 1.0]), jnp.ones((2, 1, 3))]
  with counting(way):
    found = jax.jit(jax.vmap(lambda n: ranking.top_n_of_leaves(leaves, n)))(jnp.arange(26))
  together = np.concatenate([np.ravel(leaf) for leaf in leaves])
  for n in range(26):
    kept = np.concatenate([np.asarray(mask[n]).reshape(-1) for mask in found])
    np.testing.assert_array_equal(kept, oracle.best(together, n))


WORDS = st.integers(0, 2**61) | st.sampled_from([0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33])


def value(n):
  assert 0 <= int(n.low) < 2**wholes._WORD and jnp.asarray(n.low).dtype == jnp.asarray(n.high).dtype == jnp.int32
  return int(n.high) * 2**wholes._WORD + int(n.low)


@LAW
@hypothesis.given(WORDS, WORDS, st.integers(-2**31, 2**31 - 1), st.integers(0, 2**32 - 1))
def test_counts_in_two_words_are_whole_numbers(a, b, n, total):
  first, second = ranking.count(a), ranking.count(b)
  assert (value(first), value(second)) == (a, b) and ranking.count(first) is first
  assert value(ranking.plus(first, second)) == a + b
  assert value(ranking.minus(first, second)) == a - b
  assert bool(ranking.at_least(first, second)) == (a >= b) and ranking.at_least(first, first)
  assert not ranking.at_least(ranking.minus(ranking.count(a), ranking.count(a + 1)), ranking.count(0))
  assert value(ranking.count(jnp.int32(n))) == n and value(ranking.count(jnp.uint32(total))) == total
  assert value(ranking.count(jnp.float32(a))) == int(np.float32(a))
  assert value(wholes._words(jnp.uint32(total).astype(jnp.int32))) == total, 'a sum that fills the sign bit'


def test_a_full_sum_is_carried_before_the_next(monkeypatch):
  monkeypatch.setattr(wholes, '_slabs', lambda shape, most: [(most, None)] * 2)
  monkeypatch.setattr(wholes, '_sums', lambda masks: [jnp.int32(-1), jnp.int32(3)])  # -1 are the bits of 2^32 - 1
  full, few = wholes.totals([[jnp.ones(4, bool)] * 2] * 3)
  assert (value(full), value(few)) == (6 * (2**32 - 1), 18)


def test_any_whole_number_is_a_count():
  scores = awkward((5, 9))
  chosen = jax.jit(jax.vmap(lambda n: ranking.top_n(scores, n)))
  counts = lambda *ns: jax.tree.map(lambda *words: jnp.asarray(words), *map(ranking.count, ns))
  assert chosen(counts(45, 46, 10**30, np.int64(2**40), jnp.int16(45), jnp.uint32(2**32 - 1))).all()
  assert not chosen(counts(0, -1, -10**30, jnp.int32(-5))).any()


# Row-major: the lower index is the earlier one of the flattened leaf. NaN is below -inf, the zeros are equal.
BY_HAND = [
    ([2, 1, 2, 2], 2, [1, 0, 1, 0]),
    ([0.0, -0.0, 0.0, -0.0], 3, [1, 1, 1, 0]),
    ([-0.0, 0.0, -1.0, 0.0], 1, [1, 0, 0, 0]),
    ([np.nan, -np.inf, np.nan, -1.0], 2, [0, 1, 0, 1]),
    ([np.nan, -np.nan, np.nan, np.nan], 2, [1, 1, 0, 0]),
    ([-np.inf, np.inf, np.nan, np.inf], 3, [1, 1, 0, 1]),
    ([1, 2, 1, 4], 3, [1, 1, 0, 1]),
]


@pytest.mark.parametrize('dtype', DTYPES)
def test_ties_zeros_and_nan_by_hand(dtype, monkeypatch):
  def select(row, n):
    in_group = ranking.top_n_in_groups(row, n, 4, 0)
    monkeypatch.setattr(ranking, '_COUNT_MOST', 0)
    bisected = ranking.top_n_in_groups(row, n, 4, 0)
    monkeypatch.undo()
    return in_group, bisected, ranking.top_n(row, n), ranking.top_n(row.reshape(2, 2), n).reshape(4)

  rows, counts, kept = (np.array(column) for column in zip(*BY_HAND))
  rows = jnp.asarray(rows, jnp.float32).astype(dtype)
  for masks in jax.jit(jax.vmap(select))(rows, counts):
    np.testing.assert_array_equal(masks, kept.astype(bool))


@pytest.mark.parametrize('m, axis', [(1, 0), (32, 1), (63, 0), (65, 0), (65, 1)])
def test_counting_and_bisection_agree(m, axis, monkeypatch):
  scores, masks = awkward((2 * m, 2 * m), seed=m), []
  for switch in (0, 2048):
    monkeypatch.setattr(ranking, '_COUNT_MOST', switch)
    chosen = jax.jit(jax.vmap(lambda n: ranking.top_n_in_groups(scores, n, m, axis)))
    masks.append(chosen(jnp.asarray([0, 1, (m + 1) // 2, m])))
  np.testing.assert_array_equal(*masks)


def test_keys_order_as_the_scores_do_and_come_back():
  values = np.float32([np.nan, -np.inf, -3e38, -1.5, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1.0000001, 3e38, np.inf])
  keys = ranking.order_keys(jnp.asarray(values))
  assert keys.dtype == jnp.int32 and np.all(np.diff(np.asarray(keys, np.int64)) > 0)
  np.testing.assert_array_equal(ranking.key_scores(keys), values)
  assert ranking.order_keys(jnp.float32(-0.0)) == ranking.order_keys(jnp.float32(0.0))
  tiny = jnp.asarray([-2, 0.5, 1], jnp.float32).astype(jnp.float8_e4m3fn)
  assert np.all(np.diff(np.asarray(ranking.order_keys(tiny))) > 0)


def selections():
  """Returns every way to select, as functions of `[16, 72]` scores."""
  return {
      '2:4': lambda s: ranking.top_n_in_groups(s, 2, 4, 1),
      '5:72': lambda s: ranking.top_n_in_groups(s, 5, 72, 1),
      '100 of the leaf': lambda s: ranking.top_n(s, 100),
      '700 of two leaves': lambda s: functools.reduce(jnp.logical_and, ranking.top_n_of_leaves([s, s[::-1]], 700)),
      'quantile': lambda s: ranking.quantile([jnp.nan_to_num(s), jnp.abs(jnp.nan_to_num(s[:3]))], 0.3),
  }


@pytest.mark.sampled(3)
@pytest.mark.parametrize('name', selections())
def test_eager_jit_and_vmap_are_the_same(name):
  select = selections()[name]
  stack = awkward((2, 16, 72), seed=7)
  eager = np.stack([np.asarray(select(s)) for s in stack])
  compiled = jax.jit(select)
  np.testing.assert_array_equal(np.stack([np.asarray(compiled(s)) for s in stack]), eager)
  np.testing.assert_array_equal(jax.jit(jax.vmap(select))(stack), eager)


@pytest.mark.parametrize('name', selections())
def test_nothing_is_sorted_and_nothing_is_gathered(name):
  """Two equal leaves are stacked; nothing else is concatenated but their counts."""
  jaxpr = str(jax.make_jaxpr(selections()[name])(jax.ShapeDtypeStruct((16, 72), jnp.float32)))
  lowered = jax.jit(selections()[name]).lower(jax.ShapeDtypeStruct((16, 72), jnp.float32)).as_text()
  assert 'sort' in jax.jit(jnp.argsort).lower(jnp.zeros(3)).as_text()
  for word in ('sort', 'top_k', 'gather', *['concatenate'] * ('two' not in name)):
    assert word not in jaxpr and word not in lowered


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('spec', [P('devices', None), P(None, 'devices')])
def test_sharded_groups_are_the_same_bits_and_need_no_other_device(kind, spec):
  """Shards of 8 rows or 16 columns: no group of 2, 4, 8 leaves its shard, along either axis."""
  mesh = jax.make_mesh((8,), ('devices',), axis_types=(kind,))
  scores = awkward((64, 128), seed=3)
  held = jax.device_put(scores, NamedSharding(mesh, spec))

  def select(s):
    return [ranking.top_n_in_groups(s, n, m, axis) for n, m in ((1, 2), (2, 4), (3, 8)) for axis in (0, 1)]

  with jax.set_mesh(mesh):
    compiled = jax.jit(select).lower(held).compile()
    masks = compiled(held)
  assert collectives(compiled) == []
  for mask, expected in zip(masks, select(scores)):
    assert mask.sharding.is_equivalent_to(held.sharding, 2)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_heads_are_merged_with_head_dim_without_another_device(kind):
  mesh = jax.make_mesh((8,), ('devices',), axis_types=(kind,))
  scores = awkward((8, 16, 6), seed=4)
  held = jax.device_put(scores, NamedSharding(mesh, P('devices', None, None)))
  select = lambda s: NM(2, 8)(s, None, Axes((0, 1), (2,)))
  with jax.set_mesh(mesh):
    compiled = jax.jit(select).lower(held).compile()
    np.testing.assert_array_equal(compiled(held), select(scores))
  assert collectives(compiled) == []


@pytest.mark.usefixtures('traced_anew')
@pytest.mark.parametrize('kind, word', [(AxisType.Auto, 31), (AxisType.Explicit, 31), (AxisType.Auto, 8)])
def test_sharded_leaves_sum_counts_and_gather_nothing(kind, word, monkeypatch):
  """Ranks a leaf sharded by rows and columns, and a leaf sharded by rows; words of 8 bits need four slabs."""
  mesh = jax.make_mesh((4, 2), ('rows', 'columns'), axis_types=(kind,) * 2)
  leaves, specs = [awkward((64, 32), seed=5), awkward((8, 5), seed=6)], [P('rows', 'columns'), P('rows', None)]
  held = [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs)]
  select = lambda leaves: (ranking.top_n(leaves[0], 700), *ranking.top_n_of_leaves(leaves, 600))
  expected = jax.jit(select)(leaves)
  jax.clear_caches()
  monkeypatch.setattr(wholes, '_WORD', word)
  with jax.set_mesh(mesh):
    compiled = jax.jit(lambda leaves: select(leaves)).lower(held).compile()
    masks = compiled(held)
  assert set(collectives(compiled)) == {'all-reduce'} and most_moved(compiled) <= 8
  for mask, where, right in zip(masks, [held[0], *held], expected):
    assert mask.sharding.is_equivalent_to(where.sharding, 2)
    np.testing.assert_array_equal(mask, right)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_quantile_of_narrow_leaves_is_that_of_their_numbers(dtype):
  leaves = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate([(8, 9), (30, 4)])]
  together = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])
  for q in np.float32([0, 0.1, 0.5, 0.99, 1]):
    np.testing.assert_allclose(quantile(leaves, q), jnp.quantile(together, q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_the_quantile_of_sharded_leaves_is_the_same_bits(kind):
  mesh = jax.make_mesh((8,), ('devices',), axis_types=(kind,))
  leaves = [jnp.nan_to_num(awkward((64, 3), seed=5)), jax.random.normal(jax.random.key(0), (16, 8))]
  held = [jax.device_put(leaf, NamedSharding(mesh, P('devices', None))) for leaf in leaves]
  with jax.set_mesh(mesh):
    compiled = jax.jit(lambda leaves: ranking.quantile(leaves, 0.7)).lower(held).compile()
    assert compiled(held) == quantile(leaves, np.float32(0.7))
  assert set(collectives(compiled)) == {'all-reduce'} and most_moved(compiled) <= 8


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_within_shard_map_each_shard_is_a_leaf(kind):
  mesh = jax.make_mesh((8,), ('devices',), axis_types=(kind,))
  scores = awkward((64, 12), seed=6)
  select = jax.shard_map(lambda s: ranking.top_n(s, 30), mesh=mesh, in_specs=P('devices'), out_specs=P('devices'))
  with jax.set_mesh(mesh):
    compiled = jax.jit(select).lower(jax.device_put(scores, NamedSharding(mesh, P('devices')))).compile()
  assert collectives(compiled) == []
  expected = oracle.best(scores.reshape(8, -1), 30).reshape(scores.shape)
  np.testing.assert_array_equal(compiled(jax.device_put(scores, NamedSharding(mesh, P('devices')))), expected)


def test_permuting_what_is_not_contracted_permutes_the_mask():
  scores = jax.random.permutation(jax.random.key(0), jnp.arange(5 * 12 * 7, dtype=jnp.float32)).reshape(5, 12, 7)
  rows, columns = np.random.default_rng(0).permutation(5), np.random.default_rng(1).permutation(7)
  select = lambda s: ranking.top_n_in_groups(s, 2, 6, 1)
  permuted = lambda x: np.asarray(x)[rows][:, :, columns]
  np.testing.assert_array_equal(jax.jit(select)(permuted(scores)), permuted(jax.jit(select)(scores)))


@LAW
@hypothesis.given(st.sampled_from([((7,),), ((1,),), ((3, 4), (2, 1, 5), (1,)), ((30,), (8, 8))]).flatmap(
    lambda shapes: st.tuples(*(hnp.arrays(np.float32, s, elements=st.floats(-100, 100, width=32)) for s in shapes))),
    st.floats(0, 1, width=32))
def test_quantile_is_numpys_of_the_concatenation(leaves, q):
  together = np.concatenate([leaf.reshape(-1) for leaf in leaves])
  expected = np.quantile(together.astype(np.float64), q)
  widest = np.max(np.diff(np.sort(together)), initial=0.0)
  # The place between two neighbours is a float32: an error of it is one in the interpolation, of size gap x ulp(place).
  np.testing.assert_allclose(quantile(leaves, np.float32(q)), expected, rtol=1e-6, atol=1e-5 * widest + 1e-30)


@pytest.mark.parametrize('q', [0.0, 0.25, 0.5, 0.75, 1.0])
def test_quantile_at_a_whole_place_is_that_weight_exactly(q):
  values = awkward((257,), seed=9)
  finite = jnp.where(jnp.isfinite(values), values, 3.0)
  assert quantile([finite[:100], finite[100:]], np.float32(q)) == np.quantile(np.asarray(finite), q)


def test_the_last_place_is_the_largest_weight_where_float32_rounds_it_up():
  leaf = jnp.zeros(2**24 + 4, jnp.bfloat16).at[7].set(2.0)
  with counting('one reduction'):
    assert jax.jit(lambda leaf: ranking.quantile([leaf], 1.0))(leaf) == 2.0


def test_nan_is_the_least_of_a_quantile():
  leaves = [jnp.asarray([np.nan, 3.0], jnp.float32), jnp.asarray([1.0, 2.0, np.nan], jnp.float32)]
  found = [float(quantile(leaves, np.float32(q))) for q in (0.25, 0.75, 1.0)]
  np.testing.assert_array_equal(found, [np.nan, 2.0, 3.0])


HUGE = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2**17, 2**16), (64, 2**14, 2**13), (3, 5))]


@pytest.mark.parametrize('way', ['as it is', 'one reduction'])
def test_leaves_of_2_to_the_33_weights_are_ranked(way):
  with counting(way):
    for n in (2**33 - 5, jnp.int32(7), ranking.Count(3, 5)):
      assert jax.eval_shape(lambda s, n=n: ranking.top_n(s, n), HUGE[0]).shape == HUGE[0].shape
    assert [mask.shape for mask in jax.eval_shape(lambda s: ranking.top_n_of_leaves(s, 2**33), HUGE)] == [
        leaf.shape for leaf in HUGE]
    assert jax.eval_shape(ranking.quantile, HUGE, 0.5) == jax.ShapeDtypeStruct((), jnp.float32)
    lowered = jax.jit(lambda s: ranking.top_n_of_leaves(s, 2**33)).lower(HUGE).as_text()
  assert 'sort' not in lowered and 'i64' not in re.sub(r'array<i64|: i64|, i64', '', lowered)


def test_slabs_share_out_a_leaf():
  for shape in ((9, 2, 4), (2, 9, 4), (41,), (3, 5), (), (0, 3)):
    parts = wholes._slabs(shape, 15)
    assert all(size <= 15 for size, _ in parts)
    masks = [np.broadcast_to(True if slab is None else slab, shape) for _, slab in parts]
    np.testing.assert_array_equal(np.sum(masks, 0), np.ones(shape))
    assert all(mask.sum() <= size for mask, (size, _) in zip(masks, parts))


def test_an_axis_that_32_bits_cannot_count_is_refused():
  for shape in ((2**33,), (2, 2**31)):
    for rank in (lambda s: ranking.top_n(s, 5), lambda s: ranking.quantile([s], 0.5)):
      with pytest.raises(ValueError, match=r'ranking: an axis .* of shape \(.*reshape it to more axes'):
        jax.eval_shape(rank, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
