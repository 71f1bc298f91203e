"""Recipes among other things: every optimizer inside, every wrapper outside, every container of parameters."""

import functools
from typing import Any, NamedTuple

import cases
import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, STEPS
from flax import nnx
from optax import contrib

import sparsejax
from sparsejax import recipes, states

# Models and optimizers need JAX's ordinary promotion; that recipes do not is in test_conformance.
pytestmark = pytest.mark.usefixtures('standard_promotion')

SHAPES = {'stack': {'kernel': cases.F32((96, 4)), 'bias': cases.F32((4,))}, 'norm': {'scale': cases.F32((4,))}}
is_bias = functools.partial(jax.tree.map, lambda w: w.ndim < 2)

OPTIMIZERS = {
    'sgd': lambda: optax.sgd(0.3),
    'momentum': lambda: optax.sgd(0.3, momentum=0.9),
    'nesterov': lambda: optax.sgd(optax.linear_schedule(0.3, 0.1, 9), momentum=0.9, nesterov=True),
    'adam': lambda: optax.adam(0.3),
    'amsgrad': lambda: optax.amsgrad(0.3),
    'adamw': lambda: optax.adamw(0.3, mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)),
    'nadamw': lambda: optax.nadamw(0.3),
    'adagrad': lambda: optax.adagrad(0.3),
    'adafactor': lambda: optax.adafactor(0.3, min_dim_size_to_factor=4),
    'lion': lambda: optax.lion(0.1),
    'lamb': lambda: optax.lamb(0.3),
    'rmsprop': lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    'muon': lambda: contrib.muon(0.3),
    'schedule_free': lambda: contrib.schedule_free_adamw(0.3),
    'prodigy': lambda: contrib.prodigy(1.0),
    'mechanize': lambda: contrib.mechanize(optax.adam(0.3)),
    'sam': lambda: contrib.sam(optax.sgd(0.3), optax.sgd(0.1), sync_period=2),
    'ema': lambda: optax.chain(optax.ema(0.9), optax.sgd(0.3)),
    'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(0.3)),
    'MultiSteps': lambda: optax.MultiSteps(optax.adam(0.3), 2),
    'clip': lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.3)),
    'plateau': lambda: optax.chain(optax.sgd(0.3), contrib.reduce_on_plateau(0.5, patience=1)),
    'masked': lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), is_bias), optax.sgd(0.3)),
    'partition': lambda: optax.partition(
        {True: optax.adam(0.3), False: optax.sgd(0.3)}, functools.partial(jax.tree.map, lambda w: w.ndim > 1)),
}
SPARSE = [name for name, case in CASES.items() if case.recipe != 'dense']


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_any_optimizer_inside(name):
  """Two cases for each, of all; `dense` is the optimizer alone, bit for bit. All get a `value=`."""
  inner, i = OPTIMIZERS[name], [*OPTIMIZERS].index(name)
  picked = [SPARSE[(5 * i) % len(SPARSE)], SPARSE[(5 * i + 19) % len(SPARSE)]]
  makes = {case: functools.partial(CASES[case].make, inner()) for case in picked}
  makes |= {'dense': lambda: recipes.dense(inner()), 'alone': lambda: optax.with_extra_args_support(inner())}
  start, grads = cases.random(0, like=SHAPES), cases.random(1, (STEPS,), SHAPES)

  extra = {'value': 1.0} if name != 'sam' else {}  # which says that it takes any and then refuses them

  @jax.jit
  def program(params, grads):
    return {case: cases.scanned(make, params, grads, watch=case in picked, **extra) for case, make in makes.items()}

  results = program(start, grads)
  for case in picked:
    (params, state), (seen, points, _) = results[case]
    cases.assert_always_at_the_point(start, seen, points)
    assert not np.array_equal(*(x['stack']['kernel'] for x in (params, start)))
    if CASES[case].tuned or CASES[case].promise.zeros_from is not None:
      sparsejax.check(params, state)
    if name == 'plateau':
      assert float(optax.tree.get(state, 'ReduceLROnPlateauState').scale) < 1, '`value` did not arrive'
  (alone, alone_state), (dense, dense_state) = results['alone'][0], results['dense'][0]
  cases.assert_same((dense, dense_state.inner), (alone, alone_state))


def by_kind(params):
  return jax.tree.map_with_path(lambda path, w: path[0].key, params)


OUTSIDE = {
    'chain': lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    'named_chain': lambda tx: optax.named_chain(('clip', optax.clip(0.5)), ('sparse', tx)),
    'masked': lambda tx: optax.masked(tx, {'stack': True, 'norm': False}),
    'partition': lambda tx: optax.partition({'stack': tx, 'norm': optax.adam(0.1)}, by_kind),
    'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
    'MultiSteps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    'inject_hyperparams': lambda tx: optax.inject_hyperparams(
        lambda learning_rate: recipes.ste(optax.sgd(learning_rate)))(0.3),
    'accumulate in chain': lambda tx: optax.chain(optax.zero_nans(), optax.apply_if_finite(optax.chain(tx), 3)),
}


@pytest.mark.parametrize('name', OUTSIDE)
@pytest.mark.parametrize('case', ['sr_ste', 'asp'])
def test_any_wrapper_outside_that_leaves_the_updates_alone(case, name):
  make = lambda: OUTSIDE[name](CASES[case].make())
  start = cases.random(0, like=SHAPES)
  start = sparsejax.project(start, make().init(start))  # MultiSteps moves nothing before its second update
  (params, state), (seen, points, masks) = jax.jit(functools.partial(cases.scanned, make))(
      start, cases.random(1, (STEPS,), SHAPES))
  cases.assert_always_at_the_point(start, seen, points)
  assert np.any(np.asarray(masks['stack']['kernel'][0]) != masks['stack']['kernel'][-1]) == (case != 'asp' or (
      name == 'inject_hyperparams'))
  (row,) = sparsejax.check(params, state).rows
  assert (row.path, row.asked, row.achieved) == ('stack/kernel', 0.5, 0.5)


def test_two_recipes_on_two_parts():
  shapes = {'stack': SHAPES['stack'], 'head': {'kernel': cases.F32((16, 4))}}
  make = lambda: optax.partition({
      'stack': recipes.mdgf(optax.adam(0.3), sparsejax.NM(1, 8), decay=sparsejax.schedules.linear(end=6)),
      'head': recipes.asp(optax.sgd(0.3))}, by_kind)
  start = cases.random(0, like=shapes)
  (params, state), (seen, points, _) = jax.jit(functools.partial(cases.scanned, make))(
      start, cases.random(1, (STEPS,), shapes))
  cases.assert_always_at_the_point(start, seen, points)
  rows = {row.path: row for row in sparsejax.check(params, state).rows}
  assert {path: str(row.pattern) for path, row in rows.items()} == {'stack/kernel': '1:8', 'head/kernel': '2:4'}
  assert [rows[path].achieved for path in ('stack/kernel', 'head/kernel')] == [0.875, 0.5]
  assert len(states.find(state)) == 2


@pytest.mark.parametrize('case', ['asp', 'sr_ste', 'mdgf-scaled-linear', 'st3'])
def test_gradients_that_are_not_finite_revive_nothing(case):
  """Skipped by `apply_if_finite`, nothing moves; taken as they are, they spoil kept weights but no pruned one."""
  make = lambda: optax.apply_if_finite(CASES[case].make(), 2)
  start, grads = cases.random(0, like=SHAPES), cases.random(1, (STEPS,), SHAPES)
  bad = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])
  grads['stack']['kernel'] = grads['stack']['kernel'].at[8, 5:8, 1].set(bad)
  run = jax.jit(lambda start, grads: [cases.scanned(m, start, grads) for m in (make, CASES[case].make)])
  for skipped, ((_, state), (seen, points, masks)) in zip((True, False), run(start, grads)):
    held = np.asarray(seen['stack']['kernel'])
    if skipped:
      cases.assert_always_at_the_point(start, seen, points)
      np.testing.assert_array_equal(held[8], held[7])
      np.testing.assert_array_equal(state.total_notfinite, 1)
    was_pruned = ~np.asarray(masks['stack']['kernel'][7]) & ~np.asarray(masks['stack']['kernel'][8])
    assert was_pruned.any() and np.all(held[8][was_pruned] == 0)


# Containers.


class Layer(NamedTuple):
  kernel: Any
  bias: Any


@flax.struct.dataclass
class Model:
  stack: Any
  norm: Any


def as_layer(params):
  return params | {'stack': Layer(**params['stack'])}


CONTAINERS = {
    'variables': lambda params: {'params': params},
    'a NamedTuple': as_layer,
    'lists in a dict': lambda params: {'layers': [params['stack'], params['norm']]},
    'a tuple': lambda params: (params, ),
    'a dataclass': lambda params: Model(**params),
    'a FrozenDict': flax.core.freeze,
    'an nnx.State': lambda params: nnx.State(jax.tree.map(nnx.Param, params)),
    'with None': lambda params: params | {'frozen': None},
}


@functools.cache
def plain_run(case):
  return jax.jit(functools.partial(cases.scanned, CASES[case].make))(
      cases.random(0, like=SHAPES), cases.random(1, (STEPS,), SHAPES))


@pytest.mark.parametrize('name', CONTAINERS)
def test_any_container_gives_the_same_bits(name):
  case, container = 'mdgf-scaled-cosine-phases', CONTAINERS[name]
  start, grads = container(cases.random(0, like=SHAPES)), container(cases.random(1, (STEPS,), SHAPES))
  (params, state), (_, points, masks) = jax.jit(functools.partial(cases.scanned, CASES[case].make))(start, grads)
  (expected, _), (_, expected_points, expected_masks) = plain_run(case)
  assert jax.tree.structure(params) == jax.tree.structure(start)
  for got, want in ((params, expected), (points, expected_points), (masks, expected_masks)):
    for a, b in zip(jax.tree.leaves(container(want)), jax.tree.leaves(got)):
      np.testing.assert_array_equal(a, b)
  (row,) = sparsejax.check(params, state).rows
  assert row.path.endswith('kernel')


def test_nnx_by_its_optimizer_and_nothing_else():
  model = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
  optimizer = nnx.Optimizer(model, recipes.sr_ste(optax.adamw(0.1)), wrt=nnx.Param)

  @nnx.jit
  def train(model, optimizer, x):
    optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model))

  masks = []
  for i in range(4):
    train(model, optimizer, jax.random.normal(jax.random.key(i), (5, 16)))
    params = nnx.state(model, nnx.Param)
    assert len(sparsejax.check(params, optimizer.opt_state).rows) == 2
    masks.append(sparsejax.masks(params, optimizer.opt_state))
    point = sparsejax.project(params, optimizer.opt_state)
    assert jax.tree.structure(point) == jax.tree.structure(params)
    cases.assert_at_the_point(params, params, point)
  flips = cases.by_path(sparsejax.metrics.sad(masks[0], masks[-1]))
  assert sum(float(x) for path, x in flips.items() if 'count' in path) > 0


def test_equinox_as_its_documentation_says():
  model = eqx.nn.MLP(16, 4, 8, 1, key=jax.random.key(0))
  tx = recipes.sr_ste(optax.adamw(0.1))
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def train(model, state, x):
    grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(x) - 1) ** 2))(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state

  for i in range(4):
    model, state = train(model, state, jax.random.normal(jax.random.key(i), (5, 16)))
    params = eqx.filter(model, eqx.is_inexact_array)
    rows = sparsejax.check(params, state).rows
    assert [(row.path, row.axes.contracted) for row in rows] == [('layers/0/weight', (1,)), ('layers/1/weight', (1,))]
    cases.assert_at_the_point(params, params, sparsejax.project(params, state))


# Which leaves of a transformer are sparse.


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name='attention')(nn.LayerNorm(name='norm1')(x))
    return x + nn.Dense(8, name='fc2')(nn.relu(nn.Dense(16, name='fc1')(nn.LayerNorm(name='norm2')(x)))), None


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(11, 8, name='embed')(tokens)
    x = nn.Conv(8, (3,), name='conv')(x)
    x, _ = Block(name='block')(x)
    x, _ = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)(name='blocks')(x, None)
    return nn.Dense(11, name='head')(nn.RMSNorm(name='norm')(x))


IN_A_BLOCK = {'attention/query/kernel': (0,), 'attention/key/kernel': (0,), 'attention/value/kernel': (0,),
              'attention/out/kernel': (0, 1), 'fc1/kernel': (0,), 'fc2/kernel': (0,)}


@pytest.mark.parametrize('traced', [True, False])
def test_matrices_of_a_transformer_are_sparse_and_nothing_else(traced):
  model, tokens = Transformer(), jnp.zeros((2, 5), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  axes = sparsejax.contractions(model.apply, variables, tokens) if traced else None
  state = jax.eval_shape(recipes.ste(optax.sgd(0.1), axes=axes).init, variables)
  found = {leaf.path: leaf.axes for leaf in states.plans(state)[0].leaves}
  expected = {'params/conv/kernel': (1,), 'params/head/kernel': (0,)}
  expected |= {f'params/block/{path}': contracted for path, contracted in IN_A_BLOCK.items()}
  expected |= {f'params/blocks/{path}': tuple(a + 1 for a in contracted) for path, contracted in IN_A_BLOCK.items()}
  assert {path: axes.contracted for path, axes in found.items()} == expected
  assert {axes.source for axes in found.values()} == {'traced' if traced else 'convention'}
  for path, axes in found.items():
    assert axes.layer == ((0,) if '/blocks/' in path else ())
