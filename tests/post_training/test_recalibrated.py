"""Tests that statistics of batch norms are measured anew, whatever the momentum and the framework."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import calibration

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(RNG.standard_normal((8, 4)) * 3 + 1, jnp.float32) for _ in range(3)]
WEIGHTS = [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((4, 6), (6, 3))]


class TwoNorms(nn.Module):
  """A `TwoNorms` has two batch norms with momenta of their own."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(not train, momentum=0.9)(x @ WEIGHTS[0])
    return nn.BatchNorm(not train, momentum=0.5)(nn.relu(x) @ WEIGHTS[1])


def normalised(x):
  return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def test_statistics_are_the_means_over_the_batches():
  model = TwoNorms()
  variables = model.init(jax.random.key(0), BATCHES[0], True)
  stats = {**variables['batch_stats'], 'steps': jnp.int32(4)}

  def update(stats, x):
    own = {name: each for name, each in stats.items() if name != 'steps'}
    done = model.apply({**variables, 'batch_stats': own}, x, True, mutable=['batch_stats'])[1]['batch_stats']
    return {**done, 'steps': stats['steps'] + 1}

  found = calibration.recalibrated(update, stats, iter(BATCHES))
  first = [np.asarray(x) @ np.asarray(WEIGHTS[0]) for x in BATCHES]
  second = [np.maximum(normalised(x), 0) @ np.asarray(WEIGHTS[1]) for x in first]
  for name, inputs in (('BatchNorm_0', first), ('BatchNorm_1', second)):
    np.testing.assert_allclose(found[name]['mean'], np.mean([x.mean(0) for x in inputs], 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[name]['var'], np.mean([x.var(0) for x in inputs], 0), rtol=1e-4)
  assert found['steps'] == 4 and not np.allclose(found['BatchNorm_0']['mean'], stats['BatchNorm_0']['mean'], atol=0.1)


REFUSED = {
    'no batch': (lambda s, x: s, [], 'there is no batch'),
    'evaluation mode': (lambda s, x: s, BATCHES, "'mean' is no running mean"),
    'a sum': (lambda s, x: {'mean': s['mean'] + x.mean(0)}, BATCHES, "'mean' is no running mean"),
    'a curve': (lambda s, x: {'mean': s['mean'] ** 3 / 2 + x.mean(0)}, [BATCHES[0] + 9], "'mean' is no running mean"),
    'NaN': (lambda s, x: {'mean': s['mean'] / 2 + x.mean(0)}, [BATCHES[0], BATCHES[1] * np.nan], 'is not finite')}


@pytest.mark.parametrize('case', REFUSED)
def test_other_functions_and_bad_batches_are_refused(case):
  update, batches, why = REFUSED[case]
  with pytest.raises(ValueError, match=why):
    calibration.recalibrated(update, {'mean': jnp.full(4, 2.0)}, batches)
