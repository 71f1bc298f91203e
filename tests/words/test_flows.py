"""Flows: every projection and every pull-back against the formula written out; what is blocked is exactly zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import flows, schedules
from sparsejax.types import Axes, Signals

AXES = Axes((0,), (1,))
FADE = schedules.linear(1.0, 0.0, begin=0, end=10)  # beta(4) = 0.6
RATE = schedules.linear(0.1, 0.0, begin=0, end=10)  # 0.06 at 4
STEP, THRESHOLD = 4, 0.7


def case(seed=0, dtype=np.float32, shape=(8, 3)):
  """W, m, G: a master, a mask that keeps its larger half, a gradient."""
  rng = np.random.default_rng(seed)
  w, g = rng.normal(size=(2, *shape)).astype(dtype)
  return w, np.abs(w) > THRESHOLD, g


def signals(step=STEP, axes=AXES):
  return Signals(step=jnp.int32(step), stats=jnp.float32(THRESHOLD), axes=axes)


def compiled(f):
  """`f(*arrays, signals)` under `jit`, with the numbers among the signals traced and the axes not."""
  def run(*arguments):
    *arrays, given = arguments
    traced = jax.jit(lambda step, stats, *arrays: f(*arrays, Signals(step=step, stats=stats, axes=given.axes)))
    return traced(given.step, given.stats, *arrays)

  return run


def rescaled(w, m, channel=(0,)):
  """ST-3's q; `channel` are the axes summed over for one output channel."""
  mean = lambda x: x.mean(axis=channel, keepdims=True, dtype=np.float64)
  ratio = (mean(np.abs(w) * m) + 1e-6) / (mean(np.abs(w)) + 1e-6)
  return 1.01 / (ratio + 0.01) * (w - np.sign(w) * THRESHOLD) * m


# flow: q and the master's gradient at step 4, from the docstrings' formulas.
FLOWS = {
    'hard': (flows.hard(), lambda w, m: m * w, lambda w, m, g: m * g),
    'straight_through': (flows.straight_through(), lambda w, m: m * w, lambda w, m, g: g),
    'sr_ste': (flows.sr_ste(0.3), lambda w, m: m * w, lambda w, m, g: g + 0.3 * (1 - m) * w),
    'sr_ste decoupled': (flows.sr_ste(0.3, decoupled=True), lambda w, m: m * w, lambda w, m, g: g),
    'decayed scaled': (
        flows.decayed(FADE, 'scaled'), lambda w, m: w * (m + 0.6 * (1 - m)), lambda w, m, g: g * (m + 0.6 * (1 - m))),
    'decayed straight_through': (
        flows.decayed(FADE, 'straight_through'), lambda w, m: w * (m + 0.6 * (1 - m)), lambda w, m, g: g),
    'soft_threshold': (flows.soft_threshold(), rescaled, lambda w, m, g: g),
    'remembered': (flows.remembered(), lambda w, m: m * w, lambda w, m, g: m * g),
    'lasso': (flows.lasso(0.3), lambda w, m: m * w, lambda w, m, g: m * (g + 0.3 * np.sign(w))),
    'soft_shrink': (flows.soft_shrink(0.9), lambda w, m: w, lambda w, m, g: g),
    'frozen': (flows.frozen(), lambda w, m: w, lambda w, m, g: m * g),
    'searched': (flows.searched(), lambda w, m: m * THRESHOLD, lambda w, m, g: THRESHOLD * g),
    'on_the_edge': (flows.on_the_edge(2.0), lambda w, m: m * w, lambda w, m, g: m * g),
    'until later': (
        flows.until(flows.sr_ste(0.3), 5), lambda w, m: m * w, lambda w, m, g: g + 0.3 * (1 - m) * w),
    'until now': (flows.until(flows.decayed(FADE, 'scaled'), 4), lambda w, m: m * w, lambda w, m, g: m * g),
    'until past shrinking': (flows.until(flows.soft_shrink(0.9), 4), lambda w, m: m * w, lambda w, m, g: m * g),
    'until long ago': (flows.until(flows.soft_threshold(), 0), lambda w, m: m * w, lambda w, m, g: m * g),
}


@pytest.mark.parametrize('name', FLOWS)
def test_projection_and_pull_back_follow_their_formulas(name):
  flow, project, pull_back = FLOWS[name]
  w, m, g = case()
  for run in (lambda f: f, compiled):
    np.testing.assert_allclose(run(flow.project)(w, m, signals()), project(w, m), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(run(flow.pull_back)(g, w, m, signals()), pull_back(w, m, g), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize('name', FLOWS)
def test_narrow_weights_stay_narrow(name):
  w, m, g = case(dtype=jnp.bfloat16)
  flow, settle = FLOWS[name][0], FLOWS[name][0].settle or FLOWS[name][0].project
  for result in (flow.project(w, m, signals()), flow.pull_back(g, w, m, signals()), settle(w, m, signals())):
    assert result.dtype == jnp.bfloat16 and result.shape == w.shape


@pytest.mark.parametrize('name', ['hard', 'decayed scaled', 'until now'])
def test_the_pull_back_is_the_derivative_with_the_mask_held(name):
  flow = FLOWS[name][0]
  w, m, _ = case(1)
  loss = lambda q: jnp.sum(jnp.sin(3 * q) * jnp.arange(q.size, dtype=jnp.float32).reshape(q.shape))
  through = jax.grad(lambda w: loss(flow.project(w, m, signals())))(jnp.asarray(w))
  at_the_point = flow.pull_back(jax.grad(loss)(flow.project(w, m, signals())), w, m, signals())
  np.testing.assert_allclose(at_the_point, through, rtol=1e-6, atol=1e-7)


# A mask alone, or a beta after its end, lets nothing through: no tiny number, and no infinite one either.
BLOCKING = {
    'hard': flows.hard(),
    'decayed to zero': flows.decayed(schedules.linear(1.0, 0.0, begin=0, end=3), 'scaled'),
    'decayed, constant zero': flows.decayed(schedules.constant(0.0), 'scaled'),
    'remembered': flows.remembered(),
    'frozen': flows.frozen(),
    'on_the_edge': flows.on_the_edge(2.0),
    'after until': flows.until(flows.straight_through(), 4),
}


@pytest.mark.parametrize('name', BLOCKING)
@pytest.mark.parametrize('run', [lambda f: f, compiled], ids=['eager', 'jit'])
def test_what_is_blocked_is_exactly_zero(name, run):
  w, m, g = case()
  g = np.where(m, g, np.resize(np.float32([np.inf, np.nan, -1e38, -1.0]), g.shape))
  found = np.asarray(run(BLOCKING[name].pull_back)(g, w, m, signals()))
  np.testing.assert_array_equal(found, np.where(m, g, 0))
  assert not np.any(np.signbit(found[~m]))


NO_ZEROS = ('decayed scaled', 'decayed straight_through', 'soft_shrink', 'frozen')  # at this step, or at any
POINTS = {name: flow for name, (flow, _, _) in FLOWS.items() if name not in NO_ZEROS}


@pytest.mark.parametrize('name', [name for name in POINTS | BLOCKING if name != 'frozen'])
def test_what_is_pruned_is_exactly_zero_whatever_is_behind_it(name):
  """NaN and infinity in the master, where they rank last or are simply pruned, do not reach the sparse point."""
  flow = (POINTS | BLOCKING)[name]
  w, m, _ = case()
  m[0, 0] = False
  broken = w.copy()
  broken[0, 0] = np.nan
  found = np.asarray(compiled(flow.project)(broken, m, signals()))
  assert np.all(found[~m] == 0) and not np.any(np.signbit(found[~m])) and np.all(np.isfinite(found))
  if name != 'soft_threshold':  # its channel's mean is another one without that weight
    np.testing.assert_array_equal(found[m], compiled(flow.project)(w, m, signals())[m])


def test_decoupled_decay_shrinks_the_pruned_and_follows_the_learning_rate():
  w, m, _ = case()
  for rate, share in ((1.0, 0.3), (0.5, 0.15), (RATE, 0.018)):
    settle = flows.sr_ste(0.3, decoupled=True, learning_rate=rate).settle
    np.testing.assert_allclose(settle(w, m, signals()), np.where(m, w, w * (1 - share)), rtol=1e-6)
  until = flows.until(flows.sr_ste(0.3, decoupled=True), 4)
  np.testing.assert_array_equal(until.settle(w, m, signals(4)), w)
  np.testing.assert_allclose(until.settle(w, m, signals(3)), np.where(m, w, 0.7 * w), rtol=1e-6)
  assert flows.until(flows.straight_through(), 4).settle is None


def test_soft_shrinkage_shrinks_what_the_mask_prunes_until_it_is_fixed():
  w, m, _ = case()
  np.testing.assert_allclose(flows.soft_shrink(0.9).settle(w, m, signals()), np.where(m, w, 0.9 * w), rtol=1e-6)
  until = flows.until(flows.soft_shrink(0.9), 4)
  np.testing.assert_allclose(until.settle(w, m, signals(3)), np.where(m, w, 0.9 * w), rtol=1e-6)
  np.testing.assert_array_equal(until.settle(w, m, signals(4)), w)
  np.testing.assert_array_equal(until.project(w, m, signals(3)), w)


def test_a_search_moves_a_score_and_holds_the_weight():
  """q = m W and dL/dS = W G, with W the stat and the master S; S begins at 1 and 0.99."""
  (w, m, g), score = case(), np.float32(np.random.default_rng(1).normal(size=(8, 3)))
  given = signals()._replace(stats=jnp.asarray(w))
  flow = flows.searched()
  np.testing.assert_array_equal(flow.project(score, m, given), np.where(m, w, 0))
  np.testing.assert_array_equal(flow.pull_back(g, score, m, given), w * g)
  np.testing.assert_array_equal(flow.begin(w, m, given), np.where(m, np.float32(1), np.float32(0.99)))
  np.testing.assert_array_equal(flows.searched(0.5, 0.25).begin(w, m, given), np.where(m, 0.5, 0.25))


@pytest.mark.parametrize('shape, axes, fan_in, along', [
    ((8, 3), Axes((0,), (1,)), 8, (0, 1)),
    ((3, 8), Axes((1,), (0,)), 8, (0, 1)),
    ((2, 3, 4, 5), Axes((2,), (3,), spatial=(0, 1)), 24, (0, 1, 2, 3)),
    ((2, 8, 3), Axes((1,), (2,), layer=(0,)), 8, (1, 2)),
    ((4, 2, 3, 5), Axes((1, 2), (3,), layer=(0,)), 6, (1, 2, 3)),
])
def test_the_edge_of_chaos_is_reached_by_each_layer_with_one_factor(shape, axes, fan_in, along):
  w, m, _ = case(3, shape=shape)
  w = w * (1 + np.arange(shape[0], dtype=np.float32)).reshape(-1, *[1] * (w.ndim - 1))
  m[0, ..., 0] = False
  moved = np.asarray(compiled(flows.on_the_edge(1.3).begin)(w, m, signals(axes=axes)))
  np.testing.assert_allclose(fan_in * np.mean(np.square(m * moved), along), 1.3, rtol=1e-5)
  factor = moved / w
  first = np.take(factor, [0], along[0])
  for axis in along[1:]:
    first = np.take(first, [0], axis)
  np.testing.assert_allclose(factor, np.broadcast_to(first, shape), rtol=1e-6)


def test_an_empty_layer_is_not_rescaled_and_a_pruned_nan_does_not_count():
  w, m, _ = case(shape=(2, 8, 3))
  m[0] = False
  begin = lambda w: np.asarray(flows.on_the_edge(2.0).begin(w, m, signals(axes=Axes((1,), (2,), layer=(0,)))))
  np.testing.assert_array_equal(begin(w)[0], w[0])
  broken = np.where(m, w, np.float32(np.nan))
  np.testing.assert_array_equal(begin(broken)[m], begin(w)[m])


def test_a_negative_threshold_is_none_at_all():
  w, _, _ = case()
  project = flows.soft_threshold().project
  for run in (project, compiled(project)):
    np.testing.assert_array_equal(run(w, np.ones_like(w, bool), signals()._replace(stats=jnp.float32(-1))), w)


@pytest.mark.parametrize('shape, axes, channel', [
    ((3, 8), Axes((1,), (0,)), (1,)),
    ((8, 2, 3), Axes((0,), (1, 2)), (0,)),
    ((2, 3, 4, 5), Axes((2,), (3,), spatial=(0, 1)), (0, 1, 2)),
    ((2, 8, 3), Axes((1,), (2,), layer=(0,)), (1,)),
])
def test_soft_threshold_rescales_each_output_channel_of_each_layer(shape, axes, channel):
  w, m, _ = case(2, shape=shape)
  found = flows.soft_threshold().project(w, m, signals(axes=axes))
  np.testing.assert_allclose(found, rescaled(w, m, channel), rtol=2e-6)


def test_only_flows_without_anything_behind_the_zeros_need_no_master():
  assert not flows.hard().dense and not flows.until(flows.hard(), 3).dense
  assert not flows.frozen().dense and flows.until(flows.frozen(), 3) == flows.frozen()
  assert all(flow.dense for flow in POINTS.values() if flow not in (flows.hard(), flows.lasso(0.3)))


def test_flows_are_values():
  make = lambda: [
      flows.hard(), flows.straight_through(), flows.sr_ste(2e-4), flows.sr_ste(2e-4, decoupled=True),
      flows.decayed(schedules.linear(end=9), 'scaled'), flows.decayed(schedules.linear(end=9), 'straight_through'),
      flows.soft_threshold(), flows.remembered(), flows.soft_shrink(0.9), flows.soft_shrink(0.8), flows.frozen(),
      flows.searched(), flows.searched(0.5), flows.on_the_edge(2.0), flows.on_the_edge(1.3),
      flows.until(flows.sr_ste(2e-4, decoupled=True), 5), flows.lasso(0.1)]
  assert make() == make() and len({*make(), *make()}) == len(make())
  assert flows.sr_ste(2e-4) != flows.sr_ste(1e-4)


def test_unknown_gradients_are_refused():
  with pytest.raises(ValueError, match="flows.decayed: unknown gradient 'scale'. Did you mean 'scaled'.*straight"):
    flows.decayed(FADE, 'scale')


def gradients(rule, x, w, w_backward, dy):
  return jax.vjp(rule, x, w, w_backward)[1](dy)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_bidirectional_matmul_takes_each_product_through_its_own_weights(dtype):
  rng = np.random.default_rng(0)
  x, w, wb, dy = (rng.integers(-3, 4, shape).astype(np.float32) for shape in [(5, 8), (8, 6), (8, 6), (5, 6)])
  rule = flows.bidirectional(jnp.matmul)
  arrays = [jnp.asarray(a, dtype) for a in (x, w, wb)]
  np.testing.assert_array_equal(rule(*arrays).astype(jnp.float32), x @ w)  # small whole numbers: exact in bfloat16 too
  dx, dw, dwb = jax.jit(functools.partial(gradients, rule))(*arrays, jnp.asarray(dy, dtype))
  np.testing.assert_array_equal(dx.astype(jnp.float32), dy @ wb.T)
  np.testing.assert_array_equal(dw.astype(jnp.float32), x.T @ dy)
  np.testing.assert_array_equal(dwb.astype(jnp.float32), 0)
  assert dx.dtype == dw.dtype == dwb.dtype == dtype


def test_bidirectional_takes_a_dot_general_with_its_numbers_bound():
  """An attention output product: `[batch, heads, head_dim]` with `[heads, head_dim, out]`, and under `vmap`."""
  rng = np.random.default_rng(1)
  x, w, wb = (rng.normal(size=s).astype(np.float32) for s in [(4, 2, 3), (2, 3, 5), (2, 3, 5)])
  dy = rng.normal(size=(4, 5)).astype(np.float32)
  op = functools.partial(jax.lax.dot_general, dimension_numbers=(((1, 2), (0, 1)), ((), ())))
  dx, dw, _ = gradients(flows.bidirectional(op), x, w, wb, dy)
  np.testing.assert_allclose(dx, np.einsum('bo,hdo->bhd', dy, wb), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(dw, np.einsum('bhd,bo->hdo', x, dy), rtol=1e-5, atol=1e-6)
  stacked = jax.vmap(functools.partial(gradients, flows.bidirectional(op)))(x[None], w[None], wb[None], dy[None])
  np.testing.assert_allclose(stacked[0][0], dx, rtol=1e-5, atol=1e-6)


def test_bidirectional_convolution_against_written_out_sums():
  """NHWC by HWIO, no padding: y[i, j, o] = sum over taps and c of x[i + a, j + b, c] w[a, b, c, o]."""
  rng = np.random.default_rng(2)
  x, dy = rng.normal(size=(2, 4, 5, 3)).astype(np.float32), rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
  w, wb = rng.normal(size=(2, 2, 3, 3, 4)).astype(np.float32)
  op = functools.partial(
      jax.lax.conv_general_dilated, window_strides=(1, 1), padding='VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  y, dx, dw = np.zeros((2, 3, 3, 4)), np.zeros(x.shape), np.zeros(w.shape)
  for i, j, a, b in np.ndindex(3, 3, 2, 3):
    patch = x[:, i + a, j + b]
    y[:, i, j] += patch @ w[a, b]
    dx[:, i + a, j + b] += dy[:, i, j] @ wb[a, b].T
    dw[a, b] += patch.T @ dy[:, i, j]
  rule = flows.bidirectional(op)
  np.testing.assert_allclose(rule(x, w, wb), y, rtol=1e-5, atol=1e-5)
  found = gradients(rule, x, w, wb, dy)
  for result, expected in zip(found, (dx, dw, np.zeros(w.shape))):
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
