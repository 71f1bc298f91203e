"""The N:M recipes on small inputs, against numbers of the published code and of the papers' formulas.

Where a comment says [run], the number was printed by the authors' own functions: PGF is their PyTorch repository at
4ee44a4, NM-sparsity that of SR-STE at 3cebd6b, stthree that of ST-3 at cc115c5, AQT google/aqt at 9d1667e. [derived]:
worked out from the formula. They give matrices as (out, in). Everything goes through `init`, `update` and
`apply_updates`, with `optax.sgd(1.0)` where the gradient that reaches the master is to be read off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparsejax as sj
from sparsejax import flows, metrics, recipes, schedules
from sparsejax.recipes import n_m
from sparsejax.types import Axes

W = np.float32([[3, -1, 2, -4], [0.5, -2, 1.5, 1], [-0.25, 0.75, -1.25, 0.1], [2.5, -0.6, 0.9, -1.1]])
G = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
# [run] PGF and NM-sparsity on W. ROW groups lie along `in`, which is contracted; COL along `out`.
ROW = np.bool_([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
COL = np.bool_([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
ROW_1_4 = np.bool_([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
SGD = optax.sgd(1.0)


class Held:
  """A matrix (out, in) as a model holds it: a Flax `kernel` is (in, out), an Equinox `weight` is (out, in)."""

  def __init__(self, name):
    self.name, self.turn = name, (lambda w: w.T) if name == 'kernel' else (lambda w: w)

  def params(self, w):
    return {'layer': {self.name: jnp.asarray(self.turn(w)), 'bias': jnp.zeros(4)}}

  def matrix(self, tree):
    return self.turn(np.asarray(tree['layer'][self.name]))


@pytest.fixture(params=['kernel', 'weight'])
def layout(request):
  return Held(request.param)


def after(tx, params, grads, steps=1):
  """Parameters and state after so many updates with the same gradient."""
  def update(_, carry):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def run(params):
    state = tx.init(params)
    return jax.lax.fori_loop(0, steps, update, (sj.project(params, state), state))

  return run(params)


def pulled_back(tx, layout, steps_before=0):
  """What `tx` makes of the gradient G for the master, with SGD at rate 1: the master before less the master after."""
  params, state = after(tx, layout.params(W), layout.params(np.zeros_like(W)), steps_before)
  _, later = jax.jit(tx.update)(layout.params(G), state, params)
  return layout.matrix(state.master) - layout.matrix(later.master)


def masks_of(recipe, layout, *args, **kwargs):
  tx = recipe(SGD, *args, **kwargs)
  return layout.matrix(sj.masks(layout.params(W), jax.jit(tx.init)(layout.params(W))))


@pytest.mark.sampled(8)
@pytest.mark.parametrize('recipe', [recipes.ste, recipes.sr_ste, recipes.asp, recipes.bdwp])
@pytest.mark.parametrize('pattern, mask', [(sj.NM(2, 4), ROW), (sj.NM(1, 4), ROW_1_4)])
def test_masks_group_along_the_reduction(recipe, pattern, mask, layout):
  np.testing.assert_array_equal(masks_of(recipe, layout, pattern), mask)
  tx = recipe(SGD, pattern)
  params = layout.params(W)
  np.testing.assert_array_equal(layout.matrix(sj.project(params, jax.jit(tx.init)(params))), W * mask)


def test_masks_group_along_the_outputs_if_told_so_and_sad_counts_the_difference(layout):
  axis = 0 if layout.name == 'weight' else 1
  turned = {f'layer/{layout.name}': Axes((axis,), (1 - axis,))}
  col = masks_of(recipes.ste, layout, sj.NM(2, 4), axes=turned)
  np.testing.assert_array_equal(col, COL)
  # [run] SAD(ROW, COL) = 4, as PGF's SAD_L1 and Zhou et al.'s ||m_j - m_i||_1.
  assert metrics.sad({'w': jnp.asarray(ROW)}, {'w': jnp.asarray(col)})['w'] == (4.0, 0.25)


def test_ties_are_kept_from_the_lower_index():
  """praxis keeps the lowest index (top_k of |w|); AQT [run] prunes it: 3:4 on [1, 2, 1, 4] is [0, 1, 1, 1] there."""
  tx = recipes.ste(SGD, sj.NM(3, 4))
  mask = sj.masks(params := {'kernel': jnp.asarray([[1.0], [2.0], [1.0], [4.0]])}, jax.jit(tx.init)(params))['kernel']
  np.testing.assert_array_equal(mask[:, 0], [True, True, False, True])


def test_convolutions_group_input_channels_at_each_tap():
  """[run] PGF, SR-STE since 2021-03-28: OIHW (1, 4, 1, 2), channel c = [c + 1, 8 - c]."""
  w = np.float32([[c + 1, 8 - c] for c in range(4)]).reshape(1, 4, 1, 2)
  kept = np.bool_([[0, 1], [0, 1], [1, 0], [1, 0]])
  params = {'conv_oihw': {'weight': jnp.asarray(w)}, 'conv_hwio': {'kernel': jnp.asarray(w.transpose(2, 3, 1, 0))}}
  masks = sj.masks(params, jax.jit(recipes.ste(SGD, sj.NM(2, 4)).init)(params))
  np.testing.assert_array_equal(masks['conv_oihw']['weight'][0, :, 0], kept)
  np.testing.assert_array_equal(masks['conv_hwio']['kernel'][0, :, :, 0].T, kept)


# What reaches the master of G at the sparse point. PGF and SR-STE [run], row 1 of SR-STE: [5.0001, 6, 7, 8.0002].
REFINED = G + np.float32(2e-4) * np.where(ROW, 0, W)
GRADIENTS = {
    'ste': (recipes.ste(SGD), G),
    'sr_ste': (recipes.sr_ste(SGD), REFINED),
    'bdwp': (recipes.bdwp(SGD, sj.NM(2, 4)), G),
    # [run] PGF's Step/Linear/ExponentialDecay give G whole; AQT [code] and the abstract scale it by beta.
    'mdgf scaled, t=0': (recipes.mdgf(SGD, decay=schedules.linear(end=1000), gradient='scaled'), G),
    'mdgf straight_through': (recipes.mdgf(SGD, decay=schedules.constant(0.75), gradient='straight_through'), G),
    'mdgf scaled, beta .75': (recipes.mdgf(SGD, decay=schedules.constant(0.75), gradient='scaled'),
                              G * np.where(ROW, 1, 0.75)),
    'mdgf scaled, beta 0': (recipes.mdgf(SGD, decay=schedules.constant(0.0), gradient='scaled'), G * ROW),
    'sdgf straight_through': (recipes.sdgf_geometric(SGD, k=1, total_steps=10), G),
    'sdgf scaled': (recipes.sdgf_geometric(SGD, k=1, total_steps=10, gradient='scaled'), G * ROW),
    'st3': (recipes.st3(SGD, 0.5, ramp_steps=1), G),
    'st3 sigma': (recipes.st3(SGD, 0.5, sigma=True, ramp_steps=1), G),
}


@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients_that_reach_the_master(name):
  (tx, expected), layout = GRADIENTS[name], Held('kernel')
  np.testing.assert_allclose(pulled_back(tx, layout), expected, rtol=0, atol=2e-6)


def test_sr_ste_to_the_printed_digits(layout):
  found = pulled_back(recipes.sr_ste(SGD, sj.NM(2, 4), decay=2e-4), layout)[1]
  np.testing.assert_allclose(found, [5.0001, 6, 7, 8.0002], atol=1e-6)  # [run] NM-sparsity, PGF


def test_sr_ste_decoupled_decays_after_the_step(layout):
  """[derived] W - G, and those pruned then, by its own mask, lose rate * decay of themselves."""
  tx = recipes.sr_ste(SGD, decay=0.1, decoupled=True, learning_rate=0.5)
  _, state = after(tx, layout.params(W), layout.params(G))
  kept = layout.matrix(state.masks)
  assert np.any(kept != ROW)
  np.testing.assert_allclose(layout.matrix(state.master), (W - G) * np.where(kept, 1, 0.95), rtol=1e-6)


def test_asp_masks_the_gradient_and_stores_nothing(layout):
  """[derived] m (W - G), and the mask of W stays although W - G is largest elsewhere."""
  params, state = after(recipes.asp(SGD), layout.params(W), layout.params(G))
  np.testing.assert_allclose(layout.matrix(params), (W - G) * ROW, rtol=1e-6)
  assert not jax.tree.leaves(state.master)


FADED = [
    # [run] PGF, 2:4 ROW: linear c = 1e-3 at t = 250 (beta .75), exponential c = 1e-4 at t = 5000 (beta .606531).
    (schedules.linear(end=1000), 250, [0.375, -2, 1.5, 0.75]),
    (schedules.exponential(1e-4), 5000, [0.30327, -2, 1.5, 0.60653]),
    # [run] AQT, linear decay w = .1: pruned x .7 at k = 3, 0 at k = 10.
    (schedules.linear(end=10), 3, [0.35, -2, 1.5, 0.7]),
    (schedules.linear(end=10), 10, [0, -2, 1.5, 0]),
    (schedules.linear(end=10), 11, [0, -2, 1.5, 0]),
]


@pytest.mark.parametrize('decay, t, row', FADED)
def test_mdgf_fades_what_is_pruned(decay, t, row, layout):
  tx = recipes.mdgf(SGD, sj.NM(2, 4), decay=decay)
  params, _ = after(tx, layout.params(W), layout.params(np.zeros_like(W)), t)
  np.testing.assert_allclose(layout.matrix(params)[1], row, atol=1e-5)


def test_mdgf_timescales():
  """[derived] from the shipped coefficients: YAML 8e-4 and CLI default 2e-4 linear, YAML 1e-4 exponential."""
  linear, exponential = schedules.linear(end=1250), schedules.exponential(1e-4)
  assert linear(1249) > 0 == linear(1250)
  np.testing.assert_allclose(linear(1), 1 - 8e-4, rtol=1e-6)
  np.testing.assert_allclose([exponential(6931), exponential(46052)], [0.5, 0.01], rtol=1e-4)
  defaults = recipes.mdgf.__kwdefaults__['decay']
  assert defaults(4999) > 0 == defaults(5000)


def points(tx, params, steps):
  """The parameters at steps 0, 1, ... as the forward pass sees them, under zero gradients, `[steps, ...]` each."""
  grads = jax.tree.map(jnp.zeros_like, params)

  def step(carry, _):
    params, state = carry
    updates, later = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), later), params

  @jax.jit
  def run(params):
    state = tx.init(params)
    return jax.lax.scan(step, (sj.project(params, state), state), length=steps)[1]

  return run(params)


def test_mdgf_counts_from_the_end_of_the_dense_phase(layout):
  """t = step - dense, dense before, binary in all of the last steps: PGF starts at .99 of it, and ends one late."""
  tx = recipes.mdgf(SGD, decay=schedules.exponential(0.1), dense_steps=4, fine_tune_steps=1, total_steps=10)
  found = points(tx, layout.params(W), 12)['layer'][layout.name]
  for step, held in enumerate(found):
    beta = 1 if step < 4 else 0 if step >= 9 else np.exp(-0.1 * (step - 4))
    expected = W * np.where(ROW, 1, beta)
    np.testing.assert_allclose(layout.turn(np.asarray(held)), expected, rtol=1e-6, err_msg=f'step {step}')


# [run] PGF, train.py's tables at 350 epochs, no dense and no fine-tune ones: (N, M, first epoch).
STEPWISE = {
    '2:4': [(3, 4, 0), (2, 4, 175)],
    '1:4': [(3, 4, 0), (2, 4, 116), (1, 4, 233)],
    '1:8': [(7, 8, 0), (4, 8, 87), (2, 8, 175), (1, 8, 262)],
    '1:16': [(15, 16, 0), (8, 16, 70), (4, 16, 140), (2, 16, 210), (1, 16, 280)],
    '1:32': [(31, 32, 0), (16, 32, 58), (8, 32, 116), (4, 32, 175), (2, 32, 233), (1, 32, 291)],
    '1:128': [(127, 128, 0), (64, 128, 43), (32, 128, 87), (16, 128, 131), (8, 128, 175), (4, 128, 218), (2, 128, 262),
              (1, 128, 306)],
    # [derived] PGF ends at 3:6, because it halves; the paper's method is to end at N:M.
    '2:6': [(5, 6, 0), (3, 6, 116), (2, 6, 233)],
}
GEOMETRIC = {
    '2:4': [(16, 32, 0), (8, 16, 87), (4, 8, 175), (2, 4, 262)],
    '1:4': [(8, 32, 0), (4, 16, 87), (2, 8, 175), (1, 4, 262)],
    '1:8': [(8, 64, 0), (4, 32, 87), (2, 16, 175), (1, 8, 262)],
    '1:16': [(8, 128, 0), (4, 64, 87), (2, 32, 175), (1, 16, 262)],
    '1:32': [(8, 256, 0), (4, 128, 87), (2, 64, 175), (1, 32, 262)],
    '1:128': [(8, 1024, 0), (4, 512, 87), (2, 256, 175), (1, 128, 262)],
}


def check_stages(recipe, table, total_steps, dense_steps=0, **options):
  """Runs all targets of a table at once, a leaf each, and compares every step's mask with the stage that is due."""
  rng = np.random.default_rng(0)
  lengths = {target: max(m for _, m, _ in stages) * 2 for target, stages in table.items()}
  params = {target: {'w': rng.permutation(n).astype(np.float32)[:, None] + 1} for target, n in lengths.items()}
  patterns = {f'{target}/w': sj.patterns.parse(target) for target in table}
  tx = recipe(SGD, patterns, total_steps=total_steps, dense_steps=dense_steps, **options)
  found = points(tx, params, total_steps)
  for target, stages in table.items():
    w, held = np.asarray(params[target]['w']), np.asarray(found[target]['w'])
    np.testing.assert_array_equal(held[:dense_steps], np.broadcast_to(w, (dense_steps, *w.shape)))
    ends = [start for _, _, start in stages[1:]] + [total_steps]
    for (n, m, start), end in zip(stages, ends):
      expected = np.where(oracle.n_of_m(w, n, m, (0,)), w, 0)
      np.testing.assert_array_equal(held[start:end], np.broadcast_to(expected, (end - start, *w.shape)),
                                    err_msg=f'{target}: {n}:{m} from step {start} to {end}')


def test_sdgf_stepwise_stages():
  check_stages(recipes.sdgf_stepwise, STEPWISE, 350)


def test_sdgf_geometric_stages():
  for target, stages in GEOMETRIC.items():
    assert n_m.geometric_stages(sj.patterns.parse(target), 8) == tuple(sj.NM(n, m) for n, m, _ in stages)
  # A branch for each group size takes long to compile; the start steps are the same for all six.
  check_stages(recipes.sdgf_geometric, {target: GEOMETRIC[target] for target in ('1:4', '1:128')}, 350)


def test_sdgf_stages_share_out_what_is_between_the_dense_and_the_fine_tune_phase():
  """[run] PGF, 350 epochs of which 35 dense and 35 fine-tune: the last stage goes on through the fine-tuning."""
  table = {'1:8': [(7, 8, 35), (4, 8, 105), (2, 8, 175), (1, 8, 245)]}
  check_stages(recipes.sdgf_stepwise, table, 350, 35, fine_tune_steps=35)
  table = {'1:8': [(8, 64, 35), (4, 32, 105), (2, 16, 175), (1, 8, 245)]}
  check_stages(recipes.sdgf_geometric, table, 350, 35, fine_tune_steps=35)


def test_sdgf_geometric_starts_where_k_says():
  """k = 16 is the order in PGF's README of the paper ("16:128 -> 8:64 -> 4:32 -> 2:16 -> 1:8"), 8 in its code."""
  assert [str(p) for p in n_m.geometric_stages(sj.NM(1, 8), 16)] == ['16:128', '8:64', '4:32', '2:16', '1:8']
  check_stages(recipes.sdgf_geometric, {'2:4': [(8, 16, 0), (4, 8, 10), (2, 4, 20)]}, 30, k=4)
  with pytest.raises(ValueError, match='k must be a power of two, not 3'):
    recipes.sdgf_geometric(SGD, k=3, total_steps=10).init({'w': jnp.zeros((96, 2))})


@pytest.mark.parametrize('m', [2, 3, 4, 5, 6, 7, 8, 10, 12, 24, 100, 128])
def test_sdgf_stepwise_falls_to_exactly_n_whatever_n_and_m(m):
  for n in range(1, m + 1):
    counts = [stage.n for stage in n_m.stepwise_stages(sj.NM(n, m))]
    assert counts == sorted(set(counts), reverse=True) and counts[-1] == n
    assert n == m or counts[0] == max(m - 1, n)


# [derived] mean density of the stages, and training cost relative to dense with the gradient of the weights dense:
# (2 rho + 1) / 3, for the stages and for constant N:M. BDWP: (2 N / M + 1) / 3.
COSTS = {
    '2:4': (0.6250, 0.750, 0.667), '1:4': (0.5000, 0.667, 0.500), '1:8': (0.4375, 0.625, 0.417),
    '1:16': (0.3750, 0.583, 0.375), '1:32': (0.3229, 0.549, 0.354), '1:128': (0.2480, 0.499, 0.339),
}


@pytest.mark.parametrize('target', COSTS)
def test_training_costs_relative_to_dense(target):
  density, stepwise, constant = COSTS[target]
  stages = n_m.stepwise_stages(sj.patterns.parse(target))
  mean = np.mean([stage.n / stage.m for stage in stages])
  np.testing.assert_allclose(mean, density, atol=5e-5)
  traced = sj.contractions(lambda p, x: x @ p['w'], {'w': jnp.zeros((128, 8))}, jnp.zeros((2, 128)))

  def relative(rho, input_gradient='sparse'):
    found = metrics.flops(traced, {'w': rho}, input_gradient=input_gradient)
    return found.training / found.dense_training, found.inference / found.dense_inference

  np.testing.assert_allclose(relative(mean), (stepwise, mean), atol=5e-4)
  pattern = sj.patterns.parse(target)
  np.testing.assert_allclose(relative(1 - pattern.sparsity), (constant, pattern.n / pattern.m), atol=5e-4)
  # Where hardware cannot use the transposed pattern only the forward pass is cheaper: (rho + 2) / 3.
  np.testing.assert_allclose(relative(mean, 'dense')[0], (mean + 2) / 3, rtol=1e-6)
  assert relative(1.0) == (1.0, 1.0)  # MdGf while beta > 0: every slot is multiplied


def test_bdwp_costs():
  traced = sj.contractions(lambda p, x: x @ p['w'], {'w': jnp.zeros((8, 8))}, jnp.zeros((2, 8)))
  for pattern, cost in ((sj.NM(2, 8), 0.50), (sj.NM(2, 4), 0.667)):  # [derived] per layer, dense 3 products
    found = metrics.flops(traced, {'w': 1 - pattern.sparsity})
    np.testing.assert_allclose(found.training / found.dense_training, cost, atol=5e-4)


# [run] stthree on W, p = .5: th = 1.05, the mask, s and two rows of q.
TH = 1.05
ST3_MASK = np.bool_([[1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
ST3_S = np.float32([1.10989, 1.42253, 1.86376, 1.41085])


def test_st3_threshold_mask_scale_and_point(layout):
  tx = recipes.st3(SGD, 0.5, ramp_steps=1)
  params, state = after(tx, layout.params(W), layout.params(np.zeros_like(W)))
  np.testing.assert_allclose(state.stats['layer'][layout.name], TH, rtol=1e-6)
  np.testing.assert_array_equal(layout.matrix(state.masks), ST3_MASK)
  q = layout.matrix(params)
  np.testing.assert_allclose(q[0], [2.1643, 0, 1.0544, -3.2742], atol=5e-5)
  np.testing.assert_allclose(q[3], [2.0457, 0, 0, -0.0705], atol=5e-5)
  shrunk = W - np.sign(W) * np.float32(TH)
  np.testing.assert_allclose([np.max(q[i][m] / shrunk[i][m]) for i, m in enumerate(ST3_MASK)], ST3_S, rtol=1e-5)
  np.testing.assert_array_equal(layout.matrix(state.master), W)


def test_st3_sigma_measures_each_leaf_in_units_of_its_dimensions():
  """[code] stthree: weights over std = 1 / sqrt(sum(shape)) before the quantile, th_layer = th std; numpy here."""
  rng = np.random.default_rng(0)
  shapes = {'a': (6, 4), 'conv_b': (3, 3, 5, 2)}
  w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  params = {name: {'kernel': jnp.asarray(x)} for name, x in w.items()}
  _, state = after(recipes.st3(SGD, 0.7, sigma=True, ramp_steps=1), params, jax.tree.map(jnp.zeros_like, params))
  std = {name: 1 / np.sqrt(sum(shape)) for name, shape in shapes.items()}
  th = np.quantile(np.concatenate([np.abs(w[name]).reshape(-1) / std[name] for name in shapes]), 0.7)
  for name in shapes:
    np.testing.assert_allclose(state.stats[name]['kernel'], th * std[name], rtol=1e-5)
    np.testing.assert_array_equal(state.masks[name]['kernel'], np.abs(w[name]) > th * std[name])


def test_st3_ramps_up_cubically_and_ends_as_asked():
  """[derived] p at 25, 50, 75% of the ramp for .9: .520, .788, .886; 0 before the ramp, .9 after it."""
  w = np.random.default_rng(0).permutation(1001).astype(np.float32)[:, None] + 1
  tx = recipes.st3(SGD, 0.9, dense_steps=10, ramp_steps=100)
  held = np.asarray(points(tx, {'w': jnp.asarray(w)}, 130)['w'])
  np.testing.assert_array_equal(held[:11], np.broadcast_to(w, (11, 1001, 1)))
  pruned = np.mean(held == 0, axis=(1, 2))
  np.testing.assert_allclose(pruned[[35, 60, 85, 110, 129]], [0.520, 0.788, 0.886, 0.9, 0.9], atol=1.5e-3)


def test_st3_at_sparsity_zero_is_the_dense_weight():
  """[run] stthree: at ratio 0 the threshold is -1, and q = W with no shrinking and no scale."""
  tx = recipes.st3(SGD, 0.9, dense_steps=3, ramp_steps=5)
  params = {'w': jnp.asarray(W)}
  state = tx.init(params)
  assert state.stats['w'] == -1 and np.array_equal(sj.project(params, state)['w'], W)


def test_st3_fine_tuning_starts_from_the_point_and_masks_the_gradient():
  """[code] stthree, at n_epochs W := q, afterwards ordinary masked training."""
  tx = recipes.st3(SGD, 0.5, total_steps=3, fine_tune_steps=2)
  zeros, params = {'weight': jnp.zeros((4, 4))}, {'weight': jnp.asarray(W)}
  q, state = after(tx, params, zeros)
  # The user's copy is p + (q - p), an ulp of p away from q at most.
  np.testing.assert_allclose(state.master['weight'], q['weight'], atol=3e-7)
  np.testing.assert_allclose(q['weight'][0], [2.1643, 0, 1.0544, -3.2742], atol=5e-5)
  updates, state = jax.jit(tx.update)({'weight': jnp.asarray(G)}, state, q)
  tuned = optax.apply_updates(q, updates)['weight']
  np.testing.assert_allclose(tuned, np.asarray(q['weight']) - G * ST3_MASK, rtol=1e-5)


def test_bdwp_multiplies_forward_by_rows_and_backward_by_columns():
  """[derived] y = x (m_f W), dx = dy (m_b W)^T, dW = x^T dy straight through into W; the masks are ROW and COL."""
  kernel, x, dy = W.T, np.float32([[1, 2, 3, 4], [-1, 0, 2, 5]]), np.float32([[1, -1, 2, 0], [3, 1, 0, 2]])
  tx = recipes.bdwp(SGD, sj.NM(2, 4))
  params = {'kernel': jnp.asarray(kernel)}
  state = tx.init(params)
  held, backward = sj.project(params, state), sj.states.bdwp_backward(params, state)
  np.testing.assert_array_equal(backward['kernel'], kernel * COL.T)
  y, pull = jax.vjp(lambda x, w: flows.bidirectional(jnp.matmul)(x, w, backward['kernel']), x, held['kernel'])
  dx, dw = pull(jnp.asarray(dy))
  np.testing.assert_allclose(y, x @ (kernel * ROW.T), rtol=1e-6)
  np.testing.assert_allclose(dx, dy @ (kernel * COL.T).T, rtol=1e-6)
  np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-6)
  _, later = tx.update({'kernel': dw}, state, held)
  np.testing.assert_allclose(later.master['kernel'], kernel - x.T @ dy, rtol=1e-6)
