"""Trains a mixture of experts on the digits, and answers requests with experts that are read from nested bits.

A request is `request` test images. `bits` is the number of planes that are read of each expert with images in the
request, on average over these experts. Without `bits` the experts stay as they were trained. With `by_load` the planes
are given one by one to the expert of the largest load times its squared error, which a plane quarters.

The score is the accuracy, and beside it stand `bytes`, those read for a request, and `active`, its experts.

D2MoE (Wang et al. 2025, 2504.15299) trains a router that chooses bits for each token and expert; here the load alone
does. Its queues and its device are not modelled.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.protocols import experts
from experiments.protocols.fitting import both_splits, chance, right
from sparsejax import moe
from sparsejax.types import Array, PyTree

SIZES = {**experts.SIZES, 'k': 2, 'slack': 4.0, 'request': 30}
RUN = {'bits': None, 'by_load': False}
MOST = 8  # bits of a whole weight


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy on the test images, and the mean bytes and experts of a request."""
  (train, (x, labels)), key = both_splits(config), jax.random.key(seed)
  params = experts.trained_mixture(config, sizes, experts.RUN, recipe, train, key)
  gate = experts.gate_of('top_k', sizes, config.steps)
  answer = jax.jit(lambda params, x: experts.answers(params, x, gate, experts.RUN, sizes, None, 0)[0])
  stores = {name: moe.nested(params[name]['kernel']) for name in ('up', 'down')}
  planes = {name: jnp.stack([store.at(bits) for bits in range(1, MOST + 1)]) for name, store in stores.items()}
  answers, told = [], []
  for images in np.array_split(x, max(len(x) // sizes['request'], 1)):
    loads = np.asarray(jnp.sum(gate(images @ params['gate']['kernel'], None, 0).weights != 0, 0))
    bits = given_bits(loads, own['bits'] or MOST, own['by_load'])
    answers.append(answer(_read(params, planes, bits) if own['bits'] else params, images))
    one = {bits: sum(store.nbytes(bits) for store in stores.values()) for bits in range(1, MOST + 1)}
    whole = sum(params[name]['kernel'][0].nbytes for name in stores)
    told.append((sum(one[b] if own['bits'] else whole for b in bits.tolist() if b), np.count_nonzero(loads)))
  read, active = np.mean(told, 0)
  return {'score': right(jnp.concatenate(answers), labels), 'chance': chance(labels), 'bytes': read, 'active': active}


def given_bits(loads: np.ndarray, mean: int, by_load: bool) -> np.ndarray:
  """Returns the bits of each expert, `int[E]`: 0 without load, and `mean` on average over the experts with a load."""
  bits = np.where(loads > 0, 1 if by_load else mean, 0)
  while bits.sum() < mean * np.count_nonzero(loads):
    bits[np.argmax(np.where(bits < MOST, loads * 4.0**-bits, 0))] += 1
  return bits


def _read(params: PyTree, planes: Mapping[str, Array], bits: np.ndarray) -> PyTree:
  """Returns the parameters with each expert as its first planes give it; an expert without bits gets no image."""
  rows = np.maximum(bits - 1, 0), np.arange(len(bits))
  return {**params, **{name: {'kernel': table[rows]} for name, table in planes.items()}}
