"""Tests groups and removal on the architectures of Torch-Pruning's benchmarks: found, cut in half, proven equal."""

import dataclasses

import architectures
import jax
import numpy as np
import pytest

import sparsejax as sj

pytestmark = pytest.mark.usefixtures('standard_promotion')

# The number of units of each group. A ViT has the stream, and heads, two widths and a hidden layer in each block.
EXPECTED = {
  'resnet': [4, 4, 6, 6], 'densenet': [2, 2, 4, 4, 6, 6], 'inception': [2, 2, 2, 4, 4], 'mobilenet': [2, 2, 4, 8, 8],
  'vit': [2, 2, 4, 4, 4, 4, 8, 10, 10], 'scanned vit': [2, 4, 4, 8, 10],
  'decoder': [2, 2, 2, 2, 2, 2, 4, 4, 10, 10, 16], 'unet': [2, 2, 4, 4, 6]}


def half(group):
  """Every second unit; in a scanned stack, other units in each layer."""
  keep = np.arange(group.size) % 2 == 0
  return keep if group.layers is None else np.stack([np.roll(keep, i) for i in range(group.layers)])


@pytest.mark.sampled(5)
@pytest.mark.parametrize('name', architectures.TABLE)
def test_an_architecture_is_taken_apart_cut_in_half_and_proven_equal(name):
  module, x = architectures.TABLE[name]
  variables = architectures.variables_of(module, x)
  found = sj.structured.groups(module.apply, variables, x)
  assert not found.unread
  assert sorted(group.size for group in found.values()) == EXPECTED[name]
  small = sj.structured.cut(found, variables, {name: half(group) for name, group in found.items()})
  compiled = dataclasses.replace(found, apply=jax.jit(found.apply))
  proof = sj.structured.prove(compiled, variables, small._replace(apply=jax.jit(small.apply)),
                              architectures.filled(x, jax.random.key(3)))
  assert proof.holds
  before, after = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (variables, small.params))
  assert after < 0.5 * before
