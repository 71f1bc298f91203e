"""Type checkers find nothing in the library and in what a user writes, and find the mistakes of `typed_user.py`.

mypy checks both, by the tables of `pyproject.toml`. pyright checks the user's file against an installed library.
"""

import configparser
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import sparsejax as sj

ROOT = pathlib.Path(sj.__file__).parents[1]
USER = ROOT / 'tests' / 'support' / 'typed_user.py'


def checked(*command, cwd=ROOT):
  """Returns what a type checker of this environment prints, after it has found nothing."""
  done = subprocess.run([sys.executable, '-m', *command], capture_output=True, text=True, cwd=cwd, check=False)
  assert done.returncode == 0, f'{done.stdout}{done.stderr}\nThe checkers come with `make setup`.'
  return done.stdout


def test_mypy_finds_nothing_in_the_library_nor_in_what_a_user_writes():
  assert 'no issues found' in checked('mypy')


def test_pyright_finds_nothing_in_what_a_user_writes(tmp_path):
  """The library lies beside the packages of this environment, as pip puts it there: types are read from `py.typed`."""
  venv.create(tmp_path / 'env', with_pip=False, symlinks=True)
  python = tmp_path / 'env' / 'bin' / 'python'
  where = subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], check=True,
                         capture_output=True, text=True).stdout.strip()
  pathlib.Path(where, 'others.pth').write_text(sysconfig.get_path('purelib'))
  for package in ('sparsejax', 'kernels_pallas', 'experiments'):
    os.symlink(ROOT / package, pathlib.Path(where, package))
  (tmp_path / USER.name).write_text(USER.read_text())
  # optax has neither stubs nor `py.typed`.
  config = {'include': [USER.name], 'typeCheckingMode': 'strict', 'reportUnnecessaryTypeIgnoreComment': True,
            'reportMissingTypeStubs': False}
  (tmp_path / 'pyrightconfig.json').write_text(json.dumps(config))
  assert '0 errors, 0 warnings' in checked('pyright', '--pythonpath', str(python), cwd=tmp_path)


def test_an_installed_library_says_that_it_has_types():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  assert 'py.typed' in setup['options.package_data']['sparsejax'] and (ROOT / 'sparsejax' / 'py.typed').is_file()


def test_the_list_of_recipes_for_type_checkers_is_that_of_the_table():
  names = set(sj.recipes.__all__)
  assert names >= {*sj.recipes.TABLE} and all(hasattr(sj.recipes, name) for name in names)
  assert {name for name in names if name in sj.recipes.TABLE} == {*sj.recipes.TABLE}
