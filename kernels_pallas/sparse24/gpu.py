"""The product with a 2:4 weight on Hopper's sparse tensor cores: `wgmma.mma_async.sp`, which Mosaic has no name for.

Not run on a GPU yet, and interpret mode does not cover it: what is known is that it lowers, and that the metadata are
those that CUTLASS documents. Optional: nothing else depends on this module, which uses parts of Mosaic that change.

The sparse operand must be the first, so what is computed is `y^T = w^T x^T`: outputs are rows. With few tokens the
product waits for the weight's bytes, nine sixteenths of the dense ones; there K is divided among multiprocessors.
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

from kernels_pallas import gpu
from sparsejax.formats import Sparse24Array
from sparsejax.types import Array

_dense = importlib.import_module('jax.experimental.mosaic.gpu.wgmma')  # there also the name of a function

ROWS, DEPTH, INSTRUCTION = 64, 128, 32  # outputs of a warpgroup, depth of a step, and of an instruction
OUTPUTS = gpu.COMPUTE * ROWS


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes: tokens of an output tile, parts that K is divided into, steps in shared memory."""

  tokens: int
  splits: int
  slots: int

  def written(self, dtype: Any) -> Any:
    """The dtype of what the kernel writes: float32 for what is yet to be added, and for rows of less than 32 bytes."""
    return np.dtype(np.float32 if self.splits > 1 or self.tokens < 16 else dtype)


def tiles(tokens: int, outputs: int, steps: int, dtype: np.dtype) -> Tiles:
  """For that many tokens, outputs, and steps along K."""
  wide = next(n for n in (8, 16, 32, 64, 128, 256) if n >= min(tokens, 256))
  units = -(-outputs // OUTPUTS) * -(-tokens // wide)
  splits = max(1, min(gpu.cores() // units, steps // 4))
  stage = gpu.nbytes((OUTPUTS, DEPTH // 2), dtype) + gpu.nbytes((OUTPUTS, DEPTH // 16), 'int8') * 2
  stage += gpu.nbytes((wide, DEPTH), dtype)
  t = Tiles(wide, splits, 0)
  staging = gpu.nbytes((OUTPUTS, 2, min(wide, 64)), t.written(dtype))
  return dataclasses.replace(t, slots=gpu.slots(stage, staging, 8))


def refusal(x: Array, w: Sparse24Array) -> str | None:
  """Why this kernel cannot take these shapes and dtypes, and the remedy."""
  del w
  return gpu.refused_dtype(x.dtype)


def matmul(x: Array, w: Sparse24Array, *, sizes: Tiles | None = None) -> Array:
  """`x [M, Kp]`, filled up as `w` is, times `w`: `[M, Np]` in x's dtype, summed in float32."""
  count = x.shape[0]
  values, metadata = w.values.astype(x.dtype), w.metadata.reshape(*w.metadata.shape[:2], 2, 128)
  outputs = values.shape[0]
  if outputs % OUTPUTS:
    values, metadata = gpu.filled(values, OUTPUTS), jnp.pad(metadata, ((0, 1), (0, 0), (0, 0), (0, 0)))
  steps = metadata.shape[1]
  t = sizes or tiles(count, outputs, steps, x.dtype)
  y = _product(gpu.filled(x, t.tokens), values, metadata, t)
  y = y[0] if t.splits == 1 else jnp.sum(y, axis=0)
  return y[:outputs, :count].T.astype(x.dtype)


def _product(x: Array, values: Array, metadata: Array, t: Tiles) -> Array:
  """`[splits, N, M]`: the transposed product, or the parts that it is the sum of."""
  (rows, steps), columns = metadata.shape[:2], x.shape[0] // t.tokens
  rows //= gpu.COMPUTE
  dtype = t.written(x.dtype)
  sums = plgpu.Layout._WGMMA_ACC_32BIT
  piece = min(t.tokens, 64)

  def body(values, metadata, x, y, weight, meta, tile, staging, full, free):
    wg = lax.axis_index('wg')

    def named(i):  # 16 rows go through all columns together: they stay in the L2 cache
      row, rest = gpu.banded(i, rows, columns * t.splits, 16)
      return row, lax.rem(rest, jnp.int32(t.splits)), lax.div(rest, jnp.int32(t.splits))

    begin = lambda split: lax.div(split * steps, jnp.int32(t.splits))
    trips = lambda at: begin(at[1] + 1) - begin(at[1])

    def copy(at, step, slot):
      row, split, column = at
      depth = begin(split) + step
      half = DEPTH // 2
      plgpu.copy_gmem_to_smem(values.at[pl.ds(row * OUTPUTS, OUTPUTS), pl.ds(depth * half, half)], weight.at[slot],
                              full.at[slot])
      plgpu.copy_gmem_to_smem(metadata.at[pl.ds(row * gpu.COMPUTE, gpu.COMPUTE), depth], meta.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(x.at[pl.ds(column * t.tokens, t.tokens), pl.ds(depth * DEPTH, DEPTH)], tile.at[slot],
                              full.at[slot])

    def compute(at, count):
      def step(i, carry):
        count, acc = carry
        slot = lax.rem(count, jnp.int32(t.slots))
        plgpu.barrier_wait(full.at[slot])
        acc = _multiply(acc, weight.at[slot, pl.ds(wg * ROWS, ROWS)], meta.at[slot, wg], tile.at[slot])
        plgpu.barrier_arrive(free.at[slot])
        return count + 1, acc

      zero = plgpu.layout_cast(jnp.zeros((ROWS, t.tokens), jnp.float32), sums)
      count, acc = lax.fori_loop(jnp.int32(0), trips(at), step, (count, zero))
      value = plgpu.layout_cast(acc, plgpu.Layout.WGMMA).astype(y.dtype)
      row, split, column = at
      gpu.store(value, staging.at[wg], lambda r, c: y.at[
          split, pl.ds(row * OUTPUTS + wg * ROWS + r, ROWS), pl.ds(column * t.tokens + c, piece)])
      return count

    gpu.ring(columns * t.splits * rows, named, trips, copy, compute, free, t.slots)

  full, free = gpu.barriers(t.slots, 3)
  scratch = {'weight': gpu.shared((t.slots, OUTPUTS, DEPTH // 2), x.dtype),
             'meta': plgpu.SMEM((t.slots, gpu.COMPUTE, 2, 128), jnp.int32),
             'tile': gpu.shared((t.slots, t.tokens, DEPTH), x.dtype),
             'staging': gpu.shared((gpu.COMPUTE, 2, ROWS, piece), dtype), 'full': full, 'free': free}
  out = jax.ShapeDtypeStruct((t.splits, rows * OUTPUTS, x.shape[0]), dtype)
  blocks = min(gpu.cores(), columns * t.splits * rows)
  return gpu.kernel(body, out, (values, metadata, x), blocks=blocks, scratch=scratch, lanes=True)


def _multiply(acc: Array, weight: Any, meta: Any, tokens: Any) -> Array:
  """`acc [64, n]` plus the sparse `weight [64, 128]` times the transpose of `tokens [n, 128]`."""
  sums = plgpu.Layout._WGMMA_ACC_32BIT
  registers = plgpu.Layout.WG_STRIDED((2, 128), vec_size=2)
  tiled = plgpu.RefType(gpu.transforms(DEPTH // 2, tokens.dtype))
  inputs = (sums, tiled, tiled, registers)
  result = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=sums)

  @plgpu.inline_mgpu(arg_types=inputs, return_type=result)
  def product(_, acc, weight, tokens, meta):
    return _instructions(acc, weight, utils.memref_transpose(tokens, (1, 0, 3, 2)), meta)

  return product(acc, weight, tokens, gpu.load(meta, registers))


# Below, MLIR: the instructions themselves.


def _instructions(acc: Any, weight: Any, tokens: Any, meta: Any) -> Any:
  """Four instructions of depth 32, and the wait for them. `weight` is `[64, 64]` compressed, `tokens` `[128, n]`."""
  (depth, n), element = mma_utils.tiled_memref_shape(tokens)
  first, second = (dict(swizzle=128, logical_k_major=major) for major in (False, True))
  (a, (_, (a_stride,))), *_ = mma_utils.create_descriptor(weight, group_size=(ROWS, depth // 2), **first)
  (b, (b_inner, b_strides)), *_ = mma_utils.create_descriptor(
      tokens, group_size=(depth, n), mma_bytewidth_k=2 * INSTRUCTION, **second)
  (inner,), (outer_stride, inner_stride) = b_inner, b_strides
  acc = _dense.wgmma_fence(acc)
  sums, i32 = list(acc.registers.flat), ir.IntegerType.get_signless(32)
  (pair,) = meta.registers.flat  # of this thread; each register is that of two instructions
  for i in range(depth // INSTRUCTION):
    word = llvm.extractelement(pair, utils.c(i // 2, i32))
    at_a, at_b = i * a_stride, i // inner * outer_stride + i % inner * inner_stride
    sums = _instruction(sums, _moved(a, at_a), _moved(b, at_b), word, i % 2, n, element)
  nvvm.wgmma_commit_group_sync_aligned()
  nvvm.wgmma_wait_group_sync_aligned(0)
  registers = np.array(sums, dtype=object).reshape(acc.registers.shape)
  return fragmented_array.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)


def _moved(descriptor: Any, nbytes: int) -> Any:
  offset = utils.c(mma_utils.encode_addr(nbytes), ir.IntegerType.get_signless(64))
  return llvm.add(descriptor, offset, overflow_flags=llvm.IntegerOverflowFlags.none)


def _instruction(sums: list[Any], a: Any, b: Any, word: Any, selector: int, n: int, element: Any) -> list[Any]:
  """One `wgmma.mma_async.sp.m64n{n}k32`; `selector` says which half of the threads has its metadata."""
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
  found = llvm.inline_asm(llvm.StructType.get_literal([single] * count), [*sums, a, b, word, add], text, constraints,
                          asm_dialect=0, has_side_effects=True)
  return [llvm.extractvalue(single, found, [i]) for i in range(count)]
