"""Every notebook runs from top to bottom, with a 25th of its steps, and is committed without outputs.

By default one of them runs in a kernel, and two others in this process, where they share compiled programs with the
other tests. The names of the library in all of them are looked up. `make test-full` runs all of them in kernels, with
all steps, and `make docs` shows their outputs.
"""

import functools
import json
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

import sparsejax

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
# The quickest run in each `make test`.
IN_A_KERNEL, = (path for path in NOTEBOOKS if path.stem.startswith('05'))
OFTEN = ('02', '08')
SHORTER = re.compile(r'((?:(?:steps|layers) ?=|\'steps\':|end=|range\() ?)(\d+)')


def is_whole(config):
  return config.getoption('--cells') == 'all'


def in_a_kernel(path, folder, whole):
  notebook = nbformat.read(path, as_version=4)
  if not whole:
    for cell in notebook.cells:
      cell.source = shorter(cell.source)
  NotebookClient(notebook, timeout=900, resources={'metadata': {'path': str(folder)}}).execute()


def shorter(source):
  return SHORTER.sub(lambda found: f'{found[1]}{-(-int(found[2]) // 25)}', source)


def code(path):
  """Returns the code of the cells; a line that installs something becomes an error."""
  cells = [''.join(cell['source']) for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
  return [re.sub(r'^( *)%pip.*$', r'\1raise', cell, flags=re.MULTILINE) for cell in cells]


def test_a_notebook_runs_in_a_kernel(tmp_path, pytestconfig):
  in_a_kernel(IN_A_KERNEL, tmp_path, is_whole(pytestconfig))


@pytest.mark.parametrize('path', [path for path in NOTEBOOKS if path != IN_A_KERNEL], ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, pytestconfig, standard_promotion):
  if path.stem[:2] not in OFTEN and not is_whole(pytestconfig):
    pytest.skip('runs under --cells all')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  if is_whole(pytestconfig):
    return in_a_kernel(path, tmp_path, True)
  import matplotlib

  matplotlib.use('Agg')
  monkeypatch.setattr(sparsejax.recipes, 'TABLE', dict(sparsejax.recipes.TABLE))
  namespace = {}
  for cell in code(path):
    exec(compile(shorter(cell), path.name, 'exec'), namespace)
  assert matplotlib.pyplot.get_fignums(), 'a notebook shows a picture'
  matplotlib.pyplot.close('all')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_names_of_the_library_in_a_notebook_exist(path):
  found = set()
  for cell in code(path):
    compile(cell, path.name, 'exec')
    for name in re.findall(r'\bsj((?:\.[A-Za-z]\w*)+)', cell):
      functools.reduce(getattr, name[1:].split('.'), sparsejax)
      found.add(name)
  assert found or 'experiments' in path.read_text()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_stored_without_outputs_and_names_what_it_installs_once(path):
  notebook = json.loads(path.read_text())
  assert not any(cell.get('outputs') or cell.get('execution_count') for cell in notebook['cells']), 'strip the outputs'
  text = '\n'.join(code(path))
  assert len(text.splitlines()) < 200 and text.count("SOURCE = '..'") == 1 and 'http' not in text
