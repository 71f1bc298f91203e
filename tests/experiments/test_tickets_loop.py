"""The loop over rounds at toy size: the masks and the points that it goes on from, soups, and what it survives."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import claims, configs, tickets, train
from experiments.loop import runs
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
  """Runs the command and returns its exit status."""
  given = ['--config', folder / 'config.py', '--workdir', workdir, '--data_dir', folder / 'data']
  return tickets.main([*map(str, given), *(part for change in changes for part in ('--set', change))])


@pytest.fixture(scope='module')
def whole(folder):
  """A job of two rounds with two members that nothing disturbed."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    assert call(folder, folder / 'whole') == 0
  return folder / 'whole'


def params(workdir, run):
  """The last parameters of a run, by path, `[rows, ...]`."""
  return dict(zip(*trees.flatten(io.read(workdir / run / 'checkpoints', 'params'))[:2]))


def said(capsys):
  return ' '.join(''.join(capsys.readouterr()).split())


def matrices(params):
  return {path: leaf for path, leaf in params.items() if path.endswith('kernel')}


def together(params, row):
  """The weights of one row in one array."""
  return np.concatenate([leaf[row].ravel() for leaf in matrices(params).values()])


def bits(workdir):
  """What is in the checkpoints of all runs."""
  steps = sorted(workdir.glob('*/checkpoints/[0-9]*'))
  return {str(step.relative_to(workdir)): [np.asarray(leaf).tobytes() for item in ('params', 'opt_state')
                                           for leaf in jax.tree.leaves(io.read(step, item))] for step in steps}


def test_masks_are_the_largest_of_the_trained_weights_and_nested(whole):
  dense, soup = params(whole, 'dense'), None
  for number, sparsity in SPARSITIES.items():
    found = params(whole, f'round-{number}')
    for row in range(4):  # members 0 and 1 of seed 0 and 7: 0-0, 0-7, 1-0, 1-7
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
      assert not np.array_equal(first, second)  # they saw their batches in another order
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
  comparison, = claims.soups(found)
  mean = np.mean([found[name]['test']['accuracy'] for name in each[:2]], axis=0)
  np.testing.assert_allclose(np.subtract(comparison.more, comparison.less),
                             100 * (np.array(found['soup']['test']['accuracy']) - mean))


def test_a_finished_job_is_shown_again_and_one_of_another_config_refused(folder, whole, monkeypatch, capsys):
  monkeypatch.setattr(tickets, 'prepare', None)  # nothing is left to prepare for
  assert call(folder, whole) == 0 and 'member-1' in capsys.readouterr().out
  assert call(folder, whole, 'tickets.sparsity=0.8') == 2
  assert 'tickets.sparsity: 0.75 -> 0.8' in said(capsys)


def test_resumes_after_a_finished_round_bit_for_bit(folder, whole, tmp_path):
  """Inside of a round it is `train.train` that resumes, and `test_train` that says so."""
  shutil.copytree(whole, copy := tmp_path / 'copy')
  (copy / 'results.json').unlink()
  shutil.rmtree(copy / 'round-2')
  assert call(folder, copy) == 0
  assert bits(copy) == bits(whole)
  found, wanted = (json.loads((workdir / 'results.json').read_text()) for workdir in (copy, whole))
  assert [one['test'] for one in found['outcomes']] == [one['test'] for one in wanted['outcomes']]
  assert found['barriers'] == wanted['barriers']


def test_a_signal_stops_it_between_two_steps(folder, tmp_path, monkeypatch, capsys):
  def batch(setup, step):
    if 'dense' not in setup.config.recipes:
      os.kill(os.getpid(), 15)
    return runs.batch(setup, step)

  monkeypatch.setattr(train, 'batch', batch)
  assert call(folder, tmp_path, 'tickets.rounds=1', 'steps=2') == 128 + 15
  heard = said(capsys)
  assert 'round-1 is saved. Resume with: ' in heard and '-m experiments.tickets --config' in heard
  assert [path.name for path in (tmp_path / 'round-1/checkpoints').iterdir()] == ['1']


@pytest.mark.parametrize('rewind', ['weights', 'learning_rate'])
def test_goes_on_from_the_weights_that_it_says(folder, tmp_path, monkeypatch, rewind):
  """A retraining at a learning rate of zero leaves what it started from."""
  monkeypatch.setattr(tickets, 'rates', lambda optimizer, rewind: {**optimizer, 'learning_rate': 0.0})
  changes = (f'tickets.rewind={rewind}', 'tickets.rewind_step=3', 'tickets.members=1', 'tickets.rounds=1')
  assert call(folder, tmp_path, *changes) == 0
  dense, found = params(tmp_path, 'dense'), params(tmp_path, 'round-1')
  start = dense
  if rewind == 'weights':
    start = params(tmp_path, 'early')
    at_step = io.read(tmp_path / 'dense/checkpoints/3', 'params')  # the dense run saves the newest two
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
  other = pathlib.Path(claims.CONFIGS / 'dynamic_vit_digits.py')
  assert tickets.main(['--config', str(other), '--workdir', str(tmp_path)]) == 2
  heard = said(capsys)
  assert 'python -m experiments.tickets' in heard and 'tickets is None' in heard


def test_the_learning_rate_of_a_retraining():
  optimizer = configs.load(claims.CONFIGS / 'soup_vit_digits.py').optimizer
  assert tickets.rates(optimizer, 'weights') == tickets.rates(optimizer, 'learning_rate') == optimizer
  fine = tickets.rates(optimizer, None)
  assert (fine.learning_rate, fine.decay, fine.warmup) == (0.01 * optimizer.learning_rate, 'constant', 0)
