"""Multiplies by a `BlockSparseArray`: `block_sparse_matmul`, and `sampled_matmul` for the gradient of its values.

Only the implementation 'dense' makes the dense weight or its dense gradient.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from kernels_pallas.block_sparse import reference
from kernels_pallas.dispatch import Choice, Implementation
from sparsejax.formats import BlockSparseArray
from sparsejax.types import Array


def block_sparse_matmul(x: Array, w: BlockSparseArray, *, implementation: str | None = None,
                        explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]` times the block-sparse `w`: `[..., *outputs]`, in x's dtype, summed in float32.

  K is the length of the contracted axes of `w`, merged. The result is differentiable in `x` and `w.values`; the
  gradient of the values is computed at the stored blocks only. Lengths that the blocks do not divide are padded with
  zeros. Derivatives of every order and mode are those of the dense product, at the stored blocks. NaN and infinity in
  `x` do not spread through blocks that are not stored, but in the implementation 'dense', as in a dense product.

  `implementation` is 'xla', 'dense', 'mosaic_gpu' or 'mosaic_tpu', and raises `ValueError` if it cannot run. `None`
  lets the platform choose when the program is lowered. `explain=True` returns the choice of each platform and its
  reason instead of the product. Raises `ValueError` with the `refusal` of `x` and `w`.
  """
  if reason := refusal(x, w):
    raise ValueError(f'block_sparse_matmul: {reason}.')
  flat = _filled(products.as_matrix(x), w.grid[0] * w.block[0])
  if explain:
    return PRODUCT.explained(flat, w)
  shape = (*x.shape[:-1], *w.output_sizes)
  if 0 in flat.shape or 0 in w.grid:
    return jnp.zeros(shape, x.dtype)
  y = PRODUCT(flat, w, w.grid[1] * w.block[1], implementation)
  return y[:, :math.prod(w.output_sizes)].reshape(shape)


def sampled_matmul(x: Array, dy: Array, like: BlockSparseArray, *, implementation: str | None = None,
                   explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x^T dy`, summed in float32, at the stored blocks of `like`: the shape and dtype of `like.values`.

  `x` is `[..., K]` and `dy` is `[..., *outputs]`. The result, `[nnz, bk, bn]`, is the gradient of `block_sparse_matmul`
  with respect to the values; it is not differentiable itself. Entries that only pad a block are zero, and so are blocks
  that are stored only to pad a row or a column. `implementation` and `explain` are those of `block_sparse_matmul`.
  """
  if reason := refusal(x, like):
    raise ValueError(f'sampled_matmul: {reason}.')
  if dy.shape != (*x.shape[:-1], *like.output_sizes):
    raise ValueError(f'sampled_matmul: dy of shape {dy.shape} must be {(*x.shape[:-1], *like.output_sizes)}, as '
                     f'block_sparse_matmul gives for x of shape {x.shape} and a weight of shape {like.shape}.')
  (bk, bn), (kb, nb) = like.block, like.grid
  x, dy = products.as_matrix(x), dy.reshape(math.prod(x.shape[:-1]), math.prod(like.output_sizes))
  args = (_filled(x, kb * bk), _filled(dy, nb * bn), like)
  if explain:
    return dispatch.chosen(args, SAMPLED, prefer)
  if 0 in args[0].shape or 0 in args[1].shape:
    return jnp.zeros_like(like.values)
  return reference.trained(dispatch.run('sampled_matmul', args, SAMPLED, implementation, prefer), like)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `block_sparse_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  return products.refusal(x, w, BlockSparseArray) or products.refused_stack(w, w.values.ndim != 3)


def prefer(*args: Any) -> Choice:
  """Returns the choice between 'xla' and 'dense' that was faster on a CPU (`make bench`)."""
  w = args[-1]
  share = 1 - w.density
  if min(w.block) < 16:
    return Choice('dense', f'blocks of {w.block} are too small to be faster than dense')
  least = 0.45 if w.block[1] >= 64 else 0.6 if w.block[1] >= 32 else 0.75
  if share < least:
    return Choice('dense', f'{share:.0%} of the blocks are zero, and {w.block} pays from {least:.0%} on')
  return Choice('xla', f'{share:.0%} of the blocks are zero')


def _filled(x: Array, length: int) -> Array:
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) if x.shape[1] < length else x


# The implementation 'dense' unpacks the weight inside of the program.


def _dense(w: BlockSparseArray) -> Array:
  """Returns the dense weight, padded to whole blocks, `[Kb bk, Nb bn]`."""
  (kb, nb), (bk, bn) = w.grid, w.block
  blocks = jnp.zeros((kb, nb, bk, bn), w.dtype).at[w.rows, w.cols].set(w.values, mode='promise_in_bounds')
  return blocks.transpose(0, 2, 1, 3).reshape(kb * bk, nb * bn)


def _dense_sampled(x: Array, dy: Array, w: BlockSparseArray) -> Array:
  (kb, nb), (bk, bn) = w.grid, w.block
  blocks = products.dot(x, dy, 0, 0).reshape(kb, bk, nb, bn).transpose(0, 2, 1, 3)
  return blocks[w.rows, w.cols].astype(w.dtype)


def _transposed(dy: Array, w: BlockSparseArray) -> Array:
  """Returns `dy [M, N]` times the transpose of `w`, `[M, K]`. XLA drops the unread gradient of the values."""
  return reference.gradients(jnp.zeros((len(dy), w.grid[0] * w.block[0]), dy.dtype), dy, w)[0]


def _table(xla: Any, dense: Any, kernel: Callable[[Any], Any]) -> products.Table:
  """Returns the implementations of one direction.

  `kernel(module)` returns the function of the module `gpu` or `tpu`. A module is imported at its first use, because
  importing Pallas takes a second.
  """
  def of(name: str) -> Implementation:
    module = lambda: importlib.import_module(f'kernels_pallas.block_sparse.{name}')
    return Implementation(lambda *args: kernel(module())(*args), lambda *args: module().refusal(args[0], args[-1]))

  return {'xla': Implementation(xla), 'dense': Implementation(dense), 'mosaic_gpu': of('gpu'), 'mosaic_tpu': of('tpu')}


SAMPLED = _table(reference.sampled, _dense_sampled, lambda pallas: pallas.sampled)
PRODUCT = products.TrainableProduct(
    'block_sparse_matmul',
    _table(reference.matmul, lambda x, w: products.dot(x, _dense(w), 1, 0).astype(x.dtype),
           lambda pallas: pallas.matmul),
    _table(_transposed, lambda dy, w: products.dot(dy, _dense(w), 1, 1).astype(dy.dtype),
           lambda pallas: pallas.matmul_transposed), SAMPLED, prefer, reference.trained)
