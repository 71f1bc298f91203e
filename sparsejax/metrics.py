"""Metrics: what can be said of a sparse model in numbers. Pure functions, by path, all but `flops` fit for `jit`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, trees
from sparsejax.types import Array, PyTree


class Change(NamedTuple):
  """`count`: mask entries that differ, float32 (int32 would overflow). `fraction`: of all entries."""

  count: Array
  fraction: Array


class Variance(NamedTuple):
  """Var(|g|) over the kept and over the pruned weights of one leaf, float32; NaN over none."""

  kept: Array
  pruned: Array


class Exploration(NamedTuple):
  """The share of weights kept at any time so far, float32: of all leaves together, and `layers` of each, by path."""

  pooled: Array
  layers: dict[str, Array]


class Overlap(NamedTuple):
  """What two masks of one leaf both keep, float32: how many, what chance gives, their ratio, and the Jaccard index."""

  count: Array
  chance: Array
  ratio: Array
  jaccard: Array


class Barrier(NamedTuple):
  """`height`: the barrier. `alpha`: where it is, 0 at `a`, 1 at `b`. `losses`: `[points]`, from `a` to `b`. float32."""

  height: Array
  alpha: Array
  losses: Array


class Flops(NamedTuple):
  """Operations of one call of the program (a multiply-add is two), and what they would be if all were dense."""

  inference: float
  training: float
  dense_inference: float
  dense_training: float


def density(params: PyTree) -> dict[str, Array]:
  """The fraction of each leaf that is not zero, `float32[]` by path. NaN is not zero, -0.0 is."""
  paths, leaves, _ = trees.flatten(params)
  return {path: jnp.mean(leaf != 0, dtype=jnp.float32) for path, leaf in zip(paths, leaves)}


def kept(tree: PyTree) -> dict[str, Array]:
  """How many entries of each leaf are not zero, `float32[]` by path; NaN is not zero.

  `tree` are masks, of which leaves of rank 0 (dense ones, in `sparsejax.masks`) are left out; or parameters, of which
  `trees.matrices` count, since a bias may well be zero.
  """
  return {path: jnp.sum(mask, dtype=jnp.float32) for path, mask in _prunable(tree).items()}


def collapsed(tree: PyTree) -> dict[str, Array]:
  """Does the leaf keep nothing at all, `bool[]` by path, of the leaves of `kept`.

  Layer collapse (Tanaka et al. 2020, section 3): such a layer lets no signal and no gradient through, however dense the
  others are. A stack of layers in one leaf counts as one. `[path for path, none in collapsed(masks).items() if none]`.
  """
  return {path: ~jnp.any(mask) for path, mask in _prunable(tree).items()}


def _prunable(tree: PyTree) -> dict[str, Array]:
  """What is kept of the leaves that could be pruned."""
  paths, leaves, _ = trees.flatten(tree)
  picked = lambda path, leaf: leaf.ndim if leaf.dtype == bool else trees.matrices(path, leaf)
  return {path: leaf.astype(bool) for path, leaf in zip(paths, leaves) if jnp.ndim(leaf) and picked(path, leaf)}


def _pairs(function: str, a: PyTree, b: PyTree) -> list[tuple[str, Array, Array]]:
  """Path and both leaves. Raises `ValueError` for leaves of different shapes, which would broadcast."""
  paths, old, treedef = trees.flatten(a)
  pairs = list(zip(paths, old, treedef.flatten_up_to(b)))
  for path, x, y in pairs:
    if jnp.shape(x) != jnp.shape(y):
      raise errors.at_leaf(f'metrics.{function}', path, jnp.shape(x), f'the other tree has shape {jnp.shape(y)} there; '
                           'give two trees of one model.')
  return pairs


def sad(before: PyTree, after: PyTree) -> dict[str, Change]:
  """Sum of absolute mask differences, by path: `||after - before||_1`, raw and as a fraction of the leaf (flip rate).

  Zhou et al. 2021, section 3.2, give the raw count. Leaves of rank 0 (dense ones, in `sparsejax.masks`) are left out.
  """
  pairs = [pair for pair in _pairs('sad', before, after) if jnp.ndim(pair[1])]
  flips = {path: jnp.sum(a != b, dtype=jnp.float32) for path, a, b in pairs}
  return {path: Change(flips[path], flips[path] / a.size) for path, a, _ in pairs}


def overlap(a: PyTree, b: PyTree) -> dict[str, Overlap]:
  """How alike two trees of masks are, by path: what both keep, beside what chance would give.

  `count` is |A and B|. `chance` is |A| |B| / n, what two independent masks, uniformly random among those that keep as
  many of the n weights, have in common on average (the mean of the hypergeometric distribution; tickets are held
  against chance by Grosse & Backes 2020, arXiv 2006.07014). `ratio` is count / chance: 1 for unrelated masks, n / |A|
  for equal ones. `jaccard` is |A and B| / |A or B|, the standard index of similar sets (Jaccard 1912), which knows no
  chance. `ratio` is NaN if either keeps nothing, `jaccard` if both do. Leaves of rank 0 (dense ones, in
  `sparsejax.masks`) are left out.
  """
  return {path: _overlap(x, y) for path, x, y in _pairs('overlap', a, b) if jnp.ndim(x)}


def _overlap(a: Array, b: Array) -> Overlap:
  both, either, in_a, in_b = (jnp.sum(m, dtype=jnp.float32) for m in (a & b, a | b, a, b))
  chance = in_a * (in_b / a.size)
  return Overlap(both, chance, both / chance, both / either)


def union(seen: PyTree, masks: PyTree) -> PyTree:
  """The masks of what was kept at any time: `seen`, which begins as the first masks, and now `masks`."""
  return jax.tree.structure(seen).unflatten([a | b for _, a, b in _pairs('union', seen, masks)])


def itop_rate(seen: PyTree) -> Exploration:
  """In-time over-parametrisation rate R_s: the share of weights that were ever kept, of `union`'s masks.

  Liu et al. 2021, section 3 (arXiv 2102.02887): 1 if training has tried every weight, the density if masks never
  changed. Of all maskable weights together and of each leaf; leaves of rank 0 (dense ones, in `sparsejax.masks`) are
  left out of both. NaN where there are no weights.
  """
  counts, sizes = kept(seen), {path: jnp.float32(mask.size) for path, mask in _prunable(seen).items()}
  total = lambda numbers: sum(numbers.values(), jnp.float32(0))
  return Exploration(total(counts) / total(sizes), {path: counts[path] / sizes[path] for path in counts})


def gradient_variance(grads: PyTree, masks: PyTree) -> dict[str, Variance]:
  """Variance of the absolute gradient over kept and over pruned weights, by path, for leaves whose mask has a rank.

  The noise that progressive gradient flow (arXiv 2402.04744) sets out to lower at high sparsity; give it gradients
  before clipping.
  """
  paths, leaves, treedef = trees.flatten(grads)
  pairs = zip(paths, leaves, treedef.flatten_up_to(masks))
  return {path: Variance(_variance(jnp.abs(g), m), _variance(jnp.abs(g), ~m)) for path, g, m in pairs if jnp.ndim(m)}


def _variance(x: Array, among: Array) -> Array:
  x, count = x.astype(jnp.float32), jnp.sum(among, dtype=jnp.float32)
  mean = jnp.sum(jnp.where(among, x, 0)) / count
  return jnp.sum(jnp.where(among, jnp.square(x - mean), 0)) / count


def barrier(loss: Callable[[PyTree], Array], a: PyTree, b: PyTree, points: int = 11) -> Barrier:
  """The highest that `loss` rises above the chord on the straight line from parameters `a` to `b`.

  max over alpha of loss((1 - alpha) a + alpha b) - ((1 - alpha) loss(a) + alpha loss(b)), over `points` values of alpha
  evenly spaced from 0 to 1: at least 0, and 0 if `loss` is convex there. Linear mode connectivity (Frankle et al. 2020)
  is a barrier of about 0; they take away the mean of both ends' losses, this the chord (Entezari et al. 2022), which is
  the same between equal losses. The first of equal heights; NaN if any loss is, or if an end's is infinite.

  A weight is zero on the way only where it is zero in both: between different masks, models keep the union of what `a`
  and `b` keep, and are denser than either. Losses are taken one by one, in the memory of one more model.
  """
  if points < 2:
    raise ValueError(f'metrics.barrier: points={points}; the two ends alone are 2 points, and a barrier takes more.')
  pairs, structure = _pairs('barrier', a, b), jax.tree.structure(a)
  for path, x, _ in pairs:
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      raise errors.at_leaf('metrics.barrier', path, jnp.shape(x), f'dtype {jnp.result_type(x)} has no points between; '
                           'give only the parameters, and let `loss` hold the rest.')

  def between(alpha: Array) -> Array:
    value = loss(structure.unflatten([_between(alpha, jnp.asarray(x), jnp.asarray(y)) for _, x, y in pairs]))
    if jnp.ndim(value):
      raise ValueError(f'metrics.barrier: `loss` gives shape {jnp.shape(value)}; it must give a scalar.')
    return jnp.asarray(value).astype(jnp.float32)

  alphas = jnp.linspace(0, 1, points, dtype=jnp.float32)
  losses = jax.lax.map(between, alphas)
  heights = losses - ((1 - alphas) * losses[0] + alphas * losses[-1])
  at = jnp.argmax(heights)
  return Barrier(heights[at], alphas[at], losses)


def _between(alpha: Array, x: Array, y: Array) -> Array:
  wide = x.dtype if x.dtype.itemsize >= 4 else jnp.float32  # bfloat16 would round alpha to 8 bits
  alpha = alpha.astype(wide)
  return ((1 - alpha) * x.astype(wide) + alpha * y.astype(wide)).astype(x.dtype)


def flops(contractions: Any, densities: Mapping[str, Any] | None = None, *, input_gradient: str = 'sparse') -> Flops:
  """Operations in contractions, by `sparsejax.contractions`' multiply-adds and the densities of the parameters.

  A product with a parameter of density r costs r of its dense self forward, r for the gradient of its input
  (`input_gradient='dense'`: 1, where hardware cannot use the transposed pattern) and 1 for the gradient of the
  parameter, which dense-master methods need whole: training is (2 r + 1) / 3 of dense on that product, inference r.
  A mask that decays is dense until it is 0. Products of activations cost 1. A density stands for its parameter and for
  paths of which it is the tail; a parameter without one is dense. A product of two parameters counts for both. Where
  `contractions.unbounded` or `.unread` is not empty these are lower bounds.
  """
  if input_gradient not in ('sparse', 'dense'):
    raise ValueError(f"metrics.flops: input_gradient is 'sparse' or 'dense', not {input_gradient!r}.")
  other = contractions.other_macs
  inference = training = 0.0
  dense = sum(contractions.macs.values()) + other
  for path, macs in contractions.macs.items():
    found = trees.tails(path, densities or {})
    r = float(densities[found[0]]) if found else 1.0
    inference += macs * r
    training += macs * (r + (r if input_gradient == 'sparse' else 1.0) + 1.0)
  return Flops(2 * (inference + other), 2 * (training + 3 * other), 2.0 * dense, 6.0 * dense)
