"""Tests that arguments that are no arrays pass through `packed`, and that programs may branch on them in Python."""

import enum
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import packed
from sparsejax import formats, patterns


class Mode(enum.Enum):
  TRAIN = 'train'
  TEST = 'test'


def branching(p, x, how='up', *, train=False, times=1, bias=None, activation=jnp.tanh, mode=Mode.TEST):
  y = x @ p['a']['kernel'] if how == 'up' else x @ p['a']['kernel'].T
  for _ in range(int(times)):
    y = activation(y)
  if train and mode is Mode.TRAIN:
    y = 2 * y
  return {'y': y if bias is None else y + bias, 'how': how, 'mode': mode, 'bias': bias}


JITTED = jax.jit(lambda *args, **options: branching(*args, **options)['y'], static_argnums=2,
                 static_argnames=('train', 'times', 'activation', 'mode'))
ARGUMENTS = {
    'none': ((), {}), 'a string': (('down',), {}), 'a bool': (('up',), {'train': True, 'mode': Mode.TRAIN}),
    'a NumPy bool': ((), {'train': np.bool_(True), 'mode': Mode.TRAIN}), 'a number': ((), {'times': 3}),
    'a NumPy number': ((), {'times': np.int64(2)}), 'functions': ((), {'activation': functools.partial(jnp.clip, min=0)}),
    'a Python scalar': ((), {'bias': 0.5}), 'an array': ((), {'bias': jnp.ones(8)})}


@pytest.mark.parametrize('arguments, options', ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_are_no_arrays_pass_through(arguments, options):
  w = jnp.asarray(np.where((np.arange(8) % 4 < 2)[:, None], np.random.default_rng(0).standard_normal((8, 8)), 0), 'f4')
  params, x = {'a': {'kernel': w}}, jnp.ones((2, 8))
  small = formats.pack(params, patterns.NM(2, 4))
  found, expected = (apply(tree, x, *arguments, **options) for apply, tree in (
      (packed(branching), small), (branching, params)))
  assert (found['how'], found['mode'], found['bias'] is None) == (
      expected['how'], expected['mode'], expected['bias'] is None)
  np.testing.assert_allclose(found['y'], expected['y'], atol=1e-5)
  np.testing.assert_allclose(packed(JITTED)(small, x, *(arguments or ('up',)), **options), expected['y'], atol=1e-5)
