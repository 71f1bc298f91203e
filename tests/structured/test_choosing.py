"""Tests which units are chosen: within a budget, in rounds, in periods, and so that whole branches vanish."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped_programs import ints, params_of

from sparsejax import recipes, schedules, structured

pytestmark = pytest.mark.usefixtures('standard_promotion')
X = ints((5, 4), 7)
SHAPES = {'a': (4, 8), 'b': (8, 6), 'c': (6, 8), 'd': (8, 10), 'e': (10, 8), 'o': (8, 3)}


def apply(p, x):
  """A stream of width 8 with two residual branches."""
  h = jax.nn.relu(x @ p['a'])
  h = h + jax.nn.relu(h @ p['b']) @ p['c']
  return (h + jax.nn.relu(h @ p['d']) @ p['e']) @ p['o']


def twins(p, x):
  """Two branches without a connection around them: one of the two has to stay."""
  return (jax.nn.relu(x @ p['a']) @ p['c'] + jax.nn.relu(x @ p['b']) @ p['d']) @ p['o']


def looped(p, x):
  """A scan without a connection around its layers: no layer may vanish."""
  return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w['u']) @ w['v'], None), x, {'u': p['u'], 'v': p['v']})[0]


@functools.cache
def params():
  return {name: w + 0.1 * jax.random.normal(jax.random.key(i), w.shape)
          for i, (name, w) in enumerate(params_of(SHAPES).items())}


@functools.cache
def found():
  return structured.groups(apply, params(), X)


def none_of(*names):
  return {name: np.zeros(found()[name].size, bool) for name in names}


@pytest.mark.parametrize('make', [structured.flops, structured.parameters,
                                  lambda part: structured.latency(part, lambda sizes: 100.0 + sizes.get('d:1', 10))])
@pytest.mark.parametrize('fraction', [0.3, 0.5, 0.97])
def test_as_many_units_stay_as_the_budget_allows(make, fraction):
  budget = make(fraction)
  cost = budget.cost(found())
  if fraction < 0.9 and cost({}) == 110:  # what the last budget cannot save
    with pytest.raises(ValueError, match=r'a budget of .* but the model costs'):
      structured.choose(found(), params(), budget=budget)
    return
  keep = structured.choose(found(), params(), budget=budget)
  sizes = {name: int(mask.sum()) for name, mask in keep.items()}
  assert float(cost(sizes)) <= fraction * cost({}) * 1.0001
  more = structured.choose(found(), params(), 1 - (sum(sizes.values()) + 1) / 24)
  assert cost({name: int(mask.sum()) for name, mask in more.items()}) > fraction * cost({})


def test_costs_are_those_of_the_cut_program():
  keep = {'a:1': np.arange(8) < 5, 'd:1': np.arange(10) < 3}
  small, sizes = structured.cut(found(), params(), keep), {'a:1': 5, 'd:1': 3}
  assert structured.weights(found())(sizes) == sum(w.size for w in small.params.values())
  again = structured.groups(small.apply, small.params, X)
  assert structured.multiply_adds(found())(sizes) == pytest.approx(structured.multiply_adds(again)({}))


def test_measured_seconds_are_a_line_between_measured_sizes():
  cost = structured.seconds(found().only('d:1'), params(), X, points=2, rounds=2)
  ends, middle = [float(cost({'d:1': size})) for size in (5, 10)], float(cost({'d:1': 7.5}))
  assert min(*ends, float(cost({}))) > 0 and middle == pytest.approx(sum(ends) / 2, rel=1e-5)
  structured.choose(found().only('d:1'), params(), budget=structured.latency(1.0, cost))
  with pytest.raises(ValueError, match="measured group 'a:1'"):
    structured.choose(found(), params(), budget=structured.latency(1.0, cost))


# Branches that vanish.


def test_groups_vanish_only_if_every_result_still_depends_on_an_input():
  assert structured.erasable(found()) == ('b:1', 'd:1')
  own = structured.groups(twins, {**params(), 'b': params()['a'][:, :6], 'c': jnp.ones((8, 8)), 'd': jnp.ones((6, 8))},
                          X)
  assert structured.erasable(own.only('a:1', 'b:1')) == ('a:1',)
  assert structured.erasable(own, ['b:1', 'a:1']) == ('b:1',)
  stack = structured.groups(looped, {'u': jnp.ones((2, 4, 6)), 'v': jnp.ones((2, 6, 4))}, X)
  assert len(stack) == 1 and structured.erasable(stack) == ()


def test_a_branch_that_vanished_is_gone_from_the_program_and_the_result_is_that_of_zeros():
  small = structured.cut(found(), params(), none_of('b:1', 'd:1'))
  assert structured.prove(found(), params(), small, X).holds
  program = str(jax.make_jaxpr(small.apply)(small.params, X))
  assert program.count('dot_general') == 2 and small.params['b'].shape == (8, 0)
  zeros = {**params(), **{name: jnp.zeros(SHAPES[name]) for name in 'bc'}}
  assert structured.cut(found(), zeros).params['c'].shape == (0, 8)
  tx = recipes.group_magnitude(optax.sgd(0.1), found(), 0.5, total_steps=4)
  assert structured.cut_state(found(), tx.init(params()), small.kept).masks['b'].shape == (8, 0)


def test_hesso_erases_what_may_vanish_and_nothing_else():
  weak = {name: w * (0.001 if name in 'bc' else 1) for name, w in params().items()}
  tx = recipes.hesso(optax.sgd(0.0), found(), 0.5, begin=1, steps=3, periods=2, erase=('b:1',))
  step = jax.jit(lambda p, s: tx.update(jax.grad(lambda p: jnp.sum(apply(p, X) ** 2))(p), s, p))
  p, state = weak, tx.init(weak)
  counts = []
  for _ in range(7):
    moves, state = step(p, state)
    p = optax.apply_updates(p, moves)
    counts.append(sum(int((~mask).sum()) for mask in structured.kept(found(), p).values()))
  assert counts == [0, 0, 6, 6, 6, 12, 12], 'half of the units a period, zero at its end'
  assert structured.cut(found(), p).params['b'].shape[1] == 0


def test_a_fade_of_periods_begins_anew():
  fade = schedules.fade(3, begin=1, periods=2)
  np.testing.assert_allclose([float(fade(t)) for t in range(8)], [2/3, 2/3, 1/2, 0, 2/3, 1/2, 0, 0], rtol=1e-6)
  assert schedules.reach(fade) == 7


# One shot, and several.


def test_rounds_choose_among_what_is_left_and_one_round_is_one_shot():
  tuned = []

  def tune(p, masks):
    tuned.append(masks)
    return jax.tree.map(lambda w: w * 1.5, p)

  once, keep = structured.choose_in_rounds(found(), params(), [0.5], tune)
  assert all(np.array_equal(keep[name], mask) for name, mask in structured.choose(found(), params(), 0.5).items())
  assert not np.asarray(once['b'])[~np.asarray(tuned[0]['b'])].any()
  grads = jax.grad(lambda p: jnp.sum(apply(p, X) ** 2))
  p, last = structured.choose_in_rounds(found(), params(), [0.25, 0.5], tune, grads=grads,
                                        score=lambda units: units.sum(lambda w, s: jnp.abs(w * s.grad)))
  assert sum((~mask).sum() for mask in last.values()) == 12
  assert all((first | ~second).all() for first, second in zip(jax.tree.leaves(tuned[1]), jax.tree.leaves(tuned[2])))
  structured.prove(found(), p, structured.cut(found(), p, last), X)


@pytest.mark.parametrize('call, said', [
  (lambda: structured.cut(found(), params(), none_of('a:1')), r"'a:1' keeps none of its 8 units.*depends on no input"),
  (lambda: structured.grouped(found(), erase=('a:1',)), "without all of 'a:1', a result depends on no input"),
  (lambda: structured.grouped(found(), erase=('a',)), "group to erase 'a'"),
  (lambda: structured.grouped(dict(found()), budget=structured.flops(0.5)), 'need the program of the groups'),
  (lambda: structured.grouped(found(), budget=structured.flops(0.5), alone=True), 'leave out alone'),
  (lambda: structured.grouped(found(), budget=0.5), r'structured.flops\(0.5\)'),
  (lambda: structured.flops(2), 'from 0 to 1'),
  (lambda: structured.erasable(found(), ['nothing']), "group 'nothing'"),
  (lambda: found().only('nothing'), 'nothing'),
  (lambda: structured.choose_in_rounds(found(), params(), (0.5, 0.25), lambda p, m: p), 'must rise'),
])
def test_bad_choices_are_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
