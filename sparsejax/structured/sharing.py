"""Reads all weights of a model from one small memory, which is what is trained: STABLE-RPS and ROAST.

    plan = fold(params, size=10_000, key=key)
    memory = beginning(plan, params, key)
    tx = optax.chain(scaler(plan), optax.sgd(0.1))
    loss(expand(memory, plan), batch)                 # differentiable: the gradient of the memory is a sum
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.arguments import checked
from sparsejax.types import Array, PyTree

PRIME = 2_038_074_743  # of the hash of ROAST's code


class Folding(NamedTuple):
  """A `Folding` says which entry of the memory each weight reads, and by what each leaf multiplies the entries.

  `places`: `int32` arrays shaped like the leaves. `scales`: a number for each leaf. `size`: the numbers in the memory.
  """

  places: list[np.ndarray]
  scales: list[float]
  size: int
  structure: Any
  dtypes: list[Any]


@checked
def fold(params: PyTree, size: int, key: Array) -> Folding:
  """Returns the plan of STABLE-RPS: each piece of `size` weights is mapped to the memory one to one (2023).

  All weights are one row, in the order of the leaves. The first piece reads the memory in order, each further piece in
  a random order of its own. An entry is thus read by at most ceil(weights / size) weights, and at size = weights the
  model is the dense one. A leaf multiplies what it reads by its own standard deviation.
  """
  leaves, count = _arrays('fold', params, size)
  orders = [np.asarray(jax.random.permutation(each, size)) for each in jax.random.split(key, -(-count // size))]
  row = np.concatenate([np.arange(size), *orders[1:]])[:count].astype(np.int32)
  ends = np.cumsum([leaf.size for leaf in leaves])
  places = [part.reshape(leaf.shape) for part, leaf in zip(np.split(row, ends[:-1]), leaves)]
  return _plan(params, leaves, places, size)


@checked
def roast(params: PyTree, size: int, tile: tuple[int, int], seed: int = 0) -> Folding:
  """Returns the plan of ROAST: each tile of a matrix reads a run of the memory whose start is a hash (2207.10702).

  Tile (i, j) begins at (i R3 + j R2 + R1) mod 2038074743 mod (size - tile + 1), with random R of `seed`. The last axis
  of a leaf is that of columns, and all others are rows. The authors' kernels use two hashes that disagree, and never
  read the last entry; here there is one, and it may. Raises `ValueError` if `tile` is larger than the memory.
  """
  leaves, _ = _arrays('roast', params, size)
  if math.prod(tile) > size:
    raise ValueError(f'structured.roast: a tile of {tile} does not fit into a memory of {size}; take a smaller tile.')
  rng = np.random.default_rng(seed)
  draw = lambda: int(rng.integers(1, PRIME))
  places = [tile_places(leaf.shape, size, tile, (draw(), draw(), draw())) for leaf in leaves]
  return _plan(params, leaves, places, size)


def tile_places(shape: tuple[int, ...], size: int, tile: tuple[int, int], numbers: tuple[int, int, int]) -> np.ndarray:
  """Returns where each weight of a leaf reads the memory; `numbers` are R3, R2 and R1."""
  rows, columns = np.indices((math.prod(shape[:-1]), shape[-1] if shape else 1))
  (high, wide), (r3, r2, r1) = tile, numbers
  start = ((rows // high) * r3 + (columns // wide) * r2 + r1) % PRIME % (size - high * wide + 1)
  return (start + rows % high * wide + columns % wide).astype(np.int32).reshape(shape)


def beginning(plan: Folding, params: PyTree, key: Array) -> Array:
  """Returns the memory to train, `float32[size]`: `params` themselves if it holds all of them, else normal numbers."""
  leaves = jax.tree.leaves(params)
  if sum(place.size for place in plan.places) > plan.size:
    return jax.random.normal(key, (plan.size,))
  memory = jnp.zeros(plan.size)
  for place, scale, leaf in zip(plan.places, plan.scales, leaves):
    memory = memory.at[place.reshape(-1)].set(leaf.reshape(-1).astype(jnp.float32) / scale)
  return memory


def expand(memory: Array, plan: Folding) -> PyTree:
  """Returns the parameters that the memory stands for. Raises `ValueError` for a memory of another size."""
  if memory.shape != (plan.size,):
    raise ValueError(f'structured.expand: the memory has shape {list(memory.shape)}, the plan [{plan.size}].')
  found = [(memory[place] * scale).astype(dtype) for place, scale, dtype in zip(plan.places, plan.scales, plan.dtypes)]
  return plan.structure.unflatten(found)


def scaler(plan: Folding) -> optax.GradientTransformation:
  """Returns the transform that divides each entry's gradient by the sum of the squared scales that read the entry.

  A step of SGD at size = weights then is the step of the dense model. Entries that nothing reads have no gradient.
  """
  load = np.zeros(plan.size)
  for place, scale in zip(plan.places, plan.scales):
    np.add.at(load, place.reshape(-1), scale**2)
  divided = lambda grad: grad / jnp.asarray(np.where(load > 0, load, 1), grad.dtype)
  return optax.stateless(lambda grads, params: jax.tree.map(divided, grads))


def _arrays(function: str, params: PyTree, size: int) -> tuple[list[Any], int]:
  leaves = jax.tree.leaves(params)
  count = sum(leaf.size for leaf in leaves)
  if not 0 < size <= count:
    raise ValueError(f'structured.{function}: size={size}, but the memory holds from 1 to {count} numbers, as many as '
                     'the model has.')
  return leaves, count


def _plan(params: PyTree, leaves: list[Any], places: list[np.ndarray], size: int) -> Folding:
  scales = [max(float(jnp.std(leaf.astype(jnp.float32))), 1e-6) for leaf in leaves]
  return Folding(places, scales, size, jax.tree.structure(params), [leaf.dtype for leaf in leaves])
