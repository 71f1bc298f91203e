"""How a run lies on the devices of all processes: the batch is split over them, the state copied or split too."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiments.loop import hosts
from sparsejax import errors
from sparsejax.types import PyTree

AXIS = 'data'
SHARDS = ('replicated', 'fully')


class Layout(NamedTuple):
  """The devices in a row, those of one process side by side, and whether the state is split over them."""

  mesh: Mesh
  fully: bool

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, P())

  @property
  def batch(self) -> NamedSharding:
    """Of arrays `[B, ...]`."""
    return NamedSharding(self.mesh, P(AXIS))

  @property
  def batches(self) -> NamedSharding:
    """Of arrays `[seeds, B, ...]`."""
    return NamedSharding(self.mesh, P(None, AXIS))


def layout(config: ConfigDict) -> Layout:
  """Raises `ValueError` for devices that are not there, and for a batch that they cannot share evenly."""
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  count = len(devices) if config.mesh.data == -1 else config.mesh.data
  if not isinstance(count, int) or not 1 <= count <= len(devices):
    raise ValueError(f'config: mesh.data={count!r} is not a number of devices from 1 to the {len(devices)} that there '
                     'are, nor -1, which is all of them.')
  if count < len(devices) and not hosts.alone():
    raise ValueError(f'config: mesh.data={count} leaves out some of the {len(devices)} devices of '
                     f'{jax.process_count()} processes; use -1, or fewer processes.')
  if config.shard not in SHARDS:
    raise errors.unknown('config', 'shard', config.shard, SHARDS)
  if config.batch_size % count:
    fewer = 'a mesh.data that divides it' if hosts.alone() else 'fewer processes'
    raise ValueError(f'config: batch_size={config.batch_size} cannot be shared evenly by {count} devices; use a '
                     f'multiple of {count}, such as {math.ceil(config.batch_size / count) * count}, or {fewer}.')
  return Layout(Mesh(np.array(devices[:count]), (AXIS,)), config.shard == 'fully')


def of_state(layout: Layout, state: PyTree) -> PyTree:
  """The sharding of each array of a state, by its shape alone, so that masks and moments lie as their parameter does.

  Arrays have a leading seed axis. Of those of rank two and more without it, the largest axis that the devices divide is
  split, the last among equals; the others are copied.
  """
  def one(leaf: Any) -> NamedSharding:
    sizes = leaf.shape[1:]
    fits = [axis for axis, size in enumerate(sizes) if size % layout.mesh.size == 0]
    if not layout.fully or len(sizes) < 2 or not fits:
      return layout.replicated
    widest = max(fits, key=lambda axis: (sizes[axis], axis))
    return NamedSharding(layout.mesh, P(*[None] * (widest + 1), AXIS))

  return jax.tree.map(one, state)


def like(shapes: PyTree, layout: Layout) -> PyTree:
  """The same shapes, with the shardings of a state."""
  return jax.tree.map(lambda leaf, its: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=its),
                      shapes, of_state(layout, shapes))


def rows(layout: Layout, batch_size: int) -> slice:
  """Which rows of each batch are on the devices of this process."""
  places = layout.batch.addressable_devices_indices_map((batch_size,)).values()
  ranges = [place[0].indices(batch_size)[:2] for place in places]
  return slice(min(start for start, _ in ranges), max(stop for _, stop in ranges))


def put(sharding: NamedSharding, batch: PyTree) -> PyTree:
  """Arrays of the whole batch, of which each process gives its own rows."""
  return jax.tree.map(lambda local: jax.make_array_from_process_local_data(sharding, local), batch)


def whole(tree: PyTree) -> PyTree:
  """The arrays of all processes with all of their elements on this one."""
  def one(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
      return leaf
    if not leaf.is_fully_replicated:
      leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
    return leaf.addressable_data(0).block_until_ready()  # one collective at a time

  return jax.tree.map(one, tree)


def placed(tree: PyTree, like: PyTree) -> PyTree:
  """Arrays that every process has whole, with the shardings of `like`."""
  return jax.tree.map(lambda leaf, other: jax.make_array_from_callback(
      leaf.shape, other.sharding, lambda place: leaf[place]), tree, like)
