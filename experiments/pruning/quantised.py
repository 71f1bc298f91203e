"""Judges sparse matrices that are quantized as well: each small word of `post_training.quantized` is a row.

Each form takes the subject of the encoder, prunes it, quantizes the packed values by Qwix or AQT, and returns the tree
of packed leaves. `encoder.subject` judges the unpacked tree, and the bytes of its pruned matrices are counted.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from experiments.models import encoders
from experiments.pruning.subjects import Subject
from sparsejax import allocation, calibration, formats, recipes, trees
from sparsejax.post_training import Recipe, quantized, repairs
from sparsejax.types import PyTree

TILE = 32  # kept weights with one scale
BITS = (2, 3, 4, 8)
ROUNDS = 40  # steps of the distillation
ITERATIONS = 100  # of ARMOR
# The numbers of nf4 (Dettmers et al. 2023, 2305.14314, appendix E), which Qwix's codes count.
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)


def qwix(qtype: str, tile: int | None = None) -> Callable[[Any], Any]:
  """Returns Qwix's quantizer with a scale for each channel, or for each `tile` entries of a channel."""
  from qwix import quantize  # An extra.
  tiled = {'tiled_axes': {0: tile}} if tile else {}
  return functools.partial(quantize, qtype=qtype, channelwise_axes=(1,), **tiled)


def aqt(bits: int) -> Callable[[Any], Any]:
  """Returns AQT's quantizer with a scale for each channel."""
  from aqt.jax.v2 import aqt_quantizer  # An extra.
  return lambda matrix: aqt_quantizer.quantizer_make(bits).quant(matrix, calibration_axes=(0,))[0]


class Forms:
  """A `Forms` prunes a subject by the recipes that the rows share, once each."""

  def __init__(self, own: Subject):
    self.own = own
    self.axes = sj.contractions(own.apply, own.params, *own.batches[0])
    self.pruned = functools.cache(self._pruned)

  def _pruned(self, name: str, *words: Any) -> Any:
    return self.by({'sparsegpt': lambda: recipes.sparsegpt(pattern=sj.NM(2, 4)),
                    'rounded': lambda bits: recipes.sparsegpt(pattern=sj.NM(2, 4), quantize=repairs.Grid(bits)),
                    'gqsa': recipes.gqsa, 'armor': functools.partial(recipes.armor, iterations=ITERATIONS)
                    }[name](*words))

  def by(self, recipe: Recipe, batches: Any = None, params: PyTree = None, valid: Any = None) -> Any:
    """Returns the subject pruned by a recipe, by default on its own batches."""
    own = self.own
    return sj.prune(own.apply, own.params if params is None else params, batches or own.batches, recipe,
                    where=own.where, valid=valid if batches else own.valid)

  def packed(self, params: PyTree, pattern: Any = '2:4') -> PyTree:
    return formats.pack(params, pattern, where=self.own.where, axes=self.axes)

  def half(self) -> PyTree:
    """Returns the subject pruned to 2:4 by SparseGPT, packed."""
    return self.packed(self.pruned('sparsegpt').params)


def _expanded(forms: Forms) -> 'Summed':
  """Returns the form of REx: a second term of four bits for half of the channels. The bytes are those of all terms."""
  packed = forms.half()
  paths, leaves, structure = trees.flatten(packed, is_leaf=formats.is_packed)
  terms = [quantized.expanded(leaf, qwix('int4'), 2, 0.5) if formats.is_packed(leaf) else leaf for leaf in leaves]
  return Summed(structure.unflatten([quantized.total(each) if isinstance(each, tuple) else each for each in terms]),
                sum(each.nbytes for own in terms if isinstance(own, tuple) for each in own))


class Summed:
  """A `Summed` is a tree of packed leaves whose pruned matrices take `nbytes` bytes when stored in another form."""

  def __init__(self, tree: PyTree, nbytes: int):
    self.tree, self.nbytes = tree, nbytes


def _by_programme(forms: Forms, budget: float = 3.0) -> Summed:
  """Returns the form of CalibTIP: integer programming chooses the bits of each matrix, `budget` bits a kept weight.

  The cost of a choice is the relative error of the matrix in a sweep with all matrices at these bits.
  """
  made = {bits: forms.pruned('rounded', bits) for bits in BITS}
  rows = {bits: {row.path: row for row in each.report.rows} for bits, each in made.items()}
  names = list(rows[BITS[0]])
  size = {path: rows[BITS[0]][path].shape[1] * rows[BITS[0]][path].shape[2] / 2 for path in names}
  chosen = allocation.knapsack([[rows[bits][path].after for bits in BITS] for path in names],
                               [[bits * size[path] for bits in BITS] for path in names], budget * sum(size.values()))
  by_path = {path: BITS[choice] for path, choice in zip(names, chosen)}
  paths, _, structure = trees.flatten(forms.own.params)
  leaves = {bits: dict(zip(paths, trees.flatten(each.params)[1])) for bits, each in made.items()}
  tree = structure.unflatten([leaves[by_path.get(path, BITS[0])][path] for path in paths])
  return Summed(tree, round(sum(_grid_bits(by_path[path], size[path], rows[2][path].shape[1]) for path in names) / 8))


def _grid_bits(bits: int, kept: float, outputs: int) -> float:
  """Returns the bits of a 2:4 matrix on a grid: codes, positions, and a step and a zero for each output."""
  return (bits + 2) * kept + (32 + 8) * outputs


def _rounded(bits: int, forms: Forms) -> Summed:
  """Returns the form of one sweep that prunes to 2:4 and rounds to `bits` bits, and compensates for both."""
  made = forms.pruned('rounded', bits)
  sizes = [(row.shape[1] * row.shape[2] / 2, row.shape[1]) for row in made.report.rows]
  return Summed(made.params, round(sum(_grid_bits(bits, kept, outputs) for kept, outputs in sizes) / 8))


def _blockwise(forms: Forms) -> PyTree:
  """Returns the form of BCT: every matrix and table in blocks of four bits."""
  dense = lambda path, leaf: getattr(leaf, 'ndim', 0) > 1
  return quantized.tree(forms.half(), qwix('int4', TILE), where=dense)


def _distilled(start: bool, forms: Forms) -> PyTree:
  """Returns the form of ZeroQ: SparseGPT on token vectors that give the layer norms the statistics of the text.

  With `start`, the token vectors are the noise from which the distillation starts.
  """
  own, (count, length) = forms.own, (64, 24)
  tokens = jnp.arange(1, count * length + 1).reshape(count, length)
  table = jnp.asarray(own.params['token_embed']['embedding'])
  noise = jnp.mean(table, 0) + jnp.std(table, 0) * jax.random.normal(jax.random.key(0), (count * length + 1,
                                                                                         table.shape[1]))
  given = lambda own_table: {**own.params, 'token_embed': {'embedding': own_table}}
  if not start:
    wanted = _norms(own.params, *own.batches[0])
    find = lambda own_table: _norms(given(own_table), tokens, jnp.ones(tokens.shape, bool))
    noise = calibration.distilled(find, wanted, noise, steps=ROUNDS, learning_rate=0.02)
  made = forms.by(recipes.sparsegpt(pattern=sj.NM(2, 4)), [(tokens, jnp.ones(tokens.shape, bool))], given(noise))
  return forms.packed({**made.params, 'token_embed': own.params['token_embed']})


def _norms(params: PyTree, tokens: Any, mask: Any) -> dict[str, Any]:
  """Returns mean and deviation of each feature after each layer norm, over the tokens in `mask`."""
  model = encoders.MiniLM(num_classes=None, vocabulary=params['token_embed']['embedding'].shape[0])
  _, state = model.apply({'params': params}, tokens, mask, mutable=['intermediates'],
                         capture_intermediates=lambda module, name: 'norm' in (module.name or ''))
  weight = (mask / jnp.sum(mask))[..., None]
  found = {}
  for path, x in zip(*trees.flatten(state['intermediates'])[:2]):
    mean = jnp.sum(x * weight, (0, 1))
    # A feature whose scale is zero varies nowhere, and the root of zero has no slope.
    found[path] = mean, jnp.sqrt(jnp.sum(jnp.square(x - mean) * weight, (0, 1)) + 1e-12)
  return found


def _on_values(make: Callable[[], Any], table: tuple[float, ...] = ()) -> Callable[[Forms], PyTree]:
  """Returns the form that quantizes the packed values of the 2:4 encoder."""
  return lambda forms: quantized.tree(forms.half(), make(), table=table)


def _groups(forms: Forms) -> PyTree:
  """Returns the form of GQSA: half of the groups of 16 inputs of each output, four bits, a scale for each group."""
  return quantized.tree(forms.packed(forms.pruned('gqsa').params, sj.Block((16, 1))), qwix('int4'))


FORMS: Mapping[str, Callable[[Forms], Any]] = {
    '2:4, float32': Forms.half,
    '2:4, int8 (Qwix)': _on_values(lambda: qwix('int8')),
    '2:4, int4 (Qwix)': _on_values(lambda: qwix('int4')),
    '2:4, int4, a scale for 32 (Qwix)': _on_values(lambda: qwix('int4', TILE)),
    '2:4, nf4, a scale for 32 (Qwix)': _on_values(lambda: qwix('nf4', TILE), NF4),
    '2:4, 4 bits (AQT)': _on_values(lambda: aqt(4)),
    '2:4, powers of int4 (NUPES)': _on_values(lambda: quantized.power(qwix('int4'))),
    '2:4, int4 and a second term (REx)': _expanded,
    **{f'2:4 and {bits} bits in one sweep (k-bit)': functools.partial(_rounded, bits) for bits in BITS},
    '2:4, bits by integer programming (CalibTIP)': _by_programme,
    '2:4 and all tables in int4 blocks (BCT)': _blockwise,
    'groups of 16, int4 (GQSA)': _groups,
    '2:4 core of 2 factors (ARMOR)': lambda forms: forms.pruned('armor').params,
    '2:4, float32, on noise': functools.partial(_distilled, True),
    '2:4, float32, on distilled data (ZeroQ)': functools.partial(_distilled, False)}


def bits_of(made: Any, own: Subject) -> float:
  """Returns the bits of a weight of the pruned matrices, indices and scales included."""
  paths, leaves, _ = trees.flatten(own.params)
  size = sum(leaf.size for leaf, pick in zip(leaves, trees.select('pruning', own.where, own.params)) if pick)
  if isinstance(made, Summed):
    return 8 * made.nbytes / size
  picked = {path for path, pick in zip(paths, trees.select('pruning', own.where, own.params)) if pick}
  packed = dict(zip(*trees.flatten(made, is_leaf=formats.is_packed)[:2]))
  return 8 * sum(formats.nbytes(packed[path]) for path in picked) / size


def dense_of(made: Any) -> PyTree:
  """Returns the dense tree that a form stands for."""
  return formats.unpack(made.tree if isinstance(made, Summed) else made)


def file_share(made: Any, own: Subject) -> float:
  """Returns the bytes of all parameters in a form over those of the dense model."""
  total = formats.nbytes(own.params)
  if not isinstance(made, Summed):
    return formats.nbytes(made) / total
  matrices = sum(np.prod(row) for row in [leaf.shape for leaf, pick in zip(
      trees.flatten(own.params)[1], trees.select('pruning', own.where, own.params)) if pick])
  return (total - 4 * matrices + made.nbytes) / total
