"""Checks recipes together with optimizers and their slots, with averages, and with the models of each library."""

import functools

import cases
import equinox as eqx
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
from sparsejax import recipes, selections, states, transforms

# Models and optimizers need JAX's ordinary promotion; that recipes do not is in test_conformance.
pytestmark = pytest.mark.usefixtures('standard_promotion')

SHAPES = {'stack': {'kernel': cases.F32((96, 4)), 'bias': cases.F32((4,))}, 'norm': {'scale': cases.F32((4,))}}


def by_kind(params):
  return jax.tree.map_with_path(lambda path, w: path[0].key, params)


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
  make = lambda: optax.apply_if_finite(CASES[case].make(axes=None), 2)
  start, grads = cases.random(0, like=SHAPES), cases.random(1, (STEPS,), SHAPES)
  bad = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])
  grads['stack']['kernel'] = grads['stack']['kernel'].at[8, 5:8, 1].set(bad)
  run = jax.jit(lambda start, grads: [cases.scanned(m, start, grads) for m in (
      make, functools.partial(CASES[case].make, axes=None))])
  for skipped, ((_, state), (seen, points, masks)) in zip((True, False), run(start, grads)):
    held = np.asarray(seen['stack']['kernel'])
    if skipped:
      cases.assert_always_at_the_point(start, seen, points)
      np.testing.assert_array_equal(held[8], held[7])
      np.testing.assert_array_equal(state.total_notfinite, 1)
    was_pruned = ~np.asarray(masks['stack']['kernel'][7]) & ~np.asarray(masks['stack']['kernel'][8])
    assert was_pruned.any() and np.all(held[8][was_pruned] == 0)


# Slots and extra arguments of optimizers have tests here.


def run(make, updates=STEPS, **extra):
  """Returns parameters and states after each of so many updates of `SHAPES`, one compiled function for all of them."""
  tx, params = make(), cases.random(0, like=SHAPES)
  grads, state = cases.random(1, (STEPS,), SHAPES), tx.init(params)
  update = jax.jit(functools.partial(cases.step, tx, **extra))
  for t in range(updates):
    params, state = update(params, state, jax.tree.map(lambda x, t=t: x[t], grads))
    yield params, state


def test_extra_arguments_reach_the_optimizer():
  make = lambda: recipes.ste(optax.chain(optax.sgd(0.3), contrib.reduce_on_plateau(0.5, patience=1)))
  *_, (_, state) = run(make, value=jnp.float32(1.0))
  assert float(optax.tree.get(state, 'ReduceLROnPlateauState').scale) < 1
  with pytest.raises(TypeError, match='value'):
    [*run(make, updates=1)]


@pytest.mark.parametrize('inner', [optax.sgd(0.3, momentum=0.9), optax.adam(0.3)])
def test_momentum_of_a_pruned_weight_does_not_revive_it(inner):
  """Full of momentum when it is pruned, and no gradient ever brings it back."""
  steps = [*run(lambda: recipes.asp(inner, dense_steps=5))]
  momentum = optax.tree.get(steps[4][1].inner, 'trace' if 'trace' in str(steps[4][1]) else 'mu')['stack']['kernel']
  pruned = ~np.asarray(steps[4][1].masks['stack']['kernel'])
  assert pruned.mean() == 0.5 and np.all(np.asarray(momentum)[pruned] != 0)
  for params, _ in steps[4:]:
    assert np.all(np.asarray(params['stack']['kernel'])[pruned] == 0)


def returning(slots, inner):
  """Masks drawn anew at every update, with nothing behind the zeros: weights are pruned and return all the time."""
  key = jax.random.key(3)
  selection = selections.leafwise(sparsejax.NM(2, 4), score=sparsejax.scores.random)
  return transforms.sparsify(inner, sparsejax.flows.hard(), selection, slots=slots, key=key)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('name, inner', [
    ('trace', optax.sgd(0.3, momentum=0.9)), ('mu', optax.adam(0.3)), ('nu', optax.chain(optax.adam(0.3))),
    ('mu', optax.masked(optax.adam(0.3), {'stack': True, 'norm': False})),
    ('sum_of_squares', optax.adagrad(0.3, initial_accumulator_value=0.25))])
def test_slots_of_a_weight_that_returns_are_kept_or_fresh_as_asked(name, inner):
  fresh = 0.25 if name == 'sum_of_squares' else 0.0
  for slots in ('kept', 'fresh'):
    before, seen = None, 0
    for _, state in run(functools.partial(returning, slots, inner)):
      mask = np.asarray(state.masks['stack']['kernel'])
      slot = np.asarray(optax.tree.get(state.inner, name)['stack']['kernel'])
      if before is not None:
        grown = mask & ~before[0]
        stayed = mask & before[0] & (before[1] != fresh)
        seen += np.sum(before[1][grown] != fresh)
        assert np.all(slot[stayed] != fresh)
        assert np.all((slot[grown] == fresh) | (before[1][grown] != fresh if slots == 'kept' else False))
        remembered = before[1][grown] != fresh
        assert np.all((slot[grown][remembered] == fresh) == (slots == 'fresh'))
      before = mask, slot
    assert seen, 'nothing that returned had a slot of its own'


def test_factored_slots_stay_for_they_belong_to_a_row():
  inner = optax.adafactor(0.3, min_dim_size_to_factor=4)
  (*_, (_, kept)), (*_, (_, fresh)) = (run(functools.partial(returning, slots, inner)) for slots in ('kept', 'fresh'))
  cases.assert_same(kept.inner, fresh.inner)


@pytest.mark.parametrize('recipe', ['sr_ste', 'asp', 'mdgf-scaled-linear'])
def test_an_average_of_parameters_is_sparse_again_by_the_masks(recipe):
  average, steps = None, [*run(functools.partial(CASES[recipe].make, axes=None))]
  for params, _ in steps:
    average = params if average is None else optax.incremental_update(params, average, 0.3)
  state = steps[-1][1]
  sparse = sparsejax.apply_masks(average, state)
  assert sparsejax.check(sparse, state).achieved == 0.5
  kernel, mask = np.asarray(average['stack']['kernel']), np.asarray(state.masks['stack']['kernel'])
  np.testing.assert_array_equal(sparse['stack']['kernel'], np.where(mask, kernel, 0))
  cases.assert_same(sparse['norm'], average['norm'])
  if recipe != 'asp':
    with pytest.raises(ValueError, match='an average of them: sparsejax.apply_masks'):
      sparsejax.check(average, state)


def test_schedule_frees_average_is_had_from_the_master():
  *_, (params, state) = run(lambda: recipes.sr_ste(contrib.schedule_free_adamw(0.3)))
  is_dense = sparsejax.trees.is_dense
  master = jax.tree.map(lambda w, p: p if is_dense(w) else w, state.master, params, is_leaf=is_dense)
  average = contrib.schedule_free_eval_params(state.inner, master)
  assert sparsejax.check(sparsejax.apply_masks(average, state), state).achieved == 0.5


# Models of each library, trained as its documentation says.


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


def test_haiku_as_its_documentation_says():
  hk = pytest.importorskip('haiku')
  net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4)(jax.nn.relu(hk.Conv1D(8, 3)(x)).mean(1))))
  x = jnp.ones((2, 6, 8))
  params = net.init(jax.random.key(0), x)
  tx = recipes.sr_ste(optax.adamw(0.1), axes=sparsejax.contractions(net.apply, params, x))
  state = tx.init(params)

  @jax.jit
  def train(params, state, x):
    grads = jax.grad(lambda params: jnp.mean((net.apply(params, x) - 1) ** 2))(params)
    return cases.step(tx, params, state, grads)

  for i in range(4):
    params, state = train(params, state, jax.random.normal(jax.random.key(i), x.shape))
    rows = sparsejax.check(params, state).rows
    assert [(row.path, row.axes.contracted, row.axes.spatial) for row in rows] == [
        ('conv1_d/w', (1,), (0,)), ('linear/w', (0,), ())]


@pytest.mark.sampled(2)
@pytest.mark.parametrize('recipe', ['sr_ste', 'asp', 'sdgf_stepwise'])
def test_an_ensemble_trains_as_its_members_do(recipe):
  """A leading axis under `vmap`, as of `eqx.filter_vmap` and `nnx.vmap`, and the same axis as one stack of layers."""
  members = [cases.random(seed, like=SHAPES) for seed in range(3)]
  grads = [cases.random(seed, (STEPS,), SHAPES) for seed in range(3, 6)]
  make = functools.partial(CASES[recipe].make, axes=None)
  alone = [jax.jit(functools.partial(cases.scanned, make, watch=False))(*one)[0]
           for one in zip(members, grads)]
  stack = lambda trees, axis=0: jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)
  tx, start = make(), stack(members)

  def loop(grads, update, state):
    body = lambda carry, g: (update(*carry, g), None)
    return jax.jit(lambda state: jax.lax.scan(body, (start, state), grads)[0])(state)

  step = functools.partial(cases.step, tx)
  together = loop(stack(grads, 1), jax.vmap(step), jax.vmap(tx.init)(start))
  cases.assert_same(together, stack(alone))
  assert sparsejax.check(*together).achieved == 0.5
  tx = CASES[recipe].make()
  layers = loop(stack(grads, 1), functools.partial(cases.step, tx), tx.init(start))
  assert states.find(layers[1])[0].plan.leaves[0].axes.layer == (0,)
  cases.assert_same(layers[0], together[0])


# Transformers have tests of which leaves are sparse.


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


def test_matrices_of_a_transformer_are_sparse_and_nothing_else():
  model, tokens = Transformer(), jnp.zeros((2, 5), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  axes = sparsejax.contractions(model.apply, variables, tokens)
  state = jax.eval_shape(recipes.ste(optax.sgd(0.1), axes=axes).init, variables)
  found = {leaf.path: leaf.axes for leaf in states.find(state)[0].plan.leaves}
  expected = {'params/conv/kernel': (1,), 'params/head/kernel': (0,)}
  expected |= {f'params/block/{path}': contracted for path, contracted in IN_A_BLOCK.items()}
  expected |= {f'params/blocks/{path}': tuple(a + 1 for a in contracted) for path, contracted in IN_A_BLOCK.items()}
  assert {path: axes.contracted for path, axes in found.items()} == expected
  assert {axes.source for axes in found.values()} == {'traced'}
  for path, axes in found.items():
    assert axes.layer == ((0,) if '/blocks/' in path else ())
  with pytest.raises(ValueError) as refusal:  # without the program, all that has no convention at once
    recipes.ste(optax.sgd(0.1)).init(variables)
  assert {path for path in found if f"'{path}'" in str(refusal.value)} == {
      path for path in found if '/block/fc' not in path and '/head/' not in path}

