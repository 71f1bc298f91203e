"""Runs the last run of each protocol for a few steps, reads finished seeds again, and refuses unknown keys."""

import json

import numpy as np
import pytest

from experiments import claims, configs, protocols
from experiments.loop.stopping import StopRequest

pytestmark = pytest.mark.usefixtures('standard_promotion')
JOBS = {'edges_digits': 'TEDDY-80', 'unlearning_digits': 'l1', 'transfer_digits': 'ticket-prompt',
        'posterior_digits': 'SSVI', 'clusters_digits': 'Turbo-VBI-runs', 'experts_digits': 'rectified',
        'zero_start_digits': 'ZerO-90', 'midpoints_digits': 'independent'}


def images(count, seed):
  """Returns images and labels: each class is bright in a place of its own, and class 3 is twice as common."""
  labels = np.arange(count) % 11 % 10
  labels[::11] = 3
  x = np.random.default_rng(seed).random((count, 8, 8, 1), np.float32) / 2
  x[np.arange(count), labels % 8, labels // 8 * 4] += 1
  return x, labels


DATA = {'train': images(132, 0), 'test': images(110, 1)}


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
  assert 0 <= found['test']['accuracy'][0] <= 1 and found['beside'].keys() | {1} and found['seeds'] == [0]
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
