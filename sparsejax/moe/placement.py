"""Says where experts are held, and in which order they are loaded.

    ids = placement(loads, slots=2)                            # replicate the two hottest experts on every device
    device_loads(loads, owners, devices=8, ids=ids)
    order = schedule([2, 9, 1, 5], bits=[4, 4, 8, 2])          # of experts that are loaded before they compute
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparsejax import arguments, errors
from sparsejax.argument_kinds import ARRAY, NAME, SERIES, TIMES
from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['device_loads', 'makespan', 'placement', 'schedule']

RULES = ('johnson', 'hottest')
arguments.declare('placement device_loads', loads=ARRAY, slots=TIMES, owners=ARRAY, devices=TIMES, ids=ARRAY)
arguments.declare('schedule makespan', loads=SERIES, bits=SERIES, rule=NAME, order=SERIES)


@checked
def placement(loads: Array, slots: int) -> Array:
  """Returns the `slots` experts of the largest loads, `int32[slots]`, which every device is to hold a copy of.

  Hecate (Zhang et al. 2025) materialises the experts that the last step used most. Give the loads of the step before,
  `[E]`, which every device has already. The ids are then equal everywhere, and no exchange waits for them. Ties go to
  the lower expert. Raises `ValueError` for more slots than experts.
  """
  if loads.ndim != 1 or slots > len(loads):
    raise ValueError(f'moe.placement: {slots} slots for loads of shape {loads.shape}; give one load an expert, and at '
                     'most as many slots.')
  return jax.lax.top_k(loads, slots)[1].astype(jnp.int32)


@checked
def device_loads(loads: Array, owners: Array, devices: int, ids: Array) -> Array:
  """Returns the tokens that each device computes, `float32[devices]`; experts in `ids` share theirs evenly.

  `loads`: tokens of each expert `[E]`; `owners`: the device of each expert, `int[E]`. An expert that is not in `ids` is
  computed by its owner. Raises `ValueError` for owners of other experts, and for a known owner or id that is none.
  """
  if loads.ndim != 1 or owners.shape != loads.shape:
    raise ValueError(f'moe.device_loads: loads {loads.shape} and owners {owners.shape}; give one of each an expert.')
  for name, given, count in (('owners', owners, devices), ('ids', ids, len(loads))):
    if arguments.is_known(given) and given.size and not 0 <= int(jnp.min(given)) <= int(jnp.max(given)) < count:
      raise ValueError(f'moe.device_loads: `{name}` run from {jnp.min(given)} to {jnp.max(given)}; count from 0 to '
                       f'{count - 1}.')
  shared = jnp.zeros(loads.shape, bool).at[ids].set(True)
  loads = loads.astype(jnp.float32)
  own = jax.ops.segment_sum(jnp.where(shared, 0, loads), owners, devices)
  return own + jnp.sum(jnp.where(shared, loads, 0)) / devices


@checked
def schedule(loads: Sequence[float], bits: Sequence[float], rule: str = 'johnson') -> list[int]:
  """Returns the order in which experts are loaded and then computed, in two queues that overlap.

  `loads`: the seconds, or tokens, that an expert computes; `bits`: the time of its loading, in the same unit.
  `'hottest'` takes the largest loads first, and of equal ones the fewest bits: the heuristic of D2MoE (Wang et al.
  2025), for whole experts where the paper orders their bits. `'johnson'` is optimal (Johnson 1954): experts that load
  faster than they compute come first, the fastest to load in front, and then the others, the slowest to compute in
  front. Ties go to the lower expert.
  """
  if rule not in RULES:
    raise errors.unknown('moe.schedule', 'rule', rule, RULES)
  _refuse('schedule', loads, bits)
  if rule == 'hottest':
    return sorted(range(len(loads)), key=lambda i: (-loads[i], bits[i]))
  return sorted(range(len(loads)), key=lambda i: (0, bits[i]) if bits[i] < loads[i] else (1, -loads[i]))


@checked
def makespan(loads: Sequence[float], bits: Sequence[float], order: Sequence[int]) -> float:
  """Returns when the last expert of `order` is done, if each is computed once it is loaded and the one before is done.
  """
  _refuse('makespan', loads, bits)
  if sorted(order) != list(range(len(loads))):
    raise ValueError(f'moe.makespan: the order {list(order)} is none of {len(loads)} experts; name each once.')
  loaded = done = 0.0
  for i in order:
    loaded += bits[i]
    done = max(loaded, done) + loads[i]
  return float(done)


def _refuse(function: str, loads: Sequence[float], bits: Sequence[float]) -> None:
  if len(loads) != len(bits):
    raise ValueError(f'moe.{function}: {len(loads)} loads and {len(bits)} bits; give one of each for every expert.')
  if not all(0 <= number < math.inf for number in (*loads, *bits)):
    raise ValueError(f'moe.{function}: loads {list(loads)} and bits {list(bits)}; give finite numbers, at least 0.')
