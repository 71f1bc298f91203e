"""A penalty is a term of the loss that pulls weights, or whole units of groups, to zero.

    penalty = penalties.group_norm(1e-3, groups)
    penalty.value(leaves)                        # the term of the loss
    penalty.prox(leaves, 0.1)                    # argmin_x of ||x - leaves||^2 / 2 + 0.1 * value(x)
    tx = optax.chain(transforms.penalised(penalty), optax.sgd(0.1))
    tx = transforms.proximal(optax.sgd(0.1), penalty, learning_rate=0.1)

`leaves` maps paths to arrays. A unit spans several leaves, so that a penalty sees all leaves at once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from sparsejax.arguments import checked
from sparsejax.types import Array, Bound
from sparsejax.units import BESIDE, PRODUCED, Places

__all__ = ['Penalty', 'effective_sizes', 'group_norm', 'l1', 'latency', 'sparse_envelope']

Leaves = Mapping[str, Array]
OUT = (PRODUCED, BESIDE)  # A zero-invariant group of OTO holds the producer of a unit, with biases and norms.


class Penalty(NamedTuple):
  """A `Penalty` is `value(leaves) -> float32[]`, with two more functions, or `None` where there is no closed form.

  `prox(leaves, step)` returns argmin_x of ||x - leaves||^2 / 2 + step * value(x). `lmo(gradients, radius)` returns the
  argmin of <gradients, x> over the x whose norm is at most `radius`, for conditional gradients (Frank-Wolfe).
  """

  value: Callable[[Leaves], Array]
  prox: Callable[[Leaves, Any], Leaves] | None = None
  lmo: Callable[[Leaves, Any], Leaves] | None = None


@checked
def l1(penalty: float) -> Penalty:
  """Returns the penalty `penalty` * sum |w|. Its prox is soft thresholding, which makes exact zeros (ISTA)."""
  return Penalty(Bound(_l1, (penalty,)), Bound(_softened, (penalty,)), _largest)


def _l1(leaves: Leaves, penalty: float) -> Array:
  return penalty * jnp.sum(jnp.stack([jnp.sum(jnp.abs(w.astype(jnp.float32))) for w in leaves.values()]))


def _softened(leaves: Leaves, step: Any, penalty: float) -> Leaves:
  return {path: (jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * penalty, 0)).astype(w.dtype)
          for path, w in leaves.items()}


def _largest(gradients: Leaves, radius: Any) -> Leaves:
  """Returns the corner of the l1 ball against the largest entry of the gradients; of equal entries, the first."""
  flat, unravel = ravel_pytree(dict(gradients))
  first = jnp.arange(flat.size) == jnp.argmax(jnp.abs(flat))
  return unravel(jnp.where(first, -radius * jnp.sign(flat), 0))


@checked
def group_norm(penalty: float, groups: Mapping[str, Any]) -> Penalty:
  """Returns the penalty `penalty` * sum over units of ||x||_2, the group lasso (Yuan and Lin 2006).

  x are the weights that produce a unit, with its biases and norm scales. Its gradient at x = 0 is 0, as in the authors'
  code of OTO. The prox shrinks each unit by `step * penalty`, and makes units zero whose norm is less.
  """
  return Penalty(Bound(_group_norm, (penalty, groups)), Bound(_shrunk, (penalty, groups)), Bound(_steepest, (groups,)))


def _group_norm(leaves: Leaves, penalty: float, groups: Mapping[str, Any]) -> Array:
  return penalty * jnp.sum(_norms(Places.of(groups, leaves), leaves))


def _shrunk(leaves: Leaves, step: Any, penalty: float, groups: Mapping[str, Any]) -> Leaves:
  places = Places.of(groups, leaves)
  norms = _norms(places, leaves)
  return _times(places, leaves, jnp.maximum(1 - step * penalty / jnp.where(norms > 0, norms, 1), 0))


def _steepest(gradients: Leaves, radius: Any, groups: Mapping[str, Any]) -> Leaves:
  places = Places.of(groups, gradients)
  norms = _norms(places, gradients)
  first = (jnp.arange(norms.size) == jnp.argmax(norms)).reshape(norms.shape)
  return _times(places, gradients, jnp.where(first, -radius / jnp.where(norms > 0, norms, 1), 0), outside=0)


def _norms(places: Places, leaves: Leaves) -> Array:
  """Returns the norm of what produces each unit, `float32[rows, units]`; its gradient at zero is zero."""
  squares = places.sums([jnp.square(w.astype(jnp.float32)) for w in leaves.values()], OUT)
  return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _times(places: Places, leaves: Leaves, factors: Array, outside: float = 1) -> Leaves:
  """Returns the leaves with what produces each unit times the unit's factor; other weights times `outside`."""
  places.refuse_shared(OUT)
  return {path: (w * factor).astype(w.dtype) if factor is not None else w * outside
          for (path, w), factor in zip(leaves.items(), places.spread(factors, OUT, outside))}


@checked
def sparse_envelope(penalty: float, groups: Mapping[str, Any], kept: int) -> Penalty:
  """Returns `penalty` times the group sparse envelope: the convex envelope of ||x||^2 / 2 over `kept` units (WGSEF).

  S(x) = min over 0 <= u <= 1 with sum u <= `kept` of sum ||x_i||^2 / (2 u_i). The prox solves for u by bisection over
  the bits of one float, in linear time. A large penalty makes all units but about `kept` zero. More units may stay for
  a small penalty: raise the penalty over the steps, or choose the units at the end. The form is derived from the
  definition of an envelope. The weights that the published method (2023) gives to units are all one.
  """
  return Penalty(Bound(_envelope, (penalty, groups, kept)), Bound(_kept_few, (penalty, groups, kept)))


def _envelope(leaves: Leaves, penalty: float, groups: Mapping[str, Any], kept: int) -> Array:
  """Returns the envelope: the u of the limit of small steps is proportional to the norms, at most one."""
  norms = _norms(Places.of(groups, leaves), leaves)
  u = _shares(norms, jnp.float32(0), kept)
  return penalty * jnp.sum(jnp.where(norms > 0, jnp.square(norms) / jnp.where(u > 0, u, 1), 0)) / 2


def _kept_few(leaves: Leaves, step: Any, penalty: float, groups: Mapping[str, Any], kept: int) -> Leaves:
  places, rate = Places.of(groups, leaves), jnp.float32(step) * penalty
  u = _shares(_norms(places, leaves), rate, kept)
  return _times(places, leaves, jnp.where(u > 0, u / (u + rate), 0))


def _shares(norms: Array, rate: Array, kept: int) -> Array:
  """Returns u = clip(norms * eta - rate, 0, 1) with sum `kept`, or 1 for every norm if no more are above zero."""
  highest = jax.lax.bitcast_convert_type(jnp.float32(jnp.finfo(jnp.float32).max), jnp.int32)

  def u(bits: Array) -> Array:
    eta = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(norms > 0, jnp.clip(norms * eta - rate, 0, 1), 0)

  def halved(i: Array, low: Array) -> Array:
    trial = low | (1 << (30 - i))
    return jnp.where((trial <= highest) & (jnp.sum(u(jnp.minimum(trial, highest))) <= kept), trial, low)

  few = jnp.sum(norms > 0) <= kept
  return jnp.where(few, (norms > 0).astype(jnp.float32), u(jax.lax.fori_loop(0, 31, halved, jnp.int32(0))))


@checked
def latency(penalty: float, groups: Mapping[str, Any], cost: Callable[[Mapping[str, Array]], Array]) -> Penalty:
  """Returns `penalty` * cost(sizes), a surrogate of the time of a model in which units shrink (l1/l2 latency).

  `sizes` maps the name of each group to its effective size, (sum ||x||)^2 / sum ||x||^2 over its units: k for k equal
  units, whatever their scale. `cost` is any function of the sizes, as `structured.multiply_adds(groups)`, or one fitted
  to measured times. There is no prox. Units do not become zero by the gradient alone; choose them at the end.
  """
  return Penalty(Bound(_latency, (penalty, groups, cost)))


def _latency(leaves: Leaves, penalty: float, groups: Mapping[str, Any], cost: Any) -> Array:
  return penalty * cost(effective_sizes(groups, leaves))


@checked
def effective_sizes(groups: Mapping[str, Any], leaves: Leaves) -> dict[str, Array]:
  """Returns the effective size of each group, `float32[]`: (sum ||x||)^2 / sum ||x||^2, the mean over layers."""
  places = Places.of(groups, leaves)
  norms = _norms(places, leaves)
  squares = jnp.sum(jnp.square(norms), 1)
  each = jnp.where(squares > 0, jnp.square(jnp.sum(norms, 1)) / jnp.where(squares > 0, squares, 1), 0)
  return {name: jnp.mean(jnp.stack([each[i] for i, row in enumerate(places.rows) if row.group == number]))
          for number, name in enumerate(places.names)}


def part(function: str, penalty: Penalty, name: str) -> Callable[..., Any]:
  """Returns the `prox` or the `lmo` of a penalty. Raises `ValueError` if the penalty has none."""
  found = getattr(penalty, name)
  if found is None:
    raise ValueError(f'{function}: this penalty has no `{name}`; use transforms.penalised(penalty), which adds its '
                     'gradient, or another penalty.')
  return found
