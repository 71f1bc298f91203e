"""Computes attention of one query per head to the tokens that a list names, for decoding: `gathered_attention`.

    index = jnp.asarray([[[0, 7, 9]]], jnp.int32)                                    # [batch, lists, R]
    y = gathered_attention(q, k, v, index)                                           # like q, `[..., heads, d]`
    print(gathered_attention(q, k, v, index, explain=True))                          # what each platform would run
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.gathered import reference
from kernels_pallas.linear import Derivative, differentiable
from sparsejax.types import Array


def gathered_attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *,
                       scale: float | None = None, implementation: str | None = None,
                       explain: bool = False) -> Array | dispatch.Choices:
  """Returns the attention of one query per head, `q [..., heads, d]`, to listed tokens: the shape of `q`, with d of v.

  `k` and `v` are a cache, `[..., T, kv_heads, d]`, as Flax's attention layers keep it. `kv_heads` divides `heads`, and
  neighbouring heads share a head of `k`. `index` is `int32[..., lists, R]`: each list names tokens, none twice, in any
  order. `lists` divides `heads`, and is a multiple or a divisor of `kv_heads`; neighbouring heads share a list.
  `counts` is `int32[..., lists]`: the first `counts` tokens of a list are used, by default all R. A number out of range
  stands for the first or the last token. The result of a head whose list is empty is zero. `scale` is `1 / sqrt(d)` by
  default. Sums are float32. Only listed rows are read, from the cache as it lies.

  The result is differentiable in q, k and v, to every order and in both modes, by XLA. `implementation` is 'xla',
  'dense', 'mosaic_gpu' or 'mosaic_tpu' (neither kernel has run on its device yet), and raises `ValueError` if it cannot
  run. `None` lets the platform choose when the program is lowered. `explain=True` returns the choice of each platform
  and its reason instead of the result. The op is the last step of Double Sparsity (Yang et al. 2024, arXiv 2408.07092)
  and of Quest (Tang et al. 2024, arXiv 2406.10774); the authors' kernels read a cache of their own layout.
  """
  counts = jnp.full(index.shape[:-1], index.shape[-1], jnp.int32) if counts is None else counts
  _check(q, k, v, index, counts)
  options = _Options(float(1 / math.sqrt(q.shape[-1]) if scale is None else scale), implementation)
  lead, shape = q.shape[:-2], (*q.shape[:-1], v.shape[-1])
  args = tuple(a.reshape(math.prod(lead), *a.shape[len(lead):]) for a in (q, k, v, index, counts))
  if explain:
    return dispatch.chosen(args, _table(options.scale), prefer)
  if implementation is not None:
    dispatch.runnable('gathered_attention', args, _table(options.scale), implementation)
  if 0 in shape or 0 in k.shape or 0 in index.shape:
    return jnp.zeros(shape, q.dtype)
  return _compiled(options, *dispatch.varying_alike(*args)).reshape(shape)


def prefer(q: Array, k: Array, v: Array, index: Array, counts: Array) -> Choice:
  """Returns the choice 'xla', for platforms without a kernel that can run."""
  return Choice('xla', f'at most {index.shape[2]} of {k.shape[1]} tokens for each list')


class _Options(NamedTuple):
  """An `_Options` holds the arguments that are known at trace time."""

  scale: float
  implementation: str | None


def _check(q: Array, k: Array, v: Array, index: Array, counts: Array) -> None:
  fail = lambda why: ValueError(f'gathered_attention: {why}')
  shapes = f'q, k and v of shapes {q.shape}, {k.shape} and {v.shape}'
  if q.ndim < 2 or k.ndim != q.ndim + 1 or k.shape[:-1] != v.shape[:-1] or (
      q.shape[:-2] != k.shape[:-3] or q.shape[-1] != k.shape[-1]):
    raise fail(f'{shapes} must be [..., heads, d], [..., T, kv_heads, d] and, but for d, like k.')
  if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
    raise fail(f'{shapes}: the number of heads of k and v must divide that of q.')
  if len({a.dtype for a in (q, k, v)}) > 1 or not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize > 4:
    raise fail(f'q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; all must be one of float32, bfloat16 and '
               'float16.')
  lists = f'index {index.dtype}{list(index.shape)} and counts {counts.dtype}{list(counts.shape)}'
  lead = list(q.shape[:-2])
  if index.ndim != q.ndim or index.shape[:-2] != q.shape[:-2] or counts.shape != index.shape[:-1] or (
      index.dtype != jnp.int32 or counts.dtype != jnp.int32):
    raise fail(f'{lists} must be int32{[*lead, "lists", "R"]} and int32{[*lead, "lists"]}.'.replace("'", ''))
  n, heads, shared = index.shape[-2], q.shape[-2], k.shape[-2]
  if n < 1 or heads % n or (n % shared and shared % n):
    raise fail(f'{lists}: {n} lists must divide the {heads} heads of q, and be a multiple or a divisor of the {shared} '
               'heads of k; give one list, one for each head of k, or one for each head of q.')


def _table(scale: float) -> dict[str, Implementation]:
  plain = lambda function: Implementation(functools.partial(function, scale=scale))
  return {'xla': plain(reference.attention), 'dense': plain(reference.attend_masked),
          'mosaic_gpu': _kernel('gpu', scale), 'mosaic_tpu': _kernel('tpu', scale)}


def _kernel(module: str, scale: float) -> Implementation:
  """Returns the implementation of a module, which is imported at its first use: importing Pallas takes a second."""
  load = lambda: importlib.import_module(f'kernels_pallas.gathered.{module}')
  return Implementation(lambda *args: load().attention(*args, scale=scale), lambda *args: load().refusal(*args))


def _tangent(options: _Options, args: Sequence[Array], tangents: Sequence[Array]) -> Array:
  run = lambda q, k, v: reference.attend_all(q, k, v, *args[3:], scale=options.scale)
  return jax.jvp(run, tuple(args[:3]), tuple(tangents))[1]


def _gradient(options: _Options, args: Sequence[Array], dy: Array) -> tuple[Array, ...]:
  run = lambda q, k, v: reference.attend_all(q, k, v, *args[3:], scale=options.scale)
  return jax.vjp(run, *args[:3])[1](dy)


@functools.partial(jax.jit, static_argnums=0)  # Calls outside of `jit` run as one program too.
def _compiled(options: _Options, *args: Any) -> Array:
  run = lambda *args: dispatch.run('gathered_attention', args, _table(options.scale), options.implementation, prefer)
  return differentiable(run, Derivative(_tangent, _gradient, options), 3)(*args)
