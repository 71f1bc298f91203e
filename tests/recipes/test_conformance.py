"""What every recipe of `recipes.TABLE` promises (DESIGN, section 1), whatever its method. The cases are in `cases`."""

import functools
import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import BY_NAME, CASES, CONTRACTED, STEPS

import sparsejax
from sparsejax import plans, recipes, states, trees

every_case = pytest.mark.parametrize('name', CASES)
every_recipe = pytest.mark.parametrize('name', BY_NAME)
PHASES = [name for name in BY_NAME if CASES[name].tuned or CASES[name].recipe == 'dense']


def test_the_case_table_knows_every_recipe():
  assert {case.recipe for case in CASES.values()} == {*recipes.TABLE}
  assert {*CONTRACTED} == {path for path, w in cases.by_path(cases.random(0)).items() if trees.matrices(path, w)}


@every_case
def test_after_every_update_the_user_holds_the_sparse_point(name):
  """In the parameters' own dtypes, float32 and bfloat16, with a float32 master behind both."""
  params, state, seen, points, _ = unpacked(name)
  start = cases.start(name)
  cases.assert_always_at_the_point(start, seen, points)
  assert [w.dtype for w in jax.tree.leaves(params)] == [w.dtype for w in jax.tree.leaves(start)]
  assert {w.dtype for sparse in states.find(state) for w in jax.tree.leaves(sparse.master)} <= {np.dtype('float32')}


def unpacked(name):
  (params, state), seen = cases.run(name)
  return params, state, *seen


@every_case
def test_masks_keep_their_pattern_at_every_update_and_the_last_phase_is_exact(name):
  case, (params, state, seen, _, masks) = CASES[name], unpacked(name)
  sparse = {leaf.path for sparse in states.find(state) for leaf in sparse.plan.leaves}
  assert sparse == ({*CONTRACTED} & {*cases.by_path(case.shapes)} if case.recipe != 'dense' else set())
  seen, masks = cases.by_path(seen), cases.by_path(masks)
  for path in masks.keys() - sparse:
    assert masks[path].shape == (STEPS,) and masks[path].all(), 'a dense leaf has the scalar True'
  for path in sparse:
    after = dict(zip(range(1, STEPS + 1), masks[path]))
    held = dict(zip(range(1, STEPS + 1), seen[path]))
    dense, rest = [t for t in after if t < case.dense], [t for t in after if t >= case.dense]
    assert all(after[t].all() for t in dense), f'{path} in the dense phase'
    assert in_stages([after[t] for t in rest], path, case.promise.stages), f'{path}: not the stages'
    zeros_from = STEPS - case.tuned if case.promise.zeros_from is None else case.dense + case.promise.zeros_from
    for t in rest:
      if t >= STEPS - case.tuned and case.tuned:
        np.testing.assert_array_equal(after[t], after[STEPS], err_msg=f'{path} in the fine-tune phase')
        assert not after[t].all()
      if t >= zeros_from and (case.tuned or case.promise.zeros_from is not None):
        assert np.all(held[t][~after[t]] == 0), f'{path} after update {t}'
  if case.tuned or case.promise.zeros_from is not None:
    sparsejax.check(params, state)


@every_case
def test_counts_and_masks_stay_as_promised(name):
  _, _, _, _, masks = unpacked(name)
  for path, mask in cases.by_path(masks).items():
    if path not in CONTRACTED:
      continue
    after = mask[max(CASES[name].dense, int(name == 'snip-at-first-update')):]
    if CASES[name].promise.counts and CASES[name].recipe != 'snfs':
      assert len({int(m.sum()) for m in after}) == 1, f'{path}: {[int(m.sum()) for m in after]}'
    if CASES[name].promise.fixed:
      assert np.all(after == after[0]), path
    elif CASES[name].recipe in ('set_', 'rigl', 'snfs') and not name.endswith('channel'):  # of two none is dropped
      assert np.any(after != after[0]), f'{path}: the mask does not move'
  if CASES[name].promise.counts:
    every = [sum(int(m[t].sum()) for path, m in cases.by_path(masks).items() if path in CONTRACTED)
             for t in range(1, STEPS)]
    assert len({*every}) == 1


def in_stages(masks, path, stages):
  """Does each mask keep exactly n of every m, through all the stages, in their order?"""
  if not stages:
    return True
  # A mask that keeps 1:4 keeps 2:8 as well, so that the last stage that fits is the one it is in.
  fits = [[i for i, (n, m) in enumerate(stages) if np.all(kept(mask, path, m) == n)] for mask in masks]
  if not all(fits):
    return False
  at = [stage[-1] for stage in fits]
  return at == sorted(at) and {*at} == {*range(len(stages))}


def kept(mask, path, m):
  """How many of each `m` neighbours along the contraction are kept: `[groups]`."""
  axes = CONTRACTED[path]
  last = np.moveaxis(mask, axes, range(mask.ndim - len(axes), mask.ndim))
  return last.reshape(-1, m).sum(-1)


@pytest.mark.sampled(8)
@every_recipe
def test_a_jitted_step_compiles_once_donates_everything_and_equals_the_scan(name):
  """The state is made eagerly, and the step makes its own transform."""
  params = cases.random(0)
  params, state = cases.stepped(name, params, CASES[name].make().init(params), range(STEPS))
  assert len(cases.stepper(name)[1]) == 1
  cases.assert_same((params, state), cases.run(name)[0], cases.rounding(name))


def test_a_loop_of_unknown_length_carries_the_state():
  make, start = CASES['mdgf-phases'].make, cases.start('mdgf-phases')
  grads = jax.tree.map(jnp.asarray, cases.gradients('mdgf-phases'))

  def body(t, carry):
    return cases.step(make(), *carry, jax.tree.map(lambda x: x[t], grads))

  params, state = jax.jit(lambda n: jax.lax.fori_loop(0, n, body, (start, make().init(start))))(STEPS)
  cases.assert_same((params, state), cases.run('mdgf-phases')[0])


@pytest.mark.sampled(6)
@pytest.mark.parametrize('name', PHASES)
def test_an_update_without_jit_is_the_same_up_to_rounding(name):
  """Not bit for bit: compiled, a multiplication and the addition after it round once, and bfloat16 not in between."""
  params, tx = cases.random(0), CASES[name].make()
  state = tx.init(params)
  for t in range(STEPS):
    eager = None
    if t + 1 in (cases.DENSE, STEPS - cases.TUNED):
      eager = cases.step(tx, params, state, cases.gradients(name, t))
    params, state = cases.stepped(name, params, state, [t])
    if eager is not None:
      close(eager, (params, state))


def close(eager, compiled):
  assert jax.tree.structure(eager) == jax.tree.structure(compiled)
  for (path, x), y in zip(cases.by_path(eager).items(), jax.tree.leaves(compiled)):
    assert x.dtype == y.dtype
    eps = 16 * float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
    np.testing.assert_allclose(*(np.asarray(z, np.float64) for z in (x, y)), rtol=eps, atol=eps, err_msg=path)


@pytest.mark.sampled(6)
@pytest.mark.parametrize('name', PHASES)
def test_vmap_over_seeds_equals_the_loop_over_seeds_bit_for_bit(name):
  seeds = range(3)
  stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  together, _ = jax.jit(jax.vmap(functools.partial(cases.scanned, CASES[name].make, watch=False)))(
      stack([cases.start(name, s) for s in seeds]), stack([cases.gradients(name, seed=s) for s in seeds]))
  for s in seeds:
    cases.assert_same(jax.tree.map(lambda x, s=s: x[s], together), cases.run(name, s)[0])


def test_through_orbax_and_on_bit_for_bit(tmp_path):
  """A checkpoint holds a recipe of each kind of state, amid its schedule; a restored state is not compiled for again.
  """
  saved, middle = {}, STEPS // 2
  states_of = {name: jax.eval_shape(CASES[name].make().init, cases.random(0)) for name in PHASES}
  kinds = {str([(x.shape, x.dtype) for x in jax.tree.leaves(state)]): name for name, state in states_of.items()}
  for name in kinds.values():
    params = cases.random(0)
    saved[name] = cases.stepped(name, params, CASES[name].make().init(params), range(middle))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'checkpoint', saved)
  blank = {name: (cases.random(0), states_of[name]) for name in saved}
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / 'checkpoint', blank)
  for name in saved:
    assert_goes_on(name, *restored[name])


@pytest.mark.sampled(8)
@every_recipe
def test_through_pickle_and_on_bit_for_bit(name):
  params = cases.random(0)
  half = cases.stepped(name, params, CASES[name].make().init(params), range(STEPS // 2))
  assert_goes_on(name, *pickle.loads(pickle.dumps(jax.tree.map(np.asarray, half))))


def assert_goes_on(name, params, state):
  again = cases.stepped(name, *jax.tree.map(jnp.array, (params, state)), range(STEPS // 2, STEPS))
  cases.assert_same(again, cases.run(name)[0], cases.rounding(name))
  assert len(cases.stepper(name)[1]) == 1, 'compiled again'


@every_recipe
def test_memory_is_what_was_promised(name):
  """A byte a sparse weight for its mask, four for a master, and whatever else a method cannot do without."""
  params = cases.random(0)
  state = jax.eval_shape(CASES[name].make().init, params)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  weights = sum(w.size for path, w in cases.by_path(params).items() if path in CONTRACTED)
  inner = jax.eval_shape(optax.sgd(0.3, momentum=0.5).init, params)
  held = [x for x in jax.tree.leaves(state.inner) if x.ndim]
  held = held[-len(jax.tree.leaves(inner)):]  # a recipe may chain a transform in front
  assert size(state) - size(held) <= weights * CASES[name].promise.memory + 28 + plans.BYTES
  assert sorted(x.shape for x in jax.tree.leaves(inner)) == sorted(x.shape for x in held)  # DASS has two optimizers


@pytest.mark.sampled(8)
@every_recipe
def test_a_donated_step_changes_everything_in_place(name):
  """A mask that the step does not read would be dropped from its arguments, donated or not, and be there twice."""
  params = cases.random(0)
  state = jax.eval_shape(CASES[name].make().init, params)
  memory = cases.stepper(name)[0].lower(params, state, params).compile().memory_analysis()
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  assert 0 <= size((params, state)) - memory.alias_size_in_bytes <= size(state.stats)  # scalars, made anew each time


@every_recipe
def test_dense_leaves_go_exactly_where_the_optimizer_alone_takes_them(name):
  (alone, _), _ = alone_run()
  for path, w in cases.by_path(cases.run(name)[0][0]).items():
    if (path not in CONTRACTED or CASES[name].recipe == 'dense') and CASES[name].promise.trained:
      np.testing.assert_array_equal(w, cases.by_path(alone)[path], err_msg=path)


@functools.cache
def alone_run():
  """The inner optimizer without any recipe."""
  tx, params = optax.sgd(0.3, momentum=0.5), cases.random(0)
  body = lambda carry, grads: (cases.step(tx, *carry, grads), None)
  return jax.tree.map(np.asarray, jax.jit(
      lambda p, grads: jax.lax.scan(body, (p, tx.init(p)), grads))(params, cases.random(1, (STEPS,))))


@pytest.mark.sampled
@pytest.mark.parametrize('pattern', cases.PATTERNS)
@pytest.mark.parametrize('name', [name for name in recipes.TABLE if name in cases.BY_NAME
                                  and not recipes.TABLE[name].__module__.endswith('n_m')
                                  and 'pattern' in recipes.arguments(recipes.TABLE[name])])
def test_every_recipe_starts_with_every_pattern_or_says_why_not(name, pattern):
  """Sparse momentum moves counts between layers, which N:M fixes."""
  case = CASES[name]
  options = {key: value for key, value in case.options.items() if key != 'sparsity'}
  tx = case._replace(options=options | {'pattern': cases.PATTERNS[pattern]}).make(axes=None)
  params = {layer: {'kernel': cases.F32((16, 8))} for layer in ('fc', 'head')}
  if (name, pattern) == ('snfs', '2:4'):
    with pytest.raises(ValueError, match='2:4 fixes how many every group keeps'):
      jax.eval_shape(tx.init, params)
  else:
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)
