"""Trains the split digits for a few steps: a mask for each task forgets nothing, and finished seeds are read again."""

import json

import numpy as np
import pictures
import pytest

from experiments import claims, configs, tasks
from experiments.loop.stopping import StopRequest

pytestmark = pytest.mark.usefixtures('standard_promotion')
DATA = {'train': pictures.drawn(220, 0), 'test': pictures.drawn(110, 1)}


@pytest.fixture(scope='module')
def job():
  return lambda name, *changes: configs.load(claims.CONFIGS / f'{name}.py', [
      'steps=40', 'seeds=(0,)', 'batch_size=16', 'optimizer.learning_rate=0.03', *changes])


def run(config, workdir, runs):
  config = configs.merged(config, {'data': DATA}).unlock()
  config.recipes = {name: recipe for name, recipe in config.recipes.items() if name in runs}
  with StopRequest() as request:
    return tasks.trained(config, workdir, request)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('claim, name', [('task_masks_digits', 'CL-DST'), ('sparcl_digits', 'SparCL')])
def test_tasks_are_learned_and_results_are_read_again(claim, name, job, tmp_path):
  config = job(claim)
  config.tasks = {**config.tasks, 'classes': 5, 'width': 32}
  config.recipes[name]['every'] = 8
  found = run(config, tmp_path, [name])[name]
  matrix = np.array(found['matrix'][0])
  assert matrix.shape == (2, 2) and matrix[0, 1] == 0 and matrix[0, 0] > 0.3
  chance = (1 / 3 + 1 / 5) / 2 if name == 'CL-DST' else 2 / 11  # of the classes that compete; one is twice as common
  assert found['labels'] == {'count': 110, 'chance': pytest.approx(chance)}
  if name == 'CL-DST':
    assert found['backward_transfer'] == [0.0] == found['forgetting'] and matrix[1].min() > 0.3
  file = tmp_path / name / 'seed_0.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), 'found': [[0.5, 0.0], [0.25, 1.0]]}))
  (tmp_path / name / 'outcome.json').unlink()
  again = run(config, tmp_path, [name])[name]
  assert again['backward_transfer'] == [-0.25] and again['test']['accuracy'] == [0.625]


def test_a_config_without_tasks_and_an_unknown_key_are_refused(job, tmp_path):
  with pytest.raises(ValueError, match='tasks is None'):
    run(job('modules_mlp_digits'), tmp_path, [])
  config = job('task_masks_digits')
  config.tasks = {'clases': 2}
  with pytest.raises(ValueError, match="'clases'"):
    run(config, tmp_path, [])
  config = job('sparcl_digits')
  config.tasks = {'removed': {'SparLC': 0.5}}
  with pytest.raises(ValueError, match="'SparLC'.*SparCL"):
    run(config, tmp_path, ['SparCL'])
