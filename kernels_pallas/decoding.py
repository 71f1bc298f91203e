"""Decodes token by token with an explicit cache, of which each step reads the tokens that a rule lists: `decoder`.

    decoding = decoder(decode.quest(keep=1024))                                      # a rule of sparsejax.attention
    cache = decoding.start(batch=1, capacity=16_384, heads=8, d=64)
    cache = decoding.extend(cache, k, v)                                             # the new token, or a whole prompt
    y = decoding.step(q, cache)                                                      # `[B, heads, d]`
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from kernels_pallas import dispatch
from kernels_pallas.gathered import gathered_attention
from sparsejax import arguments
from sparsejax.argument_kinds import DECODING, POSITIVE
from sparsejax.attention import decode
from sparsejax.types import Array

arguments.declare('decoder', rule=DECODING, scale=POSITIVE)


class Decoder(NamedTuple):
  """A `Decoder` holds the functions of a rule: `start(...)`, `extend(cache, k, v)` and `step(q, cache)`.

  All are pure: a `Cache` is a pytree of the caller, to be donated, sharded, saved, or cut back by its `length`.
  """

  start: Callable[..., decode.Cache]
  extend: Callable[[decode.Cache, Array, Array], decode.Cache]
  step: Callable[[Array, decode.Cache], Array]


@arguments.checked
def decoder(rule: decode.DecodeRule, *, scale: float | None = None, implementation: str | None = None) -> Decoder:
  """Returns the functions that decode with `rule`, such as `decode.double_sparsity`, `decode.quest` or `decode.seer`.

  `start` takes `batch`, `capacity`, `heads` (of k), `d` and `dtype`, see `decode.empty_cache`. `extend` stores keys and
  values, `[B, n, kv_heads, d]`, once for each token or for many at once, and refuses or reports a full cache, see
  `decode.extended`. `step` returns the attention of `q [B, heads, d]` to the tokens that the rule lists, through
  `gathered_attention`, which `scale` and `implementation` go to. Call `extend` for a token before its `step`.
  """
  dispatch.refuse_other_names('decoder', implementation)

  def step(q: Array, cache: decode.Cache) -> Array:
    return gathered_attention(q, cache.k, cache.v, *decode.listed(rule, cache, q), scale=scale,
                              implementation=implementation)

  start: Any = functools.partial(decode.empty_cache, rule)
  return Decoder(start, functools.partial(decode.extended, rule), step)
