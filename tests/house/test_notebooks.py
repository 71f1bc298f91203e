"""Every notebook runs from top to bottom, and is committed without outputs."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get('outputs') or cell.get('execution_count') for cell in notebook.cells), 'strip the outputs'
  NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}).execute()


def test_there_are_notebooks():
  assert NOTEBOOKS
