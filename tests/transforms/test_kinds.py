"""Leaves of one kind are computed by one program, which gives the bits of each leaf by itself."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from benchmarks import compile_time
from sparsejax import allocation, choices, kinds, recipes, rows
from sparsejax.recipes import n_m
from sparsejax.types import Axes

MASTERS = [name for name, recipe in recipes.TABLE.items() if recipe.__module__ == n_m.__name__ and name != 'st3']
# Two kinds, of three and two leaves, one of them a stack of layers; and a leaf that is written as a row of the first.
SHAPES = {'a': (16, 8), 'b': (2, 16, 4), 'c': (16, 8), 'd': (2, 16, 4), 'e': (16, 8), 'f': (12, 8)}
LIKE = {path: {'kernel': cases.F32(shape)} for path, shape in SHAPES.items()}
AXES = {f'{path}/kernel': Axes((len(shape) - 2,), (len(shape) - 1,), (), tuple(range(len(shape) - 2)))
        for path, shape in SHAPES.items()}
RANKED = ('sr_ste', 'st3', 'gradual_magnitude', 'movement_pruning', 'lottery_jackpot', 'set_', 'rigl', 'snfs', 'snip',
          'soft_movement_pruning')


def growth(make):
  """Returns the number of operations that twelve leaves more of three kinds add to the program of a step."""
  few, many = (compile_time.cost(make(), leaves, compiled=False).operations for leaves in (6, 18))
  return many - few


@functools.cache
def dense_growth():
  return growth(lambda: compile_time.make('dense'))


@pytest.mark.sampled(5)
@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('name', recipes.TABLE)
def test_a_leaf_more_of_a_known_kind_adds_few_operations(name):
  tuned = cases.CASES[name].options.get('fine_tune_steps', 0)
  own = cases.CASES[name].options | ({'axes': None} if name != 'dense' else {})
  make = lambda: cases.CASES[name]._replace(options=own).make(compile_time.INNER)
  most = 2 if name in MASTERS and not tuned else 4
  assert growth(make) <= most * dense_growth()


def run(name, options, steps=3):
  """Returns parameters and state after some updates of a recipe on `LIKE`."""
  case = cases.CASES[name]
  make = case._replace(options=case.options | {'axes': AXES} | options).make
  updates = jax.jit(functools.partial(cases.scanned, make, watch=False))
  params, state = updates(cases.random(0, like=LIKE), cases.random(1, (steps,), like=LIKE))[0]
  return params, state[:-1]


@pytest.mark.sampled(4)
@pytest.mark.parametrize('name, options', [
    *((name, {}) for name in RANKED), ('gradual_magnitude', {'allocation': allocation.global_()}),
    ('rigl', {'pattern': sj.NM(2, 4)}), ('gradual_magnitude', {'pattern': sj.Block((4, 2), 0.5)})], ids=str)
def test_the_bits_are_those_of_each_leaf_by_itself(name, options, monkeypatch):
  jax.clear_caches()
  found = run(name, options)
  monkeypatch.setattr(kinds, 'of', lambda rows, facts=None: [[i] for i in range(len(rows))])
  monkeypatch.setattr(rows, 'widths', list)
  jax.clear_caches()
  cases.assert_same(found, run(name, options))
  jax.clear_caches()


def test_rows_of_one_kind_have_equal_types_and_facts():
  rows = [jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3))]
  assert kinds.of(rows) == [[0, 2, 4], [1], [3]]
  assert kinds.of(rows, [0, 0, 1, 0, 0]) == [[0, 4], [1], [2], [3]]
  same = [np.ones(1)]  # does not hash, so that it equals itself only
  assert kinds.of(rows[:1] * 3, [(same,), ([np.ones(1)],), (same,)]) == [[0, 2], [1]]
  alike = lambda: choices.Alike(None, same)  # a named tuple is compared field by field, too
  assert kinds.of(rows[:1] * 2, [alike(), alike()]) == [[0, 1]]


def test_a_stack_comes_back_row_by_row():
  rows = [jnp.arange(6.0).reshape(2, 3) + i for i in range(4)]
  cases.assert_same(jax.jit(lambda rows: kinds.apart(kinds.together(rows)))(rows), rows)
  found = kinds.each(lambda fact, row: {fact: row[0] * row[1]}, ['x', 'y', 'x', 'x'], [(row,) for row in rows], (2,),
                     lambda fact: True)
  cases.assert_same(found, [{fact: 2 * row} for fact, row in zip('xyxx', rows)])


def test_leaves_of_a_mesh_are_stacked_only_where_their_shardings_are_known():
  """Shards of two square matrices, one by rows and one by columns: nothing but counts is sent."""
  for kind, groups in ((AxisType.Auto, 1), (AxisType.Explicit, 2)):
    mesh = jax.make_mesh((8,), ('model',), axis_types=(kind,))
    leaves = [jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, spec)) for spec in (P('model'), P(None, 'model'))]
    seen = []
    jax.jit(lambda leaves, seen=seen: seen.append((kinds.of(leaves), kinds.stackable(leaves[0]))))(leaves)
    assert seen == [([[0, 1]] if groups == 1 else [[0], [1]], kind == AxisType.Explicit)]
