"""Tests what makes trained models smaller without training: rotations, searches, and fits to the inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import structured
from sparsejax.structured import least_squares, rotating, searching

pytestmark = pytest.mark.usefixtures('standard_promotion')
WIDTH, TOKENS = 8, jax.random.randint(jax.random.key(9), (4, 5), 0, 12)


def norm(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def apply(p, tokens):
  """A decoder of one block with RMS norms: two heads, and a gated MLP with a bias on the stream."""
  h = p['embed'][tokens] + p['position']
  n = norm(h, p['first'])
  k, v = jnp.einsum('btd,dhk->bthk', n, p['key']), jnp.einsum('btd,dhk->bthk', n, p['value'])
  scores = jax.nn.softmax(jnp.einsum('bqhk,bthk->bhqt', k, k) / 2)
  h = h + jnp.einsum('bhqt,bthk,hkd->bqd', scores, v, p['out'])
  h = h + jax.nn.silu(norm(h, p['second']) @ p['up']) @ p['down'] + p['bias']
  return norm(h, p['last']) @ p['head']


@functools.cache
def params():
  shapes = {'embed': (12, WIDTH), 'position': (5, WIDTH), 'first': (WIDTH,), 'second': (WIDTH,), 'last': (WIDTH,),
            'key': (WIDTH, 2, 2), 'value': (WIDTH, 2, 2), 'out': (2, 2, WIDTH), 'up': (WIDTH, 16), 'down': (16, WIDTH),
            'bias': (WIDTH,), 'head': (WIDTH, 12)}
  rng = np.random.default_rng(0)
  mixed = np.eye(WIDTH) + rng.normal(size=(WIDTH, WIDTH))  # the stream is not aligned with its axes
  made = {name: rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
  made['embed'] = 3 * made['embed'] * np.linspace(1.5, 0.1, WIDTH) @ mixed
  made.update({name: 1 + 0.3 * made[name] for name in ('first', 'second', 'last')})
  return {name: jnp.asarray(w, jnp.float32) for name, w in made.items()}


@functools.cache
def found():
  return structured.groups(apply, params(), TOKENS)


def stream():
  return max(found(), key=lambda name: found()[name].weights)


def error(small):
  return float(jnp.mean((small.apply(small.params, TOKENS) - apply(params(), TOKENS)) ** 2))


def loss(p):
  return jnp.mean((apply(p, TOKENS) - apply(params(), TOKENS)) ** 2)


# Rotations.


@pytest.mark.parametrize('wide, bound', [(False, 1e-5), (True, 1e-12)])
def test_a_rotated_model_is_the_same_function(wide, bound):
  matrix = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
  with jax.enable_x64(wide):
    own = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), float if wide else jnp.float32), params())
    groups = structured.groups(apply, own, TOKENS) if wide else found()
    rotated = structured.rotate(groups, own, stream(), matrix)
    assert not np.allclose(rotated['up'], own['up']) and np.all(np.asarray(rotated['first']) == 1)
    assert structured.is_rotated(groups, own, rotated, TOKENS) < bound


def test_the_principal_directions_lose_less_than_axes_do():
  small = structured.slice_gpt(found(), params(), [TOKENS], 0.25, multiple_of=2)
  axes = structured.cut(found(), params(), {stream(): np.arange(WIDTH) < 6})
  assert small.params['up'].shape == (6, 16) and small.params['embed'].shape == (12, 6)
  assert error(small) < error(axes) / 2
  whole = structured.slice_gpt(found(), params(), [TOKENS], 0.0, multiple_of=1)
  assert error(whole) < 1e-8


# The variance of a LayerNorm takes one pass or two.


def layer_norm(x, scale, shift, fast):
  mean = jnp.mean(x, -1, keepdims=True)
  variance = jnp.mean(x * x, -1, keepdims=True) - mean ** 2 if fast else jnp.var(x, -1, keepdims=True)
  return (x - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + shift


def with_layer_norms(fast, scanned=False):
  """Returns a model of two blocks with LayerNorms, scanned or not, and its parameters."""
  def block(h, w):
    n = layer_norm(h, w['scale'], w['shift'], fast)
    return h + jax.nn.relu(n @ w['up'] + w['bias']) @ w['down'] + w['end'], None

  def apply(p, tokens):
    first = jnp.broadcast_to(p['first'], (len(tokens), 1, WIDTH))  # a class token
    h = jnp.concatenate([first, jnp.where(tokens[..., None] > 3, p['embed'][tokens] * 2.0, 0.0)], 1) + p['position']
    if scanned:
      h = jax.lax.scan(block, h, p['blocks'])[0]
    else:
      for i in range(2):
        h = block(h, jax.tree.map(lambda w, i=i: w[i], p['blocks']))[0]
    return layer_norm(h, p['scale'], p['shift'], fast) @ p['head']

  shapes = {'embed': (12, WIDTH), 'first': (WIDTH,), 'position': (6, WIDTH), 'scale': (WIDTH,), 'shift': (WIDTH,),
            'head': (WIDTH, 12),
            'blocks': {'scale': (2, WIDTH), 'shift': (2, WIDTH), 'up': (2, WIDTH, 16), 'bias': (2, 16),
                       'down': (2, 16, WIDTH), 'end': (2, WIDTH)}}
  rng = np.random.default_rng(3)
  own = jax.tree.map(lambda shape: rng.normal(size=shape) * 0.3 + 0.5, shapes, is_leaf=lambda x: isinstance(x, tuple))
  return apply, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), own)


@pytest.mark.parametrize('fast, scanned', [(True, False), (True, True), (False, True)])
def test_layer_norms_are_rotated_as_rms_norms_and_the_function_stays(fast, scanned, tmp_path):
  function, own = with_layer_norms(fast, scanned)
  groups = structured.groups(function, own, TOKENS)
  assert ('embed:1' in groups.pinned) != fast
  centred, moved = structured.centered(groups, own, 'embed:1')
  result = function(own, TOKENS)
  apart = lambda turned, f=centred.apply: float(jnp.max(jnp.abs(f(turned, TOKENS) - result)) / jnp.max(jnp.abs(result)))
  matrix = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
  assert apart(moved) < 1e-5 and apart(structured.rotate(centred, moved, 'embed:1', matrix)) < 1e-5
  assert abs(jnp.mean(moved['embed'], -1)).max() < 1e-6 and apart(own) > 1e-3
  whole = structured.slice_gpt(groups, own, [TOKENS], 0.0, stream='embed:1', multiple_of=1)
  assert apart(whole.params, whole.apply) < 1e-5
  small = structured.slice_gpt(groups, own, [TOKENS], 0.25, stream='embed:1', multiple_of=2)
  assert small.params['blocks']['up'].shape == (2, 6, 16)
  structured.save(tmp_path / 'small', small)
  again = structured.load(tmp_path / 'small', structured.without_means(function, 'embed:1'))
  np.testing.assert_allclose(again.apply(again.params, TOKENS), small.apply(small.params, TOKENS), atol=1e-5)


def tied(p, tokens):
  return norm(p['embed'][tokens] + p['position'], p['scale']) @ p['embed'].T


def bent(p, x):
  return norm(jax.nn.relu(x @ p['in']), p['scale']) @ p['out']


def post_norm(p, x):
  h = norm(x @ p['in'], p['scale'])
  return (h + h @ p['mid']) @ p['out']


def mixed(p, x):
  h = x @ p['in']
  return norm(h, p['scale']) @ p['other'] + layer_norm(h, p['scale'], p['shift'], True) @ p['out']


def shifted(p, x):
  return layer_norm(x @ p['in'], p['scale'], p['shift'], True) @ p['out']


IN_OUT = {'in': (3, 4), 'scale': (4,), 'out': (4, 2)}


@pytest.mark.parametrize('function, shapes, x, said', [
  (tied, {'embed': (5, 4), 'position': (3, 4), 'scale': (4,)}, jnp.zeros((2, 3), int), 'untie the two'),
  (bent, IN_OUT, jnp.ones((2, 3)), 'through this operation: max'),
  (post_norm, IN_OUT | {'mid': (4, 4)}, jnp.ones((2, 3)), 'as in a post-norm'),
  (shifted, IN_OUT | {'shift': (4,)}, jnp.ones((2, 3)), 'structured.centered'),
  (mixed, IN_OUT | {'other': (4, 2), 'shift': (4,)}, jnp.ones((2, 3)), "'other'.* keeps the mean"),
])
def test_what_cannot_be_rotated_is_refused_with_the_reason(function, shapes, x, said):
  own = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
  groups = structured.groups(function, own, x)
  with pytest.raises(ValueError, match=said):
    change = structured.centered if function is mixed else lambda *each: structured.rotate(*each, np.eye(4))
    change(groups, own, next(iter(groups)))


@pytest.mark.parametrize('call, said', [
  (lambda: structured.rotate(found(), params(), stream(), np.ones((WIDTH, WIDTH))), 'must be orthogonal'),
  (lambda: structured.rotate(found(), params(), 'none', np.eye(WIDTH)), "group 'none'"),
  (lambda: structured.slice_gpt(found(), params(), [TOKENS], 0.5), 'leaves less than 8 of 8'),
  (lambda: structured.slice_gpt(found().only('key:1'), {}, [TOKENS], stream='key:1'), 'another structure'),
  (lambda: structured.rotate(found(), params(), 'head:1', np.eye(12)), "'head:1' may not go: .* axis of the result"),
  (lambda: structured.slice_gpt(found(), params(), [], 0.5, multiple_of=1), 'there is no batch'),
  (lambda: structured.multi_pruner(found(), params(), loss, 0.2, widths='up/*', heads='x*'), "'up/\\*'"),
  (lambda: structured.multi_pruner(found(), params(), loss, 0.9, widths='up:1', heads='key:1'), 'nothing more can go'),
  (lambda: structured.tyr(found(), params(), [], loss), 'there is no batch'),
  (lambda: structured.is_rotated(found(), params(), {}, TOKENS), 'another structure'),
  (lambda: structured.tyr(found().only('key:2'), params(), [TOKENS], loss), 'no group has one product'),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()


# Searches.


def test_blocks_widths_and_heads_lose_less_than_blocks_alone():
  keep = structured.multi_pruner(found(), params(), loss, 0.35, widths='up:1', heads='key:1', step=2)
  size = structured.weights(found())
  sizes = lambda keep: {name: int(mask.sum()) for name, mask in keep.items()}
  assert size(sizes(keep)) <= 0.65 * size({})
  both = structured.search(found(), params(), loss, [structured.Stage(('up:1', 'key:1'), None, 0.65)])
  assert {name for name, mask in both.items() if not mask.any()} <= {'up:1', 'key:1'}
  small = structured.cut(found(), params(), keep)
  structured.prove(found(), params(), small, TOKENS)
  assert error(small) <= error(structured.cut(found(), params(), both))


def test_each_removal_of_a_search_is_the_one_that_the_loss_likes_best():
  (one,) = [structured.search(found(), params(), loss, [structured.Stage(('up:1', 'value:2'), 1, 0.999)])]
  gone = {name: np.flatnonzero(~mask) for name, mask in one.items() if not mask.all()}
  own = searching._Masked(found(), params(), loss, searching.saliences.mean_magnitude)
  every = {name: np.ones(group.size, bool) for name, group in found().items()}
  tried = {name: own.loss_of(searching._without(own, every, name, 1)) for name in ('up:1', 'value:2')}
  assert list(gone) == [min(tried, key=tried.get)] and all(len(units) == 1 for units in gone.values())


def test_an_evolution_keeps_the_sum_of_the_levels_and_finds_the_least():
  wanted = {'a': 4, 'b': 0, 'c': 2}
  best, value = searching.evolved(dict.fromkeys('abc', 5), lambda state: sum(
    abs(state[name] - wanted[name]) for name in state), dict.fromkeys('abc', 2), generations=20, offspring=8)
  assert best == wanted and value == 0


# Least squares.


def test_optimal_brain_surgery_finds_the_best_three_of_six_where_the_published_score_does_not():
  rng = np.random.default_rng(0)
  rows, w = rng.normal(size=(64, 6)) @ (np.eye(6) + 0.5), rng.normal(size=(6, 3))
  gram = rows.T @ rows
  damped = gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(6)
  product = damped @ w
  ((keep, fitted),) = least_squares.removals(gram, product, np.arange(6), [3])
  value = np.sum(fitted * (damped @ fitted)) / 2 - np.sum(fitted * product)
  assert np.flatnonzero(keep).tolist() == [0, 1, 4] and np.isclose(value, -1073.03, atol=0.01)
  assert not fitted[~keep].any()
  (_, both), (_, pairs) = (least_squares.removals(gram, product, labels, [1])[0] for labels in (
    np.array([0, 0, 0, 1, 1, 1]), np.array([-1, 0, 0, 1, 1, 1])))
  assert (both != 0).any(1).sum() == 3 and pairs[0].any()


def test_the_loss_of_a_group_is_the_rise_of_the_error_after_all_others_are_fitted_again():
  rng = np.random.default_rng(1)
  rows, w = rng.normal(size=(32, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(5, 2))
  gram = rows.T @ rows + np.eye(5)
  for gone in ([0], [1, 3]):
    inside = np.isin(np.arange(5), gone)
    left = np.zeros_like(w)
    left[~inside] = np.linalg.solve(gram[np.ix_(~inside, ~inside)], (gram @ w)[~inside])
    rise = np.sum((left - w) * (gram @ (left - w))) / 2
    inverse = np.linalg.inv(gram)
    assert least_squares._loss(w, inverse, inside) == pytest.approx(rise)
    fitted, _ = least_squares._removed(w, inverse, np.array(gone))
    np.testing.assert_allclose(fitted, left, atol=1e-8)


def test_inputs_that_are_always_zero_have_no_weight():
  ((keep, fitted),) = least_squares.removals(np.zeros((3, 3)), np.zeros((3, 2)), np.arange(3), [2])
  assert keep.sum() == 2 and not fitted.any()


def test_levels_that_are_searched_lose_less_than_uniform_ones_and_than_magnitude():
  options = {'levels': 5, 'rounds': 16}
  uniform = structured.tyr(found(), params(), [TOKENS], loss, 0.5, generations=0 or 1, offspring=1, **options)
  searched = structured.tyr(found(), params(), [TOKENS], loss, 0.5, generations=3, offspring=6, seed=1, **options)
  magnitude = structured.choose(found().only('up:1', 'key:1'), params(), 0.5, alone=True)
  assert error(searched) <= error(uniform) < error(structured.cut(found(), params(), magnitude))
  assert searched.params['down'].shape[0] == searched.kept['down:0'].sum() < 16
  assert rotating.DAMPING == least_squares.DAMPING
