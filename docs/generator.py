"""Writes a page for each recipe and for each public module, and copies pages from other folders.

    write(pathlib.Path('docs/generated'))

The pages are Markdown of MyST. Nothing of Sphinx is imported, so that the tests can write and read the pages.
"""

import ast
import inspect
import pathlib
import re
import shutil
import textwrap
import types

import kernels_pallas
import sparsejax
from sparsejax import arguments, hub, huggingface, planning, recipes, transforms
from sparsejax.recipes import sentence

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
APART = (hub, huggingface, planning)  # public modules that `import sparsejax` leaves to those who need them
KINDS = {'train': 'Training', 'prune': 'Pruning after training', 'cut': 'Units to zero'}
COPIES = {'results.md': 'benchmarks/results.md', 'changelog.md': 'CHANGELOG.md', 'contributing.md': 'CONTRIBUTING.md'}
# The pictures show so many updates, and recipes get these arguments for them. Stages of thousands of updates shrink.
STEPS = 60
CONFIGS = {
    'lottery_jackpot': {'pattern': 'unstructured 0.5'}, 'static_sparse': {'sparsity': 0.9},
    **dict.fromkeys(('set_', 'rigl', 'snfs'), {'sparsity': 0.9, 'every': 10}),
    **dict.fromkeys(('gradual_magnitude', 'turbo_vbi'), {'every': 5}),
    'soft_movement_pruning': {'score_optimizer': {'learning_rate': 0.1}}, 'mdgf': {'pattern': '1:4'},
    'sdgf_stepwise': {'pattern': '1:8'}, 'sdgf_geometric': {'pattern': '1:4', 'k': 4},
}
# Says what arguments mean that many recipes share. A docstring that speaks of an argument wins.
MEANINGS = {
    'pattern': 'which weights may be zero together',
    'sparsity': 'the fraction of weights that are zero; the default is the one of the pattern',
    'allocation': 'how sparse each parameter is',
    'loss': 'a function `params -> scalar`, from which the scores are computed',
    'begin': 'the update at which pruning begins', 'end': 'the update after which the mask stays as it is',
    'every': 'the number of updates from one choice of the mask to the next',
    'initial': 'the sparsity at `begin`',
    'momentum': 'how much of the average of gradients each update keeps',
    'fraction': 'the fraction of kept weights that are exchanged',
    'gradient_sparsity': 'the fraction of gradients that do not pass',
    'lam': 'the factor of the magnitude of the gradient in the score',
    'candidates': 'how many masks are compared',
    'score_optimizer': 'the optimizer of the scores, which are trained like weights',
    'alphas': 'a predicate of the parameters that weigh the operations of a mixture, by default those named `alpha`',
    'alpha_optimizer': 'the optimizer of the alphas',
    'block': 'how many columns are pruned together before the others are corrected',
    'damping': 'the fraction of the mean diagonal that is added to the diagonal of the Gram matrix',
    'rows': 'how many rows are solved at once, which bounds the memory',
    'bits': 'the number of bits of a weight on its grid',
    'cycles': 'how many exchanges are made at most',
    'epsilon': 'the bound on the relative error of the result of a layer',
    'iterations': 'the number of iterations of the solver',
    'start': 'the recipe that chooses the first mask',
    'groups': 'the groups of the program, from `structured.groups`, or a dict with some of them',
    'budget': 'the cost that may be left, such as `structured.flops(0.5)`, in the place of `sparsity`',
    'erase': 'the names of groups that may lose all of their units, from `structured.erasable(groups)`',
    'periods': 'the number of periods, in each of which an equal part of the units goes',
    'implants': 'the fraction of the pruned units that keep the centre tap of their filters',
    'alone': 'whether each group loses its own fraction of units, rather than all groups together',
    'multiple_of': 'the count of kept units of each group is rounded up to a multiple of this number',
    'penalty': 'the factor of the term that is added to the loss',
    'steps': 'how many updates the fading takes',
    'key': 'the PRNG key of random numbers',
    'seed': 'the seed of random numbers',
    'learning_rate': 'the learning rate',
}


def write(folder: pathlib.Path) -> None:
  """Writes all pages into `folder`, and leaves pages alone that are already the same."""
  pages = {**recipe_pages(), **reference_pages(), **copied_pages()}
  for name, text in pages.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
      path.write_text(text)
  (folder / 'notebooks').mkdir(parents=True, exist_ok=True)
  for notebook in sorted((ROOT / 'notebooks').glob('*.ipynb')):
    copy = folder / 'notebooks' / notebook.name
    if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
      shutil.copyfile(notebook, copy)


def inside(text: str) -> str:
  """Returns a page of docs/ as Sphinx reads it.

  Links to files outside of docs/ lead to the copies in `generated`. A link whose text is the name of a file gets the
  title of the page as its text.
  """
  for copy, original in COPIES.items():
    text = text.replace(f'](../{original}', f'](generated/{copy}')
  text = re.sub(r'\]\(\.\./notebooks/', '](generated/notebooks/', text)
  return re.sub(r'\[(\w+\.md)\]\(([\w./]*)\1\)', r'[](\2\1)', text)


def copied_pages() -> dict[str, str]:
  """Returns the pages of other folders, with links that hold in `generated`."""
  text = lambda original: (ROOT / original).read_text().replace('](docs/', '](../').replace('](../docs/', '](../')
  return {copy: text(original) for copy, original in COPIES.items()}


# Recipes.


def recipe_pages() -> dict[str, str]:
  """Returns one page for each recipe of each table, by its path in `generated`, and the page that lists them."""
  pages = {f'recipes/{kind}/{name}.md': recipe_page(kind, name, recipe)
           for kind, table in recipes.TABLES.items() for name, recipe in table.items()}
  parts = ['# All recipes\n\nOne page a recipe: the sentence, its arguments, and a picture of what it does. '
           'The page [recipes](../../recipes.md) compares them in one line each.']
  for kind, table in recipes.TABLES.items():
    names = '\n'.join(f'{kind}/{name}' for name in table)
    parts.append(f'## {KINDS.get(kind, kind)}\n\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```')
  return pages | {'recipes/index.md': '\n\n'.join(parts) + '\n'}


def recipe_page(kind: str, name: str, recipe) -> str:
  """Returns the page of a recipe: paper, sentence, arguments, measured rows and the place of the picture."""
  row = listed(name)
  own, options = own_and_options(kind, recipe)
  parts = [
      f'# {name}', row and f'{row[1][0].upper()}{row[1][1:]}' + (f' ({row[2]}).' if row[2] else '.'),
      *(prose(inspect.getdoc(recipe) or ''),),
      f'```{{image}} {name}.png\n:alt: {picture_text(kind, name)}\n:width: 640px\n```\n\n*{picture_text(kind, name)}*',
      '## The sentence', f'```python\n{source(recipe)}\n```',
      '## Arguments', table(('argument', 'default', 'meaning', 'what it may be'), own)]
  if options:
    parts += ['The recipe hands on these options to '
              '{py:func}`~sparsejax.transforms.sparsify`, whose page explains them: '
              + ', '.join(f'`{option}`' for option in options) + '.']
  if found := measured(name):
    parts += ['## Measured', *found]
  return '\n\n'.join(part for part in parts if part) + '\n'


def picture_text(kind: str, name: str) -> str:
  """Returns what the picture of a recipe shows."""
  if kind == 'train':
    told = ', '.join(f'{key}={value}' for key, value in CONFIGS.get(name, {}).items()) or 'its default arguments'
    return (f'Sparsity over {STEPS} updates of a network of two matrices, 32 x 64 and 64 x 16, trained by {name} with '
            f'{told}')
  if kind == 'cut':
    return (f'Fraction of zero units of each group over {STEPS} updates of a network of three matrices, trained by '
            f'{name} towards half of the units')
  return f'Asked and achieved sparsity of a network of three matrices, pruned by {name}'


def own_and_options(kind: str, recipe) -> tuple[list[tuple[str, ...]], list[str]]:
  """Returns a row for each argument of a recipe, and the names of the options that it hands on."""
  given = inspect.signature(getattr(recipe, '__wrapped__', recipe)).parameters
  rows = [(f'`{p.name}`', 'required' if p.default is p.empty else f'`{shown(p.default)}`', meaning(recipe, p.name),
           may_be(recipe, p.name))
          for p in given.values() if p.kind is not p.VAR_KEYWORD]
  options = [name for name in sentence.parameters(recipe) if name not in given] if kind in ('train', 'cut') else []
  return rows, options


def meaning(recipe, name: str) -> str:
  """Returns what the docstrings of the recipe and of `sparsify` say about an argument, or what all recipes mean by it.
  """
  if name == 'inner':
    return 'the optimizer of optax that is wrapped'
  for text in (inspect.getdoc(recipe) or '', inspect.getdoc(transforms.sparsify)):
    flat = ' '.join(text.split())
    found = [said for said in re.split(r'(?<=[.;])\s+(?=[A-Z`])', flat) if re.search(rf'`{name}(=[^`]*)?`', said)]
    if found and (text == inspect.getdoc(recipe) or name not in MEANINGS):
      return ' '.join(sorted(found, key=lambda said: not said.startswith(f'`{name}'))[:2])
  return MEANINGS.get(name, '')


def may_be(recipe, name: str) -> str:
  """Returns the values that an argument may have, in words."""
  kind = arguments.KINDS.get(f'{recipe.__name__}.{name}', arguments.KINDS.get(name))
  return kind.says if kind else inspect.formatannotation(inspect.signature(recipe).parameters[name].annotation)


def source(recipe) -> str:
  """Returns the source of a recipe without its docstring."""
  text = textwrap.dedent(inspect.getsource(inspect.unwrap(recipe)))
  function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
  lines = text.splitlines()
  if ast.get_docstring(function):
    first = function.body[0]
    del lines[first.lineno - 1:first.end_lineno]
  return '\n'.join(lines)


def listed(name: str) -> list[str] | None:
  """Returns the cells of the row of a recipe in docs/recipes.md: name, what it does, from."""
  found = re.search(rf'^\| `{name}` \|.*$', (DOCS / 'recipes.md').read_text(), re.MULTILINE)
  return [cell.strip().replace(r'\|', '|') for cell in re.split(r'(?<!\\)\|', found[0])[1:-1]] if found else None


def measured(name: str) -> list[str]:
  """Returns the tables of measured figures, cut down to the rows that name a recipe, each with its page."""
  parts, results = [], (ROOT / 'benchmarks' / 'results.md').read_text()
  for title, page in {'measured': 'measured.md', 'results': '../benchmarks/results.md'}.items():
    text = (DOCS / page).read_text()
    link = '../../results.md' if title == 'results' else '../../../measured.md'
    for head, body in re.findall(r'^(\|.*\|\n\|[ :|-]+\|)\n((?:\|.*\n?)+)', text, re.MULTILINE):
      rows = [line for line in body.splitlines() if re.search(rf'(?<![\w.]){name}(?![\w.])', line)
              and (title == 'results' or line.split(' | ')[0] not in results)]
      if rows:
        parts.append('\n'.join([f'From [{title}]({link}), which names hardware and commit:', '', head, *rows]))
  return parts


# The reference.


def reference_pages() -> dict[str, str]:
  """Returns one page for each public module, by its path in `generated`, and the page that lists them."""
  modules = public_modules()
  names = '\n'.join(modules)
  shortcuts = '\n'.join(f'- `sparsejax.{name}` is {{py:obj}}`{home(value)}.{value.__name__}`'
                        for name, value in own_names(sparsejax).items() if not isinstance(value, types.ModuleType))
  index = (f'# API reference\n\nEach public name has a page by its module. These names are at hand in `sparsejax` '
           f'itself:\n\n{shortcuts}\n\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n')
  return {f'api/{name}.md': module_page(name, module) for name, module in modules.items()} | {'api/index.md': index}


def public_modules() -> dict[str, types.ModuleType]:
  """Returns the modules that `sparsejax.__all__` names, the modules of the other names in it, and those in `APART`."""
  modules = [value for name in sparsejax.__all__ if isinstance(value := getattr(sparsejax, name), types.ModuleType)]
  homes = {inspect.getmodule(value) for value in own_names(sparsejax).values()
           if not isinstance(value, types.ModuleType)}
  extra = [module for module in sorted(homes, key=lambda module: module.__name__)
           if not any(holds(other, module) for other in modules)]
  return {module.__name__: module for module in [*modules, *extra, *APART, kernels_pallas]}


def holds(package: types.ModuleType, module: types.ModuleType) -> bool:
  """Returns whether a module is the package itself or a part of it."""
  return f'{module.__name__}.'.startswith(f'{package.__name__}.')


def own_names(module: types.ModuleType) -> dict:
  """Returns the public names of a module, those in its `__all__`."""
  return {name: getattr(module, name) for name in module.__all__}


def home(value) -> str:
  """Returns the name of the module on whose page a public function or class stands."""
  pages = [name for name, module in public_modules().items() if value in own_names(module).values()]
  return pages[0] if pages else value.__module__


def module_page(name: str, module: types.ModuleType) -> str:
  """Returns the page of a module: its docstring, and an entry for each public function and class."""
  parts = [f'# {name}', f'```{{py:module}} {name}\n```', prose(docstring(module))]
  for own, value in sorted(own_names(module).items(), key=lambda pair: pair[0].lower()):
    if inspect.isclass(value):
      parts.append(class_entry(own, value))
    elif callable(value):
      parts.append(entry('py:function', f'{own}{signature(value)}', prose(inspect.getdoc(value) or '')))
    elif not isinstance(value, types.ModuleType):
      parts.append(entry('py:data', own, contents(value)))
  return '\n\n'.join(part for part in parts if part) + '\n'


def docstring(module: types.ModuleType) -> str:
  """Returns the docstring of a module as it stands in the source.

  `inspect.getdoc` would take an example for prose where nothing but the example follows the first line.
  """
  return ast.get_docstring(ast.parse(inspect.getsource(module)), clean=False) or ''


def contents(value) -> str:
  """Returns what a public value is: the keys of a table, or the type."""
  if isinstance(value, dict):
    return f'A table with the keys {", ".join(f"`{key}`" for key in value)}.'
  return f'A value of the type `{type(value).__name__}`.'


def class_entry(name: str, cls: type) -> str:
  """Returns the entry of a class, with its documented methods and properties."""
  doc = '' if (cls.__doc__ or '').startswith(f'{cls.__name__}(') else prose(inspect.getdoc(cls) or '')
  members = []
  for own, value in vars(cls).items():
    if not own.startswith('_') and value.__doc__ and (isinstance(value, property) or inspect.isfunction(value)):
      kind, head = ('py:property', own) if isinstance(value, property) else ('py:method', own + signature(value))
      members.append(entry(kind, head, prose(inspect.getdoc(value))))
  return entry('py:class', f'{name}{signature(cls)}', '\n\n'.join([doc, *members]), '`' * 5)


def entry(directive: str, head: str, body: str, fence: str = '`' * 4) -> str:
  """Returns a directive of the Python domain around Markdown."""
  return f'{fence}{{{directive}}} {head}\n\n{body}\n{fence}'


def signature(value) -> str:
  """Returns the signature of a function or class without annotations, as Sphinx can parse it."""
  try:
    given = [p for p in inspect.signature(value).parameters.values() if p.name != 'self']
  except (TypeError, ValueError):
    return '()'
  bare = [p.replace(annotation=p.empty, default=p.default if p.default is p.empty else Written(shown(p.default)))
          for p in given]
  text = str(inspect.Signature(bare))
  try:
    ast.parse(f'def f{text}: pass')
  except SyntaxError:
    text = f'({", ".join(p.name for p in given)})'
  return text


class Written(str):
  """A `Written` is a text that stands in a signature without quotes."""

  def __repr__(self) -> str:
    return str(self)


def shown(default) -> str:
  """Returns a default value as a reader would write it."""
  if inspect.isfunction(default) or inspect.isclass(default) or inspect.isbuiltin(default):
    return default.__name__ if default.__name__.isidentifier() else '...'
  text = repr(default)
  return '...' if '<' in text or '\n' in text or len(text) > 60 else text


def prose(text: str) -> str:
  """Returns a docstring as Markdown: lines that begin with the name of an argument become a list."""
  lines, before = [], ''
  for line in text.splitlines():
    if re.match(r'`[\w=*()., \']+`(, `\w+`)*:', line):
      if before and not before.startswith(('- ', '  ')):
        lines.append('')
      line = f'- {line}'
    lines.append(line)
    before = line
  return '\n'.join(lines).strip()


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Returns a table of Markdown."""
  row = lambda cells: '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'
  return '\n'.join([row(head), row(('---',) * len(head)), *map(row, rows)])
