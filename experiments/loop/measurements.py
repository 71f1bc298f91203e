"""Measures one training step inside the compiled step, on the leaves that a run keeps sparse."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

import sparsejax
from experiments.loop.checkpoints import State
from sparsejax import metrics, trees
from sparsejax.types import Array, PyTree


def sparse_paths(masks: PyTree, params: PyTree) -> list[str]:
  """Returns the paths of the leaves that have a mask of their own: the mask of a dense leaf is a scalar."""
  names, leaves, treedef = trees.flatten(params)
  return [name for name, leaf, mask in zip(names, leaves, treedef.flatten_up_to(masks)) if mask.shape == leaf.shape]


def of_step(paths: Sequence[str], grads: PyTree, before: State, after: State) -> Mapping[str, Array]:
  """Returns what one update did to the leaves at `paths`: scalars, and `densities`, `[paths]`.

  `grads` are the gradients that the update received, at the parameters of `before`.

  - `sparsity`: the fraction of weights that are zero after the update.
  - `flips`: the fraction of mask entries that the update changed.
  - `noise_kept`, `noise_pruned`: the variance of |gradient| over the weights that the mask of `before` kept and pruned.
    The leaves' variances differ by orders of magnitude, so their geometric mean is taken. Over no weights it is NaN.
  """
  names = trees.flatten(after.params)[0]
  pick = lambda tree: {name: leaf for name, leaf in zip(names, jax.tree.leaves(tree)) if name in paths}
  weights = pick(after.params)
  masks_before, masks_after = (
      {path: jnp.broadcast_to(mask, weights[path].shape) for path, mask in pick(sparsejax.masks(*state)).items()}
      for state in (before, after))
  sizes = jnp.array([w.size for w in weights.values()], jnp.float32)
  densities = jnp.stack(list(metrics.density(weights).values()))
  variances = metrics.gradient_variance(pick(grads), masks_before).values()
  flips = sum(change.count for change in metrics.sad(masks_before, masks_after).values())
  return {
      'sparsity': ((1 - densities) * sizes).sum() / sizes.sum(),
      'flips': flips / sizes.sum(),
      'noise_kept': _geometric_mean([v.kept for v in variances]),
      'noise_pruned': _geometric_mean([v.pruned for v in variances]),
      'densities': densities,
  }


def _geometric_mean(values: Sequence[Array]) -> Array:
  return jnp.exp(jnp.log(jnp.stack(values)).mean())
