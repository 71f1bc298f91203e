"""Classifies the nodes of a graph after some of its edges were pruned: the nearest neighbours of the digits.

A run prunes edges by the degree score (`lowest`, as TEDDY does, or `highest` first) or at `random`, and weights by its
recipe. With `taught` above 0, a dense model on the full graph is trained first, and teaches the logits of all nodes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import neighbors

from experiments.models.graph import GraphConvolutions
from experiments.protocols.fitting import both_splits, chance, optimised, optimizer, right
from sparsejax import graphs
from sparsejax.types import Array, PyTree

SIZES = {'neighbours': 7, 'labelled': 5, 'width': 64, 'taught': 10.0}  # `labelled` nodes of each class
RUN = {'order': 'lowest', 'pruned': 0.0}
ORDERS = {'lowest': lambda score, key: score, 'highest': lambda score, key: -score,
          'random': lambda score, key: jax.random.uniform(key, score.shape)}


def graph(config: Any, neighbours: int) -> tuple[np.ndarray, np.ndarray, Array, Array]:
  """Returns features and labels of both splits, and the ends of the edges of the graph of nearest neighbours."""
  x, y = (np.concatenate(each) for each in zip(*both_splits(config)))
  matrix = neighbors.kneighbors_graph(x, neighbours)
  senders, receivers = np.nonzero(np.triu((matrix + matrix.T).toarray(), 1))
  return x, y, jnp.asarray(senders), jnp.asarray(receivers)


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy on the nodes without a label, and the fraction of edges that are kept."""
  x, y, senders, receivers = graph(config, sizes['neighbours'])
  key, rng = jax.random.key(seed), np.random.default_rng(seed)
  known = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:sizes['labelled']] for c in range(10)])
  order = ORDERS[own['order']](graphs.degree_score(senders, receivers, len(y)), key)
  mask = graphs.kept_edges(order, own['pruned'])
  model = GraphConvolutions(10, sizes['width'])
  kept = (senders[mask], receivers[mask])

  def trained(recipe: Mapping[str, Any], ends: Any, teacher: Array | None) -> Array:
    apply = lambda params: model.apply({'params': params}, x, *ends, graphs.normalised(*ends, len(y)))

    def loss(params: PyTree, batch: Array, key: Array, step: Array) -> Array:
      logits = apply(params)
      total = optax.softmax_cross_entropy_with_integer_labels(logits[known], y[known]).mean()
      if teacher is None:
        return total
      logs, wanted = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
      return total + sizes['taught'] * jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - logs), -1))

    first = model.init(key, x, *ends, graphs.normalised(*ends, len(y)))['params']
    params, _ = optimised(loss, optimizer(config, recipe), first, jnp.arange(len(y)), config, key)
    return apply(params)

  teacher = trained({'name': 'dense'}, (senders, receivers), None) if sizes['taught'] else None
  rest = np.setdiff1d(np.arange(len(y)), known)
  return {'score': right(trained(recipe, kept, teacher)[rest], y[rest]), 'chance': chance(y[rest]),
          'edges': float(jnp.mean(mask))}
