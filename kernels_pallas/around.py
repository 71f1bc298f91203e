"""Multiplies by weights that are quantized, wrapped in two matrices, or have thresholds for their inputs.

    y = scaled_matmul(x, formats.Scaled.of(packed, quantize))     # x times codes and scales
    y = wrapped_matmul(x, wrapped)                                # x times three factors, one after the other
    y = threshold_matmul(x, formats.ActiveArray.of(w, 0.1))       # x without its small entries, times w

All end in the op of the array that they hold. A `Scaled` of blocks of one output, as in GQSA, has a matvec of
its own: each block is multiplied as whole numbers, and scaled once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import active, block_sparse, dispatch, ell, n_m, products, sparse24, unstructured
from kernels_pallas.dispatch import Choice, Choices
from sparsejax.formats import ActiveArray, BlockSparseArray, Scaled, Wrapped
from sparsejax.formats.wrapped import multiplied
from sparsejax.programs import hlo
from sparsejax.types import Array

_FEW = 4  # tokens up to which the blocks of one output are multiplied as they are


class Op(NamedTuple):
  """An `Op` holds the functions that multiply by one kind of packed weight.

  `multiply(x, w, implementation=None, explain=False)` contracts the last axis of `x`. With `explain`, `multiply`
  returns the implementations that it would run. `refusal(x, w)` returns why no implementation can multiply `x` by `w`,
  or `None`; only shapes and dtypes are read. An error of `multiply` that `refusal` does not announce is raised.
  """

  multiply: Callable[..., Any]
  refusal: Callable[[Any, Any], str | None]


OPS = {  # by kind of format; `OPS[kind] = Op(multiply, refusal)` adds one
    'block_sparse': Op(block_sparse.block_sparse_matmul, block_sparse.refusal),
    'csc': Op(unstructured.unstructured_matmul, unstructured.refusal),
    'ell': Op(ell.ell_matmul, ell.refusal),
    'nm': Op(n_m.nm_matmul, n_m.refusal),
    'sparse24': Op(sparse24.sparse24_matmul, sparse24.refusal)}


def scaled_matmul(x: Array, w: Scaled, *, implementation: str | None = None, explain: bool = False) -> Any:
  """Returns `x [..., K]` times the quantized weight `w`: `[..., *outputs]`, in x's dtype, summed in float32.

  The program computes the rounded weights in the dtype of `w.values`. The op of the packed array then multiplies with
  this `implementation`. Up to 4 tokens by blocks of one output, `Block((k, 1))`, have a matvec 'xla' of their own (Zeng
  et al. 2024, GQSA, 2412.17560). In this matvec, one scale multiplies the sum of a block. The result is differentiable
  in `x` and in `w.values`, the scales. `explain=True` returns the choice of each platform. Raises `ValueError` with the
  `refusal` of `x` and `w`.
  """
  if reason := scaled_refusal(x, w):
    raise ValueError(f'scaled_matmul: {reason}.')
  flat = products.as_matrix(x)
  if _in_groups(flat, w) and implementation in (None, 'xla'):
    if explain:
      why = Choice('xla', f'{len(flat)} tokens: whole numbers by groups, scaled once a group')
      return Choices({platform: why for platform in ('cpu', *dispatch.PLATFORMS)})
    return products.each_token(lambda row: _by_groups(row, w), flat).reshape(*x.shape[:-1], *w.opened().output_sizes)
  opened = w.opened()
  return OPS[opened.kind].multiply(x, opened, implementation=implementation, explain=explain)


def scaled_refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `scaled_matmul` cannot multiply `x` by `w`, with the remedy, or `None`."""
  if not isinstance(w, Scaled):
    return f'the weight must be a formats.Scaled, not {type(w).__name__}; Scaled.of quantizes an array'
  kind = 'dense' if w.held is None else w.held.kind
  if kind not in OPS:
    return f'no op multiplies by a {kind} array; unpack it, or take N:M, blocks, CSC or ELL'
  return OPS[kind].refusal(x, jax.eval_shape(lambda w: w.opened(), w))


def _in_groups(flat: Array, w: Scaled) -> bool:
  """Returns whether few tokens meet blocks of one output, with one scale a block."""
  held = w.held
  return (0 < len(flat) <= _FEW and isinstance(held, BlockSparseArray) and w.entries[-1] == 1
          and held.contracted_size % w.entries[-2] == 0 and w.values.shape[-2] == 1 and w.zero is None)


def _by_groups(row: Array, w: Scaled) -> Array:
  """Returns one token `[K]` times blocks of one output, `[N]`."""
  whole = dataclasses.replace(w, values=jnp.ones_like(w.values)).weights()  # numbers before the scale, [G, blocks]
  held: Any = w.held
  parts = row.reshape(-1, w.entries[-2])[held.rows].astype(jnp.float32)
  of_block = jnp.sum(parts * whole.T.astype(jnp.float32), 1) * w.values[0].astype(jnp.float32)
  count = math.prod(held.output_sizes)
  return jax.ops.segment_sum(of_block, held.cols, count, indices_are_sorted=True).astype(row.dtype)


def wrapped_matmul(x: Array, w: Wrapped, *, implementation: str | None = None, explain: bool = False) -> Any:
  """Returns `x [..., K]` times the three factors of `w`, one after the other: `[..., *outputs]`, in x's dtype.

  The outer factors are block-diagonal. `nm_matmul` multiplies by the core with this `implementation`. The result is
  differentiable in `x` and in all factors. `explain=True` returns the choice of each platform for the core. Raises
  `ValueError` with the `refusal` of `x` and `w`.
  """
  if reason := wrapped_refusal(x, w):
    raise ValueError(f'wrapped_matmul: {reason}.')
  if explain:
    return n_m.nm_matmul(x, w.core, explain=True)
  y: Any = n_m.nm_matmul(multiplied(x, w.right.swapaxes(-1, -2)), w.core, implementation=implementation)
  rows = y.reshape(*x.shape[:-1], -1)
  return multiplied(rows, w.left.swapaxes(-1, -2)).reshape(y.shape)


def wrapped_refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `wrapped_matmul` cannot multiply `x` by `w`, with the remedy, or `None`."""
  if not isinstance(w, Wrapped):
    return f'the weight must be a formats.Wrapped, not {type(w).__name__}; recipes.armor makes such weights'
  return n_m.refusal(x, w.core)


def threshold_matmul(x: Array, w: ActiveArray, *, implementation: str | None = None, explain: bool = False) -> Any:
  """Returns `x [..., K]`, without its entries below `w.threshold`, times the weight of `w`: `[..., N]`, in x's dtype.

  `active_matmul` multiplies by a dense weight, in blocks of 16 inputs, or of as many as divide K. The op of a packed
  weight multiplies x with zeros for what is skipped. With `w.left` and `w.right`, the skipped entries times both are
  added (R-Sparse, Zhang et al. 2025, 2504.19449). A weight whose `outputs` are skipped is multiplied whole here:
  `packed` calls `active.active_outputs` where a program multiplies the outputs by zeros. `implementation` and `explain`
  are those of the op. Raises `ValueError` with the `refusal` of `x` and `w`.
  """
  if reason := threshold_refusal(x, w):
    raise ValueError(f'threshold_matmul: {reason}.')
  if w.outputs:
    return _whole(x, w, implementation, explain)
  kept = x if explain else active.passed(x, w.threshold)
  if w.held is None:
    block = math.gcd(BLOCK, w.contracted_size)
    y = active.active_matmul(kept, w.values, block=block, implementation=implementation, explain=explain)
  else:
    y = OPS[w.held.kind].multiply(kept, w.opened(), implementation=implementation, explain=explain)
  if explain or w.left is None:
    return y
  skipped = jnp.where(kept == 0, x, jnp.zeros((), x.dtype))
  rest = products.dot(products.as_matrix(skipped), w.left.astype(x.dtype), 1, 0)
  rest = products.dot(rest.astype(x.dtype), w.right.astype(x.dtype), 1, 0)  # type: ignore[union-attr]
  return y + rest.reshape(y.shape).astype(x.dtype)


BLOCK = 16  # inputs or outputs that are skipped together, if this divides their number


def _whole(x: Array, w: ActiveArray, implementation: str | None, explain: bool) -> Any:
  """Returns `x` times all outputs of a weight `[N, K]`."""
  choice = Choice('dense', 'the program multiplies its outputs by no zeros that could be skipped')
  if explain:
    return Choices({platform: choice for platform in ('cpu', *dispatch.PLATFORMS)})
  y = products.dot(products.as_matrix(x), w.values.astype(x.dtype), 1, 1)
  return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def bytes_read(x: Array, w: ActiveArray, *, implementation: str | None = None) -> int:
  """Returns how many bytes of `w.values` the compiled `threshold_matmul(x, w)` reads for these tokens.

  The text of the compiled program tells which operations read the weight, and what a round of the loop over active
  blocks reads. The tokens tell the number of rounds, and whether there are too many active blocks for the loop.
  """
  if reason := threshold_refusal(x, w):
    raise ValueError(f'bytes_read: {reason}.')
  leaves, structure = jax.tree.flatten((x, w))
  number = [i for i, leaf in enumerate(leaves) if leaf is w.values][0]
  found = _reads(structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves), number, implementation)
  block = math.gcd(BLOCK, w.skippable)
  count = int(active.reference.active_blocks(products.as_matrix(active.passed(x, w.threshold)), block)[1])
  capacity = int(active.CAPACITY * (w.skippable // block))
  rounds = -(-count // active.reference.blocks_of_step(block, w.skippable // block))
  if all(read.times is not None for read in found):  # no loop is left: of the dense and the sparse branch, one runs
    branches = [read.bytes * (read.times or 0) for read in found if read.branch]
    return sum(read.bytes * (read.times or 0) for read in found if not read.branch) + max(branches, default=0)
  chosen = [read for read in found if not read.branch or (read.times is None) == (count <= capacity)]
  return sum(read.bytes * (rounds if read.times is None else read.times) for read in chosen)


@functools.lru_cache(maxsize=256)
def _reads(structure: Any, leaves: tuple[Any, ...], number: int, implementation: str | None) -> list[hlo.Read]:
  """Returns what the compiled product reads of leaf `number`; products of the same shapes are compiled once."""
  run = jax.jit(lambda x, w: threshold_matmul(x, w, implementation=implementation), keep_unused=True)
  shapes = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
  return hlo.reads(run.lower(*shapes).compile().as_text(), number)


def threshold_refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `threshold_matmul` cannot multiply `x` by `w`, with the remedy, or `None`."""
  if not isinstance(w, ActiveArray):
    return f'the weight must be a formats.ActiveArray, not {type(w).__name__}; ActiveArray.of gives it thresholds'
  if w.held is None:
    values = jax.ShapeDtypeStruct(w.values.shape[::-1] if w.outputs else w.values.shape, w.values.dtype)
    return active.refusal(x, values)
  if w.held.kind not in OPS:
    return f'no op multiplies by a {w.held.kind} array; unpack it, or take N:M, blocks, CSC or ELL'
  return OPS[w.held.kind].refusal(x, w.opened())


OPS |= {'active': Op(threshold_matmul, threshold_refusal), 'scaled': Op(scaled_matmul, scaled_refusal),
        'wrapped': Op(wrapped_matmul, wrapped_refusal)}
