"""Multiplies few nonzero inputs by a dense weight, `active_matmul`, or gives few outputs, `active_outputs`."""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from kernels_pallas.active import reference
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.linear import Derivative, differentiable
from sparsejax.types import Array

_MOST_TOKENS = 16
_LEAST_BYTES = 2**24
CAPACITY = 0.75  # default capacity, as a fraction of the blocks


def active_matmul(x: Array, w: Array, *, threshold: Any = None, mask: Array | None = None, block: int = 16,
                  capacity: int | None = None, implementation: str | None = None,
                  explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]`, with small or masked entries set to zero, times the dense `w [K, N]`: `[..., N]` in x's
  dtype.

  `threshold` is a number or `[K]`: entries of `x` whose magnitude is below `threshold` are skipped (TEAL, Liu et al.
  2024, arXiv 2408.14690). NaN is not below any threshold. `mask` is bool, `[K]` or of the shape of `x`: entries where
  `mask` is `False` are skipped. The result is the product of the dense arrays with zeros for skipped entries, summed in
  float32.

  `block` must divide K. A block of `block` rows of `w` is active if any token has a nonzero in the block, and only
  active blocks are read. If more than `capacity` blocks (by default three quarters of all) are active, the dense
  product is computed instead, which is then faster. The result is differentiable in `w`, with a dense gradient, and in
  the entries of `x` that lie in active blocks and are not skipped. All orders and both modes of derivatives exist;
  forward mode and second derivatives multiply dense.

  `implementation` is 'xla', 'dense', 'mosaic_gpu' or 'mosaic_tpu', and raises `ValueError` if it cannot run. Neither
  kernel has run on its device yet. `None` takes the kernel where the platform has one that can run, and elsewhere the
  choice of `prefer`.
  `explain=True` returns the choice of each platform and its reason instead of the product. Under `vmap` over `x`, 'xla'
  computes both the sparse and the dense product; pass all tokens in one call instead.
  """
  _check(x, w, threshold, mask, block, capacity)
  kept = passed(x, threshold, mask).reshape(-1, x.shape[-1])
  blocks = x.shape[-1] // block
  capacity = int(CAPACITY * blocks) if capacity is None else capacity
  table = _table(block, capacity)
  if explain:
    return dispatch.chosen((kept, w), table, prefer)
  if implementation is not None:
    dispatch.runnable('active_matmul', (kept, w), table, implementation)
  shape = (*x.shape[:-1], w.shape[1])
  if 0 in kept.shape or 0 in shape:
    return jnp.zeros(shape, x.dtype)
  return _compiled(_Options(block, capacity, implementation), *dispatch.varying_alike(kept, w)).reshape(shape)


def active_outputs(x: Array, w: Array, mask: Array, *, block: int = 16, capacity: int | None = None,
                   implementation: str | None = None, explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]` times the transpose of `w [N, K]` at the outputs of `mask`, and zeros elsewhere: `[..., N]`.

  `mask` is `bool[..., N]`. A block of `block` rows of `w` is read if any token has an output in the block. Where
  `block` does not divide N, blocks are as large as both allow. If more than `capacity` blocks are active, by default
  three quarters, all are read. Differentiable in `x` and `w`, in both modes, by dense products.

  `implementation` is 'xla', 'dense', 'mosaic_gpu' or 'mosaic_tpu', and raises `ValueError` if it cannot run. Neither
  kernel has run on its device yet. `None` and `explain=True` are as in `active_matmul`. Raises `ValueError` for other
  shapes, and for a capacity that is no number of blocks.
  """
  if w.ndim != 2 or x.shape[-1:] != w.shape[1:] or mask.shape != (*x.shape[:-1], w.shape[0]) or mask.dtype != bool:
    raise ValueError(f'active_outputs: x {x.shape}, w {w.shape} and mask {mask.dtype}{mask.shape} must be [..., K], '
                     '[N, K] and bool[..., N].')
  if reason := products.refused_dtype(x):
    raise ValueError(f'active_outputs: {reason}.')
  _check_whole('active_outputs', 'capacity', capacity, 0)
  _check_whole('active_outputs', 'block', block, 1)
  n, k = w.shape
  block = math.gcd(block, n)
  args = mask.reshape(-1, n).astype(x.dtype), w.astype(x.dtype), x.reshape(-1, k)
  options = _Options(block, int(CAPACITY * (n // block)) if capacity is None else capacity, implementation)
  table = _outputs_table(block, options.capacity)
  if explain:
    return dispatch.chosen(args, table, prefer)
  if implementation is not None:
    dispatch.runnable('active_outputs', args, table, implementation)
  if 0 in mask.shape or not k:
    return jnp.zeros(mask.shape, x.dtype)
  y = _outputs(options, *dispatch.varying_alike(*args))
  return jnp.where(mask, y.reshape(mask.shape), jnp.zeros((), x.dtype))


def refusal(x: Array | jax.ShapeDtypeStruct, w: Array | jax.ShapeDtypeStruct) -> str | None:
  """Returns why `active_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  if reason := products.refused_dtype(x):
    return reason
  if len(w.shape) != 2 or not x.shape or x.shape[-1] != w.shape[0]:
    return (f'x of shape {x.shape} and w of shape {w.shape} must be [..., K] and [K, N]; reshape them, and multiply by '
            'the matrices of a stack one at a time, with vmap or scan')
  return None


def prefer(x: Array, w: Array, *others: Array) -> Choice:
  """Returns the choice between 'xla' and 'dense' that was faster on a CPU."""
  del others
  if x.shape[0] > _MOST_TOKENS:
    return Choice('dense', f'{x.shape[0]} tokens: nearly every block is active for one of them; up to {_MOST_TOKENS}')
  if w.nbytes < _LEAST_BYTES:
    return Choice('dense', f'a weight of {w.nbytes} bytes lies in the cache; skipping pays from {_LEAST_BYTES} on')
  return Choice('xla', f'{x.shape[0]} tokens: reads the active blocks only, all if there are more than the capacity')


def _check(x: Array, w: Array, threshold: Any, mask: Array | None, block: int, capacity: int | None) -> None:
  if reason := refusal(x, w):
    raise ValueError(f'active_matmul: {reason}.')
  if not isinstance(block, int) or block < 1 or x.shape[-1] % block:
    raise ValueError(f'active_matmul: block {block!r} must be a whole number that divides K = {x.shape[-1]}; take one '
                     'that does, or pad x and w with zeros.')
  if mask is not None and (mask.dtype != bool or tuple(mask.shape) not in (tuple(x.shape), x.shape[-1:])):
    raise ValueError(f'active_matmul: mask of shape {mask.shape} and dtype {mask.dtype} must be bool and like x, '
                     f'{x.shape}, or [K], {x.shape[-1:]}; True is kept.')
  if threshold is not None and jnp.shape(threshold) not in ((), (1,), x.shape[-1:]):
    raise ValueError(f'active_matmul: threshold of shape {jnp.shape(threshold)} must be a number, or one for each of '
                     f'the {x.shape[-1]} inputs.')
  _check_whole('active_matmul', 'capacity', capacity, 0)


def _check_whole(op: str, name: str, value: int | None, least: int) -> None:
  if value is not None and not (isinstance(value, int) and least <= value):
    of = 'blocks' if least == 0 else 'rows'
    raise ValueError(f'{op}: {name} {value!r} must be a number of {of} that is known at trace time.')


def passed(x: Array, threshold: Any, mask: Array | None = None) -> Array:
  """Returns `x` with zeros for skipped entries. Magnitudes are compared in float32 or wider, as thresholds are."""
  wide = x.dtype if jnp.dtype(x.dtype).itemsize >= 4 else jnp.float32
  alike = lambda a: jnp.broadcast_to(jax.lax.stop_gradient(a), x.shape)
  below = lambda: jnp.abs(x).astype(wide) < alike(jnp.asarray(threshold, wide))
  skipped = jnp.zeros(x.shape, bool) if threshold is None else below()
  skipped = skipped if mask is None else skipped | ~alike(mask)
  return jnp.where(skipped, jnp.zeros((), x.dtype), x)


def _loaded(name: str) -> Any:
  """Returns the module of a platform. The module is imported at its first use: importing Pallas takes a second."""
  return importlib.import_module(f'kernels_pallas.active.{name}')


def _table(block: int, capacity: int) -> products.Table:
  run = functools.partial(reference.matmul, block=block, capacity=capacity)

  def kernel(name: str) -> Implementation:
    multiply = dispatch.folding(lambda x, w: _loaded(name).matmul(x, w, block, capacity))
    return Implementation(multiply, lambda x, w: _loaded(name).refusal(x, w, block))

  return {'xla': Implementation(lambda x, w: run(x, w.astype(x.dtype))),
          'dense': Implementation(lambda x, w: reference.dense(x, w.astype(x.dtype))),
          'mosaic_gpu': kernel('gpu'), 'mosaic_tpu': kernel('tpu')}


def _outputs_table(block: int, capacity: int) -> products.Table:
  """Returns the implementations of `active_outputs`, functions of the outputs that are wanted, the weight, and x."""
  def kernel(name: str) -> Implementation:
    multiply = dispatch.folding(lambda pair, w: _loaded(name).outputs(pair[1], pair[0], w, block, capacity))
    return Implementation(lambda wanted, w, x: multiply((wanted, x), w),
                          lambda wanted, w, x: _loaded(name).outputs_refusal(x, w, block))

  return {'xla': Implementation(lambda wanted, w, x: reference.matmul_transposed(x, wanted, w, block, capacity)),
          'dense': Implementation(lambda wanted, w, x: reference.dense_transposed(x, w)),
          'mosaic_gpu': kernel('gpu'), 'mosaic_tpu': kernel('tpu')}


class _Options(NamedTuple):
  """An `_Options` holds the arguments that are known at trace time."""

  block: int
  capacity: int
  implementation: str | None

  def entries(self, x: Array, w: Array) -> Array | None:
    """Returns which entries of `x`, `bool[K]`, have a derivative, or `None` if all have."""
    if (self.implementation or prefer(x, w).implementation) == 'dense':
      return None
    active = jnp.any((x != 0).reshape(len(x), -1, self.block), (0, 2))
    return jnp.repeat(active | (active.sum() > self.capacity), self.block)


def _tangent(options: _Options, args: Sequence[Array], tangents: Sequence[Array]) -> Array:
  (x, w), (dx, dw), entries = args, tangents, options.entries(*args)
  dx = dx if entries is None else jnp.where(entries, dx, jnp.zeros((), dx.dtype))
  return reference.dense(dx, w.astype(x.dtype)) + reference.dense(x, dw.astype(x.dtype))


def _gradient(options: _Options, args: Sequence[Array], dy: Array) -> tuple[Array, Array]:
  x, w = args
  return _transposed(options, x, dy, w.astype(dy.dtype)), products.dot(x, dy, 0, 0).astype(w.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _transposed(options: _Options, x: Array, dy: Array, w: Array) -> Array:
  """Returns `dy` times the transpose of `w` at the entries of `x` that have a derivative; reads only these rows."""
  if options.entries(x, w) is None:
    return reference.dense_transposed(dy, w)
  return reference.matmul_transposed(dy, x, w, options.block, options.capacity)


@_transposed.defjvp
def _(options, primals, tangents):
  entries = options.entries(primals[0], primals[2])

  def plain(dy, w):
    dx = reference.dense_transposed(dy, w)
    return dx if entries is None else jnp.where(entries, dx, jnp.zeros((), dx.dtype))

  return _transposed(options, *primals), jax.jvp(plain, primals[1:], tangents[1:])[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _outputs(options: _Options, wanted: Array, w: Array, x: Array) -> Array:
  """Returns `x` times the transpose of `w` where `wanted` is not zero; other entries may be zeros, or the product."""
  table = _outputs_table(options.block, options.capacity)
  return dispatch.run('active_outputs', (wanted, w, x), table, options.implementation, prefer)


@_outputs.defjvp
def _(options, primals, tangents):
  plain = lambda w, x: reference.dense_transposed(x, w)
  return _outputs(options, *primals), jax.jvp(plain, primals[1:], tangents[1:])[1]


@functools.partial(jax.jit, static_argnums=0)  # Calls outside of `jit` run as one program too.
def _compiled(options: _Options, x: Array, w: Array) -> Array:
  table = _table(options.block, options.capacity)
  run = lambda x, w: dispatch.run('active_matmul', (x, w), table, options.implementation, prefer)
  return differentiable(run, Derivative(_tangent, _gradient, options), 2)(x, w)
