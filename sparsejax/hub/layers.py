"""Computes the layers that the readers share, and finds the names of a model that is part of a larger one.

    rooted({'bert.pooler.weight': w}, 'bert.')['pooler.weight']             # with or without the prefix
    first_positions(p['wpe.weight'], length=128)                            # `[1, T, D]`
    attended(q, k, v, mask)                                                 # `[B, T, heads, D]`
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.types import Array


class Required(dict[str, Any]):
  """A `Required` is a dict that raises `ValueError` for a missing key, and says in `what` the key is missing."""

  def __init__(self, what: str, entries: Mapping[str, Any]):
    super().__init__(entries)
    self.what = what

  def __missing__(self, name: str) -> Any:
    raise ValueError(f'hub: {self.what} has no {name!r}. Give a folder that is complete, as the model was saved.')


def rooted(params: Mapping[str, Any], prefix: str) -> Required:
  """Returns the parameters under their names without `prefix`, which files of larger models have."""
  return Required('the model', {name.removeprefix(prefix): value for name, value in params.items()})


def first_positions(table: Array, length: int) -> Array:
  """Returns the first `length` rows of a table of positions, `[1, T, D]`; raises `ValueError` if there are fewer."""
  if length > len(table):
    raise ValueError(f'hub: a row has {length} tokens, and the model has {len(table)} positions. Give shorter rows, '
                     'for texts by --length.')
  return table[:length][None]


def heads_of(x: Array, number: int) -> Array:
  """Returns `x` `[B, T, D]` in heads, `[B, T, heads, D / heads]`; raises `ValueError` if `number` divides no D."""
  if x.shape[-1] % number:
    raise ValueError(f'hub: config.json has {number} heads, which do not divide the {x.shape[-1]} outputs of a '
                     'projection. Give the configuration of this model.')
  return x.reshape(*x.shape[:2], number, -1)


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
