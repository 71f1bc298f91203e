"""Trains the split digits for a few steps: a mask for each task forgets nothing, and a stopped job goes on."""

import json

import numpy as np
import pytest

from experiments import claims, configs, tasks
from experiments.loop.stopping import StopRequest

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture(scope='module')
def job():
  return lambda name, *changes: configs.load(claims.CONFIGS / f'{name}.py', [
      'steps=24', 'seeds=(0,)', 'batch_size=16', *changes])


def run(config, workdir, runs):
  config.recipes = {name: recipe for name, recipe in config.recipes.items() if name in runs}
  with StopRequest() as request:
    return tasks.trained(config, workdir, request)


def test_a_mask_for_each_task_forgets_nothing_and_results_are_read_again(job, tmp_path):
  config = job('task_masks_digits')
  config.tasks = {**config.tasks, 'classes': 5, 'width': 32}
  config.recipes['CL with DST']['every'] = 8
  found = run(config, tmp_path, ['CL with DST'])['CL with DST']
  matrix = np.array(found['matrix'][0])
  assert matrix.shape == (2, 2) and matrix[0, 1] == 0 and found['backward_transfer'] == [0.0] == found['forgetting']
  assert matrix[1].min() > 0.3, 'each task is learned'
  (tmp_path / 'CL with DST' / 'matrix_0.json').write_text(json.dumps([[0.5, 0.0], [0.25, 1.0]]))
  (tmp_path / 'CL with DST' / 'outcome.json').unlink()
  again = run(config, tmp_path, ['CL with DST'])['CL with DST']
  assert again['backward_transfer'] == [-0.25] and again['test']['accuracy'] == [0.625]


def test_sparcl_replays_and_keeps_its_masks_sparse(job, tmp_path):
  config = job('sparcl_digits')
  config.tasks = {**config.tasks, 'classes': 5, 'width': 32, 'buffer': 20}
  config.recipes['SparCL']['every'] = 8
  found = run(config, tmp_path, ['SparCL'])['SparCL']
  assert np.shape(found['matrix']) == (1, 2, 2) and np.isfinite(found['matrix']).all()


def test_a_config_without_tasks_and_an_unknown_key_are_refused(job, tmp_path):
  with pytest.raises(ValueError, match='tasks is None'):
    run(job('modules_mlp_digits'), tmp_path, [])
  config = job('task_masks_digits')
  config.tasks = {'clases': 2}
  with pytest.raises(ValueError, match="'clases'"):
    run(config, tmp_path, [])
