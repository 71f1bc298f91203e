"""Starts: how the first masks come about, where they are more than the pattern over a score of the weights.

A start is `start(choose, place, masks, key) -> masks`, over all sparse leaves at once, inside of `init`. `place(masks)`
is the whole parameter pytree at the point that these masks give; `choose(masks, probe=None, step=0, key=None)` is the
selection, where a leaf of `probe`, a pytree like the parameters, is what scores see as `signals.grad`. A probe is any
`params -> pytree like params`; those of the field are here too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import trees
from sparsejax.types import Array, PyTree, Start

Probe = Callable[[PyTree], PyTree]
Loss = Callable[[PyTree], Array]


def probed(probe: Probe, rounds: int = 1) -> Start:
  """Masks by scores that look at `probe`, chosen `rounds` times, each time from the point of the masks before.

  The selection sees the number of the round, 1 to `rounds`, as the step.
  """
  def start(choose, place, masks, key):
    once = lambda round, masks: choose(masks, probe(place(masks)), round, key)
    return once(rounds, jax.lax.fori_loop(1, rounds, once, masks) if rounds > 1 else masks)

  return start


def best_of(loss: Loss, candidates: int) -> Start:
  """Of `candidates` random masks the one with the lowest `loss(params)`; the first of equals, a NaN is no candidate."""
  def start(choose, place, masks, key):
    keys = jax.random.split(key, candidates)
    losses = jax.lax.map(lambda key: loss(place(choose(masks, key=key))), keys)
    return choose(masks, key=keys[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))])

  return start


def gradient(loss: Loss) -> Probe:
  """dL/dw."""
  return jax.grad(loss)


def hessian_gradient(loss: Loss) -> Probe:
  """H g, the Hessian of the loss times its gradient, g held fixed (Wang et al. 2020, GraSP, equation 8).

  Of the matrices alone, as in the authors' code: biases and norms have no part in g.
  """
  def probe(params: PyTree) -> PyTree:
    paths, leaves, treedef = trees.flatten(jax.grad(loss)(params))
    moving = [g if trees.matrices(path, g) else jnp.zeros_like(g) for path, g in zip(paths, leaves)]
    return jax.jvp(jax.grad(loss), (params,), (treedef.unflatten(moving),))[1]

  return probe


def synaptic_flow(outputs: Callable[[PyTree], Array]) -> Probe:
  """dR/d|w|, R the sum of `outputs(|params|)`, of an input of ones (Tanaka et al. 2020, SynFlow, algorithm 1).

  All parameters are made positive, biases and norms too, as the authors' code does. R is a product over the layers and
  may leave float32's range in very deep networks.
  """
  def probe(params: PyTree) -> PyTree:
    positive = jax.tree.map(jnp.abs, params)
    return jax.grad(lambda params: jnp.sum(outputs(params)))(positive)

  return probe


def of(other: PyTree) -> Probe:
  """`other` itself, whatever the parameters: `scores.gradient` is then its magnitude."""
  return lambda params: other


def needed(recipe: str, name: str, given: Any, what: str) -> Any:
  """`given`. Raises `ValueError` if it is `None`."""
  if given is None:
    raise ValueError(f'recipes.{recipe}: needs `{name}=`, {what}.')
  return given
