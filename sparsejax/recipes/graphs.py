"""Has the sentences for graph neural networks. The edges are ranked by `graphs.degree_score`, and the weights here.

    mask = graphs.kept_edges(graphs.degree_score(senders, receivers, nodes), 0.3)
    tx = recipes.teddy(optax.chain(optax.add_decayed_weights(5e-4), optax.adam(0.01)), 0.8)
"""

from typing import Any

from sparsejax import flows, selections, transforms
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import together
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Array, Inner, Optimizer, Pattern, Predicate, PyTree


@sentence('refresh', 'allow_empty')
def teddy(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.8), *,
          where: Predicate | PyTree | None = None, **options: Any) -> Optimizer:
  """Sets the smallest magnitudes of all parameters together to zero after every step: TEDDY (Seo et al. 2024).

  2402.01261: projected gradient on the l0 ball, which is iterative hard thresholding. The gradient stays dense and
  the optimizer's slots are not masked, so that a zero may return. Biases count too, by the default of `where` without
  `axes`, and a layer may be emptied. The paper trains so on the graph whose edges `graphs.kept_edges` left, with a
  distillation from the dense model on the full graph. The authors' code rounds the count of zeros up; here it is
  rounded half to even. Raises `ValueError` for a sparsity of 1.
  """
  if (getattr(pattern, 'sparsity', None) if sparsity is None else sparsity) == 1:
    raise ValueError('recipes.teddy: a sparsity of 1 leaves no parameter of the model; ask for less than 1.')
  selection = selections.leafwise(pattern, sparsity=sparsity, allocation=together(pattern))
  where = _every if where is None and options.get('axes') is None else where
  return transforms.sparsify(inner, flows.soft_shrink(0.0), selection, where=where, allow_empty=True, **options)


def _every(path: str, leaf: Array) -> bool:
  return True
