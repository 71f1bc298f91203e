"""Removes tokens between the blocks of a transformer: words that score tokens, and `stack`, which runs fewer of them.

    score = lambda block, x, attention: combined(page_rank(attention)) if block else None
    run = stack(blocks, score, keep=[64, 48, 48, 32])        # `blocks[i](x, mask, place)` returns x and a signal
    y = run(x)                                               # `y.x [B, 32, width]` and `y.place`, which tokens

Removed tokens are not computed: arrays become shorter, and none is masked. How many tokens a block keeps is known at
trace time. A program does not say where blocks begin, so the blocks are given as functions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import (
  BY_NAME,
  DRAWN,
  FLAG,
  FUNCTION,
  PART,
  PLACE,
  RATE,
  SERIES,
  TIMES,
  WHOLE,
  shaped,
)
from sparsejax.arguments import checked
from sparsejax.types import Array

arguments.declare('stack', blocks=SERIES, score=FUNCTION, keep=SERIES, skip=FLAG, always=WHOLE)
arguments.declare('kept_places', scores=shaped('[B, T]'), mask=shaped('[B, T]'), n=TIMES, always=WHOLE)
arguments.declare('page_rank', attention=shaped('[..., T, T]'), steps=TIMES)
arguments.declare('factors_of', attention=shaped('[B, heads, T, T]'), share=PART)
arguments.declare('combined', importance=shaped('[..., heads, T]'), least=RATE, most=RATE)
arguments.declare('dissimilar', importance=shaped('[B, T]'), keys=shaped('[B, T, d]'))
arguments.declare('shared_neurons above_elbow', h=shaped('[B, T, F]'), query=PLACE, counts=shaped('[B, T]'))
arguments.declare('router_of routed_scores', key=DRAWN, factors=TIMES, hidden=TIMES, router=BY_NAME)
arguments.declare('routed_scores', factors=shaped('[B, T, n]'))

BlockOfTokens = Callable[[Array, Array, Array], Any]


class Remaining(NamedTuple):
  """`Remaining` tokens are the result of `stack`: `x [B, n, width]`, and `mask` and `place`, each `[B, n]`.

  `mask` says which tokens are no padding, and `place`, `int32`, which tokens of the input remain, in their order.
  """

  x: Array
  mask: Array
  place: Array


@checked
def stack(blocks: Sequence[BlockOfTokens], score: Callable[[int, Array, Any], Array | None], keep: Sequence[int], *,
          skip: bool = False, always: int = 1) -> Callable[..., Remaining]:
  """Returns a function of `x [B, T, width]` that runs `blocks`, each on its `keep` tokens of the highest score.

  `blocks[i](x, mask, place)` returns the new x, or a pair of x and a signal, such as an attention matrix. Before block
  i, `score(i, x, signal)` returns `[B, T]`, or `None`, which keeps the first ones; `signal` is that of the block
  before, or `None`. The first `always` tokens, such as a class token, are always kept, and padding is removed first.
  Among equal scores the earlier token is kept, and NaN ranks last.

  By default, removed tokens are gone for all later blocks. With `skip`, a token skips a block and comes back after it
  (FTP, Li et al. 2024). A gate of 1 with the gradient of `sigmoid(score)` multiplies the change of a kept token, so
  that an ordinary loss trains a router. Kept tokens see only kept tokens; in FTP, skipped ones still write
  keys and values. Raises `ValueError` for numbers of tokens that rise, unless `skip`, or exceed the tokens.
  """
  if len(keep) != len(blocks) or not all(TIMES.fits(n) and n >= always for n in keep):
    raise ValueError(f'tokens.stack: `keep` must be a number of tokens for each of the {len(blocks)} blocks, at least '
                     f'{max(always, 1)}, not {list(keep)!r:.60}.')
  if not skip and any(b > a for a, b in zip(keep, keep[1:])):
    raise ValueError(f'tokens.stack: removed tokens do not come back, so `keep` must not rise, as {list(keep)} does; '
                     'lower the numbers, or give skip=True.')

  def run(x: Array, mask: Array | None = None) -> Remaining:
    if x.ndim != 3 or max(keep) > x.shape[1]:
      raise ValueError(f'tokens.stack: x of shape {x.shape} must be [B, T, width] with at least the {max(keep)} tokens '
                       'that a block keeps.')
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    if mask.shape != x.shape[:2] or mask.dtype != bool:
      raise ValueError(f'tokens.stack: mask {mask.dtype}{list(mask.shape)} must be bool{list(x.shape[:2])}, True for '
                       f'tokens and False for padding, for x of shape {x.shape}.')
    place, signal = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]), None
    now = Remaining(x, mask, place)
    for i, (block, n) in enumerate(zip(blocks, keep)):
      scores = score(i, now.x, signal)
      at = kept_places(jnp.zeros(now.mask.shape) if scores is None else scores, now.mask, n, always)
      few = Remaining(*(_taken(a, at) for a in now))
      made = block(*few)
      y, signal = made if isinstance(made, tuple) else (made, None)
      if y.shape[:2] != few.x.shape[:2]:
        raise ValueError(f'tokens.stack: block {i} returned x of shape {y.shape} for {few.x.shape}; a block must '
                         'return all tokens that it is given, since `keep` says how many there are.')
      now = Remaining(_put_back(now.x, few.x, y, at, scores), *now[1:]) if skip else few._replace(x=y)
    return now

  return run


@checked
def kept_places(scores: Array, mask: Array, n: int, always: int = 0) -> Array:
  """Returns the places of the `n` highest of `scores [B, T]`, rising, `int32[B, n]`, as `stack` chooses them."""
  if scores.shape != mask.shape:
    raise ValueError(f'tokens.kept_places: scores of shape {scores.shape} must be [B, T], a number for each token, '
                     f'{mask.shape}.')
  if not always <= n <= scores.shape[1]:
    raise ValueError(f'tokens.kept_places: `n`, {n}, must be from `always`, {always}, to the {scores.shape[1]} tokens '
                     f'of scores {scores.shape}.')
  scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
  scores = jnp.where(jnp.isnan(scores), jnp.finfo(jnp.float32).min, scores)
  scores = jnp.where(mask, scores, -jnp.inf)
  scores = jnp.where(jnp.arange(scores.shape[1])[None] < always, jnp.inf, scores)
  return jnp.sort(jax.lax.top_k(scores, n)[1], -1).astype(jnp.int32)


@checked
def page_rank(attention: Array, steps: int = 30) -> Array:
  """Returns the importance of each token, `[..., T]`, by weighted page rank: the first stage of Zero-TPrune.

  `attention`, `[..., T, T]`, has rows of queries that sum to 1. Importance begins equal, and each of `steps` moves it
  along attention, from queries to keys (Wang et al. 2024, arXiv 2305.17328, algorithm 1). Sums to 1.
  """
  if attention.shape[-1] != attention.shape[-2]:
    raise ValueError(f'tokens.page_rank: attention of shape {attention.shape} must be [..., T, T].')
  matrix = attention.astype(jnp.float32)

  def move(_: Any, importance: Array) -> Array:
    moved = jnp.einsum('...qk,...q->...k', matrix, importance)
    return moved / jnp.sum(moved, -1, keepdims=True)

  start = jnp.full(matrix.shape[:-1], 1 / matrix.shape[-1], jnp.float32)
  return jax.lax.fori_loop(0, steps, move, start)


@checked
def combined(importance: Array, least: float = 0.0, most: float = jnp.inf) -> Array:
  """Returns one importance of each token, `[..., T]`, of the importance in each head, `[..., heads, T]`.

  The root mean square over heads keeps a token that matters to one head (Zero-TPrune's EIR). Heads whose variance over
  tokens is not between `least` and `most` are left out (its variance filter), unless all are. The authors' bounds are
  for scores that they do not describe, so by default no head is left out.
  """
  spread = jnp.var(importance, -1, keepdims=True)
  used = (spread >= least) & (spread <= most)
  used = (used | ~jnp.any(used, -2, keepdims=True)).astype(importance.dtype)
  return jnp.sqrt(jnp.sum(used * importance**2, -2) / jnp.sum(used, -2))


@checked
def dissimilar(keys: Array, importance: Array) -> Array:
  """Returns a score of each token, `[B, T]`, whose lowest are those most like a more important one (Zero-TPrune).

  `keys` are `[B, T, d]`. The less important half of the tokens is compared with the other half by cosines. A token of
  this half has a score of 1 minus its largest cosine, and a token of the other half has 2. Among equals the
  earlier token is more important.
  """
  if keys.shape[:2] != importance.shape:
    raise ValueError(f'tokens.dissimilar: keys {keys.shape} and importance {importance.shape} must be of equal tokens.')
  unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
  order = jnp.argsort(-importance, -1, stable=True)
  rank = jnp.argsort(order, -1, stable=True)
  upper = rank < keys.shape[1] // 2
  cosines = jnp.einsum('bqd,bkd->bqk', unit, unit)
  nearest = jnp.max(jnp.where(upper[:, None], cosines, -1), -1)
  return jnp.where(upper, 2, 1 - nearest)


@checked
def shared_neurons(h: Array, query: int) -> Array:
  """Returns how many active neurons each token shares with the token `query`, `[B, T]`: CoreMatching (Wang 2025).

  `h`, `[B, T, F]`, are the hidden units of a feed-forward block; a positive one is active.
  """
  if not -h.shape[1] <= query < h.shape[1]:
    raise ValueError(f'tokens.shared_neurons: `query`, {query}, must be one of the {h.shape[1]} tokens of h {h.shape}.')
  active = (h > 0).astype(jnp.float32)
  return jnp.einsum('btf,bf->bt', active, active[:, query])


@checked
def above_elbow(counts: Array) -> Array:
  """Returns which tokens lie above the elbow of their sorted counts, `bool[B, T]`: CoreMatching's core tokens.

  The elbow is the count with the largest distance to the straight line from the largest count to the least. The token
  of the elbow itself is left out, as in the authors' code. The authors set keys and values of other tokens to zero, and
  a zero key still has a weight; `stack` removes the tokens.
  """
  ordered = -jnp.sort(-counts.astype(jnp.float32), -1)
  last = counts.shape[-1] - 1
  step = jnp.arange(counts.shape[-1], dtype=jnp.float32)[None] / max(last, 1)
  line = ordered[:, :1] + (ordered[:, last:] - ordered[:, :1]) * step
  elbow = jnp.argmax(jnp.abs(ordered - line), -1)[:, None]  # the distance up to a factor of the line
  return counts > jnp.take_along_axis(ordered, elbow, -1)


@checked
def router_of(key: Array, factors: int, hidden: int = 16) -> dict[str, Array]:
  """Returns the parameters of a router: a two-layer network from `factors` numbers of a token to one."""
  first, second = jax.random.split(key)
  return {'into': jax.random.normal(first, (factors, hidden)) / factors**0.5, 'bias': jnp.zeros(hidden),
          'out': jax.random.normal(second, (hidden, 1)) / hidden**0.5}


@checked
def routed_scores(router: Mapping[str, Array], factors: Array) -> Array:
  """Returns the score of each token, `[B, T]`, of its `factors [B, T, n]`: FTP's router, for `stack` with `skip`."""
  if missing := [name for name in ('into', 'bias', 'out') if name not in router]:
    raise ValueError(f'tokens.routed_scores: the router has no {missing[0]!r}; router_of makes one.')
  if router['into'].shape[0] != factors.shape[-1]:
    raise ValueError(f'tokens.routed_scores: factors {factors.shape} do not fit a router of {router["into"].shape[0]} '
                     'numbers a token; make one by router_of.')
  hidden = jax.nn.relu(factors @ router['into'] + router['bias'][None, None])
  return (hidden @ router['out'])[..., 0]


@checked
def factors_of(attention: Array, share: float) -> Array:
  """Returns four numbers of each token, `[B, T, 4]`, for a router: position, attention it gets, its rank, and `share`.

  `attention` is `[B, heads, T, T]`, and `share` the fraction of tokens that the block keeps. Position and rank are from
  0 to 1, and the attention is the mean over heads and queries, times T. The paper names four factors without formulas
  (Li et al. 2024, FTP); the formulas are ours.
  """
  got = jnp.mean(attention, (1, 2)) * attention.shape[-1]
  last = max(attention.shape[-1] - 1, 1)
  rank = jnp.argsort(jnp.argsort(-got, -1, stable=True), -1, stable=True).astype(got.dtype) / last
  position = jnp.broadcast_to(jnp.arange(got.shape[1], dtype=got.dtype) / last, got.shape)
  return jnp.stack([position, got, rank, jnp.full(got.shape, share, got.dtype)], -1)


def _taken(a: Array, at: Array) -> Array:
  return jnp.take_along_axis(a, at.reshape(*at.shape, *(1,) * (a.ndim - 2)), 1)


def _put_back(x: Array, before: Array, after: Array, at: Array, scores: Array | None) -> Array:
  """Returns `x` with the tokens at `at` moved by what a block did, times a gate of 1 with the gradient of the score."""
  moved = after - before
  if scores is not None:
    soft = jax.nn.sigmoid(_taken(scores, at))
    moved = moved * (1 + soft - jax.lax.stop_gradient(soft))[..., None].astype(moved.dtype)
  return x.at[jnp.arange(len(x))[:, None], at].add(moved)


__all__ = ['BlockOfTokens', 'Remaining', 'above_elbow', 'combined', 'dissimilar', 'factors_of', 'kept_places',
           'page_rank', 'routed_scores', 'router_of', 'shared_neurons', 'stack']
