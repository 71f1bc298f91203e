"""The nouns that every module shares, and the signatures of the seven kinds of word.

A word is a plain function with one of the signatures below; anything that fits is a valid word, no registration needed.
Shapes are written in backticks, `True` in a mask is kept, and `sparsity` is the fraction of zeros.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any
Step = Any  # an int or an `int32[]`, traced or not


@dataclasses.dataclass(frozen=True)
class Bound:
  """`function` with its last arguments filled in: a `functools.partial` that compares, hashes and prints by value.

  Two optimizers made alike are then equal as configuration, and a step that makes its own compiles once.
  """

  function: Callable[..., Any]
  arguments: tuple[Any, ...] = ()

  def __call__(self, *args: Any) -> Any:
    return self.function(*args, *self.arguments)

  def __repr__(self) -> str:
    return f'{self.function.__name__.strip("_")}({", ".join(map(repr, self.arguments))})'


class Axes(NamedTuple):
  """What each axis of one parameter means to the contraction it feeds. Every axis is in exactly one field.

  `contracted`: summed over, in the order in which the program flattens them; N:M groups lie along these.
  `output`: one row of the product for each index. `spatial`: the taps of a convolution.
  `layer`: independent copies (a scanned stack, a `vmap`ped ensemble). Groups never cross a row, a tap or a layer.
  `source`: "traced" if read from a program, "convention" if inferred from the parameter's name and rank.
  """

  contracted: tuple[int, ...]
  output: tuple[int, ...]
  spatial: tuple[int, ...] = ()
  layer: tuple[int, ...] = ()
  source: str = 'convention'


class Signals(NamedTuple):
  """What a word may look at besides the weight itself; `None` where the caller has none.

  `grad`: the gradient, shaped like the weight. `key`: a PRNG key. `stats`: what the selection or a calibration found
  out about this leaf. `step`: `int32[]`. `axes`: the leaf's `Axes`.
  """

  grad: Array | None = None
  key: Array | None = None
  stats: Any = None
  step: Step | None = None
  axes: Axes | None = None


Predicate = Callable[[str, Array], bool]  # where: (path, leaf) -> is this leaf sparse
Score = Callable[[Array, Signals], Array]  # (w, signals) -> scores shaped like w, larger is more worth keeping
Schedule = Callable[[Step], Any]  # step -> scalar
# (leaves, sparsity, axes) -> sparsity per leaf, by path
Allocation = Callable[[Mapping[str, Array], float, Mapping[str, 'Axes']], Mapping[str, float]]
# (mask, scores, select, weights, signals) -> mask; `select(scores, drop=None)` is the pattern with its count filled in
Update = Callable[[Array, Array, Callable[..., Array], Array, Signals], Array]
# (choose, place, masks, key) -> masks: how the first masks come about; see `starts`
Start = Callable[[Callable[..., Any], Callable[..., PyTree], Any, Array | None], Any]


class Pattern(Protocol):
  """Which sets of weights may be zero together. Compares and prints by value."""

  sparsity: float | None  # what it reaches when nobody asks for another sparsity
  static: bool  # no traced number in it
  group: tuple[int, int]  # lengths, along contraction and output, of the group of weights that kernels see as one

  def __call__(self, scores: Array, sparsity: Any, axes: Axes, drop: Any = None) -> Array:
    """Returns the mask, `bool` shaped like `scores`, `True` where kept; `drop`, a fraction of these fewer."""

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    """Returns why a leaf of this shape cannot carry the pattern, with the remedy, or `None` if it can."""

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    """Returns in which way the zeros of `w` break the pattern at `sparsity`; empty if they do not."""


class Flow(NamedTuple):
  """How values and gradients pass between the dense master and the sparse point that the user holds.

  `project(master, mask, signals)` is the sparse point. `pull_back(grad, master, mask, signals)` turns the gradient at
  that point into the master's. `settle(master, mask, signals)` runs on the master after the optimizer's step and the
  choice of the mask, `begin(master, mask, signals)` after the first choice (`None`: nothing). `dense`: the master keeps
  values behind the zeros; `False` means that the user's parameters are the master and nothing is stored: a kept weight
  then moves by the optimizer's update, and a pruned one to `project` of itself.
  """

  project: Callable[[Array, Array, Signals], Array]
  pull_back: Callable[[Array, Array, Array, Signals], Array]
  settle: Callable[[Array, Array, Signals], Array] | None = None
  dense: bool = True
  begin: Callable[[Array, Array, Signals], Array] | None = None
