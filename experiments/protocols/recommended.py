"""Recommends films by two tables of embeddings, which are sparse: matrix factorisation of MovieLens-100K.

The score is recall@k over what each user liked last, or with `measure` `ndcg`. Both stand beside it, and so does the
fraction of weights that are kept. Chance is the same list for all users: the films that most users liked.

The loss is that of BPR (Rendle et al. 2009, 1205.2618): a film that the user liked is above one that is drawn at
random. A drawn film that the user liked too counts nothing.

Deviations: Wang et al. 2024 (2402.02855) train LightGCN, NeuMF and MultVAE on larger sets, and keep the best epoch on
the test set. The last step is tested here, and the films of a user are parted in time.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data import movielens
from experiments.protocols.fitting import optimised, optimizer, splits
from sparsejax import metrics
from sparsejax.types import Array, PyTree

SIZES = {'width': 64, 'k': 20, 'deviation': 0.1}  # the deviation of the first embeddings
RUN = {'width': None, 'measure': 'recall'}  # None: that of the sizes


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the score, chance, recall and ndcg over all users with a truth, and the fraction of weights that are kept.
  """
  ((train, _), (test, _)), key = splits(config), jax.random.key(seed)
  shape = movielens.counts(train, test)
  seen, truth = (jnp.asarray(movielens.table(pairs, shape)) for pairs in (train, test))
  first = tables(key, seen.shape, own['width'] or sizes['width'], sizes['deviation'])

  def loss(params: PyTree, batch: Any, key: Array, step: Array) -> Array:
    users, items = batch.T
    others = jax.random.randint(key, items.shape, 0, seen.shape[1])
    rows = params['users']['embedding'][users]
    of = lambda films: jnp.sum(rows * params['items']['embedding'][films], -1)
    return jnp.mean(jnp.where(seen[users, others], 0, jax.nn.softplus(of(others) - of(items))))

  params, _ = optimised(loss, optimizer(config, recipe, {'key': key}), first, jnp.asarray(train), config, key)
  told = truth.any(1)
  asked = seen[told], truth[told]
  measures = {'recall': metrics.recall_at, 'ndcg': metrics.ndcg_at}
  judge = lambda table: {name: measure(table, *asked, sizes['k']) for name, measure in measures.items()}
  found = judge(params['users']['embedding'][told] @ params['items']['embedding'].T)
  often = jnp.broadcast_to(jnp.sum(seen, 0, dtype=jnp.float32), (int(told.sum()), seen.shape[1]))
  return {'score': found[own['measure']], 'chance': judge(often)[own['measure']], **found, 'kept': _kept(params)}


def tables(key: Array, counts: tuple[int, ...], width: int, deviation: float) -> PyTree:
  """Returns random embeddings of users and of items."""
  draw = lambda key, rows: deviation * jax.random.normal(key, (rows, width))
  return {name: {'embedding': draw(*each)} for name, *each in zip(
      ('users', 'items'), jax.random.split(key), counts)}


def _kept(params: PyTree) -> float:
  density = metrics.density(params)
  sizes = {f'{name}/embedding': leaf['embedding'].size for name, leaf in params.items()}
  return float(sum(density[path] * size for path, size in sizes.items()) / sum(sizes.values()))
