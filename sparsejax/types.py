"""Defines the nouns that every module shares, and the signatures of the seven kinds of word.

A word is a plain function with one of the signatures below. Any function that fits is a valid word, without
registration. The result depends on the arguments alone: leaves of equal shape, dtype and axes share one call. Shapes
are written in backticks. `True` in a mask means kept. `sparsity` is the fraction of weights that are zero.

    axes = Axes(contracted=(0,), output=(1,))
    signals = Signals(grad=grad, step=step, axes=axes)
    scores.snip(w, signals)  # `float32`, shaped like `w`
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import optax

__all__ = [
  'ALWAYS', 'AT_ZERO', 'ELEMENTWISE', 'ENDLESS', 'FACTORS', 'GRADIENT_FREE', 'TAKES_BEST', 'Asked', 'Axes', 'Bound',
  'Flow', 'Pattern', 'Pooled', 'Signals', 'elementwise', 'gradient_free', 'hashes', 'says', 'takes_best',
]

Array = jax.Array
PyTree = Any
Word = TypeVar('Word', bound=Callable[..., Any])
Inner = optax.GradientTransformation  # the user's own optimizer
Optimizer = optax.GradientTransformationExtraArgs  # a recipe around the user's optimizer
Step = Any  # an int or an `int32[]`, traced or not

ALWAYS = 'always'  # a schedule with this fact is `True` at every step
ELEMENTWISE = 'elementwise'  # a score or an update with this fact gives the entries of a leaf in any other shape
TAKES_BEST = 'takes the best'  # an update with this fact returns `select` of its scores, by rank alone
GRADIENT_FREE = 'gradient-free'  # a score or an update with this fact does not read `signals.grad`
ENDLESS = 'endless'  # a schedule with this fact is meant to go on after training
FACTORS = 'factors'  # a repair with this fact writes matrices as factors, whose products have no zeros
AT_ZERO = 'at zero'  # a schedule with this fact is `True` at step 0 and at no other step


@dataclasses.dataclass(frozen=True)
class Bound:
  """A `Bound` is `function` with its last arguments filled in: a `functools.partial` that compares and prints by value.

  Two optimizers that are made alike are equal as configuration, so a step that makes its own optimizer compiles once.
  `facts` lists what callers may rely on, see `says`. `end`: the last step that a schedule names, if any. A training
  that stops before `end` cuts the schedule off.
  """

  function: Callable[..., Any]
  arguments: tuple[Any, ...] = ()
  facts: tuple[str, ...] = ()
  end: int | None = None

  def __call__(self, *args: Any) -> Any:
    return self.function(*args, *self.arguments)

  def __repr__(self) -> str:
    return f'{self.function.__name__.strip("_")}({", ".join(map(repr, self.arguments))})'


def says(word: Any, fact: str) -> bool:
  """Returns whether `word` carries `fact`, such as `ALWAYS`, in its attribute `facts`.

  A fact saves work; a word without `facts` gives the same masks and weights. `schedule.facts = (types.ALWAYS,)` lets a
  user's own function carry one.
  """
  return fact in getattr(word, 'facts', ())


def hashes(word: Any) -> bool:
  """Returns whether a word hashes, as an argument of `jit` that is no array has to."""
  try:
    hash(word)
  except TypeError:
    return False
  return True


def elementwise(word: Word) -> Word:
  """Gives a score or an update the fact `ELEMENTWISE`, and returns the score or the update.

  The word then has to compute each entry from the entries at the same place, from scalars, and from draws of the key
  alone. Leaves of several shapes are then computed by one program, as rows `[width]` with padding behind them.
  """
  setattr(word, 'facts', (*getattr(word, 'facts', ()), ELEMENTWISE))  # noqa: B010
  return word


def gradient_free(word: Word) -> Word:
  """Gives a score or an update the fact `GRADIENT_FREE`, and returns it: a choice by the word copies no gradients."""
  setattr(word, 'facts', (*getattr(word, 'facts', ()), GRADIENT_FREE))  # noqa: B010
  return word


def takes_best(word: Word) -> Word:
  """Gives an update the fact `TAKES_BEST`, and returns it: the mask is what `select` keeps of one array of scores.

  Leaves that compete are then ranked once, by `competitions.Race.masks`.
  """
  setattr(word, 'facts', (*getattr(word, 'facts', ()), TAKES_BEST))  # noqa: B010
  return word


class Axes(NamedTuple):
  """An `Axes` says what each axis of a parameter means to the contraction that reads it. Each axis is in one field.

  `contracted`: axes that are summed over, in the order in which the program flattens them; N:M groups lie along them.
  `output`: axes with one row of the product for each index. `spatial`: the taps of a convolution. `layer`: independent
  copies (a scanned stack, a `vmap`ped ensemble). Groups never cross a row, a tap or a layer.

  `source`: "traced" if the axes were read from a program, "given" if a user wrote them, "convention" if name, rank and
  container tell them, see `conventions`. "unknown" if nothing says what the axes mean: all of them are then in
  `output`, patterns that lie along axes refuse the parameter, and `Unstructured` counts over all of it.
  """

  contracted: tuple[int, ...]
  output: tuple[int, ...]
  spatial: tuple[int, ...] = ()
  layer: tuple[int, ...] = ()
  source: str = 'convention'

  def stacked(self, extra: int) -> 'Axes':
    """Returns the axes of a stack of such parameters, which has `extra` more axes in front."""
    *groups, layer = (tuple(a + extra for a in group) for group in self[:4])
    return Axes(*groups, (*range(extra), *layer), self.source)


class Signals(NamedTuple):
  """`Signals` hold what a word may read besides the weight itself. A field is `None` where the caller has no value.

  `grad`: the gradient, shaped like the weight. `key`: a PRNG key. `stats`: the record that a selection, a memory or a
  calibration keeps of the leaf. `step`: `int32[]`. `axes`: the leaf's `Axes`.
  """

  grad: Array | None = None
  key: Array | None = None
  stats: Any = None
  step: Step | None = None
  axes: Axes | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
  """An `Asked` is the sparsity that is asked of a leaf: `Asked(0.9)` of every layer of the leaf by itself.

  `Asked(0.9, together=True)` is asked of all leaves of the state together, which compete for what is kept. `Asked()`
  asks for nothing: the sparsity comes out of training, or a traced number decides.
  """

  sparsity: float | None = None
  together: bool = False


Predicate = Callable[[str, Array], bool]  # where: (path, leaf) -> whether the leaf is sparse
Score = Callable[[Array, Signals], Array]  # (w, signals) -> scores shaped like w; a larger score is more worth keeping
Schedule = Callable[[Step], Any]  # step -> scalar
# (leaves, sparsity, axes) -> sparsity of each leaf, by path
Allocation = Callable[[Mapping[str, Array], float, Mapping[str, 'Axes']], Mapping[str, float]]
# (mask, scores, select, weights, signals) -> mask; `select(scores, drop=None)` is a `patterns.Selector`
Update = Callable[[Array, Array, Callable[..., Array], Array, Signals], Array]
# (choose, place, masks, key) -> masks: how the first masks are chosen, see `starts`
Start = Callable[[Callable[..., Any], Callable[..., PyTree], Any, Array | None], Any]


class Pooled(NamedTuple):
  """A `Pooled` holds the scores of the units of one leaf. A unit is a set of weights that is kept or pruned whole.

  `scores`: the score of each unit. `layers`: the axes of `scores` along which a count holds for each index by itself.
  `whole(mask)` expands a mask of the units to a mask of the weights.
  """

  scores: Array
  layers: tuple[int, ...]
  whole: Callable[[Array], Array]


class Pattern(Protocol):
  """A `Pattern` says which sets of weights may be zero together. Patterns compare and print by value.

  Four more attributes are optional. `fixed = True`: the pattern defines its own count, which no allocation changes.
  `survivors(scores, count, axes, drop)` replaces the rule of `patterns.survivors`. `target` and `at(step)` belong to a
  pattern that changes over the steps: the last pattern, and the pattern at `step`.
  """

  # Properties, because a member of a protocol that is not one would have to be assignable, which no pattern allows.
  @property
  def sparsity(self) -> float | None:
    """The fraction of zeros that the pattern reaches when the caller asks for no other."""

  @property
  def static(self) -> bool:
    """Whether the pattern contains no traced number."""

  @property
  def group(self) -> tuple[int, int]:
    """The lengths, along contraction and output, of the group of weights that a kernel treats as one."""

  def __call__(self, scores: Array, count: Any = None, axes: Axes = Axes((0,), (1,))) -> Array:
    """Returns the mask, `bool` shaped like `scores`, `True` where kept.

    `count`: how many units are kept in each layer, whatever `ranking.count` takes; of N:M, in each group. `None` stands
    for the count of the pattern's own `sparsity`.
    """

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    """Returns why a leaf of this shape cannot carry the pattern, with the remedy, or `None` if it can."""

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    """Returns how the zeros of `w` break the pattern at `sparsity` (default: its own), or an empty string."""

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    """Returns the units of a leaf with their scores: `float32` sums over the weights of a unit."""


class Flow(NamedTuple):
  """A `Flow` says how values and gradients pass between the dense master and the sparse point that the user holds.

  `project(master, mask, signals)` returns the sparse point. `pull_back(grad, master, mask, signals)` maps the gradient
  at the sparse point to a gradient of the master. `settle(master, mask, signals)` changes the master after the
  optimizer's step and the choice of the mask; `begin(master, mask, signals)` changes it after the first choice. `None`
  leaves the master as it is. `dense=True`: the master keeps values behind the zeros and is stored. `dense=False`: the
  user's parameters are the master and nothing is stored. A kept weight then moves by the optimizer's update, and a
  pruned weight moves to its own `project`. `frozen=True`: a pruned weight is not zero but keeps its first value, and
  reports count the frozen weights. `along_axes=True`: the flow reads `signals.axes`, and so refuses leaves of unknown
  axes.
  """

  project: Callable[[Array, Array, Signals], Array]
  pull_back: Callable[[Array, Array, Array, Signals], Array]
  settle: Callable[[Array, Array, Signals], Array] | None = None
  dense: bool = True
  begin: Callable[[Array, Array, Signals], Array] | None = None
  frozen: bool = False
  along_axes: bool = False


def moved(module: str, names: Mapping[str, tuple[Any, str]]) -> None:
  """Gives a module a `__getattr__` under which former names work for one release, with a `DeprecationWarning`.

  `names` maps a former name to the object and to the path where it is now. Type checkers do not see the former names,
  and so report them, and names that never were.
  """
  def getattr_(name: str) -> Any:
    if name not in names:
      raise AttributeError(f'module {module!r} has no attribute {name!r}')
    warnings.warn(f'{module}.{name} is now {names[name][1]}; the former name goes with the next release.',
                  DeprecationWarning, stacklevel=2)
    return names[name][0]

  setattr(sys.modules[module], '__getattr__', getattr_)  # noqa: B010
