"""Tests the rounds of pruning at toy size: masks, starting points, soups, resuming and refusals."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from experiments import claims, configs, tickets, train
from experiments.loop import outcomes, runs
from experiments.tables import claims as tables
from sparsejax import io, trees

pytestmark = pytest.mark.usefixtures('standard_promotion')

TOY = """
from experiments.configs import default

def get_config():
  config = default.get_config()
  config.seeds = (0, 7)
  config.steps = 4
  config.batch_size = 8
  config.mesh = {'data': 1}
  config.model = {'name': 'mlp', 'widths': (8, 8)}
  config.optimizer.learning_rate = 1e-2
  config.tickets = {'rounds': 2, 'sparsity': 0.75, 'rewind_step': 2, 'retrain_steps': 3, 'members': 2}
  config.measure_every = config.validate_every = 2
  config.checkpoint_every = 1
  return config
"""
SPARSITIES = {1: 0.5, 2: 0.75}


@pytest.fixture(scope='module')
def folder(folder):
  (folder / 'config.py').write_text(TOY)
  return folder


def call(folder, workdir, *changes):
  """Returns the exit status of the command."""
  given = ['--config', folder / 'config.py', '--workdir', workdir, '--data_dir', folder / 'data']
  return tickets.main([*map(str, given), *(part for change in changes for part in ('--set', change))])


@pytest.fixture(scope='module')
def whole(folder):
  """Returns the workdir of a job of two rounds with two members that nothing disturbed."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    assert call(folder, folder / 'whole') == 0
  return folder / 'whole'


def params(workdir, run):
  """Returns the last parameters of a run by path, `[rows, ...]`."""
  return dict(zip(*trees.flatten(io.read(workdir / run / 'checkpoints', 'params'))[:2]))


def said(capsys):
  return ' '.join(''.join(capsys.readouterr()).split())


def matrices(params):
  return {path: leaf for path, leaf in params.items() if path.endswith('kernel')}


def together(params, row):
  """Returns the weights of one row in one array."""
  return np.concatenate([leaf[row].ravel() for leaf in matrices(params).values()])


def bits(workdir):
  """Returns the arrays in the checkpoints of all runs as bytes."""
  steps = sorted(workdir.glob('*/checkpoints/[0-9]*'))
  return {str(step.relative_to(workdir)): [np.asarray(leaf).tobytes() for item in ('params', 'opt_state')
                                           for leaf in jax.tree.leaves(io.read(step, item))] for step in steps}


def test_masks_are_the_largest_of_the_trained_weights_and_nested(whole):
  dense, soup = params(whole, 'dense'), None
  for number, sparsity in SPARSITIES.items():
    found = params(whole, f'round-{number}')
    for row in range(4):  # member-seed: 0-0, 0-7, 1-0, 1-7
      ticket = np.abs(together(dense if soup is None else soup, row % 2))
      kept = together(found, row) != 0
      assert kept.sum() == round(len(kept) * (1 - sparsity))
      assert ticket[kept].min() > ticket[~kept].max()
      assert not (kept & (ticket == 0)).any()
    soup = dict(zip(*trees.flatten(io.load(whole / f'round-{number}' / tickets.SOUP))[:2]))


def test_a_soup_is_the_average_of_its_members_under_their_mask(whole):
  for number in SPARSITIES:
    members = params(whole, f'round-{number}')
    soup = dict(zip(*trees.flatten(io.load(whole / f'round-{number}' / tickets.SOUP))[:2]))
    assert soup.keys() == members.keys()
    for path, leaf in soup.items():
      first, second = members[path][:2], members[path][2:]
      np.testing.assert_allclose(leaf, (first + second) / 2, rtol=1e-6, atol=1e-8)
      assert not np.array_equal(first, second)  # The members saw their batches in different orders.
    for seed in range(2):
      np.testing.assert_array_equal(together(soup, seed) == 0, together(members, seed) == 0)


def test_results_have_each_seed_of_dense_members_and_soup(whole, capsys):
  results = json.loads((whole / 'results.json').read_text())
  found = {outcome['name']: outcome for outcome in results['outcomes']}
  each = ['member-0', 'member-1', 'soup']
  assert list(found) == ['dense', *(f'round-1-{name}' for name in each), *each]
  assert all(len(outcome['test']['accuracy']) == 2 for outcome in found.values())
  assert found['dense']['seeds'] == found['member-0']['seeds'] == [0, 7] != found['member-1']['seeds']
  assert found['round-1-soup']['achieved'] == pytest.approx(0.5, abs=2e-3)
  assert found['soup']['achieved'] == pytest.approx(0.75, abs=2e-3)
  assert [np.shape(barrier['losses']) for barrier in results['barriers']] == [(2, 11)] * 2
  ends = np.array(results['barriers'][1]['losses'])[:, [0, -1]].T
  np.testing.assert_allclose(ends, [found[name]['test']['loss'] for name in each[:2]], rtol=1e-5)
  assert '| soup | 2 |' in (whole / 'results.md').read_text()
  assert (whole / 'results.png').read_bytes()[:4] == b'\x89PNG'
  compare, = configs.module(claims.collected()['soup_mlp_mnist']).CLAIM.comparisons
  comparison = compare(tables.scored(found))
  mean = np.mean([found[name]['test']['accuracy'] for name in each[:2]], axis=0)
  np.testing.assert_allclose(np.subtract(comparison.more, comparison.less),
                             100 * (np.array(found['soup']['test']['accuracy']) - mean))


def test_a_finished_job_is_shown_again_and_one_of_another_config_refused(folder, whole, monkeypatch, capsys):
  monkeypatch.setattr(runs, 'prepare', None)  # Nothing is left to prepare for.
  assert call(folder, whole) == 0 and 'member-1' in capsys.readouterr().out
  assert call(folder, whole, 'tickets.sparsity=0.8') == 2
  assert 'tickets.sparsity: 0.75 -> 0.8' in said(capsys)


def test_resumes_after_a_finished_round_bit_for_bit(folder, whole, tmp_path):
  """Removes the second round and the results; `test_train` tests the resuming inside a round."""
  shutil.copytree(whole, copy := tmp_path / 'copy')
  (copy / 'results.json').unlink()
  shutil.rmtree(copy / 'round-2')
  assert call(folder, copy) == 0
  assert bits(copy) == bits(whole)
  found, wanted = (json.loads((workdir / 'results.json').read_text()) for workdir in (copy, whole))
  assert [one['test'] for one in found['outcomes']] == [one['test'] for one in wanted['outcomes']]
  assert found['barriers'] == wanted['barriers']


def test_parameters_that_were_changed_after_the_test_are_refused(folder, whole, tmp_path, capsys):
  shutil.copytree(whole, copy := tmp_path / 'copy')
  (copy / 'results.json').unlink()
  outcome = json.loads((path := copy / 'round-1' / outcomes.FILE).read_text())
  outcome['checkpoint']['fingerprint'] ^= 1
  path.write_text(json.dumps(outcome))
  assert call(folder, copy) == 2
  assert 'round-1: the parameters in' in (heard := said(capsys)) and f'Remove {copy}/round-1 to train' in heard


def test_a_signal_stops_it_between_two_steps(folder, tmp_path, monkeypatch, capsys):
  whole_batch = runs.batch

  def batch(setup, step):
    if 'dense' not in setup.config.recipes and step == 1:
      os.kill(os.getpid(), 15)
    return whole_batch(setup, step)

  monkeypatch.setattr(runs, 'batch', batch)
  assert call(folder, tmp_path, 'tickets.rounds=1', 'steps=2') == 128 + 15
  heard = said(capsys)
  assert 'round-1 is saved. Resume with: ' in heard and '-m experiments.tickets --config' in heard
  assert sorted(path.name for path in (tmp_path / 'round-1/checkpoints').iterdir()) == ['1', '2']


@pytest.mark.sampled(1)
@pytest.mark.parametrize('rewind', ['weights', 'learning_rate'])
def test_goes_on_from_the_weights_that_it_says(folder, tmp_path, monkeypatch, rewind):
  """Retrains at a learning rate of zero, which leaves the weights that the round started from."""
  monkeypatch.setattr(tickets, 'rates', lambda optimizer, rewind: {**optimizer, 'learning_rate': 0.0})
  changes = (f'tickets.rewind={rewind}', 'tickets.rewind_step=3', 'tickets.members=1', 'tickets.rounds=1')
  assert call(folder, tmp_path, *changes) == 0
  dense, found = params(tmp_path, 'dense'), params(tmp_path, 'round-1')
  start = dense
  if rewind == 'weights':
    start = params(tmp_path, 'early')
    at_step = io.read(tmp_path / 'dense/checkpoints/3', 'params')  # The dense run keeps its newest two checkpoints.
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(at_step)] == [x.tobytes() for x in start.values()]
  for path, leaf in found.items():
    kept = leaf != 0 if path in matrices(found) else True
    np.testing.assert_array_equal(leaf, start[path] * kept)
  ticket = np.abs(together(dense, 0))
  kept = together(found, 0) != 0
  assert ticket[kept].min() > ticket[~kept].max()
  names = [one['name'] for one in json.loads((tmp_path / 'results.json').read_text())['outcomes']]
  assert names == ['dense', f'imp-{rewind}']


@pytest.mark.parametrize(('change', 'reason'), [
    ('tickets.round=1', "'tickets.round'"), ('tickets.rewind=weight', "'weight'"), ('tickets.members=0', 'members=0'),
    ('tickets.sparsity=1', 'between 0 and 1'), ('tickets.rewind_step=9', 'at most steps=4'),
    ("recipes={'a': {'name': 'dense'}}", 'tickets.recipe'),
])
def test_refusals_say_why(folder, tmp_path, capsys, change, reason):
  assert call(folder, tmp_path, change) == 2
  assert reason in said(capsys)


def test_each_program_refuses_the_configs_of_the_other(folder, tmp_path, capsys):
  assert train.main(['--config', str(folder / 'config.py'), '--workdir', str(tmp_path)]) == 2
  other = claims.collected()['dynamic_vit_digits']
  assert tickets.main(['--config', str(other), '--workdir', str(tmp_path)]) == 2
  heard = said(capsys)
  assert 'python -m experiments.tickets' in heard and 'tickets is None' in heard


def test_the_learning_rate_of_a_retraining():
  optimizer = configs.load(claims.collected()['soup_mlp_mnist']).optimizer
  assert tickets.rates(optimizer, 'weights') == tickets.rates(optimizer, 'learning_rate') == optimizer
  fine = tickets.rates(optimizer, None)
  assert (fine.learning_rate, fine.decay, fine.warmup) == (0.01 * optimizer.learning_rate, 'constant', 0)
