"""Holds the parts that the kernels for TPUs share: dtypes that Mosaic takes, tiles of tokens, and precision.

Neither this module nor any `tpu.py` of an op was run on a TPU. Interpret mode has checked the numbers, and the kernels
lower for TPU; nothing else is known.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.types import Array

LANES, SUBLANES = 128, 16  # of a vector register of 16-bit numbers
TILES = 12 * 2**20  # bytes of VMEM for a kernel's tiles; the compiler's stack needs the rest of the 16 MiB
SCALARS = 2**19  # bytes of prefetched indices: half of the 1 MiB of scalar memory of v4 and later


def refused_dtypes(*arrays: Array) -> str | None:
  """Returns why Mosaic cannot multiply arrays of these dtypes, with the remedy, or `None`."""
  for dtype in (a.dtype for a in arrays):
    if dtype not in (jnp.float32, jnp.bfloat16):
      return f'TPUs multiply float32 and bfloat16, not {dtype}; cast to bfloat16'
  return None


def precision(dtype: np.dtype) -> jax.lax.Precision:
  """Returns the precision of `x @ w` outside of a kernel: the default, one pass in bfloat16, or the highest.

  The highest applies to float32 if `jax.default_matmul_precision` asks for more than bfloat16.
  """
  more = jax.config.jax_default_matmul_precision not in (None, 'default', 'fastest', 'bfloat16')
  return jax.lax.Precision.HIGHEST if more and dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dot(a: Array, b: Array, i: int, j: int) -> Array:
  """Returns the product of two matrices of one dtype over axis `i` of `a` and axis `j` of `b`, in float32."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), precision=precision(a.dtype),
                             preferred_element_type=jnp.float32)


def tile(length: int, most: int, multiple: int) -> int:
  """Returns the length of equal tiles that cover `length`: a multiple of `multiple`, at most `most` if possible."""
  count = -(-length // max(most - most % multiple, multiple))
  return -(-length // (count * multiple)) * multiple


def filled(x: Array, axis: int, multiple: int) -> Array:
  """Returns `x` with zeros appended along `axis`, up to a multiple of `multiple`."""
  pads = [(0, -n % multiple if a == axis else 0) for a, n in enumerate(x.shape)]
  return jnp.pad(x, pads) if x.shape[axis] % multiple else x


def result(shape: tuple[int, ...], dtype: np.dtype, *operands: Array) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of a kernel's result.

  Under `shard_map`, the result varies over every mesh axis that any of `operands` varies over.
  """
  kinds = [jax.typeof(a).manual_axis_type for a in operands]
  varying = frozenset().union(*(kind.varying for kind in kinds))
  kind = next((kind for kind in kinds if kind.varying == varying), None)
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
