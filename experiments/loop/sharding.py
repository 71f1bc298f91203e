"""Places a run on the devices of all processes: the batch is sharded, and the state is replicated or sharded too.

    layout = sharding.layout(config)
    state = jax.device_put(state, sharding.state_shardings(layout, state))
    batch = sharding.global_batch(layout.batch, rows)  # from the rows of each process
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import hosts
from sparsejax.types import PyTree

AXIS = 'data'  # the one axis of the mesh
SHARDS = ('replicated', 'fully')


class Layout(NamedTuple):
  """A `Layout` is a mesh of one axis with its shardings, and whether the state is fully sharded or replicated.

  The devices of one process are adjacent in the mesh.
  """

  mesh: Mesh
  fully: bool
  replicated: NamedSharding
  batch: NamedSharding  # for a batch, `[B, ...]`
  batches: NamedSharding  # for the batches of all seeds, `[seeds, B, ...]`


def layout(config: ConfigDict) -> Layout:
  """Returns the layout on the first `config.mesh.data` devices, or on all for -1. `config.shard` is one of `SHARDS`.

  Raises `ValueError` for more devices than exist, for the devices of only some processes, and for an unknown
  `config.shard`. Also raises `ValueError` for a batch size that the number of devices does not divide.
  """
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  count = len(devices) if config.mesh.data == -1 else config.mesh.data
  if not isinstance(count, int) or not 1 <= count <= len(devices):
    raise ValueError(f'config: mesh.data={count!r} is not a number of devices from 1 to the {len(devices)} that there '
                     'are, nor -1, which is all of them.')
  if count < len(devices) and not hosts.alone():
    raise ValueError(f'config: mesh.data={count} leaves out some of the {len(devices)} devices of '
                     f'{jax.process_count()} processes; use -1, or fewer processes.')
  configs.refuse_unknown('config', 'shard', [config.shard], SHARDS)
  if config.batch_size % count:
    fewer = 'a mesh.data that divides it' if hosts.alone() else 'fewer processes'
    raise ValueError(f'config: batch_size={config.batch_size} cannot be shared evenly by {count} devices; use a '
                     f'multiple of {count}, such as {math.ceil(config.batch_size / count) * count}, or {fewer}.')
  mesh = Mesh(np.array(devices[:count]), (AXIS,))
  shardings = (NamedSharding(mesh, spec) for spec in (P(), P(AXIS), P(None, AXIS)))
  return Layout(mesh, config.shard == 'fully', *shardings)


def state_shardings(layout: Layout, state: PyTree) -> PyTree:
  """Returns the sharding of each array of `state`, which depends only on the shape.

  Masks and moments are therefore sharded like their parameter. Arrays have a leading seed axis, which is not sharded.
  If the layout is fully sharded, arrays with two or more further axes are sharded. The sharded axis is the largest that
  the number of devices divides, and the last of equal axes. All other arrays are replicated.
  """
  def of_leaf(leaf: Any) -> NamedSharding:
    sizes = leaf.shape[1:]
    fits = [axis for axis, size in enumerate(sizes) if size % layout.mesh.size == 0]
    if not layout.fully or len(sizes) < 2 or not fits:
      return layout.replicated
    widest = max(fits, key=lambda axis: (sizes[axis], axis))
    return NamedSharding(layout.mesh, P(*[None] * (widest + 1), AXIS))

  return jax.tree.map(of_leaf, state)


def with_shardings(shapes: PyTree, layout: Layout) -> PyTree:
  """Returns `shapes` as `jax.ShapeDtypeStruct`, with the shardings that `state_shardings` gives."""
  return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                      shapes, state_shardings(layout, shapes))


def local_rows(layout: Layout, batch_size: int) -> slice:
  """Returns the range of rows of each batch that the devices of this process hold."""
  places = layout.batch.addressable_devices_indices_map((batch_size,)).values()
  ranges = [place[0].indices(batch_size)[:2] for place in places]
  return slice(min(start for start, _ in ranges), max(stop for _, stop in ranges))


def global_batch(sharding: NamedSharding, batch: PyTree) -> PyTree:
  """Returns the global batch with `sharding`, from the rows in `batch` that each process holds."""
  return jax.tree.map(lambda local: jax.make_array_from_process_local_data(sharding, local), batch)


def gathered(tree: PyTree) -> PyTree:
  """Returns `tree` with each array fully addressable in this process, all elements included.

  All processes must call `gathered`, because arrays that are not replicated are gathered by communication.
  """
  def gather(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
      return leaf
    if not leaf.is_fully_replicated:
      leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
    return leaf.addressable_data(0).block_until_ready()  # Only one collective runs at a time.

  return jax.tree.map(gather, tree)


def sharded(tree: PyTree, like: PyTree) -> PyTree:
  """Returns the arrays of `tree` with the shardings of `like`. Every process must hold all elements of `tree`."""
  return jax.tree.map(lambda leaf, other: jax.make_array_from_callback(
      leaf.shape, other.sharding, lambda place: leaf[place]), tree, like)
