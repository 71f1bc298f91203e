"""Measures one training step inside the compiled step, on the leaves that a run keeps sparse."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

import sparsejax
from experiments.loop.checkpoints import State
from sparsejax import metrics, trees
from sparsejax.types import Array, PyTree


def sparse_paths(masks: PyTree, params: PyTree) -> list[str]:
  """Returns the paths of the leaves that have a mask of their own: the mask of a dense leaf is a scalar."""
  names, leaves, treedef = trees.flatten(params)
  return [name for name, leaf, mask in zip(names, leaves, treedef.flatten_up_to(masks)) if mask.shape == leaf.shape]


def noisy_paths(globs: Sequence[str] | None, params: PyTree, sparse: Sequence[str]) -> list[str]:
  """Returns the paths of the leaves whose gradient noise is measured: all that match `globs`, or else `sparse`."""
  if globs is None:
    return list(sparse)
  names, picked = trees.flatten(params)[0], trees.select('config: noise', trees.named(*globs), params)
  return [name for name, pick in zip(names, picked) if pick]


def of_step(paths: Sequence[str], grads: PyTree, before: State, after: State) -> Mapping[str, Array]:
  """Returns what one update did to the leaves at `paths`: scalars, and `densities`, `[paths]`.

  `grads` are the gradients that the update received, at the parameters of `before`. `noise` has the other numbers.

  - `sparsity`: the fraction of weights that are zero after the update.
  - `flips`: the fraction of mask entries that the update changed.
  - `left`: the mean magnitude of the weights that the mask prunes over that of the weights that it keeps. While a mask
    decays the ratio falls, and it is 0 once the model is sparse. Without a pruned weight it is NaN.
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
      'left': _mean_magnitude(weights, masks_after, kept=False) / _mean_magnitude(weights, masks_after, kept=True),
      'noise_kept': _geometric_mean([v.kept for v in variances]),
      'noise_pruned': _geometric_mean([v.pruned for v in variances]),
      'densities': densities,
  }


def _mean_magnitude(weights: Mapping[str, Array], masks: Mapping[str, Array], *, kept: bool) -> Array:
  """Returns the mean of |w| over all weights whose mask entry is `kept`, NaN if there is none."""
  chosen = {path: masks[path] == kept for path in weights}
  total = sum(jnp.abs(w.astype(jnp.float32)).sum(where=chosen[path]) for path, w in weights.items())
  return total / sum(picked.sum() for picked in chosen.values())


def noise(paths: Sequence[str], grads: PyTree, before: State, after: State, b1: float) -> Mapping[str, Array]:
  """Returns the gradient noise of one update as progressive gradient flow (arXiv 2402.04744) measures the noise.

  Each number is the geometric mean over the leaves at `paths` of a variance over all weights of the leaf.

  - `noise`: the variance of |gradient|, at the sparse weights, before the recipe and the optimizer change the gradient.
  - `noise_received`: the same of the gradient that Adam received, which contains the recipe's rule for pruned weights,
    its decay term, and clipping. The gradient is recovered from Adam's first moment, whose decay rate is `b1`.
  - `second_moment`: the variance of Adam's second moment.

  The last two are left out where the optimizer is not Adam. The paper's plots are running averages over 40 records.
  """
  pick = lambda tree: {name: leaf for name, leaf in zip(trees.flatten(tree)[0], jax.tree.leaves(tree)) if name in paths}
  variance = lambda leaves: _geometric_mean([jnp.var(leaf.astype(jnp.float32)) for leaf in leaves.values()])
  numbers = {'noise': variance(jax.tree.map(jnp.abs, pick(grads)))}
  old, new = (_adam(state.opt_state, paths) for state in (before, after))
  if new is None:
    return numbers
  received = jax.tree.map(lambda m, n: jnp.abs(n - b1 * m) / (1 - b1), pick(old.mu), pick(new.mu))
  return {**numbers, 'noise_received': variance(received), 'second_moment': variance(pick(new.nu))}


def _adam(opt_state: PyTree, paths: Sequence[str]) -> optax.ScaleByAdamState | None:
  """Returns the first state of Adam in `opt_state` that has moments of all leaves at `paths`."""
  is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
  states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node)]
  return next((state for state in states if set(paths) <= set(trees.flatten(state.mu)[0])), None)


def _geometric_mean(values: Sequence[Array]) -> Array:
  return jnp.exp(jnp.log(jnp.stack(values)).mean())
