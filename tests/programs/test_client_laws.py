"""Runs every program of `tests/support/programs.py` through every client of `sparsejax.programs`.

The results must be those of the program itself: shown operand by operand, with operands replaced by themselves, and
with packed parameters. Random programs (`tests/support/generated.py`) run too. `test_contractions.py` compares the
contractions with known answers.
"""

import functools
import types

import generated
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

import sparsejax as sj
from kernels_pallas import packed
from sparsejax import formats, trees
from sparsejax.programs import contractions, jaxprs, operands, replace, trace


@pytest.fixture(autouse=True)
def ordinary(standard_promotion):
  """Returns nothing; allows JAX's ordinary promotion, which models outside of this library need."""


def concrete(tree, seed):
  """Returns the tree with numbers in place of shapes."""
  rng = np.random.default_rng(seed)

  def made(leaf):
    if not hasattr(leaf, 'dtype'):
      return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if leaf.dtype == bool:
      return jnp.asarray(rng.random(leaf.shape) < 0.7)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.asarray(rng.integers(0, 3, leaf.shape), leaf.dtype)
    return jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype)

  return jax.tree.map(made, tree)


@functools.cache
def case(name):
  """Returns a program with concrete arguments, its result, and its contractions."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    (apply, params, inputs), _ = programs.NAMED[name]()
    params, inputs = concrete(params, 0), concrete(inputs, 1)
    if name == 'factored':
      params = {'w': jnp.eye(4) + 0.1}
    return types.SimpleNamespace(apply=apply, params=params, inputs=inputs, result=compiled(apply, params, inputs),
                                 found=contractions(apply, params, *inputs))


def compiled(apply, params, inputs):
  """Returns `apply(params, *inputs)`, compiled; a leaf that is no array, as modules have, cannot be given to `jit`."""
  leaves, treedef = jax.tree.flatten((params, inputs))

  def run(arrays):
    params, inputs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
    return apply(params, *inputs)

  return jax.jit(run)({i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)})


def assert_same(result, expected, tolerance=1e-6):
  for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.sampled(14)
@pytest.mark.parametrize('name', programs.NAMED)
def test_answering_sites_with_their_own_products_changes_nothing(name):
  this, seen = case(name), []

  def answer(site):
    assert site.x.ndim and this.found.uses[site.path][site.number] == site.use
    seen.append((site.path, site.number, site.steps))
    return site.product() if len(seen) % 2 else None

  assert_same(operands(this.apply, answer)(this.params, *this.inputs), this.result)
  assert len(set(seen)) == len(seen)
  visited = {this.found.uses[path][number].address for path, number, _ in seen}
  if name != 'switch':  # of whose branches one runs
    assert visited == {use.address for uses in this.found.uses.values() for use in uses}


@pytest.mark.sampled(14)
@pytest.mark.parametrize('name', programs.NAMED)
def test_replacing_each_operand_by_itself_changes_nothing(name):
  this, met = case(name), set()

  def itself(key):
    return lambda x: met.add(key) or x

  keys = {(path, n): itself((path, n)) for path, uses in this.found.uses.items() for n in range(len(uses))}
  assert_same(compiled(replace(this.apply, keys), this.params, this.inputs), this.result)
  assert met == set(keys)


def pruned(leaf, axes):
  """Returns the weight with every second contracted index zero, which is a 1:2 pattern."""
  index = np.indices(leaf.shape)
  along = np.ravel_multi_index([index[a] for a in axes.contracted], [leaf.shape[a] for a in axes.contracted])
  return jnp.asarray(np.where(along % 2 == 0, leaf, np.float32(0)))


def packed_tree(found, params, kinds):
  """Returns the parameters pruned, dense and packed: each in the first format of `kinds` that fits."""
  names, leaves, treedef = trees.flatten(params)
  dense, small = list(leaves), list(leaves)
  for i, (name, leaf) in enumerate(zip(names, leaves)):
    if name in found and name not in found.ambiguous and jnp.issubdtype(leaf.dtype, jnp.floating):
      dense[i] = small[i] = pruned(leaf, found[name])
      for kind in kinds:
        try:
          axes = {name: found[name]}
          small[i] = formats.pack({name: dense[i]}, kind, where=lambda *_: True, axes=axes)[name]
          break
        except ValueError:
          continue
  return treedef.unflatten(dense), treedef.unflatten(small)


KINDS = [sj.NM(1, 2), 'csc', sj.Block((2, 2)), 'bitmask']


@pytest.mark.sampled(14)
@pytest.mark.parametrize('i, name', list(enumerate(programs.NAMED)))
def test_packed_parameters_give_the_dense_result_and_are_all_listed(i, name):
  this = case(name)
  dense, small = packed_tree(this.found, this.params, KINDS[i % 3:] + KINDS[:i % 3])
  result = compiled(packed(this.apply), small, this.inputs)
  assert_same(result, compiled(this.apply, dense, this.inputs), 1e-4)
  explained = packed(this.apply, explain=True)(small, *this.inputs)
  names, leaves, _ = trees.flatten(small, is_leaf=formats.is_packed)
  assert {use.path for use in explained} == {n for n, leaf in zip(names, leaves) if formats.is_packed(leaf)}


# Random programs.


def pytest_generate_tests(metafunc):
  """Runs 3 programs, one for each order of formats, and 400 with `--cells all`."""
  if 'seed' in metafunc.fixturenames:
    metafunc.parametrize('seed', range(400 if metafunc.config.getoption('--cells') == 'all' else 2))


def test_random_programs_are_the_same_to_every_client(seed):
  """Values, and gradients by the input and by all weights: dense, packed, shown site by site, and replaced by itself.
  """
  apply, params, inputs, half = generated.program(seed)
  found, tolerance = contractions(apply, params, *inputs), 5e-2 if half else 2e-3  # bfloat16 has 8 bits.
  dense, small = packed_tree(found, params, KINDS[seed % 3:] + KINDS[:seed % 3])
  dense, small = ({name: tree[name] for name in params} for tree in (dense, small))
  assert any(map(formats.is_packed, small.values()))

  def loss(weights, h, run):
    y = run(weights, h)
    return jnp.sum(y ** 2), y

  gradients = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  (by_weight, by_input), y = jax.jit(gradients(lambda p, h: loss(p, h, apply)))(dense, *inputs)
  of_values = lambda v, h: loss(formats.with_values(small, v), h, packed(apply))
  (by_value, *packed_by_input), packed_y = jax.jit(gradients(of_values))(formats.values(small), *inputs)
  assert_same([packed_y, *packed_by_input], [y, by_input], tolerance)
  for name, leaf in small.items():
    if formats.is_packed(leaf):
      stored = formats.with_values({name: leaf}, {name: jnp.ones_like(leaf.values)})[name].to_dense() != 0
      gradient = formats.with_values({name: leaf}, {name: by_value[name]})[name].to_dense()
      scale = max(1.0, float(jnp.abs(by_weight[name]).max()))
      assert_same(gradient / scale, jnp.where(stored, by_weight[name], 0) / scale, tolerance)

  seen = []
  answered = operands(apply, lambda site: seen.append(site.path) or (site.product() if len(seen) % 2 else None))
  assert_same(answered(dense, *inputs), y, tolerance)
  keys = {(path, n): lambda x: x for path, uses in found.uses.items() for n in range(len(uses))}
  assert_same(jax.jit(replace(apply, keys))(dense, *inputs), y, tolerance)
  assert seen


AROUND = {'jit', 'remat', 'cond', 'while', 'scan', 'custom_jvp_call', 'custom_vjp_call', 'vmap'}


def test_random_programs_nest_products_and_constants_in_every_structure():
  around, captured, levels, sizes, uses = set(), set(), 0, [], []
  for seed in range(5):
    apply, params, inputs, _ = generated.program(seed)
    program = trace(apply, (params, *inputs))
    names = {address: {'remat2': 'remat', 'checkpoint': 'remat'}.get(eqn.primitive.name, eqn.primitive.name)
             for address, eqn in jaxprs.equations(program)}
    for address, eqn in jaxprs.equations(program):
      outside = [names[address[:n]] for n in range(1, len(address), 2)]
      if eqn.primitive.name == 'dot_general':
        around |= {*outside, *(['vmap'] if jaxprs.dot_numbers(eqn)[0].batch else [])}
        levels = max(levels, len(outside))
      captured |= {eqn.primitive.name for part in jaxprs.inner(eqn) if jaxprs.constants(part)}
    sizes.append(len(names))
    uses += map(len, contractions(apply, params, *inputs).uses.values())
  assert around >= AROUND and 'jit' in captured and levels >= 2 and min(sizes) >= 15 and max(uses) > 1
