"""Imports point down: tables say who may import whom, for each package of the repository, read from the source."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import sparsejax

ROOT = pathlib.Path(sparsejax.__file__).parents[1]

# Families stand side by side on one floor. A family imports the core below and the families named here, no other.
FAMILIES = {
    'zeroth_order': (), 'factorized': (), 'recovery': (), 'moe': (), 'activation': (), 'attention': (), 'codes': (),
    'bayes': (), 'continual': (), 'finetune': ('factorized',), 'post_training': ('zeroth_order',),
    'structured': ('post_training',), 'hub': (), 'tokens': (), 'packing': (),
}
# From the bottom up. A name is a module or a package of sparsejax; it imports from lines above its own, not from its
# own line. Inside of a package, INSIDE says the same.
SPARSEJAX = (
    ('types', 'version'),
    ('errors', 'tables', 'globs', 'conventions', 'keys', 'kinds', 'argument_kinds', 'progress', 'rows', 'wholes'),
    ('arguments',),
    ('trees', 'labelled'),
    ('programs',),
    ('passes', 'neighbours', 'networks', 'searches'),
    ('census', 'ranking'),
    ('counts', 'hessians', 'units'),
    ('stages',),
    ('patterns', 'scores', 'allocation', 'schedules', 'flows', 'updates', 'metrics', 'starts', 'penalties', 'gates',
     'conditional', 'solvers', 'collectives', 'calibration', 'losses', 'sensitivities', 'saliences',
     'inits', 'transfer', 'unlearning'),
    ('graphs',),
    ('plans',),
    ('states',),
    ('formats',),
    ('io',),
    ('choices', 'competitions', 'pipelines'),
    ('selections',),
    ('transforms', 'planning'),
    tuple(FAMILIES),
    ('recipes',),
    ('reports', 'advice'),
    ('checkpoints', 'huggingface', 'spellings', 'plot'),
    ('cli',),
    ('__init__', 'tracing'),  # the table of contents, and a former name
)
KERNELS = (
    ('hopper', 'mosaic_tpu', 'dispatch', 'trilinear'),
    ('products', 'linear'),
    ('active', 'attention', 'block_sparse', 'ell', 'n_m', 'sparse24', 'unstructured'),
    ('held', 'around', 'submanifold', 'gathered'),
    ('deferred', 'measuring'),
    ('models', 'decoding', 'attending'),
    ('preparing',),
    ('__init__', 'bench', 'nn'),  # and former names
)
EXPERIMENTS = (
    ('configs',),
    ('models',),  # tokenisers come with pretrained models, so that `data` is above
    ('data',),
    ('loop',),
    ('tables',),
    ('train', 'tasks', 'tickets', 'sweep'),
    ('protocols',),
    ('claims', 'pruning', 'structured'),
    ('frontier',),
    ('__init__',),
)
# Modules of a package, from the bottom up; the package's own `__init__` comes last and is not named.
INSIDE = {
    'sparsejax.programs': (('hlo', 'jaxprs'), ('tracing', 'factors', 'sizes', 'structures'),
                           ('views', 'follow', 'evaluate'), ('contractions', 'heads', 'origins'),
                           ('operands', 'arrangements'), ('calls', 'gated', 'replace', 'again')),
    'sparsejax.formats': (('gaps', 'misfits', 'zeros'), ('arrays', 'grouping'), ('pieces',),
                          ('n_m', 'anywhere', 'blocks', 'sparse24', 'columns', 'ell', 'scaled', 'active'),
                          ('wrapped',)),
    'sparsejax.transforms': (('method', 'tying'), ('leaves',), ('refusals',), ('choosing', 'small'), ('phases',),
                             ('sparsify', 'penalised')),
    'sparsejax.recipes': (('sentence', 'post_training'), ('n_m', 'at_init', 'structured'),
                          ('gradual', 'dynamic', 'tickets', 'graphs'),
                          ('modular', 'regularized', 'bayesian', 'searched')),
    'sparsejax.metrics': (('models', 'predictions'), ('landscapes',)),
    'sparsejax.post_training': (('recipe', 'results', 'columns', 'one_by_one', 'exchanges', 'net_trim', 'wrapped',
                                 'essential', 'quantized'),
                                ('held', 'parts', 'targets'), ('repairs',), ('cohorts',), ('lockstep', 'memory'),
                                ('solving', 'finished'), ('pruning',)),
    'sparsejax.structured': (('dimensions', 'architecture', 'iso_flop', 'sharing'), ('reading', 'same'),
                             ('elementwise',), ('moving', 'picking', 'layers'),
                             ('rules',), ('groups', 'smaller'), ('erasing',), ('removal', 'streams'),
                             ('training', 'proof', 'files', 'costs', 'rotating', 'ordering'),
                             ('selecting', 'searching'), ('least_squares', 'implants')),
    'sparsejax.activation': (('places', 'rules', 'losses', 'temporal', 'correcting'), ('measuring', 'ruling'),
                             ('in_order',), ('allocating',), ('sparsifying',)),
    'experiments.protocols': (('fitting',), ('consensus', 'edges', 'experts', 'features', 'forgetting', 'gaters',
                                             'midpoints', 'posteriors', 'recommended', 'searched', 'starts',
                                             'transferred'),
                              ('liked', 'served')),
    'sparsejax.moe': (('gating', 'permutations', 'routing', 'placement', 'nested'), ('comet',)),
    'sparsejax.attention': (('edits', 'looking', 'pending'), ('steps', 'layout'), ('sites',), ('masks', 'mixing'),
                            ('routing', 'features', 'decode'), ('learned', 'searching')),
    'sparsejax.hub': (('layers', 'texts'), ('bert', 'gpt2', 'llama')),
    'sparsejax.advice': (('measured', 'arrays'), ('rows',)),
    'sparsejax.io': (('headers', 'slots'), ('stored', 'bodies', 'claims', 'orbax'), ('folders',),
                     ('saving', 'loading')),
}
LAYERS = {'sparsejax': SPARSEJAX, 'kernels_pallas': KERNELS, 'experiments': EXPERIMENTS}
# Who may import which package of the repository.
PACKAGES = {'sparsejax': {'sparsejax'}, 'kernels_pallas': {'kernels_pallas', 'sparsejax'},
            'experiments': {'experiments', 'kernels_pallas', 'sparsejax'}}
# What setup.cfg installs for the library, by import name. Not flax.
OUTSIDE = {'jax', 'numpy', 'optax', 'orbax', 'safetensors'} | sys.stdlib_module_names
# What a module imports inside of functions only, see `test_everything_loaded_...`.
OPTIONAL = {'sparsejax.hub.texts': {'tokenizers'}, 'sparsejax.plot': {'matplotlib'}}


def dotted(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts).removesuffix('.__init__')


MODULES = {dotted(path): path for package in LAYERS for path in sorted((ROOT / package).rglob('*.py'))
           if path.name != '__main__.py'}


def imported(module, source):
  """The full names of what the source imports, inside functions too: modules, or things in modules."""
  package = module.split('.')[:None if MODULES.get(module, pathlib.Path()).name == '__init__.py' else -1]
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


def floor(layers, name):
  return next((level for level, layer in enumerate(layers) if name in layer), None)


def place(name):
  """The package, the name on its floors, and the name inside of that: `sparsejax`, `formats`, `n_m`."""
  package, *rest = name.split('.')
  first = rest[0] if rest and floor(LAYERS[package], rest[0]) is not None else '__init__'
  inner = rest[1] if len(rest) > 1 and floor(INSIDE.get(f'{package}.{first}', ()), rest[1]) is not None else ''
  return package, first, inner


def allowed(module, name):
  """May this module import what has this name?"""
  package, first, inner = place(module)
  if name.split('.')[0] not in LAYERS:
    return package != 'sparsejax' or name.split('.')[0] in OUTSIDE | OPTIONAL.get(module, set())
  other, target, part = place(name)
  if other != package:
    return other in PACKAGES[package]
  if first != target:
    beside = target in FAMILIES.get(first, ())
    return beside or floor(LAYERS[package], target) < floor(LAYERS[package], first)
  inside = INSIDE.get(f'{package}.{first}')
  if inside is None:
    return first != '__init__'  # a package without a table of its own; the table of contents is for nobody below
  level = lambda name: len(inside) if name == '' else floor(inside, name)
  return level(part) < level(inner)


def violations(module, source):
  """What this source, as that module, imports that it must not."""
  return [f'{module} imports {name}, which is not below it' for name in imported(module, source)
          if not allowed(module, name)]


@pytest.mark.parametrize('module', sorted(MODULES))
def test_imports_point_down(module):
  package, *rest = module.split('.')
  assert not rest or floor(LAYERS[package], rest[0]) is not None, f'put {module} into the table of {package}'
  inside = INSIDE.get('.'.join([package, *rest[:1]]))
  assert inside is None or len(rest) < 2 or floor(inside, rest[1]) is not None, f'put {module} into INSIDE'
  assert violations(module, MODULES[module].read_text()) == []


def test_no_name_stands_on_two_floors():
  for layers in (*LAYERS.values(), *INSIDE.values()):
    names = [name for layer in layers for name in layer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('module, source', [
    ('sparsejax.types', 'from sparsejax import errors'),
    ('sparsejax.flows', 'import sparsejax.schedules'),
    ('sparsejax.flows', 'from sparsejax import schedules as s'),
    ('sparsejax.flows', 'from sparsejax.schedules import linear'),
    ('sparsejax.flows', 'from . import schedules'),
    ('sparsejax.flows', 'from .schedules import linear'),
    ('sparsejax.ranking', 'def f():\n  from sparsejax.patterns import NM'),
    ('sparsejax.patterns', 'import sparsejax'),
    ('sparsejax.patterns', 'from sparsejax import NM'),
    ('sparsejax.transforms.sparsify', 'from sparsejax.recipes.n_m import ste'),
    ('sparsejax.recipes.n_m', 'from sparsejax import recipes'),
    ('sparsejax.recipes.n_m', 'from . import TABLE'),
    ('sparsejax.recipes.n_m', 'from sparsejax.recipes.tickets import model_soup'),
    ('sparsejax.recipes.n_m', 'from ..reports import report'),
    ('sparsejax.programs.hlo', 'from sparsejax.programs.contractions import contractions'),
    ('sparsejax.formats', 'if True:\n  try:\n    import flax.linen as nn\n  except ImportError:\n    nn = None'),
    ('sparsejax.formats', 'from flax import nnx'),
    ('sparsejax.hub.bert', 'import tokenizers'),
    ('sparsejax.io', 'from experiments import train'),
    ('sparsejax.io', 'import kernels_pallas.dispatch'),
    ('sparsejax.cli', 'import importlib\nimportlib.import_module("fl" + "ax")'),
    ('sparsejax', 'import flax'),
    ('sparsejax.metrics', 'def f():\n  import matplotlib'),
    ('sparsejax.attention.masks', 'from sparsejax import moe'),
    ('sparsejax.post_training.repairs', 'from sparsejax.structured import channels'),
    ('sparsejax.selections', 'from sparsejax.post_training import repairs'),
    ('kernels_pallas.hopper', 'from kernels_pallas import block_sparse'),
    ('kernels_pallas.n_m', 'from kernels_pallas.active import active_matmul'),
    ('kernels_pallas.models', 'from experiments import loop'),
    ('experiments.models.vit', 'from experiments import data'),
    ('experiments.loop.runs', 'from experiments import train'),
    ('experiments.train', 'from experiments import claims'),
])
def test_a_wrong_import_is_found(module, source):
  assert len(violations(module, source)) == 1


@pytest.mark.parametrize('module, source', [
    ('sparsejax.flows', 'import jax.numpy as jnp\nfrom sparsejax import errors\nfrom sparsejax.types import Flow'),
    ('sparsejax.flows', 'from . import errors\nfrom .types import Flow'),
    ('sparsejax.recipes', 'from sparsejax.recipes.n_m import ste\nfrom .n_m import ste\nfrom .. import flows'),
    ('sparsejax.cli', 'import importlib.metadata\nimport orbax.checkpoint\nfrom sparsejax import io, reports'),
    ('sparsejax', 'from sparsejax.cli import main'),
    ('sparsejax.plot', 'def f():\n  from matplotlib import pyplot'),
    ('sparsejax.structured.rotate', 'from sparsejax.post_training import calibration'),
    ('sparsejax.huggingface', 'from sparsejax.io import saving\nfrom sparsejax import programs'),
    ('kernels_pallas.block_sparse.gpu', 'from kernels_pallas import hopper\nfrom sparsejax import formats'),
    ('experiments.claims', 'from experiments import tickets\nimport matplotlib'),
])
def test_a_right_import_is_left_alone(module, source):
  assert violations(module, source) == []


def test_everything_loaded_leaves_flax_and_the_experiments_out():
  """In a process of its own, where flax could be imported: only then does its absence say anything."""
  assert importlib.util.find_spec('flax')
  names = sorted(module for module in MODULES if module.split('.')[0] == 'sparsejax')
  code = (f'import sys, {", ".join(names)}\n'
          'outside = {name.split(".")[0] for name in sys.modules}\n'
          'print(sorted(outside & {"flax", "experiments", "kernels_pallas", "matplotlib", "torch", "equinox"}))')
  done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                        check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[]'
