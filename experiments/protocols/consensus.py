"""Trains the perceptron of the digits with gates that are to agree on half of the hidden units, which then go.

A linear module on the input of each layer gives the logits of the layer's units. The penalty of `gates.polarized` makes
all images choose the same units, and the asked share of them. After training, the units with a mean gate above one half
over the training images stay, and `structured.cut` removes all others and the gates.

The score is the accuracy of the smaller network. Beside it stands `gated`, the accuracy of the network in which each
image has its own gates. `settled` is the fraction of units that at least 95 % of the images open, or close. `open` is
the fraction of units that stay, and `work` the FLOPs of the compiled network over those before. Without `gated` the
same network is trained without gates, with `part` of the units.

No code of the paper (consensus sub-networks by polarization) could be read. The network and the sizes are ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models.perceptron import forward, start
from experiments.protocols.fitting import both_splits, chance, optimised, optimizer, right, work
from sparsejax import gates, structured
from sparsejax.types import Array, PyTree

SIZES = {'width': 100, 'target': 0.5, 'activation': 100.0}
RUN = {'gated': True, 'polarization': 1.0, 'part': 1.0}
GATE = gates.bernoulli('straight_through')


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy of the network that is left, and of gated networks what the gates agreed on."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  net = start(seed, max(round(own['part'] * sizes['width']), 1))
  first = {'net': net, 'gates': _gates(key, net) if own['gated'] else {}}

  def loss(both: PyTree, batch: Any, key: Array, step: Array) -> Array:
    logits, opened = gated_forward(both['net'], batch[0], both['gates'])
    task = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    if not own['gated']:
      return task
    return task + gates.polarized(jnp.concatenate(opened, -1), sizes['target'], polarization=own['polarization'],
                                  activation=sizes['activation'])

  both, _ = optimised(loss, optimizer(config, recipe, {'key': key}), first, train, config, key)
  if not own['gated']:
    return {'score': right(forward(both['net'], test[0]), test[1]), 'chance': chance(test[1])}
  means = [jnp.mean(each, 0) for each in gated_forward(both['net'], train[0], both['gates'])[1]]
  small = _removed(both['net'], means, test[0])
  every = np.concatenate(means)
  return {'score': right(small.apply(small.params, test[0]), test[1]), 'chance': chance(test[1]),
          'gated': right(gated_forward(both['net'], test[0], both['gates'])[0], test[1]),
          'settled': float(np.mean(np.minimum(every, 1 - every) <= 0.05)), 'open': float(np.mean(every > 0.5)),
          'work': work(small.apply, small.params, test[0]) / work(forward, both['net'], test[0])}


def gated_forward(net: PyTree, x: Array, modules: PyTree) -> tuple[Array, list[Array]]:
  """Returns the logits of images `[N, 64]`, and the gates `[N, units]` of each hidden layer that has modules."""
  opened: list[Array] = []
  for name in sorted(net):
    own, given = modules.get(name), x
    x = x @ net[name]['kernel'] + net[name]['bias']
    x = x if name == max(net) else jax.nn.relu(x)
    if own is not None:
      opened.append(GATE(given @ own['kernel'] + own['bias'], None, 0).weights)
      x = x * opened[-1]
  return x, opened


def _gates(key: Array, net: PyTree) -> PyTree:
  """Returns the initial parameters of the gates of all layers but the last, which open most units."""
  init = jax.nn.initializers.lecun_normal()
  return {name: {'kernel': init(jax.random.fold_in(key, number), layer['kernel'].shape),
                 'bias': jnp.full_like(layer['bias'], 0.5)}
          for number, (name, layer) in enumerate(sorted(net.items())) if name != max(net)}


def _removed(net: PyTree, means: list[Array], x: Array) -> structured.Cut:
  """Returns the network without the units whose mean gate is at most one half; each layer keeps its best unit."""
  groups, keep = structured.groups(forward, net, x), {}
  for layer, mean in enumerate(means):
    name, = (name for name in groups if name.startswith(f'layer_{layer}/'))
    keep[name] = np.asarray((mean > 0.5) | (jnp.arange(len(mean)) == jnp.argmax(mean)))
  return structured.cut(groups, net, keep)
