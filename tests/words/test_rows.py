"""Elementwise words give the entries of a row as they give those of the leaf, and padding is never kept."""

import inspect
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import choices, counts, neighbours, patterns, rows, schedules, scores, selections, stages, updates
from sparsejax.types import ELEMENTWISE, GRADIENT_FREE, Axes, Signals, elementwise, says

SHAPE, WIDTH = (6, 5), 43
HALF = schedules.linear(0.5, 0.5, end=1)
WORDS = {name: word for name, word in inspect.getmembers(scores, callable) if says(word, ELEMENTWISE)}
UPDATES = {'reselect': updates.reselect, 'prune_to': updates.prune_to, 'swap': updates.swap(HALF),
           'drop_and_grow': updates.drop_and_grow(scores.gradient, HALF),
           'drop_and_grow at random': updates.drop_and_grow(scores.random, HALF)}


def signals(name):
  key = jax.random.key(1)
  average = jnp.abs(jax.random.normal(jax.random.key(2), SHAPE))
  stats = scores.Movement(average, ()) if 'movement' in name else average
  stats = (average,) if name in ('expected_magnitude', 'snr') else stats  # a tied leaf
  return Signals(jax.random.normal(key, SHAPE), key, stats, jnp.int32(3))


def both(name):
  """Returns the weights and the signals of a leaf, and those of the row in which the leaf is written."""
  w = jax.random.normal(jax.random.key(0), SHAPE).at[0, 0].set(jnp.nan).at[1].set(0.25)  # with ties
  leaf = w, signals(name)
  return leaf, rows.as_row(leaf, SHAPE, WIDTH)


@pytest.mark.parametrize('name', WORDS)
def test_an_elementwise_score_is_the_same_in_a_row(name):
  leaf, row = (jax.jit(WORDS[name])(*each) for each in both(name))
  cases.assert_same(leaf, rows.from_rows(row, SHAPE, WIDTH))


@pytest.mark.sampled(9)
@pytest.mark.parametrize('n', [0, 7, 30])
@pytest.mark.parametrize('name', UPDATES)
def test_an_elementwise_update_chooses_the_same_in_a_row(name, n):
  assert says(UPDATES[name], ELEMENTWISE)
  masks = []
  for w, own in both(name):
    before = rows.as_row(jnp.arange(30).reshape(SHAPE) % 4 == 1, SHAPE, WIDTH) if w.ndim == 1 else (
        jnp.arange(30).reshape(SHAPE) % 4 == 1)
    kind = choices.Alike(None, patterns.Unstructured(), w.ndim == 1)
    best = counts.Selector(kind.pattern, n, Axes((0,), (1,)) if w.ndim == 2 else Axes((), (0,)))
    select = lambda values, drop=None, best=best, kind=kind: best(kind.ranked(values, jnp.int32(30)), drop)
    masks.append(UPDATES[name](before, -jnp.abs(w), select, w, own))
  leaf, row = masks
  cases.assert_same(leaf, rows.from_rows(row, SHAPE, WIDTH))
  assert not row[30:].any()


def test_an_update_is_elementwise_only_if_its_words_are():
  other = lambda w, signals: w / w.max()
  assert not says(updates.drop_and_grow(other, HALF), ELEMENTWISE)
  assert says(updates.drop_and_grow(elementwise(lambda w, signals: w * w), HALF), ELEMENTWISE)


def test_widths_are_few_and_less_than_twice_a_size():
  assert rows.widths([4096, 8192, 8000, 64, 4095]) == [8192, 8192, 8192, 64, 4095]
  assert rows.widths([]) == [] and rows.widths([0, 5]) == [0, 5]


@pytest.mark.parametrize('shape, axes, m', [((3, 8), (1,), 4), ((2, 3, 4, 5), (2,), 2), ((4, 3, 2), (2, 0), 8)])
def test_columns_are_the_groups_and_give_the_array_back(shape, axes, m):
  w = np.arange(math.prod(shape)).reshape(shape)
  columns = jax.jit(lambda w: neighbours.as_columns(w, axes, m))(w)
  back = jax.jit(lambda x: neighbours.from_columns(x, axes, shape))(columns)
  groups = np.moveaxis(w, axes, range(-len(axes), 0)).reshape(-1, m)  # the contraction last, in its order
  assert {*map(tuple, columns.T.tolist())} == {*map(tuple, groups.tolist())}
  assert (back == w).all()


@pytest.mark.parametrize('score', [scores.magnitude, lambda w, signals: jnp.abs(w)], ids=['joined', 'not elementwise'])
def test_leaves_that_are_joined_keep_what_each_keeps_by_itself(score):
  through = patterns.NM(4, 8), patterns.NM(2, 4)
  pattern = stages.Staged(through[1], lambda step: stages.Switch(through, step))
  arrays = {'a': jnp.arange(40.).reshape(8, 5) % 7, 'b': -jnp.arange(48.).reshape(3, 16) ** 2 % 11,
            'c': jnp.arange(48.).reshape(2, 8, 3).at[0, 3].set(jnp.nan), 'd': jnp.ones((16, 3), jnp.bfloat16)}
  axes = {'a': Axes((0,), (1,)), 'b': Axes((1,), (0,)), 'c': Axes((1,), (2,), (0,)), 'd': Axes((0,), (1,))}
  selection = selections.leafwise(pattern, score=score)
  leaves = selection.plan(arrays, axes).leaves

  @jax.jit
  def masks(step):
    told = [Signals(None, None, None, step, own) for own in axes.values()]
    return selection.select(leaves, [*arrays.values()], [w == w for w in arrays.values()], told)[0]

  for step, stage in enumerate(through):
    for mask, w, own in zip(masks(step), arrays.values(), axes.values()):
      cases.assert_same(mask, stage(jnp.abs(w), None, own))


FREE = {name: word for name, word in (*inspect.getmembers(scores, callable), *UPDATES.items())
        if says(word, GRADIENT_FREE)}


@pytest.mark.parametrize('name', FREE)
def test_a_gradient_free_word_reads_no_gradient(name):
  w, own = both(name)[0]
  if name in UPDATES:
    best = counts.Selector(patterns.Unstructured(), 7, Axes((0,), (1,)))
    call = lambda own: FREE[name](w < 1, -jnp.abs(w), best, w, own)
  else:
    call = lambda own: FREE[name](w, own)
  read = jax.make_jaxpr(lambda grad: call(own._replace(grad=grad)))(own.grad).jaxpr
  assert not any(v is read.invars[0] for eqn in read.eqns for v in eqn.invars)
  jax.eval_shape(call, own._replace(grad=None))
