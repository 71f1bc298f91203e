"""Measures masks and weights: densities, mask changes, exploration, the loss between two models, and FLOPs.

All functions are pure, and all but `flops` can run under `jit`. Most results are dicts by path.

    before = sj.masks(params, state)
    ...                                                     # some training steps
    metrics.sad(before, sj.masks(params, state))['mlp/kernel'].fraction
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, globs, trees
from sparsejax.arguments import checked
from sparsejax.types import Array, Axes, PyTree

__all__ = [
  'Change', 'Exploration', 'Flops', 'Overlap', 'Variance', 'collapsed', 'density', 'flops',
  'gradient_variance', 'itop_rate', 'kept', 'model_soup', 'overlap', 'sad', 'strength', 'union',
]



class Change(NamedTuple):
  """A `Change` says how many entries of a mask differ, as `count`, and which `fraction` of all entries, as `float32[]`.

  Counts of all metrics are `float32`, because `int32` would overflow.
  """

  count: Array
  fraction: Array


class Variance(NamedTuple):
  """A `Variance` is the variance of |g| over the `kept` and over the `pruned` weights of one leaf, as `float32[]`.

  The variance of no weights is NaN.
  """

  kept: Array
  pruned: Array


class Exploration(NamedTuple):
  """An `Exploration` is the fraction of weights that were kept at any time, as `float32[]`.

  `pooled` is the fraction of all leaves together. `layers` is the fraction of each leaf, by path.
  """

  pooled: Array
  layers: dict[str, Array]


class Overlap(NamedTuple):
  """An `Overlap` compares two masks of one leaf, in `float32[]`.

  `count` is the number of weights that both masks keep. `chance` is the number that two independent masks would both
  keep on average. `ratio` is count / chance. `jaccard` is the Jaccard index.
  """

  count: Array
  chance: Array
  ratio: Array
  jaccard: Array


class Flops(NamedTuple):
  """A `Flops` counts the operations of one call of a program, with sparse and with dense parameters.

  A multiply-add counts as two operations. `training` is the forward and the backward pass.
  """

  inference: float
  training: float
  dense_inference: float
  dense_training: float


@checked
def density(params: PyTree) -> dict[str, Array]:
  """Returns the fraction of each leaf that is not zero, as `float32[]` by path; -0.0 is zero, and NaN is not."""
  paths, leaves, _ = trees.flatten(params)
  return {path: jnp.mean(leaf != 0, dtype=jnp.float32) for path, leaf in zip(paths, leaves)}


@checked
def kept(tree: PyTree) -> dict[str, Array]:
  """Returns the number of entries of each leaf that are not zero, as `float32[]` by path; NaN is not zero.

  `tree` holds masks or parameters. Masks of rank 0, which `sparsejax.masks` gives for dense leaves, are left out. Of
  parameters, only `trees.matrices` are counted, since a bias may well be zero.
  """
  return {path: jnp.sum(mask, dtype=jnp.float32) for path, mask in _prunable(tree).items()}


@checked
def collapsed(tree: PyTree) -> dict[str, Array]:
  """Returns whether a leaf keeps no weight at all, as `bool[]` by path, for the same leaves as `kept`.

  A leaf that keeps no weight is a collapsed layer (Tanaka et al. 2020, section 3). No signal and no gradient flows
  through a collapsed layer, however dense the other layers are. A stack of layers in one leaf counts as one layer.

      [path for path, empty in metrics.collapsed(masks).items() if empty]
  """
  return {path: ~jnp.any(mask) for path, mask in _prunable(tree).items()}


@checked
def strength(params: PyTree, axes: Mapping[str, Axes] | None = None) -> dict[str, Array]:
  """Returns the strength of each input of each matrix, the sum of |w| over its outputs, `float32[*layers, inputs]`.

  Of a first layer the strength ranks the features (Atashgahi et al. 2022, QuickSelection, section 3.3). `axes` are
  those of a recipe; the default follows the conventions. Taps are summed as well. NaN stays NaN. The authors' code
  reads the weights of the last update but one, between removal and growth; here they are those that are given.
  """
  sparse = trees.over(trees.default_where(axes), params)
  held = {path: w for path, w in zip(*trees.flatten(params)[:2]) if sparse(path, w)}
  return {path: _strength(held[path], own)
          for path, own in trees.axes_by_path('metrics.strength', axes, params, held).items()}


def _strength(w: Array, axes: Axes) -> Array:
  order = (*axes.layer, *axes.contracted, *axes.output, *axes.spatial)
  inputs = math.prod(w.shape[a] for a in axes.contracted)
  size = jnp.transpose(jnp.abs(w).astype(jnp.float32), order)
  return jnp.sum(size.reshape(*(w.shape[a] for a in axes.layer), inputs, -1), -1)


def _prunable(tree: PyTree) -> dict[str, Array]:
  """Maps the path of each leaf that can be pruned to the mask of its nonzero entries; see `kept`."""
  (paths, leaves, _), sparse = trees.flatten(tree), trees.over(trees.matrices, tree)
  picked = lambda path, leaf: leaf.ndim if leaf.dtype == bool else sparse(path, leaf)
  return {path: leaf.astype(bool) for path, leaf in zip(paths, leaves) if jnp.ndim(leaf) and picked(path, leaf)}


def pairs(function: str, a: PyTree, b: PyTree) -> list[tuple[str, Array, Array]]:
  """Returns path, leaf of `a` and leaf of `b` for all leaves; raises `ValueError` for leaves of different shapes."""
  paths, old, treedef = trees.flatten(a)
  found = list(zip(paths, old, treedef.flatten_up_to(b)))
  for path, x, y in found:
    if jnp.shape(x) != jnp.shape(y):  # different shapes could broadcast in silence
      raise errors.at_leaf(f'metrics.{function}', path, jnp.shape(x), f'the other tree has shape {jnp.shape(y)} there; '
                           'give two trees of one model.')
  return found


@checked
def sad(before: PyTree, after: PyTree) -> dict[str, Change]:
  """Returns the sum of absolute mask differences, `||after - before||_1`, as a `Change` by path.

  `Change.count` is the sum of Zhou et al. 2021, section 3.2; `Change.fraction` is the flip rate of the leaf. Masks of
  rank 0, which `sparsejax.masks` gives for dense leaves, are left out.
  """
  leaves = [pair for pair in pairs('sad', before, after) if jnp.ndim(pair[1])]
  flips = {path: jnp.sum(a != b, dtype=jnp.float32) for path, a, b in leaves}
  return {path: Change(flips[path], flips[path] / a.size) for path, a, _ in leaves}


@checked
def overlap(a: PyTree, b: PyTree) -> dict[str, Overlap]:
  """Returns how similar two trees of masks are, as an `Overlap` by path.

  `a` holds masks A and `b` masks B, of n weights each.

  - `count` is |A and B|.
  - `chance` is |A| |B| / n. Two independent masks that keep |A| and |B| weights uniformly at random share that many on
    average (the mean of the hypergeometric distribution). Grosse & Backes 2020, arXiv 2006.07014, compare tickets to
    chance.
  - `ratio` is count / chance: 1 for unrelated masks, and n / |A| for equal masks; NaN if A or B keeps nothing.
  - `jaccard` is |A and B| / |A or B|, the standard index of similar sets (Jaccard 1912), which ignores chance. The
    index is NaN if both masks keep nothing.

  Masks of rank 0, which `sparsejax.masks` gives for dense leaves, are left out.
  """
  return {path: _overlap(x, y) for path, x, y in pairs('overlap', a, b) if jnp.ndim(x)}


def _overlap(a: Array, b: Array) -> Overlap:
  both, either, in_a, in_b = (jnp.sum(m, dtype=jnp.float32) for m in (a & b, a | b, a, b))
  chance = in_a * (in_b / a.size)
  return Overlap(both, chance, both / chance, both / either)


@checked
def union(seen: PyTree, masks: PyTree) -> PyTree:
  """Returns the masks of all weights that were kept at any time: `seen or masks`.

  `seen` is the previous result, and the first masks at the beginning.
  """
  return jax.tree.structure(seen).unflatten([a | b for _, a, b in pairs('union', seen, masks)])


@checked
def itop_rate(seen: PyTree) -> Exploration:
  """Returns the in-time over-parametrisation rate R_s of all leaves together and of each leaf.

  R_s is the fraction of weights that were kept at any time (Liu et al. 2021, section 3, arXiv 2102.02887). `seen` is
  the result of `union`. R_s is 1 if every weight was kept at least once, and the density if masks never changed. Masks
  of rank 0, which `sparsejax.masks` gives for dense leaves, are left out. The rate of no weights is NaN.
  """
  counts, sizes = kept(seen), {path: jnp.float32(mask.size) for path, mask in _prunable(seen).items()}
  total = lambda numbers: sum(numbers.values(), jnp.float32(0))
  return Exploration(total(counts) / total(sizes), {path: counts[path] / sizes[path] for path in counts})


@checked
def gradient_variance(grads: PyTree, masks: PyTree) -> dict[str, Variance]:
  """Returns the variance of the absolute gradient over kept and over pruned weights, as a `Variance` by path.

  Progressive gradient flow (arXiv 2402.04744) aims to lower this variance at high sparsity. `grads` should be gradients
  before clipping. Leaves whose mask has rank 0, which are dense, are left out.
  """
  paths, leaves, treedef = trees.flatten(grads)
  each = zip(paths, leaves, treedef.flatten_up_to(masks))
  return {path: Variance(_variance(jnp.abs(g), m), _variance(jnp.abs(g), ~m)) for path, g, m in each if jnp.ndim(m)}


def _variance(x: Array, mask: Array) -> Array:
  x, count = x.astype(jnp.float32), jnp.sum(mask, dtype=jnp.float32)
  mean = jnp.sum(jnp.where(mask, x, 0)) / count
  return jnp.sum(jnp.where(mask, jnp.square(x - mean), 0)) / count


@checked
def flops(contractions: Any, densities: Mapping[str, Any] | None = None, *, input_gradient: str = 'sparse') -> Flops:
  """Returns the operations of all contractions of a program, from `sparsejax.contractions` and the densities.

  `densities` maps paths to densities; a path also stands for all paths of which it is a tail. A parameter without a
  density is dense. A product with a parameter of density r costs, as fractions of the dense product:

  - r in the forward pass.
  - r for the gradient of the input, or 1 if `input_gradient='dense'`, for hardware that cannot use the transposed
    pattern.
  - 1 for the gradient of the parameter, which methods with a dense master need whole.

  Inference thus costs r and training (2 r + 1) / 3 of the dense product. A mask that decays counts as dense until the
  decay is 0. Products of two activations cost 1. A product of two parameters counts for both parameters. The results
  are lower bounds if `contractions.unbounded` or `contractions.unread` is not empty.
  """
  if input_gradient not in ('sparse', 'dense'):
    raise ValueError(f"metrics.flops: input_gradient is 'sparse' or 'dense', not {input_gradient!r}.")
  other = contractions.other_macs
  inference = training = 0.0
  dense = sum(contractions.macs.values()) + other
  for path, macs in contractions.macs.items():
    names = globs.tails(path, densities or {})
    r = float(densities[names[0]]) if names else 1.0
    inference += macs * r
    training += macs * (r + (r if input_gradient == 'sparse' else 1.0) + 1.0)
  return Flops(2 * (inference + other), 2 * (training + 3 * other), 2.0 * dense, 6.0 * dense)


@checked
def model_soup(members: Sequence[PyTree], weights: Sequence[float] | None = None) -> PyTree:
  """Returns the average of models that were retrained from one pruned model (Zimmer et al. 2023, Sparse Model Soups).

  The average is algorithm 1 of arXiv 2306.16788. `weights`, which sum to 1, are equal by default. A weight of the soup
  is zero if the weight is zero in all members, so that the soup is as sparse as the members. Floating leaves are
  averaged in float32; other leaves are those of the last member. Statistics of batch norm are averaged too, and need
  to be recomputed. Raises `ValueError` if members do not have the same zeros: their average would be less sparse.
  """
  if not members:
    raise ValueError('metrics.model_soup: there are no members to average.')
  weights = [1 / len(members)] * len(members) if weights is None else list(weights)
  if len(weights) != len(members) or abs(sum(weights) - 1) > 1e-6:
    raise ValueError(f'metrics.model_soup: weights={weights} are to be one for each of {len(members)} members and sum '
                     'to 1.')
  paths, _, treedef = trees.flatten(members[0])
  columns = zip(*(treedef.flatten_up_to(member) for member in members))
  soup, sparse = [], trees.over(trees.matrices, members[0])
  for path, leaves in zip(paths, columns):
    if sparse(path, leaves[0]):
      _refuse_other_zeros(path, leaves)
    dtype = leaves[0].dtype
    if jnp.issubdtype(dtype, jnp.floating):
      soup.append(sum(a * leaf.astype(jnp.float32) for a, leaf in zip(weights, leaves)).astype(dtype))
    else:
      soup.append(leaves[-1])
  return treedef.unflatten(soup)


def _refuse_other_zeros(path: str, leaves: Sequence[Any]) -> None:
  """Raises `ValueError` if the members of a soup differ in the zeros of one leaf."""
  zeros = [leaf == 0 for leaf in leaves]
  if any(isinstance(zero, jax.core.Tracer) for zero in zeros):
    return
  for i, other in enumerate(zeros[1:], 1):
    if (odd := int(np.sum(np.asarray(zeros[0] != other)))) > 0:
      raise errors.at_leaf('metrics.model_soup', path, leaves[0].shape, f'members 0 and {i} differ in {odd} zeros, so '
                           'that their average is less sparse. Retrain all of them from one pruned model.')
