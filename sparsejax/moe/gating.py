"""Has the gates of experts: functions `(logits, key, step) -> Gated`, with weights of exactly zero.

    gate = dense_to_sparse(schedules.linear(2.0, 0.3, end=1000), hard_from=1000)
    weights, penalty = gate(logits, key, step)          # float[T, E], float[]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments
from sparsejax.argument_kinds import ARRAY, FLAG, FUNCTION, PART, POSITIVE, STEP, TIMES, Kind
from sparsejax.arguments import checked
from sparsejax.gates import Gated, refuse_logits
from sparsejax.types import Array, Bound, Schedule

__all__ = ['Gated', 'balance', 'dense_to_sparse', 'hashed', 'softmax', 'top_k']

arguments.declare('balance', probabilities=ARRAY, chosen=ARRAY)
arguments.declare('softmax dense_to_sparse', tau=Kind(
    'positive, or a schedule of the step', POSITIVE.fits, coefficient=True, scheduled=True), activation=FUNCTION,
                  threshold=PART, hard_from=STEP, noisy=FLAG)
arguments.declare('top_k hashed', k=TIMES, experts=TIMES, seed=STEP, normalised=FLAG)


@checked
def balance(probabilities: Array, chosen: Array) -> Array:
  """Returns the load balancing loss `E^2 mean_e(mean_t p mean_t chosen)`, `float32[]` (Fedus et al. 2021, equation 4).

  `probabilities`, `chosen`: `[..., E]`; the means run over all other axes. The loss is 1 where one expert a token is
  chosen evenly, and E where each token chooses all. The loss is also a pressure towards few experts.
  """
  experts = probabilities.shape[-1]
  mean = lambda x: jnp.mean(x.reshape(-1, experts).astype(jnp.float32), 0)
  return experts**2 * jnp.mean(mean(probabilities) * mean(chosen))


@checked
def softmax(tau: float | Schedule = 1.0, activation: Callable[[Array], Array] | None = None) -> Callable[..., Gated]:
  """Returns the dense gate `softmax(activation(logits) / tau)`, whose weights are never zero; its penalty is 0.

  `tau`: a number, or a schedule of the step. An `activation` before the softmax is what Nguyen et al. 2024 (Is
  Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?, 2401.13875) need for fast estimation.
  """
  return Bound(_soft, (tau, activation))


def _soft(logits: Array, key: Any, step: Any, tau: Any, activation: Any) -> Gated:
  refuse_logits('moe.softmax', logits)
  logits = logits if activation is None else activation(logits)
  return Gated(jax.nn.softmax(logits / _now(tau, step, logits)), jnp.zeros((), jnp.float32))


@checked
def top_k(k: int, normalised: bool = True) -> Callable[..., Gated]:
  """Returns the gate that weights the `k` largest logits by their softmax, and all other experts by 0.

  `normalised`: the softmax is that of the chosen logits alone (Shazeer et al. 2017). With a k of 1 the weight is then
  always 1, so that the penalty alone trains the gate. Otherwise the softmax is that of all logits (Fedus et al. 2021),
  and the task trains the gate for each k. Ties go to the lower index and NaN ranks last. A chosen logit that is 0 stays
  chosen, which the code of COMET's baseline drops. The penalty is `balance` of the softmax over all experts. Raises
  `ValueError` for fewer experts.
  """
  return Bound(_top_k, (k, normalised))


def _top_k(logits: Array, key: Any, step: Any, k: int, normalised: bool) -> Gated:
  refuse_logits('moe.top_k', logits)
  experts = logits.shape[-1]
  if k > experts:
    raise ValueError(f'moe.top_k: k={k} of {experts} experts; lower k, or add experts.')
  chosen = _best(logits, k)
  among = chosen if normalised else ~jnp.isnan(logits)
  weights = jax.nn.softmax(jnp.where(among, logits, -jnp.inf))
  return Gated(jnp.where(chosen, weights, 0), balance(jax.nn.softmax(logits), chosen))


def _best(logits: Array, k: int) -> Array:
  places = jax.lax.top_k(jnp.where(jnp.isnan(logits), -jnp.inf, logits), k)[1]
  return jnp.any(places[..., None] == jnp.arange(logits.shape[-1]).reshape(*(1,) * places.ndim, -1), -2)


@checked
def hashed(experts: int, seed: int = 0) -> Callable[..., Gated]:
  """Returns the gate that sends each token id to one expert by a hash, with weight 1 (Roller et al. 2021, 2106.04426).

  The gate takes ids, `int[...]`, in the place of logits, and returns weights `float32[..., experts]`. `seed` chooses
  the hash. Nothing is trained, and the penalty is 0.
  """
  return Bound(_hashed, (experts, seed))


def _hashed(ids: Array, key: Any, step: Any, experts: int, seed: int) -> Gated:
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f'moe.hashed: ids of dtype {ids.dtype}; give the integer ids of the tokens, not logits.')
  draw = lambda one: jax.random.bits(jax.random.fold_in(jax.random.key(seed), one)) % jnp.uint32(experts)
  places = jax.vmap(draw)(ids.reshape(-1)).reshape(ids.shape)
  return Gated(jax.nn.one_hot(places, experts, dtype=jnp.float32), jnp.zeros((), jnp.float32))


@checked
def dense_to_sparse(tau: float | Schedule, threshold: float = 1e-3, hard_from: int | None = None,
                    noisy: bool = False) -> Callable[..., Gated]:
  """Returns the gate that begins with all experts and ends with one: dense-to-sparse (Nie et al. 2021, 2112.14397).

  With a key, Gumbel noise is added to the logits; without one, as in evaluation, none is. An expert is chosen where the
  softmax at temperature `tau` is above `threshold`, and from step `hard_from` on where it is largest. The weight of a
  chosen expert is its softmax at temperature 1 without noise, not renormalised; with `noisy`, the softmax at `tau`. The
  penalty is `balance` of the weights.

  The code of EvoMoE draws noise in evaluation too, and its default of -1 ends the soft phase at the first update.
  Raises `ValueError` where the threshold could leave a token without any expert: at least 1 / E.
  """
  return Bound(_dense_to_sparse, (tau, threshold, hard_from, noisy))


def _dense_to_sparse(logits: Array, key: Any, step: Any, tau: Any, threshold: float, hard_from: Any, noisy: bool
                     ) -> Gated:
  refuse_logits('moe.dense_to_sparse', logits)
  experts = logits.shape[-1]
  if threshold * experts >= 1:
    raise ValueError(f'moe.dense_to_sparse: a threshold of {threshold} may leave a token without any of {experts} '
                     f'experts; keep it below 1 / {experts}.')
  noise = 0 if key is None else jax.random.gumbel(key, logits.shape, logits.dtype)
  soft = jax.nn.softmax((logits + noise) / _now(tau, step, logits))
  chosen = soft > threshold
  if hard_from is not None:
    chosen = jnp.where(step >= hard_from, _best(soft, 1), chosen)
  weights = jnp.where(chosen, soft if noisy else jax.nn.softmax(logits), 0)
  return Gated(weights, balance(weights, chosen))


def _now(tau: Any, step: Any, like: Array) -> Array:
  return jnp.asarray(tau(step) if callable(tau) else tau, like.dtype)
