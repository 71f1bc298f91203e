"""The README's Python blocks run in order, and its commands exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, standard_promotion):
  monkeypatch.chdir(tmp_path)
  code = [body for language, body in BLOCKS if language == 'python']
  assert len(code) >= 5
  namespace = {}
  for body in code:
    exec(compile(body, 'README.md', 'exec'), namespace)


SHELL = '\n'.join(body for language, body in BLOCKS if language == 'bash')


@pytest.mark.parametrize('target', sorted(set(re.findall(r'^make (\w+)', SHELL, re.MULTILINE))))
def test_make_targets_exist(target):
  assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)


def test_files_that_the_readme_names_exist():
  text = (ROOT / 'README.md').read_text()
  paths = set(re.findall(r'(?:experiments|notebooks|benchmarks|tests|docs)/[\w/.]*\w', text))
  assert paths and not [path for path in paths if not (ROOT / path).exists()]
