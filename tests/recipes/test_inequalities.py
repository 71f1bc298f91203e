"""What each method is for, as an inequality that defines it, on a small regression on a teacher, over several seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import metrics, recipes, schedules
from sparsejax.types import Axes

pytestmark = pytest.mark.usefixtures('standard_promotion')  # optax's Adam needs it
SEEDS = 3
NM = sj.NM(2, 4)


def drawn(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(seed):
  return {'up': {'kernel': drawn(seed, 16, 32) / 4, 'bias': np.zeros(32, np.float32)},
          'down': {'kernel': drawn(seed + 1, 32, 8) / 5}}


def predicted(params, x):
  return jnp.tanh(x @ params['up']['kernel'] + params['up']['bias']) @ params['down']['kernel']


def loss(params, x, teacher, scale):
  """Mean squared error from a dense teacher."""
  return scale * jnp.mean(jnp.square(predicted(params, x) - predicted(teacher, x)))


def train(tx, carry, batches, teacher, scale):
  """The last carry; at each step the point that the forward pass saw, its masks, the master and the loss there."""
  def step(carry, x):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, x, teacher, scale)
    updates, later = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), later), (params, state.masks, state.master, value)

  return jax.lax.scan(step, carry, batches)


def start(tx, params):
  state = tx.init(params)
  return sj.project(params, state), state


def problem(steps):
  """Parameters, batches of 16 and teachers, `[seed, ...]` each; a batch is a function of seed and step."""
  stack = lambda make: jax.tree.map(lambda *x: np.stack(x), *map(make, range(SEEDS)))
  batches = stack(lambda seed: drawn(100 + seed, 300, 16, 16)[:steps])
  return stack(lambda seed: model(10 * seed)), batches, stack(lambda seed: model(10 * seed + 5))


@functools.cache
def compiled(tx):
  run = lambda params, batches, teacher, scale: train(tx, start(tx, params), batches, teacher, scale)
  return jax.jit(jax.vmap(run, (0, 0, 0, None)))


def trained(tx, steps, scale=1.0):
  """Last parameters and state, and per step points, masks, masters `[seed, step, ...]` and losses."""
  return jax.tree.map(np.asarray, compiled(tx)(*problem(steps), np.float32(scale)))


def flips(masks):
  """Mask bits that change from one step to the next, in all, by seed."""
  return sum(np.sum(m[:, 1:] != m[:, :-1], axis=(1, 2, 3)) for m in jax.tree.leaves(masks))


def behind(state):
  """Sum of the absolute values behind the zeros, by seed."""
  pairs = zip(jax.tree.leaves(state.masks), jax.tree.leaves(state.master))
  return sum(np.sum(np.where(m, 0, np.abs(w)), axis=(1, 2)) for m, w in pairs)


def kernels(tree):
  return {path: leaf for path, leaf in zip(*sj.trees.flatten(tree)[:2]) if path.endswith('kernel')}


@functools.cache
def straight_through():
  return trained(recipes.ste(optax.sgd(0.3), NM), 300)


@functools.cache
def refined():
  return trained(recipes.sr_ste(optax.sgd(0.3), NM, decay=0.02), 300)


def test_sr_ste_flips_fewer_bits_than_ste_and_that_is_good_for_the_loss():
  """Zhou et al. 2021: the term is there to lower the sparse architecture divergence."""
  (_, masks, _, losses), (_, calmer, _, lower) = straight_through()[1], refined()[1]
  assert np.all(2 * flips(calmer) < flips(masks)) and np.all(flips(calmer) > 0)
  assert np.all(lower[:, -20:].mean(1) < 0.8 * losses[:, -20:].mean(1))


def test_sr_ste_shrinks_what_is_behind_the_zeros():
  assert np.all(2 * behind(refined()[0][1]) < behind(straight_through()[0][1]))


def test_adam_divides_the_published_term_away_and_not_the_decoupled_one():
  """Adam does not see the scale of the loss. The published term is divided by it, so a larger one leaves nothing."""
  published, decoupled = {}, {}
  for found, apart in ((published, False), (decoupled, True)):
    tx = recipes.sr_ste(optax.adam(0.01), NM, decay=0.01, decoupled=apart)
    found.update((scale, trained(tx, 150, scale)[0][1]) for scale in (1.0, 128.0))
  assert np.all(2 * behind(decoupled[128.0]) < behind(published[128.0]))
  assert np.all(1.5 * behind(published[1.0]) < behind(published[128.0]))
  np.testing.assert_allclose(behind(decoupled[1.0]), behind(decoupled[128.0]), rtol=0.01)


@pytest.mark.parametrize('gradient, moves', [('scaled', False), ('straight_through', True)])
def test_a_scaled_gradient_ends_with_the_decay_and_a_straight_one_does_not(gradient, moves):
  tx = recipes.mdgf(optax.sgd(0.1), NM, decay=schedules.constant(0.0), gradient=gradient)
  _, (_, masks, masters, _) = trained(tx, 20)
  for path, mask in kernels(masks).items():
    never_kept = ~mask.any(1)
    first, last = kernels(masters)[path][:, 0], kernels(masters)[path][:, -1]
    assert never_kept.sum() > 100
    assert np.all((first != last)[never_kept] == moves), path


DENSE, TUNE, TOTAL = 10, 10, 40
PHASES = {'dense_steps': DENSE, 'fine_tune_steps': TUNE, 'total_steps': TOTAL}
RECIPES = {
    'ste': (recipes.ste, {}),
    'sr_ste decoupled': (recipes.sr_ste, {'decay': 0.02, 'decoupled': True}),
    'asp': (recipes.asp, {}),
    'mdgf exponential': (recipes.mdgf, {'decay': schedules.exponential(0.1), 'gradient': 'scaled'}),
    'sdgf_stepwise': (recipes.sdgf_stepwise, {}),
    'sdgf_geometric': (recipes.sdgf_geometric, {'k': 4}),
    'st3': (recipes.st3, {'sparsity': 0.5}),
}


def inner():
  return optax.sgd(0.1, momentum=0.9)


@functools.cache
def in_phases(name):
  """One run of a recipe through its dense, its sparse and its fine-tune phase."""
  recipe, arguments = RECIPES[name]
  pattern = {} if name == 'st3' else {'pattern': NM}
  return trained(recipe(inner(), **pattern, **arguments, **PHASES), TOTAL)


@functools.cache
def without_sparsity():
  return trained(recipes.dense(inner()), TOTAL)


@pytest.mark.parametrize('name', RECIPES)
def test_the_dense_phase_is_the_optimizer_alone(name):
  """Compiled, up to roundings: XLA fuses w + u in one program and not in the other."""
  (points, _, _, losses), (expected, _, _, dense) = in_phases(name)[1], without_sparsity()[1]
  close = lambda a, b: np.testing.assert_allclose(a[:, :DENSE], b[:, :DENSE], atol=2e-6)
  jax.tree.map(close, points, expected)
  assert np.all(np.abs(losses - dense)[:, :DENSE] < 1e-6)
  assert np.any(np.abs(losses - dense)[:, DENSE:] > 1e-2)


def one_by_one(tx, params, steps=3):
  """So many updates outside of `jit`, where every operation rounds for itself."""
  state, (_, batches, teachers) = tx.init(params), problem(steps)
  gradient = jax.jit(jax.grad(loss))
  teacher = jax.tree.map(lambda w: w[0], teachers)
  for x in batches[0]:
    updates, state = tx.update(gradient(params, x, teacher, 1.0), state, params)
    params = optax.apply_updates(params, updates)
  return params


@functools.cache
def the_optimizer_alone():
  return one_by_one(inner(), jax.tree.map(jnp.asarray, model(0)))


@pytest.mark.parametrize('name', ['dense', 'ste', 'sr_ste decoupled', 'asp', 'mdgf exponential', 'st3'])
def test_the_dense_phase_is_the_optimizer_alone_bit_for_bit(name):
  if name == 'dense':
    tx = recipes.dense(inner())
  else:
    recipe, arguments = RECIPES[name]
    tx = recipe(inner(), **arguments, **PHASES)
  found = one_by_one(tx, jax.tree.map(jnp.asarray, model(0)))
  jax.tree.map(np.testing.assert_array_equal, found, the_optimizer_alone())
  assert np.any(found['up']['kernel'] != model(0)['up']['kernel'])


@pytest.mark.parametrize('name', RECIPES)
def test_the_fine_tune_phase_keeps_its_mask_and_holds_exactly_what_was_asked(name):
  (params, state), (points, masks, _, _) = in_phases(name)
  for path, mask in kernels(masks).items():
    fixed, tuned = mask[:, TOTAL - TUNE], kernels(points)[path][:, TOTAL - TUNE:]
    np.testing.assert_array_equal(mask[:, TOTAL - TUNE:], np.broadcast_to(fixed[:, None], mask[:, TOTAL - TUNE:].shape))
    np.testing.assert_array_equal(tuned != 0, mask[:, TOTAL - TUNE:])
    np.testing.assert_array_equal(kernels(params)[path] != 0, fixed)
    assert np.all(tuned[:, 0][fixed] != tuned[:, -1][fixed])  # what is kept goes on learning
    if name != 'st3':
      rows = np.moveaxis(fixed, 1, -1).reshape(-1, NM.m)
      np.testing.assert_array_equal(rows.sum(-1), NM.n)
  everything = np.concatenate([m[:, TOTAL - TUNE].reshape(SEEDS, -1) for m in kernels(masks).values()], axis=1)
  np.testing.assert_array_equal(everything.mean(1), 0.5)
  assert not sj.report(params, state).violations


def test_asp_never_flips_a_bit_after_its_one_shot():
  masks = jax.tree.leaves(in_phases('asp')[1][1])
  before = jax.tree.map(lambda m: m[:, :DENSE], masks)
  assert all(np.all(m) for m in before)
  assert np.all(flips(jax.tree.map(lambda m: m[:, DENSE:], masks)) == 0)
  assert np.all(flips(masks) > 0) and np.all(flips(in_phases('ste')[1][1]) > flips(masks))


@pytest.mark.parametrize('decay, gradient', [
    (schedules.linear(end=25), 'scaled'), (schedules.cosine(end=25), 'straight_through')])
def test_mdgf_is_dense_before_its_decay_ends_and_exactly_n_of_m_after(decay, gradient):
  _, (points, masks, *_) = trained(recipes.mdgf(optax.adam(0.01), NM, decay=decay, gradient=gradient), 30)
  for path, held in kernels(points).items():
    np.testing.assert_array_equal(held[:, 25:] != 0, kernels(masks)[path][:, 25:])
    rows = np.moveaxis(held[:, 25:] != 0, 2, -1).reshape(-1, NM.m)
    np.testing.assert_array_equal(rows.sum(-1), NM.n)
    assert np.all(held[:, :24] != 0)


@pytest.mark.parametrize('make, due, last', [
    (lambda: recipes.sdgf_stepwise(optax.adam(0.01), sj.NM(1, 8), total_steps=32), (2, 8), (1, 8)),
    (lambda: recipes.sdgf_geometric(optax.adam(0.01), sj.NM(1, 2), total_steps=32), (2, 4), (1, 2)),
], ids=['stepwise', 'geometric'])
def test_resuming_in_the_middle_of_a_stage_goes_on_in_it_bit_for_bit(make, due, last):
  """Four stages of 8 steps; after 19 the state goes out as numpy arrays and comes back into another transform."""
  params, batches, teacher = jax.tree.map(lambda x: x[0], problem(32))

  def run(tx, carry, begin, end):
    return jax.jit(lambda carry: train(tx, carry, batches[begin:end], teacher, np.float32(1)))(carry)

  begin = jax.jit(lambda params: start(make(), params))(params)
  through, _ = run(make(), begin, 0, 32)
  saved = [np.asarray(leaf) for leaf in jax.tree.leaves(run(make(), begin, 0, 19)[0])]
  tx = make()
  restored = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(lambda params: start(tx, params), params)), saved)
  resumed, (_, masks, *_) = run(tx, restored, 19, 32)
  jax.tree.map(np.testing.assert_array_equal, resumed, through)
  for mask in jax.tree.leaves(masks):  # in the third stage first, in the last at the end
    for at, (n, m) in ((0, due), (-1, last)):
      groups = np.moveaxis(np.asarray(mask[at]), 0, -1).reshape(-1, m)
      np.testing.assert_array_equal(groups.sum(-1), n)


# Pruning at initialisation, of a deep and narrow network: `[depth]` square layers in one leaf, each a layer to itself.

STACK = {'first/kernel': Axes((0,), (1,)), 'hidden/kernel': Axes((1,), (2,), layer=(0,)),
         'last/kernel': Axes((0,), (1,))}


def deep(seed, depth, width, gain):
  """E[fan_in w^2] = gain."""
  root = np.sqrt(np.float32(gain / width))
  return {'first': {'kernel': drawn(seed, 16, width) * np.float32(np.sqrt(gain / 16))},
          'hidden': {'kernel': drawn(seed + 1, depth, width, width) * root},
          'last': {'kernel': drawn(seed + 2, width, 8) * root}}


def through(activation, params, x):
  x = activation(x @ params['first']['kernel'])
  x, _ = jax.lax.scan(lambda x, w: (activation(x @ w), None), x, params['hidden']['kernel'])
  return x @ params['last']['kernel']


def emptied(tx, draws):
  """How many layers of each network keep nothing."""
  masks = jax.jit(lambda params: sj.masks(params, tx.init(params)))
  return [sum(int(np.sum(~np.any(mask, (-2, -1)))) for mask in jax.tree.leaves(masks(params))) for params in draws]


def scoring(activation, batch=32):
  x, labels = drawn(7, batch, 16), np.arange(batch) % 8
  return lambda params: optax.softmax_cross_entropy_with_integer_labels(through(activation, params, x), labels).mean()


def test_snip_empties_layers_of_a_deep_narrow_network_and_synflow_none():
  """Tanaka et al. 2020, figure 1. Of 22 layers, 30 wide, of ReLUs at 99 %; 1 to 6 of them in nine of twelve draws.

  Not so of tanh, where the input of ones that SynFlow looks at saturates: it empties 18 of 22 there. Nor of 42 layers,
  100 wide: the flow through them is past float32.
  """
  ones = lambda params: through(jax.nn.relu, params, np.ones((1, 16), np.float32))
  options = {'axes': STACK, 'allow_empty': True}
  snip = recipes.snip(optax.sgd(0.1), 0.99, loss=scoring(jax.nn.relu), **options)
  synflow = recipes.synflow(optax.sgd(0.1), 0.99, outputs=ones, rounds=20, **options)
  draws = [deep(10 * i, 20, 30, 1.5) for i in range(4)]
  assert sum(emptied(snip, draws)) > 0 == sum(emptied(synflow, draws))


def test_snip_empties_layers_of_a_chaotic_network_and_on_the_edge_of_chaos_none():
  """Hayou et al. 2021, theorem 1 and figure 1: tanh, 42 layers, 100 wide, gain 2.5^2, 99 %.

  In the ordered phase, gains 0.25 to 1, SNIP emptied none there (in two draws each), and of ReLU, whose scores hardly
  depend on the gain, it did not differ from what is rescaled. 22 layers, 30 wide, are too few weights for either.
  """
  loss, options = scoring(jnp.tanh), {'axes': STACK, 'allow_empty': True}
  snip = recipes.snip(optax.sgd(0.1), 0.99, loss=loss, **options)
  robust = recipes.robust_at_init(optax.sgd(0.1), 0.99, loss=loss, gain=1.2981, **options)
  draws = [deep(seed, 40, 100, 6.25) for seed in (0, 10)]
  assert min(emptied(snip, draws)) > 10 and emptied(robust, draws) == [0, 0]


# Masks that move.


def moved(recipe, every, steps=12, **options):
  """One run: the gradients that each update got, and the masks before and after it, by step."""
  params = jax.tree.map(jnp.asarray, model(0))
  teacher, batches = model(5), drawn(100, steps, 64, 16)
  tx = recipe(optax.sgd(0.1), 0.8, every=every, end=steps, fraction=schedules.constant(0.3), key=jax.random.key(0))

  def step(carry, x):
    params, state = carry
    grads = jax.grad(loss)(params, x, teacher, np.float32(1))
    updates, later = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), later), (grads, sj.masks(params, state), sj.masks(params, later))

  state = tx.init(params)
  params = sj.project(params, state)
  return jax.tree.map(np.asarray, jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, state))[1])


@functools.cache
def of(name, every=1):
  return moved({'rigl': recipes.rigl, 'set': recipes.set_}[name], every)


def test_rigl_grows_where_the_gradient_is_larger_than_where_set_does():
  """Of all that was pruned before: the mean |g| of what has grown is above the mean for RigL, and about it for SET."""
  ratio = {}
  for name in ('rigl', 'set'):
    grads, before, after = map(kernels, of(name))
    for path, g in grads.items():
      grown, out = after[path] & ~before[path], ~before[path]
      assert grown.sum() > 50
      ratio[name, path] = np.abs(g)[grown].mean() / np.abs(g)[out].mean()
  for path in kernels(model(0)):
    assert ratio['rigl', path] > 2 > 1.3 > ratio['set', path] > 0.7, ratio


def explored(masks):
  """The share of weights that were kept at any time."""
  seen = jax.tree.map(lambda m: m[0], masks)
  for t in range(1, len(jax.tree.leaves(masks)[-1])):
    seen = metrics.union(seen, jax.tree.map(lambda m, t=t: m[t], masks))
  return float(metrics.itop_rate(seen).pooled)


def test_the_more_masks_the_more_is_explored():
  """Liu et al. 2021, In-Time Over-Parameterization: a static mask explores its density and no more."""
  seldom, often = (explored(kernels(of('set', every)[2])) for every in (4, 1))
  static = recipes.static_sparse(optax.sgd(0.1), 0.8, key=jax.random.key(0)).init(model(0))
  rate = float(metrics.itop_rate(sj.masks(model(0), static)).pooled)
  assert rate == pytest.approx(0.2, abs=1e-3) and 1.2 * rate < seldom < often / 1.2


def test_movement_pruning_prunes_the_large_that_shrink_and_keeps_the_small_that_grow():
  """Sanh et al. 2020, figure 1: 2 on its way to 0 against 0.1 on its way to 1, with magnitude for comparison."""
  params = {'kernel': jnp.concatenate([jnp.full((8, 8), 2.0), jnp.full((8, 8), 0.1)])}
  target = jnp.concatenate([jnp.zeros((8, 8)), jnp.ones((8, 8))])
  kept = {}
  for recipe in (recipes.movement_pruning, recipes.gradual_magnitude):
    tx = recipe(optax.sgd(0.02), 0.5, begin=4, end=5, every=1)
    held, state, update = params, tx.init(params), jax.jit(tx.update)
    for _ in range(5):
      updates, state = update({'kernel': held['kernel'] - target}, state, held)
      held = optax.apply_updates(held, updates)
    kept[recipe.__name__] = sj.masks(held, state)['kernel']
    shrunk = jnp.abs(held['kernel'])[:8]
    assert np.all((shrunk == 0) | ((shrunk < 2) & (shrunk > 1)))
  assert np.all(kept['movement_pruning'][8:]) and not np.any(kept['movement_pruning'][:8])
  assert np.all(kept['gradual_magnitude'][:8]) and not np.any(kept['gradual_magnitude'][8:])


def test_what_freeze_net_does_not_train_stays_bit_for_bit_under_weight_decay():
  params, teacher, x = model(0), model(5), drawn(100, 64, 16)
  scored = lambda params: loss(params, x, teacher, np.float32(1))
  tx = recipes.freeze_net(optax.adamw(0.01, weight_decay=0.1), 0.9, loss=scored)
  state, held = tx.init(params), params
  mask, update = sj.masks(params, state), jax.jit(tx.update)
  for _ in range(5):
    updates, state = update(jax.grad(scored)(held), state, held)
    held = optax.apply_updates(held, updates)
  for name in ('up', 'down'):
    now, before, m = held[name]['kernel'], params[name]['kernel'], np.asarray(mask[name]['kernel'])
    np.testing.assert_array_equal(now[~m], before[~m])
    assert np.all(now[m] != before[m]) and 0 < m.sum() < m.size
  assert np.all(held['up']['bias'] != 0)
