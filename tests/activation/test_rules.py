"""Tests rules of activation sparsity against numbers that the authors' functions print on small inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from sparsejax import activation, calibration, formats
from sparsejax.activation.rules import rank_of
from sparsejax.activation.ruling import switched
from sparsejax.activation.sparsifying import tau_of

W = jnp.asarray([[1, 0, 2, 0.1], [2, 0.5, -1, 0.2]])  # [outputs, inputs]
X = np.float32([[1, -2, 0.5, 3], [0.1, -0.4, 0.2, 0.3]])
NORMS = [2.23607, 0.5, 2.23607, 0.22361]


def rows(x):
  return calibration.Rows(jnp.asarray(x, jnp.float32)[None])


def found(rule, scale, batches):
  """Returns tau and the thresholds of a rule of one matrix."""
  tau = tau_of(rule, [calibration.magnitudes(rows(x), scale) for x in batches], rule.sparsity)
  return tau, rule.thresholds(tau, scale)[0]


def test_quantiles_are_linear_between_the_values_as_in_the_code_of_wina():
  each = calibration.magnitudes(rows([[0.1, -0.2, 0.2, 0.4], [-0.5, 0.8, 1, 1.5]]))
  for fraction, value in zip((0.05, 0.25, 0.5, 0.75, 1), (0.1, 0.15, 0.4, 0.8, 1.5)):
    assert each.quantile(fraction)[0] == pytest.approx(value, rel=1e-6)
  np.testing.assert_allclose(each.total[0], [0.6, 1.0, 1.2, 1.9], rtol=1e-6)


def test_rows_that_do_not_count_are_in_no_quantile():
  masked = calibration.Rows(jnp.asarray([[[1.0], [np.nan], [3.0]]]), jnp.asarray([[True, False, True]]))
  each = calibration.magnitudes(masked)
  assert (int(each.rows[0]), float(each.quantile(1.0)[0]), float(each.total[0, 0])) == (2, 3.0, 4.0)
  with pytest.raises(ValueError, match='no row was counted'):
    calibration.magnitudes(masked._replace(valid=jnp.zeros((1, 3), bool))).quantile(0.5)


def test_wina_compares_inputs_times_norms_and_teal_inputs_alone():
  scale = activation.wina(0.5).scale(W[None])
  np.testing.assert_allclose(scale[0], NORMS, atol=5e-6)
  order = lambda scale: [set(np.argsort(-np.abs(x) * scale)[:2].tolist()) for x in X]
  assert order(np.asarray(scale[0])) == [{0, 2}] * 2
  assert order(np.asarray(activation.teal(0.5).scale(W[None])[0])) == [{1, 3}] * 2


def test_r_sparse_sends_skipped_inputs_through_the_low_rank_weight():
  rule = activation.r_sparse(0.5, alpha=0.5, rank=1)
  tau, thresholds = found(rule, rule.scale(W[None]), [X])
  assert tau[0] == pytest.approx(1.0) and rule.level(0.5) == 0.75
  rest = rule.rest(W[None], 0.5)
  small = formats.ActiveArray.of(W.T, thresholds, rest.left[0], rest.right[0])
  y = kernels_pallas.threshold_matmul(jnp.asarray(X), small)
  np.testing.assert_allclose(y, [[1.97322, 1.12322], [-0.00724, -0.10182]], atol=1e-5)


@pytest.mark.parametrize('shape, sparsity, alpha, rank', [
    ((4096, 4096), 0.5, 0.9, 102), ((14336, 4096), 0.5, 0.5, 796)])
def test_the_rank_pays_for_the_rest_of_the_budget(shape, sparsity, alpha, rank):
  assert rank_of(np.broadcast_to(np.float32(0), (1, *shape)), sparsity, alpha) == rank


GATES = [[[0.1, -0.5, 0.2, 0.9], [0.3, 0.05, -0.6, 0.4]], [[0.2, 0.7, -0.1, 0.3], [-0.4, 0.15, 0.5, 0.6]]]
UPS = [[[1, 2, 0.5, 0.1], [3, 1, 0.5, 0.3]], [[2, 1, 1.5, 0.2], [2, 4, 0.5, 0.2]]]


@pytest.mark.parametrize('name, thresholds, kept', [
    ('chess', [0.12, 0.12, 0.32, 1.2], ['0100', '1010', '1100', '1110']),
    ('cats', [0.3] * 4, ['0101', '1011', '0101', '1011'])])
def test_chess_and_cats_switch_neurons_off_as_the_authors_do(name, thresholds, kept):
  rule = getattr(activation, name)(0.5)
  mean = np.mean([np.mean(np.abs(up), 0) for up in UPS], 0)
  np.testing.assert_allclose(mean, [2, 2, 0.75, 0.2], rtol=1e-6)
  tau, own = found(rule, rule.scale(jnp.asarray(mean, jnp.float32)[None] if name == 'chess' else W[None]), GATES)
  assert tau[0] == pytest.approx(0.24 if name == 'chess' else 0.3)
  np.testing.assert_allclose(own, thresholds, rtol=1e-5)
  gates = jnp.asarray(GATES, jnp.float32).reshape(4, 4)
  masks = np.asarray(switched(gates, rule, jnp.asarray(own)) != 0).astype(int)
  assert [''.join(map(str, row)) for row in masks] == kept


def test_a_neuron_whose_up_was_always_zero_is_never_active_and_norms_of_zero_skip():
  assert found(activation.chess(0.5), jnp.asarray([[1.0, 0.0]]), [[[1.0, 5.0]]])[1][1] == np.inf


def test_top_k_keeps_the_largest_and_the_lower_index_of_equals():
  h = jnp.maximum(jnp.asarray([[0.25, -0.25, 1.5, 0.75, 0.75, 0]]), 0)
  np.testing.assert_array_equal(switched(h, activation.top_k(2)), [[0, 0, 1.5, 0.75, 0, 0]])
  np.testing.assert_array_equal(switched(h, activation.top_k(9)), h)


@pytest.mark.parametrize('bound, tau, kept, error', [(0.05, 0.19999, 11, 0.04079), (0.1, 0.44719, 9, 0.08706),
                                                     (0.3, 0.44719, 9, 0.08706), (0.5, 0.55902, 6, 0.38795)])
def test_the_bound_on_errors_gives_the_threshold_of_the_authors_search(bound, tau, kept, error):
  h = np.float32([*X, [0.5, 1, -0.25, -2]])
  own, realised = activation.error_bound(h, W, bound, np.ones(3, bool))
  assert (own, realised) == (pytest.approx(tau, abs=2e-5), pytest.approx(error, abs=1e-5))
  assert int(np.sum(np.abs(h) * NORMS >= own)) == kept


def test_a_bound_below_the_first_candidate_skips_nothing_where_the_authors_take_the_largest():
  assert activation.error_bound(X, W, 0.0, np.ones(2, bool)) == (0.0, 0.0)


@pytest.mark.parametrize('call, message', [
    (lambda: activation.wina(1.0), 'activation.wina: `sparsity` must be below 1'),
    (lambda: activation.teal(-0.1), '`sparsity` must be'), (lambda: activation.top_k(0), '`k` must be'),
    (lambda: activation.r_sparse(0.5, alpha=2.0), '`alpha` must be'),
    (lambda: activation.ppl(0.0, len), '`percent` must'),
    (lambda: activation.greedy(0.0), '`step` must be')])
def test_settings_that_cannot_be_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
