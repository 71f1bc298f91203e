"""Computes attention to the blocks of keys that an index lists: `block_sparse_attention`.

    index = jnp.asarray([[[0, 2], [1, 2]]], jnp.int32)                               # [heads, blocks of queries, R]
    y = block_sparse_attention(q, k, v, index, causal=True)                          # like q, `[..., Tq, heads, d]`
    options = Options(block_q=128, block_k=128, causal=True, scale=0.125, queries=256, keys=384)
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.attention import heads, reference
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.linear import Derivative, differentiable
from sparsejax import errors
from sparsejax.attention.edits import EDITS, ScoreEdit, edited, segment_edits, weighed
from sparsejax.types import Array


def block_sparse_attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *,
                           block_q: int = 128, block_k: int = 128, causal: bool = False, scale: float | None = None,
                           edits: Sequence[ScoreEdit] = (), segments: tuple[Array, Array] | None = None,
                           implementation: str | None = None, explain: bool = False) -> Array | dispatch.Choices:
  """Returns the attention of `q [..., Tq, heads, d]` to blocks of `k` and `v`: the shape of `q`, with d of `v`.

  `k` and `v` are `[..., Tk, kv_heads, d]`, and `kv_heads` divides `heads`. The axes and `scale`, by default
  `1 / sqrt(d)`, are those of `jax.nn.dot_product_attention`. `index` is `int32[heads, ceil(Tq / block_q), R]`. For each
  block of queries, `index` lists the blocks of keys that its queries see, in increasing order. `counts` is
  `int32[heads, ceil(Tq / block_q)]`: the first `counts` blocks of a list are used, by default all R. `index` and
  `counts` may be traced, and are the same for all examples of a batch. If `causal`, query i sees only listed keys from
  0 to i. The result of a query that sees no key is zero.

  `edits` change the scores, after `scale`, and the weights, in their order. Their arrays broadcast to `[batch, heads,
  Tq, Tk]`, with all examples of a batch in one axis. With edits, a query whose listed keys are all hidden sees its own
  key, if that key is listed. The result is differentiable in arrays of numbers. XLA computes edits. The
  kernels compute segments and masks of keys, `[batch, 1, 1, Tk]`, too.
  `segments` are the numbers of the segments of queries and of keys, `int[batch, Tq]` and `int[batch, Tk]`, or one array
  for both: a query sees only keys of its own segment, as in packs of several texts (`sparsejax.packing`).

  The result is differentiable in q, k and v, to every order and in both modes. Only the implementation 'dense' makes an
  array of Tq x Tk. Derivatives in forward mode, and second derivatives, are computed by XLA.
  `implementation` is 'xla', 'dense', 'mosaic_gpu' or 'mosaic_tpu', and raises `ValueError` if it cannot run. `None`
  lets the platform choose when the program is lowered. `explain=True` returns the choice of each platform and its
  reason instead of the result. Gradients are computed by 'dense' if `implementation` is 'dense', by the kernels of
  'mosaic_gpu' or 'mosaic_tpu' where these compute the result, and by 'xla' otherwise. Neither kernel for gradients has
  run on its device yet.
  """
  lists = (index,) if counts is None else (index, counts)
  _check(q, k, v, *lists, block_q=block_q, block_k=block_k)
  edits = (*edits, *_segments(segments, q, k))
  scale = float(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
  kinds = tuple((kind, None if array is None else array.dtype == bool) for kind, array in edits)
  options = Options(block_q, block_k, bool(causal), scale, q.shape[-3], k.shape[-3], kinds)
  shape = (*q.shape[:-1], v.shape[-1])
  args = (*(_filled(a, block) for a, block in ((q, block_q), (k, block_k), (v, block_k))),
          *_edit_arrays(edits, q, k, options), *lists)
  if explain:
    return dispatch.chosen(args, _table(options), options.prefer)
  if implementation is not None:
    dispatch.runnable('block_sparse_attention', args, _table(options), implementation)
  if 0 in shape or 0 in k.shape or 0 in index.shape:
    return jnp.zeros(shape, q.dtype)
  return _compiled(options, implementation, *dispatch.varying_alike(*args))[:, :options.queries].reshape(shape)


class Options(NamedTuple):
  """`Options` holds the arguments that are known at trace time; `queries` and `keys` are the lengths before padding."""

  block_q: int
  block_k: int
  causal: bool
  scale: float
  queries: int
  keys: int
  kinds: tuple[tuple[str, bool | None], ...] = ()  # of each edit, and whether its array is a mask; `None` without one

  @property
  def numbers(self) -> int:
    """The number of edits whose array has derivatives."""
    return sum(mask is False for _, mask in self.kinds)

  @property
  def arrays(self) -> int:
    return sum(mask is not None for _, mask in self.kinds)

  def edits(self, arrays: Sequence[Array]) -> list[ScoreEdit]:
    """Returns the edits in their order, from their arrays: numbers first, then masks."""
    numbers, masks = iter(arrays[:self.numbers]), iter(arrays[self.numbers:])
    return [ScoreEdit(kind, None if mask is None else next(masks if mask else numbers)) for kind, mask in self.kinds]

  def segmented(self, arrays: Sequence[Array]) -> bool:
    """Returns whether there are edits, and all number segments or hide keys from all heads and queries."""
    edits, single = self.edits(arrays), {'segment': (1, 3), 'same': (1, 2), 'mask': (1, 2)}
    return bool(edits) and [kind for kind, _ in self.kinds].count('segment') < 2 and all(
        edit.kind in single and all(edit.array.shape[axis] == 1 for axis in single[edit.kind]) for edit in edits)

  def ids(self, q: Array, k: Array, arrays: Sequence[Array]) -> tuple[Array, Array]:
    """Returns numbers of segments that hide what the edits hide, `int32[batch, T]` of queries and of keys.

    A mask of keys, such as padding, gives hidden keys a number that no query has.
    """
    edits = self.edits(arrays)
    whole = lambda a, like: jnp.broadcast_to(a.reshape(len(a), -1).astype(jnp.int32), (len(q), like.shape[1]))
    own = {edit.kind: edit.array for edit in edits}
    queries, keys = (whole(own.get(kind, jnp.zeros((1, 1))), like) for kind, like in (('segment', q), ('same', k)))
    for edit in edits:
      keys = jnp.where(whole(edit.array, k) > 0, keys, jnp.iinfo(jnp.int32).min) if edit.kind == 'mask' else keys
    return queries, keys

  def segments(self, q: Array, k: Array, v: Array, *rest: Array) -> dict[str, Any]:
    """Returns the argument of kernels that hides what the edits hide, if there are edits."""
    return {'segments': self.ids(q, k, rest[:self.arrays])} if self.kinds else {}

  @property
  def plain(self) -> dict[str, Any]:
    """The keyword arguments that every implementation takes."""
    return {name: getattr(self, name) for name in ('block_q', 'block_k', 'causal', 'scale')}

  def prefer(self, q: Array, k: Array, v: Array, *rest: Array) -> Choice:
    """Returns the choice 'xla', for platforms without a kernel that can run."""
    index = rest[self.arrays]
    listed, blocks = index.shape[-1], -(-self.keys // self.block_k)
    return Choice('xla', f'at most {listed} of {blocks} blocks of keys for each block of queries')


def _check(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int,
           block_k: int) -> None:
  fail = lambda why: ValueError(f'block_sparse_attention: {why}')
  shapes = f'q, k and v of shapes {q.shape}, {k.shape} and {v.shape}'
  if q.ndim < 3 or k.ndim != q.ndim or k.shape[:-1] != v.shape[:-1] or (
      q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]):
    raise fail(f'{shapes} must be [..., Tq, heads, d], [..., Tk, kv_heads, d] and, but for d, like k.')
  if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
    raise fail(f'{shapes}: the number of heads of k and v must divide that of q.')
  if len({a.dtype for a in (q, k, v)}) > 1 or not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize > 4:
    raise fail(f'q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; all must be one of float32, bfloat16 and '
               'float16.')
  if not all(isinstance(n, int) and n >= 1 for n in (block_q, block_k)):
    raise fail(f'block_q {block_q!r} and block_k {block_k!r} must be whole numbers, at least 1.')
  lists = (q.shape[-2], -(-q.shape[-3] // block_q))
  counts = jax.ShapeDtypeStruct(lists, jnp.int32) if counts is None else counts
  if index.ndim != 3 or index.shape[:2] != lists or counts.shape != lists or index.dtype != jnp.int32 or (
      counts.dtype != jnp.int32):
    raise fail(f'index {index.dtype}{list(index.shape)} and counts {counts.dtype}{list(counts.shape)} must be '
               f'int32[{lists[0]}, {lists[1]}, R] and int32{list(lists)}, a list for each head and each block of '
               f'{block_q} of the {q.shape[-3]} queries.')


def _segments(segments: tuple[Array, Array] | Array | None, q: Array, k: Array) -> tuple[ScoreEdit, ...]:
  """Returns the edits that hide other segments, or none without `segments`."""
  if segments is None:
    return ()
  pair = segments if isinstance(segments, tuple) else (segments, segments)
  batch = math.prod(q.shape[:-3])
  shapes = [tuple(getattr(ids, 'shape', ())) for ids in pair]
  if len(pair) != 2 or any(shape[1:] != (a.shape[-3],) or shape[0] not in (1, batch) or not jnp.issubdtype(
      ids.dtype, jnp.integer) for ids, shape, a in zip(pair, shapes, (q, k))):
    raise ValueError(f'block_sparse_attention: segments of shapes {shapes} must be int[batch, Tq] and int[batch, Tk], '
                     f'int[{batch}, {q.shape[-3]}] and int[{batch}, {k.shape[-3]}].')
  return segment_edits(*pair)


def _filled(a: Array, block: int) -> Array:
  """Returns `a` as `[batch, T, heads, d]`, with T padded to whole blocks, as implementations take it."""
  flat = a.reshape(math.prod(a.shape[:-3]), *a.shape[-3:])
  return jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block), (0, 0), (0, 0)))


def _edit_arrays(edits: Sequence[ScoreEdit], q: Array, k: Array, options: Options) -> list[Array]:
  """Returns the arrays of edits, `[batch, heads, Tq, Tk]` with lengths of 1, padded to whole blocks: numbers, masks."""
  given = [jnp.asarray(edit.array) for edit in edits if edit.array is not None]
  full = (math.prod(q.shape[:-3]), q.shape[-2], options.queries, options.keys)
  for kind, mask in options.kinds:
    if kind not in ('mask', 'weigh', 'segment', 'same', *EDITS) or (kind == 'mask') > bool(mask):
      raise ValueError(f'block_sparse_attention: the edit {kind!r} is none of {sorted(EDITS)}, \'weigh\', and '
                       "'mask' with an array of bools.")
  ranked = [a.reshape((1,) * (4 - a.ndim) + a.shape) if a.ndim < 4 else a for a in given]
  for a in ranked:
    if a.ndim != 4 or any(n not in (1, whole) for n, whole in zip(a.shape, full)):
      raise ValueError(f'block_sparse_attention: an edit has an array of shape {a.shape}, which must broadcast to '
                       f'[batch, heads, Tq, Tk], {full}.')
  blocks = ((2, options.block_q), (3, options.block_k))
  fill = lambda a: jnp.pad(a, [(0, 0), (0, 0), *((0, -a.shape[i] % b if a.shape[i] > 1 else 0) for i, b in blocks)])
  return [fill(a) for a in sorted(ranked, key=lambda a: a.dtype == bool)]


def _dense(options: Options, q: Array, k: Array, v: Array, index: Array, counts: Array,
           edits: Sequence[ScoreEdit] = ()) -> Array:
  """Returns the attention of `q [heads, Tq, d]` by the scores of all keys and a mask, `[heads, Tq, d]`."""
  (n, rows, most), blocks = index.shape, k.shape[1] // options.block_k
  listed = jnp.where(jnp.arange(most)[None, None] < counts[..., None], index, blocks)
  seen = jnp.zeros((n, rows, blocks), bool)
  seen = seen.at[jnp.arange(n)[:, None, None], jnp.arange(rows)[None, :, None], listed].set(True, mode='drop')
  seen = jnp.repeat(jnp.repeat(seen, options.block_q, 1), options.block_k, 2)
  key = jnp.arange(k.shape[1])[None, None]
  seen &= key < options.keys
  if options.causal:
    seen &= key <= jnp.arange(q.shape[1])[None, :, None]
  k, v = (jnp.repeat(a, len(q) // len(a), 0) for a in (k, v))
  scores = jnp.einsum('hqd,hkd->hqk', q, k, preferred_element_type=jnp.float32) * options.scale
  whole = [edit if edit.array is None else edit._replace(array=_of_heads(edit.array, len(q))) for edit in edits]
  scores, left = edited(scores, seen, whole)
  own = key == jnp.minimum(jnp.arange(q.shape[1])[None, :, None], options.keys - 1)
  weights = weighed(reference.softmax(scores, reference.own_key(left, seen, own) if edits else seen), whole)
  return jnp.einsum('hqk,hkd->hqd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)


def _of_heads(array: Array, heads: int) -> Array:
  """Returns the array of an edit for the heads of all examples, `[heads or 1, Tq, Tk]`."""
  batch, own, *lengths = array.shape
  rows = jnp.broadcast_to(array, (batch, heads // batch if batch > 1 else own, *lengths)).reshape(-1, *lengths)
  return rows[jnp.arange(heads) % len(rows)]


def _edited(options: Options, attend: Callable[..., Array]) -> Callable[..., Array]:
  """Returns `attend` of heads first for arrays with a batch, with the arrays of edits between values and lists."""
  def run(q: Array, k: Array, v: Array, *rest: Array) -> Array:
    edits = options.edits(rest[:options.arrays])
    return heads.first(functools.partial(attend, edits=edits))(q, k, v, *rest[options.arrays:])
  return run


def _kernel(module: str, options: Options) -> Implementation:
  """Returns the implementation of a module, which is imported at its first use: importing Pallas takes a second."""
  load = lambda: importlib.import_module(f'kernels_pallas.attention.{module}')

  end = 3 + options.arrays

  def run(*args: Array) -> Array:
    return load().attention(*args[:3], *args[end:], **options.plain, **options.segments(*args))

  def refusal(*args):
    if options.kinds and not options.segmented(args[3:end]):
      kinds = list(dict.fromkeys('segments' if kind in ('segment', 'same') else kind for kind, _ in options.kinds))
      return (f'it has no {errors.some(kinds)} of scores; XLA computes them, and lists without the hidden blocks need '
              'none')
    hidden = options.causal and options.queries <= options.keys  # Padding keys come after every query.
    if options.keys % options.block_k and not hidden:
      return f'{options.keys} keys do not divide into blocks of {options.block_k}; take blocks that divide them'
    return load().refusal(*args[:3], *args[end:], **options.plain, **({'segmented': True} if options.kinds else {}))

  return Implementation(run, refusal)


def _table(options: Options) -> dict[str, Implementation]:
  xla = functools.partial(reference.attention, **options.plain, length=options.keys)
  return {'xla': Implementation(_edited(options, xla)),
          'dense': Implementation(_edited(options, functools.partial(_dense, options))),
          'mosaic_gpu': _kernel('gpu', options), 'mosaic_tpu': _kernel('tpu', options)}


def _plain(options: Options, implementation: str | None) -> Callable[..., Array]:
  """Returns the attention in plain JAX, which JAX can differentiate."""
  return _table(options)['dense' if implementation == 'dense' else 'xla'].function


def _tangent(options: tuple[Options, str | None], args: Sequence[Array], tangents: Sequence[Array]) -> Array:
  plain, count = _plain(*options), 3 + options[0].numbers
  return jax.jvp(lambda *a: plain(*a, *args[count:]), tuple(args[:count]), tuple(tangents))[1]


def _gradient(options: tuple[Options, str | None], args: Sequence[Array], dy: Array) -> Sequence[Array]:
  known, implementation = options
  if implementation == 'dense' or known.kinds and not known.segmented(args[3:][:known.arrays]):
    plain, count = _plain(*options), 3 + known.numbers
    return jax.vjp(lambda *a: plain(*a, *args[count:]), *args[:count])[1](dy)
  numbers = args[3:][:known.numbers]  # of segments, which have no derivatives
  return (*_backward(known, implementation)(dy, *args), *map(jnp.zeros_like, numbers))


def _backward(options: Options, implementation: str | None) -> Callable[..., Any]:
  """Returns the gradients of q, k and v for `(dy, q, k, v, *lists)`, by the kernels of the platform.

  Their own derivatives are those of the gradients in plain JAX, because kernels have none.
  """
  table, plain = _backward_table(options), functools.partial(_plain_backward, options)
  prefer = lambda dy, *args: options.prefer(*args)
  call = jax.custom_jvp(lambda *args: dispatch.run('block_sparse_attention', args, table, implementation, prefer))

  def tangents(primals: Any, tangents: Any) -> Any:
    return call(*primals), jax.jvp(lambda *a: plain(*a, *primals[4:]), primals[:4], tangents[:4])[1]

  call.defjvp(tangents)
  return call


def _plain_backward(options: Options, dy: Array, q: Array, k: Array, v: Array, *lists: Array) -> tuple[Array, ...]:
  if options.kinds:
    return jax.vjp(lambda *qkv: _plain(options, None)(*qkv, *lists), q, k, v)[1](dy)
  gradients = reference.gradients(*map(heads.heads_first, (dy, q, k, v)), *heads.lists(len(q), *lists),
                                  **options.plain, length=options.keys)
  return tuple(heads.heads_last(d, a.shape[2]) for d, a in zip(gradients, (q, k, v)))


def _backward_table(options: Options) -> dict[str, Implementation]:
  """Returns the implementations of the gradients: XLA, kernels for Hopper, and splash attention's on TPUs."""
  forward, of_gpu = _kernel('tpu', options), _kernel('gpu', options)
  load = lambda: importlib.import_module('kernels_pallas.attention.gpu_backward')

  def by_kernel(dy: Array, q: Array, k: Array, v: Array, *lists: Array) -> tuple[Array, ...]:
    return jax.vjp(lambda *qkv: forward.function(*qkv, *lists), q, k, v)[1](dy)

  def by_gpu(dy: Array, q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, ...]:
    return load().attention_gradients(dy, q, k, v, *rest[options.arrays:], **options.plain,
                                      **options.segments(q, k, v, *rest))

  return {'xla': Implementation(functools.partial(_plain_backward, options)),
          'mosaic_gpu': Implementation(by_gpu, lambda dy, *args: of_gpu.refusal(*args)),
          'mosaic_tpu': Implementation(by_kernel, lambda dy, *args: forward.refusal(*args))}


@functools.partial(jax.jit, static_argnums=(0, 1))  # Calls outside of `jit` run as one program too.
def _compiled(options: Options, implementation: str | None, *args: Array) -> Array:
  run = lambda *args: dispatch.run('block_sparse_attention', args, _table(options), implementation, options.prefer)
  return differentiable(run, Derivative(_tangent, _gradient, (options, implementation)),
                        3 + options.numbers)(*args)
