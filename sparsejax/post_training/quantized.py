"""Quantizes sparse parameters by the user's own quantizer, and makes other quantizers of it: the small words.

    small = quantized.tree(packed, quantize)                       # each packed leaf becomes a `formats.Scaled`
    finer = quantized.tree(packed, quantized.power(quantize))      # on a grid of powers: PowerQuant, NUPES
    terms = quantized.expanded(packed['w'], quantize, order=2)     # and a second term for what is left: REx

`quantize(matrix)` gets the kept weights of one matrix, `[entries, channels]`, see `formats.Scaled`. Functions of Qwix
and of AQT fit, and so does any other function that returns `qvalue` and `scale`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments, errors, formats, trees
from sparsejax.formats.scaled import Quantizer, Scaled
from sparsejax.types import Array, PyTree

EXPONENTS = tuple(i / 10 for i in range(3, 11))  # that `power` tries


class Quantized(NamedTuple):
  """A `Quantized` is what a quantizer returns: the weights are `qvalue * scale`, `[entries, channels]`.

  `scale` has one row, or a row for each tile of entries, and one column, or a column for each channel.
  """

  qvalue: Array
  scale: Array


def tree(params: PyTree, quantize: Quantizer, *, where: Any = None, table: Sequence[float] = ()) -> PyTree:
  """Returns `params` with each packed leaf quantized, and with each dense leaf that `where` picks, by default none.

  Zeros of packed leaves stay exact. A dense leaf is quantized along its last axis. With `qwix.quantize(..., 'int4',
  tiled_axes={0: 64})` and `where=lambda path, leaf: leaf.ndim > 1`, all tables and matrices are quantized in blocks,
  without training: BCT (2023), of which the tables for GELU and softmax are left out. `table` is that of `Scaled.of`.
  Raises `ValueError` that names the leaf where the quantizer or its result is refused.
  """
  paths, leaves, structure = trees.flatten(params, is_leaf=formats.is_packed)
  dense = structure.unflatten([None if formats.is_packed(leaf) else leaf for leaf in leaves])
  picked = set()
  if where is not None:
    names = trees.flatten(dense)[0]
    picked = {path for path, pick in zip(names, trees.select('quantized.tree', where, dense)) if pick}
  made = []
  for path, leaf in zip(paths, leaves):
    if not formats.is_packed(leaf) and path not in picked:
      made.append(leaf)
      continue
    try:
      made.append(Scaled.of(leaf, quantize, tuple(table)))
    except (ValueError, TypeError) as error:
      raise errors.at_leaf('quantized.tree', path, leaf.shape, str(error)) from error
  return structure.unflatten(made)


def power(quantize: Quantizer, exponent: float | None = None) -> Quantizer:
  """Returns the quantizer of `sign(w) |w|^exponent`: PowerQuant (Yvinec et al. 2023, 2301.09858, equation 4), NUPES.

  The numbers are those of `quantize`, to the power `1 / exponent`, so that small weights get more of them. Zero stays
  zero. By default, the exponent with the least squared error is searched for each matrix among 0.3, 0.4, ..., 1. NUPES
  (2308.05600) learns the exponents by gradients, which is left out. Raises `ValueError` unless 0 < exponent <= 1, and
  for a quantizer with a zero point.
  """
  if exponent is not None and not 0 < exponent <= 1:
    raise ValueError(f'quantized.power: exponent={exponent}; give one above 0 and at most 1, or None to search it.')

  def quantized(matrix: Array) -> Quantized:
    tried = [_to_power(quantize, matrix, a) for a in ([exponent] if exponent else EXPONENTS)]
    lost = [float(jnp.sum(jnp.square(matrix - _rounded(each)))) for each in tried]
    return tried[lost.index(min(lost))]

  return quantized


def _to_power(quantize: Quantizer, matrix: Array, exponent: float) -> Quantized:
  raised = lambda x, a: jnp.sign(x) * jnp.abs(x)**a
  made = quantize(raised(matrix, exponent))
  if getattr(made, 'zero_point', None) is not None:
    raise ValueError('quantized.power: the quantizer has a zero point, which powers do not keep; take a symmetric one.')
  scale = made.scale[0] if isinstance(made.scale, list) else made.scale
  return Quantized(raised(jnp.asarray(made.qvalue, jnp.float32), 1 / exponent), raised(scale, 1 / exponent))


def _rounded(made: Quantized) -> Array:
  return made.qvalue * jnp.repeat(made.scale, len(made.qvalue) // len(made.scale), 0)


def expanded(weights: Any, quantize: Quantizer, order: int = 2, share: float = 1.0) -> tuple[Scaled, ...]:
  """Returns the terms whose sum is close to `weights`: each quantizes what the terms before leave: REx.

  Yvinec et al. 2022, 2203.14645, equations 2 and 4. From the second term on, only the `share` of channels with the
  largest residual is quantized, and the numbers of the others are zero. Zeros stay zero in each term. `weights` is a
  packed array or a dense array. Deviation: the channels are those with the largest residual, where the paper takes the
  largest weights. Raises `ValueError` unless order >= 1 and share is in [0, 1].
  """
  if order < 1:
    raise ValueError(f'quantized.expanded: order={order}; give the number of terms, at least 1.')
  share = arguments.verified('quantized.expanded', 'share', share)
  terms = [Scaled.of(weights, quantize)]
  while len(terms) < order:
    left = jax.tree.map(jnp.subtract, formats.values({'w': weights}), formats.values({'w': total(terms)}))
    rest = formats.with_values({'w': weights}, left)['w']
    terms.append(Scaled.of(rest, lambda matrix: quantize(_largest(matrix, share))))
  return tuple(terms)


def total(terms: Sequence[Scaled]) -> Any:
  """Returns the sum of the terms of `expanded`, as the packed array or the dense array that they were made of."""
  opened = [{'w': each.opened()} for each in terms]
  sums = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *map(formats.values, opened))
  return formats.with_values(opened[0], sums)['w']


def _largest(matrix: Array, share: float) -> Array:
  """Returns the residual of the channels in which it is largest, and zeros in the others."""
  kept = round(share * matrix.shape[1])
  order = jnp.argsort(-jnp.linalg.norm(matrix, axis=0), stable=True)
  return jnp.where(jnp.zeros(matrix.shape[1], bool).at[order[:kept]].set(True)[None], matrix, 0)

