"""Losses that compare a sparse model with the dense model from which it was made.

    loss = task(params, batch) + losses.squarehead(states(params, batch), states(dense, batch), batch['valid'])
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparsejax.types import Array

_FLOOR = 2.0**-7  # the authors' epsilon: that of bfloat16


def squarehead(states: Sequence[Array], teacher_states: Sequence[Array], valid: Array | None = None) -> Array:
  """Returns the SquareHead loss `float32[]` (Kurtic et al. 2023, 2310.06927), summed over hidden states.

  `states`, `teacher_states`: the hidden states of the layers, `[..., D]` each, of the sparse and of the dense model.
  `valid`: `bool[...]`, which tokens count; `None` counts all. The loss of a state is the mean square of the difference
  divided by that of the teacher's state plus 2^-7. A state with a mean square below about 0.01 thus barely counts.
  No gradient flows to the teacher. The authors' code divided by the number of layers at first, and sums since.
  """
  if len(states) != len(teacher_states) or not len(states):
    raise ValueError(f'losses.squarehead: {len(states)} states and {len(teacher_states)} of the teacher; give the same '
                     'hidden states of both models, at least one.')
  return jnp.sum(jnp.stack([_relative(i, s, t, valid) for i, (s, t) in enumerate(zip(states, teacher_states))]))


def channelwise(features: Array, teacher_features: Array, temperature: float = 1.0) -> Array:
  """Returns the channel-wise distillation loss `float32[]` of two maps `[batch, ..., channels]` (2011.13256, eq. 4).

  The softmax of each channel runs over all places between both axes, not over channels. The loss is
  temperature^2 / channels times the sum over channels of KL(teacher || student), the mean over the batch. A constant
  that is added to a channel does not count. No gradient flows to the teacher. Maps of fewer channels need a matrix of
  the student's own before. Raises `ValueError` for two shapes, and for maps without places.
  """
  if jnp.shape(features) != jnp.shape(teacher_features) or jnp.ndim(features) < 3:
    raise ValueError(f'losses.channelwise: maps are [batch, places, channels], of one shape, not '
                     f'{jnp.shape(features)} and {jnp.shape(teacher_features)}; bring the student to the channels of '
                     'the teacher by a 1 x 1 convolution.')
  if not temperature > 0:
    raise ValueError(f'losses.channelwise: `temperature` must be positive, not {temperature}.')
  flat = lambda x: x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1]) / temperature
  own, other = (jax.nn.log_softmax(flat(x), 1) for x in (features, jax.lax.stop_gradient(teacher_features)))
  return temperature**2 * jnp.mean(jnp.sum(jnp.exp(other) * (other - own), 1))


def _relative(i: int, state: Array, teacher: Array, valid: Array | None) -> Array:
  if jnp.shape(state) != jnp.shape(teacher) or valid is not None and jnp.shape(valid) != jnp.shape(state)[:-1]:
    raise ValueError(f'losses.squarehead: state {i} has shape {jnp.shape(state)}, the teacher {jnp.shape(teacher)}, '
                     f'and valid {None if valid is None else jnp.shape(valid)}; give equal shapes, and one bool a '
                     'token.')
  counts = jnp.ones(jnp.shape(state)[:-1], bool) if valid is None else valid
  teacher = jax.lax.stop_gradient(teacher)
  difference = _mean_square(state.astype(jnp.float32) - teacher.astype(jnp.float32), counts)
  return difference / (_mean_square(teacher.astype(jnp.float32), counts) + _FLOOR)


def _mean_square(x: Array, counts: Array) -> Array:
  squares = jnp.where(counts[..., None], jnp.square(x), 0)
  return jnp.sum(squares) / jnp.maximum(jnp.sum(counts, dtype=jnp.float32) * x.shape[-1], 1)
