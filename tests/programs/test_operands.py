"""Tests the sites of products: the operands shown in each layer, answers, copies of walks, and refusals."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax import lax

from sparsejax.programs import operands, trace, walk

RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


STACK = {'w': normal(3, 4, 4), 'head': normal(4, 2)}
X = normal(5, 4)


def layers(params, x):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params['w'])[0] @ params['head']


def test_each_layer_of_a_scan_is_a_site_with_its_own_operand():
  seen = {}
  operands(layers, lambda site: seen.update({(site.path, site.number, site.layer): site.x}))(STACK, X)
  assert list(seen) == [('w', 0, (0,)), ('w', 0, (1,)), ('w', 0, (2,)), ('head', 0, ())]
  x = X
  for i in range(3):
    np.testing.assert_allclose(seen['w', 0, (i,)], x, rtol=1e-5)
    x = jnp.tanh(x @ STACK['w'][i])
  np.testing.assert_allclose(seen['head', 0, ()], x, rtol=1e-5)


def test_the_operand_and_the_weight_are_those_of_einsum_over_the_traced_axes():
  seen = []
  operands(layers, seen.append)(STACK, X)
  for site in seen:
    w = STACK[site.path][site.layer] if site.layer else STACK[site.path]
    np.testing.assert_array_equal(site.weight, w)
    np.testing.assert_allclose(site.product(), jnp.einsum('bi,io->bo', site.x, w), rtol=1e-5)
    np.testing.assert_allclose(site.product(weight=-w), -site.product(), rtol=1e-5)
    np.testing.assert_allclose(site.product(x=2 * site.x), 2 * site.product(), rtol=1e-5)


def test_reversed_scans_and_loops_say_which_slice_and_which_round():
  backwards = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p['w'], reverse=True)
  seen = []
  result = operands(backwards, lambda site: seen.append((site.layer, site.steps)))(STACK, X)
  assert seen == [((i,), (i,)) for i in (2, 1, 0)]
  for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(backwards(STACK, X))):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  by_index = lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p['w'][i]), x)
  seen.clear()
  operands(by_index, lambda site: seen.append((site.layer, site.steps)))(STACK, X)
  assert seen == [((), (i,)) for i in range(3)]


def _layers(x, ws):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)


@pytest.mark.parametrize('apply, layer_of', [
  (lambda p, x: lax.scan(lambda x, _: _layers(x, p['w']), x, length=2)[0], lambda i, j: (j,)),
  (lambda p, x: lax.scan(_layers, x, jnp.stack([p['w'], p['w']]))[0], lambda i, j: (i, j)),
], ids=['layers in steps', 'layers in groups'])
def test_a_layer_is_named_by_the_loop_that_slices_it(apply, layer_of):
  seen = []
  operands(apply, lambda site: seen.append((site.layer, site.steps)))(STACK, X)
  assert len(seen) == 6 and all(layer == layer_of(*steps) for layer, steps in seen)


def test_loops_whose_rounds_data_decide_and_chosen_branches_are_walked():
  def apply(p, x):
    x = lax.while_loop(lambda x: jnp.abs(x @ p['w'][0]).sum() < 50, lambda x: 2 * x @ p['w'][1], x)
    return lax.switch(jnp.int32(7), [lambda x: x[:, :2], lambda x: x @ p['head']], x)

  seen = []
  result = operands(apply, lambda site: seen.append(site.path))(STACK, X)
  np.testing.assert_allclose(result, apply(STACK, X), rtol=1e-5)
  assert seen[-1] == 'head' and seen[:-1] == ['w'] * (len(seen) - 1) and len(seen) % 2 == 0
  with pytest.raises(ValueError, match='Walk: while at .*traced value'):
    jax.jit(operands(apply, lambda site: None))(STACK, X)


def test_an_answer_takes_the_place_of_the_product():
  zeros = lambda site: jnp.zeros_like(site.product()) if site.path == 'head' else None
  assert not operands(layers, zeros)(STACK, X).any()
  with pytest.raises(ValueError, match=r"operands: parameter 'w' of shape \(4, 4\).*float32\[5, 3\].*float32\[5, 4\]"):
    operands(layers, lambda site: jnp.zeros((5, 3)))(STACK, X)


def test_a_copied_walk_returns_to_its_site_and_goes_on_with_other_answers():
  steps = walk(trace(layers, (STACK, X)))
  steps.answer()
  kept = steps.copy()
  while steps.stopped:
    steps.answer()
  again = kept.copy()
  assert again.site.layer == kept.site.layer == (1,)
  kept.answer(kept.site.product(weight=0 * kept.site.weight))
  while kept.stopped:
    kept.answer()
  while again.stopped:
    again.answer()
  np.testing.assert_array_equal(again.results[0], steps.results[0])
  assert not kept.results[0].any() and steps.results[0].any()
  with pytest.raises(ValueError, match='come to its end'):
    steps.answer()


def test_positions_compare_in_the_order_of_execution_also_where_a_scan_runs_backwards():
  backwards = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['w'], reverse=True)[0] @ p['head']
  steps, seen = walk(trace(backwards, (STACK, X))), []
  while steps.stopped:
    seen.append(steps.position)
    assert steps.copy().position == steps.position
    steps.answer()
  assert len(seen) == 4 and seen == sorted(set(seen)) and steps.position == ()


def test_walks_of_several_batches_go_in_lock_step():
  program = trace(layers, (STACK, X))
  arrays = [(program.arrays[0], program.arrays[1], x) for x in (X, -X)]
  assert [a.shape for a in arrays[0]] == [a.shape for a in program.arrays]
  walks = [walk(program, batch) for batch in arrays]
  while walks[0].stopped:
    a, b = (each.site for each in walks)
    assert (a.path, a.layer) == (b.path, b.layer)
    np.testing.assert_allclose(a.x, -b.x, rtol=1e-5)
    for each in walks:
      each.answer()


def test_values_are_dropped_after_their_last_use():
  """Shows that, at the site of the last product, the operands of earlier products are not alive any more."""
  alive = []

  def apply(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p['w'][i])
    return x @ p['head']

  def callback(site):
    gc.collect()
    alive.append(sum(ref() is not None for ref in refs))
    refs.append(weakref.ref(site.x))

  refs = []
  operands(apply, callback)(STACK, X)
  assert alive == [0, 1, 1, 1]  # X itself stays


def test_convolutions_are_sites_and_a_product_of_two_parameters_has_two():
  conv = lambda p, x: lax.conv_general_dilated(x, p['k'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  seen = []
  operands(conv, seen.append)({'k': normal(3, 3, 4, 6)}, normal(2, 5, 5, 4))
  assert seen[0].x.shape == (2, 5, 5, 4) and seen[0].use.axes == programs.KERNEL
  seen.clear()
  operands(lambda p, x: x @ (p['a'] @ p['b']), seen.append)({'a': normal(4, 2), 'b': normal(2, 6)}, X)
  assert [(site.path, site.x.shape, site.use.data) for site in seen] == [('a', (2, 6), False), ('b', (4, 2), False)]


def test_sites_inside_of_shard_map_are_refused():
  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  apply = lambda p, x: jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec(), spec('data')),
                                     out_specs=spec('data'))(p['head'], x)
  with pytest.raises(ValueError, match="operands: the program uses 'head' inside of a shard_map"):
    operands(apply, lambda site: None)(STACK, normal(6, 4))
