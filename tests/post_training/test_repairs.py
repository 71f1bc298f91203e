"""Compares repairs with the numbers that the authors' functions print, and checks the laws of every layer."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import calibration, hessians, recipes, scores
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.post_training import Chooser, Recipe, columns, net_trim, one_by_one, repairs, stack_of

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / 'golden' / 'post_training.json').read_text())
W, X = (np.asarray(GOLDEN[name], np.float32) for name in ('w', 'x'))
HALF, EACH = Unstructured(0.5), Unstructured(0.5, balanced=True)


def statistic(x, kind=calibration.gram):
  """Returns the statistic of batches `[batches, T, K]`."""
  return functools.reduce(calibration.add, [kind(calibration.Rows(jnp.asarray(rows)[None])) for rows in x])


def solved(recipe, w=W, x=X, kept=None):
  """Returns the pruned stack of one matrix `[R, K]`, or of a stack of them."""
  stats = statistic(x, recipe.statistic) if recipe.statistic else None
  sparsity = recipe.pattern.sparsity if recipe.sparsity is None else recipe.sparsity
  stack = stack_of(jnp.asarray(w).reshape(-1, *w.shape[-2:]), None if kept is None else jnp.asarray(kept)[None])
  return recipe.solve(stack, Chooser(recipe.pattern, sparsity), stats)


def repaired(pattern, *fixes, score=None, kind=calibration.gram, **at):
  return solved(Recipe(pattern, None, score, kind, fixes), **at)


def error(w, dense=W, x=X):
  """Returns the squared change of the output, relative to the dense output."""
  rows = np.asarray(x, np.float64).reshape(-1, dense.shape[-1])
  return np.sum(np.square((np.float64(w) - dense) @ rows.T)) / np.sum(np.square(np.float64(dense) @ rows.T))


def text(mask):
  return '/'.join(''.join('01'[int(kept)] for kept in row) for row in np.asarray(mask).reshape(-1, mask.shape[-1]))


@pytest.mark.parametrize('name', GOLDEN['wanda'])
def test_wanda_keeps_what_the_authors_keep(name):
  recipe = recipes.wanda(pattern=NM(2, 4)) if ':' in name else recipes.wanda(float(name) if name == '0.5' else 0.25)
  stack, (mask, loss) = solved(recipe), GOLDEN['wanda'][name]
  assert text(stack.mask) == mask  # the authors round 0.3 of 8 weights down to 2
  assert error(stack.w[0]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize('name', GOLDEN['sparsegpt'])
def test_sparsegpt_is_the_authors_at_an_exact_count(name):
  pattern, block = ('2:4', 4) if ':' in name else (HALF, int(name.split()[-1]))
  stack, (w, loss) = solved(recipes.sparsegpt(pattern=pattern, block=block)), GOLDEN['sparsegpt'][name]
  np.testing.assert_allclose(stack.w[0], w, atol=5e-6)
  assert error(stack.w[0]) == pytest.approx(loss, rel=2e-4)
  assert text(stack.mask) == text(np.asarray(w) != 0)


@pytest.mark.parametrize('name', GOLDEN['exact_obs'])
def test_exact_obs_is_the_authors(name):
  pattern = {'2:4': NM(2, 4), '2x1': Block((2, 1), 0.5)}.get(name) or Unstructured(float(name))
  stack, (w, loss) = solved(recipes.exact_obs(pattern=pattern, damping=0)), GOLDEN['exact_obs'][name]
  np.testing.assert_allclose(stack.w[0], w, atol=1e-5)
  assert error(stack.w[0]) == pytest.approx(loss, rel=1e-3)


def test_the_losses_of_a_row_are_the_authors_and_add_up_to_its_error():
  gram = statistic(X).gram
  factor, gram = hessians.inverse_factor(gram, 0.0), gram[0]
  removal = one_by_one.removals(jnp.asarray(W), jnp.ones(W.shape, bool), factor.upper.T @ factor.upper)
  losses = removal.losses * jnp.mean(jnp.diagonal(gram))
  np.testing.assert_allclose(losses, GOLDEN['losses'], rtol=2e-4, atol=2e-6)
  hessian = hessians.damped(gram, 0.0)
  for steps in (1, 4, 7):
    w = one_by_one.best_weights(jnp.asarray(W), removal.step >= steps, hessian)
    change = np.float64(w) - W
    whole = np.einsum('rk,kl,rl->r', change, np.float64(gram), change) / 2
    np.testing.assert_allclose(np.sum(np.asarray(losses)[:, :steps], 1), whole, rtol=1e-3)


def test_a_greedy_mask_is_exact_at_each_step_and_not_the_best():
  case = GOLDEN['greedy is not the best mask (own)']
  w, x = (np.asarray(case[name], np.float32) for name in 'wx')
  stack = solved(recipes.exact_obs(0.5, damping=0), w, x)
  np.testing.assert_allclose(stack.w[0], case['greedy'], atol=2e-5)
  loss = np.sum(np.square((np.asarray(stack.w[0]) - w) @ x[0].T))
  assert loss == pytest.approx(case['loss'], rel=1e-4) and loss > case['best loss']


def test_obq_rounds_like_the_authors():
  stack, (w, loss) = repaired(Unstructured(0.0), repairs.rounding(repairs.Grid(3), damping=0)), GOLDEN['obq']
  np.testing.assert_allclose(stack.w[0], w, atol=5e-6)
  assert error(stack.w[0]) == pytest.approx(loss, rel=2e-3)


@pytest.mark.parametrize('make', [lambda: recipes.obc(0.5, bits=3), lambda: recipes.sparsegpt(
    0.5, quantize=repairs.Grid(3))], ids=['one by one', 'columns'])
def test_rounding_lands_on_the_grid_and_zeros_stay_zeros(make):
  stack = solved(make())
  w = np.asarray(stack.w[0])
  assert np.array_equal(w[~np.asarray(stack.mask[0])].view(np.int32), np.zeros(12, np.int32))  # +0.0
  for row in w:
    assert len(np.unique(np.abs(row))) <= 8 and error(w) < 0.1


@pytest.mark.parametrize('name', GOLDEN['dsnot on |x|'])
def test_dsnot_swaps_like_the_authors(name):
  kind, cycles = name.split()
  fix = repairs.swaps(int(cycles), threshold=0.1 / 8, guard=kind != 'free')  # of a token; the sequences have 8
  pattern = NM(2, 4) if kind == '2:4' else EACH
  stack = repaired(pattern, fix, score=scores.wanda, kind=calibration.moments, x=np.abs(X))
  assert text(stack.mask) == GOLDEN['dsnot on |x|'][name]
  assert np.array_equal(stack.w, np.where(stack.mask, W, 0))


def test_dsnot_with_its_guard_lowers_both_errors():
  case = GOLDEN['dsnot']
  w, x = (np.asarray(case[name], np.float32) for name in 'wx')
  before, after = (solved(make(0.5), w, x) for make in (recipes.wanda, recipes.dsnot))
  assert [text(before.mask), text(after.mask)] == case['masks']
  off = [np.sum(np.where(stack.mask[0], 0, w) * x.mean((0, 1)), 1) * 3 for stack in (before, after)]
  np.testing.assert_allclose(off, case['mean errors'], atol=1e-3)
  ratio = error(after.w[0], w, x) / error(before.w[0], w, x)
  assert ratio == pytest.approx(case['squared errors'][1] / case['squared errors'][0], rel=1e-4)


@pytest.mark.parametrize('kind', ['relu', 'linear'])
def test_net_trim_is_the_authors(kind):
  case = GOLDEN['net_trim']
  w, x = (jnp.asarray(case[name], jnp.float32) for name in 'wx')
  y = w.T @ x
  if kind == 'relu':
    v = net_trim.trimmed(w, x, 0.2 * jnp.linalg.norm(jnp.maximum(y, 0)), inactive=y <= 1e-6)
  else:
    v = net_trim.trimmed(w, jnp.linalg.cholesky(x @ x.T), 0.2 * jnp.linalg.norm(y))  # a square root will do
  np.testing.assert_allclose(v, case[kind], atol=5e-5)


PATTERNS = [Unstructured(0.6), Unstructured(0.6, balanced=True), NM(1, 4), Block((4, 1), 0.5), Block((2, 3), 0.5),
            Channel(0.5)]
FIXES = {'columns': repairs.columns(8), 'greedy': repairs.greedy(), 'convex': repairs.convex(iterations=50)}


def drawn(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wide():
  """Returns a matrix [6, 20] and rows [64, 20] of unequal, dependent inputs, of which one is dead."""
  x = drawn(1, 64, 20) @ (drawn(2, 20, 20) / 2 + np.diag(np.exp(drawn(3, 20))))
  x[:, 5] = 0
  return drawn(0, 6, 20), x[None]


@pytest.mark.sampled(6)
@pytest.mark.parametrize('pattern', PATTERNS, ids=str)
@pytest.mark.parametrize('name', FIXES)
def test_counts_are_exact_and_zeros_are_not_revived(name, pattern):
  w, x = wide()
  if name == 'greedy' and (pattern.group[1] > 1 or isinstance(pattern, Channel)):
    with pytest.raises(ValueError, match=r'repairs.greedy: a unit of .* Use repairs.columns'):
      repaired(pattern, FIXES[name], w=w, x=x)
    return
  stack = repaired(pattern, FIXES[name], w=w, x=x)
  assert int(stack.mask.sum()) == int(pattern(jnp.asarray(w).T).sum())
  if isinstance(pattern, NM):  # in each group, also where K is no multiple of the block
    assert (np.asarray(stack.mask).reshape(-1, pattern.m).sum(1) == pattern.n).all()
  assert not np.any(np.asarray(stack.w)[~np.asarray(stack.mask)]) and np.isfinite(stack.w).all()
  # Weights that were pruned before are among the zeros, and where these suffice they are all of them.
  kept = np.asarray(stack.mask[0])
  again = repaired(pattern, FIXES[name], w=w, x=x, kept=kept)
  assert np.array_equal(again.mask[0], kept) and not np.any(np.asarray(again.w[0])[~kept])


def test_zeros_of_before_count_among_those_that_are_asked():
  w, x = wide()
  kept = np.ones(w.shape, bool)
  kept[:2, :9] = False  # most of them in the first block of columns
  for fix in (repairs.columns(8), repairs.greedy()):
    stack = repaired(HALF, fix, w=w, x=x, kept=kept)
    assert int(stack.mask.sum()) == 60 and not np.any(np.asarray(stack.mask[0]) & ~kept)
  kept = np.ones(W.shape, bool)
  kept[0, :3] = False  # three of a group, of which 2:4 asks for two
  stack = repaired(NM(2, 4), repairs.columns(), kept=kept)
  assert not np.any(np.asarray(stack.mask[0]) & ~kept) and int(stack.mask.sum()) == 11


def test_errors_are_spread_alike_by_products_of_any_width(monkeypatch):
  w, x = wide()
  factor = hessians.inverse_factor(statistic(x).gram, 0.01)
  sweep = columns.Sweep(4, 4, lambda scores, start: scores > 0.5)
  whole = columns.swept(jnp.asarray(w), factor.reversed, sweep)
  monkeypatch.setattr(columns, '_WIDE', 8)  # K = 20 is no multiple
  for one, other in zip(whole, columns.swept(jnp.asarray(w), factor.reversed, sweep)):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_factor_by_tiles_is_the_inverse_of_the_hessian(monkeypatch):
  gram = statistic(wide()[1]).gram[:, :19, :19]  # a shape that no other test compiles
  monkeypatch.setattr(hessians, '_BLOCK', 8)
  factor = hessians.inverse_factor(gram, 0.0)
  assert np.asarray(factor.dead).tolist() == [i == 5 for i in range(19)] and int(factor.raised) == 0
  inverse = np.float64(factor.upper).T @ np.float64(factor.upper)
  np.testing.assert_allclose(inverse @ np.float64(hessians.damped(gram[0], 0.0)), np.eye(19), atol=1e-3)


def test_least_squares_is_the_optimum_of_its_mask_and_repairs_never_do_worse_than_it():
  w, x = wide()
  for pattern in (EACH, NM(2, 4)):
    plain = repaired(pattern, score=scores.wanda, w=w, x=x)
    best = repaired(pattern, repairs.least_squares(damping=1e-6), score=scores.wanda, w=w, x=x)
    swept = repaired(pattern, repairs.columns(8, damping=1e-6), score=scores.wanda, w=w, x=x)
    assert np.array_equal(plain.mask, swept.mask) and np.array_equal(plain.mask, best.mask)
    optimum = np.zeros(w.shape)
    for row, (dense, mask) in enumerate(zip(w, np.asarray(best.mask[0]))):
      optimum[row, mask] = np.linalg.lstsq(np.float64(x[0])[:, mask], np.float64(x[0]) @ dense, rcond=1e-9)[0]
    least = error(optimum, w, x)
    assert least <= error(best.w[0], w, x) <= least * 1.001 + 1e-9
    assert error(best.w[0], w, x) < error(swept.w[0], w, x) < error(plain.w[0], w, x)


def layers():
  """Returns eight layers [8, 24, 16] with unequal inputs, calibration rows [8, 4096, 16] and held-out rows."""
  mix = drawn(7, 8, 16, 16) * 0.3 + np.exp(1.2 * drawn(8, 8, 16))[:, None] * np.eye(16, dtype=np.float32)
  rows = lambda seed, tokens: np.maximum(drawn(seed, 8, tokens, 16) @ mix + np.abs(drawn(9, 8, 1, 16)), 0)
  return drawn(10, 8, 24, 16), rows(11, 4096), rows(12, 256)


@pytest.mark.parametrize('sparsity', [0.5, 0.7])
def test_the_order_of_mean_errors_on_held_out_rows(sparsity):
  w, x, held_out = layers()
  means = []
  for name in ('exact_obs', 'sparsegpt', 'dsnot', 'wanda', 'magnitude'):
    recipe = recipes.POST_TRAINING[name](sparsity)
    stats = recipe.statistic and recipe.statistic(calibration.Rows(jnp.asarray(x)))
    stack = recipe.solve(stack_of(jnp.asarray(w)), Chooser(recipe.pattern, sparsity), stats)
    means.append(np.mean([error(*layer) for layer in zip(stack.w, w, held_out)]))
  assert means == sorted(means) and len({*means}) == 5


def test_a_hessian_without_a_factor_is_damped_more_and_says_so():
  few = X[:1, :3]  # three rows, eight inputs
  stack = solved(recipes.sparsegpt(0.5, damping=0), x=few)
  assert int(stack.raised[0]) > 0 and 0 < float(stack.damping[0]) <= 1 and np.isfinite(stack.w).all()
  assert error(stack.w[0], x=few) < error(solved(recipes.magnitude(0.5)).w[0], x=few)
  stack = solved(recipes.sparsegpt(0.5), x=few)
  assert int(stack.raised[0]) == 0 and float(stack.damping[0]) == pytest.approx(0.01)
  broken = np.where(np.arange(8) == 3, np.nan, X)
  assert np.isnan(solved(recipes.sparsegpt(0.5), x=broken).damping[0])


def test_dead_inputs_are_pruned_first_and_matter_to_no_other():
  dead = np.where(np.arange(8) == 2, 0, X)
  stack = solved(recipes.sparsegpt(0.5), x=dead)
  assert int(stack.mask.sum()) == 12 and not np.any(stack.mask[0, :, 2])
  others = np.arange(8) != 2
  without = solved(recipes.sparsegpt(sparsity=9 / 21), W[:, others], dead[..., others])
  np.testing.assert_allclose(stack.w[0][:, others], without.w[0], atol=1e-5)


def test_matrices_of_one_stack_are_repaired_like_each_by_itself():
  w, _ = wide()
  w = np.stack([w, drawn(5, *w.shape)])
  for rows in (drawn(6, 2, 64, 20), drawn(6, 1, 64, 20)):  # with inputs of their own, and with common inputs
    both = Recipe(HALF, None, None, calibration.gram, (FIXES['columns'],)).solve(
        stack_of(jnp.asarray(w)), Chooser(HALF, 0.5), calibration.gram(calibration.Rows(jnp.asarray(rows))))
    alone = repaired(HALF, FIXES['columns'], w=w[1], x=rows[-1:])
    np.testing.assert_allclose(both.w[1], alone.w[0], atol=1e-5)


@pytest.mark.parametrize('make, message', [
    (lambda: repaired(NM(2, 8), repairs.columns(4)), 'block=4 would divide a group of 2:8. Use a multiple of 8, say 8'),
    (lambda: repaired(HALF, repairs.columns(), kind=calibration.moments), 'columns: needs the Gram matrix'),
    (lambda: repaired(EACH, repairs.swaps(), score=scores.wanda), 'swaps: needs the means and variances'),
    (lambda: repaired(Block((2, 1), 0.5), repairs.swaps(), score=scores.wanda, kind=calibration.moments),
     'swaps: 2x1 0.5 prunes several weights together'),
    (lambda: repairs.columns(block=0), '`block` must be a whole number, at least 1'),
    (lambda: repairs.columns(damping=-1), '`damping` must be a number from 0 to 1'),
    (lambda: repairs.columns(quantize=4), '`quantize` must be a grid'),
    (lambda: recipes.ecoflap({'a': 1.0}, pattern=Unstructured()), 'recipes.ecoflap: what is shared out'),
    (lambda: recipes.ecoflap({'a': 1.0}, pattern=NM(2, 4)), '2:4 keeps the same fraction of every leaf'),
    (lambda: recipes.sparsegpt(blocks=3), "unknown argument 'blocks'. Did you mean 'block'"),
])
def test_refusals_name_the_repair_and_the_remedy(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_recipes_of_pruning_are_named_as_in_their_table():
  assert recipes.TABLES['prune'] is recipes.POST_TRAINING
  needs = {'ecoflap': ({'a': 1.0},)}
  assert [recipe(*needs.get(name, ())).name for name, recipe in recipes.POST_TRAINING.items()] == [
      *recipes.POST_TRAINING]
  assert recipes.dsnot() == recipes.dsnot() and hash(recipes.sparsegpt()) == hash(recipes.sparsegpt())


def test_a_chooser_without_a_sparsity_takes_that_of_the_pattern():
  values, among = jnp.arange(24.0).reshape(1, 4, 6), jnp.ones((1, 4, 6), bool)
  for part in (None, slice(0, 4)):
    chosen = [Chooser(HALF, asked)(values[..., part or slice(0, 6)], among[..., part or slice(0, 6)], part)
              for asked in (None, HALF.sparsity)]
    np.testing.assert_array_equal(*chosen)


def test_float64_weights_are_solved_in_float64():
  with jax.enable_x64(True):
    w, x = jnp.asarray(W[0] if W.ndim > 2 else W, jnp.float64).T, jnp.asarray(X, jnp.float64).reshape(-1, W.shape[-1])
    recipe = recipes.wanda(0.5).then(repairs.least_squares(damping=0.0))
    recipe = dataclasses.replace(recipe, statistic=calibration.gram)
    out = sj.prune(lambda p, x: x @ p['w'], {'w': w}, [x], recipe, where=sj.trees.named('w'))
    found, kept = np.asarray(out.params['w']), np.asarray(out.masks['w'])
  assert found.dtype == np.float64
  for j in range(w.shape[1]):
    own = kept[:, j]
    best = np.linalg.lstsq(np.asarray(x)[:, own], np.asarray(x) @ np.asarray(w)[:, j], rcond=None)[0]
    np.testing.assert_allclose(found[own, j], best, rtol=1e-9)
