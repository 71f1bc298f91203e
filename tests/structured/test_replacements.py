"""Tests what takes the place of dense layers: searched mixtures, larger sparse layers, and one shared memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import advice, flows, schedules, structured, trees
from sparsejax.structured import architecture, iso_flop, sharing
from sparsejax.types import Axes, Signals

pytestmark = pytest.mark.usefixtures('standard_promotion')
KEY = jax.random.key(0)


# Architectures: numbers of the authors' code.


@pytest.mark.parametrize('power, expected', [
  (10, [.1, .06111, .02863, .01037, .0023, .0001]), (2, [.1, .07501, .04561, .02089, .00532, .0001])])
def test_cosine_power_is_that_of_the_published_code(power, expected):
  schedule = schedules.cosine_power(0.1, 1e-4, power=power, end=5)
  np.testing.assert_allclose([schedule(step) for step in range(6)], expected, atol=6e-6)
  assert schedules.cosine_power(power=1, end=9)(0) == 1 and schedule(100) == pytest.approx(1e-4)


def test_max_w_gives_the_best_operation_the_weight_one_and_its_maximum_no_gradient():
  alpha = jnp.array([1., 2, 0])
  np.testing.assert_allclose(architecture.max_w(alpha), [.57949, 1, .42479], atol=1e-5)
  soft = jax.jacobian(jax.nn.softmax)(alpha)
  np.testing.assert_allclose(jax.jacobian(architecture.max_w)(alpha), soft, atol=1e-6)


def test_a_mixture_is_the_weighted_sum_and_channels_pass_by():
  x = jax.random.normal(KEY, (3, 4))
  operations = [lambda h: h * 2, jnp.zeros_like]
  alpha = jnp.array([0.0, jnp.log(3.0)])
  np.testing.assert_allclose(architecture.mixed(operations, alpha, x), x / 2, rtol=1e-6)
  y = architecture.mixed(operations, alpha, x, channels=2)
  np.testing.assert_allclose(y, jnp.concatenate([x[:, :2] / 2, x[:, 2:]], -1), rtol=1e-6)
  alive = jnp.array([True, True, False])
  alive = architecture.without_worst(alive, jnp.array([0.3, jnp.nan, -1]))
  assert alive.tolist() == [True, False, False]
  assert architecture.without_worst(alive, jnp.zeros(3)).tolist() == [True, False, False]
  assert int(architecture.sharpest(jnp.array([1.0, 3, 3]))) == 1


def searched(steps, begin, end):
  """Returns the parameters after each update of DASS on two operations, of which the sparse one is right, and the loss.
  """
  x = jax.random.normal(KEY, (64, 6))
  y = x[:, :2].sum(1, keepdims=True) * 2  # two inputs of six count
  p = {'sparse': {'kernel': 0.1 * jax.random.normal(KEY, (6, 1))}, 'skip': {'scale': jnp.zeros((1,))},
       'alpha': jnp.zeros(2)}

  def loss(p, batch):
    first, second = batch
    operations = [lambda h: h @ p['sparse']['kernel'], lambda h: h[:, 3:4] * p['skip']['scale']]
    return jnp.mean((architecture.mixed(operations, p['alpha'], first, weighting=architecture.max_w) - second) ** 2)

  tx = sj.recipes.dass(optax.adam(0.1), 2 / 3, alpha_optimizer=optax.adam(0.05), score_optimizer=optax.sgd(0.01),
                       dense_steps=begin, fine_tune_steps=steps - end, total_steps=steps)

  def step(carry, _):
    grads = architecture.bilevel(loss, carry[0], (x[:32], y[:32]), (x[32:], y[32:]), trees.named('alpha'))
    moves, state = tx.update(grads, carry[1], carry[0])
    after = optax.apply_updates(carry[0], moves)
    return (after, state), after

  seen = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps)[1])(p)
  return seen, loss(jax.tree.map(lambda w: w[-1], seen), (x[32:], y[32:]))


def test_dass_finds_the_sparse_operation_and_trains_weights_masks_and_weights_again():
  begin, end = 30, 50
  seen, value = searched(80, begin, end)
  assert int(architecture.sharpest(seen['alpha'][-1])) == 0 and value < 0.05
  weights = np.asarray(seen['sparse']['kernel'])[..., 0]
  kept = weights != 0
  assert kept[:begin - 1].all() and (kept[begin - 1:].sum(1) == 2).all() and np.flatnonzero(kept[-1]).tolist() == [0, 1]
  moved = np.where(kept[1:] & kept[:-1], np.diff(weights, axis=0), 0).any(1)  # by the updates from the second on
  assert moved[:begin - 1].all() and not moved[begin - 1:end - 1].any() and moved[end - 1:].all()
  scale, alpha = np.asarray(seen['skip']['scale']), np.asarray(seen['alpha'])
  assert (scale[begin:end] == scale[begin - 1]).all() and np.diff(alpha, axis=0).any(1).all()
  memory, w = sj.scores.accumulated_movement(optax.sgd(0.5), since=2), jnp.array([2.0, -4.0])
  stat = memory.start(w)
  for step, score in enumerate(([.5, 1], [.5, 1], [-.5, 3], [-1.5, 5])):  # S - 0.5 w dL/dw'
    stat = memory.observe(stat, w, Signals(step=step, grad=jnp.ones(2)))
    np.testing.assert_allclose(stat.score, score)


def test_binary_weights_are_signs_times_the_mean_of_each_output():
  w = jnp.array([[0.5, -2.0], [-1.5, 0.0], [9.0, 1.0]])
  mask = jnp.array([[True, True], [True, True], [False, True]])
  signals = Signals(axes=Axes((0,), (1,)))
  flow = flows.binary()
  np.testing.assert_allclose(flow.project(w, mask, signals), [[1, -1], [-1, 1], [0, 1]])
  np.testing.assert_allclose(flow.pull_back(jnp.ones((3, 2)), w, mask, signals), [[1, 0], [0, 1], [0, 1]])
  tx = sj.transforms.sparsify(optax.sgd(0.1), flow, sj.selections.leafwise(sj.Unstructured(0.0)))
  point = sj.project({'kernel': w}, tx.init({'kernel': w}))['kernel']
  assert len(np.unique(np.abs(point[:, 0]))) == 1


@pytest.mark.parametrize('size, part', [((9, 1), .0022), ((64, 128), 1.0), ((100, 70), .427), ((27, 32), .211)])
def test_an_array_of_64_is_filled_as_the_model_says(size, part):
  assert advice.tile_share(*size, (64, 64)) == pytest.approx(part, abs=5e-4)


def test_depthwise_products_fill_nothing_and_multiples_fill_the_array():
  def apply(p, x):
    h = jax.lax.conv_general_dilated(x, p['depthwise'], (1, 1), 'SAME', feature_group_count=8,
                                     dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return h @ p['pointwise']
  found = sj.advice.utilization(apply, {'depthwise': jnp.ones((3, 3, 1, 8)), 'pointwise': jnp.ones((8, 16))},
                                jnp.ones((1, 4, 4, 8)), array=(8, 8))
  assert found == {'depthwise': 9 / 128, 'pointwise': 1.0}


# Sparse-IFT.


def dense(p, x):
  return jax.nn.relu(x @ p['a']) @ p['b']


def branched(p, x):
  return jax.nn.relu(sum(x @ w for w in p['a'])) @ p['b']


def factorized(p, x):
  return jax.nn.relu(x @ p['u'] @ p['v']) @ p['b']


def doped(p, x):
  return jax.nn.relu(x @ p['a'] + x @ p['u'] @ p['v']) @ p['b']


@pytest.mark.parametrize('sparsity', [0.5, 0.75, 0.9])
@pytest.mark.parametrize('kind', ['wide', 'parallel', 'factorized', 'doped'])
def test_every_replacement_has_the_flops_of_the_dense_layer_by_count(kind, sparsity):
  ones, x = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32), jnp.ones((2, 24))
  before = sj.contractions(dense, {'a': ones(24, 32), 'b': ones(32, 10)}, x)
  k, whole = iso_flop.branches(sparsity), ()
  assert k == {0.5: 2, 0.75: 4, 0.9: 10}[sparsity]
  if kind == 'wide':
    width = iso_flop.wide_width(32, sparsity)
    made, of = (dense, {'a': ones(24, width), 'b': ones(width, 10)}), None
  elif kind == 'parallel':
    made, of = (branched, {'a': [ones(24, 32)] * k, 'b': ones(32, 10)}), {f'a/{i}': 'a' for i in range(k)}
  elif kind == 'factorized':
    rank = iso_flop.factor_rank(24, 32, sparsity)
    made, of = (factorized, {'u': ones(24, rank), 'v': ones(rank, 32), 'b': ones(32, 10)}), {'u': 'a', 'v': 'a'}
  else:
    rank, whole = iso_flop.doped_rank(24, 32, sparsity), ('u', 'v')
    made = doped, {'a': ones(24, 32), 'u': ones(24, rank), 'v': ones(rank, 32), 'b': ones(32, 10)}
    of = {'a': 'a', 'u': 'a', 'v': 'a'}
  after = sj.contractions(*made, x)
  asked = iso_flop.equal_flops(before, after, of, whole)
  kept = {path: (1 - asked.get(path, 0)) * after.macs[path] for path in after}
  assert sum(kept.values()) == pytest.approx(before.total_macs, rel=1e-9)
  own = [path for path in asked if path != 'b' or kind == 'wide']
  assert all(abs(asked[path] - sparsity) < (0.3 if kind == 'wide' else 0.1) for path in own)


def test_a_wider_sparse_layer_trains_at_the_flops_of_the_dense_one():
  x, wide = jnp.ones((2, 24)), {'a': jax.random.normal(KEY, (24, 64)), 'b': jax.random.normal(KEY, (64, 10))}
  before = sj.contractions(dense, {'a': jnp.ones((24, 32)), 'b': jnp.ones((32, 10))}, x)
  asked = iso_flop.equal_flops(before, sj.contractions(dense, wide, x))
  tx = sj.recipes.rigl(optax.sgd(0.1), allocation=sj.allocation.custom(asked), total_steps=10, key=KEY,
                       where=trees.named('a', 'b'), axes=sj.contractions(dense, wide, x))
  kept = sum(int(np.sum(mask)) for mask in jax.tree.leaves(tx.init(wide).masks))
  assert kept == pytest.approx(24 * 32 + 32 * 10, rel=0.02)


# Shared memories.


def test_tiles_read_the_memory_where_the_published_hash_says():
  places = sharing.tile_places((12, 8), 64, (4, 4), (7, 11, 3))
  assert places[::4, ::4].tolist() == [[3, 14], [10, 21], [17, 28]]
  assert places[1, 0] == 7 and places[0, 1] == 4
  assert places.max() < 64


def test_a_memory_of_full_size_is_the_dense_model_step_by_step():
  p = {'a': jax.random.normal(KEY, (4, 6)), 'b': 3 * jax.random.normal(KEY, (6, 2))}
  x, y = jax.random.normal(KEY, (8, 4)), jnp.ones((8, 2))
  loss = lambda p: jnp.mean((jnp.tanh(x @ p['a']) @ p['b'] - y) ** 2)
  plan = sharing.fold(p, 36, KEY)
  memory, tx = sharing.beginning(plan, p, KEY), optax.chain(sharing.scaler(plan), optax.sgd(0.05))
  step = jax.jit(lambda m, s: tx.update(jax.grad(lambda m: loss(sharing.expand(m, plan)))(m), s, m))
  state = tx.init(memory)
  for _ in range(50):
    moves, state = step(memory, state)
    memory = optax.apply_updates(memory, moves)
    p = jax.tree.map(lambda w, g: w - 0.05 * g, p, jax.grad(loss)(p))
  assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=2e-5), sharing.expand(memory, plan), p))


@pytest.mark.parametrize('size', [5, 12, 36])
def test_no_entry_is_read_more_often_than_the_mean_rounded_up(size):
  p = {'a': jax.random.normal(KEY, (4, 6)), 'b': jax.random.normal(KEY, (6, 2))}
  plan = sharing.fold(p, size, KEY)
  load = np.bincount(np.concatenate([place.reshape(-1) for place in plan.places]), minlength=size)
  assert load.max() == -(-36 // size) and load.min() >= 36 // size
  assert jax.tree.map(jnp.shape, sharing.expand(sharing.beginning(plan, p, KEY), plan)) == jax.tree.map(jnp.shape, p)
  assert max(place.max() for place in sharing.roast(p, 20, (2, 3)).places) < 20


@pytest.mark.parametrize('call, said', [
  (lambda: architecture.mixed([jnp.sin], jnp.zeros(2), jnp.ones(3)), 'need alpha of shape'),
  (lambda: architecture.mixed([jnp.sin], jnp.zeros(1), jnp.ones(3), channels=2), 'does not divide'),
  (lambda: architecture.bilevel(lambda p, b: 0.0, {'a': jnp.ones(1)}, 0, 0, lambda *_: False), 'picks no leaf'),
  (lambda: sj.recipes.dass(optax.sgd(0.1), total_steps=9, alphas=lambda *_: False).init({'kernel': jnp.ones((4, 4))}),
   'recipes.dass: `alphas` picks no leaf'),
  (lambda: sj.recipes.dass(optax.sgd(0.1), total_steps=9).init({'kernel': jnp.ones((4, 4)), 'mix': jnp.ones(2)}),
   "recipes.dass: no leaf has the name 'alpha' among 'kernel', 'mix', .*alphas="),
  (lambda: architecture.without_worst(jnp.ones((2, 2), bool), jnp.ones((2, 2))), 'not of shape'),
  (lambda: iso_flop.branches(1.0), 'below 1'),
  (lambda: iso_flop.wide_width(-4, 0.5), 'at least 1, not -4'),
  (lambda: iso_flop.equal_flops(*[sj.contractions(dense, {'a': jnp.ones((24, n)), 'b': jnp.ones((n, 10))}, jnp.ones(
    (2, 24))) for n in (32, 16)]), 'make the replacement larger'),
  (lambda: sharing.fold({'a': jnp.ones(3)}, 4, KEY), 'from 1 to 3'),
  (lambda: sharing.roast({'a': jnp.ones((3, 3))}, 4, (3, 3)), 'smaller tile'),
  (lambda: sharing.expand(jnp.ones(2), sharing.fold({'a': jnp.ones(3)}, 3, KEY)), 'the plan'),
  (lambda: advice.tile_share(0, 1), 'at least 1'),
  (lambda: structured.iso_flop.equal_flops({}, {}, {'x': 'y'}), "leaf 'x'"),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()


def test_channelwise_distillation_is_that_of_the_definition_and_free_of_shifts():
  teacher = jnp.array([[1., 2, 0, -1], [.5, .5, .5, .5]]).T[None]
  student = jnp.array([[0., 1, 1, 0], [1, 0, 0, 0]]).T[None]
  for temperature, value in ((1, .21759), (4, .29119)):
    assert float(sj.losses.channelwise(student, teacher, temperature)) == pytest.approx(value, abs=1e-5)
  assert float(sj.losses.channelwise(teacher + 3, teacher)) == pytest.approx(0, abs=1e-6)
  assert not jax.grad(lambda t: sj.losses.channelwise(student, t))(teacher).any()
  with pytest.raises(ValueError, match='1 x 1 convolution'):
    sj.losses.channelwise(student[..., :1], teacher)


# Orders of units.


def test_reordered_units_are_the_same_function_and_lie_in_fuller_blocks():
  p = {'up': jax.random.normal(KEY, (6, 32)), 'down': jax.random.normal(KEY, (32, 4))}
  apply = lambda p, x: jax.nn.relu(x @ p['up']) @ p['down']
  x = jax.random.normal(KEY, (3, 6))
  found = structured.groups(apply, p, x)
  kinds = np.random.default_rng(0).random((4, 6)) < 0.3  # units of four kinds, in random order
  masks = {'up': kinds[np.random.default_rng(1).permutation(32) % 4].T, 'down': np.ones((), bool)}
  order = structured.clustered(found, masks, 'up:1', 'up', 4)
  moved = structured.permuted(found, p, {'up:1': order})
  np.testing.assert_allclose(apply(moved, x), apply(p, x), rtol=1e-5, atol=1e-5)
  blocks = lambda mask: int(np.asarray(mask).reshape(6, 8, 4).any(-1).sum())
  assert blocks(structured.permuted(found, masks, {'up:1': order})['up']) < 0.7 * blocks(masks['up'])
  with pytest.raises(ValueError, match='each of its 32 units once'):
    structured.permuted(found, p, {'up:1': np.zeros(32, int)})
  with pytest.raises(ValueError, match='no single place'):
    structured.clustered(found, masks, 'up:1', 'none', 4)
