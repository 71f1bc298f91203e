"""Docstrings and comments can be read by a newcomer, as far as a program can tell; ten of them go to the reviewer."""

import ast
import pathlib
import random

import prose
import pytest

import sparsejax

ROOT = pathlib.Path(sparsejax.__file__).parents[1]
PATHS = [path for package in ('sparsejax', 'kernels_pallas', 'experiments', 'benchmarks')
         for path in sorted((ROOT / package).rglob('*.py'))]
SEED = 12


@pytest.mark.parametrize('path', PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_readable(path):
  assert list(prose.problems(path)) == []


def test_ten_docstrings_are_shown_to_whoever_reviews(record_property):
  """The end of a run prints them. Would someone who has read only the README say what each function returns?"""
  every = [(f'{path.relative_to(ROOT)}:{node.lineno} {node.name}', text) for path in PATHS
           for node, text in prose.docstrings(ast.parse(path.read_text())) if not isinstance(node, ast.Module)]
  drawn = random.Random(SEED).sample(every, 10)
  record_property('docstrings', [f'{place}\n{text}' for place, text in drawn])
  assert len({place for place, _ in drawn}) == 10


@pytest.mark.parametrize('source, problem', [
    ('def f():\n  """`x` in two words."""', 'does not say what the function does'),
    ('class A:\n  """The number of both."""', 'has no verb in its first sentence'),
    ('def f():\n  """returns x."""', 'does not begin with a capital'),
    ('def f():\n  """Returns x"""', 'is no whole sentence'),
    (f'def f():\n  """Returns {"a word " * 13}."""', '27 words'),
    ('def f():\n  """Returns `x`. It is a mask."""', 'begins with a pronoun'),
    ('def f():\n  """Returns `x`. What is pruned is zero."""', 'begins with a pronoun'),
    ('def f():\n  """Returns `x`. This is a mask."""', 'begins with a pronoun'),
    ('# Those that nobody ever touched before in a longer life\nx = 1', 'has no verb'),
    ('x = 1  # one for each of the leaves', 'begins with a pronoun'),
])
def test_what_a_newcomer_cannot_read_is_found(source, problem, tmp_path):
  (tmp_path / 'module.py').write_text(source)
  assert any(problem in found for found in prose.problems(tmp_path / 'module.py'))


@pytest.mark.parametrize('source', [
    '"""Maps names to words.\n\nAn example:\n\n    it = those(that, are, what, such)\n"""',
    f'def f():\n  """Returns `{"x " * 40}` (one for each leaf). There are no others."""',
    'def f():\n  """Returns the mask, 2.5 times as fast. This mask is `bool[]`."""',
    'x = 1  # bytes\n# In bytes.\ny = 2',
])
def test_what_a_newcomer_can_read_is_left_alone(source, tmp_path):
  (tmp_path / 'module.py').write_text(source)
  assert list(prose.problems(tmp_path / 'module.py')) == []
