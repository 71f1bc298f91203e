"""Checks recipes of tasks, modules and irrelevant weights: the rule of each, and masks that destroy nothing."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import continual, flows, recipes, starts, transforms
from sparsejax.types import Signals

KEY = jax.random.key(0)
LIKE = {'a': {'kernel': cases.F32((8, 6)), 'bias': cases.F32((6,))}, 'b': {'kernel': cases.F32((6, 4))}}
START = cases.random(0, like=LIKE)
SGD = optax.sgd(0.1, momentum=0.9)


def test_irrelevant_weights_decay_by_the_formula_and_relevant_ones_do_not():
  """The numbers are those of the authors' code, in float64."""
  w, g = jnp.array([.5, -.2, .1, -.8]), jnp.array([0, .05, -.1, 1])
  pulled = flows.relevance(0.5, 0.1).pull_back(g, w, jnp.ones(4, bool), Signals(step=0))
  np.testing.assert_allclose(pulled - g, [.5, -.12131, .03679, -.00004], atol=5e-6)
  pruned = flows.relevance(lambda step: 0.5 * step, 0.1).pull_back(g, w, w > 0, Signals(step=1))
  np.testing.assert_allclose(pruned, [.5, 0, -.1 + .03679, 0], atol=5e-6)


def test_irrelevant_weights_go_in_rounds_of_the_remaining_ones():
  grads, kept = cases.random(1, (8,), LIKE), []
  tx = recipes.irrelevant_weights(SGD, 0.875, every=2, removed=0.5, total_steps=8)
  _, (_, _, masks) = jax.jit(lambda: cases.scanned(lambda: tx, START, grads))()
  for t in range(8):
    kept.append(sum(int(m[t].sum()) for m in jax.tree.leaves(masks) if m.ndim > 2))
  assert kept == [72, 36, 36, 18, 18, 9, 9, 9]


def run(tx, params, steps=6, seed=1):
  """Returns parameters and state after some updates whose gradients pull the weights to random numbers."""
  goal = cases.random(seed, like=LIKE)

  @jax.jit
  def loop(params):
    state = tx.init(params)
    slopes = jax.grad(lambda p: sum(jnp.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (p, goal)))))
    return jax.lax.fori_loop(0, steps, lambda _, each: cases.step(tx, *each, slopes(each[0])),
                             (sj.project(params, state), state))

  return loop(params)


def bank_of(params):
  state = recipes.cl_dst(SGD, 0.5, total_steps=6, key=KEY).init(params)
  return continual.Bank(params).added(sj.project(params, state), state)


def test_no_task_destroys_the_weights_of_another():
  bank, before = continual.Bank(START), []
  for number in range(2):
    tx = recipes.cl_dst(optax.chain(optax.add_decayed_weights(0.1), SGD), 0.7, bank=bank, every=2, total_steps=6,
                        key=jax.random.fold_in(KEY, number))
    params, state = run(tx, bank.params, seed=number + 1)
    bank = bank.added(params, state)
    before.append(params)
    for task, held in enumerate(before):
      cases.assert_same(bank.task(task), held)
  used, masks = bank.used(), bank.masks
  assert used['a']['bias'].shape == () and not used['a']['bias']
  assert [int(m['a']['kernel'].sum()) for m in masks] == [14] * 2 and int(used['a']['kernel'].sum()) > 14
  shared = np.asarray(masks[0]['a']['kernel'] & masks[1]['a']['kernel'])
  assert shared.any() and np.all((before[0]['a']['kernel'] == before[1]['a']['kernel'])[shared])


def test_a_bank_refuses_weights_that_another_optimizer_has_moved_and_unknown_tasks():
  bank = continual.Bank(START)
  tx = recipes.cl_dst(SGD, 0.5, total_steps=6, key=KEY)
  params, state = START, tx.init(START)
  bank = bank.added(params, state)
  with pytest.raises(ValueError, match='24 weights of earlier tasks have changed. Train with recipes.cl_dst'):
    bank.added(jax.tree.map(lambda w: w + 1 if w.shape == (8, 6) else w, params), state)
  with pytest.raises(ValueError, match='no task 1 among 1'):
    bank.task(1)


def test_separate_masks_share_nothing_until_no_weight_is_free():
  bank = continual.Bank(START)
  for number in range(2):
    masks = continual.separate(bank, 0.6, jax.random.fold_in(KEY, number))
    state = recipes.fixed(SGD, masks).init(bank.params)
    bank = bank.added(sj.project(bank.params, state), state)
  assert not (bank.masks[0]['a']['kernel'] & bank.masks[1]['a']['kernel']).any()
  assert int(bank.used()['a']['kernel'].sum()) == 2 * 19
  with pytest.raises(ValueError, match="'a/kernel' .*: 19 weights are asked for task 2, and 10 belong to no task"):
    continual.separate(bank, 0.6, KEY)


def test_sparcl_moves_few_weights_at_a_time_and_takes_the_masks_of_the_task_before():
  masks = jax.tree.map(lambda w: w > 0.4 if w.ndim > 1 else jnp.asarray(True), START)
  tx = recipes.sparcl(optax.sgd(0.1), 0.5, gradient_sparsity=0.75, total_steps=40, masks=masks)
  state = tx.init(START)
  np.testing.assert_array_equal(sj.masks(START, state)['a']['kernel'], masks['a']['kernel'])
  params = sj.project(START, state)
  moved, _ = cases.step(tx, params, state, START)
  assert int(jnp.sum(moved['a']['kernel'] != params['a']['kernel'])) == 12
  assert not jnp.any((moved['a']['kernel'] != 0) & ~masks['a']['kernel'])
  assert bool(jnp.all(moved['a']['bias'] != START['a']['bias'])), 'gradients of dense leaves pass'


def test_modules_come_first_and_weights_grow_where_units_fire_together():
  x = jax.random.normal(KEY, (32, 8))
  apply = lambda params, x: jnp.tanh(x @ params['a']['kernel']) @ params['b']['kernel']
  make = lambda **more: recipes.g2gnet(optax.sgd(0.0), 0.5, groups=2, fraction=0.5, every=1, end=2, key=KEY, **more)
  tx = make(probe=starts.correlation(apply, x))
  state = tx.init(START)
  first = np.asarray(sj.masks(START, state)['a']['kernel'])
  assert first[:4, :3].all() and first[4:, 3:].all() and first.sum() == 24
  params = sj.project(START, state)
  corr = np.abs(starts.correlation(apply, x)(params)['a']['kernel'])
  params, state = cases.step(tx, params, state, START)
  grown = np.asarray(sj.masks(params, state)['a']['kernel']) & ~first
  assert grown.any() and corr[grown].min() >= np.sort(corr[~first & ~grown])[-1] - 1e-6


@pytest.mark.parametrize('call, said', [
    (lambda: transforms.protected(SGD, START).update(START, SGD.init(START), START), 'Give bools of its shape'),
    (lambda: recipes.cl_dst(SGD, bank=continual.Bank({'c': START['a']}), total_steps=9, key=KEY).init(START),
     "marks 'c/bias', 'c/kernel', and the parameters are 'a/bias', 'a/kernel', 'b/kernel'. Give marks of these"),
    (lambda: recipes.cl_dst(SGD, bank=bank_of({**START, 'b': {'kernel': jnp.ones((6, 5))}}), total_steps=9, key=KEY
                            ).init(START), "'b/kernel' of shape .6, 4.: `used` holds bool.6, 5."),
    (lambda: continual.Bank(START['a']).added(START, None),
     "'a/bias', .*: shape .6,., and the bank has None. Train from bank.params"),
    (lambda: recipes.cl_dst(SGD, bank=START, total_steps=9, key=KEY), '`bank` must be a continual.Bank'),
    (lambda: recipes.irrelevant_weights(SGD, 0.9, removed=1.0, total_steps=9), 'removed'),
    (lambda: recipes.irrelevant_weights(SGD, 0.9), 'pass total_steps='),
    (lambda: recipes.quick_selection(SGD, 0.0, total_steps=9, key=KEY), 'nothing is pruned'),
    (lambda: recipes.g2gnet(SGD, 0.5, groups=7, total_steps=9, key=KEY).init(START), 'fewer than 7 modules')])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
