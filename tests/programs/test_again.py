"""A first result that is computed again from the second is the first result, and only where nothing else is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.programs import again

PARAMS = {'a': jnp.linspace(-1, 1, 6).reshape(2, 3), 'b': jnp.linspace(0, 2, 4)}
GRADS = jax.tree.map(jnp.cos, PARAMS)
# By optimizer: whether its updates follow from the next state, and whether they do so entry by entry.
OPTIMIZERS = {
    'adamw': (optax.adamw(1e-2), True, True),
    'momentum': (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)), True, True),
    'scheduled': (optax.adam(optax.linear_schedule(0.1, 0.0, 10)), True, True),
    'lamb': (optax.lamb(1e-2), True, False),  # scales by the norm of a whole leaf
    'plain': (optax.sgd(0.1), False, False),  # has no state
    'every second': (optax.MultiSteps(optax.adam(0.1), 2), False, False),  # reads the state before, too
}


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_first_result_follows_from_the_second(name):
  optimizer, follows, entrywise = OPTIMIZERS[name]
  state = optimizer.init(PARAMS)
  seen = []

  @jax.jit
  def step(state):
    halves = again.halves(lambda state: optimizer.update(GRADS, state, PARAMS), state)
    seen.append((halves.again is not None, halves.again is not None and halves.entrywise))
    anew = halves.again(halves.second) if halves.again else halves.first
    return halves.first, halves.second, anew

  first, second, anew = step(state)
  moves, expected = jax.jit(optimizer.update)(GRADS, state, PARAMS)
  assert seen == [(follows, entrywise)]
  for ours, theirs in ((first, moves), (anew, moves), (second, expected)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_a_second_result_with_other_entries_gives_another_first_result():
  tx = optax.sgd(0.5, momentum=0.9)

  @jax.jit
  def step(state):
    halves = again.halves(lambda state: tx.update(GRADS, state, PARAMS), state)
    return halves.again(jax.tree.map(jnp.ones_like, halves.second))

  jax.tree.map(lambda u: np.testing.assert_array_equal(u, -0.5), step(tx.init(PARAMS)))


def test_outside_of_jit_nothing_is_computed_later():
  tx = optax.sgd(0.5, momentum=0.9)
  assert again.halves(lambda state: tx.update(GRADS, state, PARAMS), tx.init(PARAMS)).again is None
