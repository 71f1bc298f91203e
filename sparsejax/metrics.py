"""Metrics: what can be said of a sparse model in numbers. Pure functions, by path, all but `flops` fit for `jit`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax import trees
from sparsejax.types import Array, PyTree


class Change(NamedTuple):
  """`count`: mask entries that differ, float32 (int32 would overflow). `fraction`: of all entries."""

  count: Array
  fraction: Array


class Variance(NamedTuple):
  """Var(|g|) over the kept and over the pruned weights of one leaf, float32; NaN over none."""

  kept: Array
  pruned: Array


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


def sad(before: PyTree, after: PyTree) -> dict[str, Change]:
  """Sum of absolute mask differences, by path: `||after - before||_1`, raw and as a fraction of the leaf (flip rate).

  Zhou et al. 2021, section 3.2, give the raw count. Leaves of rank 0 (dense ones, in `sparsejax.masks`) are left out.
  """
  paths, old, treedef = trees.flatten(before)
  new = treedef.flatten_up_to(after)
  flips = {path: jnp.sum(a != b, dtype=jnp.float32) for path, a, b in zip(paths, old, new) if jnp.ndim(a)}
  sizes = {path: a.size for path, a in zip(paths, old)}
  return {path: Change(count, count / sizes[path]) for path, count in flips.items()}


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
