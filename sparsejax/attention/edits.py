"""Says what happens to scores between the product of queries and keys and the product with values.

    edits = (ScoreEdit('add', bias), ScoreEdit('mask', seen))        # arrays that broadcast to [batch, heads, Tq, Tk]
    scores, seen = edited(scores, seen, edits)                       # of some of the scores, with parts of the arrays
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax.types import Array

HIDDEN = -1e4  # An added score of at most this much hides a key: the weight of the key is zero in float32.


class ScoreEdit(NamedTuple):
  """A `ScoreEdit` is one elementwise change of attention scores, or of attention weights.

  `kind` is a name in `EDITS`, or 'mask', 'weigh', 'segment' or 'same'. 'mask' hides the keys where `array` is `False`.
  'weigh' multiplies the weights, after the softmax, as dropout does. 'same' hides the keys whose number in `array`
  differs from the query's number in the array of the 'segment' before it. `array` broadcasts to `[batch, heads, Tq,
  Tk]`; some kinds have none.
  """

  kind: str
  array: Any = None


# Maps a kind to its effect on scores, given the array of the edit. A kind from outside is one line.
EDITS: dict[str, Callable[[Array, Any], Array]] = {
  'add': lambda scores, array: scores + array, 'multiply': lambda scores, array: scores * array,
  'divide': lambda scores, array: scores / array, 'tanh': lambda scores, array: jnp.tanh(scores)}


def edited(scores: Array, seen: Array, edits: Sequence[ScoreEdit]) -> tuple[Array, Array]:
  """Returns the scores after all edits but 'weigh', and which keys are seen. An 'add' of at most `HIDDEN` hides a key.
  """
  segment = None
  for kind, array in edits:
    array = array if array is None or kind == 'mask' else array.astype(scores.dtype)
    if kind == 'segment':
      segment = array
    elif kind in ('mask', 'same'):
      seen = seen & (array if kind == 'mask' else array == segment)
    elif kind != 'weigh':
      seen = seen & (array > HIDDEN) if kind == 'add' else seen
      # A hidden score may be -inf, which has no derivative.
      scores = EDITS[kind](scores, jnp.where(array > HIDDEN, array, 0) if kind == 'add' else array)
  return scores, seen


def segment_edits(queries: Array, keys: Array) -> tuple[ScoreEdit, ScoreEdit]:
  """Returns the edits that hide keys of other segments; `queries` and `keys` are the numbers of segments, `[batch, T]`.

  Numbers are exact up to 2^24. No array of queries times keys is made.
  """
  queries, keys = (jnp.asarray(a).astype(jnp.float32) for a in (queries, keys))
  return ScoreEdit('segment', queries[:, None, :, None]), ScoreEdit('same', keys[:, None, None])


def weighed(weights: Array, edits: Sequence[ScoreEdit]) -> Array:
  """Returns the weights after all edits of weights."""
  for kind, array in edits:
    weights = weights * array.astype(weights.dtype) if kind == 'weigh' else weights
  return weights
