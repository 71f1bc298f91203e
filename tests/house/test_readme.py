"""Runs the Python blocks of the README and of its pages, and checks commands, paths, links, length and sentences."""

import pathlib
import re

import prose
import pytest

import sparsejax

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / 'README.md'
# The pages continue the README, and each other, in this order: a block may use the names of the blocks before it.
PAGES = [ROOT / 'docs' / f'{name}.md' for name in (
    'post_training', 'activation', 'training', 'recipes', 'packed', 'experiments', 'measured', 'words', 'scale',
    'structured',
    'interoperability', 'quick_start', 'your_own_method', 'concepts', 'which_method', 'troubleshooting', 'index',
    'gates_and_tasks', 'experts', 'after_training', 'claims', 'claims_of_systems', 'conformance',
    'progressive_gradient_flow', 'decoding', 'attention')]
# Commands write these pages, and have laws of their own.
WRITTEN = [ROOT / 'docs' / f'{name}.md' for name in ('claims', 'claims_of_systems', 'conformance')]
RAISING = ROOT / 'docs' / 'troubleshooting.md'  # `test_docs` runs its blocks.
OTHERS = [ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']
TEXTS = {path: path.read_text() for path in (README, *PAGES, *OTHERS)}


def blocks(language):
  return [body for path, text in TEXTS.items() if path != RAISING
          for body in re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)]


def headings(text):
  """Returns the anchors that GitHub gives to the headings of a page."""
  titles = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles]


def sentences(text):
  """Returns the prose of a page: without blocks, tables, headings, targets of links and emphasis."""
  text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  text = re.sub(r'\]\([^)]*\)', ']', text)
  return '\n'.join('' if line.startswith(('|', '#')) else line.replace('**', '') for line in text.split('\n'))


def test_python_blocks_run(tmp_path, monkeypatch, standard_promotion):
  monkeypatch.chdir(tmp_path)
  code = blocks('python')
  assert len(code) >= 9
  namespace = {}
  for body in code:
    body = body.replace('for _ in range(100)', 'for _ in range(4)')  # `test_package` runs the quick start as it is.
    exec(compile(body, 'a Python block of the README or of docs/', 'exec'), namespace)


@pytest.mark.parametrize('target', sorted(set(re.findall(r'^make ([\w-]+)', '\n'.join(blocks('bash')), re.MULTILINE))))
def test_make_targets_exist(target):
  assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: path.stem)
def test_files_that_a_page_names_exist(path):
  named = set(re.findall(r'\b(?:experiments|notebooks|benchmarks|tests|docs|kernels_pallas)/[\w/.]*\w', TEXTS[path]))
  assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path):
  for link in re.findall(r'\]\(([^)]*)\)', TEXTS[path]):
    name, _, anchor = link.partition('#')
    target = path.parent / name if name else path
    assert target.exists(), link
    assert not anchor or anchor in headings(target.read_text()), link


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_every_page_is_linked_from_the_readme(page):
  assert f'](docs/{page.name})' in TEXTS[README]


def test_the_readme_is_short():
  assert len(TEXTS[README].splitlines()) <= 150


@pytest.mark.parametrize('path', [path for path in TEXTS if path not in WRITTEN], ids=lambda path: path.stem)
def test_sentences_can_be_read_by_a_newcomer(path):
  assert list(prose.of_text(sentences(TEXTS[path]))) == []


def test_no_page_is_left_out():
  assert sorted(PAGES) == sorted((ROOT / 'docs').glob('*.md'))


def test_every_recipe_has_its_row():
  rows = re.findall(r'^\| `(\w+)` \|', (ROOT / 'docs' / 'recipes.md').read_text(), re.MULTILINE)
  assert sorted(rows) == sorted(name for table in sparsejax.recipes.TABLES.values() for name in table)


def test_figures_of_the_readme_are_those_of_the_pages():
  table = re.search(r'\| what \| measured on .*?\n\n', TEXTS[README], re.DOTALL)[0]
  figures = re.findall(r'\d+\.\d+', table)
  pages = TEXTS[ROOT / 'docs' / 'measured.md'] + TEXTS[ROOT / 'docs' / 'packed.md']
  assert len(figures) > 8 and not [figure for figure in figures if not re.search(rf'(?<![\d.]){figure}(?!\d)', pages)]


def test_counts_of_the_readme_are_those_of_the_repository():
  words = 'one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen'.split()
  script = re.search(r'```python\n(.*?)```', TEXTS[ROOT / 'docs' / 'quick_start.md'], re.DOTALL)[1]
  claims = [path for path in (ROOT / 'experiments/configs/claims').glob('*.py')
            if path.stem != '__init__' and 'Not yet run' not in path.read_text()]
  counts = {'a script of {} lines': len(script.splitlines()), 'which of {} published claims': len(claims)}
  for text, count in counts.items():
    assert any(text.format(name) in TEXTS[README] for name in (count, *words[count - 1:count]))
  assert 'more than thirty other recipes' in TEXTS[README] and 31 < len(sparsejax.recipes.TABLE) <= 41
