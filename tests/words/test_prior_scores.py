"""Checks scores and probes with a prior on masks: modules, Markov chains, correlations, and importance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import Unstructured, scores, starts
from sparsejax.types import Axes, Signals

KEY = jax.random.key(0)
AXES = Axes((0,), (1,))
LLR = jnp.array([4.0, 0, 0, -4])[:, None]


def test_a_chain_gives_the_posterior_of_the_sum_over_all_masks():
  """The numbers come from forward-backward in float64, and from the sum over the 16 masks of four weights."""
  evidence = lambda w, signals: w
  odds = scores.smoothed(evidence, 0.1, 0.2)(LLR, Signals(axes=AXES))
  np.testing.assert_allclose(jax.nn.sigmoid(odds)[:, 0], [.939721, .593147, .299775, .021885], rtol=2e-5)
  masks = np.array(np.meshgrid(*[[0, 1]] * 4, indexing='ij')).reshape(4, -1)
  steps = np.array([[.9, .1], [.2, .8]])
  joint = np.array([2 / 3, 1 / 3])[masks[0]] * np.exp(np.asarray(LLR)[:, 0] @ masks)
  for before, after in zip(masks, masks[1:]):
    joint = joint * steps[before, after]
  np.testing.assert_allclose(jax.nn.sigmoid(odds)[:, 0], (masks * joint).sum(1) / joint.sum(), rtol=2e-5)


def test_a_chain_runs_along_contracted_axes_and_nan_is_no_evidence():
  w = jax.random.normal(KEY, (3, 2, 4))  # an output, a layer, and what is contracted
  axes = Axes((2,), (0,), layer=(1,))
  found = scores.smoothed(scores.value, 0.3, 0.1)(w, Signals(axes=axes))
  alone = scores.smoothed(scores.value, 0.3, 0.1)(w[1, 0][:, None], Signals(axes=AXES))[:, 0]
  np.testing.assert_allclose(found[1, 0], alone, rtol=1e-5)
  odd = scores.smoothed(scores.value, 0.3, 0.1)(w.at[1, 0, 2].set(jnp.nan), Signals(axes=axes))
  assert np.isnan(odd[1, 0, 2]) and int(np.isnan(odd).sum()) == 1
  calm = scores.smoothed(scores.value, 0.5, 0.5)(w, Signals(axes=axes))
  np.testing.assert_allclose(calm, w, atol=1e-6, err_msg='without a chain the score is its evidence')


def test_modules_come_first_and_the_count_is_exact():
  mask = scores.modular(2)(jnp.ones((6, 4)), Signals(key=KEY, axes=AXES)) >= 1
  assert mask.tolist() == [[True, True, False, False]] * 3 + [[False, False, True, True]] * 3
  for sparsity in (0.5, 0.25, 0.75):
    kept = Unstructured(sparsity)(scores.modular(2)(jnp.ones((6, 4)), Signals(key=KEY, axes=AXES)))
    assert int(kept.sum()) == 24 * (1 - sparsity) and int((kept & mask).sum()) == min(12, int(kept.sum()))
  shuffled = scores.modular(2, jax.random.key(1))
  first, second = (shuffled(jnp.ones(shape), Signals(key=KEY, axes=AXES)) >= 1 for shape in ((6, 8), (8, 6)))
  assert first.sum() == second.sum() == 24 and np.any(first != (scores.modular(2)(jnp.ones((6, 8)), Signals(
      key=KEY, axes=AXES)) >= 1))
  through = first.astype(int) @ second.astype(int)  # paths within a module use its four hidden units
  assert {*np.unique(through).tolist()} == {0, 4}, 'outputs of a layer and inputs of the next have one permutation'


def test_importance_adds_magnitude_and_gradient():
  w, grad = jnp.array([1.0, -2, 0]), jnp.array([-4.0, 0, 3])
  assert scores.importance(0.5)(w, Signals(grad=grad)).tolist() == [3, 2, 1.5]


X = jnp.array([[1.0, 0, 2], [0, 1, 1], [2, 1, 0], [1, 2, 3]])
Y = jnp.array([[1.0, 0], [0, 2], [3, 1], [1, 1]])


def test_the_correlation_of_inputs_and_outputs_is_that_of_the_formula():
  """The numbers are NumPy's; the operand is X, and the products are Y up to what the mean takes away."""
  w = jnp.linalg.lstsq(jnp.concatenate([X, jnp.ones((4, 1))], 1), Y)[0][:3]
  found = starts.correlation(lambda params, x: x @ params['w'], X)({'w': w, 'b': jnp.ones(2)})
  expected = [[.973329, -.5], [0, .5], [-.512989, -.316228]]
  np.testing.assert_allclose(found['w'], expected, atol=2e-5)
  assert not found['b'].any()
  dead = starts.correlation(lambda params, x: (x * jnp.array([[0.0, 1, 1]])) @ params['w'], X)({'w': w})['w']
  assert not dead[0].any() and np.isfinite(dead).all()


def test_the_correlation_is_found_in_scans_and_convolutions_and_over_several_uses():
  def model(params, x):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), x, params['layers'])
    image = jax.lax.conv_general_dilated(h.reshape(len(h), 2, 2, 1), params['taps'], (1, 1), 'SAME',
                                         dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    y = h @ params['twice']
    return y + jnp.tanh(y) @ params['twice'], image

  params = {name: jax.random.normal(jax.random.fold_in(KEY, i), shape) for i, (name, shape) in enumerate({
      'layers': (2, 4, 4), 'taps': (3, 3, 1, 2), 'twice': (4, 4)}.items())}
  x = jax.random.normal(KEY, (16, 4))
  found = jax.jit(lambda params: starts.correlation(model, x)(params))(params)
  hidden = [x, jnp.tanh(x @ params['layers'][0].T)]
  corr = lambda a, b: np.corrcoef(a.T, b.T)[:a.shape[1], a.shape[1]:]
  np.testing.assert_allclose(found['layers'][1], corr(hidden[1], hidden[1] @ params['layers'][1].T).T, atol=1e-4)
  last = jnp.tanh(hidden[1] @ params['layers'][1].T)
  y = last @ params['twice']
  both = corr(last, y) + corr(jnp.tanh(y), jnp.tanh(y) @ params['twice'])
  np.testing.assert_allclose(found['twice'], both / 2, atol=1e-4)
  image = np.asarray(jax.lax.conv_general_dilated(last.reshape(16, 2, 2, 1), params['taps'], (1, 1), 'SAME',
                                                  dimension_numbers=('NHWC', 'HWIO', 'NHWC')))
  centre = np.corrcoef(np.asarray(last).ravel(), image[..., 1].ravel())[0, 1]
  np.testing.assert_allclose(found['taps'][1, 1, 0, 1], centre, atol=1e-4)


@pytest.mark.parametrize('call, said', [
    (lambda: scores.modular(5)(jnp.ones((6, 4)), Signals(key=KEY, axes=AXES)), 'has 4 units along .* fewer than 5'),
    (lambda: scores.modular(2)(jnp.ones((6, 4)), Signals(key=KEY)), 'scores.modular: needs the axes of the leaf'),
    (lambda: scores.modular(0), 'at least 1'), (lambda: scores.smoothed(scores.value, 0.0, 0.5), 'between 0 and 1'),
    (lambda: scores.importance(-1.0), 'at least 0'), (lambda: scores.importance(1.0)(LLR, Signals()), 'needs the grad'),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
