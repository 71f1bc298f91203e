"""Tests `prune` on the first layer of the pretrained encoder, with sentences and padding."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from experiments.models import encoders

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / 'golden' / 'minilm_embeddings.json').read_text())
WHERE = sj.trees.named('attention/*/kernel', 'mlp/*/kernel')
NAMES = ['attention/query', 'attention/key', 'attention/value', 'attention/out', 'mlp/fc1', 'mlp/fc2']


@pytest.fixture(scope='module')
def encoder():
  """Returns the parameters of the first layer, and batches of tokens with masks."""
  deeper = {f'block_{i}' for i in range(1, 6)}
  params = {key: value for key, value in encoders.load_pretrained().items() if key not in deeper}
  tokens = jnp.asarray([sentence['tokens'] for sentence in GOLDEN['sentences']], jnp.int32)
  return jax.tree.map(jnp.asarray, params), [tokens[:2], tokens[2:]]


def pruned(encoder, recipe):
  params, batches = encoder
  valid = [tokens != encoders.PADDING for tokens in batches]
  return sj.prune(encoders.embed, params, list(zip(batches, valid)), recipe, where=WHERE, valid=valid)


def test_wanda_prunes_the_encoder_to_one_half_and_reports_what_it_did(encoder, standard_promotion):
  params, batches = encoder
  result = pruned(encoder, sj.recipes.wanda(pattern=sj.NM(2, 4)))
  rows = result.report.rows
  assert [row.path for row in rows] == [f'block_0/{name}/kernel' for name in NAMES]
  words = sum(int((tokens != encoders.PADDING).sum()) for tokens in batches)
  assert {row.rows for row in rows} == {words} and {row.achieved for row in rows} == {0.5}
  assert result.report.dense == {'token_embed/embedding': 'left out by `where`'}
  query, mask = (np.asarray(tree['block_0']['attention']['query']['kernel']).reshape(384, 384)
                 for tree in (params, result.masks))
  x = np.concatenate([embedded(params, tokens) for tokens in batches])
  score = np.abs(query) * np.sqrt(np.square(x).sum(0))[:, None]
  kept = (np.argsort(np.argsort(-score.reshape(96, 4, 384), 1), 1) < 2).reshape(384, 384)
  assert (kept == mask).mean() > 0.9999  # but for near ties
  error = np.square(x @ (query * ~mask)).sum() / np.square(x @ query).sum()
  np.testing.assert_allclose([rows[0].before, rows[0].after], error, rtol=1e-3)


def embedded(params, tokens):
  """Returns the input of the first layer at the words of a batch, in NumPy."""
  tables = [np.asarray(params[f'{name}_embed']['embedding'], np.float64) for name in ('token', 'position', 'type')]
  x = tables[0][tokens] + tables[1][:tokens.shape[1]] + tables[2][0]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + encoders.EPSILON)
  x = x * np.asarray(params['embed_norm']['scale']) + np.asarray(params['embed_norm']['bias'])
  return x[np.asarray(tokens) != encoders.PADDING]
