"""Computes attention to listed tokens in plain `jnp`: only the rows of listed tokens are read from the cache.

A CPU takes one list after the other, so that the rows of a list stay in its cache. A row is read in pieces of
eight numbers, which XLA copies by vector instructions. Other platforms take all lists together.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.reference import softmax
from sparsejax.types import Array

_PIECE = 8  # numbers of a row that XLA:CPU copies by one vector instruction


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array, scale: float) -> Array:
  """Returns the attention of `q [B, H, d]` to the tokens of `k` and `v [B, T, Hkv, d]` that `index` lists, `[B, H, d]`.

  `index` is `int32[B, L, R]`, a list for each H / L neighbouring heads. The first `counts`, `int32[B, L]`, tokens of a
  list are used. A number out of range stands for the first or the last token. Sums are float32.
  """
  several = index.shape[0] * max(index.shape[1], k.shape[2]) > 1
  ways = {'cpu': functools.partial(in_turn, scale=scale)} if several else {}
  return jax.lax.platform_dependent(q, k, v, index, counts, default=functools.partial(attend_all, scale=scale), **ways)


def attend_all(q: Array, k: Array, v: Array, index: Array, counts: Array, *, scale: float) -> Array:
  """Returns `attention`, computed for all lists together."""
  listed, counts = (widened(a, k.shape[2]) for a in (index, counts))
  example = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None, None]
  head = kv_heads(listed.shape[1], k.shape[2])[None, :, None]
  keys, values = (a.at[example, jnp.maximum(listed, 0), head].get(mode='clip') for a in (k, v))
  return _weighed(_grouped(q, listed.shape[1]), keys, values, counts, scale).reshape(*q.shape[:2], -1).astype(q.dtype)


def in_turn(q: Array, k: Array, v: Array, index: Array, counts: Array, *, scale: float) -> Array:
  """Returns `attention`, computed for one list after the other. An empty list reads nothing."""
  listed, counts = (widened(a, k.shape[2]) for a in (index, counts))
  groups = listed.shape[1]
  pieces = [a.reshape(*a.shape[:3], -1, _piece(a.shape[3])) for a in (k, v)]

  def one(given):
    queries, listed, count, example, head = given
    place = jnp.broadcast_to(example, listed.shape), jnp.maximum(listed, 0), jnp.broadcast_to(head, listed.shape)
    read = lambda: [a.at[place].get(mode='clip') for a in pieces]
    nothing = lambda: [jnp.zeros((*listed.shape, *a.shape[3:]), a.dtype) for a in pieces]
    # The rows leave the branch as an array in memory. XLA would otherwise undo the pieces.
    keys, values = (a.reshape(1, 1, len(listed), -1) for a in jax.lax.cond(count > 0, read, nothing))
    return _weighed(queries[None, None], keys, values, count[None, None], scale)[0, 0]

  flat = lambda a: a.reshape(-1, *a.shape[2:])
  example, head = (np.broadcast_to(a, counts.shape) for a in (
      np.arange(q.shape[0], dtype=np.int32)[:, None], kv_heads(groups, k.shape[2])))
  lists = (flat(_grouped(q, groups)), flat(listed), flat(counts), flat(jnp.asarray(example)), flat(jnp.asarray(head)))
  return jax.lax.map(one, lists).reshape(*q.shape[:2], -1).astype(q.dtype)


def attend_masked(q: Array, k: Array, v: Array, index: Array, counts: Array, scale: float) -> Array:
  """Returns `attention`, computed by the scores of all tokens and a mask."""
  listed, counts = (widened(a, k.shape[2]) for a in (index, counts))
  (batch, groups, most), tokens = listed.shape, k.shape[1]
  used = jnp.where(jnp.arange(most)[None, None] < counts[..., None], jnp.clip(listed, 0, tokens - 1), tokens)
  place = jnp.arange(batch)[:, None, None], jnp.arange(groups)[None, :, None], used
  seen = jnp.zeros((batch, groups, tokens), bool).at[place].set(True, mode='drop')
  head = kv_heads(groups, k.shape[2])
  scores = jnp.einsum('bgnd,btgd->bgnt', _grouped(q, groups), k[:, :, head],
                      preferred_element_type=jnp.float32) * scale
  weights = softmax(scores, seen[:, :, None]).astype(v.dtype)
  y = jnp.einsum('bgnt,btgd->bgnd', weights, v[:, :, head], preferred_element_type=jnp.float32)
  return y.reshape(*q.shape[:2], -1).astype(q.dtype)


def widened(lists: Array, heads: int) -> Array:
  """Returns `lists [B, L, ...]` with at least one list for each of `heads` heads of k: `[B, max(L, heads), ...]`."""
  return jnp.repeat(lists, max(heads // lists.shape[1], 1), 1)


def kv_heads(groups: int, heads: int) -> np.ndarray:
  """Returns the head of k that each of `groups` lists reads, `int32[groups]`; neighbouring lists share one."""
  return np.arange(groups, dtype=np.int32) // np.int32(groups // heads)


def _piece(length: int) -> int:
  return _PIECE if length % _PIECE == 0 else length


def _grouped(q: Array, groups: int) -> Array:
  """Returns `q [B, H, d]` as `[B, groups, H / groups, d]`."""
  return q.reshape(q.shape[0], groups, -1, q.shape[2])


def _weighed(queries: Array, keys: Array, values: Array, counts: Array, scale: float) -> Array:
  """Returns the attention of `queries [B, G, n, d]` to the first `counts` of `keys [B, G, R, d]`, float32."""
  scores = jnp.einsum('bgnd,bgrd->bgnr', queries, keys, preferred_element_type=jnp.float32) * scale
  seen = jnp.arange(keys.shape[2])[None, None, None] < counts[:, :, None, None]
  weights = softmax(scores, seen).astype(values.dtype)
  # A number beyond `counts` may name any row, NaN included, and NaN times a weight of zero is NaN.
  values = jnp.where(seen[:, :, 0, :, None], values, jnp.zeros((), values.dtype))
  return jnp.einsum('bgnr,bgrd->bgnd', weights, values, preferred_element_type=jnp.float32)
