"""What the kernels for Hopper share: what Mosaic takes there, and a ring of tiles that one warpgroup fills.

A kernel runs as one persistent block a multiprocessor, of three warpgroups. The last only copies tiles from global to
shared memory (TMA), into a ring of `slots`; the other two multiply them (wgmma). The ring runs on from one output tile
to the next, so that the copies for the next are under way while the last is being written.
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

SHARED = 232_448  # bytes of shared memory that one block can have on Hopper
SPARE = 1024  # of these, for barriers
COMPUTE = 2  # warpgroups that multiply
CORES = 132  # multiprocessors of an H100 and H200, where the program is lowered without one
INTERPRETED = 2  # of what a CPU interprets


def refused_dtype(dtype: np.dtype) -> str | None:
  """Why these kernels do not multiply arrays of `dtype`, with the remedy."""
  if dtype in (jnp.bfloat16, jnp.float16):
    return None
  remedy = ('cast to bfloat16, or leave it to XLA, which has tensor cores for it at jax.default_matmul_precision '
            "'tensorfloat32'" if dtype == jnp.float32 else 'cast to bfloat16')
  return f'the kernels for Hopper multiply bfloat16 and float16, not {dtype}; {remedy}'


def cores(interpret: bool = False) -> int:
  """Multiprocessors of the device that the program is for."""
  if interpret:
    return INTERPRETED
  abstract = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  if abstract is not None and abstract.num_cores:
    return abstract.num_cores
  device = jax.local_devices()[0]
  return device.core_count if device.platform == 'gpu' else CORES


def transforms(length: int, dtype: Any) -> tuple[Any, ...]:
  """How a tile whose last axis has this length lies in shared memory, so that wgmma can read it."""
  size = np.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle(length * size * 8)
  return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
  """Scratch in shared memory for tiles, the last two axes."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
  return int(np.prod(shape)) * np.dtype(dtype).itemsize


def slots(stage: int, rest: int, most: int) -> int:
  """How many stages of so many bytes fit beside the rest: at most `most`."""
  return min(most, (SHARED - SPARE - rest) // stage)


def filled(x: Array, multiple: int) -> Array:
  """`x` with rows of zeros appended, up to a multiple."""
  return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0))) if x.shape[0] % multiple else x


def readable(x: Array, multiple: int, interpret: bool = False) -> Array:
  """`x` with as many rows as copies of `multiple` rows need: beyond the end they read zeros, and write nothing.

  But Mosaic wants eights, unless there are fewer, and interpret mode copies nothing from beyond the end.
  """
  return filled(x, multiple if interpret else 8 if x.shape[0] > 8 else 1)


def banded(i: Array, rows: int, columns: int, width: int) -> tuple[Array, Array]:
  """The row and column of the i-th tile, if `width` rows at a time go through all columns before the next do.

  So tiles that are computed at about the same time share what they read.
  """
  first = lax.div(i, jnp.int32(width * columns)) * width
  here, within = lax.min(jnp.int32(width), rows - first), i - first * columns
  return first + lax.rem(within, here), lax.div(within, here)


def scheduled(lengths: np.ndarray, blocks: int) -> np.ndarray:
  """An order of tiles of these lengths in which each block, with one in `blocks` of them, has about equally much to do.

  Only tiles that are computed at about the same time change places: those of one round of the blocks, the longest of
  which goes to the block with the least so far. The last round, which is not for all of them, is counted first.
  """
  order, load = np.arange(len(lengths)), np.zeros(blocks)
  rounds = [order[first:first + blocks] for first in range(0, len(order), blocks)]
  for here in (rounds[-1], *rounds[:-1]):
    least = np.argsort(load[:len(here)], kind='stable')
    longest = here[np.argsort(-lengths[here], kind='stable')]
    order[here[0] + least] = longest
    load[least] += lengths[longest]
  return order.astype(np.int32)


def load(ref: Any, layout: Any) -> Array:
  """All of `ref`, in this layout; until JAX 0.10 that took an index."""
  index = [()] if 'idx' in inspect.signature(plgpu.load).parameters else []
  return plgpu.load(ref, *index, layout=layout)


def transposed(ref: Any) -> Any:
  """A reference to the transpose of a tile; from JAX 0.12 on a method."""
  return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))


def kernel(body: Callable[..., None], out: jax.ShapeDtypeStruct, operands: tuple[Array, ...], *, blocks: int,
           scratch: dict[str, Any], cluster: int = 1, lanes: bool = False, approximate: bool = False,
           interpret: bool = False) -> Array:
  """`body(*operands, out, **scratch)` as `blocks` blocks, or clusters of blocks, of three warpgroups.

  Axes: 'sm', 'cluster' (if there are clusters) and 'wg'. `lanes`: the body has code for single threads.
  """
  semantics = plgpu.LoweringSemantics.Lane if lanes else plgpu.LoweringSemantics.Warpgroup
  clusters = {'cluster': (cluster,), 'cluster_names': ('cluster',)} if cluster > 1 else {}
  mode = {'interpret': _interpreter()} if interpret else {}
  run = plgpu.kernel(
      body, out_type=out, scratch_types=scratch, grid=(blocks,), grid_names=('sm',), num_threads=COMPUTE + 1,
      thread_name='wg', compiler_params=plgpu.CompilerParams(lowering_semantics=semantics, approx_math=approximate),
      **clusters, **mode)
  return _varying(run(*operands), operands)


def _interpreter() -> Any:
  """What runs a kernel on a CPU. Public from JAX 0.11 on."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params
  return params.InterpretGPUParams()


def _varying(y: Array, operands: tuple[Array, ...]) -> Array:
  """`y`, under `shard_map` varying over the axes that `operands` vary over, which `plgpu.kernel` forgets."""
  varying = lambda a: jax.typeof(a).manual_axis_type.varying
  missing = frozenset().union(*map(varying, operands)) - varying(y)
  return lax.pcast(y, tuple(sorted(missing)), to='varying') if missing else y


# The ring. `count` is the number of tiles that went through it, and so where it stands.


def barriers(slots: int, copies: int, cluster: int = 1) -> tuple[Any, Any]:
  """`full`, on which the copies of a slot arrive, and `free`, on which those that have read it do."""
  free = (plgpu.ClusterBarrier(collective_axes=('cluster',), num_arrivals=COMPUTE, num_barriers=slots)
          if cluster > 1 else plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots))
  return plgpu.Barrier(num_arrivals=copies, num_barriers=slots), free


def share(n: Any, blocks: int, tile: Callable[[Array], Any]) -> Callable[..., Any]:
  """A block's share of `n` output tiles, the i-th of which is called `tile(i)`: a loop over `f(tile, count)`.

  Of so many `blocks`, b does the tiles b, b + blocks, and so on. `f` gives the count behind a tile, 0 before the first,
  and the loop that behind the last; or, with `loop(f, start)`, anything else that is carried. What a tile is called is
  asked one tile ahead, so that what that reads is there in time. It is numbers of tiles, not offsets: Mosaic would not
  know any more what those are multiples of.
  """
  called = lambda i: tile(lax.min(i, jnp.int32(n - 1)))

  def loop(f, start=None):
    def each(info, carry):
      count, here = carry
      following = called(info.index[0] + blocks)
      return f(here, count), following
    begin = jnp.int32(0) if start is None else start, called(lax.axis_index('sm'))
    return plgpu.nd_loop((n,), collective_axes='sm', init_carry=begin)(each)[0]

  return loop


def ring(loop: Callable[..., Array], trips: Callable[[Any], Array], copy: Callable[..., None],
         compute: Callable[[Any, Array], Array], free: Any, slots: int) -> None:
  """What a block does: its `share` of the tiles, which this loop goes through, through one ring.

  The memory warpgroup does `copy(tile, step, slot)` for `trips(tile)` steps of each, the others `compute(tile, count)`,
  which gives the count behind it.
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
  # A block must outlive what arrives on its barriers.
  lax.fori_loop(0, slots, lambda i, _: plgpu.barrier_wait(free.at[lax.rem(count + i, jnp.int32(slots))]), None)


def start(free: tuple[Any, ...], slots: int) -> None:
  """What a compute warpgroup does first: says that all slots of these rings are free."""
  plgpu.set_max_registers(232, action='increase')
  for slot in range(slots):
    for ring in free:
      plgpu.barrier_arrive(ring.at[slot])


def accumulate(multiply: Callable[[Array], None], trips: Array, count: Array, full: Any, free: Any,
               slots: int) -> Array:
  """`multiply(slot)`, which issues a wgmma, for each of `trips` steps; the count behind them.

  One wgmma stays in flight, so a slot is free one step later.
  """
  at = lambda count: lax.rem(count, jnp.int32(slots))

  def step(i, count):
    plgpu.barrier_wait(full.at[at(count)])
    multiply(at(count))
    plgpu.wgmma_wait(1)
    pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[at(count + slots - 1)]))
    return count + 1

  count = lax.fori_loop(jnp.int32(0), trips, step, count)
  plgpu.wgmma_wait(0)
  plgpu.barrier_arrive(free.at[at(count + slots - 1)])
  return count


def store(value: Array, staging: Any, target: Callable[[int, int], Any], turned: bool = False) -> None:
  """Write `value` to `target(row, column)`, by pieces of the size of `staging [n, rows, columns]`, n at a time.

  If `turned`, staging and target have the transpose of a piece.
  """
  together, *size = staging.shape
  rows, columns = reversed(size) if turned else size
  pieces = [(r, c) for r in range(0, value.shape[0], rows) for c in range(0, value.shape[1], columns)]
  for first in range(0, len(pieces), together):
    here = pieces[first:first + together]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what is still read of staging is in the way
    for i, (row, column) in enumerate(here):
      there = transposed(staging.at[i]) if turned else staging.at[i]
      there[...] = value[row:row + rows, column:column + columns]
    plgpu.commit_smem()
    for i, at in enumerate(here):
      plgpu.copy_smem_to_gmem(staging.at[i], target(*at))
