"""Every notebook runs from top to bottom, with a 25th of its steps, and is committed without outputs.

By default the first runs in a kernel, and two others in this process, where they share compiled programs with the other
tests. `make test-full` runs all of them in kernels, with all steps, and `make docs` shows their outputs.
"""

import json
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
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


def test_the_first_notebook_runs_in_a_kernel(tmp_path, pytestconfig):
  in_a_kernel(NOTEBOOKS[0], tmp_path, is_whole(pytestconfig))


@pytest.mark.sampled(1)
@pytest.mark.parametrize('path', NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, pytestconfig, standard_promotion):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  if is_whole(pytestconfig):
    return in_a_kernel(path, tmp_path, True)
  import matplotlib

  import sparsejax
  matplotlib.use('Agg')
  monkeypatch.setattr(sparsejax.recipes, 'TABLE', dict(sparsejax.recipes.TABLE))
  namespace = {}
  for cell in code(path):
    exec(compile(shorter(cell), path.name, 'exec'), namespace)
  assert matplotlib.pyplot.get_fignums(), 'a notebook shows a picture'
  matplotlib.pyplot.close('all')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_stored_without_outputs_and_names_what_it_installs_once(path):
  notebook = json.loads(path.read_text())
  assert not any(cell.get('outputs') or cell.get('execution_count') for cell in notebook['cells']), 'strip the outputs'
  text = '\n'.join(code(path))
  assert len(text.splitlines()) < 200 and text.count("SOURCE = '..'") == 1 and 'http' not in text
