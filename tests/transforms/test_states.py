"""Checks that every tool takes a state and gives it back whole, that no memory keeps a NaN, and odd leaves."""

import copy
import functools
import io
import pickle

import cases
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import recipes, schedules, states, trees

LIKE = {'fc': {'kernel': cases.F32((96, 4)), 'bias': cases.F32((4,))}}
PARAMS, GRADS = cases.random(0, like=LIKE), cases.random(1, (5,), LIKE)
SGD = optax.sgd(0.1)
made = lambda name, *inner: cases.CASES[name].make(*inner, axes=None)
is_dense = lambda node: isinstance(node, optax.MaskedNode)
# Optimizers of optax need JAX's ordinary promotion; that recipes do not is in test_conformance.
pytestmark = pytest.mark.usefixtures('standard_promotion')


def by_npz(tx, state, blank):
  file = io.BytesIO()
  np.savez(file, *jax.tree.leaves(state))
  arrays = np.load(io.BytesIO(file.getvalue()))
  return jax.tree.unflatten(jax.tree.structure(blank), [arrays[name] for name in arrays.files])


def by_paths(tx, state, blank):
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(state)
  assert len({jax.tree_util.keystr(path) for path, _ in with_paths}) == len(with_paths)
  return treedef.unflatten(x for _, x in with_paths)


def by_sharding(tx, state, blank):
  """Places a state by shardings like those of the parameters, as the documentation of optax does."""
  mesh = Mesh(np.asarray(jax.devices()[:2]), 'x')
  split, whole = NamedSharding(mesh, P('x')), NamedSharding(mesh, P())
  shardings = optax.tree_map_params(
      tx, lambda _, sharding: sharding, state, {'fc': {'kernel': split, 'bias': split}},
      transform_non_params=lambda _: whole, is_leaf=is_dense)
  placed = jax.device_put(state, shardings)
  assert all(x.sharding == split for x in jax.tree.leaves((placed.masks, placed.master)))
  return jax.device_put(placed, jax.devices()[0])


TOOLS = {
    'flax bytes': lambda tx, state, blank: serialization.from_bytes(blank, serialization.to_bytes(state)),
    'flax state dict': lambda tx, state, blank: serialization.from_state_dict(
        blank, jax.tree.map(np.asarray, serialization.to_state_dict(state))),
    'pickle': lambda tx, state, blank: pickle.loads(pickle.dumps(state)),
    'deepcopy': lambda tx, state, blank: copy.deepcopy(state),
    'npz': by_npz,
    'tree_map_params': lambda tx, state, blank: optax.tree_map_params(tx, lambda x: x, state),
    'shardings': by_sharding,
    'another state': lambda tx, state, blank: jax.tree.map(lambda old, new: new, blank, state),
    'paths': by_paths,
    'tree.set': lambda tx, state, blank: optax.tree.set(state, step=optax.tree.get(state, 'step')),
    'eval_shape': lambda tx, state, blank: jax.tree.map(
        lambda abstract, x: jnp.asarray(x, abstract.dtype), jax.eval_shape(tx.init, PARAMS), state),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize('name', recipes.TABLE)
def test_a_state_goes_through_every_tool_bit_for_bit(name):
  """An update is a function of the arrays and of the structure, so that equal ones have equal updates ever after."""
  tx = made(name)
  draw = np.random.default_rng(0).integers
  state = jax.tree.map(lambda x: jnp.asarray(draw(0, 100, x.shape), x.dtype), jax.eval_shape(tx.init, PARAMS))
  state = state._replace(plan=state.plan.carrying(jnp.asarray(state.plan.fingerprint)))
  blank = jax.tree.map(jnp.zeros_like, state)
  for tool, through in TOOLS.items():
    back = through(tx, state, blank)
    cases.assert_same(back, state)
    assert back.plan.leaves == state.plan.leaves and states.find(back), tool


@pytest.mark.parametrize('name', ['rigl', 'soft_movement_pruning', 'st3'])
def test_an_update_takes_a_state_from_every_tool_and_goes_on_bit_for_bit(name):
  tx = made(name)
  traced = []
  step = jax.jit(lambda *args: traced.append(1) or cases.step(tx, *args))
  first = step(PARAMS, tx.init(PARAMS), grads(0))
  second = step(*first, grads(1))
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for through in TOOLS.values():
    cases.assert_same(step(first[0], jax.tree.map(np.asarray, through(tx, *[first[1]] * 2)), grads(1)), second)
  assert len(traced) == 1


def grads(t):
  return jax.tree.map(lambda g: g[t], GRADS)


def adam():
  return recipes.sr_ste(optax.adam(0.1))


NESTED = {
    'chain': lambda: optax.chain(optax.clip(1.0), adam()),
    'masked': lambda: optax.masked(adam(), {'fc': True}),
    'partition': lambda: optax.partition({'a': adam(), 'b': recipes.dense(SGD)}, {'fc': {'kernel': 'a', 'bias': 'b'}}),
    'several steps': lambda: optax.MultiSteps(adam(), 2).gradient_transformation(),
    'not finite': lambda: optax.apply_if_finite(adam(), 3),
}


@pytest.mark.parametrize('name', NESTED)
def test_wrapped_recipes_go_through_flax_and_tree_map_params(name):
  tx = NESTED[name]()
  state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
  trained = state.apply_gradients(grads=grads(0))
  restored = serialization.from_bytes(state, serialization.to_bytes(trained))
  restored = restored.replace(opt_state=jax.tree.map(jnp.asarray, restored.opt_state))
  cases.assert_same(restored.opt_state, trained.opt_state)
  cases.assert_same(*(each.apply_gradients(grads=grads(1)).opt_state for each in (restored, trained)))
  assert len(sj.report(restored.params, restored.opt_state).rows) == 1
  if name != 'partition':  # optax's own does not take the stand-in when its labels are a tree
    doubled = optax.tree_map_params(tx, lambda x: x * 2 if x.dtype == jnp.float32 else x, trained.opt_state)
    (before,), (after,) = states.find(trained.opt_state), states.find(doubled)
    np.testing.assert_array_equal(after.master['fc']['kernel'], 2 * before.master['fc']['kernel'])
    assert after.plan == before.plan


def test_flax_that_is_imported_after_the_state_was_made_knows_it():
  state = adam().init(PARAMS)
  serialization._STATE_DICT_REGISTRY.pop(states.Plan, None)
  states._make_known_to.cache_clear()
  assert set(flax.serialization.to_state_dict(state)['plan']) == {'identity'}


def test_an_abstract_state_is_restored_by_orbax_with_its_shardings(tmp_path):
  tx = adam()
  saved, sharding = tx.init(PARAMS), NamedSharding(Mesh(np.asarray(jax.devices()[:2]), 'x'), P())
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      jax.eval_shape(tx.init, PARAMS))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', like)
    other = checkpointer.restore(tmp_path / 'state', jax.eval_shape(recipes.ste(optax.adam(0.1)).init, PARAMS))
  cases.assert_same(restored, saved)
  with pytest.raises(ValueError, match='made by sr_ste .* This optimizer is ste'):
    sj.check(PARAMS, other)


def test_a_schedule_that_pickle_cannot_take_stays_configuration():
  """A state comes back and goes on; only the point before the first update needs the schedule."""
  tx = recipes.mdgf(SGD, decay=lambda step: 1.0 - 0.1 * step, where=lambda path, w: w.ndim == 2)
  state = tx.init(PARAMS)
  back = pickle.loads(pickle.dumps(state))
  assert jax.tree.structure(back) == jax.tree.structure(state)
  with pytest.raises(ValueError, match='lambda or a closure.*Make one update'):
    sj.project(PARAMS, back)
  traced = []
  step = jax.jit(lambda *args: traced.append(1) or cases.step(tx, *args))
  cases.assert_same(step(PARAMS, back, grads(0)), step(PARAMS, state, grads(0)))
  assert len(traced) == 1
  sj.project(*step(PARAMS, back, grads(0)))
  config = {'decay': schedules.linear(end=5), 'refresh': schedules.every(2, begin=1), 'pattern': sj.NM(2, 4)}
  assert pickle.loads(pickle.dumps(config)) == config


# No memory keeps a NaN.

SKIPPING = {
    'inside': lambda make: make(optax.apply_if_finite(optax.adam(0.1), 5)),
    'outside': lambda make: optax.apply_if_finite(make(optax.adam(0.1)), 5),
    'inside, several steps': lambda make: make(optax.MultiSteps(
        optax.adam(0.1), 1, should_skip_update_fn=optax.skip_not_finite).gradient_transformation()),
}
# Every recipe has a case inside, and recipes with a memory have all three cases.
NAN = [(name, 'outside' if name == 'dass' else 'inside') for name in recipes.TABLE] + [  # DASS has two optimizers
    (name, where) for name in ('movement_pruning', 'snfs') for where in [*SKIPPING][1:]]


@pytest.mark.sampled(14)
@pytest.mark.parametrize('name, where', NAN)
def test_a_skipped_step_leaves_no_nan(name, where):
  spoiled = jax.tree.map(lambda g: g.at[2].set(jnp.nan), GRADS)
  make = lambda: SKIPPING[where](functools.partial(made, name))
  (params, state), (seen, _, masks) = jax.jit(functools.partial(cases.scanned, make))(PARAMS, spoiled)
  for tree in (params, state, seen):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))
  if cases.CASES[name].promise.counts:
    assert len({int(mask.sum()) for mask in masks['fc']['kernel']}) == 1


def test_a_score_follows_the_movement_after_a_skipped_step_as_if_there_were_none():
  tx = recipes.movement_pruning(optax.apply_if_finite(optax.sgd(0.0), 5), 0.5, end=9)
  bad = jax.tree.map(lambda w: jnp.full_like(w, jnp.inf), PARAMS)
  _, skipped = cases.step(tx, *cases.step(tx, PARAMS, tx.init(PARAMS), bad), PARAMS)
  _, alone = cases.step(tx, PARAMS, tx.init(PARAMS), PARAMS)
  np.testing.assert_array_equal(skipped.stats['fc']['kernel'].score, alone.stats['fc']['kernel'].score)


# Leaves of every kind.


def test_what_is_no_array_stays_dense():
  params = PARAMS | {'temperature': 0.5, 'steps': 3, 'table': jnp.ones((4, 4), jnp.int32), 'nothing': None,
                     'empty': {'kernel': jnp.zeros((0, 4))}}
  gradients = jax.tree.map(jnp.ones_like, params)
  for name in ('sr_ste', 'gradual_magnitude', 'rigl', 'global_sparse_momentum'):
    tx = made(name)
    new, state = cases.step(tx, params, tx.init(params), gradients)
    assert [leaf.path for leaf in state.plan.leaves] == ['fc/kernel']
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert sj.masks(new, state)['temperature'] and len(sj.report(new, state).rows) == 1
    sj.project(new, state)
    assert new['empty']['kernel'].shape == (0, 4)


def test_a_whole_model_with_functions_among_its_leaves():
  model = eqx.nn.MLP(16, 8, 32, 2, key=jax.random.key(0))
  state = recipes.asp(SGD).init(eqx.filter(model, eqx.is_inexact_array))
  model = sj.apply_masks(sj.project(model, state), state)
  assert callable(model.activation)
  asked = sj.check(model, pattern=sj.NM(2, 4), where=lambda path, w: w.ndim == 2)
  assert [row.path for row in sj.check(model, state).rows] == [row.path for row in asked.rows]
  keyed = PARAMS | {'noise': jax.random.key(0), 'name': 'fc', 'act': jax.nn.relu}
  seen = []
  trees.select('test', lambda path, leaf: bool(seen.append(path)) or path == 'fc/kernel', keyed)
  assert sorted(seen) == ['fc/bias', 'fc/kernel', 'noise']


def test_two_leaves_of_one_path_are_refused():
  params = {'a/kernel': jnp.ones((4, 4)), 'a': {'kernel': jnp.ones((4, 4))}}
  for tool in (recipes.ste(SGD).init, sj.report, lambda params: sj.formats.pack(params, '2:4')):
    with pytest.raises(ValueError, match="'a/kernel' of shape .4, 4.: two leaves have this path. Rename a key"):
      tool(params)
  tx = recipes.ste(SGD)
  tx.init(PARAMS | {'a/bias': jnp.ones(4), 'a': {'bias': jnp.ones(4)}})  # both stay dense


def test_a_complex_matrix_is_refused_or_left_out_by_name():
  params = PARAMS | {'fourier': {'kernel': jnp.ones((8, 4), jnp.complex64)}}
  with pytest.raises(ValueError, match="'fourier/kernel' of shape .8, 4.: dtype complex64 is not floating"):
    recipes.ste(SGD).init(params)
  state = recipes.ste(SGD, where=trees.all_but('fourier/kernel')).init(params)
  assert [leaf.path for leaf in state.plan.leaves] == ['fc/kernel']
