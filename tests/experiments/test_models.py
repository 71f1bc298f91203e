"""Checks the models' names, precision, symmetries and refusals, and that scanned blocks equal unrolled blocks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from experiments import models
from experiments.loop import evaluate
from experiments.models import convolutional, transformer
from sparsejax import trees

pytestmark = pytest.mark.usefixtures('standard_promotion')

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 11, (3, 12)).astype(np.int32)
DEPTH = 2
SMALL = dict(width=16, depth=DEPTH, heads=2)
CASES = [
    # model, classes, inputs, shape of logits
    ('vit', 10, IMAGES, (3, 10)),
    ('lm', 11, TOKENS, (3, 12, 11)),
]
both = pytest.mark.parametrize('name, classes, inputs, shape', CASES, ids=['vit', 'lm'])


@functools.cache
def _initial(name, classes, batch_shape, dtype, config):
  model = models.make(name, classes, **{**SMALL, **dict(config)})
  # The seed is an argument, because XLA would spend seconds on folding weights that are drawn from a constant seed.
  return model, jax.jit(lambda seed: model.init(jax.random.key(seed), jnp.zeros(batch_shape, dtype))['params'])


def made(name, classes, inputs, seed=0, **config):
  """Returns the model and its parameters, or only the shapes of the parameters if `seed` is `None`."""
  model, init = _initial(name, classes, inputs.shape, inputs.dtype, tuple(config.items()))
  return model, jax.eval_shape(init, 0) if seed is None else init(seed)


@functools.cache
def applied(model):
  return jax.jit(lambda params, inputs: model.apply({'params': params}, inputs))


def paths(params):
  names, leaves, _ = trees.flatten(params)
  return dict(zip(names, leaves))


def stacked(params):
  """Returns the parameters of an unrolled model in the tree of the scanned model."""
  rest = {key: value for key, value in params.items() if not key.startswith('block_')}
  blocks = [params[f'block_{layer}'] for layer in range(DEPTH)]
  return {**rest, 'blocks': jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)}


@both
def test_parameter_names(name, classes, inputs, shape):
  _, params = made(name, classes, inputs, seed=None)
  leaves = paths(params)
  for layer in range(DEPTH):
    assert leaves[f'block_{layer}/mlp/fc1/kernel'].shape == (16, 64)
    assert leaves[f'block_{layer}/mlp/fc2/kernel'].shape == (64, 16)
    for projection in ('query', 'key', 'value'):
      assert leaves[f'block_{layer}/attention/{projection}/kernel'].shape == (16, 2, 8)
    assert leaves[f'block_{layer}/attention/out/kernel'].shape == (2, 8, 16)
  assert leaves['head/kernel'].shape == (16, classes)
  assert leaves['patch_embed/kernel' if name == 'vit' else 'embed/embedding'].shape == (4 if name == 'vit' else 11, 16)
  picked = trees.select('test', trees.named('mlp/*/kernel'), params)
  assert [path for path, pick in zip(leaves, picked) if pick] == [
      f'block_{layer}/mlp/{matrix}/kernel' for layer in range(DEPTH) for matrix in ('fc1', 'fc2')]


@both
@pytest.mark.parametrize('dtype, short', [('float32', 'f32'), ('bfloat16', 'bf16'), (jnp.bfloat16, 'bf16')])
@pytest.mark.parametrize('scan', [False, True])
def test_computes_in_dtype_and_keeps_float32(name, classes, inputs, shape, dtype, short, scan):
  model, params = made(name, classes, inputs, seed=None, dtype=dtype, scan=scan)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  logits = jax.eval_shape(applied(model), params, inputs)
  assert logits.shape == shape and logits.dtype == jnp.float32
  lowered = applied(model).lower(params, inputs).as_text()
  operands = re.findall(r'dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)', lowered)
  assert len(operands) >= 8 and set(operands) == {(short, short)}


@pytest.mark.sampled(1)
@both
def test_bfloat16_is_near_float32(name, classes, inputs, shape):
  model, params = made(name, classes, inputs)
  exact = applied(model)(params, inputs)
  rounded = applied(models.make(name, classes, dtype='bfloat16', **SMALL))(params, inputs)
  error = float(jnp.abs(exact - rounded).max() / exact.std())
  assert 1e-4 < error < 0.1


@pytest.mark.sampled(1)
@both
def test_a_scanned_stack_is_the_same_function(name, classes, inputs, shape):
  model, params = made(name, classes, inputs)
  scanned, same_shapes = made(name, classes, inputs, seed=None, scan=True)
  stack = stacked(params)
  assert jax.tree.map(jnp.shape, stack) == jax.tree.map(jnp.shape, same_shapes)
  squares = lambda one: jax.jit(jax.value_and_grad(lambda p: (one.apply({'params': p}, inputs)**2).sum()))
  (a, grads), (b, scanned_grads) = squares(model)(params), squares(scanned)(stack)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), stacked(grads), scanned_grads)


def test_each_scanned_layer_has_its_own_draw():
  _, params = made('lm', 11, TOKENS, scan=True)
  layers = params['blocks']['mlp']['fc1']['kernel']
  assert not bool((layers[0] == layers[1]).any())


@both
def test_seeds_at_once_are_seeds_one_by_one(name, classes, inputs, shape):
  model, _ = made(name, classes, inputs)
  seeds = [made(name, classes, inputs, seed=seed)[1] for seed in range(3)]
  at_once = jax.vmap(applied(model), in_axes=(0, None))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds), inputs)
  one_by_one = jnp.stack([applied(model)(params, inputs) for params in seeds])
  np.testing.assert_allclose(at_once, one_by_one, rtol=1e-4, atol=1e-5)
  assert not np.allclose(at_once[0], at_once[1], atol=1e-2)


# The language model.


@pytest.fixture(scope='module', params=[False, True], ids=['', 'recall'])
def lm(request):
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    model, params = made('lm', 11, TOKENS, recall=request.param)
    yield functools.partial(applied(model), params)


@settings(max_examples=20, deadline=None)
@given(at=st.integers(0, 11), token=st.integers(0, 10))
def test_the_future_does_not_change_the_past(lm, at, token):
  changed = TOKENS.copy()
  changed[:, at] = (changed[:, at] + 1 + token % 10) % 11
  before, after = lm(TOKENS), lm(changed)
  assert bool((before[:, :at] == after[:, :at]).all())
  assert bool((before[:, at:] != after[:, at:]).any(-1).all())


def test_any_length(lm):
  np.testing.assert_allclose(lm(TOKENS[:, :5]), lm(TOKENS)[:, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_attention_that_recalls_starts_with_keys_like_queries_and_a_key_is_mixed_with_the_one_before(scan):
  model, params = made('lm', 11, TOKENS, scan=scan, recall=True)
  attention = (params['blocks'] if scan else params['block_0'])['attention']
  np.testing.assert_array_equal(attention['query']['kernel'], attention['key']['kernel'])
  assert not np.allclose(attention['query']['kernel'], attention['value']['kernel'])
  key, before = np.random.default_rng(0).normal(size=(2, 3, 2, 4)).astype(np.float32)
  gate = jnp.asarray([[0.0], [100.0]])  # The first head mixes halves, and the second keeps its own key.
  np.testing.assert_allclose(transformer.smeared(key, before, gate)[:, 0], (key + before)[:, 0] / 2, rtol=1e-6)
  np.testing.assert_array_equal(transformer.smeared(key, before, gate)[:, 1], key[:, 1])


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('recall', [False, True])
def test_only_distances_of_positions_count(scan, recall):
  model, params = made('lm', 11, TOKENS, scan=scan, recall=recall)
  run = lambda *positions: applied(model)(params, np.stack([TOKENS, np.broadcast_to(positions, TOKENS.shape)], -1))
  np.testing.assert_allclose(run(*range(30, 42)), applied(model)(params, TOKENS), rtol=1e-4, atol=1e-4)
  assert not np.allclose(run(*range(6), *range(9, 15))[:, 6:], applied(model)(params, TOKENS)[:, 6:], atol=1e-3)


def test_rotation_keeps_lengths_and_sees_only_distances():
  query, key = np.random.default_rng(2).normal(size=(2, 1, 1, 2, 8)).astype(np.float32)
  rotate = lambda x: transformer.rotated_at(jnp.broadcast_to(x, (1, 20, 2, 8)), jnp.arange(20)[None])
  products = jnp.einsum('bthd,bshd->hts', rotate(query), rotate(key))
  np.testing.assert_allclose(products[:, 3:15, 1:13], products[:, 5:17, 3:15], rtol=1e-4, atol=1e-4)
  assert not np.allclose(products[:, 3, 3:10], products[:, 3, 4:11], atol=1e-2)
  np.testing.assert_allclose(jnp.linalg.norm(rotate(query), axis=-1), np.broadcast_to(
      np.linalg.norm(query, axis=-1), (1, 20, 2)), rtol=1e-5)
  np.testing.assert_array_equal(rotate(query)[:, 0], query[:, 0])


# The image model.


def test_patches_are_squares_and_only_positions_tell_them_apart():
  model, params = made('vit', 10, IMAGES)
  apply = applied(model)
  swapped = IMAGES.copy()
  swapped[:, :2, :2], swapped[:, 4:6, 2:4] = IMAGES[:, 4:6, 2:4], IMAGES[:, :2, :2]
  blind = {**params, 'position_embed': jnp.zeros_like(params['position_embed'])}
  np.testing.assert_allclose(apply(blind, swapped), apply(blind, IMAGES), rtol=1e-4, atol=1e-5)
  assert not np.allclose(apply(params, swapped), apply(params, IMAGES), atol=1e-2)
  within = IMAGES.copy()
  within[:, 0, 0], within[:, 0, 1] = IMAGES[:, 0, 1], IMAGES[:, 0, 0]
  assert not np.allclose(apply(blind, within), apply(blind, IMAGES), atol=1e-3)


# Perceptrons and convolutions.


SHARED = [
    # model, fields, outputs, output shape, kernels
    ('mlp', {'widths': (7, 5)}, 4, (3, 4), ['fc0/kernel', 'fc1/kernel', 'head/kernel']),
    ('cnn', {'widths': (4, 6)}, 4, (3, 4), ['conv0/kernel', 'conv1/kernel', 'head/kernel']),
    ('sr', {'width': 4, 'depth': 1}, 1, (3, 16, 16, 1),
     ['conv_in/kernel', 'block_0_conv1/kernel', 'block_0_conv2/kernel', 'conv_up/kernel']),
]


@pytest.mark.parametrize('name, config, outputs, shape, kernels', SHARED, ids=[case[0] for case in SHARED])
def test_image_models(name, config, outputs, shape, kernels):
  """Compares the axes of the naming convention with the traced ones, and all seeds at once with one seed at a time."""
  model = models.make(name, outputs, **config)
  seeds = jax.jit(jax.vmap(lambda seed: model.init(jax.random.key(seed), IMAGES)['params']))(jnp.arange(2))
  first = jax.tree.map(lambda leaf: leaf[0], seeds)
  apply = lambda params, images: model.apply({'params': params}, images)
  images = apply(first, IMAGES)
  assert images.shape == shape and images.dtype == jnp.float32
  traced = sparsejax.contractions(apply, first, IMAGES)
  assert sorted(traced) == sorted(kernels)
  for path, leaf in paths(first).items():
    if path in traced:
      assert trees.conventional_axes(path, leaf.shape) == traced[path]._replace(source='convention')
  wanted = jax.vmap(apply, in_axes=(0, None))(seeds, IMAGES)
  for loop in (False, True):
    at_once = evaluate.predictor(evaluate.one_by_one(apply, loop))(seeds, IMAGES)
    np.testing.assert_allclose(at_once, wanted, rtol=1e-4, atol=1e-5)
  half = models.make(name, outputs, dtype='bfloat16', **config).apply({'params': first}, IMAGES)
  assert half.dtype == jnp.float32 and 1e-4 < float(jnp.abs(half - images).max() / images.std()) < 0.2


def test_convolutions_of_several_models_stay_convolutions_of_one():
  model = models.make('cnn', 4, widths=(4, 6))
  apply = lambda params, images: model.apply({'params': params}, images)
  params = jax.vmap(lambda seed: model.init(jax.random.key(seed), IMAGES)['params'])(jnp.arange(2))
  groups = lambda function: set(re.findall(r'feature_group_count = (\d+)', jax.jit(
      jax.vmap(function, in_axes=(0, None))).lower(params, IMAGES).as_text()))
  assert '2' in groups(apply) and groups(evaluate.one_by_one(apply, loop=False)) == {'1'}


def test_super_resolution_without_its_network_is_bicubic():
  model = models.make('sr', 1, width=4, depth=1)
  params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), IMAGES)['params'])
  np.testing.assert_allclose(
      model.apply({'params': params}, IMAGES), jax.image.resize(IMAGES, (3, 16, 16, 1), 'bicubic'), rtol=1e-6)


def test_a_pixel_shuffle_puts_each_channel_in_its_place():
  x = np.random.default_rng(4).normal(size=(2, 3, 5, 8)).astype(np.float32)
  shuffled = convolutional.pixel_shuffle(x)
  for i, j in np.ndindex(2, 2):
    np.testing.assert_array_equal(shuffled[:, i::2, j::2], x[..., 2 * (2 * i + j):][..., :2])


# Refusals.


@pytest.mark.parametrize('make, says', [
    (lambda: models.make('vitt', 10), ["unknown model 'vitt'", "Did you mean 'vit'", 'lm, minilm']),
    (lambda: models.make('vit', 10, widht=8), ["key of model 'vit' 'widht'", "Did you mean 'width'", 'patch']),
    (lambda: models.make('lm', 10, patch=8), ["key of model 'lm' 'patch'", 'mlp_ratio']),
    (lambda: models.make('lm', 10, dtype='bfloat61'), ["dtype 'bfloat61'", "Did you mean 'bfloat16'"]),
    (lambda: made('vit', 10, IMAGES, patch=3), ['patch 3 does not divide images of 8 x 8']),
    (lambda: made('vit', 10, IMAGES, heads=3), ['ViT: width 16 is no multiple of the 3 heads']),
    (lambda: made('lm', 10, TOKENS, heads=16), ['LM: width 16 is no multiple of twice the 16 heads']),
    (lambda: made('lm', 10, TOKENS, heads=4, recall=True), ['LM: width 16 is no multiple of eight times the 4 heads']),
])
def test_refusals(make, says):
  with pytest.raises(ValueError) as refusal:
    make()
  for words in says:
    assert words in str(refusal.value)
