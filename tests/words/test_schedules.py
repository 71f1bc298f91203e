"""Schedules: values by their formulas at, between and outside the ends; the same under jit; values as configuration."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import schedules, scores, selections, updates
from sparsejax.types import Axes, Bound, Signals


def share(step, begin, end):
  """Where a step is between two others, 0 before and 1 after them."""
  return min(max((step - begin) / (end - begin), 0.0), 1.0)


# Each schedule beside what it is, written out.
FORMULAS = {
    'linear(end=100)': (schedules.linear(end=100), lambda t: 1 - share(t, 0, 100)),
    'linear(0.2, 0.9, begin=10, end=20)': (
        schedules.linear(0.2, 0.9, begin=10, end=20), lambda t: 0.2 + 0.7 * share(t, 10, 20)),
    'cubic(end=100)': (schedules.cubic(end=100), lambda t: 1 - (1 - share(t, 0, 100)) ** 3),
    'cubic(0.1, 0.9, begin=10, end=20)': (
        schedules.cubic(0.1, 0.9, begin=10, end=20), lambda t: 0.9 - 0.8 * (1 - share(t, 10, 20)) ** 3),
    'polynomial(power=4, end=100)': (
        schedules.polynomial(power=4, end=100), lambda t: (1 - share(t, 0, 100)) ** 4),
    'polynomial(0.1, 0.9, power=0.5, begin=10, end=20)': (
        schedules.polynomial(0.1, 0.9, power=0.5, begin=10, end=20),
        lambda t: 0.9 - 0.8 * (1 - share(t, 10, 20)) ** 0.5),
    'density_decay(0.9, end=100)': (
        schedules.density_decay(0.9, end=100), lambda t: (1 - 0.1 ** share(t, 0, 100)) / 0.9),
    'density_decay(0.0, end=20)': (schedules.density_decay(0.0, end=20), lambda t: t >= 20),
    'cosine(end=100)': (schedules.cosine(end=100), lambda t: (1 + math.cos(math.pi * share(t, 0, 100))) / 2),
    'cosine(3.0, 1.0, begin=10, end=20)': (
        schedules.cosine(3.0, 1.0, begin=10, end=20), lambda t: 2 + math.cos(math.pi * share(t, 10, 20))),
    'exponential(0.05)': (schedules.exponential(0.05), lambda t: math.exp(-0.05 * max(t, 0))),
    'exponential(half_life=7, begin=10)': (
        schedules.exponential(half_life=7, begin=10), lambda t: 0.5 ** (max(t - 10, 0) / 7)),
    'constant(0.3)': (schedules.constant(0.3), lambda t: 0.3),
    'stepwise((5, 3, 9), (0, 10, 11))': (
        schedules.stepwise((5, 3, 9), (0, 10, 11)), lambda t: 5 if t < 10 else 3 if t < 11 else 9),
    'stepwise((0.5, 0.25), (15, 20))': (
        schedules.stepwise((0.5, 0.25), (15, 20)), lambda t: 0.5 if t < 20 else 0.25),
    'stepwise((7,), (3,))': (schedules.stepwise((7,), (3,)), lambda t: 7),
    'every(3)': (schedules.every(3), lambda t: t >= 0 and t % 3 == 0),
    'every(4, begin=10)': (schedules.every(4, begin=10), lambda t: t >= 10 and (t - 10) % 4 == 0),
    'every(4, end=10)': (schedules.every(4, end=10), lambda t: t == 10 or 0 <= t < 10 and t % 4 == 0),
    'every(5, end=20)': (schedules.every(5, end=20), lambda t: 0 <= t <= 20 and t % 5 == 0),
    'every(9, begin=10, end=14)': (schedules.every(9, begin=10, end=14), lambda t: t in (10, 14)),
    'before(every(5), 15)': (schedules.before(schedules.every(5), 15), lambda t: 0 <= t < 15 and t % 5 == 0),
    'before(once(10), 10)': (schedules.before(schedules.once(10), 10), lambda t: False),
    'once(10)': (schedules.once(10), lambda t: t == 10),
}
STEPS = [-5, 0, 1, 5, 9, 10, 11, 14, 15, 19, 20, 21, 22, 50, 99, 100, 101, 10_000]


@pytest.mark.parametrize('name', FORMULAS)
def test_values_follow_the_formula_everywhere(name):
  schedule, formula = FORMULAS[name]
  eager, compiled = [schedule(step) for step in STEPS], jax.jit(jax.vmap(schedule))(jnp.asarray(STEPS))
  np.testing.assert_allclose(eager, [formula(step) for step in STEPS], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(compiled, eager, rtol=3e-7, atol=1e-7)  # XLA divides and fuses in its own way
  assert jnp.shape(schedule(0)) == () and jnp.shape(schedule(jnp.int32(0))) == ()


@pytest.mark.parametrize('make', [
    schedules.linear, schedules.cosine, schedules.cubic, functools.partial(schedules.polynomial, power=4)])
@pytest.mark.parametrize('begin', [0, 3])
@pytest.mark.parametrize('last', [0.0, 1.0, 0.9])
def test_ends_are_exact(make, begin, last):
  """A mask that decays to 1e-9 is no mask: from `end` on, not earlier, the value is the asked one to the last bit."""
  ends = [begin + length for length in (1, 3, 41, 49, 55, 107, 1250, 5000, 60_000)]
  compiled = jax.jit(lambda after: [make(1.0 - last, last, begin=begin, end=end)(end + after) for end in ends])
  for after in (0, 1, 17, 1_000_000):
    np.testing.assert_array_equal(compiled(after), np.full(len(ends), last, np.float32), err_msg=f'{after} after')
  if make is schedules.linear and last == 0.0:
    assert np.all(np.asarray(compiled(-1)) > 0)


def test_a_beginning_of_one_is_exact():
  for make in (schedules.linear, schedules.cosine):
    schedule = make(begin=5, end=60_000)
    assert schedule(0) == schedule(5) == 1.0 and schedule(5 + 60) < 1.0
  assert schedules.exponential(1e-4, begin=5)(5) == 1.0 and schedules.exponential(1e-4)(200_000) > 0.0


@pytest.mark.parametrize('sparsity', [0.1, 0.9, 0.99, 1.0])
def test_the_density_decays_to_exactly_the_asked_one_and_never_rises(sparsity):
  ends = (1, 3, 41, 100, 1250)
  parts = jax.jit(jax.vmap(lambda t: [schedules.density_decay(sparsity, end=end)(t) for end in ends]))(jnp.arange(1300))
  for end, part in zip(ends, parts):
    assert np.all(np.diff(part) >= 0) and np.all(part[end:] == 1) and part[0] == 0
    assert np.all(part[:end] < 1) or sparsity == 1


def test_schedules_are_values():
  make = lambda: [
      schedules.constant(0.5), schedules.linear(end=9), schedules.cubic(0.0, 0.9, begin=1, end=9),
      schedules.cosine(end=9), schedules.exponential(1e-4), schedules.stepwise([1, 2], [0, 5]), schedules.every(3),
      schedules.once(2), schedules.every(3, end=9), schedules.before(schedules.every(3), 9), schedules.before(
          schedules.every(3), 8), schedules.density_decay(0.9, end=9), schedules.polynomial(power=4, end=9)]
  assert make() == make() and len({*make(), *make()}) == len(make())
  assert schedules.linear(end=9) not in (schedules.linear(end=8), schedules.cubic(1.0, 0.0, end=9))
  assert schedules.exponential(math.log(2) / 7) == schedules.exponential(half_life=7)
  assert repr(schedules.once(2)) == 'once(2)' and repr(schedules.every(3, begin=1)) == 'every(3, 1)'


def test_a_bound_compares_through_what_it_binds():
  nested = lambda end: Bound(max, (schedules.linear(end=end),))
  assert nested(9) == nested(9) != nested(8) and hash(nested(9)) == hash(nested(9))
  assert Bound(pow, (3,))(2) == 8 and Bound(pow, (3,)) != Bound(pow, (2,)) and repr(Bound(pow, (3,))) == 'pow(3)'


def test_equal_schedules_compile_once():
  traces = []

  def step(t, schedule):
    traces.append(schedule)
    return schedule(t)

  run = jax.jit(step, static_argnums=1)
  for t in range(3):
    run(t, schedules.linear(end=9))
  assert len(traces) == 1


@pytest.mark.parametrize('name, arguments', [
    ('linear', {'end': 5}), ('cubic', {'begin': 1, 'end': 5}), ('cosine', {'end': 5}), ('exponential', {'rate': 0.1}),
    ('stepwise', {'values': [1, 2], 'boundaries': [0, 3]}), ('every', {'steps': 2}), ('once', {'at': 3}),
    ('constant', {'value': 2.0}), ('polynomial', {'power': 4, 'end': 5}),
    ('density_decay', {'sparsity': 0.9, 'end': 5}),
    ('every', {'steps': 2, 'end': 5})])
def test_schedules_go_by_name(name, arguments):
  assert schedules.named(name, **arguments) == getattr(schedules, name)(**arguments)


REFUSED = [
    (lambda: schedules.linear(begin=5, end=5), r'schedules.linear: `end` \(5\) must come after `begin` \(5\)'),
    (lambda: schedules.cubic(begin=5, end=4), r'schedules.cubic: `end` \(4\)'),
    (lambda: schedules.cosine(end=0), r'schedules.cosine: `end` \(0\) must come after `begin` \(0\)'),
    (lambda: schedules.polynomial(power=4, begin=3, end=3), r'schedules.polynomial: `end` \(3\) must come after'),
    (lambda: schedules.density_decay(0.9, end=0), r'schedules.density_decay: `end` \(0\) must come after'),
    (lambda: schedules.every(3, begin=6, end=6), r'schedules.every: `end` \(6\) must come after `begin` \(6\)'),
    (lambda: schedules.named('polynomial', end=5), "schedule 'polynomial' needs `power`"),
    (lambda: schedules.exponential(), 'schedules.exponential: give exactly one of `rate`'),
    (lambda: schedules.exponential(0.1, half_life=3), 'exactly one'),
    (lambda: schedules.exponential(half_life=0), 'schedules.exponential: `half_life` must be positive, not 0'),
    (lambda: schedules.exponential(-0.1), 'schedules.exponential: `rate` must be positive, not -0.1'),
    (lambda: schedules.stepwise([1, 2], [0]), r'one rising boundary for each value, got 2 values and .* \(0,\)'),
    (lambda: schedules.stepwise([1, 2], [3, 3]), 'A stage of no steps'),
    (lambda: schedules.stepwise([1, 2], [3, 1]), 'rising'),
    (lambda: schedules.stepwise([], []), 'got 0 values'),
    (lambda: schedules.every(0), 'schedules.every: `steps` must be a number of updates, .* at least 1, .*not 0'),
    (lambda: schedules.named('linaer', end=5), "unknown schedule 'linaer'. Did you mean 'linear'.* Valid: constant, "),
    (lambda: schedules.named('linear', ends=5), "schedules.named: unknown argument of schedule 'linear': 'ends'. "
                                                "Did you mean 'end'.* Valid: begin, end, end_value, init_value"),
    (lambda: schedules.named('linear', begin=5), "schedules.named: schedule 'linear' needs `end`"),
]


@pytest.mark.parametrize('make, message', REFUSED)
def test_refusals_name_the_argument(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('name', FORMULAS)
def test_a_ramp_has_not_begun_exactly_where_it_is_zero(name):
  ramp, formula = FORMULAS[name]
  whole = selections.leafwise(sj.Unstructured(0.5), ramp=ramp).whole
  assert [whole(step) for step in STEPS] == [np.float32(formula(step)) == 0 for step in STEPS]


def test_where_a_ramp_has_not_begun_every_weight_is_kept():
  """A choice of which `whole` says so is left out. An update that moves weights about may prune before the ramp."""
  ramp, arrays = schedules.linear(0.0, 1.0, begin=10, end=20), {'w': jnp.arange(96.).reshape(8, 12) % 7}
  axes = {'w': Axes((0,), (1,))}
  for pattern in (sj.Unstructured(0.5), sj.Block((4, 3), 0.5), sj.Channel(0.5)):
    selection = selections.leafwise(pattern, ramp=ramp)
    leaves = selection.plan(arrays, axes).leaves
    masks = jax.jit(lambda step, leaves=leaves, selection=selection: selection.select(
        leaves, [arrays['w']], [arrays['w'] < 0], [Signals(step=step, axes=axes['w'])])[0][0])
    for step in (0, 10, 13, 20):
      assert selection.whole(step) == bool(masks(step).all()) == (step <= 10), (pattern, step)
  moving = updates.drop_and_grow(scores.magnitude, schedules.constant(0.3))
  assert not selections.leafwise(sj.Unstructured(0.5), ramp=ramp, update=moving).whole(0)
  assert not selections.leafwise(sj.Unstructured(0.5)).whole(0)
