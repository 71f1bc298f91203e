"""Makes inputs and packed blocks for the tests of `kernels_pallas`, and compares products within their rounding."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from sparsejax.formats import BlockSparseArray
from sparsejax.types import Axes

WAYS = ('xla', 'dense')  # Other implementations do not run on CPUs, and have tests of their own.
ROUNDING = {'float32': 1e-6, 'bfloat16': 8e-3, 'float16': 1e-3}
TOKENS = {'none': (0,), 'a vector': (), 'one': (1,), 'odd': (3, 7), 'many': (70,)}
# The inputs have all numbers of tokens in one dtype, and all dtypes for one number of tokens.
inputs = pytest.mark.parametrize('tokens, dtype', [
    *((tokens, 'float32') for tokens in TOKENS), ('odd', 'bfloat16'), ('odd', 'float16')])

MATRIX = Axes((0,), (1,))


def share(kept):
  return lambda shape, axes: np.random.default_rng(2).random(shape) < kept


def holes(shape, axes):
  """Returns a mask with empty rows and columns, the first and the last among them."""
  mask = np.random.default_rng(2).random(shape) < 0.3
  mask[[0, 7, -1]] = mask[:, [0, 9, -1]] = False
  return mask


# Each case of weights with zeros anywhere has a function that returns the mask, a shape, and axes.
UNSTRUCTURED = {
    'csc 90 %': (share(0.1), (45, 31), MATRIX), 'csc 50 %': (share(0.5), (17, 40), MATRIX),
    'csc with holes': (holes, (20, 24), MATRIX), 'csc, nothing': (share(0.0), (8, 6), MATRIX),
    'csc, all': (share(1.1), (8, 6), MATRIX), 'csc, one row': (share(0.5), (1, 9), MATRIX),
    'csc attention out': (share(0.2), (2, 9, 5), Axes((0, 1), (2,))),
    'csc [out, in]': (share(0.2), (7, 16), Axes((1,), (0,))),
    'csc query': (share(0.2), (8, 2, 7), Axes((0,), (1, 2))),
}


def normal(shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def blocks(shape, block, dtype, stored=0.5, seed=0):
  """Returns a packed weight: about the fraction `stored` of blocks is nonzero, and none in the first column."""
  grid = [-(-n // b) for n, b in zip(shape, block)]
  keep = np.random.default_rng(seed).random(grid) < stored
  keep[:, 0] = grid == [1, 1]
  whole = np.repeat(np.repeat(keep, block[0], 0), block[1], 1)[:shape[0], :shape[1]]
  return BlockSparseArray.from_dense(normal(shape, dtype, seed + 1), whole, block=block)


def close(found, expected, k, dtype='float32'):
  """Asserts that both are equal up to the rounding of a sum of `k` products, wherever the sum is rounded."""
  atol = 4 * ROUNDING[dtype] * math.sqrt(k)
  np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), atol=atol, rtol=atol)


def rounded_once(found, expected, k, sums=1e-5):
  """Asserts that `found` is a float32 sum of `k` normal products, off by `sums` sqrt(k), rounded once to its dtype."""
  rounding = 0.51 * float(jnp.finfo(found.dtype).eps)
  np.testing.assert_allclose(f32(found), f32(expected), rtol=rounding, atol=sums * k ** 0.5)


def f32(a):
  return np.asarray(a, np.float32)


def value_and_gradients(f, dy, *args):
  """Returns `f(*args)` and its gradients for the cotangent `dy`, computed in one program."""
  def both(dy, *args):
    y, back = jax.vjp(f, *args)
    return y, back(dy)

  return jax.jit(both)(dy, *args)


def equations(jaxpr):
  """Yields the equations of a program, and of the programs inside of it."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(getattr(inner, 'jaxpr', inner))


def largest(jaxpr):
  """Returns the number of entries of the largest array that a program makes."""
  return max((math.prod(v.aval.shape) for eqn in equations(jaxpr) for v in eqn.outvars), default=0)


def largest_lowered(lowered):
  """Returns the number of entries of the largest array in a lowered program."""
  shapes = re.findall(r'tensor<((?:\d+x)*)', lowered.as_text())
  return max(math.prod(int(n) for n in shape.split('x') if n) for shape in shapes)
