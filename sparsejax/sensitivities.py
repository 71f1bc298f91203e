"""Sensitivities say how much the loss of a model depends on each leaf, by forward passes alone.

    scores = sensitivities.zeroth_order(loss, params, batches, jax.random.key(0))
    recipe = recipes.ecoflap(scores, 0.7, most=0.8)
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments, progress, trees
from sparsejax.types import Array, Predicate, PyTree

__all__ = ['zeroth_order']


@arguments.checked
def zeroth_order(loss: Callable[[PyTree, Any], Array], params: PyTree, batches: Iterable[Any], key: Array, *,
                 eps: float = 1e-3, where: Predicate | PyTree = trees.matrices) -> dict[str, float]:
  """Returns `|L(W + eps z) - L(W - eps z)| / (2 eps)` of each leaf W by path, summed over batches.

  ECoFLaP (Sung et al. 2023, 2310.02998). `loss(params, batch)` is a scalar. `z` is a standard normal array
  like the leaf, drawn anew for each batch from `key`; all other leaves stay as they are. The cost is two forward passes
  for each leaf and batch. `where`: the leaves. The number grows with the root of the size of the leaf.

  Deviation: leaves are perturbed in `float32`, in a copy, where the authors' code adds the perturbation to the leaf
  and takes it back. Raises `ValueError` without a batch, and for a loss that is not finite or not a scalar.
  """
  arguments.verified('sensitivities.zeroth_order', 'eps', eps)
  arguments.verified('sensitivities.zeroth_order', 'key', key)
  paths, leaves, treedef = trees.flatten(params)
  picked = [i for i, pick in enumerate(trees.select('sensitivities.zeroth_order', where, params)) if pick]
  found, run = dict.fromkeys((paths[i] for i in picked), 0.0), jax.jit(loss)
  batch_number = -1
  for batch_number, batch in enumerate(batches):
    for i in progress.counted(f'sensitivities, batch {batch_number + 1}:', picked, paths.__getitem__):
      own = jax.random.fold_in(jax.random.fold_in(key, batch_number), i)
      moved = [[*leaves[:i], _moved(leaves[i], own, step), *leaves[i + 1:]] for step in (eps, -eps)]
      up, down = (_number(paths[i], run(treedef.unflatten(each), batch)) for each in moved)
      found[paths[i]] += abs(up - down) / (2 * eps)
  if batch_number < 0:
    raise ValueError('sensitivities.zeroth_order: there is no batch; give at least one.')
  return found


@jax.jit
def _moved(w: Array, key: Array, step: Any) -> Array:
  return (w.astype(jnp.float32) + step * jax.random.normal(key, w.shape, jnp.float32)).astype(w.dtype)


def _number(path: str, loss: Array) -> float:
  if jnp.ndim(loss) or not math.isfinite(loss):
    raise ValueError(f'sensitivities.zeroth_order: the loss around {path!r} is {loss}; it must be a finite scalar.')
  return float(loss)
