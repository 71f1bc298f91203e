"""Says why an array cannot be packed, each time with the remedy; `None` if the array can.

    misfits.host_misfit(jnp.ones((2, 2), 'int4'))      # 'dtype int4 cannot be packed; ...'
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import conventions, errors
from sparsejax.arguments import is_known
from sparsejax.types import Array, Axes

TRACED = ('its values are not known here (traced, or a mere shape), so its zeros cannot be counted. Pack outside of '
          'jit, vmap and grad, or, for N:M, with check=False: then each group keeps its first N nonzeros only.')


def matrix_misfit(axes: Axes) -> str | None:
  """Returns why `axes` of `matrix_axes` describe neither a matrix nor a stack of matrices, or `None`."""
  if axes.source == 'unknown':
    return f'neither name, rank nor container says which axes are contracted. {conventions.REMEDY}'
  if axes.spatial:
    return f'its spatial axes {axes.spatial} are not of length one; only 1x1 convolutions are products of matrices.'
  if sorted(axes.layer) != list(range(len(axes.layer))):
    return f'its axes {axes.layer} of a stack must come first; move them there.'
  if not axes.contracted or not axes.output:
    return 'a matrix has both contracted and output axes; leave it out of `where`.'
  return None


def dtype_misfit(dtype: np.dtype) -> str | None:
  """Returns why arrays of `dtype` cannot be packed, or `None`."""
  bits = 8 if jnp.issubdtype(dtype, jnp.bool_) else None
  if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer):
    bits = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits
  if bits not in (8, 16, 32, 64):
    return f'dtype {dtype} cannot be packed; real numbers of 8, 16, 32 and 64 bits can. Leave it out of `where`.'
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    return f'dtype {dtype} would be truncated; set jax_enable_x64, or cast it to 32 bits first.'
  return None


def mask_misfit(w: Array, mask: Array | None) -> str | None:
  """Returns why `mask` cannot choose the stored entries of `w`, or `None`."""
  if mask is not None and (tuple(mask.shape) != tuple(w.shape) or mask.dtype != bool):
    return f'mask of shape {tuple(mask.shape)} and dtype {mask.dtype} must be bool of the same shape.'
  if mask is not None and not is_known(mask):
    return 'its mask has no values here (traced, or a mere shape). Pack outside of jit, vmap and grad.'
  return None


def stack_misfit(stored: np.ndarray, units: str) -> str | None:
  """Returns why the layers of a stack, of which the bool masks `stored` say what is stored, do not fit, or `None`."""
  counts = {str(matrix.sum()) for matrix in stored}
  return None if len(counts) <= 1 else (
      f'the matrices of the stack have different numbers of {units}, {errors.some(sorted(counts))}; pack them one by '
      'one, or prune all to the same.')


def host_misfit(w: Array) -> str | None:
  """Returns why `w` cannot be packed on the host, or `None`."""
  if w.size >= 2**31:
    return 'it has 2^31 weights or more; leave it out of `where`.'
  return dtype_misfit(w.dtype) or (None if is_known(w) else TRACED)
