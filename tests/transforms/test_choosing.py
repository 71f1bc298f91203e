"""Checks what the branch that chooses masks is given: no gradients that no word reads, and no masks of no use."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sparsejax as sj
from sparsejax import flows, schedules, scores, selections
from sparsejax.programs import jaxprs
from sparsejax.transforms import choosing, sparsify
from sparsejax.types import gradient_free

SHAPE = 256, 64
PARAMS = {name: {'kernel': jnp.ones(SHAPE)} for name in 'ab'}


def made(flow, score=scores.magnitude, every=2):
  selection = selections.leafwise(sj.Unstructured(0.5), score=score)
  return sparsify(optax.sgd(0.1), flow, selection, refresh=schedules.every(every), where=sj.trees.matrices)


def operands(tx):
  """Returns how many arrays of numbers, shaped like a parameter, the branch that chooses masks is given."""
  traced = jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS).jaxpr
  branch = next(eqn for eqn in every_equation(traced) if eqn.primitive.name == 'cond')
  return sum(v.aval.shape == SHAPE and v.aval.dtype == jnp.float32 for v in branch.invars)


def every_equation(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jaxprs.inner(eqn):
      yield from every_equation(jaxprs.opened(inner))


@pytest.mark.parametrize('flow', [flows.hard(), flows.straight_through()], ids=['hard', 'straight_through'])
def test_a_choice_that_reads_no_gradient_is_given_none(flow):
  own = lambda w, signals: jnp.abs(w)
  free = operands(made(flow, gradient_free(lambda w, signals: jnp.abs(w))))
  assert free == operands(made(flow)) == operands(made(flow, own)) - len(PARAMS)


@pytest.mark.parametrize('every, held', [(1, 12), (2, 13)])
def test_masks_that_are_chosen_at_every_step_are_not_held_beside_the_new_ones(every, held):
  """Counts bytes a weight of what a compiled step is given: parameters, gradients, the master, and the old masks."""
  tx, size = made(flows.straight_through(), every=every), 2 * 1024 * 1024  # of small leaves they are: zeros compile
  params = {name: {'kernel': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)} for name in 'ab'}
  step = jax.jit(lambda grads, state, params: tx.update(grads, state, params), donate_argnums=1)
  memory = step.lower(params, jax.eval_shape(tx.init, params), params).compile().memory_analysis()
  assert held * size <= memory.argument_size_in_bytes < held * size + 1000


def test_a_choice_outside_of_jit_compiles_once_for_init_and_update_where_no_word_reads_the_gradient():
  """The first masks are chosen without a gradient, and later ones beside a gradient that nobody reads."""
  own = lambda w, signals: jnp.abs(w)
  for score, programs in ((scores.magnitude, 1), (own, 2)):
    jax.clear_caches()  # other tests may have compiled the program
    tx, before = made(flows.hard(), score, every=1), programs_so_far()
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert programs_so_far() - before == programs


def programs_so_far():
  return choosing._select_at_once._cache_size()


def test_a_schedule_may_branch_in_python_outside_of_jit():
  tx = sparsify(optax.sgd(0.1), flows.hard(), selections.leafwise(sj.Unstructured(0.5)), where=sj.trees.matrices,
                refresh=lambda step: bool(step % 2 == 0))
  state = tx.init(PARAMS)
  for _ in range(2):
    _, state = tx.update(PARAMS, state, PARAMS)
  assert state.step == 2
