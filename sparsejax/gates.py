"""A gate says, for each input, which units are computed: the words of dynamic channel skipping (FTWT).

    target = mass(strength, 0.9)                      # the units that carry 90 % of a layer's response
    logits = foreseen(gate, x)                        # predicted from the layer's input
    loss = task + foresight(logits, target)
    y = computed(x, up, down, logits[0] > 0, widths=(64, 128, 256))      # one input: only the open units

A gate is trained beside the layer; a closed unit costs nothing where one input is computed at a time.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['computed', 'foreseen', 'foresight', 'gate_of', 'mass', 'response', 'straight_open']


@checked
def mass(strength: Array, fraction: float) -> Array:
  """Returns the smallest set of units whose share of the total strength is at least `fraction`, `bool[..., units]`.

  `strength` is at least 0; of equal units the first is taken. At least one unit is in the set, also without any
  strength. FTWT (Elkerdawy et al. 2022, 2110.08232) drops the unit that crosses the mass, and so may drop every unit;
  here the unit that crosses is kept.
  """
  total = jnp.sum(strength, -1, keepdims=True)
  share = strength / jnp.where(total > 0, total, 1)
  order = jnp.argsort(share, -1, descending=True, stable=True)
  before = jnp.cumsum(jnp.take_along_axis(share, order, -1), -1) - jnp.take_along_axis(share, order, -1)
  first = jnp.broadcast_to(jnp.arange(strength.shape[-1]) == 0, strength.shape)
  taken = (before < fraction - 1e-6) & (total > 0) | first
  return jnp.take_along_axis(taken, jnp.argsort(order, -1), -1)


@checked
def response(outputs: Array) -> Array:
  """Returns the strength of each unit, `float[batch, units]`: the largest |output| over all places."""
  return jnp.max(jnp.abs(outputs), axis=tuple(range(1, outputs.ndim - 1)))


@checked
def gate_of(key: Array, inputs: int, units: int) -> dict[str, Array]:
  """Returns the parameters of a gate: a matrix `[inputs, units]` and a bias that opens all units."""
  return {'kernel': jax.random.normal(key, (inputs, units)) / inputs**0.5, 'bias': jnp.ones(units)}


@checked
def foreseen(gate: Mapping[str, Array], x: Array) -> Array:
  """Returns the logits of the units, `float[batch, units]`, from the input `[batch, ..., features]` of the layer.

  The input is averaged over all places, and a softmax over the features follows, as in the authors' code.
  """
  pooled = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
  return jax.nn.softmax(pooled, -1) @ gate['kernel'] + gate['bias'][None]


@checked
def straight_open(logits: Array) -> Array:
  """Returns 1 where a unit is open and 0 elsewhere, with the gradient of the sigmoid (straight-through)."""
  soft = jax.nn.sigmoid(logits)
  return soft + jax.lax.stop_gradient((logits > 0).astype(soft.dtype) - soft)


@checked
def foresight(logits: Array, target: Array, weight: float = 10.0) -> Array:
  """Returns the loss of a gate: cross-entropy to the target set, summed over units, the mean over the batch."""
  wrong = jax.nn.softplus(jnp.where(target, -logits, logits))
  return weight * jnp.mean(jnp.sum(wrong, -1))


@checked
def computed(x: Array, into: Array, out: Array, keep: Array, widths: Sequence[int],
             activation: Callable[[Array], Array] = jax.nn.relu) -> Array:
  """Returns `activation(x @ into) @ out` over the units in `keep`, `bool[units]`, and computes few others.

  The least of the rising `widths` that holds all open units is computed, on gathered columns and rows. Open units
  beyond the last width are dropped, those of the highest numbers first.
  `x`: `[..., features]`. Raises `ValueError` for widths that do not rise.
  """
  if not widths or list(widths) != sorted(set(widths)) or widths[-1] > len(keep):
    raise ValueError(f'gates.computed: `widths` must rise up to the {len(keep)} units, not {tuple(widths)}.')
  order = jnp.argsort(~keep, stable=True)
  number = jnp.sum(keep)

  def narrow(width: int) -> Callable[[], Array]:
    own = order[:width]

    def run() -> Array:
      h = activation(x @ into[:, own])
      return jnp.where(jnp.broadcast_to(keep[own], h.shape), h, jnp.zeros((), h.dtype)) @ out[own]
    return run

  fits = jnp.sum(number > jnp.asarray(widths[:-1], number.dtype)) if len(widths) > 1 else 0
  return jax.lax.switch(fits, [narrow(width) for width in widths])
