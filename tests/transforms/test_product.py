"""The conformance table: recipes x optimizers x containers x meshes.

`make test` runs few cells of the beginning of an order that is spread over all four, `make test-full` the whole
product; `pytest tests/transforms/test_product.py --cells 2000 --table docs/conformance.md` writes down what it found.
"""

import functools
import itertools
import zlib

import cases
import dimensions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, STEPS
from dimensions import CONTAINERS, FUNCTIONS, LEFT_OUT, LINE_SEARCHES, MESHES, NOT_WITH_NONE, OPTIMIZERS, SHAPES, SUMS

import sparsejax
from sparsejax import states
from sparsejax.types import Axes

# Models and optimizers need JAX's ordinary promotion; that recipes do not is in test_conformance.
pytestmark = [pytest.mark.usefixtures('standard_promotion'), pytest.mark.filterwarnings('ignore')]
# Each recipe once, with a dense and a fine-tune phase where it has them; and the one whose mask never changes.
RECIPES = [name for name in cases.BY_NAME if CASES[name].tuned or f'{name}-phases' not in CASES] + ['asp']


def cells():
  """All of `(recipe, optimizer, container, mesh)`, each optimizer once before any comes again, the rest in turn."""
  sizes = len(RECIPES), len(CONTAINERS), len(MESHES)
  for j in range(np.prod(sizes)):
    a, b, c = np.unravel_index(j, sizes, order='F')
    for i, optimizer in enumerate(OPTIMIZERS):
      shift = zlib.crc32(optimizer.encode())  # so that neighbours in the alphabet get different company
      yield (RECIPES[(i + a) % sizes[0]], optimizer, [*CONTAINERS][(shift + a + b) % sizes[1]],
             [*MESHES][(shift // 64 + a + b + c) % sizes[2]])


def pytest_generate_tests(metafunc):
  if 'cell' in metafunc.fixturenames:
    asked = metafunc.config.getoption('--cells')
    first = None if asked == 'all' else len(OPTIMIZERS) if asked is None else int(asked)
    chosen = [*itertools.islice(cells(), first)]
    chosen = few(chosen) if asked is None else chosen
    metafunc.parametrize('cell', chosen, ids=', '.join)


def few(every, most=18):
  """Returns at most `most` cells: each brings the most recipes, containers and meshes that are still missing."""
  parts = lambda cell: {(i, cell[i]) for i in (0, 2, 3)}
  chosen, missing = [], set().union(*map(parts, every))
  while missing and len(chosen) < most:
    chosen.append(max(every, key=lambda cell: len(parts(cell) & missing)))
    missing -= parts(chosen[-1])
  return chosen


def test_the_few_cells_have_each_container_and_each_mesh():
  chosen = few([*itertools.islice(cells(), len(OPTIMIZERS))])
  assert [len({cell[i] for cell in chosen}) for i in (0, 2, 3)] == [len(chosen), len(CONTAINERS), len(MESHES)]


def test_every_name_of_optax_is_in_the_table():
  known = {*OPTIMIZERS} | {*LEFT_OUT}
  assert {*dimensions.public()} <= known, 'put them into dimensions.OPTIMIZERS, or into LEFT_OUT with the reason'
  assert not {*OPTIMIZERS} & {*LEFT_OUT}


def test_the_order_of_the_cells_is_the_whole_product_and_its_beginning_is_spread():
  every = [*cells()]
  assert len({*every}) == len(every) == len(RECIPES) * len(OPTIMIZERS) * len(CONTAINERS) * len(MESHES)
  for i, names in enumerate((RECIPES, OPTIMIZERS, CONTAINERS, MESHES)):
    assert {cell[i] for cell in every[:len(OPTIMIZERS)]} == {*names}
  pairs = {cell[:2] for cell in every[:len(OPTIMIZERS) * len(RECIPES)]}
  assert len(pairs) == len(OPTIMIZERS) * len(RECIPES)


def test_cell(cell, record_property):
  record_property('cell', cell)
  record_property('verdict', _verdict(*cell))


def _verdict(recipe, optimizer, container, mesh):
  """Which of `conformance_page.VERDICTS` it is; raises if the recipe is to blame for anything."""
  if _has_to_be_refused(recipe, optimizer):
    with pytest.raises(ValueError, match='sparsejax: .*(line search|function).*(asp|fixed)'):
      _run(recipe, optimizer, container, mesh)
    return 'refused'
  try:
    found = _run(recipe, optimizer, container, mesh)
  except Exception as error:
    of_jax = 'explicit' in mesh and type(error).__name__ == 'ShardingTypeError'  # which has no public name
    if not of_jax and not (container == 'with None' and optimizer in NOT_WITH_NONE):
      raise
    _refuse_unless_alone_too(optimizer, container, mesh)
    return 'not even alone'
  _keeps_its_promises(recipe, optimizer, container, mesh, found)
  # What is drawn at random goes by the names of the leaves, which are the container's.
  base = container if CASES[recipe].recipe in cases.RANDOM else 'dict'
  if MESHES[mesh].manual or _same_bits(found, container, base, _run(recipe, optimizer, base, 'one device')):
    return 'same bits' if not MESHES[mesh].manual else 'kept'
  if optimizer in SUMS or (recipe == 'st3-phases' and 'fully' in mesh):  # ST-3 takes means along the contraction
    return 'kept'
  alone = _run('dense', optimizer, container, mesh)
  if _same_bits(alone, container, 'dict', _run('dense', optimizer, 'dict', 'one device')):
    # XLA may fuse a multiplication and an addition on the one and not on the other, but nothing may come of it.
    _assert_close(found, container, base, _run(recipe, optimizer, base, 'one device'))
  return 'kept'


def _has_to_be_refused(recipe, optimizer):
  promise = CASES[recipe].promise
  if optimizer in LINE_SEARCHES:
    return recipe not in ('dense', 'asp') and not (promise.fixed and promise.memory == 1)
  return optimizer in FUNCTIONS and recipe not in ('dense', 'asp') and promise.memory >= 5


def _refuse_unless_alone_too(optimizer, container, mesh):
  """Goes on raising if the optimizer without a recipe can do what it could not do with one."""
  try:
    _run('dense', optimizer, container, mesh)
  except Exception:
    return
  raise


@functools.lru_cache(maxsize=64)
def _run(recipe, optimizer, container, mesh):
  """`STEPS` updates as one program: the last parameters and state; parameters, points and masks after each."""
  make = functools.partial(CASES[recipe].make, axes={'kernel': Axes((0,), (1,))})
  wrap, lies = CONTAINERS[container], MESHES[mesh]
  start, grads = (wrap(tree) for tree in (cases.random(0, like=SHAPES), cases.random(1, (STEPS,), SHAPES)))
  program = functools.partial(_program, lambda: OPTIMIZERS[optimizer](make), optimizer)
  if lies.kernel is None:
    return jax.jit(program)(start, grads)
  devices = lies.make()
  shardings = [lies.shardings(devices, tree) for tree in (start, grads)]
  with jax.set_mesh(devices):
    if lies.manual:
      specs = [jax.tree.map(lambda s: s.spec, tree) for tree in shardings]
      program = jax.shard_map(functools.partial(_local, program), mesh=devices, in_specs=tuple(specs), check_vma=False,
                              out_specs=(specs[0], (specs[1],) * 3))
    return jax.jit(program)(*(jax.device_put(*pair) for pair in zip((start, grads), shardings)))


def _local(program, *given):
  """Without the state, which has arrays of its own: all that comes out of a `shard_map` lies as parameters do."""
  (params, _), (seen, points, masks) = program(*given)
  whole = lambda mask, w: jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (w.ndim - mask.ndim)), w.shape)
  return params, (seen, points, jax.tree.map(whole, masks, seen))


def _program(make, optimizer, start, grads):
  given = dimensions.extra(optimizer)
  if optimizer == 'MultiSteps':  # moves nothing before its second update
    start = sparsejax.project(start, make().init(start))
  return cases.scanned(lambda: dimensions.fed(optimizer, make()), start, grads, **given)


def _keeps_its_promises(recipe, optimizer, container, mesh, found):
  lies = MESHES[mesh]
  if lies.manual:
    params, (seen, points, masks) = found
  else:
    (params, state), (seen, points, masks) = found
  start = CONTAINERS[container](cases.random(0, like=SHAPES))
  assert jax.tree.structure(params) == jax.tree.structure(start)
  if optimizer == 'MultiSteps':  # which starts at the point
    start = jax.tree.map(lambda x: x[0], points)
  cases.assert_always_at_the_point(*jax.device_get((start, seen, points)), of_the_largest=True)
  if lies.manual or recipe == 'dense':
    return
  if not optimizer.startswith('MultiSteps') or optimizer.endswith('inside'):  # updates fewer times than it is called
    sparsejax.check(params, state)
  if lies.kernel is not None:
    _lies_like_the_kernel(params, state, lies)


def _lies_like_the_kernel(params, state, lies):
  held = cases.by_path(params)
  for sparse in states.find(state):
    for tree in (sparse.masks, sparse.master):
      for path, x in cases.by_path(tree).items():
        assert x.sharding.is_equivalent_to(held[path].sharding, x.ndim), (path, x.sharding)


def _assert_close(found, container, base, plain):
  """The same masks at every update, and parameters up to rounding.

  Weights that grew together and took steps of one size tie, up to rounding, and either may go; what follows such a
  choice is not compared.
  """
  wrap = _wrap(container, base)
  (seen, masks), (expected, wanted) = ([[np.asarray(leaf) for leaf in jax.tree.leaves(wrapped(tree))]
                                        for tree in (params, masks)] for wrapped, (_, (params, _, masks)) in (
                                            (lambda tree: tree, found), (wrap, plain)))
  differ = [a != b for a, b in zip(masks, wanted)]
  same = min(np.append(np.flatnonzero(leaf.reshape(STEPS, -1).any(1)), STEPS)[0] for leaf in differ)
  for a, b in zip(seen, expected):
    np.testing.assert_allclose(a[:same], b[:same], rtol=1e-4, atol=1e-5)
  for leaf, w in zip(differ, expected):
    if same < STEPS and leaf[same].any():
      ties = np.abs(w[same - 1][leaf[same]])
      np.testing.assert_allclose(ties, ties[0], rtol=1e-5, err_msg=f'masks differ from update {same} on')


def _wrap(container, base):
  return (lambda tree: tree) if base == container else CONTAINERS[container]


def _same_bits(found, container, base, plain):
  """Parameters, points and masks, against those of the dict on one device."""
  (last, _), seen = found
  (expected, _), expected_seen = plain
  pairs = zip((last, *seen), (expected, *expected_seen))
  wrap = _wrap(container, base)
  return all(np.array_equal(np.asarray(a), np.asarray(b))
             for got, want in pairs for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wrap(want))))
