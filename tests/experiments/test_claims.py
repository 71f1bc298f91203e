"""Tests verdicts on made-up numbers, each claim against its config, and one claim from its config to its table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims, configs, models, train
from experiments.configs.claims import better
from experiments.loop import runs, tasks, training
from experiments.tables import claims as tables
from sparsejax import trees

pytestmark = pytest.mark.usefixtures('standard_promotion')

CONFIGS = claims.collected()


@pytest.mark.parametrize(('difference', 'half', 'bar', 'verdict'), [
    (2.0, 1.0, 0.0, 'reproduced'),
    (0.5, 1.0, 0.0, 'not reproduced'),
    (-0.5, 1.0, 0.0, 'not reproduced'),
    (1.0, 1.0, 0.0, 'not reproduced'),  # 0 is in the interval
    (-1.0, 1.0, 0.0, 'not reproduced'),
    (-2.0, 1.0, 0.0, 'the opposite'),
    (-0.5, 0.4, -1.0, 'reproduced'),  # worse, but by less than the bar
    (-0.5, 0.6, -1.0, 'not reproduced'),
    (-2.0, 0.6, -1.0, 'the opposite'),
    (2.0, 0.0, 0.0, 'reproduced'),  # counts that are the same for all seeds
    (0.0, 0.0, 0.0, 'not reproduced'),
    (2.0, np.nan, 0.0, 'not reproduced'),  # a single seed
])
def test_verdicts(difference, half, bar, verdict):
  assert tables.verdict(difference, half, bar) == verdict


def made_up(runs, task='classification', seeds=4, **scores):
  """Returns outcomes of `runs` with the given scores, or else with random scores."""
  rng, name = np.random.default_rng(0), tasks.TASKS[task].name
  return {run: {
      'name': run, 'task': task, 'seeds': list(range(seeds)), 'steps': 2, 'seconds': 1.0, 'empty': [0] * seeds,
      'asked': None if run.startswith('dense') else 0.5,
      'test': {name: scores.get(run, rng.random(seeds).tolist()), 'loss': [1.0] * seeds},
      'environment': {'platform': 'cpu', 'device': 'cpu', 'cpus': 2, 'jax': '0', 'commit': 'beef'}} for run in runs}


def test_a_comparison_is_seed_by_seed_in_the_unit_of_the_score():
  scores = tables.scored(made_up('ab', a=[0.2, 0.6, 0.9], b=[0.1, 0.5, 0.8], seeds=3))
  found = tables.judged(better('a', 'b')(scores))
  assert found['difference'] == pytest.approx(10) and found['ci95'] < 1e-6 and found['verdict'] == 'reproduced'
  assert found['unit'] == '%' and found['more'] == pytest.approx(100 * 1.7 / 3)
  assert tables.judged(better('b', 'a')(scores))['verdict'] == 'the opposite'
  images = made_up('ab', 'super_resolution', a=[30.0, 31.0], b=[29.0, 30.5])
  decibel = tables.judged(better('a', 'b')(tables.scored(images)))
  assert decibel['unit'] == 'dB' and decibel['difference'] == pytest.approx(0.75)
  assert decibel['verdict'] == 'not reproduced'


@pytest.mark.parametrize('name', CONFIGS)
def test_a_claim_compares_runs_of_its_config_over_enough_seeds(name):
  config, claim = configs.load(CONFIGS[name]), configs.module(CONFIGS[name]).CLAIM
  names = configs.runs(config) if config.tickets is None else ['dense', 'member-0', 'member-1', 'soup']
  outcomes = made_up(names, config.data.task)
  found = tables.Finding(name, claim, outcomes).judgements
  assert found and len({one['what'] for one in found}) == len(found) and len(config.seeds) >= 5
  assert {one['unit'] for one in found} <= {tasks.TASKS[config.data.task].unit, 'layers'}
  assert claim.title and claim.sentence.endswith('.') and claim.reference


@pytest.mark.parametrize('name', CONFIGS)
def test_a_claim_trains_each_of_its_models_dense_too(name):
  config = configs.plain(configs.load(CONFIGS[name]))
  model = lambda run: {**config['model'], **config['models'].get(run, {})}
  dense = [model(run) for run, recipe in config['recipes'].items() if recipe['name'] == 'dense']
  assert not [run for run in config['recipes'] if model(run) not in dense]


def test_a_claim_is_found_by_its_config_alone(tmp_path, monkeypatch):
  (tmp_path / 'new_claim.py').write_text('def get_config():\n  return {}\n')
  monkeypatch.setattr(claims, 'CONFIGS', tmp_path)
  assert claims.collected() == {'new_claim': tmp_path / 'new_claim.py'}


FAKE = """
from experiments.configs import claims, default

get_config = default.get_config
CLAIM = claims.Claim({!r}, 'b is better than a.', 'Nobody 2000', [claims.better('b', 'a')])
"""


def test_what_cannot_be_tested_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
  outcomes = made_up(['a', 'b', 'dense', 'dense-8'], a=[0.1] * 4, b=[0.2, 0.2, 0.2, 0.3], dense=[0.7, 0.7, 0.7, 0.8],
                     **{'dense-8': [0.5] * 4})
  outcomes['b']['environment'] |= {'cpus': 1, 'commit': 'cafe'}
  (tmp_path / 'configs').mkdir()
  for name in 'first', 'second', 'third':
    (tmp_path / 'configs' / f'{name}.py').write_text(FAKE.format(f'The {name} claim'))
  given = []

  def compared(config, workdir, request):
    given.append((config.steps, config.data.data_dir, workdir))
    if workdir.name == 'first':
      raise ValueError('no such data')
    if workdir.name == 'third':
      request.received = 15
      raise training.Stopped('b', request)
    return outcomes

  monkeypatch.setattr(claims, 'CONFIGS', tmp_path / 'configs')
  monkeypatch.setattr(train, 'compared', compared)
  call = ['--workdir', str(tmp_path), '--only', 'first', 'second', '--set', 'steps=3', '--data_dir', '/x']
  assert claims.main(call) == 2
  assert given == [(3, None, tmp_path / 'first'), (3, None, tmp_path / 'second')]  # The data are digits.
  (out, err), page = capsys.readouterr(), (tmp_path / 'claims.md').read_text()
  assert err == 'error: no such data\n' and 'not tested' in out and 'reproduced' in out and 'b > a' in out
  assert '## The first claim' in page and 'Not tested.' in page and '| b > a | 22.50 | 10.00 | +12.50 ± 7.96 |' in page
  assert 'Not pruned: dense 72.50 ± 7.96 %, dense-8 50.00 ± 0.00 %.' in page
  assert '4 s of training on cpu (cpu), 2 CPUs, jax 0, commit beef; cpu (cpu), 1 CPUs, jax 0, commit cafe.' in page
  assert json.loads((tmp_path / 'claims.json').read_text())['second'][0]['verdict'] == 'reproduced'
  assert (tmp_path / 'claims.png').read_bytes()[:4] == b'\x89PNG'
  assert claims.main(['--workdir', str(tmp_path / 'stopped')]) == 143  # Nothing is shown of a job that was stopped.
  assert not (tmp_path / 'stopped/claims.md').exists()
  heard = ' '.join(capsys.readouterr().out.split())
  assert 'Stopped by SIGTERM, b is saved. Resume with: ' in heard and '-m experiments.claims --workdir' in heard


def test_data_are_looked_for_where_they_are_said_to_be():
  assert claims.overrides(CONFIGS['freeze_cnn_mnist'], '/x', ['steps=3']) == ['data.data_dir=/x', 'steps=3']
  assert claims.overrides(CONFIGS['dynamic_vit_digits'], '/x', []) == []


def test_a_name_that_no_claim_has(tmp_path, capsys):
  with pytest.raises(SystemExit):
    claims.main(['--workdir', str(tmp_path), '--only', 'freeze_cnn'])
  assert 'choose from' in capsys.readouterr().err


def test_one_claim_from_its_config_to_its_table_and_not_twice(tmp_path, monkeypatch, capsys):
  toy = ['data.name=digits', f'data.data_dir={tmp_path / "data"}', 'steps=2', 'seeds=(0, 1)', 'batch_size=8',
         'model.widths=(4, 4)', 'mesh.data=1']
  changes = [part for change in toy for part in ('--set', change)]
  arguments = ['--workdir', str(tmp_path), '--only', 'freeze_cnn_mnist', *changes]
  assert claims.main(arguments) == 0
  before = (tmp_path / 'claims.json').read_text()
  assert json.loads(before)['freeze_cnn_mnist'][0]['what'] == 'FreezeNet > SNIP'
  assert 'FreezeNet > SNIP' in capsys.readouterr().out
  monkeypatch.setattr(runs, 'prepare', None)  # Nothing is left to prepare for.
  assert claims.main(arguments) == 0 and (tmp_path / 'claims.json').read_text() == before


def test_the_large_sparse_models_have_as_many_weights_as_the_small_dense_ones():
  config = configs.plain(configs.load(CONFIGS['large_sparse_vit_digits']))

  def kept(run):
    model = models.make(num_classes=10, **{**config['model'], **config['models'].get(run, {})})
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
    recipe, sizes = config['recipes'][run], dict(zip(*trees.flatten(jax.tree.map(lambda leaf: leaf.size, params))[:2]))
    pruned = trees.named(*recipe.get('where', ['nothing']))
    return sum(size * (1 - recipe.get('sparsity', 0) * pruned(path, size)) for path, size in sizes.items())

  for width in (24, 12):
    assert kept(f'sparse-{width}') == pytest.approx(kept(f'dense-{width}'), abs=1)
