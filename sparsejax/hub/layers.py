"""Computes the layers that the readers share, and finds the names of a model that is part of a larger one.

    rooted({'bert.pooler.weight': w}, 'bert.')['pooler.weight']             # with or without the prefix
    attended(q, k, v, mask)                                                 # `[B, T, heads, D]`
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.types import Array


def rooted(params: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
  """Returns the parameters under their names without `prefix`, which files of larger models have."""
  if not any(name.startswith(prefix) for name in params):
    return params
  return {name.removeprefix(prefix): value for name, value in params.items()}


def refuse_others(function: str, config: Mapping[str, Any], **wanted: Any) -> None:
  """Raises `ValueError` if the configuration has another value than the only one that a reader knows."""
  for name, value in wanted.items():
    if config.get(name, value) != value:
      raise ValueError(f'hub.{function}: `{name}` is {config[name]!r} in config.json, and only {value!r} is known.')


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
  """Returns `x` `[..., D]` normalised to mean 0 and variance 1 in `float32`, times `weight`, plus `bias`."""
  wide = x.astype(jnp.float32)
  centered = wide - jnp.mean(wide, -1, keepdims=True)
  scaled = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + epsilon)
  shape = (1,) * (x.ndim - 1) + (-1,)
  return scaled.astype(x.dtype) * weight.reshape(shape) + bias.reshape(shape)


def plus(x: Array, bias: Array) -> Array:
  """Returns `x` `[..., D]` plus `bias` `[D]`."""
  return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def attended(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Returns softmax attention of `[B, T, heads, D]`; `mask` broadcasts to `bool[B, heads, T, T]`."""
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k).astype(jnp.float32) * q.shape[-1]**-0.5
  scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, jnp.finfo(jnp.float32).min)
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores).astype(v.dtype), v)


def causal(valid: Array) -> Array:
  """Returns which keys each query may look at, `bool[B, 1, T, T]`: valid ones up to its own position."""
  place = jnp.arange(valid.shape[1])
  return (place[None, :] <= place[:, None])[None, None] & valid[:, None, None, :]
