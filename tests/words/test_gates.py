"""Tests gates: the published sets with their defects mended, and that what is skipped is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import gates

pytestmark = pytest.mark.usefixtures('standard_promotion')
KEY = jax.random.key(0)


@pytest.mark.parametrize('fraction, kept', [(0.7, [1, 1, 0, 0]), (0.5, [1, 0, 0, 0]), (0.45, [1, 0, 0, 0]),
                                            (0.0, [1, 0, 0, 0]), (1.0, [1, 1, 1, 1])])
def test_the_smallest_set_that_carries_the_mass_is_taken(fraction, kept):
  """The published function gives [1, 0, 0, 0] for 0.7, and no unit at all for 0.45."""
  assert gates.mass(jnp.array([.5, .3, .15, .05]), fraction).tolist() == [bool(k) for k in kept]
  assert gates.mass(jnp.array([[.05, .3, .15, .5]]), fraction).sum() == sum(kept)
  assert gates.mass(jnp.zeros(3), fraction).sum() == 1


def test_a_gate_learns_the_set_and_few_units_are_computed():
  x = jax.random.normal(KEY, (64, 6)) + 3 * jax.nn.one_hot(jnp.arange(64) % 2 * 3, 6)
  into, out = jax.random.normal(KEY, (6, 16)), jax.random.normal(KEY, (16, 3))
  strength = jax.nn.relu(x @ into)
  target = gates.mass(gates.response(strength[:, None]), 0.9)
  gate, tx = gates.gate_of(KEY, 6, 16), optax.adam(0.1)

  @jax.jit
  def step(gate, state):
    moves, state = tx.update(jax.grad(lambda g: gates.foresight(gates.foreseen(g, x), target))(gate), state)
    return optax.apply_updates(gate, moves), state

  state, before = tx.init(gate), gates.foresight(gates.foreseen(gate, x), target)
  for _ in range(40):
    gate, state = step(gate, state)
  assert gates.foresight(gates.foreseen(gate, x), target) < before / 1.5
  keep = gates.foreseen(gate, x)[0] > 0
  y = gates.computed(x[:1], into, out, keep, (4, 8, 16))
  np.testing.assert_allclose(y, (jax.nn.relu(x[:1] @ into) * keep) @ out, rtol=2e-5, atol=1e-5)
  text = str(jax.make_jaxpr(lambda keep: gates.computed(x[:1], into, out, keep, (4, 16)))(keep))
  assert 'f32[6,4]' in text and 'f32[4,3]' in text, 'a narrow branch multiplies few columns'


def test_a_closed_unit_still_has_a_gradient():
  slope = jax.grad(lambda logits: jnp.sum(gates.straight_open(logits)))(jnp.array([-1.0, 2.0]))
  assert gates.straight_open(jnp.array([-1.0, 2.0])).tolist() == [0, 1] and (slope > 0).all()


@pytest.mark.parametrize('call, said', [
  (lambda: gates.computed(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones(3, bool), (2, 4)),
   'must rise'),
  (lambda: gates.mass(jnp.ones(3), 2.0), 'from 0 to 1'),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
