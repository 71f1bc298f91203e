"""Checks `probe=` and `starts.masks`: choices by another gradient, masks of one's own, and gradients that pass."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import flows, recipes, schedules, scores, selections, starts, transforms, updates

SHAPES = {'a': {'kernel': cases.F32((8, 4))}, 'b': {'kernel': cases.F32((4, 6)), 'bias': cases.F32((6,))}}
START, STEPS = cases.random(0, like=SHAPES), 6
GRADS = cases.random(1, (STEPS,), SHAPES)
OTHER = cases.random(2, like=SHAPES)
run = lambda make, grads=GRADS: jax.jit(functools.partial(cases.scanned, make))(START, grads)


def by_gradient(**more):
  update = updates.drop_and_grow(scores.gradient, schedules.constant(0.5))
  return sj.transforms.sparsify(
      optax.sgd(0.1), flows.hard(), selections.leafwise('unstructured 0.5', update=update),
      first=selections.leafwise('unstructured 0.5'), refresh=schedules.every(2), **more)


def test_choices_read_the_probe_and_steps_read_the_gradient():
  """The masks are the same if the probe is the gradient, and else grow where the probe is large."""
  (params, state), (_, _, masks) = run(by_gradient)
  same = run(lambda: by_gradient(probe=starts.of(jax.tree.map(lambda g: g[1], GRADS))),
             jax.tree.map(lambda g: g[:2], GRADS))[1][2]
  np.testing.assert_array_equal(cases.by_path(same)['a/kernel'], cases.by_path(masks)['a/kernel'][:2])
  other = run(lambda: by_gradient(probe=starts.of(OTHER)))[1][2]
  before, after = cases.by_path(other)['a/kernel'][0], cases.by_path(other)['a/kernel'][1]
  grown = np.asarray(after & ~before)
  size = np.abs(OTHER['a']['kernel'])
  assert grown.any() and size[grown].min() >= size[~np.asarray(after)].max()


def test_a_probe_is_evaluated_only_where_masks_are_chosen():
  calls = []
  probe = lambda params: jax.tree.map(lambda w: jax.pure_callback(
      lambda w: (calls.append(1), w)[1], w, w), params)
  jax.block_until_ready(run(lambda: by_gradient(probe=probe)))
  assert len(calls) == 3 * 2, 'three choices, of two sparse leaves'


def test_a_probe_at_init_sees_the_sparse_point_and_rigl_takes_one():
  tx = sj.transforms.sparsify(optax.sgd(0.1), flows.hard(), selections.leafwise(
      'unstructured 0.5', score=scores.gradient), probe=starts.of(OTHER), refresh=schedules.once(0))
  mask = sj.masks(START, tx.init(START))['b']['kernel']
  assert np.abs(OTHER['b']['kernel'])[mask].min() > np.abs(OTHER['b']['kernel'])[~mask].max()
  rigl = lambda **more: run(lambda: recipes.rigl(optax.sgd(0.1), 0.5, every=2, end=5, key=jax.random.key(0), **more))
  assert np.any(rigl()[1][2]['a']['kernel'] != rigl(probe=starts.of(OTHER))[1][2]['a']['kernel'])


def test_a_start_takes_masks_of_ones_own():
  masks = jax.tree.map(lambda w: w > 0.3, OTHER) | {'b': {'kernel': jnp.asarray(True), 'bias': jnp.asarray(True)}}
  tx = by_gradient(start=starts.masks(masks))
  held = sj.masks(START, tx.init(START))
  np.testing.assert_array_equal(held['a']['kernel'], masks['a']['kernel'])
  assert held['b']['kernel'].all() and held['b']['kernel'].shape == (4, 6)
  cases.assert_same(sj.masks(START, recipes.fixed(optax.sgd(0.1), sj.masks(START, tx.init(START))).init(START)), held)


@pytest.mark.parametrize('make, said', [
    (lambda: by_gradient(start=starts.masks(START)), "parameter 'a/kernel' .* the tree holds float32"),
    (lambda: by_gradient(start=starts.masks({'a': START['a']})), 'not of one structure'),
    (lambda: by_gradient(start=starts.masks(jax.tree.map(lambda w: w.T > 0, START))), 'starts.masks: parameter'),
    (lambda: by_gradient(start=starts.probed(starts.of(jax.tree.map(lambda w: w[:1], START)))),
     'the probe returns shape .*, or the `ticket` has'),
    (lambda: recipes.iterative_magnitude(optax.sgd(0.1), 0.5, ticket={'a': START['a']}),
     '`ticket`.* differ in .*b/kernel'),
    (lambda: by_gradient(probe=3), '`probe` must be a function'),
    (lambda: recipes.set_(optax.sgd(0.1), 0.5, total_steps=9, key=jax.random.key(0), probe=starts.of(OTHER)), 'probe')])
def test_what_is_no_probe_and_no_mask_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make().init(START)


def test_gradients_pass_for_the_same_weights_until_the_next_choice():
  tx = transforms.updating(selections.leafwise('unstructured 0.75', score=scores.gradient), refresh=schedules.every(3))
  state, passed = tx.init(START), []
  for t in range(5):
    grads, state = jax.jit(tx.update)(jax.tree.map(lambda g, t=t: g[t], GRADS), state, START)
    passed.append(np.asarray(grads['a']['kernel']) != 0)
  assert [int(mask.sum()) for mask in passed] == [8] * 5
  assert np.all(passed[0] == passed[1]) and np.all(passed[1] == passed[2]) and np.any(passed[2] != passed[3])
  expected = sj.Unstructured(0.75)(jnp.abs(GRADS['a']['kernel'][3]))
  np.testing.assert_array_equal(passed[3], expected)
  np.testing.assert_array_equal(passed[4], expected)
