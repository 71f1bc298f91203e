"""Draws batches of the examples that are left, and removes the examples that a model never forgets.

    examples = of_rows([4, 9, 7], of=10)
    batch = examples.drawn(key, 2)                          # two of the rows 4, 7 and 9
    examples = examples.observed(batch, right)              # which of the batch the model got right
    examples = examples.without(1)                          # the row that was forgotten least goes

The data removal of SparCL (Wang et al. 2022, 2209.09476, section 3.2). A forgetting event is a presentation that the
model gets wrong after it got the presentation before right (Toneva et al. 2019, 1812.05159). Deviations from the
authors' code: batches are drawn with replacement, so that an example may not be presented between two removals. This
example stays, like one that was never right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.types import Array

ROUNDS = 4  # removals, after each of the first tenths of the epochs
NEVER = np.iinfo(np.int32).max  # events of an example that was never right


class Examples(NamedTuple):
  """An `Examples` lists the rows of a data set, those that are left first, and counts what became of each of them.

  `order`: all rows, `int[N]`, of which the first `count` are left. `right`: whether the last presentation of each row
  was right. `learned`: whether any was. `events`: how often the row was forgotten. Statistics begin anew at a removal.
  """

  order: Array
  count: Array
  right: Array
  learned: Array
  events: Array

  def drawn(self, key: Array, size: int) -> Array:
    """Returns `size` of the rows that are left, drawn with replacement."""
    return self.order[jax.random.randint(key, (size,), 0, self.count)]

  def observed(self, batch: Array, right: Array) -> 'Examples':
    """Returns the examples after the rows `batch` were presented, of which the model got `right`, `bool[B]`."""
    before = self.events[batch]
    events = jnp.where(self.right[batch] & ~right, before + 1, before)
    # A row that is drawn twice in a batch is one presentation.
    return self._replace(right=self.right.at[batch].set(right), learned=self.learned.at[batch].max(right),
                         events=self.events.at[batch].set(events))

  def without(self, number: int) -> 'Examples':
    """Returns the examples without the `number` that were forgotten least often. Of equal ones the later rows go."""
    left = jnp.zeros(len(self.order), bool).at[self.order].set(jnp.arange(len(self.order)) < self.count)
    events = jnp.where(left, jnp.where(self.learned, self.events, NEVER), -1)
    fresh = _fresh(len(self.order))
    return fresh._replace(order=jnp.argsort(-events, stable=True).astype(jnp.int32), count=self.count - number)


def of_rows(chosen: Sequence[int] | np.ndarray, of: int) -> Examples:
  """Returns the examples of a data set of `of` rows of which the rows `chosen` are left."""
  chosen = np.asarray(chosen, np.int32)
  others = np.setdiff1d(np.arange(of, dtype=np.int32), chosen)
  return _fresh(of)._replace(order=jnp.asarray(np.concatenate([chosen, others])), count=jnp.asarray(len(chosen)))


def _fresh(size: int) -> Examples:
  none = jnp.zeros(size, bool)
  return Examples(jnp.arange(size, dtype=jnp.int32), jnp.asarray(size), none, none, jnp.zeros(size, jnp.int32))


def removal_steps(steps: int, removed: float) -> tuple[list[int], int]:
  """Returns the steps before which a part of the examples goes, and the steps that are left of `steps`.

  `removed`: the fraction of all examples that goes in `ROUNDS` equal parts. The number of epochs stays, and an epoch of
  fewer examples has fewer steps. Raises `ValueError` for a fraction that is not from 0 to 1, without 1.
  """
  if not 0 <= removed < 1:
    raise ValueError(f'examples.removal_steps: removed={removed} must be in 0 ... 1, without 1; some have to stay.')
  lengths = [steps / 10 * (1 - removed * done / ROUNDS) for done in range(ROUNDS)]
  ends = np.cumsum([*lengths, steps * (1 - ROUNDS / 10) * (1 - removed)])
  return [round(end) for end in ends[:-1]], max(1, round(ends[-1]))
