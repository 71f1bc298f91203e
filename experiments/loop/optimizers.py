"""Makes the optimizers that configs can name, with warm-up, decay, clipping and weight decay on matrices only.

Parameters of rank two and more count as matrices.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import optax

from experiments import configs

TABLE = {'adamw': optax.adamw, 'lion': optax.lion, 'sgd': optax.sgd}
# Each decay maps the peak of the learning rate and a number of steps to a schedule.
DECAYS = {
    'constant': lambda peak, steps: optax.constant_schedule(peak),
    'cosine': optax.cosine_decay_schedule,
    'linear': lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


def make(name: str, *, total_steps: int, learning_rate: float, warmup: float, decay: str, weight_decay: float,
         clip: float | None, options: Mapping[str, Any]) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns the schedule of the learning rate, and the optimizer that follows this schedule.

  `warmup` is a number or a fraction of steps, as in `in_steps`. `options` are further arguments of the optimizer in
  `TABLE`. `clip` is the largest global norm of the gradient, or `None`. Raises `ValueError` for an unknown optimizer,
  option or decay.
  """
  configs.refuse_unknown('optimizers.make', 'optimizer', [name], TABLE)
  valid = set(inspect.signature(TABLE[name]).parameters) - {'learning_rate', 'weight_decay', 'mask'}
  configs.refuse_unknown('optimizers.make', f'option of {name}', options, valid)
  schedule = learning_rates(learning_rate, decay, in_steps(warmup, total_steps), total_steps)
  matrices = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
  if name == 'sgd':  # `optax.sgd` has no weight decay of its own.
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay, matrices), optax.sgd(schedule, **options))
  else:
    optimizer = TABLE[name](schedule, weight_decay=weight_decay, mask=matrices, **options)
  return schedule, optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)


def learning_rates(peak: float, decay: str, warmup: int, total_steps: int) -> optax.Schedule:
  """Returns a schedule that rises linearly to `peak` in `warmup` steps, then follows `decay`.

  `'cosine'` and `'linear'` reach 0 at step `total_steps`. Raises `ValueError` if `decay` is not one of `DECAYS`.
  """
  configs.refuse_unknown('optimizers.make', 'decay', [decay], DECAYS)
  rise = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
  return optax.join_schedules([rise, DECAYS[decay](peak, max(1, total_steps - warmup))], [warmup])


def in_steps(value: int | float, total_steps: int) -> int:
  """Returns `value` as a whole number of steps: a float of at most 1.0 is a fraction of `total_steps`.

  Raises `ValueError` for a negative `value`, and for a float above 1.0 that is not whole.
  """
  if value < 0 or isinstance(value, float) and value > 1 and not value.is_integer():
    raise ValueError(f'optimizers: {value!r} is neither a number of steps nor a fraction of them from 0.0 to 1.0.')
  return round(value * total_steps) if isinstance(value, float) and value <= 1 else int(value)
