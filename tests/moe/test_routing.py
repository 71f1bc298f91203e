"""Routing: the paper's example, laws against a dense mixture, work that is really skipped, and nested bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import moe

SCORES = jnp.asarray([[.7, .2, .1], [.6, .3, .1], [.5, .1, .4], [.8, .15, .05], [.2, .5, .3], [.1, .45, .45]])
TOP = jnp.where(jnp.arange(3)[None] == jnp.argmax(SCORES, 1)[:, None], SCORES, 0)

PLAN, LOCAL = jax.jit(moe.plan, static_argnums=1), jax.jit(moe.local, static_argnums=5)
TOP_1 = jax.jit(moe.top_k(1))
FILL, MIXTURE = jax.jit(moe.fill_in), jax.jit(moe.mixture, static_argnums=0)


def slots(routing):
  return [[int(t) for t, there in zip(*row) if there] for row in zip(routing.tokens, routing.filled)]


def test_the_example_of_the_rectifications():
  """[run]: first come, then fill-in and intra-device, of six tokens on two devices."""
  routing = PLAN(TOP, 2)
  assert slots(routing) == [[0, 1], [4, 5], []] and int(routing.dropped) == 2
  filled = FILL(routing, SCORES)
  assert slots(filled) == [[0, 1], [4, 5], [5, 2]] and filled.weights[2].tolist() == pytest.approx([.45, .4])
  owner, of_token = jnp.asarray([0, 0, 1]), jnp.asarray([0, 0, 0, 1, 1, 1])
  near = LOCAL(routing, TOP, SCORES, owner, of_token, 1)
  assert slots(near) == [[0, 1, 2], [4, 5], [3]] and int(near.dropped) == 0
  sums = jnp.zeros(6).at[filled.tokens].add(moe.renormalised(filled, 6).weights)
  np.testing.assert_allclose(sums, [1, 1, 1, 0, 1, 1], rtol=1e-6)


def expert(params, rows):
  return jax.nn.relu(rows @ params['up']) @ params['down']


def drawn(tokens, experts, width=8, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(tokens, width), {'up': draw(experts, width, 16), 'down': draw(experts, 16, width)}, draw(tokens, experts)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.sampled(1)
def test_a_mixture_with_room_is_the_dense_one_and_without_room_lacks_what_was_dropped(seed):
  x, params, logits = drawn(12, 4, seed=seed)
  weights = moe.top_k(2)(logits, None, 0).weights
  every = jax.vmap(lambda own: expert(own, x))(params)  # [E, T, out]
  for capacity in (12, 4):
    routing = PLAN(weights, capacity)
    there = jnp.where(jnp.cumsum(weights != 0, 0) <= capacity, weights, 0)
    found = MIXTURE(expert, params, x, routing)
    np.testing.assert_allclose(found, jnp.einsum('te,eto->to', there, every), atol=1e-4)
    assert int(routing.dropped) == int(jnp.sum((weights != 0) & (there == 0)))


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.sampled(1)
def test_rectifiers_give_no_token_twice_and_leave_no_slot_empty(seed):
  _, _, logits = drawn(16, 4, seed=seed)
  scores = jax.nn.softmax(2 * logits)
  weights = TOP_1(2 * logits, None, 0).weights
  full = FILL(PLAN(weights, 4), scores)
  assert bool(jnp.all(full.filled)) and all(len(set(row)) == len(row) for row in slots(full))
  of_token, owner = jnp.arange(16) // 8, jnp.arange(4) // 2
  near = LOCAL(PLAN(weights, 4), weights, scores, owner, of_token, 8)
  assert int(near.dropped) == 0 and all(len(set(row)) == len(row) for row in slots(near))
  assert all(of_token[t] == owner[e] for e in range(4) for t, there in zip(near.tokens[e, 4:], near.filled[e, 4:])
             if there)


def test_a_gate_that_keeps_nothing_computes_zeros_and_drops_nothing():
  x, params, logits = drawn(6, 4)
  routing = moe.plan(jnp.zeros_like(logits), 2)
  assert int(routing.dropped) == 0 and not routing.filled.any()
  assert not moe.mixture(expert, params, x, routing).any()


def test_what_is_not_routed_is_not_computed():
  """FLOPs of the compiled programs: 4 of 64 rows an expert, against all experts of all tokens."""
  x, params, logits = drawn(64, 16)

  def dense(params, x, logits):
    weights = moe.top_k(1)(logits, None, 0).weights
    return jnp.einsum('te,eto->to', weights, jax.vmap(lambda own: expert(own, x))(params))

  def routed(params, x, logits):
    weights = moe.top_k(1)(logits, None, 0).weights
    return moe.mixture(expert, params, x, moe.plan(weights, moe.capacity_of(64, 16)))

  flops = [jax.jit(f).lower(params, x, logits).compile().cost_analysis()['flops'] for f in (dense, routed)]
  assert flops[1] < 0.25 * flops[0]


def test_placement_and_loads_of_devices():
  """[run]: NumPy of the rule."""
  loads, owners = jnp.asarray([70, 10, 15, 5]), jnp.asarray([0, 0, 1, 1])
  assert moe.placement(loads, 2).tolist() == [0, 2]
  for slots_, wanted in ((1, [45, 55]), (2, [52.5, 47.5])):
    found = moe.device_loads(loads, owners, 2, moe.placement(loads, slots_))
    np.testing.assert_allclose(found, wanted)
  np.testing.assert_allclose(moe.device_loads(loads, owners, 2, jnp.zeros(0, jnp.int32)), [80, 20])


def test_the_order_of_loading():
  """[run]: 23 in the order of the experts, 21 hottest first, 19 by Johnson's rule, which no other order beats."""
  loads, bits = [2, 9, 1, 5], [4, 4, 8, 2]
  spans = [moe.makespan(loads, bits, order) for order in (
      range(4), moe.schedule(loads, bits, 'hottest'), moe.schedule(loads, bits))]
  assert spans == [23, 21, 19]


def test_nested_bits_are_the_numbers_of_the_formula_and_zeros_stay():
  """[run]: NumPy of the code with middle points."""
  w = jnp.asarray([[-.9, -.31, .02, .27, .74, 1]])
  store, at = jax.jit(moe.nested)(w), jax.jit(moe.Nested.at, static_argnums=1)
  np.testing.assert_allclose(at(store, 4), [[-.844118, -.367255, -.009608, .228824, .705686, .944118]], atol=1e-5)
  assert float(jnp.max(jnp.abs(at(store, 2) - w))) == pytest.approx(.234706, abs=1e-5)
  assert float(jnp.max(jnp.abs(at(store, 8) - w))) <= float(store.scale[0]) / 2 + 1e-6
  sparse = moe.nested(jnp.asarray([[[0., 1, 0, -2]] * 3, [[0, 0, 0, 0]] * 3]))
  assert sparse.at(2).shape == (2, 3, 4) and not sparse.at(3)[0, :, ::2].any() and not sparse.at(8)[1].any()
  assert [sparse.nbytes(b) for b in (2, 8)] == [3 * 2 + 8, 9 * 2 + 8]


@pytest.mark.parametrize('call, why', [
    (lambda: moe.plan(jnp.ones(3), 2), r'shape \(3,\)'),
    (lambda: moe.fill_in(moe.plan(TOP, 2), SCORES[:, :2]), 'each of the 3 experts'),
    (lambda: moe.mixture(expert, {'up': jnp.ones((2, 4, 4))}, SCORES, moe.plan(TOP, 2)), 'for 3 experts'),
    (lambda: moe.fill_in(moe.plan(TOP, 2), SCORES[:1]), 'has row 5, and there are 1 rows'),
    (lambda: moe.renormalised(moe.plan(TOP, 2), 1), 'and there are 1 rows'),
    (lambda: moe.local(moe.plan(TOP, 2), TOP, SCORES, jnp.zeros(2, int), jnp.zeros(len(TOP), int), 1), 'the device of'),
    (lambda: moe.placement(jnp.ones(3), 4), '4 slots'),
    (lambda: moe.device_loads(jnp.ones(2), jnp.array([0, 2]), 2, jnp.array([0])), '`owners` run from 0 to 2'),
    (lambda: moe.device_loads(jnp.ones(2), jnp.zeros(2, int), 2, jnp.array([2])), '`ids` run from 2 to 2'),
    (lambda: moe.device_loads(jnp.ones(2), jnp.zeros(1, int), 2, jnp.array([0])), 'one of each an expert'),
    (lambda: moe.schedule([1, float('nan')], [1, 1]), 'finite numbers'),
    (lambda: moe.nested(jnp.array([[1, jnp.nan]])), 'give finite weights'),
    (lambda: moe.schedule([1, 2], [1]), '2 loads and 1 bits'),
    (lambda: moe.schedule([1], [1], 'hotest'), "unknown rule 'hotest'.*hottest"),
    (lambda: moe.makespan([1, 2], [1, 1], [0, 0]), 'name each once'),
    (lambda: moe.nested(jnp.ones(3)), r'give \[E, ...\]'),
    (lambda: moe.nested(jnp.ones((2, 3))).at(9), '9 bits; the store has 1 to 8')])
def test_what_does_not_fit_is_refused(call, why):
  with pytest.raises(ValueError, match=f'^moe.*{why}'):
    call()
