"""Elementwise words give the entries of a row as they give those of the leaf, and padding is never kept."""

import inspect

import cases
import jax
import jax.numpy as jnp
import pytest

from sparsejax import choices, counts, patterns, rows, schedules, scores, updates
from sparsejax.types import ELEMENTWISE, Axes, Signals, elementwise, says

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
