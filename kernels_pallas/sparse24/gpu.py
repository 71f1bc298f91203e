"""Computes the product with a 2:4 weight on Hopper's sparse tensor cores.

The instruction is `wgmma.mma_async.sp`, which Mosaic has no name for. Interpret mode does not cover the instruction. On
an H200, at commit 363dbf3, the numbers were right (`python -m benchmarks gpu` compares them). No other module depends
on this one, which uses parts of Mosaic that change.

The sparse operand must be the first, so the kernel computes `y^T = w^T x^T`: outputs are rows. With few tokens the
product waits for the bytes of the weight, nine sixteenths of the dense bytes, so K is divided among multiprocessors.

    t = tiles(tokens, outputs, steps, jnp.bfloat16)
    y = matmul(x, w, sizes=dataclasses.replace(t, splits=1))                         # [tokens, outputs]
    y = matmul(x, w)                                                                 # sizes chosen by `tiles`
"""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from kernels_pallas import hopper
from sparsejax.formats import Sparse24Array
from sparsejax.types import Array

_dense = importlib.import_module('jax.experimental.mosaic.gpu.wgmma')  # The package binds this name to a function.

ROWS = 64  # outputs of a warpgroup
WORDS = 128  # depth of two words of metadata
INSTRUCTION = 32  # depth of an instruction
OUTPUTS = hopper.COMPUTE * ROWS


@dataclasses.dataclass(frozen=True)
class SparseTiles:
  """A `SparseTiles` holds the sizes that the kernel for 2:4 products is built with."""

  tokens: int  # of an output tile
  splits: int  # parts that K is divided into
  depth: int  # contracted length of a step
  slots: int  # steps in shared memory
  cluster: int = 1  # thread blocks that share a tile of tokens

  @property
  def turned(self) -> bool:
    """Whether the kernel writes the product itself. If not, it writes parts of the transposed product in float32."""
    return self.splits == 1


def tiles(tokens: int, outputs: int, steps: int, dtype: np.dtype) -> SparseTiles:
  """Returns the sizes for `tokens` tokens, `outputs` outputs, and `steps` pairs of words of metadata along K."""
  wide = next(n for n in (8, 16, 32, 64, 128, 256) if n >= min(tokens, 256))
  units = lambda wide: -(-outputs // OUTPUTS) * -(-tokens // wide)
  while wide > 64 and 2 * units(wide) <= hopper.cores():  # Smaller tiles keep more multiprocessors busy.
    wide //= 2
  splits = max(1, min(hopper.cores() // (2 * units(wide)), steps // 4))
  cluster = 2 if wide == 256 and outputs % (2 * OUTPUTS) == 0 else 1
  return fitted(SparseTiles(wide, splits, 64 if wide == 256 else 128, 8, cluster), dtype)


def fitted(t: SparseTiles, dtype: np.dtype) -> SparseTiles:
  """Returns `t` with as many slots as fit into shared memory, at most `t.slots`."""
  stage = hopper.nbytes((OUTPUTS, t.depth // 2), dtype) + hopper.nbytes((hopper.COMPUTE, WORDS, 2), 'int32')
  stage += hopper.nbytes((t.tokens, t.depth), dtype)
  staging = hopper.nbytes((OUTPUTS, 2, min(t.tokens, 64)), dtype if t.turned else 'float32')
  return dataclasses.replace(t, slots=hopper.slots(stage, staging, t.slots))


def refusal(x: Array, w: Sparse24Array) -> str | None:
  """Returns why this kernel cannot multiply `x` by `w`, with the remedy, or `None`. Only the dtype of `x` is read."""
  del w
  return hopper.refused_dtype(x.dtype)


def matmul(x: Array, w: Sparse24Array, *, sizes: SparseTiles | None = None) -> Array:
  """Returns `x [M, Kp]` times `w`, `[M, Np]` in x's dtype, summed in float32. `x` is padded to Kp like `w`."""
  count = x.shape[0]
  values, metadata = w.values.astype(x.dtype), w.metadata.reshape(*w.metadata.shape[:2], 2, 128)
  outputs = values.shape[0]
  if outputs % OUTPUTS:
    values, metadata = hopper.filled(values, OUTPUTS), jnp.pad(metadata, ((0, 1), (0, 0), (0, 0), (0, 0)))
  steps = metadata.shape[1]
  t = sizes or tiles(count, values.shape[0], steps, x.dtype)
  y = _product(hopper.readable(x, t.tokens), values, metadata, t)
  if t.turned:
    return y[:count, :outputs]
  return jnp.sum(y, axis=0)[:outputs, :count].T.astype(x.dtype)


def _product(x: Array, values: Array, metadata: Array, t: SparseTiles) -> Array:
  """Returns the product, `[M, N]`, or, if not `t.turned`, parts `[splits, N, M]` whose sum is its transpose."""
  (rows, steps), columns = metadata.shape[:2], -(-x.shape[0] // t.tokens)
  rows //= hopper.COMPUTE * t.cluster
  dtype = x.dtype if t.turned else np.dtype(np.float32)
  sums = plgpu.Layout._WGMMA_ACC_32BIT
  piece, halves = min(t.tokens, 64), WORDS // t.depth
  blocks = min(hopper.cores() // t.cluster, columns * t.splits * rows)

  def body(values, metadata, x, y, weight, meta, tile, staging, full, free):
    wg = lax.axis_index('wg')

    begin = lambda split: lax.div(split * steps, jnp.int32(t.splits))
    trips = lambda place: begin(place[1] + 1) - begin(place[1])

    def copy(place, step, slot):
      row, split, column = place
      depth, half = begin(split) * halves + step, t.depth // 2
      plgpu.copy_gmem_to_smem(values.at[pl.ds(row * OUTPUTS, OUTPUTS), pl.ds(depth * half, half)], weight.at[slot],
                              full.at[slot])
      half_depth = lax.div(depth, jnp.int32(halves))
      plgpu.copy_gmem_to_smem(metadata.at[pl.ds(row * hopper.COMPUTE, hopper.COMPUTE), half_depth],
                              meta.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(x.at[pl.ds(column * t.tokens, t.tokens), pl.ds(depth * t.depth, t.depth)], tile.at[slot],
                              full.at[slot], collective_axes='cluster' if t.cluster > 1 else None)

    def compute(place, count):
      def step(i, carry):
        count, acc = carry
        for half in range(halves):
          slot = lax.rem(count, jnp.int32(t.slots))
          plgpu.barrier_wait(full.at[slot])
          acc = _multiply(acc, weight.at[slot, pl.ds(wg * ROWS, ROWS)], meta.at[slot, wg], tile.at[slot], half)
          plgpu.barrier_arrive(free.at[slot])
          count += 1
        return count, acc

      zero = plgpu.layout_cast(jnp.zeros((ROWS, t.tokens), jnp.float32), sums)
      count, acc = lax.fori_loop(jnp.int32(0), trips(place), step, (count, zero))
      value = plgpu.layout_cast(acc, plgpu.Layout.WGMMA).astype(dtype)
      row, split, column = place
      row, column = row * OUTPUTS + wg * ROWS, column * t.tokens
      if t.turned:
        value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        target = lambda r, c: y.at[pl.ds(column + c, piece), pl.ds(row + r, ROWS)]
      else:
        target = lambda r, c: y.at[split, pl.ds(row + r, ROWS), pl.ds(column + c, piece)]
      hopper.store(value, staging.at[wg], target, turned=t.turned)
      return count

    tiles = hopper.share(columns * t.splits * rows, blocks, lambda i: _place(i, t, rows, columns))
    hopper.ring(tiles, lambda place: trips(place) * halves, copy, compute, free, t.slots)

  outputs = rows * t.cluster * OUTPUTS
  shape = (x.shape[0], outputs) if t.turned else (t.splits, outputs, columns * t.tokens)
  return hopper.kernel(body, jax.ShapeDtypeStruct(shape, dtype), (values, metadata, x), blocks=blocks,
                       scratch=_scratch(t, x.dtype, dtype), cluster=t.cluster, lanes=True)


def _place(i: Array, t: SparseTiles, rows: int, columns: int) -> tuple[Array, Array, Array]:
  """Returns the row, the part of K, and the column of the i-th output tile.

  16 rows go through all columns together, so that their weights stay in the L2 cache.
  """
  row, rest = hopper.banded(i, rows, columns * t.splits, 16 // t.cluster)
  row = row * t.cluster + lax.axis_index('cluster') if t.cluster > 1 else row
  return row, lax.rem(rest, jnp.int32(t.splits)), lax.div(rest, jnp.int32(t.splits))


def _scratch(t: SparseTiles, dtype: np.dtype, out_dtype: np.dtype) -> dict[str, Any]:
  """Returns the shared memory and the barriers: a ring of weights, metadata and tokens, and staging for outputs."""
  full, free = hopper.barriers(t.slots, 3, t.cluster)
  piece = min(t.tokens, 64)
  return {'weight': hopper.shared((t.slots, OUTPUTS, t.depth // 2), dtype),
          'meta': plgpu.SMEM((t.slots, hopper.COMPUTE, 2, 128), jnp.int32),
          'tile': hopper.shared((t.slots, t.tokens, t.depth), dtype),
          'staging': hopper.shared((hopper.COMPUTE, 2, *((piece, ROWS) if t.turned else (ROWS, piece))), out_dtype),
          'full': full, 'free': free}


def _multiply(acc: Array, weight: Any, meta: Any, tokens: Any, half: int) -> Array:
  """Returns `acc [64, n]` plus the sparse `weight [64, depth]` times the transpose of `tokens [n, depth]`.

  `half` is the index of the word of metadata that comes first.
  """
  sums = plgpu.Layout._WGMMA_ACC_32BIT
  registers = plgpu.Layout.WG_STRIDED((2, 128), vec_size=2)
  tiled = [plgpu.RefType(hopper.transforms(ref.shape[-1], ref.dtype)) for ref in (weight, tokens)]
  result = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=sums)

  @plgpu.inline_mgpu(arg_types=(sums, *tiled, registers), return_type=result)
  def product(_, acc, weight, tokens, meta):
    return _instructions(acc, weight, utils.memref_transpose(tokens, (1, 0, 3, 2)), meta, half)

  return product(acc, weight, tokens, hopper.load(meta, registers))


# The instructions themselves, in MLIR.


def _instructions(acc: Any, weight: Any, tokens: Any, meta: Any, half: int) -> Any:
  """Emits instructions of depth 32, waits for them, and returns the sums. `weight` is compressed; `tokens [depth, n]`.

  No instruction stays in flight: ptxas does not know that an instruction in flight still reads its metadata, and would
  give the registers of the metadata to the next operation. The other warpgroup multiplies meanwhile.
  """
  (depth, n), element = mma_utils.tiled_memref_shape(tokens)
  first, second = (dict(swizzle=size, logical_k_major=major) for size, major in ((depth, False), (128, True)))
  (a, (_, (a_stride,))), *_ = mma_utils.create_descriptor(weight, group_size=(ROWS, depth // 2), **first)
  (b, (b_inner, b_strides)), *_ = mma_utils.create_descriptor(
      tokens, group_size=(depth, n), mma_bytewidth_k=2 * INSTRUCTION, **second)
  acc = _dense.wgmma_fence(acc)
  sums, i32 = list(acc.registers.flat), ir.IntegerType.get_signless(32)
  (pair,) = meta.registers.flat  # the registers of this thread, each for two instructions
  for i in range(depth // INSTRUCTION):
    word = llvm.extractelement(pair, utils.c(half + i // 2, i32))
    at_b = sum(j * stride for j, stride in zip(np.unravel_index(i, (depth, *b_inner)), b_strides))
    sums = _instruction(sums, _moved(a, i * a_stride), _moved(b, int(at_b)), word, i % 2, n, element)
  nvvm.wgmma_commit_group_sync_aligned()
  nvvm.wgmma_wait_group_sync_aligned(0)
  registers = np.array(sums, dtype=object).reshape(acc.registers.shape)
  return fragmented_array.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)


def _moved(descriptor: Any, nbytes: int) -> Any:
  offset = utils.c(mma_utils.encode_addr(nbytes), ir.IntegerType.get_signless(64))
  return llvm.add(descriptor, offset, overflow_flags=llvm.IntegerOverflowFlags.none)


def _instruction(sums: list[Any], a: Any, b: Any, word: Any, selector: int, n: int, element: Any) -> list[Any]:
  """Emits one `wgmma.mma_async.sp.m64n{n}k32`, returns the sums; `selector` says which half of threads has metadata."""
  count, single = n // 2, ir.VectorType.get((1,), ir.F32Type.get())
  i32 = ir.IntegerType.get_signless(32)
  constraints = ','.join([*['=f'] * count, *map(str, range(count)), 'l', 'l', 'r', 'n'])
  registers = '{' + ','.join(f'${i}' for i in range(count)) + '}'
  a_at, b_at, word_at, add_at = (f'${2 * count + i}' for i in range(4))
  kind = str(element)
  text = (f'{{ .reg .pred p; setp.ne.b32 p, {add_at}, 0; '
          f'wgmma.mma_async.sp.sync.aligned.m64n{n}k{INSTRUCTION}.f32.{kind}.{kind} '
          f'{registers}, {a_at}, {b_at}, {word_at}, {selector}, p, 1, 1, 0, 0; }}\n')
  add = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 1)).result
  results = llvm.inline_asm(llvm.StructType.get_literal([single] * count), [*sums, a, b, word, add], text, constraints,
                            asm_dialect=0, has_side_effects=True)
  return [llvm.extractvalue(single, results, [i]) for i in range(count)]
