"""Allocations: how a sparsity asked of the whole is shared out among the leaves.

An allocation is `allocation(leaves, sparsity, axes) -> sparsities`, mappings by path over the sparse leaves; it looks
at shapes only, so that shares are known before anything runs. What shares out by scores is a `Ranked`: there the leaves
compete, and how many each one keeps is counted when its mask is chosen.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax import errors, trees
from sparsejax.types import Allocation, Array, Axes, Score


class Ranked(NamedTuple):
  """All leaves ranked together: how many each of them keeps. Which ones is up to the pattern and its own scores.

  `normalise(scores)` makes the scores of different leaves comparable. `score`: what is ranked, where it is not the
  recipe's own score. Exact over all leaves together; ties keep the earlier leaf. With N:M, which fixes the count of
  every group, and with units of different size (channels of unequal layers) it is refused.
  """

  normalise: Callable[[Array], Array] | None = None
  score: Score | None = None


def uniform(leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Every leaf gets the same sparsity."""
  del axes
  return dict.fromkeys(leaves, sparsity)


def erdos_renyi(
    leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """ER: densities in the ratio of (n_in + n_out) / (n_in n_out) (Mocanu et al. 2018, SET, equation 3).

  `n_in` are the contracted and `n_out` the output axes of `axes` (default: the naming conventions), taps and layers do
  not count. A leaf that would be denser than dense is dense, and the others share what is left (Evci et al. 2020,
  RigL, section 3 (1)). The RigL code rounds each leaf's zeros down before it shares out; this does not.
  """
  return _by_dimensions(leaves, sparsity, axes, lambda inner, outer, taps: (inner, outer))


def erk(leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """ERK: as `erdos_renyi`, with the taps: (n_in + n_out + w + h) / (n_in n_out w h) (Evci et al. 2020, section 3 (1)).

  Deviates as that does.
  """
  return _by_dimensions(leaves, sparsity, axes, lambda inner, outer, taps: (inner, outer, *taps))


def uniform_plus(first: str | None = None, last: str | None = None, least: float = 0.2) -> Allocation:
  """Uniform+: the leaf at glob `first` dense, the one at `last` at least `least` dense, the rest uniform (Gale 2019).

  Gale et al. 2019, The State of Sparsity, section 5.2. A pytree does not say which layer comes first, so both go by
  name, and either may be left out. The rest is so sparse that all together are as asked; the code of Liu et al. 2022
  divides by the size of all leaves there, and is denser than asked. Raises `ValueError` where nothing is left for it.
  """
  def allocate(leaves, sparsity, axes=None):
    del axes
    fixed = {}
    for glob, most in ((first, 0.0), (last, min(sparsity, 1 - least))):
      found = [path for path in leaves if glob is not None and trees.matches(glob, path)]
      if glob is not None and not found:
        raise errors.unknown('allocation.uniform_plus', 'path', glob, leaves)
      fixed |= dict.fromkeys(found, most)
    sizes = {path: math.prod(w.shape) for path, w in leaves.items()}
    zeros = sparsity * sum(sizes.values()) - sum(sizes[path] * share for path, share in fixed.items())
    others = sum(sizes.values()) - sum(sizes[path] for path in fixed)
    if zeros > others:
      raise ValueError(
          f'allocation.uniform_plus: sparsity {sparsity} asks for {zeros:.0f} zeros in the {others} weights that are '
          f'neither {first!r} nor {last!r}. Ask for less, or a `least` below {least}, or leave out `first`.')
    return {path: fixed.get(path, zeros / max(others, 1)) for path in leaves}

  return allocate


def custom(sparsities: Mapping[str, float]) -> Allocation:
  """Sparsities by glob: `custom({'block_0/**': 0.5, '**': 0.9})`; the first glob that matches decides.

  Raises `ValueError` for a leaf that no glob covers, and for a glob that covers none.
  """
  def allocate(leaves, sparsity, axes=None):
    del sparsity, axes
    return dict(zip(leaves, trees.per_leaf('allocation.custom', 'sparsities', sparsities, list(leaves))))

  return allocate


def global_() -> Ranked:
  """All leaves ranked together by the recipe's own score."""
  return Ranked()


def from_scores(score: Score) -> Ranked:
  """As many as `score` would keep in each leaf, ranked over all; which ones is up to the recipe's own score.

  With `scores.snip` and random masks: the SNIP ratios of Liu et al. 2022, section 3.1.
  """
  return Ranked(score=score)


def lamp() -> Ranked:
  """LAMP: w^2 over the sum of the squares that are as large, ranked over all (Lee et al. 2021, equation 1).

  Of the recipe's score instead of |w|, where that is another. Sorts each leaf: for masks that are chosen now and then.
  """
  return Ranked(normalise=_lamp)


def _lamp(scores: Array) -> Array:
  squares = jnp.square(jnp.nan_to_num(scores.astype(jnp.float32), nan=0.0)).reshape(-1)
  order = jnp.argsort(squares, descending=True, stable=True)
  as_large = jnp.cumsum(squares[order])
  ranked = squares[order] / jnp.where(as_large > 0, as_large, 1.0)
  return jnp.zeros_like(squares).at[order].set(ranked).reshape(scores.shape)


def named(name: Any) -> Allocation | Ranked:
  """An allocation by its name, for configurations: `'erk'`, `{'name': 'uniform_plus', 'last': 'head/*'}`, or, for
  `custom`, `{'head/*': 0.5, '**': 0.9}`."""
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
  """Densities in the ratio of the sum of `lengths(inner, outer, taps)` to their product, none above 1."""
  size, ratio = {}, {}
  for path, w in leaves.items():
    at = trees.axes_of('allocation', axes, path, w.shape)
    of = lambda group, shape=w.shape: math.prod(shape[a] for a in group)
    parts = lengths(of(at.contracted), of(at.output), [w.shape[a] for a in at.spatial])
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

