"""Counts forgetting events by hand, removes the examples that are forgotten least, and plans the steps that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.loop import examples


def by_hand(presented, size):
  """Returns the events of each row, and whether it was ever right, by a loop over presentations."""
  last, learned, events = np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, int)
  for batch, right in presented:
    events[batch] += last[batch] & ~right
    last[batch], learned[batch] = right, learned[batch] | right
  return events, learned


def test_events_are_those_of_a_loop_and_the_least_forgotten_go():
  rng, left = np.random.default_rng(0), examples.of_rows([9, 2, 4, 7, 5], of=10)
  presented = [(rng.permutation([9, 2, 4, 7, 5])[:3], rng.random(3) < 0.5) for _ in range(12)]
  for batch, right in presented:
    left = left.observed(jnp.asarray(batch), jnp.asarray(right))
  events, learned = by_hand(presented, 10)
  np.testing.assert_array_equal(left.events, events)
  np.testing.assert_array_equal(left.learned, learned)
  assert events.max() > events[[2, 4, 5, 7, 9]].min()
  after = left.without(2)
  worth = {row: (-(events[row] if learned[row] else examples.NEVER), row) for row in (2, 4, 5, 7, 9)}
  assert after.order[:3].tolist() == sorted(worth, key=worth.get)[:3] and int(after.count) == 3
  assert not after.events.any() and not after.right.any()  # statistics begin anew
  drawn = np.asarray(after.drawn(jax.random.key(0), 200))
  assert {*drawn.tolist()} == {*after.order[:3].tolist()}
  assert {*after.without(1).order[:2].tolist()} < {*after.order[:3].tolist()}  # Removed rows never return.


def test_an_example_that_was_never_right_stays_and_ties_go_to_the_lower_row():
  left = examples.of_rows(np.arange(4), of=4)
  for right in ([1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]):
    left = left.observed(jnp.arange(4), jnp.asarray(right, bool))
  assert left.events.tolist() == [0, 1, 0, 1]
  assert left.without(1).order[:3].tolist() == [2, 1, 3] and left.without(2).order[:2].tolist() == [2, 1]


def test_epochs_stay_and_steps_shrink_with_the_examples():
  assert examples.removal_steps(1000, 0.0) == ([100, 200, 300, 400], 1000)
  # Four tenths of the epochs have 100, 92.5, 85 and 77.5 % of the examples, and the other six have 70 %.
  assert examples.removal_steps(1000, 0.3) == ([100, 192, 278, 355], 775)
  with pytest.raises(ValueError, match='removed=1 must be in 0'):
    examples.removal_steps(10, 1)
