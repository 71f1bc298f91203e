"""A cache of keys and values for decoding, and the rules that list which of its tokens the next query reads.

    rule = double_sparsity(heavy_channels(keys, 8), keep=1024, page=16)
    cache = empty_cache(rule, batch=1, capacity=16_384, heads=8, d=64)
    cache = extended(rule, cache, k, v)                    # the keys and values of new tokens, `[B, n, heads, d]`
    index, counts = listed(rule, cache, q)                 # for `kernels_pallas.gathered_attention`

`kernels_pallas.decoder(rule)` puts the parts together. A rule reads labels, which are kept beside the keys because
computing them anew would read all keys. Labels are scored by pages of neighbouring tokens, and whole pages are listed.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments
from sparsejax.argument_kinds import ARRAY, BY_NAME, CACHE, CHANNELS, DECODING, DTYPE, FLAG, TIMES, shaped
from sparsejax.arguments import checked
from sparsejax.types import Array

arguments.declare('every newest double_sparsity quest seer', capacity=TIMES, keep=TIMES, page=TIMES, shared=FLAG,
                  channels=CHANNELS, gate=BY_NAME)
arguments.declare('empty_cache extended check listed read_share', rule=DECODING, cache=CACHE, dtype=DTYPE, labels=ARRAY,
                  batch=TIMES, capacity=TIMES, heads=TIMES, d=TIMES, values=TIMES, tokens=TIMES)
arguments.declare('extended', k=shaped('[B, n, kv_heads, d]'), v=shaped('[B, n, kv_heads, d]'))
arguments.declare('listed', q=shaped('[B, heads, d]'))
arguments.declare('heavy_channels', k=shaped('[..., T, kv_heads, d]'), q=shaped('[..., T, heads, d]'), r=TIMES)


class Cache(NamedTuple):
  """A `Cache` holds keys and values `[B, T, kv_heads, d]`, as Flax's layers do, and the labels of a rule.

  `length`, `int32[B]`: how many tokens are stored. `lost`, `int32[B]`: how many tokens came when the cache was full.
  """

  k: Array
  v: Array
  labels: Array
  length: Array
  lost: Array

  @property
  def capacity(self) -> int:
    return self.k.shape[1]


class DecodeRule(NamedTuple):
  """A `DecodeRule` says which pages of a cache a query reads.

  `page`: the tokens of a page. `keep`: how many tokens are read at most, whole pages. `last`: whether the page of the
  newest token is always read. `labels(k)`: the labels of an empty cache like `k [B, T, kv_heads, d]`.
  `written(labels, k, begin, n)`: the labels after the `n` tokens from `begin`, `int32[B]`, on were stored in `k`.
  `scores(labels, q)`: a score for each list and page, `[B, lists, pages]`, of `q [B, heads, d]`.
  """

  page: int
  keep: int
  last: bool
  labels: Callable[[Array], Array]
  written: Callable[[Array, Array, Array, int], Array]
  scores: Callable[[Array, Array], Array]


@checked
def empty_cache(rule: DecodeRule, batch: int, capacity: int, heads: int, d: int,
                dtype: jax.typing.DTypeLike = jnp.float32, values: int | None = None) -> Cache:
  """Returns a cache for `capacity` tokens of `heads` heads, with keys of `d` numbers and values of `values`, or of `d`.

  Raises `ValueError` for sizes below 1, and where the page of the rule does not divide the capacity.
  """
  if capacity % rule.page or rule.keep > capacity:
    raise ValueError(f'decode.empty_cache: a capacity of {capacity} tokens must be whole pages of {rule.page}, and at '
                     f'least the {rule.keep} tokens that the rule keeps; give '
                     f'{max(rule.keep, -(-capacity // rule.page) * rule.page)}.')
  k = jnp.zeros((batch, capacity, heads, d), dtype)
  none = jnp.zeros((batch,), jnp.int32)
  v = jnp.zeros((batch, capacity, heads, d if values is None else values), dtype)
  return Cache(k, v, rule.labels(k), none, none)


@checked
def extended(rule: DecodeRule, cache: Cache, k: Array, v: Array) -> Cache:
  """Returns the cache with `n` more tokens, `k` and `v [B, n, kv_heads, d]`.

  Raises `ValueError` for a full cache, unless its length is traced. Under `jit`, tokens beyond the capacity are not
  stored, and `lost` counts them; `check` raises for such a cache.
  """
  if k.shape[:1] + k.shape[2:] != cache.k.shape[:1] + cache.k.shape[2:] or (
      v.shape[:1] + v.shape[2:] != cache.v.shape[:1] + cache.v.shape[2:] or k.shape[1] != v.shape[1]):
    raise ValueError(f'decode.extended: k and v of shapes {k.shape} and {v.shape} must be [B, n, kv_heads, d] like the '
                     f'cache, {cache.k.shape} and {cache.v.shape}.')
  if (k.dtype, v.dtype) != (cache.k.dtype, cache.v.dtype):
    raise ValueError(f'decode.extended: k and v of dtypes {k.dtype} and {v.dtype} must be {cache.k.dtype} and '
                     f'{cache.v.dtype} like the cache; cast them, or make the cache with their dtype.')
  begin, n = cache.length, k.shape[1]
  _refuse_other_labels('extended', rule, cache)
  _refuse_full(cache, n)
  place = jnp.arange(len(k))[:, None], begin[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
  keys, values = (old.at[place].set(new, mode='drop') for old, new in ((cache.k, k), (cache.v, v)))
  length = jnp.minimum(begin + n, cache.capacity)
  return Cache(keys, values, rule.written(cache.labels, keys, begin, n), length, cache.lost + (begin + n - length))


@checked
def check(cache: Cache) -> Cache:
  """Returns the cache; raises `ValueError` if tokens came when it was full, with their number. Call it outside `jit`.
  """
  if int(jnp.max(cache.lost)):
    raise ValueError(f'decode.check: the cache of {cache.capacity} tokens is full, and lost {cache.lost.tolist()} '
                     'tokens of its examples; make a cache with a larger capacity.')
  return cache


@checked
def listed(rule: DecodeRule, cache: Cache, q: Array) -> tuple[Array, Array]:
  """Returns the tokens that `q [B, heads, d]` reads, `int32[B, lists, keep]` in increasing order, and their numbers.

  Raises `ValueError` for a cache of another rule, and, unless its length is traced, for one without tokens.
  The numbers are `int32[B, lists]`. Equal scores keep the earlier page, and NaN ranks last. A page beyond the length of
  the cache is never read.
  """
  if len(q) != len(cache.k) or q.shape[2] != cache.k.shape[3] or q.shape[1] % cache.k.shape[2]:
    raise ValueError(f'decode.listed: q of shape {q.shape} must be [B, heads, d], one query for each example of the '
                     f'cache {cache.k.shape}, whose heads divide those of q.')
  _refuse_other_labels('listed', rule, cache)
  if not isinstance(cache.length, jax.core.Tracer) and not int(jnp.max(cache.length)):
    raise ValueError('decode.listed: the cache holds no token; store the keys and values of a token before its query.')
  scores = rule.scores(cache.labels, q).astype(jnp.float32)
  pages, most = scores.shape[-1], rule.keep // rule.page
  begin = jnp.arange(pages, dtype=jnp.int32) * rule.page
  length = cache.length[:, None, None]
  scores = jnp.where(jnp.isnan(scores), jnp.finfo(jnp.float32).min, scores)
  if rule.last:
    newest = (begin[None, None] < length) & (begin[None, None] + rule.page >= length)
    scores = jnp.where(newest, jnp.inf, scores)
  scores = jnp.where(begin[None, None] < length, scores, -jnp.inf)
  page = _largest(scores, most)
  within = jnp.arange(rule.page, dtype=jnp.int32)[None, None, None]
  tokens = (page[..., None] * rule.page + within).reshape(*page.shape[:2], -1)
  # Pages rise, so that the tokens beyond the length are the last of a list.
  return tokens, jnp.sum(jnp.clip(length - page * rule.page, 0, rule.page), -1, dtype=jnp.int32)


@checked
def every(capacity: int) -> DecodeRule:
  """Returns the rule that reads all tokens of a cache of this capacity: exact attention."""
  scores = lambda labels, q: jnp.zeros((q.shape[0], 1, 1), jnp.float32)

  def labels(k: Array) -> Array:
    if k.shape[1] != capacity:
      raise ValueError(f'decode.every: a cache of {k.shape[1]} tokens needs decode.every({k.shape[1]}), not '
                       f'{capacity}, to read them all.')
    return jnp.zeros((len(k), 0), k.dtype)

  return DecodeRule(capacity, capacity, False, labels, lambda labels, *_: labels, scores)


@checked
def newest(keep: int, page: int = 1) -> DecodeRule:
  """Returns the rule that reads the newest pages: a sliding window, against which other rules are to be compared."""
  _refuse_parts('newest', keep, page)
  ages = lambda pages: jnp.arange(pages, dtype=jnp.float32)
  scores = lambda labels, q: jnp.broadcast_to(ages(labels.shape[1]), (len(q), 1, labels.shape[1]))
  return DecodeRule(page, keep, True, lambda k: jnp.zeros((len(k), k.shape[1] // page, 0), k.dtype),
                    lambda labels, *_: labels, scores)


@checked
def double_sparsity(channels: Array, keep: int, page: int = 1) -> DecodeRule:
  """Returns Double Sparsity: a token is scored by few channels of its key (Yang et al. 2024, arXiv 2408.07092).

  `channels`, `int[kv_heads, r]`, come from `heavy_channels`. Labels `[B, kv_heads, r, T]` hold these channels of keys,
  and a score is their product with the same channels of the query. Each head of the query has its own list of the
  `keep` best tokens.

  With `page=1` the rule is the paper's. Larger pages are listed whole, by their best token, and the newest page is
  always read: choosing among pages takes a fifteenth of the time. Channels and labels are of keys as they are
  multiplied, after rotary positions; the authors calibrate before the rotation. Labels are not quantized.
  """
  _refuse_parts('double_sparsity', keep, page)
  own = np.asarray(channels)
  heads = np.arange(len(own))[:, None]

  def of(k: Array) -> Array:
    if k.shape[-2] != len(own) or own.max() >= k.shape[-1]:
      raise ValueError(f'decode.double_sparsity: channels of {len(own)} heads up to {own.max()} do not fit '
                       f'{k.shape[-2]} heads of {k.shape[-1]}; calibrate them for this layer.')
    return k[..., heads, own].swapaxes(1, -1).swapaxes(1, 2)

  def written(labels: Array, k: Array, begin: Array, n: int) -> Array:
    place = jnp.arange(len(k))[:, None], begin[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
    return labels.at[place[0], :, :, place[1]].set(k.at[place].get(mode='clip')[..., heads, own], mode='drop')

  def scores(labels: Array, q: Array) -> Array:
    grouped = q.reshape(len(q), len(own), -1, q.shape[-1])
    heavy = jnp.take_along_axis(grouped, own[None, :, None].repeat(len(q), 0).repeat(grouped.shape[2], 2), -1)
    tokens = jnp.einsum('bgnr,bgrt->bgnt', heavy, labels, preferred_element_type=jnp.float32)
    return jnp.max(tokens.reshape(*q.shape[:2], -1, page), -1)

  return DecodeRule(page, keep, page > 1, of, written, scores)


@checked
def heavy_channels(k: Array, r: int, q: Array | None = None) -> Array:
  """Returns the `r` channels of each head with the largest mean |k|, or mean |q k| with `q`, `int32[kv_heads, r]`.

  `k` is `[..., T, kv_heads, d]` and `q` `[..., T, heads, d]`, of the same tokens, as the program multiplies them. The
  heads of q that share a head of k are summed. Equal channels keep the lower number. Channels come heaviest first.
  """
  if r > k.shape[-1]:
    raise ValueError(f'decode.heavy_channels: keys of shape {k.shape} must be [..., T, kv_heads, d] with at least the '
                     f'{r} channels of `r`.')
  if q is not None and (q.ndim != k.ndim or q.shape[-1] != k.shape[-1] or q.shape[-2] % k.shape[-2]
                        or q.shape[:-2] != k.shape[:-2]):
    raise ValueError(f'decode.heavy_channels: queries of shape {q.shape} must be of the tokens of the keys, {k.shape}, '
                     'and their heads a multiple.')
  strength = jnp.abs(k.astype(jnp.float32))
  if q is not None:
    grouped = jnp.abs(q.astype(jnp.float32)).reshape(*k.shape[:-1], -1, k.shape[-1])
    strength = strength * jnp.sum(grouped, -2)
  strength = jnp.mean(strength, tuple(range(k.ndim - 2)))
  return jnp.argsort(-strength, -1, stable=True)[:, :r].astype(jnp.int32)


@checked
def quest(keep: int, page: int = 16, *, shared: bool = False) -> DecodeRule:
  """Returns Quest: a page is scored by an upper bound of its products (Tang et al. 2024, arXiv 2406.10774).

  Labels are the least and the largest key of a page, channel by channel. The score is the sum over channels of the
  larger of the two products with the query, equation 1. The page of the newest token is always read. If `shared`, the
  heads of a head of k share a list, by the sum of their scores. The paper keeps the first two layers dense, which is
  the caller's choice of rules.
  """
  _refuse_parts('quest', keep, page)
  ends = (jnp.inf, -jnp.inf)

  def labels(k: Array) -> Array:
    shape = (len(k), 2, k.shape[2], k.shape[1] // page, k.shape[3])
    return jnp.broadcast_to(jnp.asarray(ends, k.dtype)[None, :, None, None, None], shape)

  def written(labels: Array, k: Array, begin: Array, n: int) -> Array:
    place = jnp.arange(len(k))[:, None], begin[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
    tokens = k.at[place].get(mode='clip')
    lower = labels.at[place[0], 0, :, place[1] // page].min(tokens, mode='drop')
    return lower.at[place[0], 1, :, place[1] // page].max(tokens, mode='drop')

  def scores(labels: Array, q: Array) -> Array:
    grouped = q.reshape(len(q), labels.shape[2], -1, q.shape[-1])
    # max(q a, q b) for a <= b is q b where q is positive, and q a elsewhere. Pages without tokens, which hold
    # infinities and score NaN, are never read.
    parts = (jnp.minimum(grouped, 0), labels[:, 0]), (jnp.maximum(grouped, 0), labels[:, 1])
    least, most = (jnp.einsum('bgnd,bgpd->bgnp', *part, preferred_element_type=jnp.float32) for part in parts)
    bound = least + most
    return jnp.sum(bound, 2) if shared else bound.reshape(*q.shape[:2], -1)

  return DecodeRule(page, keep, True, labels, written, scores)


@checked
def seer(gate: Mapping[str, Array], keep: int, page: int = 64) -> DecodeRule:
  """Returns SeerAttention's gate for decoding: learned features score closed pages (Gao et al. 2024, arXiv 2410.13276).

  `gate['query']`, `[kv_heads, n, d, g]`, maps the n heads of a head of k to one feature vector. `gate['key']`,
  `[kv_heads, 2 d, g]`, maps the largest and the least key of a page, in this order. The score is the product of both,
  and heads that share a head of k share a list. A label is written when a page closes; the open page is always read.

  The authors pool keys before rotary positions and rotate features; here keys are those of the cache. Their selection
  by a threshold is not offered, because a list has a fixed length.
  """
  _refuse_parts('seer', keep, page)
  query, key = (gate.get(name) for name in ('query', 'key'))
  if query is None or key is None or query.ndim != 4 or key.shape != (
      len(query), 2 * query.shape[2], query.shape[3]):
    shapes = {name: a.shape for name, a in gate.items()}
    raise ValueError(f"decode.seer: gate {shapes} must have 'query' [kv_heads, n, d, g] and 'key' [kv_heads, 2 d, g].")

  def labels(k: Array) -> Array:
    if k.shape[2] != len(key) or k.shape[3] != query.shape[2]:
      raise ValueError(f'decode.seer: a gate for {len(key)} heads of {query.shape[2]} does not fit the {k.shape[2]} '
                       f'heads of {k.shape[3]} of the cache; train one for this layer.')
    return jnp.zeros((len(k), k.shape[1] // page, len(key), key.shape[2]), k.dtype)

  def written(labels: Array, k: Array, begin: Array, n: int) -> Array:
    pages = labels.shape[1]
    number = begin[:, None] // page + jnp.arange((n - 1) // page + 2, dtype=jnp.int32)[None]
    token = number[..., None] * page + jnp.arange(page, dtype=jnp.int32)[None, None]
    keys = k.at[jnp.arange(len(k))[:, None, None], token].get(mode='clip')
    pooled = jnp.concatenate([jnp.max(keys, 2), jnp.min(keys, 2)], -1)
    features = jnp.einsum('bpgd,gdf->bpgf', pooled, key.astype(k.dtype))
    closed = (number + 1) * page <= (begin + n)[:, None]
    return labels.at[jnp.arange(len(k))[:, None], jnp.where(closed, number, pages)].set(features, mode='drop')

  def scores(labels: Array, q: Array) -> Array:
    if q.shape[1] != query.shape[0] * query.shape[1]:
      raise ValueError(f'decode.seer: a gate for {query.shape[0]} times {query.shape[1]} heads does not fit queries of '
                       f'{q.shape[1]} heads; train one for this layer.')
    grouped = q.reshape(len(q), *query.shape[:3])
    return jnp.einsum('bgnd,gndf,bpgf->bgp', grouped, query.astype(q.dtype), labels,
                      preferred_element_type=jnp.float32)

  return DecodeRule(page, keep, True, labels, written, scores)


@checked
def read_share(rule: DecodeRule, labels: Array, tokens: int, heads: int, d: int) -> float:
  """Returns the numbers that a step reads, labels and listed rows, over the `2 tokens d` of each head of a dense step.

  `labels` are those of a cache, and `heads` the lists of a step. Listed rows are those of full lists.
  """
  capacity = labels.size / len(labels)
  return (capacity + 2 * min(rule.keep, tokens) * heads * d) / (2 * tokens * heads * d)


def _largest(scores: Array, n: int) -> Array:
  """Returns the places of the `n` largest scores of each row `[B, L, P]`, rising, `int32[B, L, n]`."""
  # Sorting few places takes less than counting the chosen ones among all, as `ranking` would have to.
  return jnp.sort(jax.lax.top_k(scores, min(n, scores.shape[-1]))[1], -1).astype(jnp.int32)


def _refuse_other_labels(name: str, rule: DecodeRule, cache: Cache) -> None:
  own, wanted = cache.labels, jax.eval_shape(rule.labels, cache.k)
  if (own.shape, own.dtype) != (wanted.shape, wanted.dtype):
    raise ValueError(f'decode.{name}: the cache has labels {own.dtype}{list(own.shape)}, and those of the rule are '
                     f'{wanted.dtype}{list(wanted.shape)}; make the cache by decode.empty_cache with this rule.')


def _refuse_full(cache: Cache, n: int) -> None:
  if not isinstance(cache.length, jax.core.Tracer) and int(jnp.max(cache.length)) + n > cache.capacity:
    raise ValueError(f'decode.extended: {n} more tokens do not fit into a cache of {cache.capacity}, which holds '
                     f'{cache.length.tolist()}; make a cache with a larger capacity.')


def _refuse_parts(name: str, keep: int, page: int) -> None:
  """Raises `ValueError` unless `keep` is whole pages."""
  if keep % page:
    raise ValueError(f'decode.{name}: `keep` of {keep} tokens must be whole pages of {page}; give '
                     f'{-(-keep // page) * page}.')


__all__ = ['Cache', 'DecodeRule', 'check', 'double_sparsity', 'empty_cache', 'every', 'extended', 'heavy_channels',
           'listed', 'newest', 'quest', 'read_share', 'seer']
