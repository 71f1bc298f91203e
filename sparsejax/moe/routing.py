"""Routes tokens to experts with a static capacity, so that what is not routed is really not computed.

    routing = plan(weights, capacity)         # Routing: tokens [E, C], weights [E, C], filled [E, C], dropped []
    routing = fill_in(routing, scores)        # rectifiers map a routing to a routing
    y = mixture(expert, params, x, routing)
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments, conditional
from sparsejax.argument_kinds import ARRAY, FUNCTION, PARAMS, POSITIVE, TIMES, Kind, having
from sparsejax.arguments import checked
from sparsejax.conditional import Routing, placed, refuse_rows, routed
from sparsejax.types import Array, PyTree

__all__ = ['Routing', 'capacity_of', 'fill_in', 'local', 'mixture', 'plan', 'renormalised']

arguments.declare('capacity_of', tokens=TIMES, experts=TIMES, k=TIMES, slack=POSITIVE)
arguments.declare('plan fill_in local renormalised mixture', weights=ARRAY, capacity=TIMES, scores=ARRAY, owner=ARRAY,
                  of_token=ARRAY, tokens=TIMES, expert=FUNCTION, params=PARAMS, x=ARRAY,
                  routing=Kind('what moe.plan returns', having('tokens', 'weights', 'filled', 'dropped')))


@checked
def capacity_of(tokens: int, experts: int, k: int = 1, slack: float = 1.0) -> int:
  """Returns the slots of an expert, `ceil(slack k tokens / experts)`: the even load times `slack`."""
  return math.ceil(slack * k * tokens / experts)


@checked
def plan(weights: Array, capacity: int) -> Routing:
  """Returns the routing of the weights `[T, E]` of a gate: a pair is routed where its weight is not zero.

  Each expert takes its first `capacity` tokens, in order. The others are dropped, and counted. A gate that keeps
  nothing leaves all slots empty. NaN counts as a weight. Slots beyond the number of tokens stay empty.
  """
  _refuse('plan', weights)
  return routed(weights, capacity)


def _count(pairs: Array) -> Array:
  return jnp.sum(pairs, dtype=jnp.int32)


def _routed(routing: Routing, tokens: int) -> Array:
  """Returns whether each pair is in a slot, `bool[T, E]`."""
  experts = jax.lax.broadcasted_iota(jnp.int32, routing.tokens.shape, 0)
  found = jnp.zeros((tokens, len(routing.tokens)), bool)
  return found.at[jnp.where(routing.filled, routing.tokens, tokens), experts].set(True, mode='drop')


@checked
def fill_in(routing: Routing, scores: Array) -> Routing:
  """Returns the routing whose vacant slots take the tokens of the largest scores that the expert does not have yet.

  Rectify-Router (Zeng et al. 2024, 2402.12399), the fill-in rectification. `scores`: `[T, E]`, the gate's
  probabilities, which become the weights. Ties go to the lower token; a score of NaN or minus infinity takes no slot.
  """
  _refuse('fill_in', scores, routing)
  refuse_rows('moe.fill_in', routing, len(scores))
  free = jnp.where(_routed(routing, len(scores)) | jnp.isnan(scores), -jnp.inf, scores)
  most = min(routing.tokens.shape[1], len(scores))
  best, tokens = jax.lax.top_k(free.T, most)
  rank = jnp.minimum(jnp.cumsum(~routing.filled, 1, dtype=jnp.int32) - 1, most)
  pick = lambda values, other: jnp.take_along_axis(values, jnp.clip(rank, 0, most - 1), 1) if most else other
  taken = ~routing.filled & (rank < most) & (pick(best, best) > -jnp.inf)
  return Routing(jnp.where(taken, pick(tokens, tokens), routing.tokens),
                 jnp.where(taken, pick(best, best).astype(routing.weights.dtype), routing.weights),
                 routing.filled | taken, routing.dropped)


@checked
def local(routing: Routing, weights: Array, scores: Array, owner: Array, of_token: Array, capacity: int) -> Routing:
  """Returns the routing with `capacity` more slots an expert, in which dropped tokens are computed where they are.

  Rectify-Router, the intra-device rectification. `weights`: the argument of `plan`. A token of which a pair was
  dropped goes once to another expert of its own device. The expert is the one of the largest score, `[T, E]`, that
  does not have the token yet. `owner`: the device of each expert, `int[E]`; `of_token`: that of each token, `int[T]`.
  The score becomes the weight. No token is sent to another device, and the slots are additional computation.
  `dropped` then counts further pairs of the same token, tokens whose device has no expert left, and tokens beyond the
  slots. Raises `ValueError` for arrays of other tokens or experts.
  """
  _refuse('local', scores, routing)
  if weights.shape != scores.shape or (*of_token.shape, *owner.shape) != scores.shape:
    raise ValueError(f'moe.local: scores {scores.shape}, weights {weights.shape}, `of_token` {of_token.shape} and '
                     f'`owner` {owner.shape}; give [T, E] twice, and the device of each token [T] and expert [E].')
  refuse_rows('moe.local', routing, len(scores))
  there = _routed(routing, len(scores))
  lost = jnp.any((weights != 0) & ~there, 1, keepdims=True)
  near = (of_token[:, None] == owner[None]) & ~there & ~jnp.isnan(scores)
  best = jnp.argmax(jnp.where(near, scores, -jnp.inf), 1)
  own = jax.nn.one_hot(best, scores.shape[1], dtype=bool) & near & lost
  place = jnp.cumsum(own, 0, dtype=jnp.int32) - 1
  fits = own & (place < capacity)
  more = placed(scores.astype(routing.weights.dtype), jnp.where(fits, place, capacity), capacity,
                 routing.dropped - _count(fits))
  tokens, slots, filled = (jnp.concatenate(both, 1) for both in zip(routing[:3], more[:3]))
  return Routing(tokens, slots, filled, more.dropped)


@checked
def renormalised(routing: Routing, tokens: int) -> Routing:
  """Returns the routing in which the weights of each token sum to 1 over its slots; sums of 0 stay.

  After a rectification the weights of a token sum to another number, and the paper does not say what then happens.
  """
  refuse_rows('moe.renormalised', routing, tokens)
  sums = jnp.zeros(tokens, routing.weights.dtype).at[routing.tokens].add(routing.weights)
  return routing._replace(weights=routing.weights / jnp.where(sums == 0, 1, sums)[routing.tokens])


@checked
def mixture(expert: Callable[[Any, Array], Array], params: PyTree, x: Array, routing: Routing) -> Array:
  """Returns the weighted sum of the experts of each token, `[T, out]`, from `x` `[T, in]`.

  `expert(params_e, rows)` maps rows `[C, in]` to `[C, out]`; `params` has a leading axis of experts. E C rows are
  gathered and computed by one batched program, empty slots among them, and the results are added at their tokens. A
  token without a slot gets zeros. Raises `ValueError` where `params` have another number of experts.
  """
  experts = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
  if experts != {(len(routing.tokens),)}:
    raise ValueError(f'moe.mixture: parameters with the leading axes {sorted(experts)} for {len(routing.tokens)} '
                     'experts; stack the experts along axis 0 of every leaf.')
  return conditional.apply(expert, params, x, routing).y


def _refuse(function: str, scores: Array, routing: Routing | None = None) -> None:
  experts = scores.shape[-1] if routing is None else len(routing.tokens)
  if scores.ndim != 2 or scores.shape[1] != experts:
    raise ValueError(f'moe.{function}: an array of shape {scores.shape}; give one number for each token and each of '
                     f'the {experts} experts, [T, E].')
