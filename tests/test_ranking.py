"""Exact-count selection against a numpy oracle that sorts: counts, ties, NaN, dtypes, and every way to run it."""

import functools

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

from sparsejax import ranking
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


@functools.lru_cache
def chosen_in_groups(m, axis):
  """`(scores, counts) -> masks`, compiled once for each shape; the counts are traced."""
  return jax.jit(jax.vmap(lambda scores, n: ranking.top_n_in_groups(scores, n, m, axis), (None, 0)))


@functools.lru_cache
def chosen_of_leaf():
  return jax.jit(jax.vmap(ranking.top_n, (None, 0)))


quantile = jax.jit(ranking.quantile)


def counts_up_to(m):
  """Nine counts from 0 to `m`, always as many, so that nothing is compiled again."""
  return np.linspace(0, m, 9).astype(np.int32)


@pytest.mark.parametrize('m, axis', [(m, axis) for axis in (0, 1) for m in GROUPS[axis]])
def test_every_count_of_a_group_is_exact_and_the_right_ones(m, axis):
  scores = awkward((m, 3) if axis == 0 else (3, m), seed=m)
  counts = np.arange(m + 1) if m < 40 else np.unique(np.linspace(0, m, 40).astype(np.int32))
  for n, mask in zip(counts, np.asarray(chosen_in_groups(m, axis)(scores, counts))):
    np.testing.assert_array_equal(mask.sum(axis), n)
    np.testing.assert_array_equal(mask, oracle.n_of_m(scores, n, m, (axis,)), err_msg=f'{n}:{m}')


def scores_of(*shapes):
  """A shape among `shapes` and scores of it, in one of the dtypes, with no more ties than the dtype makes."""
  elements = st.sampled_from(AWKWARD) | st.floats(-8, 8, width=16)
  arrays = st.sampled_from(shapes).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))
  return st.tuples(arrays, st.sampled_from(DTYPES)).map(lambda drawn: jnp.asarray(drawn[0]).astype(drawn[1]))


@LAW
@hypothesis.given(scores_of((2, 6, 5), (2, 12, 1)), st.sampled_from([(3, 1), (6, 1), (2, 0), (1, -1)]))
def test_groups_equal_the_oracle_for_any_scores_and_dtype(scores, group):
  m, axis = group
  for n, mask in zip(counts_up_to(m), chosen_in_groups(m, axis)(scores, counts_up_to(m))):
    assert mask.dtype == bool and mask.shape == scores.shape
    np.testing.assert_array_equal(mask, oracle.n_of_m(scores, n, m, (axis,)))


@LAW
@hypothesis.given(scores_of((41,), (3, 2, 4)))
def test_the_whole_leaf_equals_the_oracle_at_every_count(scores):
  for n, mask in zip(counts_up_to(scores.size), np.asarray(chosen_of_leaf()(scores, counts_up_to(scores.size)))):
    np.testing.assert_array_equal(mask.reshape(-1), oracle.best(scores.reshape(-1), n), err_msg=f'{n} kept')


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
  """Every way to choose, as functions of `[16, 72]` scores."""
  return {
      '2:4': lambda s: ranking.top_n_in_groups(s, 2, 4, 1),
      '5:72': lambda s: ranking.top_n_in_groups(s, 5, 72, 1),
      '100 of the leaf': lambda s: ranking.top_n(s, 100),
      'quantile': lambda s: ranking.quantile([jnp.nan_to_num(s), jnp.abs(jnp.nan_to_num(s[:3]))], 0.3),
  }


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
  jaxpr = str(jax.make_jaxpr(selections()[name])(jax.ShapeDtypeStruct((16, 72), jnp.float32)))
  lowered = jax.jit(selections()[name]).lower(jax.ShapeDtypeStruct((16, 72), jnp.float32)).as_text()
  assert 'sort' in jax.jit(jnp.argsort).lower(jnp.zeros(3)).as_text()
  for word in ('sort', 'top_k', 'gather', 'concatenate'):
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


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_the_sharded_leaf_sums_counts_and_gathers_nothing(kind):
  mesh = jax.make_mesh((4, 2), ('rows', 'columns'), axis_types=(kind,) * 2)
  scores = awkward((64, 32), seed=5)
  held = jax.device_put(scores, NamedSharding(mesh, P('rows', 'columns')))
  with jax.set_mesh(mesh):
    compiled = jax.jit(lambda s: ranking.top_n(s, 700)).lower(held).compile()
    mask = compiled(held)
  assert set(collectives(compiled)) == {'all-reduce'}
  assert mask.sharding.is_equivalent_to(held.sharding, 2)
  np.testing.assert_array_equal(mask, ranking.top_n(scores, 700))


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


def test_nan_is_the_least_of_a_quantile():
  leaves = [jnp.asarray([np.nan, 3.0], jnp.float32), jnp.asarray([1.0, 2.0, np.nan], jnp.float32)]
  found = [float(quantile(leaves, np.float32(q))) for q in (0.25, 0.75, 1.0)]
  np.testing.assert_array_equal(found, [np.nan, 2.0, 3.0])


def test_more_than_32_bit_counts_are_refused():
  huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
  for rank in (lambda s: ranking.top_n(s, 5), lambda s: ranking.quantile([s], 0.5)):
    with pytest.raises(ValueError, match='ranking: 4294967296 elements .* leaf by leaf'):
      jax.eval_shape(rank, huge)
