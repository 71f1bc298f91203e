"""Every recipe, every argument and every public name has its place in the generated pages, and every link leads to one.

The pages are written by `docs/generator.py`, without Sphinx. `make docs` builds them and makes warnings errors.
"""

import ast
import importlib.util
import inspect
import pathlib
import re
import types

import conformance_page
import jax
import pytest

import sparsejax
from sparsejax import recipes

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / 'docs'
RECIPES = [(kind, name) for kind, table in recipes.TABLES.items() for name in table]


def loaded(name):
  spec = importlib.util.spec_from_file_location(name, DOCS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


generator = loaded('generator')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """Returns a folder like docs/, with all pages as Sphinx reads them."""
  folder = tmp_path_factory.mktemp('site') / 'docs'
  generator.write(folder / 'generated')
  for page in DOCS.glob('*.*'):
    (folder / page.name).write_bytes(page.read_bytes())
    if page.suffix == '.md':
      (folder / page.name).write_text(generator.inside(page.read_text()))
  return folder


def texts(folder):
  return {path: path.read_text() for path in sorted(folder.rglob('*.md'))}


def headings(text):
  titles = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles]


def outside_of_code(text):
  text = re.sub(r'^ {4}.*$', '', text, flags=re.MULTILINE)
  return re.sub(r'^```(python|bash|diff|py)\n.*?^```$|`[^`\n]*`', '', text, flags=re.DOTALL | re.MULTILINE)


def broken_links(folder):
  for path, text in texts(folder).items():
    for link in re.findall(r'\]\(([^)\s]*)\)', outside_of_code(text)):
      name, _, anchor = link.partition('#')
      target = path.parent / name if name else path
      if link.startswith('http') or not target.exists() or anchor and anchor not in headings(target.read_text()):
        yield f'{path.relative_to(folder)}: {link}'


def listed_pages(folder):
  """Returns the pages that a table of contents lists."""
  for path, text in texts(folder).items():
    for body in re.findall(r'```\{toctree\}\n(.*?)```', text, re.DOTALL):
      for line in body.splitlines():
        if line and not line.startswith(':'):
          yield from ({path.parent / f'{line}.md'} if '*' not in line else set(path.parent.glob(line)))


def test_links_lead_to_pages_and_headings_and_need_no_network(written):
  assert list(broken_links(written)) == []


def test_every_page_stands_in_one_table_of_contents(written):
  listed = [path.relative_to(written) for path in listed_pages(written)]
  pages = {path.relative_to(written) for path in [*texts(written), *written.rglob('*.ipynb')]}
  assert sorted(listed) == sorted(pages - {pathlib.Path('index.md')})


@pytest.mark.parametrize('kind, name', RECIPES, ids=lambda part: part)
def test_the_page_of_a_recipe_is_complete(kind, name):
  recipe = recipes.TABLES[kind][name]
  page = generator.recipe_page(kind, name, recipe)
  own, _ = generator.own_and_options(kind, recipe)
  assert all(cell for row in own for cell in row), 'say what the argument means, in the docstring or in MEANINGS'
  taken = inspect.signature(getattr(recipe, '__wrapped__', recipe)).parameters.values()
  assert [row[0] for row in own] == [f'`{p.name}`' for p in taken if p.kind is not p.VAR_KEYWORD]
  code = re.search(r'```python\n(.*?)```', page, re.DOTALL)[1]
  assert ast.parse(code).body[0].name == name and '"""' not in code
  assert inspect.getdoc(recipe).splitlines()[0] in page


def test_measured_rows_name_the_recipe_and_are_not_said_twice():
  found = generator.measured('sr_ste')
  rows = [line for part in found for line in part.splitlines()[4:]]
  assert len(rows) > 5 and len(rows) == len(set(rows)) and all('sr_ste' in row for row in rows)


def entries(text):
  """Returns the full names that a page of the reference defines."""
  module, = re.findall(r'^```\{py:module\} (\S+)$', text, re.MULTILINE)
  names = re.findall(r'^`+\{py:(?:function|class|data)\} (\w+)', text, re.MULTILINE)
  return {module, *(f'{module}.{name}' for name in names)}


def test_the_reference_has_every_public_name():
  pages = generator.reference_pages()
  defined = set().union(*(entries(text) for name, text in pages.items() if name != 'api/index.md'))
  for name in sparsejax.__all__:
    value = getattr(sparsejax, name)
    full = value.__name__ if isinstance(value, types.ModuleType) else f'{generator.home(value)}.{value.__name__}'
    assert full in defined and (isinstance(value, types.ModuleType) or f'`{full}`' in pages['api/index.md'])
  for module in generator.public_modules().values():
    for name, value in generator.own_names(module).items():
      assert isinstance(value, types.ModuleType) or f'{module.__name__}.{name}' in defined, name


def test_what_pages_and_notebooks_import_is_in_the_reference():
  texts = [path.read_text() for path in [ROOT / 'README.md', *DOCS.glob('*.md'), *(ROOT / 'notebooks').glob('*.ipynb')]]
  names = {name for text in texts for found in re.findall(r'from sparsejax import ([\w, ]+)', text)
           for name in found.split(', ')}
  assert {'hub', 'planning'} <= names <= {name.removeprefix('sparsejax.') for name in generator.public_modules()}


def test_signatures_can_be_parsed():
  heads = re.findall(r'^`+\{py:(?:function|class|method)\} [\w.]+(\(.*\))$', '\n'.join(
      generator.reference_pages().values()), re.MULTILINE)
  assert len(heads) > 150
  for head in heads:
    ast.parse(f'def f{head}: pass')


BLOCKS = re.findall(r'```python\n(.*?)```', (DOCS / 'troubleshooting.md').read_text(), re.DOTALL)
TITLES = re.findall(r'^## `(.*)`$', (DOCS / 'troubleshooting.md').read_text(), re.MULTILINE)


@pytest.fixture(scope='module')
def shared():
  namespace = {}
  exec(BLOCKS[0], namespace)
  return namespace


@pytest.mark.parametrize('title, code', list(zip(TITLES, BLOCKS[1:], strict=True)), ids=lambda text: text[:20])
def test_an_error_of_the_page_is_raised_with_its_message(shared, title, code, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    with pytest.raises(ValueError, match=re.escape(title)):
      exec(code, dict(shared))


def test_the_page_of_conformance_has_every_recipe_or_says_that_it_has_no_cell():
  text = (DOCS / 'conformance.md').read_text()
  columns = re.search(r'^\| \| (dense .*)\|$', text, re.MULTILINE)[1].split('|')
  measured = {name.strip().removesuffix('-phases') for name in columns}
  left = re.search(rf'^{re.escape(conformance_page.NOT_YET)}(.*)\.$', text, re.MULTILINE)
  left = {*left[1].split(', ')} if left else set()
  assert measured | left == {*recipes.TABLE} and not measured & left
