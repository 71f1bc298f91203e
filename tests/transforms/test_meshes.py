"""Eight devices: where masks and master lie, which bits they hold, and what a refresh sends, read from the program."""

import contextlib
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, STEPS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from sparsejax import recipes
from sparsejax.programs import hlo
from sparsejax.types import Axes

ONCE = [name for name in cases.BY_NAME if CASES[name].tuned or f'{name}-phases' not in CASES]
N_M = [name for name in ONCE if recipes.TABLE[CASES[name].recipe].__module__.endswith('n_m')]
KINDS = pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
KERNEL = {'kernel': cases.F32((64, 8))}
# How the kernel `[in, out]` lies on devices of 2 x 4, and whether all groups, of up to 32, are inside of a shard.
SPECS = {
    'replicated': (P(None, None), True), 'columns': (P(None, 'model'), True), 'both': (P('data', 'model'), True),
    'fully, along the output': (P(None, ('data', 'model')), True),
    'fully, along the contraction': (P(('data', 'model'), None), False),
}


def mesh(kind):
  return jax.make_mesh((2, 4), ('data', 'model'), axis_types=(kind,) * 2)


@functools.cache
def moved(name, kind, spec):
  """`(kind, elements)` of every collective of an update, after a look at where everything lies."""
  devices = mesh(kind)
  place = NamedSharding(devices, SPECS[spec][0])
  params = jax.device_put(cases.random(0, like=KERNEL), {'kernel': place})
  tx = CASES[name].make(axes=None)
  lie_alike = lambda *states: all(x.sharding.is_equivalent_to(place, 2) for tree in states
                                  for x in jax.tree.leaves((tree.masks, tree.master)) if x.ndim == 2)
  with jax.set_mesh(devices):
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update).lower(params, state, params).compile()
    eager = [tx.init(params)] if spec == 'both' else []  # a program for each operation: seconds for each place
    assert lie_alike(state, *eager, update(params, state, params)[1])
  text = update.as_text()
  size = lambda type_: hlo.type_bytes(type_) // 4  # keys, counts and sums are of 32 bits
  return [(one.kind, sum(map(size, one.operands))) for one in hlo.collectives(text)]


@pytest.mark.sampled(6)
@KINDS
@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('name', N_M)
def test_masks_lie_as_their_parameter_and_a_refresh_sends_nothing_but_counts(name, spec, kind):
  sent = moved(name, kind, spec)
  if CASES[name].recipe == 'st3':
    # Counts of a quantile; and, where the contraction is cut, the means of the eight channels, or those of a shard.
    channels = 8 if spec != 'both' else 2
    most = 2 * channels if spec in ('both', 'fully, along the contraction') else 8
    assert {kind for kind, _ in sent} == ({'all-reduce'} if spec != 'replicated' else set())
    assert all(elements <= most for _, elements in sent), sent
  elif SPECS[spec][1] or CASES[name].recipe != 'sdgf_geometric':
    assert sent == moved('dense', kind, spec) == []
  else:
    assert sent, 'groups of 32 lie on several devices here, of 8 rows each'


@pytest.mark.sampled(5)
@pytest.mark.parametrize('kind, spec', [(AxisType.Auto, 'both'), (AxisType.Explicit, 'fully, along the contraction')])
@pytest.mark.parametrize('name', [name for name in ONCE if name not in N_M and CASES[name].recipe != 'dass'])
def test_what_is_ranked_sends_counts_and_what_is_fixed_nothing(name, kind, spec):
  sent = moved(name, kind, spec)
  if CASES[name].promise.fixed:
    assert sent == []
  else:
    assert {kind for kind, _ in sent} == {'all-reduce'} and all(elements <= 8 for _, elements in sent), sent


@pytest.mark.sampled(5)
@KINDS
@pytest.mark.parametrize('pattern, shape, spec', [
    (sparsejax.NM(1, 4), (8, 6), P('data', None)), (sparsejax.NM(2, 8), (16, 6), P(('data', 'model'), None)),
    (sparsejax.NM(3, 16), (2, 16, 8), P('data', 'model', None)), (sparsejax.NM(2, 8), (4, 8, 6), P(None, 'model')),
    (sparsejax.Block((8, 4), 0.5), (16, 8), P('model', 'data')),
    (sparsejax.Unstructured(0.7), (16, 8), P('model', 'data')),
])
def test_groups_on_several_devices_are_the_same_bits_and_the_mask_lies_as_the_weight(pattern, shape, spec, kind):
  """The first is the other case: shards of four rows each. Patterns of one class are the same operations eagerly."""
  path = 'out' if len(shape) == 3 and shape[0] == 4 else 'layers'
  params = {path: {'kernel': jax.random.normal(jax.random.key(0), shape)}}
  devices = mesh(kind)
  held = jax.device_put(params, NamedSharding(devices, spec))
  axes = {2: Axes((0,), (1,)), 3: Axes((0, 1), (2,)) if path == 'out' else Axes((1,), (2,), layer=(0,))}[len(shape)]
  said = {f'{path}/kernel': axes}
  tx = recipes.ste(optax.sgd(0.1), pattern, axes=said)
  compiled = jax.jit(tx.init)
  expected = sparsejax.project(params, compiled(params))
  ways = [(compiled, True)]  # the optimizer, and whether inside of `jax.set_mesh`
  if path == 'out' or not isinstance(pattern, sparsejax.NM):
    ways += [(tx.init, False)]
  for make, inside in ways + ([(tx.init, True), (compiled, False)] if path == 'out' else []):
    with jax.set_mesh(devices) if inside else contextlib.nullcontext():
      state = make(held)
    mask, master = state.masks[path]['kernel'], state.master[path]['kernel']
    np.testing.assert_array_equal(np.where(mask, master, 0), expected[path]['kernel'])
    assert all(x.sharding.is_equivalent_to(NamedSharding(devices, spec), x.ndim) for x in (mask, master))
    sparsejax.check(sparsejax.project(held, state), state)
    packed = sparsejax.formats.unpack(sparsejax.formats.pack(
        sparsejax.project(held, state), pattern, axes=said)) if (
        isinstance(pattern, sparsejax.NM)) else expected
    cases.assert_same(jax.device_get(packed), jax.device_get(expected))


SPECS_OF_CASES = {
    'attention': {'out': {'kernel': P(None, None, 'model'), 'bias': P('model')}},
    'stack': {'kernel': P(None, None, 'model'), 'bias': P(None, 'model')},
    'norm': {'scale': P(None)}, 'embed': {'embedding': P(None, None)}}


@pytest.mark.sampled(5)
@pytest.mark.parametrize('name, kind', [
    (name, kind) for name in ONCE for kind in (AxisType.Auto, AxisType.Explicit)
    if name != 'dense' and (name in N_M or kind == AxisType.Auto)], ids=str)
def test_twelve_updates_are_the_same_bits_as_on_one_device(name, kind):
  """Columns over four devices, all of it twice; the state made under `jit`, everything donated."""
  devices = mesh(kind)
  shard = lambda tree: jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(devices, spec), SPECS_OF_CASES))
  params = shard(cases.random(0))
  with jax.set_mesh(devices):
    tx = CASES[name].make()
    state = jax.jit(tx.init)(params)
    update = jax.jit(functools.partial(cases.step, tx), donate_argnums=(0, 1))
    for t in range(STEPS):
      before = jax.tree.map(np.array, params)
      params, state = update(params, state, shard(cases.gradients(name, t)))
  (_, expected), _ = cases.run(name)
  cases.assert_same(jax.tree.map(np.asarray, state), expected, cases.rounding(name))
  cases.assert_at_the_point(before, params, sparsejax.project(params, state))


@pytest.mark.sampled
@KINDS
@pytest.mark.parametrize('name', ['sr_ste-phases', 'asp-phases', 'sdgf_geometric-phases', 'st3-phases'])
def test_inside_a_shard_map_every_shard_is_pruned_as_it_is_alone(name, kind):
  """In a program that writes its own collectives a recipe sees the shard, and asks for no more."""
  start, grads = cases.random(0, like=KERNEL), cases.random(1, (STEPS,), KERNEL)
  run = lambda start, grads: cases.scanned(
      functools.partial(CASES[name].make, axes=None), start, grads)[1]
  alone = [jax.jit(run)(*jax.tree.map(lambda x, i=i: x[..., 2 * i:2 * i + 2], (start, grads))) for i in range(4)]
  devices, columns, in_time = mesh(kind), P(None, 'model'), P(None, None, 'model')
  place = lambda tree, spec: jax.device_put(tree, NamedSharding(devices, spec))
  with jax.set_mesh(devices):
    program = jax.shard_map(run, mesh=devices, in_specs=(columns, in_time), out_specs=in_time, check_vma=False)
    found = jax.jit(program)(place(start, columns), place(grads, in_time))
  expected = jax.tree.map(lambda *shards: jnp.concatenate(shards, -1), *alone)
  cases.assert_same(jax.device_get(found), jax.device_get(expected))
