"""Runs the last run of each protocol for a few steps, reads finished seeds again, and refuses unknown keys."""

import json

import numpy as np
import pictures
import pytest

from experiments import claims, configs, protocols
from experiments.loop.stopping import StopRequest

pytestmark = pytest.mark.usefixtures('standard_promotion')
JOBS = {'edges_digits': 'TEDDY-80', 'unlearning_digits': 'l1', 'transfer_digits': 'ticket-prompt',
        'posterior_digits': 'SSVI', 'clusters_digits': 'Turbo-VBI-runs', 'experts_digits': 'rectified',
        'zero_start_digits': 'ZerO-90', 'midpoints_digits': 'independent'}
DATA = {'train': pictures.drawn(132, 0), 'test': pictures.drawn(110, 1)}


def job(stem, run, **protocol):
  config = configs.load(claims.CONFIGS / f'{stem}.py', ['steps=6', 'seeds=(0,)', 'batch_size=8'])
  config = configs.merged(config, {'data': DATA}).unlock()
  smaller = {'every': 2, 'sparsity': 0.5}
  config.recipes = {run: {key: smaller.get(key, value) for key, value in configs.plain(config)['recipes'][run].items()}}
  config.protocol = {**(configs.plain(config)['protocol']), 'width': 8, **protocol}
  return config


def trained(config, workdir):
  with StopRequest() as request:
    return protocols.finished(config, workdir, request)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('name', JOBS)
def test_a_run_gives_a_score_for_each_seed_and_is_read_again(name, tmp_path):
  run = JOBS[name]
  found = trained(job(name, run), tmp_path)[run]
  assert 0 <= found['test']['accuracy'][0] <= 1 and 0 <= found['quality'][0] <= 1 and found['seeds'] == [0]
  labels = {'transfer_digits': lambda y: y[y >= 5], 'edges_digits': lambda y: np.concatenate([y, DATA['train'][1]])}
  counts = np.bincount(labels.get(name, lambda y: y)(DATA['test'][1]))
  counts = np.maximum(counts - 5, 0) if name == 'edges_digits' else counts  # five of each class are known
  assert found['labels']['chance'] == pytest.approx(counts.max() / counts.sum())
  file = tmp_path / run / 'seed_0.json'
  record = json.loads(file.read_text())
  file.write_text(json.dumps({**record, 'found': {**record['found'], 'score': 0.125}}))
  other = job(name, run)
  other.optimizer.learning_rate = 0.5
  for left in ('outcome.json', None):  # Neither an outcome nor a seed of another config is taken.
    with pytest.raises(ValueError, match='optimizer.learning_rate: .* -> 0.5'):
      trained(other, tmp_path)
    if left:
      (tmp_path / run / left).unlink()
  assert trained(job(name, run), tmp_path)[run]['test']['accuracy'] == [0.125]


def test_unknown_names_and_keys_are_refused(tmp_path):
  with pytest.raises(ValueError, match='protocol is None'):
    trained(configs.load(claims.CONFIGS / 'freeze_cnn_mnist.py'), tmp_path)
  for wrong, why in (({'name': 'edgs'}, "unknown protocol 'edgs'"), ({'widht': 3}, "unknown key of edges: 'widht'"),
                     ({'runs': {'a': {'oder': 1}}}, "'oder'")):
    with pytest.raises(ValueError, match=why):
      trained(job('edges_digits', 'TEDDY-80', **wrong), tmp_path)
