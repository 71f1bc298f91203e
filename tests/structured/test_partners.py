"""The conformance table of structured recipes: each with optimizers, containers and meshes, as `test_product` has it.

`--cells all` runs every recipe with every optimizer, each time in another container and on another mesh.
"""

import functools
import zlib

import cases
import dimensions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dimensions import CONTAINERS, FUNCTIONS, LINE_SEARCHES, MESHES, OPTIMIZERS, SHAPES

import sparsejax
from sparsejax import recipes, structured, trees

pytestmark = [pytest.mark.usefixtures('standard_promotion'), pytest.mark.filterwarnings('ignore')]
STEPS = 6
X = jax.random.normal(jax.random.key(0), (4, 64))
LAST = (*LINE_SEARCHES, *FUNCTIONS)  # are refused, as for each recipe that changes its masks
GIVEN = {
  'group_magnitude': {'begin': 1, 'end': 3, 'every': 1}, 'group_taylor': {'begin': 1, 'end': 3, 'every': 1},
  'oto': {'penalty': 10.0, 'epsilon': 1.0, 'begin': 2, 'end': 4}, 'hesso': {'begin': 1, 'steps': 2, 'periods': 2},
  'dhspg': {'begin': 1, 'steps': 2}, 'wgsef': {'kept': 4, 'learning_rate': 0.05, 'begin': 3},
  'norm_scale': {'begin': 2}, 'latency_aware': {'penalty': 1e-3, 'begin': 2},
  'hap': {'samples': 2, 'key': jax.random.key(1)}}


def apply(tree, x):
  """One layer with scales, in any container: eight units."""
  w = {path.rpartition('/')[2]: leaf for path, leaf in zip(*trees.flatten(tree)[:2])}
  return jnp.sum(jax.nn.relu(x @ w['kernel'] + w['bias']) * w['scale'], -1)


def loss(tree):
  return 1e-3 * jnp.mean((apply(tree, X) - X[:, 0]) ** 2)


def cells(every):
  """Each recipe with each optimizer, or with one, in the company that a hash chooses."""
  names = [name for name in OPTIMIZERS if every or name not in LAST]
  for i, recipe in enumerate(recipes.STRUCTURED):
    for name in names if every else [names[zlib.crc32(recipe.encode()) % len(names)]]:
      turn = i + zlib.crc32(name.encode())
      yield recipe, name, [*CONTAINERS][turn % len(CONTAINERS)], [*MESHES][(turn // 64 + i) % (len(MESHES) - 1)]


def pytest_generate_tests(metafunc):
  if 'cell' in metafunc.fixturenames:
    chosen = [*cells(metafunc.config.getoption('--cells') == 'all')]
    metafunc.parametrize('cell', chosen, ids=', '.join)


def test_cell(cell):
  recipe, optimizer, container, mesh = cell
  if optimizer in LAST:
    with pytest.raises(ValueError, match='sparsejax: .*(line search|function)'):
      run(*cell)
    return
  try:
    params, state = run(*cell)
  except Exception:
    run(None, *cell[1:])  # goes on raising if the optimizer can do alone what it cannot do with a recipe
    raise
  keep, = structured.kept(groups(container), params).values()
  moves_late = optimizer.startswith('MultiSteps') or 'conditionally' in optimizer or optimizer == 'apply_every'
  if not moves_late:
    assert keep.sum() == 4, 'half of the eight units is zero'
  assert keep.sum() >= 4 and np.isfinite(loss(params))
  if MESHES[mesh].kernel is not None and not moves_late:
    held = cases.by_path(params)
    masks = [tree for sparse in sparsejax.states.find(state) for tree in cases.by_path(sparse.masks).items()]
    assert masks and all(m.sharding.is_equivalent_to(held[path].sharding, m.ndim) for path, m in masks if m.ndim)


@functools.cache
def groups(container):
  return structured.groups(apply, CONTAINERS[container](cases.random(0, like=SHAPES)), X)


@functools.cache
def run(recipe, optimizer, container, mesh):
  """Some updates as one program: the last parameters and state. Without a recipe, those of the optimizer alone."""
  start, lies = CONTAINERS[container](cases.random(0, like=SHAPES)), MESHES[mesh]
  given = {**GIVEN.get(recipe, {}), **({'loss': loss} if recipe == 'hap' else {})}
  wrap = (lambda inner: recipes.STRUCTURED[recipe](inner, groups(container), **given)) if recipe else (lambda tx: tx)
  program = functools.partial(_program, dimensions.fed(optimizer, OPTIMIZERS[optimizer](wrap)), optimizer)
  if lies.kernel is None:
    return jax.jit(program)(start)
  devices = lies.make()
  with jax.set_mesh(devices):
    return jax.jit(program)(jax.device_put(start, lies.shardings(devices, start)))


def _program(tx, optimizer, params):
  def step(carry, _):
    params, state = carry
    moves, state = tx.update(jax.grad(loss)(params), state, params, **dimensions.extra(optimizer))
    return (optax.apply_updates(params, moves), state), None
  tx = optax.with_extra_args_support(tx)
  return jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[0]


def test_inside_of_a_shard_map_groups_of_the_whole_are_refused():
  tx = recipes.hesso(optax.sgd(0.1), groups('dict'))
  with pytest.raises(ValueError, match='the groups were read with shape'):
    jax.eval_shape(tx.init, cases.random(0, like={**SHAPES, 'stack': {'kernel': cases.F32((64, 2)),
                                                                     'bias': cases.F32((2,))}}))
