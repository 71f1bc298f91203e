"""Advises whether packing a pattern will help: bytes, multiply-adds, and the speed to expect of packed products.

    found = sj.advise(params, '128x128 0.9', device='h200', tokens=4096)
    print(found)             # a table of the parameters; the last line says what to do
    found.rows[0].forward    # times as fast as dense, `None` where that was not measured

Speeds are interpolated within tables of measurements. Where nothing was measured, the table says so, and gives a bound
from memory traffic instead.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, errors, formats, patterns, trees
from sparsejax.advice import measured
from sparsejax.advice.measured import DEVICES, FASTER, TABLES, Measured
from sparsejax.formats.arrays import matrix_sizes
from sparsejax.tables import aligned
from sparsejax.types import Axes, Pattern, Predicate, PyTree


class ParameterAdvice(NamedTuple):
  """A `ParameterAdvice` says of one parameter what packing saves, and how fast its product is expected to be.

  `forward` and `training` are how many times as fast as dense the packed product is expected to be, without and with
  gradients. `crossover` is the sparsity from which `forward` is faster by 5 % or more. All three are `None` where that
  was not measured.

  `traffic` is how many times fewer bytes the packed product moves: a bound on the gain where memory is the limit, not a
  time. `note` says which measurement was read, or why the parameter stays dense. The `sparsity` of a parameter that
  stays dense is 0, and nothing is saved.
  """

  path: str
  shape: tuple[int, ...]
  pattern: str
  sparsity: float
  bytes_dense: int
  bytes_packed: int
  flops_dense: int
  flops_packed: int
  traffic: float
  forward: float | None = None
  training: float | None = None
  crossover: float | None = None
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Advice:
  """An `Advice` holds one row for each parameter, and in `sentence` what to do. Prints as a table.

  `hardware` lists the hardware, version of JAX and revision of each measurement of the device.
  """

  rows: tuple[ParameterAdvice, ...]
  device: str
  tokens: int
  sentence: str
  hardware: tuple[str, ...] = ()

  def __str__(self) -> str:
    head = ('parameter', 'shape', 'pattern', 'sparsity', 'bytes dense', 'packed', 'MFLOPs dense', 'packed',
            'traffic bound', 'forward', 'training', 'faster from')
    measurements = [f'{self.tokens} tokens. forward, training: times as fast as dense, as measured on {self.device} '
                    f'({name})' for name in self.hardware]
    paths = {row.note: [other.path for other in self.rows if other.note == row.note] for row in self.rows if row.note}
    notes = [f'{errors.some(same)}: {note}' for note, same in paths.items()]
    return '\n'.join([aligned(head, [_cells(row) for row in self.rows]), *measurements, *notes, self.sentence])


def _cells(row: ParameterAdvice) -> tuple[str, ...]:
  times = lambda ratio: '-' if ratio is None else f'{ratio:.2f}'
  crossover = '-' if row.crossover is None else f'{row.crossover:.1%}'
  return (row.path, ' x '.join(map(str, row.shape)), row.pattern, f'{row.sparsity:.1%}', f'{row.bytes_dense:,}',
          f'{row.bytes_packed:,}', f'{row.flops_dense / 1e6:,.1f}', f'{row.flops_packed / 1e6:,.1f}',
          times(row.traffic), times(row.forward), times(row.training), crossover)


@arguments.checked
def advise(params: PyTree, pattern: Pattern | str | Mapping[str, Pattern | str], *, device: str = 'cpu',
           tokens: int = 1024, where: Predicate | PyTree = trees.matrices, axes: Mapping[str, Axes] | None = None,
           tables: str | pathlib.Path = TABLES) -> Advice:
  """Returns whether packing the leaves that `where` picks will help on a device, before anything is pruned.

  `pattern` is a pattern of `sparsejax.patterns`, a string such as '2:4', '128x128 0.9', 'unstructured 0.9' or
  'channel 0.5', or a dict from globs to patterns and strings. A pattern without a sparsity takes the sparsity that the
  parameters have; with a sparsity, leaves may be `jax.ShapeDtypeStruct`s. `tokens` is the number of rows that a weight
  multiplies in one call: batch times length, or positions of a convolution's output.

  A speed is interpolated, in sparsity and in tokens, between the fastest implementations that were measured at the
  nearest shape. Beyond the measured tokens, or above the highest sparsity, it is that of the nearest measurement, and
  `note` says so. There is no speed below the lowest sparsity. There is no speed for a weight that is more than four
  times as long or as short, along an axis, as every measured weight. Raises `ValueError` for an unknown device or
  pattern.
  """
  known = sorted({*DEVICES, *(path.stem for path in pathlib.Path(tables).glob('*.json'))})
  if device not in known:
    raise errors.unknown('advise', 'device', device, known)
  tokens = arguments.verified('advise', 'tokens', tokens)
  table = measured.read_table(device, tables)
  params = formats.unpack(params)
  names, leaves, _ = trees.flatten(params)
  chosen = [(name, leaf) for name, leaf, pick in zip(names, leaves, trees.select('advise', where, params)) if pick]
  asked = trees.per_leaf('advise', 'pattern', pattern, [name for name, _ in chosen])
  known = trees.axes_by_path('advise', axes, params, [name for name, _ in chosen])
  rows = tuple(_row(name, leaf, _parsed(own), known[name], tokens, table)
               for (name, leaf), own in zip(chosen, asked))
  hardware = dict.fromkeys(f'{row.hardware}, jax {row.jax}, commit {row.commit}' for row in table)
  return Advice(rows, device, tokens, _sentence(rows, device, tokens), tuple(hardware))


def _parsed(pattern: Any) -> Pattern:
  """Returns the pattern of a string. Raises `ValueError` for a pattern with a traced number."""
  parsed = patterns.parse(pattern)
  if not parsed.static:
    raise errors.unknown('advise', 'pattern', parsed, ['NM(n, m)', 'Block', 'Unstructured', 'Channel'])
  return parsed


# The rows of parameters.


def _row(path: str, leaf: Any, pattern: Pattern, axes: Axes, tokens: int, table: Sequence[Measured]) -> ParameterAdvice:
  shape, size, taps = tuple(leaf.shape), np.dtype(leaf.dtype).itemsize, math.prod(leaf.shape[a] for a in axes.spatial)
  layers, k, n = matrix_sizes(shape, axes) if axes.source != 'unknown' else (1, 0, 0)
  dense, flops = math.prod(shape) * size, 2 * tokens * math.prod(shape)
  fitting = formats.fitting(pattern)
  why = pattern.validate(shape, axes)
  if not why and fitting and taps > 1:
    why = f'a convolution of {taps} taps is no product of matrices, and there are no kernels for it'
  if why:
    return ParameterAdvice(path, shape, _name(pattern), 0.0, dense, dense, flops, flops, 1.0,
                           note=f'stays dense: {why}')
  if not fitting and not _prunes_outputs(pattern, shape, axes):
    raise errors.at_leaf('advise', path, shape, f'no format of formats.TABLE fits {pattern}; choose another pattern.')
  sparsity = _sparsity(path, leaf, pattern, axes)
  with_product = [each for each in fitting if each.product and k]
  outputs = n if fitting else n - round(sparsity * n)
  packed = ((with_product or fitting)[0].expected_nbytes(shape, leaf.dtype, pattern, axes, sparsity) if fitting
            else math.prod(shape) // n * outputs * size)
  moved = lambda weights, outputs: weights + layers * tokens * (k + outputs) * size
  row = ParameterAdvice(path, shape, _name(pattern), sparsity, dense, packed, flops, round(flops * (1 - sparsity)),
                        moved(dense, n) / moved(packed, outputs))
  if not fitting:
    return row._replace(note='cut the channels out: a smaller dense product, which takes no kernel')
  if not k:
    return row._replace(note='what it contracts is unknown, so no product was looked up; trace it, or say its axes')
  speed = measured.speed(table, [each.product for each in with_product], pattern.group, (k, n), tokens, sparsity)
  return row._replace(**speed._asdict())


def _name(pattern: Pattern) -> str:
  """Returns the name of the pattern without the sparsity that was asked, which has a column of its own."""
  fields = {field.name for field in dataclasses.fields(pattern)}
  return str(dataclasses.replace(pattern, sparsity=None) if 'sparsity' in fields else pattern)


def _prunes_outputs(pattern: Pattern, shape: tuple[int, ...], axes: Axes) -> bool:
  """Returns whether the pattern prunes whole outputs, so that a smaller dense weight is left."""
  layers, _, n = matrix_sizes(shape, axes)
  return patterns.units(pattern, shape, axes) == (n, math.prod(shape) // max(layers * n, 1))


def _sparsity(path: str, leaf: Any, pattern: Pattern, axes: Axes) -> float:
  """Returns the sparsity of the pattern, or else the fraction of the leaf's units (blocks, weights) that are zero."""
  if pattern.sparsity is not None:
    return float(pattern.sparsity)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise errors.at_leaf('advise', path, leaf.shape, f'has no values to count; give a sparsity, as in "{pattern} 0.9".')
  sums = pattern.pooled((jnp.asarray(leaf) != 0).astype(jnp.float32), axes).scores
  return float(np.mean(np.asarray(sums) == 0))


# The sentence about all rows.


def _sentence(rows: Sequence[ParameterAdvice], device: str, tokens: int) -> str:
  """Returns what to do, in one sentence."""
  packed = [row for row in rows if row.bytes_packed != row.bytes_dense or row.sparsity]
  if not packed:
    return f'It will not help: none of the {len(rows)} parameters can carry the pattern or has zeros in it.'
  names = ' and '.join(dict.fromkeys(row.pattern for row in packed))
  fraction = sum(row.bytes_packed for row in packed) / sum(row.bytes_dense for row in packed)
  size = f'the weights take {fraction:.4f} of the dense bytes'
  timed = [row for row in packed if row.forward is not None]
  if not timed:
    return _untimed_sentence(packed, names, size, device, tokens)
  fast = [row for row in timed if row.forward >= FASTER and row.crossover is not None]
  slowest, fastest = (f'{f(row.forward for row in timed):.2f}' for f in (min, max))
  times = f'{slowest}{"" if slowest == fastest else f" to {fastest}"} times as fast as dense on {device}'
  crossovers = [row.crossover for row in timed]
  if len(fast) == len(timed):
    return f'It helps: {names} is expected to be {times}, and faster from {max(crossovers):.0%} on; {size}.'
  if fast:
    return f'It helps {len(fast)} of {len(timed)} parameters: {names} is expected to be {times}; {size}.'
  if None not in crossovers:
    return f'Prune to {max(crossovers):.0%} or more in {names}: below, dense is as fast; {size}.'
  return f'It will not help: {names} is expected to be {times}, and was faster at no measured sparsity; {size}.'


def _untimed_sentence(packed: Sequence[ParameterAdvice], names: str, size: str, device: str, tokens: int) -> str:
  """Returns what to do where no speed is known at the sparsity that was asked."""
  crossovers = [row.crossover for row in packed if row.crossover is not None]
  if crossovers:
    return (f'Prune to {max(crossovers):.0%} or more in {names}: below, dense is as fast on {device}, or nothing was '
            f'measured; {size}.')
  bound = max(row.traffic for row in packed)
  return (f'The speed of {names} was not measured on {device}: {size}, and where memory traffic is the limit, that '
          f'bounds the gain of a product of {tokens} tokens to {bound:.2f} times.')
