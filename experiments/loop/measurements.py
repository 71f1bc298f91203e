"""What one training step is measured by, on the leaves that a run keeps sparse, inside the compiled step."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sparsejax import metrics, trees
from sparsejax.types import Array, PyTree


def sparse_paths(masks: PyTree, params: PyTree) -> list[str]:
  """Paths of the leaves that have a mask of their own: that of a dense leaf is a scalar."""
  names, leaves, treedef = trees.flatten(params)
  return [name for name, leaf, mask in zip(names, leaves, treedef.flatten_up_to(masks)) if mask.shape == leaf.shape]


def of_step(paths: list[str], grads: PyTree, params: PyTree, before: PyTree, after: PyTree) -> Mapping[str, Array]:
  """One update in numbers, over the leaves at `paths`. All are scalars but `densities`, which has one a path.

  `grads` are those that the update got, at the mask `before`; `params` and the mask `after` are what it left.
  `sparsity`: the fraction of weights that are zero. `flips`: the fraction of mask entries that changed. `noise_kept`
  and `noise_pruned`: the variance of |gradient| over the weights that the mask kept and pruned, the geometric mean of
  the leaves, which differ by orders of magnitude; NaN over none.
  """
  names = trees.flatten(params)[0]
  pick = lambda tree: {name: leaf for name, leaf in zip(names, jax.tree.leaves(tree)) if name in paths}
  weights = pick(params)
  whole = lambda masks: {path: jnp.broadcast_to(mask, weights[path].shape) for path, mask in pick(masks).items()}
  sizes = jnp.array([w.size for w in weights.values()], jnp.float32)
  densities = jnp.stack(list(metrics.density(weights).values()))
  variances = metrics.gradient_variance(pick(grads), whole(before)).values()
  together = lambda values: jnp.exp(jnp.log(jnp.stack(values)).mean())
  return {
      'sparsity': ((1 - densities) * sizes).sum() / sizes.sum(),
      'flips': sum(change.count for change in metrics.sad(whole(before), whole(after)).values()) / sizes.sum(),
      'noise_kept': together([v.kept for v in variances]),
      'noise_pruned': together([v.pruned for v in variances]),
      'densities': densities,
  }
