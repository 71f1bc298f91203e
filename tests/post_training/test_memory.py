"""Compares the memory that `prune` states before it starts with the memory that the process takes, recipe by recipe."""

import ctypes
import gc
import pathlib
import re

import jax
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import recipes

STATUS, CLEAR = pathlib.Path('/proc/self/status'), pathlib.Path('/proc/self/clear_refs')
ROWS = {'exact_obs': 32, 'obc': 32}  # outputs, each with an inverse of its own
OPTIONS = {'armor': {'iterations': 4}, 'net_trim': {'iterations': 4}, 'ecoflap': {'sensitivity': {'w': 1.0}}}


def drawn(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def told(name):
  """Returns a number of bytes that Linux keeps about this process."""
  return int(re.search(rf'{name}:\s+(\d+) kB', STATUS.read_text())[1]) * 1024


def peak(call):
  """Returns the growth of the process to its peak while `call` runs, in bytes: least and most of three; and the result.

  Other threads add to the growth, or hide a part of it where they free late what an earlier call has used.
  """
  libc = ctypes.CDLL(None)
  libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD as at first: larger arrays go back to the system when freed
  call()
  grown = []
  for _ in range(3):
    result = None
    gc.collect()
    libc.malloc_trim(0)
    CLEAR.write_text('5')  # the peak is counted anew
    before = told('VmRSS')
    result = call()
    grown.append(told('VmHWM') - before)
  return min(grown), max(grown), result


@pytest.mark.skipif(not CLEAR.exists(), reason='only Linux tells the peak of a process')
@pytest.mark.parametrize('name', recipes.POST_TRAINING)
def test_the_estimate_is_not_below_the_peak_and_not_far_above_it(name):
  outputs, inputs = ROWS.get(name, 512), 256
  params = jax.tree.map(jax.numpy.asarray, {'w': drawn(0, inputs, outputs), 'head': drawn(1, outputs, 2)})
  recipe, x = recipes.POST_TRAINING[name](**OPTIONS.get(name, {})), jax.numpy.asarray(drawn(2, 2 * inputs, inputs))
  least, most, result = peak(lambda: sj.prune(lambda p, x: jax.nn.relu(x @ p['w']) @ p['head'], params, [x], recipe,
                                              where=sj.trees.named('w')))
  # The allocator keeps some more: up to 0.1 MB of 8 were seen.
  assert 0.95 * least <= result.report.memory <= 3 * most, (least, most, result.report.memory)


def convolved(p, x):
  y = jax.lax.conv_general_dilated(x, p['w'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  return y.mean((1, 2)) @ p['head']


@pytest.mark.skipif(not CLEAR.exists(), reason='only Linux tells the peak of a process')
@pytest.mark.parametrize('name', ['wanda', 'sparsegpt'])
def test_the_estimate_counts_the_patches_of_a_convolution(name):
  """The patches of a kernel of nine taps are nine times the input, and most of what is needed."""
  params = jax.tree.map(jax.numpy.asarray, {'w': drawn(0, 3, 3, 16, 16), 'head': drawn(1, 16, 2)})
  x = jax.numpy.asarray(drawn(2, 8, 32, 32, 16))
  least, most, result = peak(lambda: sj.prune(convolved, params, [x], recipes.POST_TRAINING[name](0.5),
                                              where=sj.trees.named('w')))
  assert 0.95 * least <= result.report.memory <= 3 * most, (least, most, result.report.memory)
