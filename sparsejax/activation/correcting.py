"""Lets a sparse model write a few tokens, and the full model check them: Sirius.

    generate = corrected(sparse_step, full_step, period=16, threshold=0.1)
    found = generate(params, token, cache, 128)          # found.tokens, found.rounds; under `jit` too
    128 / found.rounds                                   # tokens that a check of the full model pays for
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.arguments import checked
from sparsejax.types import Array

Step = Callable[[Any, Array, Any], tuple[Array, Any]]


class CorrectedTokens(NamedTuple):
  """A `CorrectedTokens` holds the tokens `int32[steps]`, the cache after them, and how often the full model was called.

  `accepted` is the sum of the tokens that checks accepted; the last check may have accepted more than were asked.
  """

  tokens: Array
  cache: Any
  rounds: Array
  accepted: Array


def _shorter(cache: Any, by: Array) -> Any:
  if not hasattr(cache, '_replace') or not hasattr(cache, 'length'):
    raise ValueError(f'activation.corrected: a cache of type {type(cache).__name__} has no `length` to subtract from; '
                     'give back=, a function (cache, by) -> cache that takes tokens back.')
  return cache._replace(length=cache.length - by)


@checked
def corrected(sparse_step: Step, full_step: Step, period: int = 16, threshold: float = 0.1, temperature: float = 0.6,
              back: Callable[[Any, Array], Any] = _shorter) -> Callable[..., CorrectedTokens]:
  """Returns `generate(params, token, cache, steps)`, which decodes greedily with Sirius (Zhou et al. 2024, 2409.03856).

  `sparse_step(params, tokens, cache)` and `full_step` return `(logits [n, V], cache)` for `int32[n]` tokens that follow
  those in the cache, and write their keys and values. `token`: `int32[]`, the first token that is not in the cache,
  which the full model chose. The sparse model writes `period - 1` tokens, one at a time. The full model then reads all
  `period` tokens in one call, over the sparse keys and values. A token is accepted if the full model gives the token a
  probability of at least `threshold` at this `temperature`. The most likely token of the full model follows the last
  accepted token. `back(cache, by)` takes tokens back; the default subtracts from `cache.length`, so that a static cache
  needs no copy. The cache must have room for `period` tokens more than are asked.

  The result is not that of the full model: a token that the full model would not choose, but does not find unlikely,
  stays. Deviations from the authors' code: there is one sequence, no tree of drafts, and no second pass over a
  correction.
  """
  def generate(params: Any, token: Array, cache: Any, steps: int) -> CorrectedTokens:
    if not isinstance(steps, int) or steps < 1:
      raise ValueError(f'activation.corrected: `steps` must be a whole number, at least 1, not {steps!r}.')

    def draft(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
      token, cache = carry
      logits, cache = sparse_step(params, token[None], cache)
      return (jnp.argmax(logits[-1]).astype(jnp.int32), cache), token

    def check(state: tuple[Array, Any, Array, Array, Array]) -> tuple[Array, Any, Array, Array, Array]:
      token, cache, tokens, number, rounds = state
      (last, cache), written = lax.scan(draft, (token, cache), None, period - 1)
      drafted = jnp.concatenate([written, last[None]])
      logits, cache = full_step(params, drafted, back(cache, jnp.int32(period - 1)))
      kept = 1 + accepted(probabilities(logits[:-1], drafted[1:], temperature), threshold)
      following = jnp.argmax(logits[kept - 1]).astype(jnp.int32)
      tokens = lax.dynamic_update_slice(tokens, drafted, (number,))
      return following, back(cache, period - kept), tokens, number + kept, rounds + 1

    zero = jnp.zeros((), jnp.int32)
    start = jnp.asarray(token, jnp.int32), cache, jnp.zeros((steps + period,), jnp.int32), zero, zero
    _, cache, tokens, number, rounds = lax.while_loop(lambda state: state[3] < steps, check, start)
    return CorrectedTokens(tokens[:steps], back(cache, number - steps), rounds, number)

  return generate


def probabilities(logits: Array, tokens: Array, temperature: float) -> Array:
  """Returns the probability of each of `tokens`, `int32[n]`, under `logits`, `[n, V]`, at a temperature: `float32[n]`.
  """
  shares = jax.nn.softmax(logits.astype(jnp.float32) / temperature, -1)
  return jnp.take_along_axis(shares, tokens[:, None], -1)[:, 0]


def accepted(shares: Array, threshold: float) -> Array:
  """Returns how many of the first probabilities `[n]` are at least `threshold`, `int32[]`, up to the first that is not.
  """
  return jnp.sum(jnp.cumprod((shares >= threshold).astype(jnp.int32)), dtype=jnp.int32)
