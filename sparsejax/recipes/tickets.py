"""Tickets: sparse networks found in trained ones, and averages of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import errors, flows, schedules, scores, selections, starts, transforms, trees, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import Shares, fixed
from sparsejax.types import Pattern, Predicate, PyTree, Schedule

Optimizer = optax.GradientTransformationExtraArgs


def iterative_magnitude(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    ticket: PyTree | None = None, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """One round of IMP: trains under the mask of the largest magnitudes of `ticket`, trained parameters.

  Frankle and Carbin 2019, 1803.03635, section 2; Renda et al. 2020, 2003.02389. What `init` and `update` get are the
  weights to train: those of an early step for weight rewinding, `ticket` itself (the default) for learning-rate
  rewinding. A weight that is zero in `ticket` is pruned again. Ranked over all leaves, exactly; the authors' code
  keeps what ties at an interpolated percentile.
  """
  start = starts.probed(starts.of(ticket)) if ticket is not None else None
  score = scores.magnitude if ticket is None else scores.gradient
  return fixed(inner, pattern, sparsity, allocation, score, start, **options)


def lottery_jackpot(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    restriction: Schedule | None = None, total_steps: int | None = None, where: Predicate | PyTree | None = None,
    axes: Any = None, **options: Any) -> Optimizer:
  """Lottery jackpots: searches masks of pretrained weights, which are fixed (Zhang et al. 2023, 2104.08700).

  `inner` trains a score of each weight, 1 where the magnitude mask keeps it and 0.99 elsewhere, by w dL/dw'; everything
  else is frozen too. `restriction`: which part of the changes is made, by the step; default (1 - step / total_steps)^4,
  what the released code seems to mean (there it is 1 throughout). With `total_steps` and `restriction` left out, or
  another pattern than unstructured, all changes are made.
  """
  short = restriction or (total_steps and schedules.polynomial(power=4, end=total_steps))
  if short and not isinstance(pattern, Unstructured):
    if restriction:
      raise ValueError(f'recipes.lottery_jackpot: the restriction counts changes in a leaf, and {pattern} in a unit of '
                       'it; leave out restriction=, or search unstructured masks.')
    short = None
  selection = selections.leafwise(pattern, score=scores.value, first=scores.magnitude, sparsity=sparsity,
                                  update=updates.swap(short) if short else updates.reselect)
  picked = {'where': where, 'axes': axes}
  weights = selection._replace(stat=lambda w: jnp.array(w, copy=True), observe=lambda stat, w, signals: stat)
  return transforms.sparsify(optax.chain(inner, transforms.only(**picked)), flows.searched(), weights,
                             total_steps=total_steps, **picked, **options)


def model_soup(members: Sequence[PyTree], weights: Sequence[float] | None = None) -> PyTree:
  """The average of models that were retrained from one pruned model (Zimmer et al. 2023, Sparse Model Soups).

  2306.16788, algorithm 1. `weights` sum to 1, default equal. A weight is zero where it is in all members, so the soup
  is as sparse as they are. Averages floating leaves in float32 and takes others from the last member. Statistics of
  batch norm are averaged too and want to be recomputed. Raises `ValueError` if members do not have the same zeros:
  their average would be less sparse.
  """
  if not members:
    raise ValueError('recipes.model_soup: there are no members to average.')
  weights = [1 / len(members)] * len(members) if weights is None else list(weights)
  if len(weights) != len(members) or abs(sum(weights) - 1) > 1e-6:
    raise ValueError(f'recipes.model_soup: weights={weights} are to be one for each of {len(members)} members and sum '
                     'to 1.')
  paths, first, treedef = trees.flatten(members[0])
  columns = zip(*(treedef.flatten_up_to(member) for member in members))
  soup = []
  for path, leaves in zip(paths, columns):
    if trees.matrices(path, leaves[0]):
      _refuse_other_zeros(path, leaves)
    dtype = leaves[0].dtype
    if jnp.issubdtype(dtype, jnp.floating):
      soup.append(sum(a * leaf.astype(jnp.float32) for a, leaf in zip(weights, leaves)).astype(dtype))
    else:
      soup.append(leaves[-1])
  return treedef.unflatten(soup)


def _refuse_other_zeros(path: str, leaves: Sequence[Any]) -> None:
  zeros = [leaf == 0 for leaf in leaves]
  if any(isinstance(zero, jax.core.Tracer) for zero in zeros):
    return
  for i, other in enumerate(zeros[1:], 1):
    if (odd := int(np.sum(np.asarray(zeros[0] != other)))) > 0:
      raise errors.at_leaf('recipes.model_soup', path, leaves[0].shape, f'members 0 and {i} differ in {odd} zeros, so '
                           'that their average is less sparse. Retrain all of them from one pruned model.')
