"""Tests that each config is strict, says its command and its measurements, and trains at toy size."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import configs, train
from experiments.data import sst2
from experiments.loop import runs
from sparsejax import recipes

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / 'experiments/configs').rglob('*.py')
                 if path.name not in ('__init__.py', 'default.py'))
JOBS = [path for path in CONFIGS if path.parent.name != 'claims']

SMALLER = {  # by model: the changes that make the model small
    'vit': ['model.depth=1', 'model.patch=4'], 'lm': ['model.depth=1', 'data.sequence_length=8'],
    'cnn': ['model.widths=(4, 8)'], 'mlp': ['model.widths=(8, 8)'], 'sr': ['model.depth=1', 'model.width=4'],
    'minilm': ['model.depth=1', 'model.width=8', 'model.heads=2', 'model.pretrained=False', 'data.sequence_length=8'],
}


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'book.txt'
  path.write_text('to be, or not to be, that is the question: ' * 200)
  return path


def smaller(path, text, directory):
  """Returns changes that train the config's last run alone, at toy size. The other recipes are made here."""
  config = configs.load(path)
  *others, last = configs.plain(config)['recipes'].items()
  signals = {'loss': jnp.sum, 'outputs': jnp.sum, 'key': jax.random.key(0)}
  for _, recipe in others:
    recipes.from_config(optax.sgd(0.1), recipe, total_steps=config.steps, signals=signals)
  # Nothing is downloaded: the images are digits, the text is a file, the sentences are made up.
  names = {'lm': text, 'minilm': sst2.NAME}
  if config.model.name == 'minilm':
    (directory / sst2.NAME).mkdir(parents=True)
    for file in sst2.FILES.values():
      (directory / sst2.NAME / file).write_text('a good film\t1\na bad film\t0\n' * 4)
  return [
      f'data.name={names.get(config.model.name, "digits")}', f'data.data_dir={directory}',
      'steps=10', 'seeds=(0,)', 'batch_size=4', 'measure_every=5', 'validate_every=10', 'checkpoint_every=10',
      'mesh.data=1', *SMALLER[config.model.name], f'recipes={dict([last])}', 'models={}', 'optimizers={}']


# A model that no other test trains. All: `--cells all`. `test_train` trains demo_vit_digits, `test_frontier` text.
FEW = ('movement_minilm_sst2',)


def pytest_generate_tests(metafunc):
  if 'job' in metafunc.fixturenames:
    few = [path for path in CONFIGS if path.stem in FEW]
    metafunc.parametrize('job', [*few, *JOBS] if metafunc.config.getoption('--cells') == 'all' else few,
                         ids=lambda path: path.stem)


def test_trains_at_toy_size(job, text, tmp_path, standard_promotion):
  arguments = ['--config', str(job), '--workdir', str(tmp_path / 'run')]
  changes = smaller(job, text, tmp_path / 'data')
  assert train.main(arguments + [part for change in changes for part in ('--set', change)]) == 0
  assert (tmp_path / 'run' / 'results.png').exists()


# `test_protocols` and `test_tasks_engine` run those with loops of their own.
LOOPS = re.compile(r'config\.(protocol|tasks)')
OF_RUNS = pytest.mark.parametrize('path', [path for path in CONFIGS if not LOOPS.search(path.read_text())],
                                  ids=lambda path: path.stem)


@OF_RUNS
def test_a_config_has_known_keys_and_recipes_alone(path, text, tmp_path):
  configs.load(path, smaller(path, text, tmp_path / 'data'))


@pytest.mark.sampled(6)
@OF_RUNS
def test_a_config_is_traced_at_toy_size(path, text, tmp_path, standard_promotion):
  """Traces each config's last run, because training all would take minutes; `test_claims` trains one claim."""
  config = configs.load(path, smaller(path, text, tmp_path / 'data'))
  run, = runs.build(runs.prepare(config), dict.fromkeys(configs.runs(config), tmp_path)).values()
  assert run.sparse


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_docstring_has_the_command_and_a_measurement(path):
  doc = path.read_text()
  assert re.search(r'python -m experiments\.(train|tickets|sweep|claims) ', doc)
  assert str(path.relative_to(ROOT)) in doc or f'--only {path.stem}\n' in doc
  assert 'Measured on' in doc or 'Not yet run' in doc


def test_a_key_that_no_config_has_is_refused(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text('from experiments.configs import default\n'
                  'def get_config():\n  c = default.get_config()\n  c.unlock()\n  c.sed = 1\n  return c\n')
  with pytest.raises(ValueError, match="'sed'"):
    configs.load(path)


def test_there_are_configs():
  assert {*FEW} <= {path.stem for path in CONFIGS}
