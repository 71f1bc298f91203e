"""Searches networks whose operations are sparse: the masks and the mixture of operations are trained in turn.

    tx = sj.recipes.dass(optax.sgd(0.1), 0.9, total_steps=9_000)
    grads = sj.structured.architecture.bilevel(loss, params, train, valid, trees.named('alpha'))
    updates, state = tx.update(grads, state, params)
"""

from typing import Any

import jax
import optax

from sparsejax import allocation as allocations
from sparsejax import errors, flows, scores, selections, transforms, trees
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import Shares
from sparsejax.recipes.gradual import end_of
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Bound, Inner, Optimizer, Pattern, Predicate, PyTree

ALPHA, WEIGHTS = 'alpha', 'weights'


@sentence('refresh')
def dass(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
         alphas: Predicate | None = None, alpha_optimizer: Inner = optax.adam(3e-4, b1=0.5),
         score_optimizer: optax.GradientTransformation = optax.adam(1e-2), allocation: Shares = allocations.uniform,
         dense_steps: int | None = None, fine_tune_steps: int | None = None, total_steps: int | None = None,
         where: Predicate | PyTree | None = None, axes: Any = None, **options: Any) -> Optimizer:
  """Searches an architecture among sparse operations in three phases: DASS (Mousavi et al. 2023).

  The weights are trained densely for `dense_steps`. Then they rest, and scores S of the weights are trained by
  w dL/dw': the largest S are kept, at the full sparsity from the first step on. In the last `fine_tune_steps` the masks
  rest, and the kept weights are trained. Each phase is a third of `total_steps` by default. `inner` sees no update of
  the second phase. S begins at |w| over the largest |w| of the leaf.

  `alphas(path, leaf)` picks the weights of the mixtures, see `structured.architecture.mixed`, by default each leaf with
  the name `alpha`. `alpha_optimizer` trains them in all phases; the default has the constants of DARTS, without its
  weight decay. Give `update` the gradients of `architecture.bilevel`. The phases are those of the paper, of which no
  code was found. The constants of the scores are ours. Raises `ValueError` where there is no such leaf.
  """
  total = end_of('dass', None, total_steps, 1.0, 0, {})
  dense, tuned = (total // 3 if steps is None else steps for steps in (dense_steps, fine_tune_steps))
  own = optax.partition({
      WEIGHTS: transforms.resting(inner, dense, total - tuned), ALPHA: alpha_optimizer}, Bound(_labels, (alphas,)))
  selection = selections.leafwise(pattern, score=scores.movement, sparsity=sparsity, allocation=allocation)
  return transforms.sparsify(
      own, flows.remembered(), selection, memory=scores.accumulated_movement(score_optimizer, since=dense),
      where=Bound(_no_alpha, (trees.default_where(axes), alphas)) if where is None else where, axes=axes,
      dense_steps=dense, fine_tune_steps=tuned, total_steps=total, **options)


def _is_alpha(path: str, leaf: Any, alphas: Predicate | None) -> bool:
  return path.rpartition('/')[2] == ALPHA if alphas is None else bool(alphas(path, leaf))


def _no_alpha(path: str, leaf: Any, where: Predicate, alphas: Predicate | None) -> bool:
  return bool(where(path, leaf)) and not _is_alpha(path, leaf, alphas)


def _labels(params: PyTree, alphas: Predicate | None) -> PyTree:
  """Returns the optimizer of each leaf."""
  paths, leaves, treedef = trees.flatten(params)
  picked = [_is_alpha(path, leaf, alphas) for path, leaf in zip(paths, leaves)]
  if paths and not any(picked):  # `optax.tree.map_params` asks with a tree without leaves
    none = f'no leaf has the name {ALPHA!r}' if alphas is None else '`alphas` picks no leaf'
    raise ValueError(f'recipes.dass: {none} among {errors.some(paths)}, and so there is no mixture to search; name the '
                     'weights of the mixtures, as in alphas=trees.named("*/mixture").')
  return jax.tree.unflatten(treedef, [ALPHA if pick else WEIGHTS for pick in picked])
