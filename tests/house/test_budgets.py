"""Sizes: functions, files and recipes stay small enough to be read at a glance. Caps are laws, medians are signals."""

import ast
import pathlib
import statistics

import code_lines
import pytest

import sparsejax

ROOT = pathlib.Path(sparsejax.__file__).parents[1]
PACKAGES = ('sparsejax', 'kernels_pallas', 'experiments', 'benchmarks')
FILES = {str(path.relative_to(ROOT)): path.read_text() for package in PACKAGES
         for path in sorted((ROOT / package).rglob('*.py'))}
RECIPES = [path for path in FILES if path.startswith('sparsejax/recipes/')]

FILE, FUNCTION, MEDIAN = 350, 50, 5
RECIPE_FILE, RECIPE = 250, 15


def long_files(files, most):
  return [path for path, text in files.items() if len(text.splitlines()) > most]


def long_functions(files, most):
  return [f'{path}:{line} {name}' for path, text in files.items()
          for name, line, length in code_lines.of_functions(text) if length > most]


def long_lambdas(files):
  """Names bound to a lambda that spans a line: a function that was not written."""
  return [f'{path}:{node.lineno}' for path, text in files.items() for node in ast.walk(ast.parse(text))
          if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
          and node.value.lineno != node.value.end_lineno]


def test_no_file_is_too_long():
  assert long_files(FILES, FILE) == []


def test_no_function_is_too_long():
  assert long_functions(FILES, FUNCTION) == []


def test_no_name_is_bound_to_a_lambda_of_several_lines():
  assert long_lambdas(FILES) == []


@pytest.mark.parametrize('package', PACKAGES)
def test_the_median_function_is_short(package):
  lengths = [length for path, text in FILES.items() if path.startswith(f'{package}/')
             for _, _, length in code_lines.of_functions(text)]
  assert statistics.median(lengths) <= MEDIAN


def test_recipes_are_sentences():
  files = {path: FILES[path] for path in RECIPES}
  assert long_files(files, RECIPE_FILE) == []
  assert long_functions(files, RECIPE) == [], 'a word is missing from the grammar'


def test_the_caps_find_what_is_too_long():
  line = '  x = [\n    1,\n  ]\n'
  source = f'def f():\n  """Returns\n\n  nothing.\n  """\n  # A comment.\n{line * 20}'
  assert list(code_lines.of_functions(source)) == [('f', 1, 60)]
  files = {'a.py': source, 'b.py': 'f = lambda x: x\ng = (lambda x:\n  x)\n'}
  assert long_functions(files, 50) == ['a.py:1 f'] and long_functions(files, 60) == []
  assert long_files(files, 60) == ['a.py'] and long_lambdas(files) == ['b.py:2']
