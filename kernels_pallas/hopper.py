"""Holds the parts that the kernels for Hopper share: sizes that Mosaic takes, and a ring of tiles in shared memory.

A kernel runs as one persistent thread block a multiprocessor, with three warpgroups. The last warpgroup only copies
tiles from global to shared memory (TMA), into a ring of `slots`. The other two warpgroups multiply the tiles (wgmma).
The ring continues from one output tile to the next: copies for the next output tile run while the last is written.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.types import Array

SHARED = 232_448  # bytes of shared memory that one thread block can have on Hopper
SPARE = 1024  # bytes of shared memory that are left for barriers
COMPUTE = 2  # warpgroups that multiply
CORES = 132  # multiprocessors of an H100 and H200, for programs that are lowered without a GPU
INTERPRETED = 2  # multiprocessors in interpret mode


def refused_dtype(dtype: np.dtype) -> str | None:
  """Returns why these kernels do not multiply arrays of `dtype`, with the remedy, or `None`."""
  if dtype in (jnp.bfloat16, jnp.float16):
    return None
  remedy = ('cast to bfloat16, or leave it to XLA, which has tensor cores for it at jax.default_matmul_precision '
            "'tensorfloat32'" if dtype == jnp.float32 else 'cast to bfloat16')
  return f'the kernels for Hopper multiply bfloat16 and float16, not {dtype}; {remedy}'


def cores(interpret: bool = False) -> int:
  """Returns the number of multiprocessors of the device that the program is lowered for."""
  if interpret:
    return INTERPRETED
  abstract = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  if abstract is not None and abstract.num_cores:
    return abstract.num_cores
  device = jax.local_devices()[0]
  return device.core_count if device.platform == 'gpu' else CORES


def transforms(length: int, dtype: Any) -> tuple[Any, ...]:
  """Returns the layout in shared memory of a tile whose last axis has this length, so that wgmma can read the tile."""
  size = np.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle(length * size * 8)
  return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
  """Returns the scratch type of tiles in shared memory; the last two axes are those of a tile."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
  return int(np.prod(shape)) * np.dtype(dtype).itemsize


def slots(stage: int, rest: int, most: int) -> int:
  """Returns how many stages of `stage` bytes fit into shared memory beside `rest` bytes, at most `most`."""
  return min(most, (SHARED - SPARE - rest) // stage)


def filled(x: Array, multiple: int) -> Array:
  """Returns `x` with rows of zeros appended, up to a multiple of `multiple` rows."""
  return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0))) if x.shape[0] % multiple else x


def readable(x: Array, multiple: int, interpret: bool = False) -> Array:
  """Returns `x` with as many rows as copies of `multiple` rows need.

  Beyond the end of an array, copies read zeros and write nothing, so rows need no padding to `multiple`. Mosaic
  requires a multiple of eight rows, unless there are at most eight. Interpret mode copies nothing from beyond the end,
  so there rows are padded to `multiple`.
  """
  return filled(x, multiple if interpret else 8 if x.shape[0] > 8 else 1)


def banded(i: Array, rows: int, columns: int, width: int) -> tuple[Array, Array]:
  """Returns the row and the column of the i-th tile, where `width` rows go through all columns before the next rows.

  Tiles that are computed at about the same time then share the data that they read.
  """
  first = lax.div(i, jnp.int32(width * columns)) * width
  height, within = lax.min(jnp.int32(width), rows - first), i - first * columns
  return first + lax.rem(within, height), lax.div(within, height)


def scheduled(lengths: np.ndarray, blocks: int) -> np.ndarray:
  """Returns an order of tiles, `int32`, that gives each of `blocks` thread blocks about equally much to do.

  `lengths[i]` is the work of tile i. Thread block b computes the tiles b, b + `blocks`, and so on, of the order. A
  round is one tile of each thread block. Only tiles of one round change places, so they are computed at about the same
  time as before. The longest tile of a round goes to the thread block with the least work so far. The last round, which
  may have fewer tiles than thread blocks, is counted first.
  """
  order, load = np.arange(len(lengths)), np.zeros(blocks)
  rounds = [order[first:first + blocks] for first in range(0, len(order), blocks)]
  for tiles in (rounds[-1], *rounds[:-1]):
    least = np.argsort(load[:len(tiles)], kind='stable')
    longest = tiles[np.argsort(-lengths[tiles], kind='stable')]
    order[tiles[0] + least] = longest
    load[least] += lengths[longest]
  return order.astype(np.int32)


def load(ref: Any, layout: Any, optimized: bool = True) -> Array:
  """Returns the array of `ref` in this layout. Up to JAX 0.10, `plgpu.load` takes an index.

  `optimized=False` allows layouts for which Mosaic has no fast copy, such as those of memory without swizzling.
  """
  index = [()] if 'idx' in inspect.signature(plgpu.load).parameters else []
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def transposed(ref: Any) -> Any:
  """Returns a reference to the transpose of a tile. From JAX 0.12 on, the transpose is a method."""
  return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))


def kernel(body: Callable[..., None], out: Any, operands: tuple[Array, ...], *, blocks: int, scratch: dict[str, Any],
           cluster: int = 1, lanes: bool = False, approximate: bool = False, interpret: bool = False) -> Any:
  """Runs `body(*operands, out, **scratch)` as a kernel and returns the array `out`, or several arrays of a tuple.

  `blocks` is the number of thread blocks of three warpgroups, or, if `cluster` is more than 1, of clusters of `cluster`
  thread blocks. The axes are 'sm', 'cluster' (if there are clusters) and 'wg'. `lanes` says that the body has code for
  single threads. `approximate` allows approximate functions such as exp2. `interpret` runs the kernel on a CPU.
  """
  semantics = plgpu.LoweringSemantics.Lane if lanes else plgpu.LoweringSemantics.Warpgroup
  clusters = {'cluster': (cluster,), 'cluster_names': ('cluster',)} if cluster > 1 else {}
  mode = {'interpret': _interpreter()} if interpret else {}
  run = plgpu.kernel(
      body, out_type=out, scratch_types=scratch, grid=(blocks,), grid_names=('sm',), num_threads=COMPUTE + 1,
      thread_name='wg', compiler_params=plgpu.CompilerParams(lowering_semantics=semantics, approx_math=approximate),
      **clusters, **mode)
  return jax.tree.map(lambda y: _varying(y, operands), run(*operands))


def _interpreter() -> Any:
  """Returns the parameters that run a kernel on a CPU. The class is public from JAX 0.11 on."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params
  return params.InterpretGPUParams()


def _varying(y: Array, operands: tuple[Array, ...]) -> Array:
  """Returns `y`, marked under `shard_map` as varying over the mesh axes that `operands` vary over.

  `plgpu.kernel` does not mark its result.
  """
  varying = lambda a: jax.typeof(a).manual_axis_type.varying
  missing = frozenset().union(*map(varying, operands)) - varying(y)
  return lax.pcast(y, tuple(sorted(missing)), to='varying') if missing else y


# The ring of tiles: `count` is the number of tiles that went through the ring, and gives the current slot.


def barriers(slots: int, copies: int, cluster: int = 1) -> tuple[Any, Any]:
  """Returns the barriers `full`, on which the copies of a slot arrive, and `free`, on which its readers arrive."""
  free = (plgpu.ClusterBarrier(collective_axes=('cluster',), num_arrivals=COMPUTE, num_barriers=slots)
          if cluster > 1 else plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots))
  return plgpu.Barrier(num_arrivals=copies, num_barriers=slots), free


def share(n: Any, blocks: int, tile: Callable[[Array], Any]) -> Callable[..., Any]:
  """Returns a loop over a thread block's share of `n` output tiles.

  `tile(i)` describes the i-th output tile. `loop(f, start)` calls `f(tile, carry)` for each tile of the share, and
  returns the last carry; `start`, by default the count 0, is the first carry. Thread block b has the tiles b,
  b + `blocks`, and so on. `tile` is called one tile ahead, so that the values it reads from memory arrive in time. The
  descriptions hold numbers of tiles, not offsets, because Mosaic would no longer know what an offset is a multiple of.
  """
  described = lambda i: tile(lax.min(i, jnp.int32(n - 1)))

  def loop(f, start=None):
    def each(info, carry):
      count, current = carry
      following = described(info.index[0] + blocks)
      return f(current, count), following
    begin = jnp.int32(0) if start is None else start, described(lax.axis_index('sm'))
    return plgpu.nd_loop((n,), collective_axes='sm', init_carry=begin)(each)[0]

  return loop


def ring(loop: Callable[..., Array], trips: Callable[[Any], Array], copy: Callable[..., None],
         compute: Callable[[Any, Array], Array], free: Any, slots: int) -> None:
  """Runs the loop of a thread block, as `share` returns it, with one ring of `slots` slots.

  The memory warpgroup calls `copy(tile, step, slot)` for the `trips(tile)` steps of each tile. The other warpgroups
  call `compute(tile, count)`, which returns the count after the tile.
  """

  @pl.when(lax.axis_index('wg') == COMPUTE)
  def _():
    _copies(loop, trips, copy, free, slots)

  @pl.when(lax.axis_index('wg') < COMPUTE)
  def _():
    start((free,), slots)
    loop(compute)
    plgpu.wait_smem_to_gmem(0)


def _copies(loop: Callable[..., Any], trips: Callable[[Any], Array], copy: Callable[..., None], free: Any,
            slots: int) -> None:
  plgpu.set_max_registers(40, action='decrease')

  def fill(tile, count):
    def step(i, count):
      slot = lax.rem(count, jnp.int32(slots))
      plgpu.barrier_wait(free.at[slot])
      copy(tile, i, slot)
      return count + 1
    return lax.fori_loop(jnp.int32(0), trips(tile), step, count)

  count = loop(fill)
  # A thread block must not end before the last arrivals on its barriers.
  lax.fori_loop(0, slots, lambda i, _: plgpu.barrier_wait(free.at[lax.rem(count + i, jnp.int32(slots))]), None)


def start(free: tuple[Any, ...], slots: int) -> None:
  """Begins a compute warpgroup: reserves its registers, and marks all slots of the rings `free` as free."""
  plgpu.set_max_registers(232, action='increase')
  for slot in range(slots):
    for ring in free:
      plgpu.barrier_arrive(ring.at[slot])


def accumulate(multiply: Callable[[Array], None], trips: Array, count: Array, full: Any, free: Any,
               slots: int) -> Array:
  """Calls `multiply(slot)`, which issues a wgmma, for each of `trips` steps, and returns the count after the steps.

  A wgmma stays in flight, so a slot is free one step later.
  """
  slot = lambda count: lax.rem(count, jnp.int32(slots))

  def step(i, count):
    plgpu.barrier_wait(full.at[slot(count)])
    multiply(slot(count))
    plgpu.wgmma_wait(1)
    pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[slot(count + slots - 1)]))
    return count + 1

  count = lax.fori_loop(jnp.int32(0), trips, step, count)
  plgpu.wgmma_wait(0)
  plgpu.barrier_arrive(free.at[slot(count + slots - 1)])
  return count


def store(value: Array, staging: Any, target: Callable[[int, int], Any], turned: bool = False) -> None:
  """Writes `value` to `target(row, column)`, in pieces of the size of `staging [n, rows, columns]`, n at a time.

  If `turned`, staging and target hold the transpose of a piece.
  """
  together, *size = staging.shape
  rows, columns = reversed(size) if turned else size
  pieces = [(r, c) for r in range(0, value.shape[0], rows) for c in range(0, value.shape[1], columns)]
  for first in range(0, len(pieces), together):
    batch = pieces[first:first + together]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # Earlier copies may still read `staging`.
    for i, (row, column) in enumerate(batch):
      piece = transposed(staging.at[i]) if turned else staging.at[i]
      piece[...] = value[row:row + rows, column:column + columns]
    plgpu.commit_smem()
    for i, place in enumerate(batch):
      plgpu.copy_smem_to_gmem(staging.at[i], target(*place))
