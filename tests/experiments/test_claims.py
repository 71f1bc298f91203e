"""Tests verdicts on made-up numbers, each claim against its config, and one claim from its config to its table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims, configs, models, sweep
from experiments.configs.claims import Claim, at_least, better
from experiments.loop import evaluate, runs, tasks, training
from experiments.tables import claims as tables
from sparsejax import trees

pytestmark = pytest.mark.usefixtures('standard_promotion')

CONFIGS = claims.collected()


@pytest.mark.parametrize(('difference', 'bar', 'adjusted', 'reason', 'verdict'), [
    (2.0, 0.0, 0.01, None, 'reproduced'),
    (2.0, 0.0, 0.05, None, 'not reproduced'),
    (-2.0, 0.0, 0.01, None, 'the opposite'),
    (-0.5, -1.0, 0.01, None, 'reproduced'),  # worse, but by less than the bar
    (-2.0, -1.0, 0.01, None, 'the opposite'),
    (0.5, 1.0, 0.01, None, 'the opposite'),  # better, but by less than the bar
    (2.0, 0.0, 0.01, 'at chance level', 'not testable'),
])
def test_verdicts(difference, bar, adjusted, reason, verdict):
  assert tables.verdict({'difference': difference, 'bar': bar, 'reason': reason}, adjusted) == verdict


def made_up(runs, task='classification', seeds=4, **scores):
  """Returns outcomes of `runs` with the given scores, or else with random scores."""
  rng, name = np.random.default_rng(0), tasks.TASKS[task].name
  return {run: {
      'name': run, 'task': task, 'seeds': list(range(seeds)), 'steps': 2, 'seconds': 1.0, 'empty': [0] * seeds,
      'asked': None if run.startswith('dense') else 0.5, 'labels': {'count': 400, 'chance': 0.05},
      'test': {name: scores.get(run, rng.random(seeds).tolist()), 'loss': [1.0] * seeds},
      'environment': {'platform': 'cpu', 'device': 'cpu', 'cpus': 2, 'jax': '0', 'commit': 'beef'}} for run in runs}


def found(outcomes, *comparisons, needs=(), missing=None):
  claim = Claim('a', 'A.', 'Nobody', comparisons, needs)
  return tables.verdicts([tables.Finding('a', claim, outcomes, missing or {})])['a']


def test_a_comparison_is_seed_by_seed_in_the_unit_of_the_score():
  outcomes = made_up('ab', a=[0.2, 0.6, 0.91], b=[0.1, 0.5, 0.8], seeds=3)
  first, second = found(outcomes, better('a', 'b', trains=False), better('b', 'a', trains=False))
  assert first['difference'] == pytest.approx(31 / 3) and first['ci95'] < 2 and first['verdict'] == 'reproduced'
  assert first['unit'] == '%' and first['more'] == pytest.approx(171 / 3) and second['verdict'] == 'the opposite'
  # Of 400 labels, 57 and 46.7 % are right: the interval of test sampling, were the labels of the two not the same ones.
  assert first['test95'] == pytest.approx(1.96 * 100 * np.sqrt((0.57 * 0.43 + 7 / 15 * 8 / 15) / 400), rel=1e-6)
  decibel, = found(made_up('ab', 'super_resolution', a=[30.0, 31.0], b=[29.0, 30.5]), better('a', 'b'))
  assert decibel['unit'] == 'dB' and decibel['difference'] == pytest.approx(0.75) and decibel['test95'] is None
  assert decibel['verdict'] == 'not reproduced'


def test_chance_level_is_that_of_the_commonest_label():
  """Padding has the weight zero, text has a label for each token, and images are no classes."""
  padded = {'labels': np.array([5, 1, 1]), 'weight': np.array([1.0, 0.0, 0.0])}
  batches = [{'labels': np.array([0, 2, 2]), 'weight': np.ones(3)}, padded]
  assert evaluate.labels(batches) == {'count': 4, 'chance': 0.5}
  tokens = {'labels': np.array([[1, 1, 4], [3, 3, 3]]), 'weight': np.array([1.0, 0.0])}
  assert evaluate.labels([tokens]) == {'count': 3, 'chance': 2 / 3}
  images = {'labels': np.ones((3, 4, 4, 1), np.float32), 'weight': np.array([1.0, 1.0, 0.0])}
  assert evaluate.labels([images, images]) == {'count': 4, 'chance': None}


def test_verdicts_of_a_page_hold_all_together():
  outcomes = made_up(['a', 'b', 'dense'], a=[0.5, 0.6, 0.7, 0.8], b=[0.45, 0.58, 0.63, 0.77],
                     dense=[0.2, 0.9, 0.4, 0.8])
  alone, = found(outcomes, better('a', 'b'))
  assert alone['p'] == alone['p_holm'] < 0.05 and alone['verdict'] == 'reproduced'
  others = [better('a', 'dense', trains=False), better('dense', 'b', trains=False)]
  together = found(outcomes, better('a', 'b'), *others)
  assert together[0]['p_holm'] == pytest.approx(3 * alone['p']) and together[0]['verdict'] == 'not reproduced'


def test_what_these_runs_cannot_decide_is_not_testable():
  """Runs at chance level, a baseline that is too weak, a single seed, and runs that were refused decide nothing."""
  lost = made_up(['a', 'b', 'dense'], a=[0.06, 0.03, 0.05, 0.06], b=[0.6, 0.7, 0.6, 0.7], dense=[0.7, 0.7, 0.7, 0.7])
  chance, dead = found(lost, better('b', 'a'), better('b', 'a', trains=False))
  assert chance['verdict'] == 'not testable' and chance['reason'] == 'a at chance level, 5.0 %'
  assert dead['verdict'] == 'reproduced' and chance['p_holm'] is None  # and the other does not pay for it
  # A calibration may be high where the model is at chance: the quality decides, and not the score.
  lost['b']['quality'], lost['dense']['quality'] = [0.05, 0.04, 0.06, 0.05], [0.7, 0.7, 0.7, 0.7]
  calibrated, = found(lost, better('dense', 'b'))
  assert calibrated['verdict'] == 'not testable' and calibrated['reason'] == 'b at chance level, 5.0 %'
  del lost['b']['quality']
  weak, = found(lost, better('dense', 'b'), needs=[at_least('dense', 98), at_least('dense', 60)])
  assert weak['reason'] == 'dense reaches 70.00 %, below 98' and weak['verdict'] == 'not testable'
  single, = found(made_up('ab', a=[0.2], b=[0.1], seeds=1), better('a', 'b', trains=False))
  assert single['reason'] == 'one seed has no interval'
  gone, kept = found(lost, better('c', 'b'), better('dense', 'b'), missing={'c': 'diverged: NaN'})
  assert (gone['what'], gone['reason'], gone['verdict']) == ('c', 'c: diverged: NaN', 'not testable')
  assert kept['reason'] is None
  with pytest.raises(KeyError):  # A comparison of a run that the config does not have.
    found(lost, better('d', 'b'))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_claim_compares_runs_of_its_config_over_enough_seeds(name):
  config, claim = configs.load(CONFIGS[name]), configs.module(CONFIGS[name]).CLAIM
  names = configs.runs(config) if config.tickets is None else ['dense', 'member-0', 'member-1', 'soup']
  outcomes = made_up(names, config.data.task)
  rows = tables.Finding(name, claim, outcomes).judgements
  assert rows and len({one['what'] for one in rows}) == len(rows) and len(config.seeds) >= 5
  assert {one['unit'] for one in rows} <= {tasks.TASKS[config.data.task].unit, 'layers'}
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
  outcomes = made_up(['a', 'b', 'dense', 'dense-8'], a=[0.1, 0.12, 0.1, 0.1], b=[0.2, 0.2, 0.2, 0.3],
                     dense=[0.7, 0.7, 0.7, 0.8], **{'dense-8': [0.5] * 4})
  outcomes['b']['environment'] |= {'cpus': 1, 'commit': 'cafe'}
  outcomes['b']['tuning'] = {'rates': [0.1, 0.2], 'seeds': [7, 8], 'best': 0.2}
  (tmp_path / 'configs').mkdir()
  for name in 'first', 'second', 'third':
    (tmp_path / 'configs' / f'{name}.py').write_text(FAKE.format(f'The {name} claim'))
  given = []

  def swept(config, workdir, grid, request):
    given.append((config.steps, config.data.data_dir, workdir))
    if workdir.name == 'first':
      raise ValueError('no such data')
    if workdir.name == 'third':
      request.received = 15
      raise training.Stopped('b', request)
    lines = [{**outcome, 'recipe': run, 'status': 'done', 'metric_task': outcome['task'], 'scores': outcome['test'],
              'phase': 'test'} for run, outcome in outcomes.items()]
    gone = {'recipe': 'c', 'status': 'diverged', 'reason': 'NaN', 'phase': 'test'}
    return sweep.Findings([*lines, gone], 'loss', 'a', None)

  monkeypatch.setattr(claims, 'CONFIGS', tmp_path / 'configs')
  monkeypatch.setattr(sweep, 'found', swept)
  call = ['--workdir', str(tmp_path), '--only', 'first', 'second', '--set', 'steps=3', '--data_dir', '/x']
  assert claims.main(call) == 2
  assert given == [(3, None, tmp_path / 'first'), (3, None, tmp_path / 'second')]  # The data are digits.
  (out, err), page = capsys.readouterr(), (tmp_path / 'claims.md').read_text()
  assert err == 'error: no such data\n' and 'not tested' in out and 'reproduced' in out and 'b > a' in out
  assert '## The first claim' in page and 'Not tested.' in page and '| b > a | 22.50 | 10.50 | +12.00 ± 8.62 |' in page
  assert 'Not pruned: dense 72.50 ± 7.96 %, dense-8 50.00 ± 0.00 %. A constant prediction: 5.00 %.' in page
  assert '4 s of training on cpu (cpu), 2 CPUs, jax 0, commit beef; cpu (cpu), 1 CPUs, jax 0, commit cafe.' in page
  assert 'c: diverged: NaN.' in page and 'the best of 0.1, 0.2 on the validation split' in page and 'b 0.2.' in page
  assert json.loads((tmp_path / 'claims.json').read_text())['second'][0]['verdict'] == 'reproduced'
  assert (tmp_path / 'claims.png').read_bytes()[:4] == b'\x89PNG'
  assert claims.main(['--workdir', str(tmp_path / 'stopped')]) == 143  # Nothing is shown of a job that was stopped.
  assert not (tmp_path / 'stopped/claims.md').exists()
  heard = ' '.join(capsys.readouterr().out.split())
  assert 'Stopped by SIGTERM, b is saved. Resume with: ' in heard and '-m experiments.claims --workdir' in heard


def test_data_are_looked_for_where_they_are_said_to_be():
  assert claims.overrides(CONFIGS['freeze_mlp_mnist'], '/x', ['steps=3']) == ['data.data_dir=/x', 'steps=3']
  assert claims.overrides(CONFIGS['dynamic_vit_digits'], '/x', []) == []


def test_a_name_that_no_claim_has(tmp_path, capsys):
  with pytest.raises(SystemExit):
    claims.main(['--workdir', str(tmp_path), '--only', 'freeze_mlp'])
  assert 'choose from' in capsys.readouterr().err


def test_one_claim_from_its_config_to_its_table_and_not_twice(tmp_path, monkeypatch, capsys):
  toy = ['data.name=digits', f'data.data_dir={tmp_path / "data"}', 'steps=2', 'seeds=(0, 1)', 'batch_size=8',
         'model.widths=(4, 4)', 'mesh.data=1']
  changes = [part for change in toy for part in ('--set', change)]
  arguments = ['--workdir', str(tmp_path), '--only', 'freeze_mlp_mnist', *changes]
  assert claims.main(arguments) == 0
  before = (tmp_path / 'claims.json').read_text()
  assert json.loads(before)['freeze_mlp_mnist'][0]['what'] == 'FreezeNet > SNIP'
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
