"""Searches the operations of a small convolutional network: sparse ones, or dense ones that are pruned afterwards.

Each cell is a mixture of four operations: a 3 x 3 and a 1 x 1 convolution, the maximum of 3 x 3 places, and its input.
The weights of the mixtures learn from one half of each batch, and all else from the other half. After `config.steps`
steps each cell keeps its sharpest operation. The remaining network trains for `tuned` more steps under one mask of
`sparsity`. With `sparse` the recipe of the run has made the mask while it searched. Otherwise the mask is that of the
largest magnitudes after a dense search.

The score is the accuracy of the remaining network. Beside the score stand `convolutions`, the number of cells that kept
one, and `kept`, the number of kept weights of all cells. `searched` is the accuracy of the mixtures.

No code of DASS (Mousavi et al. 2023) was found. The network and the sizes are ours.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from experiments import configs
from experiments.protocols.fitting import both_splits, chance, optimised, optimizer, right
from sparsejax import trees
from sparsejax.structured import architecture
from sparsejax.types import Array, PyTree

SIZES = {'width': 16, 'cells': 2, 'tuned': 400, 'sparsity': 0.9}
RUN = {'sparse': True}
OPERATIONS = {'wide': 3, 'narrow': 1, 'maximum': None, 'input': None}  # by name, and the sides of kernels
CELLS = 'cell_*/*/kernel'


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy of the network of sharpest operations, and what it is made of."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  tx = _search(config, recipe, own['sparse'], sizes['sparsity'], key)
  params, state = optimised(_halves, tx, network_start(key, sizes['width'], sizes['cells']), train, config, key)
  mixtures = right(network(params, test[0]), test[1])
  masks = sj.masks(params, state) if own['sparse'] else jax.tree.map(lambda _: jnp.ones((), bool), params)
  chosen = {name: [*OPERATIONS][int(architecture.sharpest(cell['alpha']))] for name, cell in _cells(params).items()}
  params, masks = (_only(each, chosen) for each in (params, masks))
  if not own['sparse'] and any(trees.named(CELLS)(path, None) for path in trees.flatten(params)[0]):
    masks = sj.prune_weights(params, sj.Unstructured(sizes['sparsity']), where=trees.named(CELLS)).masks
  longer = configs.merged(config, {'steps': sizes['tuned']})
  tuned = sj.recipes.fixed(optimizer(longer, {'name': 'dense'}), masks)
  run = functools.partial(network, chosen=chosen)
  params, _ = optimised(functools.partial(_cross_entropy, run), tuned, params, train, longer, key)
  counted = [mask for path, mask in zip(*trees.flatten(masks)[:2]) if trees.named(CELLS)(path, mask)]
  return {'score': right(run(params, test[0]), test[1]), 'chance': chance(test[1]), 'searched': mixtures,
          'convolutions': sum(OPERATIONS[name] is not None for name in chosen.values()),
          'kept': sum(int(jnp.sum(mask)) for mask in counted)}


def network_start(key: Array, width: int, cells: int) -> PyTree:
  """Returns the initial parameters of a convolution, of the cells, and of the head."""
  init = jax.nn.initializers.he_normal()
  kernel = lambda number, *shape: {'kernel': init(jax.random.fold_in(key, number), shape)}
  made = {f'cell_{i}': {'alpha': jnp.zeros(len(OPERATIONS)), **{
      name: kernel(10 * i + side, side, side, width, width) for name, side in OPERATIONS.items() if side}}
      for i in range(cells)}
  return {'stem': kernel(1001, 3, 3, 1, width), **made, 'head': kernel(1002, width, 10)}


def network(params: PyTree, x: Array, chosen: Mapping[str, str] | None = None) -> Array:
  """Returns the logits of images `[N, 64]`, of the mixtures, or with the `chosen` operation of each cell alone."""
  x = jax.nn.relu(_convolved(x.reshape(-1, 8, 8, 1), params['stem']['kernel']))
  for name, cell in _cells(params).items():
    x = _normed(x)
    if chosen is None:
      x = architecture.mixed([functools.partial(_applied, cell, each) for each in OPERATIONS], cell['alpha'], x)
    else:
      x = _applied(cell, chosen[name], x)
  return _normed(x).mean((1, 2)) @ params['head']['kernel']


def _cells(params: PyTree) -> dict[str, Any]:
  return {name: params[name] for name in sorted(params) if name.startswith('cell_')}


def _applied(cell: PyTree, name: str, x: Array) -> Array:
  if name == 'input':
    return x
  if name == 'maximum':
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), 'SAME')
  return jax.nn.relu(_convolved(x, cell[name]['kernel']))


def _convolved(x: Array, kernel: Array) -> Array:
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _normed(x: Array) -> Array:
  """Returns `x` with mean 0 and variance 1 over places and channels, so that operations of any gain train alike."""
  return (x - x.mean((1, 2, 3), keepdims=True)) * jax.lax.rsqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)


def _only(tree: PyTree, chosen: Mapping[str, str]) -> PyTree:
  """Returns a tree like the parameters without the operations that were not chosen, and without alphas."""
  kept = lambda cell, name: {name: cell[name]} if OPERATIONS[name] else {}
  return {name: kept(part, chosen[name]) if name in chosen else part for name, part in tree.items()}


def _search(config: Any, recipe: Mapping[str, Any], sparse: bool, sparsity: float, key: Array) -> Any:
  """Returns the optimizer of the search, which trains the weights of the mixtures as DARTS does."""
  alphas = optax.adam(3e-4, b1=0.5)
  if sparse:
    own = {**recipe, 'sparsity': sparsity, 'where': [CELLS]}
    return optimizer(config, own, {'key': key, 'alpha_optimizer': alphas})
  labels = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == 'alpha', params)
  return optax.partition({True: alphas, False: optimizer(config, recipe, {'key': key})}, labels)


def _cross_entropy(run: Any, params: PyTree, batch: Sequence[Array], key: Array, step: Array) -> Array:
  return optax.softmax_cross_entropy_with_integer_labels(run(params, batch[0]), batch[1]).mean()


def _halves(params: PyTree, batch: Sequence[Array], key: Array, step: Array) -> Array:
  """Returns a loss with the gradients of `architecture.bilevel`: alphas learn from the second half of the batch."""
  def held(alphas: bool) -> PyTree:
    stop = lambda path, leaf: jax.lax.stop_gradient(leaf) if (path[-1].key == 'alpha') == alphas else leaf
    return jax.tree.map_with_path(stop, params)

  half = len(batch[0]) // 2
  parts = [batch[0][:half], batch[1][:half]], [batch[0][half:], batch[1][half:]]
  return sum(_cross_entropy(network, held(alphas), part, key, step) for alphas, part in zip((True, False), parts))
