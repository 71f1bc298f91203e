"""Chooses blocks of keys by what queries and keys are: routing by pooled scores, pages, hashes, predictors.

    builder = routed(keep=4, block=64)              # BiFormer: the 4 blocks with the largest product of means
    builder = quest(keep=4, block=64)               # the 4 blocks with the largest upper bound of a score

All lists have a length that is known at trace time, so that nothing overflows. Ties go to the lower index, NaN ranks
last. Nothing has a gradient through the choice.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, ranking
from sparsejax.argument_kinds import BY_NAME, POSITIVE, SERIES, SIGNS, TIMES, shaped
from sparsejax.arguments import checked
from sparsejax.attention.masks import BlockMask, Builder
from sparsejax.attention.sites import AttentionSite
from sparsejax.types import Array, Bound

arguments.declare('lsh', hashes=SIGNS)
arguments.declare('pool', x=shaped('[batch, T, heads, d]'), block=TIMES, kinds=SERIES)
arguments.declare('page_scores predicted_scores', q=shaped('[batch, T, heads, d]'), k=shaped('[batch, T, heads, d]'))
arguments.declare('predicted_scores', predictor=BY_NAME, scale=POSITIVE)

# The last block may be shorter: NaN is padding.
POOLS: dict[str, Any] = {'mean': jnp.nanmean, 'max': jnp.nanmax, 'min': jnp.nanmin}


@checked
def pool(x: Array, block: int, kinds: tuple[str, ...] = ('mean',)) -> Array:
  """Returns the features of each block of tokens of `x [batch, T, heads, d]`: `[batch, n, heads, len(kinds) d]`.

  `kinds` are names in `POOLS`, whose features follow each other. A last block that is shorter is pooled over its own
  tokens. Raises `ValueError` for an unknown name.
  """
  if unknown := [kind for kind in kinds if kind not in POOLS]:
    raise ValueError(f'attention.pool: unknown kind {unknown[0]!r}. Valid: {", ".join(sorted(POOLS))}.')
  padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)), constant_values=jnp.nan)
  whole = padded.reshape(x.shape[0], -1, block, *x.shape[2:])
  return jnp.concatenate([POOLS[kind](whole, 2) for kind in kinds], -1)


_PREDICTOR = ('query', 'key', 'pool', 'basis', 'least', 'floor')


def shared_heads(site: AttentionSite, k: Array) -> Array:
  """Returns features of keys `[batch, n, kv_heads, f]` for each head of queries."""
  return jnp.repeat(k, site.heads // site.k.shape[2], 2)


def best_blocks(site: AttentionSite, scores: Array, keep: int, block: int) -> BlockMask:
  """Returns the `keep` blocks of keys with the largest scores `[batch, heads, nq, nk]`, among those that are visible.

  A row with fewer visible blocks keeps them all.
  """
  visible = site.blocks(block, block)[None]
  keep = min(keep, scores.shape[-1])
  scores = jax.lax.stop_gradient(jnp.where(visible, scores, -jnp.inf))
  chosen = ranking.top_n_in_groups(scores, keep, scores.shape[-1], scores.ndim - 1)
  return BlockMask(chosen & visible, block, block, keep, fits=True)


def _routed(site: AttentionSite, keep: int, block: int, per_head: bool) -> BlockMask:
  q, k = pool(site.q, block), shared_heads(site, pool(site.k, block))
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k)
  return best_blocks(site, scores if per_head else scores.sum(1, keepdims=True), keep, block)


@checked
def routed(keep: int, block: int = 64, per_head: bool = False) -> Builder:
  """Returns the builder of BiFormer: the `keep` blocks of keys whose mean is most like the mean of the queries.

  The score of two blocks is the product of their means, summed over all heads, so that heads share one choice.
  `per_head` lets each head choose. A scale does not matter. BiFormer (Zhu et al. 2023, 2303.08810, eq. 3 and 4) routes
  windows of an image: order the tokens window by window (`windows`). Its depthwise convolution of the values is no part
  of the builder.
  """
  return Bound(_routed, (keep, block, per_head))


@checked
def windows(height: int, width: int, size: int) -> np.ndarray:
  """Returns the order of the tokens of an image, window by window: `int[height width]`, windows of `size x size`.

  `x[:, order]` brings windows together, and `argsort(order)` brings them back. Raises `ValueError` if `size` does not
  divide both lengths.
  """
  if height % size or width % size:
    raise ValueError(f'attention.windows: windows of {size} do not divide an image of {height} x {width}; pad it.')
  grid = np.arange(height * width).reshape(height // size, size, width // size, size)
  return grid.transpose(0, 2, 1, 3).reshape(-1)


@checked
def page_scores(q: Array, k: Array, block: int) -> Array:
  """Returns the upper bound of the score of each query with any key of a page: `[batch, heads, Tq, pages]`.

  The bound is the sum over channels of `max(q least, q largest)` of the page (Quest, Tang et al. 2024, 2406.10774).
  `q` is `[batch, Tq, heads, d]`, `k [batch, Tk, heads, d]`.
  """
  if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
    raise ValueError(f'attention.page_scores: q {q.shape} and k {k.shape} must be [batch, Tq, heads, d] and '
                     '[batch, Tk, heads, d]; repeat shared heads.')
  largest, least = (jnp.einsum('bqhd,bkhd->bhqk', a, pool(k, block, (kind,)), precision='highest')
                    for a, kind in ((jnp.maximum(q, 0), 'max'), (jnp.minimum(q, 0), 'min')))
  return largest + least


def _quest(site: AttentionSite, keep: int, block: int) -> BlockMask:
  scores = page_scores(site.q, shared_heads(site, site.k), block)
  padded = jnp.pad(scores, ((0, 0), (0, 0), (0, -scores.shape[2] % block), (0, 0)), constant_values=-jnp.inf)
  return best_blocks(site, padded.reshape(*scores.shape[:2], -1, block, scores.shape[3]).max(3), keep, block)


@checked
def quest(keep: int, block: int = 64) -> Builder:
  """Returns the builder of Quest's pages: the `keep` blocks of keys with the largest upper bound of a score.

  Quest chooses for one query at a time. A block of queries takes the largest bound of its queries.
  """
  return Bound(_quest, (keep, block))


def _lsh(site: AttentionSite, key: Array, hashes: int, keep: int, block: int) -> BlockMask:
  planes = jax.random.normal(key, (site.q.shape[-1], hashes))
  place = 2 ** jnp.arange(hashes)
  bucket = lambda x: jax.nn.one_hot((x.astype(jnp.float32) @ planes > 0).astype(jnp.int32) @ place, 2 ** hashes)
  count = lambda x: pool(bucket(x), block) * block
  scores = jnp.einsum('bqhe,bkhe->bhqk', count(site.q), shared_heads(site, count(site.k)))
  return best_blocks(site, scores, keep, block)


@checked
def lsh(key: Array, keep: int, hashes: int = 4, block: int = 64) -> Builder:
  """Returns the builder of locality-sensitive hashing: the blocks with the most pairs of equal hashes.

  A hash is the signs of `hashes` random projections (Charikar 2002). The choice does not depend on the random features
  of `scatter` if the keys differ.
  """
  return lambda site: _lsh(site, key, hashes, keep, block)


@checked
def predicted_scores(q: Array, k: Array, predictor: Mapping[str, Array], scale: float | None = None) -> Array:
  """Returns the scores of Sparsifiner's predictor for each query and key, `float32[batch, heads, T, T]`.

  `predictor` has `query` and `key`, `[d, c]`, the maps to fewer dimensions that all heads share; `pool [T, n]`, which
  makes n keys of T; and `basis [T, n]`. The coefficients of a query are a softmax over the n pooled keys; those below
  `predictor['least']` are zero. The score is their product with the absolute basis, in which entries below
  `predictor['floor']` are zero (Wei et al. 2023, 2303.13755). `scale` is `1 / sqrt(c)` by default. The authors' code
  takes `1 / sqrt(heads)`. Raises `ValueError` for a predictor of other shapes.
  """
  _refuse_other(q, k, predictor)
  q, k = (jnp.einsum('bthd,dc->bhtc', x, predictor[name]) for x, name in ((q, 'query'), (k, 'key')))
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  pooled = jnp.einsum('bhtc,tn->bhnc', k, predictor['pool'])
  shares = jax.nn.softmax(jnp.einsum('bhtc,bhnc->bhtn', q, pooled) * scale)
  shares = jnp.where(shares < predictor['least'], 0.0, shares)
  basis = jnp.abs(predictor['basis'])
  return shares @ jnp.where(basis < predictor['floor'], 0.0, basis).T


def _refuse_other(q: Array, k: Array, predictor: Mapping[str, Any]) -> None:
  """Raises `ValueError` for a predictor that lacks an entry, or whose entries do not fit the queries and keys."""
  d, length = q.shape[-1], k.shape[1]
  found = {name: jnp.shape(predictor[name]) if name in predictor else None for name in _PREDICTOR}
  c, n = (shape[-1] if shape else 0 for shape in (found['query'], found['pool']))
  wanted = {'query': (d, c), 'key': (d, c), 'pool': (length, n), 'basis': (length, n), 'least': (), 'floor': ()}
  if k.shape != q.shape or found != wanted:
    raise ValueError(f'attention.predicted_scores: q {q.shape} and k {k.shape} must be equal [batch, T, heads, d], and '
                     f'the predictor query and key [{d}, c], pool and basis [{length}, n], and the numbers least and '
                     f'floor; its shapes are {found}.')


def _predicted(site: AttentionSite, predictors: Any, keep: int, block: int) -> BlockMask:
  predictor = predictors if 'query' in predictors else site.own('attention.predicted', 'predictor', predictors)
  scores = predicted_scores(site.q, shared_heads(site, site.k), predictor)
  tall, wide = (-n % block for n in scores.shape[2:])
  padded = jnp.pad(scores, ((0, 0), (0, 0), (0, tall), (0, wide)))
  split = padded.reshape(*scores.shape[:2], padded.shape[2] // block, block, padded.shape[3] // block, block)
  return best_blocks(site, split.sum((3, 5)), keep, block)


@checked
def predicted(predictors: Mapping[str, Any], keep: int, block: int = 64) -> Builder:
  """Returns the builder of Sparsifiner: the blocks with the largest sums of predicted scores.

  `predictors` is one predictor, as `predicted_scores` takes it, or one for each `site.name`. Sparsifiner keeps single
  keys, for which there is no kernel; a block is kept as a whole here. The choice has no gradient: train the predictor
  by `predicted_scores` and the weights of the dense model.
  """
  return lambda site: _predicted(site, predictors, keep, block)
