"""Checks leaves that follow others: masks of followers under every recipe, what scores read of them, and refusals."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import flows, globs, recipes, scores, selections, states
from sparsejax.types import Axes, Signals

SHAPES = {'a': {'kernel': cases.F32((16, 4)), 'rho': cases.F32((16, 4)), 'bias': cases.F32((4,))},
          'stack': {'kernel': cases.F32((2, 8, 4)), 'bias': cases.F32((2, 4))}}
AXES = {'a/kernel': Axes((0,), (1,)), 'stack/kernel': Axes((1,), (2,), layer=(0,))}
TIED, STEPS = {'a/rho': 'a/kernel', '**/bias': '**/kernel'}, 6
# Selections with thresholds refuse `tied=`, and the others are tied as any leaf is.
THRESHOLDS = ('st3',)
make = functools.partial(sj.transforms.sparsify, optax.sgd(0.3), flows.hard(), axes=AXES)


def optimizer(name, **more):
  told = cases.read(name, axes=AXES, total_steps=STEPS)
  told = {key: value for key, value in told.items() if key != 'key' or name in cases.RANDOM}
  return recipes.TABLE[name](optax.sgd(0.3), **told | cases.OPTIONS.get(name, {}) | more)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('name', sorted({*recipes.TABLE} - {'dense', 'random_search', *THRESHOLDS}))
def test_followers_have_the_masks_of_their_leaders_which_choose_as_if_alone(name):
  """A leader sees no follower but by its memory, so that its masks are those of a run in which followers are dense."""
  start, grads = cases.random(0, like=SHAPES), cases.random(1, (STEPS,), SHAPES)
  run = lambda **more: jax.jit(functools.partial(cases.scanned, lambda: optimizer(name, **more)))(start, grads)
  (params, state), (_, points, masks) = run(tied=TIED)
  alone = cases.by_path(run(where=sj.trees.named('**/kernel'))[1][2])
  masks, points = cases.by_path(masks), cases.by_path(points)
  assert {leaf.path for leaf in states.find(state)[0].plan.leaves} == {*masks}
  np.testing.assert_array_equal(masks['a/kernel'], masks['a/rho'])
  np.testing.assert_array_equal(masks['a/kernel'].any(1), masks['a/bias'])
  np.testing.assert_array_equal(masks['stack/kernel'].any(2), masks['stack/bias'])
  if name not in cases.UNREAD and 'loss' not in cases.read(name):  # a start reads a gradient of all parameters
    np.testing.assert_array_equal(masks['a/kernel'], alone['a/kernel'])
  if cases.PROMISES.get(name, cases.Promise(zeros_from=None)).zeros_from == 0:
    assert not np.any(points['a/rho'][~masks['a/rho']]) and not np.all(masks['a/rho'])
    sj.check(params, state)


MEAN = jnp.array([.5, -.2, .1, 0, -1])
RHO = jnp.log(jnp.expm1(jnp.array([.1, .2, .4, .3, .5])))


@pytest.mark.parametrize('score, expected', [
    (scores.expected_magnitude, [.5, .233326, .329076, .239365, 1.008491]),
    (scores.snr, [5.000003, 1.459461, 1.324711, 1.323608, 2.089507])])
def test_scores_of_gaussian_weights_are_those_of_the_formula(score, expected):
  """The numbers are the published function's, in float64; SNR at mean 0 is the floor of 1.3236 at any deviation."""
  np.testing.assert_allclose(score(MEAN, Signals(stats=(RHO,))), expected, rtol=2e-6)
  sure = score(MEAN, Signals(stats=(jnp.full(5, -200.0),)))
  np.testing.assert_allclose(sure, jnp.abs(MEAN) if score is scores.expected_magnitude else [
      np.inf if m else np.nan for m in MEAN])
  assert np.isnan(score(MEAN.at[1].set(jnp.nan), Signals(stats=(RHO,)))[1])
  with pytest.raises(ValueError, match=f'scores.{score.__name__}: needs the leaf `rho`'):
    score(MEAN, Signals(stats=scores.Movement(MEAN, None)))


def test_a_score_reads_the_follower_of_its_own_leaf():
  params = {'a': {'mean': jnp.full((2, 2), 0.5), 'rho': jnp.array([[1.0, -1], [0, -2]])}}
  tx = make(selections.leafwise('unstructured 0.5', score=scores.snr), axes=None, tied={'**/rho': '**/mean'},
            where=sj.trees.named('**/mean'))
  masks = sj.masks(params, tx.init(params))['a']
  assert masks['mean'].tolist() == masks['rho'].tolist() == [[False, True], [False, True]]


def test_the_follower_of_a_dense_leaf_is_dense_and_globs_rename_as_they_match():
  params = cases.random(0, like=SHAPES)
  masks = sj.masks(params, make(selections.leafwise('2:4'), where=sj.trees.named('a/kernel'), tied=TIED).init(params))
  assert masks['stack']['bias'].ndim == 0 and masks['a']['rho'].shape == (16, 4)
  for path, glob, other, renamed in (
      ('a/b/rho', '**/rho', '**/mean', 'a/b/mean'), ('rho', '**/rho', '**/mean', 'mean'),
      ('a/rho/b/c', 'rho/*/?', 'mean/*/?', 'a/mean/b/c'), ('a/rho', '/rho', '/mean', None), ('xrho', 'rho', 'm', None)):
    assert globs.renamed(path, glob, other) == renamed and globs.matches(glob, path) == (renamed is not None)


@pytest.mark.parametrize('tied, said', [
    ({'*/rhos': '*/kernel'}, "unknown path in `tied` '\\*/rhos'. Did you mean 'a/rho'"),
    ({'*/rho': '**/kernel'}, 'have different wildcards'),
    ({'*/rho': '*/mean'}, "parameter 'a/rho' of shape .*tied to 'a/mean', which is no parameter"),
    ({'*/bias': '*/rho', '*/rho': '*/kernel'}, "is tied to 'stack/rho', which is no parameter"),
    ({'a/bias': 'a/rho', 'a/rho': 'a/kernel'}, "tied to 'a/rho', which is tied to 'a/kernel'"),
    ({'a/rho': 'a/kernel', '*/rho': '*/bias'}, "tied to 'a/bias' and to 'a/kernel'"),
    ({'a/rho': 'a/rho'}, "tied to 'a/rho'. Tie it to one other"),
    ({'a/bias': 'stack/kernel', 'a/rho': 'a/kernel'},
     r'has neither that shape nor one entry for each output, \(2, 4\)'),
    ({'a/rho': 'stack/bias'}, "`where` picks 'a/rho', and not 'stack/bias', whose mask"),
    ({'a/rho': 3}, 'must be a mapping from globs to globs')])
def test_ties_that_cannot_hold_are_refused(tied, said):
  with pytest.raises(ValueError, match=said):
    make(selections.leafwise('2:4'), tied=tied).init(cases.random(0, like=SHAPES))


def test_a_selection_with_thresholds_takes_no_ties():
  with pytest.raises(ValueError, match='leave out tied='):
    optimizer('st3', tied=TIED)
