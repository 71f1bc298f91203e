"""Every program of `tests/support/programs.py` goes through every client of `sparsejax.programs`.

The results must be those of the program itself: shown operand by operand, with operands replaced by themselves, and with
packed parameters. `test_contractions.py` compares the contractions with known answers.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

import sparsejax as sj
from kernels_pallas import packed
from sparsejax import formats, trees
from sparsejax.programs import contractions, operands, replace


@pytest.fixture(autouse=True)
def ordinary(standard_promotion):
  """Allows JAX's ordinary promotion, which models outside of this library need."""


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
    return types.SimpleNamespace(apply=apply, params=params, inputs=inputs, result=jax.jit(apply)(params, *inputs),
                                 found=contractions(apply, params, *inputs))


def assert_same(result, expected, tolerance=1e-6):
  for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', programs.NAMED)
def test_answering_each_site_with_its_own_product_changes_nothing(name):
  this, seen = case(name), []

  def answer(site):
    seen.append((site.path, site.number, site.steps))
    assert jax.eval_shape(lambda: site.product()).shape == site.product().shape
    return None

  assert_same(operands(this.apply, answer)(this.params, *this.inputs), this.result)
  assert len(set(seen)) == len(seen)
  used = {(path, number) for path, uses in this.found.uses.items() for number in range(len(uses))}
  taken = {(path, number) for path, number, _ in seen}
  assert taken <= used and (taken == used or name == 'switch')


@pytest.mark.parametrize('name', programs.NAMED)
def test_replacing_each_operand_by_itself_changes_nothing(name):
  this, met = case(name), set()

  def itself(key):
    return lambda x: met.add(key) or x

  keys = {(path, number): itself((path, number)) for path, uses in this.found.uses.items() for number in range(len(uses))}
  assert_same(replace(this.apply, keys)(this.params, *this.inputs), this.result)
  assert met == set(keys)


def packed_tree(found, params, kinds):
  """Returns the parameters with every second weight zero, dense and packed: each in the first kind that fits."""
  names, leaves, treedef = trees.flatten(params)
  dense, small = list(leaves), list(leaves)
  for i, (name, leaf) in enumerate(zip(names, leaves)):
    if name in found and name not in found.ambiguous and jnp.issubdtype(leaf.dtype, jnp.floating):
      axes = {name: found[name]}
      if sj.NM(1, 2).validate(leaf.shape, found[name]) is None:
        dense[i] = leaf * sj.NM(1, 2)(jnp.abs(leaf), None, found[name])
      small[i] = dense[i]
      for kind in kinds:
        try:
          small[i] = formats.pack({name: dense[i]}, kind, where=lambda *_: True, axes=axes)[name]
          break
        except ValueError:
          pass
  return treedef.unflatten(dense), treedef.unflatten(small)


KINDS = [sj.NM(1, 2), 'csc', sj.Block((2, 2)), 'bitmask']


@pytest.mark.parametrize('i, name', enumerate(programs.NAMED))
def test_packed_parameters_give_the_dense_result_and_are_all_listed(i, name):
  this = case(name)
  dense, small = packed_tree(this.found, this.params, KINDS[i % 3:] + KINDS[:i % 3])
  assert_same(packed(this.apply)(small, *this.inputs), jax.jit(this.apply)(dense, *this.inputs), 1e-4)
  explained = packed(this.apply, explain=True)(small, *this.inputs)
  names, leaves, _ = trees.flatten(small, is_leaf=formats.is_packed)
  assert {use.path for use in explained} == {n for n, leaf in zip(names, leaves) if formats.is_packed(leaf)}
  print(name, [(u.kind, u.op, u.primitive, u.why if u.op=='unpacked' else '') for u in explained])
