"""Numbers of the papers' formulas and of the authors' published code, on small inputs, recipe by recipe.

[run]: printed by the authors' own function; [calc]: arithmetic on the published formula. The network of most of them is
x -> W1, b1 -> ReLU -> W2, b2 in `[out, in]` layout with a mean cross-entropy, its leaves named as Equinox names them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import sparsejax as sj
from sparsejax import allocation, flows, ranking, recipes, schedules, scores, starts, updates
from sparsejax.patterns import Unstructured
from sparsejax.types import Axes, Signals

NET = {
    'a': {'weight': [[.5, -.2, .1, .4], [-.3, .8, -.6, .2], [.7, .1, .3, -.5]], 'bias': [.1, -.1, .05]},
    'b': {'weight': [[.6, -.4, .2], [-.7, .5, .9]], 'bias': [.02, -.03]},
}
NET = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), NET, is_leaf=lambda x: isinstance(x, list))
X = jnp.asarray([[1, .5, -1, 2], [0, -1, 1.5, .5], [2, 1, 0, -.5], [-1, .25, .5, 1]])
Y = jnp.asarray([0, 1, 0, 1])
SGD = optax.sgd(0.1)


def outputs(params, x=X):
  hidden = jax.nn.relu(x @ params['a']['weight'].T + params['a']['bias'][None])
  return hidden @ params['b']['weight'].T + params['b']['bias'][None]


def loss(params, temperature=1.0):
  return optax.softmax_cross_entropy_with_integer_labels(outputs(params) / temperature, Y).mean()


def of_ones(params):
  return outputs(params, jnp.ones((1, 4)))


def masks(tx, params=NET):
  held = sj.masks(params, jax.jit(tx.init)(params))
  return [np.asarray(held[name]['weight'], int).tolist() for name in 'ab']


def normalised(score, probe):
  """The scores of both weights, divided by the sum of them all."""
  grads = probe(NET)
  found = [score(NET[name]['weight'], Signals(grad=grads[name]['weight'])) for name in 'ab']
  return [np.asarray(x / sum(x.sum() for x in found)) for x in found]


def test_snip():
  """[run] SynFlow's code of SNIP, scores divided by their sum, half of all kept, globally and by layer."""
  a, b = normalised(scores.snip, starts.gradient(loss))
  np.testing.assert_allclose(a, [[.23395, .06401, .03853, .04059], [.03914, .00721, .05579, .00721],
                                 [.10533, .01653, .04054, .04133]], atol=6e-6)
  np.testing.assert_allclose(b, [[.03935, .01467, .03483], [.04591, .01834, .15674]], atol=6e-6)
  assert masks(recipes.snip(SGD, 0.5, loss=loss)) == [
      [[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 1, 1]], [[0, 0, 0], [1, 0, 1]]]
  assert masks(recipes.snip(SGD, 0.5, loss=loss, allocation=allocation.uniform)) == [
      [[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]], [[1, 0, 0], [1, 0, 1]]]


@pytest.mark.usefixtures('standard_promotion')  # optax's Adam needs it
def test_snip_from_the_first_gradient_is_snip_at_initialisation_and_that_update_only_prunes():
  tx = recipes.snip(optax.adam(0.1), 0.5)
  state = jax.jit(tx.init)(NET)
  moves, state = jax.jit(tx.update)(jax.grad(loss)(NET), state, NET)
  params = optax.apply_updates(NET, moves)
  expected = jax.jit(recipes.snip(SGD, 0.5, loss=loss).init)(NET)
  for name in 'ab':
    mask = sj.masks(NET, expected)[name]['weight']
    np.testing.assert_array_equal(params[name]['weight'], jnp.where(mask, NET[name]['weight'], 0))
    np.testing.assert_array_equal(params[name]['bias'], NET[name]['bias'])
  assert int(jax.tree.leaves(state.inner)[0]) == 0  # Adam has not counted it


def test_grasp():
  """[run] SynFlow's code of GraSP at temperature 200, and raw at 1, where most signs differ."""
  a, b = normalised(scores.grasp, starts.hessian_gradient(lambda p: loss(p, 200.0)))
  np.testing.assert_allclose(a, [[.06746, -.01520, -.01022, -.00035], [-.01196, .00410, .01800, .00410],
                                 [.06539, .00931, -.02086, .02327]], atol=2e-5)
  np.testing.assert_allclose(b, [[.32582, .03683, -.02233], [.38012, .04604, .10049]], atol=2e-5)
  assert masks(recipes.grasp(SGD, 0.5, loss=loss, temperature=200.0)) == [
      [[1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], [[1, 1, 0], [1, 1, 1]]]
  hot = starts.hessian_gradient(loss)(NET)['a']['weight']
  np.testing.assert_allclose(-scores.grasp(NET['a']['weight'], Signals(grad=hot)), [
      [.37982, -.08272, -.03261, -.00048], [.05871, -.02765, -.09211, -.02765], [-.31546, -.03748, .06725, -.09369]],
      atol=2e-5)


def test_synflow():
  """[run] scores with biases, and masks after 1, 5 and 100 rounds with three tenths kept.

  The authors prune the k = 12 lowest of 18 and all that ties with them; 0.3 of 18 rounded is 5 here, so their 6 are
  asked for as a third.
  """
  grads = starts.synaptic_flow(of_ones)(NET)
  found = [scores.synflow(NET[name]['weight'], Signals(grad=grads[name]['weight'])) for name in 'ab']
  np.testing.assert_allclose(found[0], [[.65, .26, .13, .52], [.27, .72, .54, .18], [.77, .11, .33, .55]], rtol=1e-5)
  np.testing.assert_allclose(found[1], [[.78, .80, .33], [.91, 1.0, 1.485]], rtol=1e-5)
  once = [[[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], [[1, 1, 0], [1, 1, 1]]]
  often = [[[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]], [[0, 1, 0], [0, 1, 1]]]
  for rounds, expected in ((1, once), (5, often), (100, often)):
    assert masks(recipes.synflow(SGD, 2 / 3, outputs=of_ones, rounds=rounds)) == expected, rounds


def test_the_density_of_synflow_falls_exponentially():
  """[run] 0.1 kept after 100 rounds: .97724, .95499, .93325, ..., .10233, .1."""
  part = schedules.density_decay(0.9, end=100)
  kept = [1 - 0.9 * float(part(t)) for t in (1, 2, 3, 99, 100)]
  np.testing.assert_allclose(kept, [.97724, .95499, .93325, .10233, .1], atol=6e-6)
  assert float(part(100)) == 1.0


@pytest.mark.parametrize('gain', [4.0, 2.0])
def test_rescaling_to_the_edge_of_chaos(gain):
  """[calc] fan_in E[w^2 m] = gain with one factor a layer: the mean row of squares of the kept is the gain."""
  w = NET['a']['weight']
  mask = jnp.asarray([[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 1, 1]], bool)
  moved = flows.on_the_edge(gain).begin(w, mask, Signals(axes=Axes((1,), (0,))))
  sums = jnp.sum(jnp.square(jnp.where(mask, moved, 0)), 1)
  np.testing.assert_allclose(sums.mean(), gain, rtol=1e-6)
  np.testing.assert_allclose(moved / w, jnp.full(w.shape, (moved / w)[0, 0]), rtol=1e-6)


CONV_AND_HEAD = {'conv1/kernel': (3, 3, 3, 16), 'conv2/kernel': (3, 3, 16, 32), 'head/kernel': (512, 10)}
LENET = {'a/kernel': (784, 300), 'b/kernel': (300, 100), 'c/kernel': (100, 10)}
DEPTHWISE = {'conv/depth/kernel': (3, 3, 32, 1), 'conv/point/kernel': (1, 1, 32, 64)}
# Densities by the unfloored rule; LeNet's and the depthwise ones are of the floored one, the same to these digits.
SHARES = [
    (allocation.erk, CONV_AND_HEAD, .9, [.097831, .019811, .172353], 1e-6),  # [run] ITOP, Random_Pruning
    (allocation.erk, CONV_AND_HEAD, .95, [.048915, .009905, .086177], 1e-6),
    (allocation.erdos_renyi, CONV_AND_HEAD, .9, [.357481, .084667, .092075], 1e-6),
    (allocation.erdos_renyi, CONV_AND_HEAD, .95, [.178741, .042333, .046038], 1e-6),
    (allocation.erk, CONV_AND_HEAD, .2, [1, .559245, 1], 4e-4),  # three passes: the head, then the first convolution
    (allocation.erk, LENET, .9, [.079568, .230189, 1], 1e-5),
    (allocation.erk, LENET, .95, [.038484, .111334, .918507], 1e-5),
    (allocation.erk, LENET, .98, [.015394, .044534, .367403], 1e-5),
    (allocation.erk, DEPTHWISE, .75, [.577251, .203980], 1e-4),
]


@pytest.mark.parametrize('allocate, shapes, sparsity, densities, off', SHARES)
def test_erdos_renyi_densities(allocate, shapes, sparsity, densities, off):
  leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
  shares = allocate(leaves, sparsity)
  np.testing.assert_allclose([1 - share for share in shares.values()], densities, atol=off)
  sizes = [int(np.prod(shape)) for shape in shapes.values()]
  np.testing.assert_allclose(np.dot(sizes, [*shares.values()]), sparsity * sum(sizes), rtol=1e-6)


W, M = NET['a']['weight'], jnp.asarray([[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
G = jnp.asarray([[-.2843, -.23014, .19291, -.022], [.23692, .11846, -.05077, .05499], [.26061, .1303, 0, -.06515]])


@pytest.mark.parametrize('fraction, expected', [
    (.3, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]), (.5, [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]])])
def test_rigl_update(fraction, expected):
  """[run] The official TF2 function without noise: seven kept, two and three of them exchanged."""
  update = updates.drop_and_grow(scores.gradient, schedules.constant(fraction))
  select = sj.counts.Selector(Unstructured(), 7, None)
  held = jnp.where(M, W, 0)
  new = update(M, scores.magnitude(held), select, held, Signals(grad=G, step=1))
  np.testing.assert_array_equal(new.astype(int), expected)


@pytest.mark.usefixtures('standard_promotion')
def test_rigl_regrown_in_the_same_update_keeps_its_value_and_grown_starts_at_zero():
  """[run] fraction .3: [0, 1] is dropped and grown and stays -.2, [1, 0] is zero; and the weights do not move."""
  tx = recipes.rigl(optax.adam(0.1), 5 / 12, fraction=schedules.constant(.3), every=1, end=9,
                    allocation=allocation.uniform, key=jax.random.key(0))
  params = {'weight': jnp.where(M, W, 0)}
  state = jax.jit(tx.init)(params)._replace(masks={'weight': M})
  moves, state = jax.jit(tx.update)({'weight': G}, state, params)
  held = optax.apply_updates(params, moves)['weight']
  expected = np.asarray([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], bool)
  np.testing.assert_array_equal(state.masks['weight'], expected)
  np.testing.assert_array_equal(held, jnp.where(expected & M, W, 0))


@pytest.mark.parametrize('t, expected', [
    (0, .3), (6250, .25607), (12500, .15), (18750, .04393), (25000, 0)])
def test_the_fraction_of_rigl_is_a_cosine(t, expected):
  """[run] a = .3, end 25,000."""
  np.testing.assert_allclose(schedules.cosine(.3, 0.0, end=25000)(t), expected, atol=6e-6)


def test_sparse_momentum_shares_out_what_is_grown():
  """[run] SNFS: shares .36091 and .63909 of six; [calc] room, and rounding down, pass on to the largest with room."""
  share = lambda total, weights, room: updates.shared_out(
      jnp.int32(total), jnp.asarray(weights, jnp.float32), jnp.asarray(room, jnp.int32)).tolist()
  assert share(6, [.36091, .63909], [9, 3]) == [3, 3]
  assert share(6, [.36091, .63909], [9, 9]) == [2, 4]
  assert share(7, [1, 1, 1], [1, 9, 9]) == [1, 3, 3]
  assert share(5, [0, 0], [2, 9]) == [2, 3]
  assert share(0, [1, 2], [3, 3]) == [0, 0]


MW = jnp.asarray([[.2, -.6, .4, .1], [-.3, .7, .5, -.8]])
MS = jnp.asarray([[.3, -.2, 0, .5], [.1, .1, -.4, .2]])
MX = jnp.asarray([1, 2, -1, .5])


def of_mask(mask):
  """dL/dW' of L = |(M W) x|^2 / 2."""
  return jax.grad(lambda w: 0.5 * jnp.sum(jnp.square(w @ MX)))(jnp.where(mask, MW, 0))


def test_movement_pruning():
  """[run] half kept by S, one step of SGD 0.1 on S, and the gradient that reaches W."""
  mask = Unstructured(0.5)(MS)
  np.testing.assert_array_equal(mask.astype(int), [[1, 0, 0, 1], [1, 0, 0, 1]])
  grad = of_mask(mask)
  np.testing.assert_allclose(grad, [[.25, .5, -.25, .125], [-.7, -1.4, .7, -.35]], atol=1e-6)
  memory = scores.accumulated_movement(optax.sgd(0.1))
  stat = memory.observe(memory.start(MW)._replace(score=MS), MW, Signals(grad=grad, step=0))
  np.testing.assert_allclose(stat.score, [[.295, -.17, .01, .49875], [.079, .198, -.435, .172]], atol=1e-6)
  pulled = flows.remembered().pull_back(grad, MW, mask, Signals())
  np.testing.assert_allclose(pulled, [[.25, 0, 0, .125], [-.7, 0, 0, -.35]], atol=1e-6)


def test_soft_movement_pruning():
  """[run] a strict threshold of the sigmoid, the floor of half a percent, and the gradient of the penalty."""
  stat = scores.Movement(MS, None)
  gate = scores.soft_movement(MW, Signals(stats=stat))
  for tau, expected in ((.5, [[1, 0, 0, 1], [1, 1, 0, 1]]), (.55, [[1, 0, 0, 1], [0, 0, 0, 0]])):
    np.testing.assert_array_equal((gate > tau).astype(int), expected)
  selection = sj.selections.score_threshold(scores.soft_movement, schedules.constant(.99))
  plan = selection.plan({'kernel': MW}, {'kernel': Axes((0,), (1,))})
  (mask,), _ = selection.select(plan.leaves, [MW], [None], [Signals(stats=stat, step=0)])
  np.testing.assert_array_equal(mask.astype(int), [[0, 0, 0, 1], [0, 0, 0, 0]])
  # lambda times the mean over two matrices, each of its own mean: .01528 at S = .3, so half of it a matrix.
  memory = scores.accumulated_movement(optax.sgd(1.0), schedules.constant(0.5))
  moved = memory.observe(memory.start(MW)._replace(score=MS), MW, Signals(grad=jnp.zeros_like(MW), step=0)).score
  np.testing.assert_allclose((MS - moved)[0, 0], .01528, atol=1e-5)


def test_the_gates_of_soft_movement_wait_for_the_gradient():
  """XLA computes gates that need no gradient before the backward pass, and holds those of all layers during it."""
  memory = scores.accumulated_movement(optax.sgd(1.0), schedules.constant(0.5))
  moved = lambda grad, stat: memory.observe(stat, MW, Signals(grad=grad, step=0)).score
  program = jax.make_jaxpr(moved)(MW, memory.start(MW)).jaxpr
  late, gates = {program.invars[0]}, []
  for eqn in program.eqns:
    waits = bool(late & {v for v in eqn.invars if not isinstance(v, core.Literal)})
    late |= set(eqn.outvars) if waits else set()
    gates += [waits] if eqn.primitive.name == 'logistic' else []
  assert gates == [True]


@pytest.mark.parametrize('t, sparsity', [
    (5400, 0), (5401, .00007), (20000, .64050), (30000, .80642), (40000, .84867), (44541, .85)])
def test_the_cubic_of_movement_pruning(t, sparsity):
  """[run] kept 1 to .15, from one warm-up of 5,400 to two before the end of 55,340."""
  ramp = schedules.cubic(0.0, 1.0, begin=5400, end=44540)
  np.testing.assert_allclose(0.85 * float(ramp(t)), sparsity, atol=1.1e-5)


def test_gradual_magnitude():
  """[calc] 0.9 after 0, 25, 50, 75 and 100 %: 0, .5203125, .7875, .8859375, .9, of a thousand weights, exactly."""
  params, steps = {'kernel': jax.random.normal(jax.random.key(0), (50, 20))}, 20
  tx = recipes.gradual_magnitude(optax.sgd(0.0), 0.9, every=5, end=steps)
  state, zeros = jax.jit(tx.init)(params), [0]
  for _ in range(steps):
    moves, state = jax.jit(tx.update)(params, state, params)
    params = optax.apply_updates(params, moves)
    zeros.append(int(jnp.sum(params['kernel'] == 0)))
  assert [zeros[t] for t in (0, 5, 10, 15, 20)] == [0, 520, 788, 886, 900]
  assert zeros[4] == 0 and zeros[9] == 520, 'only every fifth update'


def test_gradual_pruning_reaches_its_target_off_the_grid():
  params = {'kernel': jax.random.normal(jax.random.key(0), (50, 20))}
  tx = recipes.gradual_magnitude(SGD, 0.9, every=10, end=13)
  state = jax.jit(tx.init)(params)
  for _ in range(13):
    _, state = jax.jit(tx.update)(params, state, params)
  assert int(state.masks['kernel'].sum()) == 100


def test_sparse_momentum_drops_and_grows():
  """[run] SNFS: Nesterov twice from the masks of `M`, dense momentum, then shares, what is dropped, what is grown.

  The counts are the authors': 4 and 2 are .45273 of 7 and 4 rounded up, and the cap of their shares rounds 3.83 to 3.
  """
  M = [[[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]], [[1, 0, 1], [0, 1, 1]]]
  held = {name: NET[name] | {'weight': NET[name]['weight'] * jnp.asarray(m, jnp.float32)} for name, m in zip('ab', M)}
  momentum = jax.tree.map(jnp.zeros_like, held)
  for _ in range(2):
    grads = jax.grad(loss)(held)
    momentum = jax.tree.map(lambda b, g: .9 * b + g, momentum, grads)
    held = jax.tree.map(lambda w, b, g: w - .1 * (g + .9 * b), held, momentum, grads)
    held = {n: held[n] | {'weight': held[n]['weight'] * jnp.asarray(m, jnp.float32)} for n, m in zip('ab', M)}
  strength, chosen = [], []
  for name, mask, dropped in zip('ab', map(np.asarray, M), (4, 2)):
    w, by = held[name]['weight'], scores.momentum(held[name]['weight'], Signals(stats=momentum[name]['weight']))
    strength.append(float(by[mask == 1].mean()))
    alive = ranking.top_n(updates.kept_first(mask == 1, scores.magnitude(w, Signals())), mask.sum() - dropped)
    chosen.append(ranking.top_n(jnp.where(alive, jnp.inf, by), mask.sum() - dropped + 3).astype(int).tolist())
  np.testing.assert_allclose(np.asarray(strength) / sum(strength), [.36091, .63909], atol=6e-6)
  assert chosen == [[[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1], [0, 1, 1]]]


def test_global_sparse_momentum():
  """[run] two steps of the official code: lr .1, momentum .98, decay .01 (none on biases), three of ten active."""
  params = {'a': {'weight': jnp.asarray([[.5, -.2, .1], [.3, .8, -.4]]), 'bias': jnp.asarray([.1, -.1])},
            'b': {'weight': jnp.asarray([[1, -.5], [.2, .6]]), 'bias': jnp.zeros(2)}}
  x = jnp.asarray([[1, .5, -1], [.2, -.3, .7]])

  def objective(p):
    logits = jnp.tanh(x @ p['a']['weight'].T + p['a']['bias'][None]) @ p['b']['weight'].T + p['b']['bias'][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2)).mean()

  tx = recipes.global_sparse_momentum(optax.sgd(.1, momentum=.98), 0.7, weight_decay=.01, dense_steps=9, total_steps=9)
  state = jax.jit(tx.init)(params)
  for expected in (
      [[[.4995, -.1998, .0999], [.2997, .7992, -.36525]], [[.999, -.4579], [.1998, .5578]], [.09667, -.08629]],
      [[[.49851, -.1994, .0997], [.29911, .78291, -.33082]], [[.99702, -.37686], [.1994, .47656]], None]):
    moves, state = jax.jit(tx.update)(jax.grad(objective)(params), state, params)
    params = optax.apply_updates(params, moves)
    np.testing.assert_allclose(params['a']['weight'], expected[0], atol=1e-5)
    np.testing.assert_allclose(params['b']['weight'], expected[1], atol=1e-5)
    if expected[2] is not None:
      np.testing.assert_allclose(params['a']['bias'], expected[2], atol=1e-5)


def test_iterative_soft_shrinkage():
  """[run] pr .5, alpha .95, no gradient: after one step and after three."""
  params = {'kernel': jnp.asarray([[.5, -.2, .1, -.3], [.8, .4, -.45, .05]])}
  tx = recipes.iterative_soft_shrinkage(optax.sgd(0.0), 0.5, shrink=.95, total_steps=9)
  state, seen = jax.jit(tx.init)(params), []
  for _ in range(3):
    moves, state = jax.jit(tx.update)(params, state, params)
    params = optax.apply_updates(params, moves)
    seen.append(params['kernel'])
  np.testing.assert_allclose(seen[0], [[.5, -.19, .095, -.285], [.8, .4, -.45, .0475]], atol=1e-6)
  np.testing.assert_allclose(seen[2], [[.5, -.17148, .08574, -.25721], [.8, .4, -.45, .04287]], atol=1e-5)


def test_a_soup_is_the_mean_and_as_sparse_as_its_members():
  """[run] .5 0 .3 0 | .7 0 -.1 0 | .6 0 .1 0 -> .6 0 .1 0, and .575 0 .15 0 with weights .5 .25 .25."""
  members = [{'kernel': jnp.asarray([row, row])} for row in ([.5, 0, .3, 0], [.7, 0, -.1, 0], [.6, 0, .1, 0])]
  np.testing.assert_allclose(sj.metrics.model_soup(members)['kernel'][0], [.6, 0, .1, 0], atol=1e-6)
  np.testing.assert_allclose(sj.metrics.model_soup(members, [.5, .25, .25])['kernel'][0], [.575, 0, .15, 0], atol=1e-6)


JW = jnp.asarray([.5, -.2, .1, .3, -.8, .4, .45, -.05])
JX = jnp.asarray([1, 2, -1, .5, 1, -2, -1, 3])
START = jnp.asarray([1, 0, 0, 0, 1, 1, 1, 0], bool)


def test_lottery_jackpot():
  """[run] one step of SGD .01 on the scores: the released code swaps two, to [1, 0, 1, 1, 0, 0, 1, 0]."""
  params = {'kernel': JW[:, None], 'bias': jnp.ones(1)}
  tx = recipes.lottery_jackpot(SGD_SCORES, 0.5)
  state = jax.jit(tx.init)(params)
  np.testing.assert_array_equal(state.masks['kernel'][:, 0], START)
  np.testing.assert_allclose(state.master['kernel'][:, 0], jnp.where(START, 1, .99))
  held = sj.project(params, state)
  y = jnp.sum(held['kernel'][:, 0] * JX)
  np.testing.assert_allclose(y, -1.55, atol=1e-6)
  moves, state = jax.jit(tx.update)({'kernel': (y * JX)[:, None], 'bias': jnp.ones(1)}, state, held)
  np.testing.assert_allclose(state.master['kernel'][:, 0], [
      1.00775, .9838, .98845, .99232, .9876, .9876, .99302, .98768], atol=1e-5)
  new = optax.apply_updates(held, moves)
  np.testing.assert_array_equal(state.masks['kernel'][:, 0].astype(int), [1, 0, 1, 1, 0, 0, 1, 0])
  np.testing.assert_allclose(new['kernel'][:, 0], jnp.where(state.masks['kernel'][:, 0], JW, 0), atol=1e-7)
  np.testing.assert_array_equal(new['bias'], params['bias'])


SGD_SCORES = optax.sgd(.01)


@pytest.mark.parametrize('rate, expected', [(1, [0, 0, 1, 1, 1, 0, 1, 0]), (.5, [0, 0, 1, 0, 1, 1, 1, 0])])
def test_the_restriction_of_lottery_jackpots(rate, expected):
  """[run] best of the pruned in, worst of the kept out."""
  s = jnp.asarray([.5, .99, 1.2, 1.1, 1, .6, 1, .99])
  new = updates.swap(schedules.constant(rate))(START, s, Unstructured(0.5), JW, Signals(step=0))
  np.testing.assert_array_equal(new.astype(int), expected)


def test_lamp():
  """[calc] Lee et al. 2021, equation 1: w^2 over the sum of squares that are as large or larger, 1 for the largest."""
  found = allocation.lamp().normalise(jnp.asarray([[3.0, -1.0], [2.0, jnp.nan]]))
  np.testing.assert_allclose(found, [[1, 1 / 14], [4 / 13, 0]], rtol=1e-6)


def test_snip_ratios_are_the_counts_of_snip_and_random_places():
  """[calc] Liu et al. 2022: how many of each layer SNIP keeps, 6 and 3 above, at places that the key draws."""
  ratios = allocation.from_scores(scores.snip)
  drawn = [masks(recipes.random_pruning(SGD, 0.5, allocation=ratios, loss=loss, key=jax.random.key(seed)))
           for seed in range(3)]
  for a, b in drawn:
    assert (np.sum(a), np.sum(b)) == tuple(np.sum(mask) for mask in masks(recipes.snip(SGD, 0.5, loss=loss)))
  assert drawn[0] != drawn[1] or drawn[0] != drawn[2]
