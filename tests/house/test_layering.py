"""Imports point down: who may import whom, in one table, read from the source; and what stays out of `sys.modules`."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import sparsejax

ROOT = pathlib.Path(sparsejax.__file__).parent

# From the bottom up. A module imports from lines above its own, not from its own line.
LAYERS = (
    ('types',),
    ('errors', 'programs.hlo'),
    ('trees',),
    ('programs.views',),
    ('programs.contractions',),
    ('programs',),
    ('ranking', 'neighbours', 'formats.gaps'),
    ('patterns', 'scores', 'allocation', 'schedules', 'flows', 'updates', 'metrics', 'starts'),
    ('formats.arrays',),
    ('formats.n_m', 'formats.anywhere', 'formats.blocks', 'formats.sparse24', 'formats.columns'),
    ('formats',),
    ('states',),
    ('selections',),
    ('transforms.sparsify', 'planning'),
    ('transforms',),
    ('recipes.n_m', 'recipes.at_init'),
    ('recipes.gradual', 'recipes.dynamic', 'recipes.tickets'),
    ('recipes',),
    ('reports', 'advice.rows'),
    ('advice',),
    ('io.orbax',),
    ('io.safetensors_files',),
    ('io',),
    ('cli',),
    ('', 'tracing'),  # the table of contents, sparsejax/__init__.py; and a former name
)
# What setup.cfg installs for the library, by import name. Not flax, not experiments, not kernels_pallas.
OUTSIDE = {'jax', 'numpy', 'optax', 'orbax', 'safetensors'} | sys.stdlib_module_names

MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('__init__').rstrip('.'): path
    for path in ROOT.rglob('*.py') if path.name != '__main__.py'
}
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}


def imported(module, source):
  """The full names of what the source imports, inside functions too: modules, or things in modules."""
  package = ['sparsejax', *filter(None, module.split('.'))][:None if _is_package(module) else -1]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[:len(package) - node.level + 1] if node.level else []
      prefix = '.'.join(base + ([node.module] if node.module else []))
      yield from (f'{prefix}.{alias.name}' for alias in node.names)
    elif isinstance(node, (ast.Name, ast.Attribute)) and getattr(node, 'id', getattr(node, 'attr', '')) in (
        'import_module', '__import__'):
      yield 'a module by its name'


def _is_package(module):
  return MODULES.get(module, pathlib.Path()).name == '__init__.py'


def of_sparsejax(name):
  """Which module of sparsejax is imported by this name: the longest known beginning of it."""
  parts = name.split('.')[1:]
  while parts and '.'.join(parts) not in LEVEL:
    parts.pop()
  return '.'.join(parts)


def violations(module, source):
  """What this source, as that module, imports that it must not."""
  found = []
  for name in imported(module, source):
    if name.split('.')[0] != 'sparsejax':
      if name.split('.')[0] not in OUTSIDE:
        found.append(f'sparsejax.{module} imports {name}, which is not among the dependencies of the library')
      continue
    target = of_sparsejax(name)
    if LEVEL[target] >= LEVEL[module]:
      found.append(f'sparsejax.{module} imports {name}, which is not below it')
  return found


def test_every_module_has_its_place():
  missing = set(MODULES) - set(LEVEL)
  assert not missing, f'put {sorted(missing)} into LAYERS'
  assert len(LEVEL) == sum(map(len, LAYERS)), 'a module is in two layers'


@pytest.mark.parametrize('module', sorted(MODULES))
def test_imports_point_down(module):
  assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize('module, source', [
    ('types', 'from sparsejax import errors'),
    ('flows', 'import sparsejax.schedules'),
    ('flows', 'from sparsejax import schedules as s'),
    ('flows', 'from sparsejax.schedules import linear'),
    ('flows', 'from . import schedules'),
    ('flows', 'from .schedules import linear'),
    ('ranking', 'def f():\n  from sparsejax.patterns import NM'),
    ('patterns', 'import sparsejax'),
    ('patterns', 'from sparsejax import NM'),
    ('transforms.sparsify', 'from sparsejax.recipes.n_m import ste'),
    ('recipes.n_m', 'from sparsejax import recipes'),
    ('recipes.n_m', 'from . import TABLE'),
    ('recipes.n_m', 'from ..reports import report'),
    ('formats', 'if True:\n  try:\n    import flax.linen as nn\n  except ImportError:\n    nn = None'),
    ('formats', 'from flax import nnx'),
    ('io', 'from experiments import train'),
    ('io', 'import kernels_pallas.dispatch'),
    ('cli', 'import importlib\nimportlib.import_module("fl" + "ax")'),
    ('', 'import flax'),
])
def test_a_wrong_import_is_found(module, source):
  assert len(violations(module, source)) == 1


@pytest.mark.parametrize('module, source', [
    ('flows', 'import jax.numpy as jnp\nfrom sparsejax import errors\nfrom sparsejax.types import Flow'),
    ('flows', 'from . import errors\nfrom .types import Flow'),
    ('recipes', 'from sparsejax.recipes.n_m import ste\nfrom .n_m import ste\nfrom .. import flows'),
    ('cli', 'import importlib.metadata\nimport orbax.checkpoint\nfrom sparsejax import io, reports'),
    ('', 'from sparsejax.cli import main'),
])
def test_a_right_import_is_left_alone(module, source):
  assert violations(module, source) == []


def test_recipes_are_sentences():
  """A recipe is read at a glance: at most 25 lines of code, all of them under 900."""
  files = [path for path in MODULES.values() if path.parent.name == 'recipes']
  assert sum(len(path.read_text().splitlines()) for path in files) < 900
  for path in files:
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.FunctionDef):
        docstring = node.body[0] if ast.get_docstring(node) else None
        length = node.end_lineno - node.lineno + 1
        length -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
        assert length <= 25, f'{path.name}: {node.name} has {length} lines of code; a word is missing from the grammar'


def test_everything_loaded_leaves_flax_and_the_experiments_out():
  """In a process of its own, where flax could be imported: only then does its absence say anything."""
  assert importlib.util.find_spec('flax')
  names = [f'sparsejax.{module}' if module else 'sparsejax' for module in sorted(MODULES)]
  code = (f'import sys, {", ".join(names)}\n'
          'outside = {name.split(".")[0] for name in sys.modules}\n'
          'print(sorted(outside & {"flax", "experiments", "kernels_pallas", "tensorflow", "torch", "equinox"}))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[]'
