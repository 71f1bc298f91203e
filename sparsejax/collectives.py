"""Sends rows and packed weights between the devices of a mesh axis, inside of `jax.shard_map`.

    rows = collectives.gather_rows(experts, ids, 'data')         # [h, ...] of [E / D, ...] on each of D devices
    w = collectives.packed_gather(packed, 'fsdp', axis=0)        # dense on every device, sent packed

`programs.hlo.collectives` reads from the compiled text what is sent.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax import arguments
from sparsejax.argument_kinds import ARRAY, MESH_AXES, NAME, PACKED, TIMES, WHOLE
from sparsejax.arguments import checked
from sparsejax.types import Array, PyTree

__all__ = ['gather_rows', 'packed_gather', 'scatter_rows']

arguments.declare('gather_rows scatter_rows', x=ARRAY, ids=ARRAY, rows=ARRAY, axis_name=NAME, owned=TIMES)
arguments.declare('packed_gather', packed=PACKED, axis_name=MESH_AXES, axis=WHOLE)


@checked
def gather_rows(x: Array, ids: Array, axis_name: str) -> Array:
  """Returns the rows `ids`, `int[h]`, on every device, `[h, ...]`, from `x`, the device's own rows `[E / D, ...]`.

  Device d owns the rows d E / D to (d + 1) E / D - 1. The ids have to be equal on all devices; an id beyond E gives
  zeros. The SparseAllGather of Hecate (Zhang et al. 2025), as one sum over the axis of rows of which only the owner's
  is not zero. XLA makes it an all-reduce of h rows, which sends about twice what a broadcast sends: less than an
  all-gather of E rows where h < E / 2. Its derivative sums the gradients of all copies at the owner.
  """
  place = ids - lax.axis_index(axis_name) * x.shape[0]
  mine = (place >= 0) & (place < x.shape[0])
  rows = x[jnp.clip(place, 0, x.shape[0] - 1)]
  return lax.psum(jnp.where(mine.reshape(-1, *(1,) * (x.ndim - 1)), rows, jnp.zeros((), x.dtype)), axis_name)


@checked
def scatter_rows(rows: Array, ids: Array, owned: int, axis_name: str) -> Array:
  """Returns the sums over all devices of `rows`, `[h, ...]`, at their owners, `[owned, ...]`; other rows are zero.

  The SparseReduceScatter of Hecate, the transpose of `gather_rows`. `owned`: E / D, the rows of each device.
  """
  place = ids - lax.axis_index(axis_name) * owned
  there = jnp.where((place >= 0) & (place < owned), place, owned)
  return jnp.zeros((owned, *rows.shape[1:]), rows.dtype).at[there].add(lax.psum(rows, axis_name), mode='drop')


@checked
def packed_gather(packed: PyTree, axis_name: str | tuple[str, ...], axis: int = 0) -> Array:
  """Returns the whole dense array on every device from packed shards, of which only the packed arrays are sent.

  Each device packs its own shard, as in `formats.NMArray.from_dense(shard, 2, 4, axes=(0,), check=False)`. The shards
  follow each other along the dense `axis`, in the order of the mesh axes if `axis_name` names several. Every device
  must pack to arrays of the same shapes, as N:M does, and blocks of equally many stored blocks. At 2:4 in bfloat16 a
  gather sends 0.5625 of the dense bytes. The result is the dense gather of the same weights bit for bit, which the
  quantized gather of ZeRO++ (Wang et al. 2023, 2306.10209) is not.
  The derivative scatters sums of the kept values alone, as for a fixed mask.
  """
  whole = lax.all_gather(packed, axis_name)
  shards = [jax.tree.map(lambda x, i=i: x[i], whole).to_dense() for i in range(jax.tree.leaves(whole)[0].shape[0])]
  if axis >= shards[0].ndim:
    raise ValueError(f'collectives.packed_gather: axis={axis} of shards of shape {shards[0].shape}; name the dense '
                     'axis along which the shards follow each other.')
  return jnp.concatenate(shards, axis)
