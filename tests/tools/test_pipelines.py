"""Zero-bubble schedules: the paper's table, halves that are the whole, and FLOPs of the compiled halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import pipelines


def layer(w, x):
  return jnp.tanh(x @ w)


def idle(**times):
  return [each.idle for each in pipelines.bubbles(4, 8, **times).schedules]


def test_idle_times_of_the_paper_and_of_sparse_products():
  """[calc]: 4 stages with equal times, and with halved products but a dense gradient of the weights."""
  assert idle() == [9, 3, 0, 0]
  assert idle(forward=0.5, inputs=0.5) == [6, 0, 0, 0]
  text = str(pipelines.bubbles(4, 8))
  assert '1F1B' in text and '27.3 %' in text and '11.1 %' in text  # 9 of 33 and 3 of 27


def test_both_halves_together_are_the_gradient():
  rng = np.random.default_rng(0)
  w, x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (5, 4), (5, 3)))
  y, pull_input, pull_weights = pipelines.split_backward(layer)(w, x)
  wanted, pull = jax.vjp(layer, w, x)
  for found, other in zip((y, pull_weights(dy), pull_input(dy)), (wanted, *pull(dy))):
    np.testing.assert_array_equal(found, other)


def test_the_work_of_a_matrix_is_the_same_in_all_three_parts():
  shape = jax.ShapeDtypeStruct
  found = pipelines.work(layer, shape((32, 64), jnp.float32), shape((16, 32), jnp.float32))
  product = 2 * 16 * 32 * 64
  assert {name: round(flops / product) for name, flops in found.items()} == {'forward': 1, 'inputs': 1, 'weights': 1}


@pytest.mark.parametrize('times', [{'forward': -1}, {'inputs': 'x'}])
def test_times_that_are_none_are_refused(times):
  with pytest.raises(ValueError, match=f'^bubbles|^pipelines.bubbles: `{next(iter(times))}` must be'):
    pipelines.bubbles(4, 8, **times)
