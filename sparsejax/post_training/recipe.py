"""Defines a recipe of pruning: the words by which `prune` turns trained weights into sparse weights.

    wanda = Recipe(Unstructured(0.5), score=scores.wanda, statistic=calibration.moments)
    sparsegpt = Recipe(NM(2, 4), score=None, statistic=calibration.gram, repairs=(repairs.columns(128),))
    refined = wanda.then(repairs.swaps())

All words see one product as a `Stack` of L matrices `[L, R, K]`, R outputs by K inputs, whatever the layout of the
parameter: `y = x w^T`. L counts experts, heads or members of an ensemble that one product reads, and is 1 otherwise.
The layers of a scan come one after the other. The taps of a convolution are inputs, `[tap, in]` with the tap major.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import allocation as allocations
from sparsejax import calibration, counts, scores
from sparsejax.types import Allocation, Array, Axes, Bound, Pattern, Score, Signals, hashes

STACKED = Axes(contracted=(2,), output=(1,), layer=(0,), source='traced')  # the axes of a `Stack`


class Stack(NamedTuple):
  """A `Stack` holds the L matrices of one product on their way from dense to sparse; all arrays are `[L, R, K]`.

  `dense`: the weights before pruning, `float32` or `float64`, which no repair changes. `w`: the present weights, zero
  outside of `mask`. `mask`: `bool`, the weights that are kept so far. Weights that were pruned before the call are
  `False` from the beginning and stay so. `damping`: `float32[L]`, what the last repair added to the diagonal of the
  Gram matrix, relative to the diagonal's mean over live inputs. NaN says that no factor was found at any damping;
  `prune` then raises and names the layer. `raised`: `int32[L]`, how many times the damping was raised. `factors`:
  `None`, or what `repairs.wrapped` writes the matrices as: `w` is then dense, and `mask` that of the core.
  """

  dense: Array
  w: Array
  mask: Array
  damping: Array
  raised: Array
  factors: 'Factors | None' = None

  def kept(self, mask: Array) -> 'Stack':
    """Returns the stack with the dense weights at `mask` and zeros elsewhere."""
    return self._replace(w=jnp.where(mask, self.dense, 0), mask=mask)


class Factors(NamedTuple):
  """A `Factors` holds L matrices `[R, K]` as products `left core right`, of which the outer two are block-diagonal.

  `left`: `[L, R / b, b, b]`. `core`: `[L, R, K]`, 2:4. `right`: `[L, K / b, b, b]`.
  """

  left: Array
  core: Array
  right: Array


def stack_of(dense: Array, kept: Array | None = None) -> Stack:
  """Returns the stack of weights `[L, R, K]` before pruning; `kept` is `False` for weights that are pruned already."""
  dense = calibration.wide(dense)
  mask = jnp.ones(dense.shape, bool) if kept is None else kept
  none = jnp.zeros(dense.shape[:1], jnp.float32)
  return Stack(dense, jnp.where(mask, dense, 0), mask, none, none.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Chooser:
  """A `Chooser` is a pattern with the sparsity that is asked of one stack.

  A `Chooser` has a hash if its pattern has one.

  `groups`: the number of consecutive matrices of the stack that share one count, as feature groups of a convolution do.
  """

  pattern: Pattern
  sparsity: float | None = None
  groups: int = 1

  def __call__(self, scores: Array, among: Array, part: slice | None = None) -> Array:
    """Returns the mask of the best weights: `bool[L, R, C]` like `scores`, `False` outside of `among`.

    Without `part`, the scores are those of all K inputs and the count is that of the pattern. With `part`, they are
    those of the inputs `[part.start, part.stop)`, both known to Python. The count is then that of the first `stop`
    inputs less that of the first `start`. Parts from 0 to K thus add up to the count of the whole. A part must not
    divide a group of the pattern. Ties keep the lower index, NaN is pruned first.
    """
    best = _best if hashes(self) else inspect.unwrap(_best)  # a pattern of the user may have no hash
    return best(self, (0, scores.shape[2]) if part is None else (part.start, part.stop), scores, among)

  @property
  def asked(self) -> float | None:
    """The sparsity that is asked, or else the pattern's own."""
    return self.pattern.sparsity if self.sparsity is None else self.sparsity

  @property
  def group(self) -> int:
    """How many consecutive inputs the pattern treats as one: a part begins and ends at a multiple of this number."""
    return self.pattern.group[0]

  def count(self, shape: tuple[int, ...], part: tuple[int, int]) -> int | None:
    """Returns the count of a part of rows of this shape, `None` if the pattern has its own."""
    upto = lambda stop: counts.count_of(self.pattern, self.asked, (*shape[:2], stop), STACKED) if stop else 0
    return None if getattr(self.pattern, 'fixed', False) else upto(part[1]) - upto(part[0])


# A ranking outside of `jit` would compile some twenty programs, one for each operation.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _best(choose: Chooser, part: tuple[int, int], scores: Array, among: Array) -> Array:
  ranked = jnp.where(among, scores, jnp.nan)
  rows = ranked.reshape(scores.shape[0] // choose.groups, -1, scores.shape[2])
  return choose.pattern(rows, choose.count(rows.shape, part), STACKED).reshape(ranked.shape) & among


# (stack, choose, statistic) -> stack. A repair changes weights inside of the mask, or exchanges its entries. The
# first repair of a recipe without a score chooses the mask as well, among `stack.mask`, by `choose`. A repair runs on
# concrete arrays, and compiles what it needs by itself. A repair must keep the zeros outside of the mask, unless it
# gives `factors`. `held(shape)` is an optional attribute, see `Weighed`.
Repair = Callable[[Stack, Chooser, Any], Stack]


@dataclasses.dataclass(frozen=True, repr=False)
class Weighed(Bound):
  """A `Weighed` is a repair that says how much memory it works in.

  `numbers(shape, *arguments)` returns how many numbers exist at the peak, besides the stack and its statistic, for a
  stack of this shape, `(L, R, K)`. `prune` estimates its memory by `held`.
  """

  numbers: Callable[..., int] | None = None

  def held(self, shape: tuple[int, int, int]) -> int:
    """Returns how many numbers exist at the peak besides the stack and its statistic."""
    return self.numbers(shape, *self.arguments) if self.numbers else 0


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A `Recipe` holds the words of one method of pruning.

  `pattern`: a pattern, or a dict of patterns by glob. `sparsity`: the fraction of zeros (default: the pattern's own),
  which `allocation` shares out. `score(w, signals)`: chooses the mask; `w` is `[L, R, K]`, `signals.axes` are `STACKED`
  and `signals.stats` is the statistic. `None`: the first repair chooses. `statistic`: `calibration.moments`,
  `calibration.gram`, or `None` for a recipe that needs no data. `repairs`: applied in order.
  """

  pattern: Pattern | Mapping[str, Pattern]
  sparsity: float | None = None
  score: Score | None = scores.magnitude
  statistic: calibration.Statistic | None = None
  repairs: tuple[Repair, ...] = ()
  allocation: Allocation | allocations.Ranked = allocations.uniform
  name: str = ''

  def then(self, *repairs: Repair) -> 'Recipe':
    """Returns the recipe with more repairs after its own."""
    return dataclasses.replace(self, repairs=(*self.repairs, *repairs))

  def chosen(self, stack: Stack, choose: Chooser, statistic: Any = None) -> Stack:
    """Returns the stack with the mask that the score chooses; unchanged if the first repair chooses."""
    if self.score is None:
      return stack
    values = self.score(stack.dense, Signals(stats=statistic, axes=STACKED))
    return stack.kept(choose(values, stack.mask))

  def repaired(self, stack: Stack, choose: Chooser, statistic: Any = None) -> Stack:
    """Returns the stack after each repair, in order."""
    for repair in self.repairs:
      stack = repair(stack, choose, statistic)
    return stack

  def solve(self, stack: Stack, choose: Chooser, statistic: Any = None) -> Stack:
    """Returns the pruned stack: the mask of the score, then each repair."""
    return self.repaired(self.chosen(stack, choose, statistic), choose, statistic)
