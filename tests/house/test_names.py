"""Checks that a noun has one meaning: in the names of classes and of functions, and in `docs/words.md`."""

import ast
import collections
import pathlib
import re

import prose
import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY, PACKAGES = ('sparsejax', 'kernels_pallas'), ('sparsejax', 'kernels_pallas', 'experiments')

# The functions of one signature, which each module of a place defines for its own noun. They count as one module.
SIGNATURES = {
    'main': r'.*',  # a command
    'get_config': r'experiments/configs/.*',  # what ml_collections calls a config
    'get_sweep': r'experiments/configs/.*',  # the grid beside it
    'draw': r'experiments/tables/.*',  # a picture of the results of one command
    'forward': r'sparsejax/hub(/\w+)?',  # the forward pass of a configuration, in each reader
    'scores': r'experiments/protocols/.*',  # those of one run and seed of a protocol
    'page': r'experiments/tables/.*',  # a page of them
    'named': r'sparsejax/(allocation|schedules)|experiments/loop/tasks',  # a word by the name in a configuration
    'masks': r'sparsejax/(starts|states|structured/removal)',  # a tree of masks: as a start, of a state, of a cut
    'whole': r'sparsejax/programs/(factors|views)|kernels_pallas/held',  # a value that is all of a parameter
    **dict.fromkeys(  # the implementations of an op of kernels_pallas, and the choice among them
        ('attention', 'matmul', 'matmul_transposed', 'prefer', 'refusal', 'sampled'), r'kernels_pallas/\w+(/\w+)?'),
}
# Verbs of plain English whose object is the noun of the module: `io.load`, `data.load`, `reports.check`.
VERBS = ('check', 'load', 'read', 'run', 'save', 'write')


def sources(packages):
  return {path.relative_to(ROOT).with_suffix('').as_posix(): path.read_text()
          for package in packages for path in sorted((ROOT / package).rglob('*.py'))}


def public(texts, kind):
  """Maps the name of each public definition of this kind to the modules that define the name at their top level."""
  modules = collections.defaultdict(list)
  for module, text in texts.items():
    for node in ast.parse(text).body:
      if isinstance(node, kind) and not node.name.startswith('_'):
        modules[node.name].append(module)
  return modules


def shared_classes(texts):
  return {name: modules for name, modules in public(texts, ast.ClassDef).items() if len(modules) > 1}


def shared_functions(texts):
  """Maps the names of functions in more than two modules to the modules; the modules of a signature count as one."""
  shared = {}
  for name, modules in public(texts, ast.FunctionDef).items():
    place = SIGNATURES.get(name, r'$^')
    others = [module for module in modules if not re.fullmatch(place, module.removesuffix('/__init__'))]
    if name not in VERBS and len(others) + (len(others) < len(modules)) > 2:
      shared[name] = modules
  return shared


def words(text):
  """Returns the nouns of the glossary: the first cell of each row of its tables."""
  return [word.strip('`') for word in re.findall(r'^\| ([^|]+?) \|', text, re.MULTILINE) if word not in ('word', '---')]


GLOSSARY = (ROOT / 'docs' / 'words.md').read_text()


def test_no_two_public_classes_share_a_name():
  assert shared_classes(sources(PACKAGES)) == {}


def test_no_public_function_name_is_in_more_than_two_modules():
  assert shared_functions(sources(PACKAGES)) == {}


def test_every_public_class_has_its_line_in_the_glossary():
  assert sorted(set(public(sources(LIBRARY), ast.ClassDef)) - set(words(GLOSSARY))) == []


def test_every_class_of_the_glossary_exists():
  named = re.findall(r'^\| `(\w+)` \|', GLOSSARY, re.MULTILINE)
  assert sorted(set(named) - set(public(sources(LIBRARY), ast.ClassDef))) == []


def test_a_line_of_the_glossary_can_be_read_by_a_newcomer():
  meanings = re.findall(r'^\| [^|]+ \| (.*) \|$', GLOSSARY, re.MULTILINE)
  assert [problem for meaning in meanings for problem in prose.of_text(meaning)] == []


def test_the_glossary_is_in_alphabetical_order_and_has_every_noun_once():
  nouns = [word.lower() for word in words(GLOSSARY)]
  assert nouns == sorted(set(nouns)) and len(nouns) > 60


@pytest.mark.parametrize('texts, classes, functions', [
    ({'a': 'class Row: ...', 'b': 'class Row: ...'}, ['Row'], []),
    ({'a': 'class _Row: ...', 'b': 'class _Row: ...', 'c': 'def f():\n  class Row: ...', 'd': 'class Row: ...'},
     [], []),
    (dict.fromkeys('abc', 'def whole(): ...'), [], ['whole']),
    (dict.fromkeys('ab', 'def whole(): ...'), [], []),
    (dict.fromkeys('abc', 'def _whole(): ...'), [], []),
    (dict.fromkeys(['kernels_pallas/n_m/tpu', 'kernels_pallas/n_m/gpu', 'sparsejax/formats/__init__'],
                   'def matmul(): ...'), [], []),
    (dict.fromkeys(['kernels_pallas/n_m/tpu', 'sparsejax/formats/__init__', 'sparsejax/io'], 'def matmul(): ...'),
     [], ['matmul']),
])
def test_a_shared_name_is_detected(texts, classes, functions):
  assert list(shared_classes(texts)) == classes and list(shared_functions(texts)) == functions
