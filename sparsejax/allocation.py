"""Allocations divide the sparsity of a whole model among its leaves.

An allocation is a function `allocation(leaves, sparsity, axes) -> sparsities`. `leaves` maps the paths of all sparse
leaves to the leaves, and the result maps the same paths to sparsities. An allocation reads only shapes, so that the
sparsity of each leaf is known before the program runs. A `Ranked` allocation ranks the scores of all leaves together;
the number of weights that a leaf keeps is then counted at each mask update.

    allocation.erk({'a': a, 'b': b}, 0.9)                              # {'a': ..., 'b': ...}
    tx = recipes.rigl(optax.adamw(1e-3), 0.9, allocation=allocation.erk, total_steps=10_000, key=key)
    tx = recipes.magnitude_at_init(optax.adamw(1e-3), 0.9, allocation=allocation.global_())
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax import arguments, errors, trees
from sparsejax.arguments import checked
from sparsejax.types import Allocation, Array, Axes, Score

OF_ITS_OWN = 'sparsities of its own'  # an allocation with this fact does not look at the sparsity that is asked


class Ranked(NamedTuple):
  """A `Ranked` allocation ranks all leaves together, and thereby counts how many weights each leaf keeps.

  The pattern and the score of the recipe choose the weights that a leaf keeps. `normalise(scores)` makes the scores of
  different leaves comparable. `score` is the score that is ranked, if not that of the recipe. The count over all leaves
  together is exact; among equal scores, those of the earlier leaf are kept. N:M patterns, which fix the count of every
  group, are refused, and so are units of different sizes, such as channels of unequal layers.
  """

  normalise: Callable[[Array], Array] | None = None
  score: Score | None = None


@checked
def uniform(leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Returns the same sparsity for every leaf."""
  del axes
  return dict.fromkeys(leaves, sparsity)


@checked
def erdos_renyi(
    leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Returns Erdos-Renyi (ER) sparsities, with densities proportional to `(n_in + n_out) / (n_in * n_out)`.

  The formula is equation 3 of SET (Mocanu et al. 2018). `n_in` is the length of the contracted axes and `n_out` that of
  the output axes, by `axes` or else by the conventions. Taps and layers do not count. Of a leaf with unknown axes, all
  dimensions count. A leaf whose density would exceed 1 is dense, and the other leaves share the remaining weights
  (Evci et al. 2020, RigL, section 3 (1)).
  Deviation: the code of RigL first rounds the number of zeros of each leaf down.
  """
  return _by_dimensions(leaves, sparsity, axes, lambda inner, outer, taps: (inner, outer))


@checked
def erk(leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Returns Erdos-Renyi-Kernel (ERK) sparsities: like `erdos_renyi`, with the taps of convolutions.

  Densities are proportional to `(n_in + n_out + w + h) / (n_in * n_out * w * h)` for kernels of `w` by `h`
  taps (Evci et al. 2020, section 3 (1)). The deviation is that of `erdos_renyi`.
  """
  return _by_dimensions(leaves, sparsity, axes, lambda inner, outer, taps: (inner, outer, *taps))


@checked
def uniform_plus(first: str | None = None, last: str | None = None, least: float = 0.2) -> Allocation:
  """Returns the allocation Uniform+ (Gale et al. 2019, The State of Sparsity, section 5.2).

  Leaves that match the glob `first` are dense. Leaves that match the glob `last` have at least the density `least`. All
  other leaves share one sparsity, with which the whole model has the sparsity that is asked for. A pytree does not tell
  its first and last layer: both are given by name, and either may be left out. Deviation: the code of Liu et al. 2022
  divides by the size of all leaves, which gives a model that is denser than asked for.

  The allocation raises `ValueError` for a glob without a leaf, and if the other leaves cannot hold enough zeros.
  """
  def allocate(leaves, sparsity, axes=None):
    del axes
    fixed: dict[str, Any] = {}
    for glob, most in ((first, 0.0), (last, min(sparsity, 1 - least))):
      paths = [path for path in leaves if glob is not None and trees.matches(glob, path)]
      if glob is not None and not paths:
        raise errors.unknown('allocation.uniform_plus', 'path', glob, leaves)
      fixed |= dict.fromkeys(paths, most)
    sizes = {path: math.prod(w.shape) for path, w in leaves.items()}
    zeros = sparsity * sum(sizes.values()) - sum(sizes[path] * own for path, own in fixed.items())
    others = sum(sizes.values()) - sum(sizes[path] for path in fixed)
    if zeros > others:
      raise ValueError(
          f'allocation.uniform_plus: sparsity {sparsity} asks for {zeros:.0f} zeros in the {others} weights that are '
          f'neither {first!r} nor {last!r}. Ask for less, or a `least` below {least}, or leave out `first`.')
    return {path: fixed.get(path, zeros / max(others, 1)) for path in leaves}

  return allocate


def custom(sparsities: Mapping[str, float]) -> Allocation:
  """Returns the allocation with the sparsities of a dict by globs, such as `{'block_0/**': 0.5, '**': 0.9}`.

  The first glob that matches a leaf decides. The allocation raises `ValueError` for a leaf that no glob matches, and
  for a glob that matches no leaf.
  """
  numbers = {glob: arguments.verified('allocation.custom', 'sparsity', value) for glob, value in sparsities.items()}

  def allocate(leaves, sparsity, axes=None):
    del sparsity, axes
    return dict(zip(leaves, trees.per_leaf('allocation.custom', 'sparsities', numbers, list(leaves))))

  allocate.facts = (OF_ITS_OWN,)
  return allocate


def global_() -> Ranked:
  """Returns the allocation that ranks all leaves together by the score of the recipe."""
  return Ranked()


def from_scores(score: Score) -> Ranked:
  """Returns the allocation in which each leaf keeps as many weights as if `score` ranked all leaves together.

  The score of the recipe chooses the weights that a leaf keeps. `scores.snip`, together with random masks, gives the
  SNIP ratios of Liu et al. 2022, section 3.1.
  """
  return Ranked(score=score)


def lamp() -> Ranked:
  """Returns the allocation LAMP, which ranks all leaves together by normalised squares (Lee et al. 2021, equation 1).

  The normalised square of a weight is w^2 divided by the sum of all squares of the leaf that are at least as large. The
  score of the recipe stands in place of |w|. LAMP sorts each leaf, and so suits masks that are seldom updated.
  """
  return Ranked(normalise=_lamp)


def _lamp(scores: Array) -> Array:
  squares = jnp.square(jnp.nan_to_num(scores.astype(jnp.float32), nan=0.0)).reshape(-1)
  order = jnp.argsort(squares, descending=True, stable=True)
  as_large = jnp.cumsum(squares[order])
  ranked = squares[order] / jnp.where(as_large > 0, as_large, 1.0)
  return jnp.zeros_like(squares).at[order].set(ranked).reshape(scores.shape)


def named(name: Any) -> Allocation | Ranked:
  """Returns the allocation that a configuration gives by `name`; raises `ValueError` for an unknown name.

  `name` is a name such as 'erk', the dict `{'name': 'uniform_plus', 'last': 'head/*'}`, a dict by globs for `custom`,
  or an allocation, which is returned as it is.
  """
  if isinstance(name, Mapping) and name.get('name') == 'uniform_plus':
    return uniform_plus(**{key: value for key, value in name.items() if key != 'name'})
  if isinstance(name, Mapping):
    return custom(name)
  if callable(name) or isinstance(name, Ranked):
    return name
  known = {'uniform': uniform, 'erdos_renyi': erdos_renyi, 'erk': erk, 'global': global_(), 'lamp': lamp()}
  if name not in known:
    raise errors.unknown('allocation.named', 'allocation', name, known)
  return known[name]


def _by_dimensions(
    leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None, lengths: Callable[..., Any],
) -> dict[str, float]:
  """Returns sparsities whose densities, at most 1, are proportional to a ratio of the dimensions of each leaf.

  The ratio is the sum of the numbers `lengths(n_in, n_out, taps)` divided by their product.
  """
  known, size, ratio = trees.axes_by_path('allocation', axes, dict(leaves)), {}, {}
  for path, w in leaves.items():
    own = known[path]
    inner, outer = (math.prod(w.shape[a] for a in group) for group in (own.contracted, own.output))
    parts = w.shape if own.source == 'unknown' else lengths(inner, outer, [w.shape[a] for a in own.spatial])
    size[path], ratio[path] = math.prod(w.shape), sum(parts) / math.prod(parts)
  full: set[str] = set()
  while True:
    free = [path for path in leaves if path not in full]
    kept = (1 - sparsity) * sum(size.values()) - sum(size[path] for path in full)
    scale = kept / max(sum(ratio[path] * size[path] for path in free), 1e-30)
    largest = max((ratio[path] for path in free), default=0.0)
    if scale * largest <= 1:
      return {path: 0.0 if path in full else 1 - scale * ratio[path] for path in leaves}
    full |= {path for path in free if ratio[path] == largest}

