"""Gaussian weights and the clustered prior: numbers of the formulas, zeros that stay zeros, and a run of SSVI."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import bayes, recipes, scores
from sparsejax.types import Axes, Signals

pytestmark = pytest.mark.usefixtures('standard_promotion')
MEAN, SIGMA = jnp.asarray([.5, -.2, .1, 0, -1]), jnp.asarray([.1, .2, .4, .3, .5])
WEIGHT = {'mean': MEAN, 'rho': jnp.log(jnp.expm1(SIGMA)) - bayes.OFFSET}


def test_divergences_and_scores_of_the_formula():
  """[run]: NumPy in float64; KL to N(0, 0.005^2) of each weight."""
  wanted = [5196.504, 1595.811, 3395.118, 1795.406, 24994.895]
  each = [bayes.kl({'w': jax.tree.map(lambda x, i=i: x[i:i + 1], WEIGHT)}) for i in range(5)]
  np.testing.assert_allclose(each, wanted, rtol=1e-5)
  np.testing.assert_allclose(bayes.kl({'a': WEIGHT, 'bias': jnp.ones(3)}), sum(wanted), rtol=1e-5)
  found = bayes.offset(scores.snr)(MEAN, Signals(stats=(WEIGHT['rho'],)))
  np.testing.assert_allclose(found, [5.000003, 1.459461, 1.324711, 1.323608, 2.089507], rtol=1e-4)


def test_a_pruned_weight_is_drawn_as_zero_and_has_no_divergence():
  weight = {'mean': jnp.asarray([[0., 1], [0, 0]]), 'rho': jnp.asarray([[0., 0], [1, 0]])}
  drawn = jax.jit(bayes.sample)({'w': weight, 'b': jnp.ones(2)}, jax.random.key(0))
  assert ((np.asarray(drawn['w']) == 0) == [[True, False], [False, True]]).all() and drawn['b'].tolist() == [1, 1]
  lone = bayes.kl({'w': {'mean': jnp.zeros((2, 2)), 'rho': jnp.zeros((2, 2))}})
  assert float(lone) == 0 and bayes.means({'w': weight})['w'] is weight['mean']
  grad = jax.grad(lambda w: bayes.kl({'w': w}))(weight)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grad.values())


def test_the_local_reparametrisation_has_the_mean_and_the_variance_of_the_product():
  x = jnp.broadcast_to(jnp.asarray([[1., -2, .5, 3, 1]]), (20_000, 5))
  weight = {name: each[:, None] for name, each in WEIGHT.items()}
  y = bayes.noisy_product(x, weight, jax.random.key(1))
  assert float(jnp.mean(y)) == pytest.approx(float((x[:1] @ MEAN)[0]), abs=0.05)
  assert float(jnp.var(y)) == pytest.approx(float(jnp.sum((x[0] * SIGMA)**2)), rel=0.05)
  np.testing.assert_allclose(bayes.noisy_product(x[:2], weight)[:, 0], x[:2] @ MEAN, rtol=1e-6)


def test_weights_begin_at_the_deviation_of_the_authors():
  params = {'dense': {'kernel': jnp.ones((40, 50)), 'bias': jnp.ones(50)}}
  fixed, drawn = bayes.gaussian(params), bayes.gaussian(params, jax.random.key(0))
  np.testing.assert_allclose(bayes.deviation(fixed['dense']['kernel']), 6e-4, rtol=1e-3)
  assert fixed['dense']['bias'].shape == (50,)
  assert float(jnp.mean(bayes.deviation(drawn['dense']['kernel']))) == pytest.approx(6.6e-4, rel=0.1)


def test_the_support_with_and_without_a_chain():
  """[run]: the integrated log-odds in SciPy, and forward-backward with p01 .1 and p10 .2."""
  w = jnp.asarray([.8, .05, .01, -.6])[:, None]
  own = bayes.support()(w, Signals())
  np.testing.assert_allclose(own[:, 0], [4.786836, -2.239356, -3.380767, 4.095596], atol=1e-4)
  chain = scores.smoothed(bayes.support(), 0.1, 0.2)(w, Signals(axes=Axes((0,), (1,))))
  np.testing.assert_allclose(jax.nn.sigmoid(chain[:, 0]), [.939920, .143654, .092049, .881319], atol=1e-4)


def test_a_chain_makes_fewer_runs_of_zeros_at_the_same_count():
  rng = np.random.default_rng(0)
  wanted = np.repeat(rng.random((32, 8)) < 0.3, 4, 0)  # runs of four along the contraction
  w = jnp.asarray(rng.normal(size=(128, 8)) * np.where(wanted, 0.5, 0.05), jnp.float32)
  signals = Signals(axes=Axes((0,), (1,)))
  score = {'chain': scores.smoothed(bayes.support(), 0.05, 0.15), 'alone': bayes.support()}
  masks = {name: np.asarray(sj.Unstructured(0.7)(each(w, signals))) for name, each in score.items()}
  runs = {name: int((mask[:-1] & ~mask[1:]).sum()) for name, mask in masks.items()}
  assert masks['chain'].sum() == masks['alone'].sum() and runs['chain'] < runs['alone'] / 2, runs


def test_ssvi_moves_one_mask_of_mean_and_rho_and_a_grown_weight_begins_with_the_first_deviation():
  params = bayes.gaussian({'dense': {'kernel': jax.random.normal(jax.random.key(0), (12, 8))}}, jax.random.key(1))
  tx = recipes.ssvi(optax.sgd(0.05, 0.9), 0.75, total_steps=16, every=3, key=jax.random.key(2))
  state = tx.init(params)
  params = sj.project(params, state)
  x = jax.random.normal(jax.random.key(3), (16, 12))

  @jax.jit
  def step(params, state, key):
    loss = lambda params: jnp.mean(jnp.square(x @ bayes.sample(params, key)['dense']['kernel'] - 1)) + 1e-6 * bayes.kl(
        params)
    moves, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, moves), state

  masks = []
  for i in range(12):
    params, state = step(params, state, jax.random.key(i))
    mask, weight = sj.masks(params, state)['dense'], params['dense']['kernel']
    mask = mask['kernel']
    np.testing.assert_array_equal(mask['mean'], mask['rho'])
    assert int(mask['mean'].sum()) == 24 and not weight['rho'][~mask['rho']].any()
    assert not bayes.deviation(weight)[~mask['mean']].any() and bool(jnp.isfinite(bayes.kl(params)))
    masks.append(np.asarray(mask['mean']))
  grown = masks[-1] & ~masks[0]
  assert grown.any() and (bayes.deviation(params['dense']['kernel'])[grown] > 0).all()


def test_ssvi_refuses_parameters_without_deviations():
  tx = recipes.ssvi(optax.sgd(0.1), 0.5, total_steps=9, key=jax.random.key(0))
  with pytest.raises(ValueError, match='`where` picks no parameter'):
    tx.init({'kernel': jnp.ones((4, 4))})
  with pytest.raises(ValueError, match='bayes.kl: .*make one by bayes.gaussian'):
    bayes.kl({'kernel': jnp.ones((4, 4))})
  with pytest.raises(ValueError, match='bayes.noisy_product: '):
    bayes.noisy_product(jnp.ones((2, 4)), jnp.ones((4, 4)))
