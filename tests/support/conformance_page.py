"""Writes `docs/conformance.md` from what `test_product` found: a table of optimizers x recipes, and totals."""

import collections
import pathlib
import platform
import subprocess

import jax
import optax

from sparsejax.recipes import TABLE

VERDICTS = {
    'same bits': 'the same bits as in a dict on one device',
    'kept': 'zeros and pattern kept; last bits that a mesh rounds otherwise, or inside `shard_map`',
    'refused': 'refused with the reason, as it has to be: a line search or a function of the parameters',
    'not even alone': "the optimizer without a recipe fails there too, by an error of its own or of JAX's",
    'failed': 'a defect',
}
SHORT = {'same bits': '', 'kept': '', 'refused': 'r', 'not even alone': 'a', 'failed': 'FAILED'}
# Before the names of recipes that are newer than the measurement. `tests/recipes` runs these with one optimizer.
NOT_YET = 'Recipes without a cell in this measurement: '


def write(path, results):
  """`results`: `(recipe, optimizer, container, mesh) -> verdict`."""
  pathlib.Path(path).write_text('\n'.join(_lines(results)) + '\n')


def _lines(results):
  recipes, optimizers, containers, meshes = ([*dict.fromkeys(cell[i] for cell in results)] for i in range(4))
  total = collections.Counter(results.values())
  yield '# Recipes x optimizers x containers x meshes\n'
  names = {recipe.removesuffix('-phases') for recipe in recipes}
  yield (f'{len(results):,} cells of the product of {len(names)} recipes, {len(optimizers)} optimizers and wrappers '
         f'of optax, {len(containers)} containers and {len(meshes)} meshes of eight devices. Each is twelve updates: '
         'after every update pruned weights are exactly zero and the rest is at '
         'the sparse point, masks and master lie as their parameter does, and `sparsejax.check` finds the pattern. '
         '`-phases`: with a dense and a fine-tune phase. `asp` is there with phases and without.\n')
  if left := sorted({*TABLE} - names):
    yield f'{NOT_YET}{", ".join(left)}.\n'
  yield (f'Measured on CPU ({platform.machine()}, eight fake devices), jax {jax.__version__}, optax '
         f'{optax.__version__}, commit {_commit()}. Made by\n')
  yield f'    pytest tests/transforms/test_product.py --cells {len(results)} --table docs/conformance.md\n'
  yield from (f'- {total[verdict]:,} {verdict}: {what}.' for verdict, what in VERDICTS.items())
  yield '\n## By container and by mesh\n'
  for i, names in ((2, containers), (3, meshes)):
    yield '| | ' + ' | '.join(VERDICTS) + ' |\n|---|' + '---|' * len(VERDICTS)
    for name in names:
      counts = collections.Counter(verdict for cell, verdict in results.items() if cell[i] == name)
      yield f'| {name} | ' + ' | '.join(f'{counts[verdict]:,}' for verdict in VERDICTS) + ' |'
    yield ''
  yield '## By optimizer and recipe\n'
  yield 'How many cells held; `r` refused, `a` not even alone.\n'
  yield '| | ' + ' | '.join(recipes) + ' |\n|---|' + '---|' * len(recipes)
  for optimizer in sorted(optimizers, key=str.lower):
    yield f'| {optimizer} | ' + ' | '.join(_entry(results, recipe, optimizer) for recipe in recipes) + ' |'


def _entry(results, recipe, optimizer):
  found = collections.Counter(verdict for cell, verdict in results.items() if cell[:2] == (recipe, optimizer))
  held = found['same bits'] + found['kept']
  others = [f'{found[verdict]} {short}' for verdict, short in SHORT.items() if short and found[verdict]]
  return ', '.join([str(held)] * bool(held) + others)


def _commit():
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
  return subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True).stdout.strip()
