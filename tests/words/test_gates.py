"""Tests gates: the published sets with their defects mended, and that what is skipped is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import conditional, gates

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


A, LOSS = jnp.array([0.3]), jnp.array([0.5, 2.0])  # a logit, and the losses of a closed and of an open unit
P = float(jax.nn.sigmoid(A)[0])
SLOPE = P * (1 - P) * 1.5  # of the expected loss


@pytest.mark.parametrize('baseline, opened, closed, variance', [
  (0.0, .851115, -.287221, .316771), (0.5, .638336, 0.0, .099610), (1.138336, .366687, .366687, 0.0)])
def test_reinforce_is_unbiased_and_the_baseline_decides_the_variance(baseline, opened, closed, variance):
  """The numbers are those of the formula, in float64, at a logit of 0.3 and losses of 2 and 0.5."""
  slope = jax.jit(jax.grad(lambda a, h, own: gates.reinforce(h, a, own, baseline) * 2))
  found = slope(jnp.broadcast_to(A, (2, 1)), jnp.array([[1.0], [0]]), LOSS[::-1])[:, 0].tolist()
  np.testing.assert_allclose(found, [opened, closed], atol=2e-6)
  mean = P * found[0] + (1 - P) * found[1]
  np.testing.assert_allclose([mean, P * (found[0] - mean) ** 2 + (1 - P) * (found[1] - mean) ** 2],
                             [.366687, variance], atol=5e-6)


def test_of_many_draws_reinforce_finds_the_slope_and_the_running_baseline_has_least_variance():
  key, batch = jax.random.key(2), (200, 500)
  logits = jnp.broadcast_to(A, (*batch, 1))
  drawn = (jax.random.uniform(key, logits.shape) < P).astype(jnp.float32)
  losses = LOSS[drawn[..., 0].astype(int)]

  def estimates(carry, each):
    h, a, own = each
    slopes = jax.grad(lambda a: gates.reinforce(h, a, own, carry.value) * own.size)(a)[:, 0]
    return gates.observed(carry, h, a, own, 0.9), slopes

  last, running = jax.lax.scan(estimates, gates.Baseline(jnp.zeros(1), jnp.zeros(1)), (drawn, logits, losses))
  plain = jax.jit(jax.grad(lambda a: gates.reinforce(drawn, a, losses) * losses.size))(logits)[..., 0]
  through = lambda name: jax.jit(jax.grad(lambda a: jnp.sum(1.5 * gates.bernoulli(name)(a, key, 0).weights)))(logits)
  for slopes, unbiased in ((plain, True), (running, True), (through('straight_through'), False)):
    error = float(jnp.std(slopes)) / slopes.size**0.5
    assert (abs(float(jnp.mean(slopes)) - SLOPE) < 4 * error + 1e-6) == unbiased
  assert float(jnp.var(running[10:])) < float(jnp.var(plain)) / 10
  np.testing.assert_allclose(last.value, 1.138336, atol=0.1)


def test_each_estimator_has_its_own_slope_and_exact_zeros():
  logits = jnp.broadcast_to(A[0], (4000, 8))
  value = lambda gate: jax.jit(jax.value_and_grad(lambda a: jnp.sum(gate(a, KEY, 0).weights)))(logits)
  for gate, mean, slope in ((gates.bernoulli('straight_through'), P, 1.0), (gates.bernoulli('sigmoid'), P, P * (1 - P)),
                            (gates.bernoulli('smooth'), P, P**0.5 * .161269)):
    total, grads = value(gate)
    np.testing.assert_allclose([total / logits.size, grads.mean()], [mean, slope], rtol=0.02)
    np.testing.assert_array_equal(gate(logits, None, 0).weights != 0, logits > 0)
  weights = gates.bernoulli('smooth')(logits, KEY, 0).weights
  np.testing.assert_allclose([weights.max(), jnp.mean(weights > 0)], [.757920, .757920], rtol=0.01)
  assert np.all(value(gates.bernoulli('smooth'))[1][weights == 0] == 0), 'a closed unit has no gradient'
  for noise, chance in (('logistic', P), ('normal', float(jax.scipy.stats.norm.cdf(0.3)))):
    gated = gates.noisy_rectifier(noise)(logits, KEY, 0)
    assert abs(float(jnp.mean(gated.weights > 0)) - chance) < 0.02 and (gated.weights == 0).any()
  assert gates.noisy_rectifier()(A, None, 0).weights == A


def test_the_penalty_falls_towards_the_asked_rate_and_polarity_towards_consensus():
  gate = gates.bernoulli('sigmoid', rate=0.1)
  rates = jax.jit(jax.vmap(lambda p: gate(jnp.broadcast_to(jnp.log(p / (1 - p)), (3, 2)), None, 0).penalty))(
      jnp.array([0.5, 0.2, 0.1, 0.05]))
  assert rates[0] > rates[1] > rates[2] < rates[3] and abs(rates[2]) < 1e-6
  weights = jnp.array([[1.0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]])
  parts = [gates.polarized(weights, 0.5, activation=0.0), gates.polarized(weights, 0.5, polarization=0.0)]
  np.testing.assert_allclose(parts, [.111111, .006944], atol=1e-6)
  np.testing.assert_allclose(gates.polarized(weights, 0.5, jnp.array([1.0, 0, 0, 0]), polarization=0.0), 0.25)
  logits = jax.random.normal(KEY, (16, 4))
  loss = lambda logits: gates.polarized(gates.bernoulli('straight_through')(logits, None, 0).weights, 0.5)
  logits = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: x - 4.0 * jax.grad(loss)(x), x))(logits)
  opened = (logits > 0).astype(float)
  assert {*opened.mean(0).tolist()} == {0.0, 1.0} and opened.mean() == 0.5, 'all inputs agree on half of the units'


BLOCK = {'up': jax.random.normal(KEY, (4, 6, 8)), 'down': jax.random.normal(jax.random.key(1), (4, 8, 3))}
X = jax.random.normal(jax.random.key(2), (16, 6))
COUNTS = jnp.ones((3, 4), int)
run = lambda own, rows: jax.nn.relu(rows @ own['up']) @ own['down']


def dense(params, x, weights):
  return jnp.einsum('tb,bto->to', weights, jax.vmap(run, (0, None))(params, x))


def test_blocks_are_computed_for_their_rows_alone_and_equal_the_dense_sum():
  weights = jnp.where(jax.random.uniform(KEY, (16, 4)) < 0.3, jax.random.normal(KEY, (16, 4)), 0)
  apply = jax.jit(conditional.apply, static_argnums=(0, 4))
  y, dropped = apply(run, BLOCK, X, weights, 16)
  np.testing.assert_allclose(y, dense(BLOCK, X, weights), atol=1e-4)
  assert dropped == 0
  folded = apply(run, BLOCK, X.reshape(2, 8, 6), weights.reshape(2, 8, 4), 16).y
  np.testing.assert_array_equal(folded.reshape(16, 3), y)
  slopes = lambda f: jax.jit(jax.grad(lambda *all_: jnp.sum(jnp.sin(f(*all_))), (0, 1, 2)))(BLOCK, X, weights)
  found = slopes(lambda *all_: conditional.apply(run, *all_, 16).y)
  expected = slopes(dense)
  expected = (*expected[:2], jnp.where(weights != 0, expected[2], 0))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


def test_overflow_is_counted_and_a_gate_that_keeps_nothing_gives_zeros():
  weights = jnp.ones((16, 4)).at[:, 2].set(0).at[3:, 1].set(0)
  apply = jax.jit(conditional.apply, static_argnums=(0, 4))
  y, dropped = apply(run, BLOCK, X, weights, 5)
  assert dropped == 22
  held = weights.at[5:].set(0)
  np.testing.assert_allclose(y, dense(BLOCK, X, held), atol=1e-4)
  routing = conditional.routed(weights, 5)
  assert routing.tokens[1].tolist() == [0, 1, 2, 0, 0] and routing.filled.sum(1).tolist() == [5, 3, 0, 5]
  np.testing.assert_array_equal(apply(run, BLOCK, X, routing).y, y)
  # The norm of a row of zeros has no gradient, and no row of zeros is computed.
  unit = lambda own, rows: run(own, rows / jnp.linalg.norm(rows, axis=-1, keepdims=True))
  value, slope = jax.jit(jax.value_and_grad(lambda w: jnp.sum(apply(unit, BLOCK, X, w, 5).y)))(jnp.zeros((16, 4)))
  assert value == 0 and not slope.any()


def test_slots_beyond_the_rows_are_not_computed():
  weights = jnp.ones((16, 4))
  y, dropped = conditional.apply(run, BLOCK, X, weights, 2**31 - 1)  # With a row in each slot no memory holds them.
  assert dropped == 0
  np.testing.assert_allclose(y, dense(BLOCK, X, weights), atol=1e-4)
  assert conditional.apply(run, BLOCK, X[:0], weights[:0], 3).y.shape == (0, 3)


def test_the_compiled_program_has_the_work_of_the_slots_and_not_of_all_rows():
  block = {'up': jnp.ones((8, 64, 64)), 'down': jnp.ones((8, 64, 64))}
  x, weights = jnp.ones((80, 64)), jnp.ones((80, 8))
  flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()['flops']
  whole = flops(dense, block, x, weights)
  for capacity, most in ((8, 0.13), (40, 0.55)):
    assert flops(lambda *all_, n=capacity: conditional.apply(run, *all_, n).y, block, x, weights) < most * whole


@pytest.mark.parametrize('call, said', [
  (lambda: gates.bernoulli('straight'), "unknown estimator 'straight'. Did you mean 'straight_through'"),
  (lambda: gates.bernoulli('smooth', rate=1.0), 'between 0 and 1'),
  (lambda: gates.noisy_rectifier('cauchy'), "unknown noise 'cauchy'"),
  (lambda: gates.reinforce(X, X, jnp.zeros(())), 'one loss for each example, not their mean'),
  (lambda: gates.polarized(X, 0.5, jnp.ones(3)), 'one cost for each unit'),
  (lambda: conditional.apply(run, BLOCK, X, jnp.ones((16, 4))), 'need `capacity`'),
  (lambda: conditional.apply(run, BLOCK, X, jnp.ones((15, 4)), 2), 'one weight for each row and block'),
  (lambda: conditional.apply(run, BLOCK, X, jnp.ones((16, 3)), 2), "'down' of shape .4, 8, 3.: the gate has 3 blocks"),
  (lambda: conditional.apply(run, BLOCK, X, jnp.ones((16, 4)), 0), 'at least 1'),
  (lambda: conditional.routed(jnp.ones(3), 2), 'rows, blocks'),
  (lambda: gates.computed(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones(3, bool), (2, 4)),
   'must rise'),
  (lambda: gates.mass(jnp.ones(3), 2.0), 'from 0 to 1'),
  (lambda: gates.polarized(X, 0.5, jnp.zeros(X.shape[1])), 'one above 0'),
  (lambda: gates.polarized(X[:0], 0.5), 'a weight for each input'),
  (lambda: conditional.apply(run, BLOCK, X[:4], conditional.routed(jnp.ones((16, 4)), 8)), 'has row 7, .* 4 rows'),
  (lambda: conditional.apply(lambda own, rows: run(own, rows)[:1], BLOCK, X, jnp.ones((16, 4)), 2), 'for each row'),
  (lambda: conditional.apply(run, BLOCK, jnp.ones(()), jnp.ones(4), 2), 'is a scalar'),
  *((lambda gate=gate: gate(COUNTS, KEY, 0), 'gates.*logits of dtype int32; give floating') for gate in (
      gates.bernoulli('straight_through'), gates.bernoulli('smooth'), gates.noisy_rectifier())),
  (lambda: gates.reinforce(COUNTS, COUNTS, jnp.ones(3)), 'gates.reinforce: logits of dtype int32'),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
