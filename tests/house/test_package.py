"""The wheel holds the library alone, and trains, checks and packs a model without anything but its own requirements.

`make package` does the same in environments that are really empty.
"""

import configparser
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import sparsejax
from sparsejax import cli

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = re.search(r'```python\n(.*?)```', (ROOT / 'docs' / 'quick_start.md').read_text(), re.DOTALL)[1]
# Runs a script as if nothing were installed but what the wheel asks for.
WITHOUT = '''
import importlib.abc, sys
class Refused(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {absent!r}:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refused())
sys.path.insert(0, {place!r})
'''
ABSENT = ('flax', 'matplotlib', 'rich', 'ml_collections', 'grain', 'scipy', 'sklearn', 'experiments', 'benchmarks',
          'equinox', 'haiku', 'chex')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """Returns a folder with the files that a wheel has by setup.cfg. `make package` builds the wheel itself."""
  place, config = tmp_path_factory.mktemp('installed'), configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  for name in config['options.packages.find']['include'].split():
    files = list((ROOT / name.rstrip('*')).rglob('*.py'))
    data = config['options.package_data'].get(name.rstrip('*'), '').replace(',', ' ').split()
    for path in [*files, *(path for pattern in data for path in (ROOT / name.rstrip('*')).glob(pattern))]:
      copy = place / path.relative_to(ROOT)
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, copy)
  return place


def test_the_wheel_claims_two_names_and_has_the_data(installed):
  assert {path.name for path in installed.iterdir()} == {'sparsejax', 'kernels_pallas'}
  assert (installed / 'sparsejax' / 'py.typed').exists() and list((installed / 'sparsejax/advice/tables').iterdir())


def test_a_plain_jax_model_is_trained_checked_and_packed_by_the_wheel_without_an_extra(installed, tmp_path):
  assert len(SCRIPT.splitlines()) < 15
  script = WITHOUT.format(absent=ABSENT, place=str(installed)) + SCRIPT + (
      '\nassert sj.__file__.startswith(sys.path[0]) and "orbax" not in sys.modules'
      '\nassert sj.report(sj.formats.unpack(sj.io.load("model.safetensors")), state).violations == []')
  done = subprocess.run([sys.executable, '-W', 'error', '-P', '-c', script], cwd=tmp_path, capture_output=True,
                        text=True, check=False, env={'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  assert 'first' in done.stdout and '(traced)' in done.stdout


@pytest.mark.parametrize('argument, is_command', [('-m', True), ('notebook', False)])
def test_what_needs_an_extra_names_it_without_a_traceback(argument, is_command):
  code = (f'import sys, importlib.util as util\nsys.argv[0] = {argument!r}\nfound = util.find_spec\n'
          'util.find_spec = lambda name: None if name in ("flax", "rich") else found(name)\nimport experiments')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 1 and 'flax, rich cannot be imported' in done.stderr
  assert done.stderr.strip().endswith("pip install -e '.[experiments]'")
  assert ('Traceback' in done.stderr) != is_command


def test_the_version_stands_in_one_place(capsys):
  assert cli.main(['--version']) == 0
  assert capsys.readouterr().out.strip() == f'sparsejax {sparsejax.__version__}'
  assert f'\n## {sparsejax.__version__}\n' in (ROOT / 'CHANGELOG.md').read_text()
  assert f'\nversion: {sparsejax.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_extras_that_messages_name_exist():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  extras = set(config['options.extras_require'])
  named = {extra for path in [*ROOT.glob('sparsejax/**/*.py'), *ROOT.glob('experiments/**/*.py'), ROOT / 'README.md']
           for found in re.findall(r"(?:sparsejax|\.)\[(\w+(?:,\w+)*)\]'", path.read_text())
           for extra in found.split(',')}
  assert {'plot', 'experiments'} <= named <= extras
