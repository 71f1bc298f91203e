"""Tests that what builders choose runs in programs: routed, learned, searched and reused blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from products import normal

import kernels_pallas
from sparsejax import attention

T, H, D = 16, 2, 4


def program(params, x):
  """Two attentions with causal masks: the second reads what the first has written."""
  for w in (params['first'], params['second']):
    q, k, v = (jnp.einsum('btd,dhe->bthe', x, w[i]) for i in range(3))
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
  return x


PARAMS = {name: normal((3, H * D, H, D), seed=i) * 0.7 for i, name in enumerate(('first', 'second'))}
X = normal((2, T, H * D), seed=7)
DENSE = functools.cache(lambda: np.asarray(jax.jit(program)(PARAMS, X)))

PREDICTOR = {'query': jnp.eye(D), 'key': jnp.eye(D), 'pool': normal((T, 4)), 'basis': normal((T, 4), seed=1),
             'least': .1, 'floor': .05}
BUILDERS = {
    'routed': lambda keep: attention.routed(keep, block=4), 'quest': lambda keep: attention.quest(keep, block=4),
    'per head': lambda keep: attention.routed(keep, block=4, per_head=True),
    'lsh': lambda keep: attention.lsh(jax.random.key(3), keep, block=4),
    'predicted': lambda keep: attention.predicted(PREDICTOR, keep, block=4),
    'measured': lambda keep: attention.measured(keep / 4 - .1, block=4),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize('keep', [2, 4])
@pytest.mark.parametrize('name', BUILDERS)
def test_chosen_blocks_are_those_of_the_mask(name, keep):
  """Compares the blocks with the mask of each example, and all blocks with the dense result."""
  builder = BUILDERS[name](keep)
  by_mask = attention.attended(program, lambda site: site.attend(_tokens(builder(site))))
  run = kernels_pallas.sparse_attention(program, builder)
  expected, found = jax.jit(lambda *a: (by_mask(*a), run(*a)))(PARAMS, X)
  np.testing.assert_allclose(expected, found, atol=2e-5)
  if keep == 4:
    np.testing.assert_allclose(found, DENSE(), atol=2e-5)


def _tokens(blocks):
  return jnp.repeat(jnp.repeat(blocks.mask, blocks.block_q, -2), blocks.block_k, -1)


def test_gates_learn_the_blocks_of_the_dense_program(standard_promotion):
  gates = attention.init_gates(program, jax.random.key(0), block=4, size=8)(PARAMS, X)
  assert len(gates) == 2 and {g['key'].shape for g in gates.values()} == {(H, 2 * D, 8)}
  loss, tx = attention.distillation(program, block=4), optax.adam(0.05)

  @jax.jit
  def train(gates):
    def step(carry, _):
      gates, state = carry
      value, grads = jax.value_and_grad(loss)(gates, PARAMS, X)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(gates, updates), state), value
    return jax.lax.scan(step, (gates, tx.init(gates)), length=60)

  (trained, _), values = train(gates)
  assert values[-1] < 0.6 * values[0]
  error = jax.jit(lambda gates: jnp.square(kernels_pallas.sparse_attention(
    program, attention.gated_blocks(gates, keep=2, block=4))(PARAMS, X) - DENSE()).sum())
  assert error(trained) < error(gates)
  with pytest.raises(ValueError, match='has no gate'):
    loss({}, PARAMS, X)


def test_heads_get_the_patterns_that_cost_least_error():
  patterns = {'full': attention.full(4), 'band': attention.band(1, 4), 'first': attention.columns(1, 4),
              'own': attention.empty(4)}
  batches = [X]
  errors, sizes = {}, {}
  for budget in (1.0, 0.5):
    choice = attention.search(program, PARAMS, batches, patterns, budget)
    run = kernels_pallas.sparse_attention(program, attention.of_choice(choice, patterns), explain=True)
    sizes[budget] = run(PARAMS, X).achieved
    errors[budget] = choice
  assert all(row == ('full',) * H for row in errors[1.0].values())
  assert sizes[1.0] == 0 and sizes[0.5] >= 0.5
  with pytest.raises(ValueError, match='no choice has at most'):
    attention.search(program, PARAMS, batches, {'full': attention.full(4)}, 0.5)
  with pytest.raises(ValueError, match='reads queries and keys'):
    attention.search(program, PARAMS, batches, {'routed': attention.routed(1, block=4)}, 0.5)
  with pytest.raises(ValueError, match='no patterns to choose from'):
    attention.search(program, PARAMS, batches, {}, 0.5)
  for choice, message in (({}, 'has no choice '), ({'*': ('fool',) * H}, "pattern 'fool'. Did you mean 'full'")):
    named = dict.fromkeys(errors[1.0], *choice.values()) if choice else {}
    with pytest.raises(ValueError, match=f'attention.of_choice: .*{message}'):
      kernels_pallas.sparse_attention(program, attention.of_choice(named, patterns))(PARAMS, X)
  with pytest.raises(ValueError, match='attention.union: there is no builder'):
    attention.union()
  with pytest.raises(ValueError, match="attention.predicted: .* has no predictor '"):
    kernels_pallas.sparse_attention(program, attention.predicted({}, 1, block=4))(PARAMS, X)


def test_patterns_found_once_are_reused_in_later_steps():
  init, step = kernels_pallas.once(program, attention.measured(.3, block=4), after=1)
  state = init(PARAMS, X)
  run = jax.jit(step)
  results = []
  for _ in range(3):
    y, state = run(state, PARAMS, X)
    results.append(np.asarray(y))
  np.testing.assert_allclose(results[0], DENSE(), atol=1e-5)
  np.testing.assert_allclose(results[1], DENSE(), atol=1e-5)
  masks = attention.found(program, attention.measured(.3, block=4))(PARAMS, X)
  again = kernels_pallas.sparse_attention(program, attention.given(masks, capacity=4, block=4))(PARAMS, X)
  np.testing.assert_allclose(results[2], again, atol=2e-5)
  assert np.abs(results[2] - DENSE()).max() > 1e-3 and int(state.step) == 3
  with pytest.raises(ValueError, match='once: the state is for masks of shapes .* Call init for these inputs'):
    jax.eval_shape(step, state, PARAMS, jnp.concatenate([X, X], 1))
  with pytest.raises(ValueError, match='has no mask'):
    kernels_pallas.sparse_attention(program, attention.given({}, 4, block=4))(PARAMS, X)
