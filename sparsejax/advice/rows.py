"""Will it help? Bytes, multiply-adds and the speed to expect of packed products, from what was measured on a device.

Speeds are read from tables of measurements and interpolated within them; where nothing was measured, that is said, and
what is given instead is a bound, by its name.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, formats, patterns, trees
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.types import Axes, Pattern, Predicate, PyTree

TABLES = pathlib.Path(__file__).parent / 'tables'
DEVICES = ('cpu', 'h200', 'tpu')  # that kernels are written for, measured or not
# The products that run a pattern, and the lengths of the groups of weights in it; a channel needs none.
OPS = {Block: ('block_sparse_matmul',), NM: ('nm_matmul', 'sparse24_matmul'), Unstructured: ('unstructured_matmul',)}
FASTER = 1.05  # times dense: less is within what one measurement differs from the next
_NUMBERS = {'m': int, 'k': int, 'n': int, 'sparsity': (int, float), 'ratio_forward': (int, float)}
_TEXTS = ('op', 'implementation', 'hardware', 'jax', 'commit')


class Measured(NamedTuple):
  """A product that was measured: `m` tokens, a weight `[k, n]`, and how many times faster than dense it was.

  `op` is the function of `kernels_pallas`, `implementation` what ran. `block` is the lengths, along contraction and
  output, of a block, of a group of N:M (`[m, width]`, with `sparsity` 1 - N / M), or `[1, 1]`. `sparsity` is the share
  of zeros. `ratio_forward` is dense time over packed time of the product, `ratio_train` that of the product with the
  gradients of both operands, or `None`. `hardware`, `jax` and `commit` say on what, with what, and of what.
  """

  op: str
  implementation: str
  m: int
  k: int
  n: int
  block: tuple[int, int]
  sparsity: float
  ratio_forward: float
  ratio_train: float | None
  hardware: str
  jax: str
  commit: str


class Row(NamedTuple):
  """One parameter: `k` contracted with each of `n` outputs, in `layers` copies.

  `forward` and `training` are how many times as fast as dense the packed product is expected to be, and `crossover` the
  sparsity from which the first is faster, by 5 % at least; `None` where that was not measured. `traffic` is how many
  times fewer bytes it moves: a bound on what can be gained where memory is the limit, not a time. `note` says what was
  looked up, or why the parameter stays dense; then `sparsity` is 0 and nothing is saved.
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
  """The rows of all parameters that were asked about, and what to do, in one sentence. Prints as a table."""

  rows: tuple[Row, ...]
  device: str
  tokens: int
  sentence: str
  hardware: tuple[str, ...] = ()

  def __str__(self) -> str:
    head = ('parameter', 'shape', 'pattern', 'sparsity', 'bytes dense', 'packed', 'MFLOPs dense', 'packed',
            'traffic bound', 'forward', 'training', 'faster from')
    lines = [head, *map(_cells, self.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    how = [f'{self.tokens} tokens. forward, training: times as fast as dense, as measured on {self.device} ({name})'
           for name in self.hardware]
    notes = {row.note: [each.path for each in self.rows if each.note == row.note] for row in self.rows if row.note}
    listed = [f'{errors.some(paths)}: {note}' for note, paths in notes.items()]
    return '\n'.join([text[0], '-' * len(text[0]), *text[1:], *how, *listed, self.sentence])


def _cells(row: Row) -> tuple[str, ...]:
  times = lambda ratio: '-' if ratio is None else f'{ratio:.2f}'
  share = '-' if row.crossover is None else f'{row.crossover:.1%}'
  return (row.path, ' x '.join(map(str, row.shape)), row.pattern, f'{row.sparsity:.1%}', f'{row.bytes_dense:,}',
          f'{row.bytes_packed:,}', f'{row.flops_dense / 1e6:,.1f}', f'{row.flops_packed / 1e6:,.1f}',
          times(row.traffic), times(row.forward), times(row.training), share)


def advise(params: PyTree, pattern: Pattern | str | Mapping[str, Pattern | str], *, device: str = 'cpu',
           tokens: int = 1024, where: Predicate | PyTree = trees.matrices, axes: Mapping[str, Axes] | None = None,
           tables: str | pathlib.Path = TABLES) -> Advice:
  """Whether packing the leaves that `where` picks in a pattern will help on a device, before anything is pruned.

  `pattern` is '2:4', '128x128 0.9', 'unstructured 0.9', 'channel 0.5', a pattern of `sparsejax.patterns`, or a dict
  from globs to these. Without a sparsity it is that of the parameters as they are; with one, leaves may be
  `jax.ShapeDtypeStruct`s. `tokens` is how many rows a weight meets in one call (batch times length, or places of a
  convolution's output). Raises `ValueError` for a device or a pattern that there is not.

  A speed is interpolated, in sparsity and in tokens, between the fastest implementations that were measured at the
  nearest shape. Beyond what was measured it is that of the nearest tokens, or of the highest sparsity, and `note` says
  so; below the lowest sparsity there is none.
  """
  known = sorted({*DEVICES, *(path.stem for path in pathlib.Path(tables).glob('*.json'))})
  if device not in known:
    raise errors.unknown('advise', 'device', device, known)
  if tokens < 1:
    raise ValueError(f'advise: tokens is how many rows a weight meets, at least 1, not {tokens}.')
  table = read_table(device, tables)
  params = formats.unpack(params)
  names, leaves, _ = trees.flatten(params)
  chosen = [(name, leaf) for name, leaf, pick in zip(names, leaves, trees.select('advise', where, params)) if pick]
  asked = trees.per_leaf('advise', 'pattern', pattern, [name for name, _ in chosen])
  rows = tuple(_row(name, leaf, _parsed(each), trees.axes_of('advise', axes, name, leaf.shape), tokens, table)
               for (name, leaf), each in zip(chosen, asked))
  hardware = dict.fromkeys(f'{row.hardware}, jax {row.jax}, commit {row.commit}' for row in table)
  return Advice(rows, device, tokens, _sentence(rows, device, tokens), tuple(hardware))


def read_table(device: str, tables: str | pathlib.Path = TABLES) -> list[Measured]:
  """What was measured on a device: `<device>.json` in `tables`, a list of objects with the fields of `Measured`.

  `ratio_train` may be missing or null. Empty if there is no such file. Raises `ValueError` naming the file and the row
  for anything else.
  """
  path = pathlib.Path(tables) / f'{device}.json'
  if not path.exists():
    return []
  try:
    rows = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'advise: {path} is no JSON: {error}') from error
  if not isinstance(rows, list):
    raise ValueError(f'advise: {path} must be a list of rows, each with {", ".join(Measured._fields)}.')
  return [_measured(path, i, row) for i, row in enumerate(rows)]


def _measured(path: pathlib.Path, i: int, row: Any) -> Measured:
  fields = {'ratio_train': None, **row} if isinstance(row, Mapping) else {}
  if set(fields) != set(Measured._fields):
    wrong = sorted(set(fields) ^ set(Measured._fields))
    raise ValueError(f'advise: row {i} of {path} must have just {", ".join(Measured._fields)}; see {", ".join(wrong)}.')
  wrong = [name for name, kind in _NUMBERS.items() if not isinstance(fields[name], kind) or fields[name] < 0]
  wrong += [name for name in _TEXTS if not isinstance(fields[name], str)]
  wrong += [] if isinstance(fields['ratio_train'], (int, float, type(None))) else ['ratio_train']
  block = fields['block']
  if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
    wrong.append('block')
  if wrong:
    raise ValueError(f'advise: row {i} of {path}: {", ".join(wrong)} are not as advice.Measured says.')
  return Measured(**{**fields, 'block': tuple(block)})


def _parsed(pattern: Any) -> Pattern:
  """`'128x128 0.9'` is `Block((128, 128), 0.9)`."""
  if not isinstance(pattern, str):
    pattern = patterns.parse(pattern)
    if type(pattern) not in (*OPS, Channel) or not pattern.static:
      raise errors.unknown('advise', 'pattern', pattern, ['NM(n, m)', 'Block', 'Unstructured', 'Channel'])
    return pattern
  name, _, share = pattern.strip().rpartition(' ')
  if not name or not re.fullmatch(r'\d*\.?\d+', share):
    return patterns.parse(pattern)
  parsed = patterns.parse(name)
  if isinstance(parsed, NM):
    raise ValueError(f'advise: {pattern!r}: {parsed} says how sparse it is; leave {share} out.')
  return dataclasses.replace(parsed, sparsity=float(share))


# One parameter.


def _row(path: str, leaf: Any, pattern: Pattern, at: Axes, tokens: int, table: Sequence[Measured]) -> Row:
  shape, size = tuple(leaf.shape), np.dtype(leaf.dtype).itemsize
  k, n, layers, taps = (
      math.prod(shape[a] for a in axes) for axes in (at.contracted, at.output, at.layer, at.spatial))
  dense, flops = math.prod(shape) * size, 2 * tokens * math.prod(shape)
  name = str(pattern if isinstance(pattern, NM) else dataclasses.replace(pattern, sparsity=None))
  why = pattern.validate(shape, at)
  if not why and taps > 1 and not isinstance(pattern, Channel):
    why = f'a convolution of {taps} taps is no product of matrices, and there are no kernels for it'
  if why:
    return Row(path, shape, name, 0.0, dense, dense, flops, flops, 1.0, note=f'stays dense: {why}')
  sparsity = _sparsity(path, leaf, pattern, at)
  packed = _bytes(leaf, pattern, at, sparsity, k, n, layers)
  left = n if not isinstance(pattern, Channel) else n - round(sparsity * n)
  moved = lambda weights, outputs: weights + layers * tokens * (k + outputs) * size
  row = Row(path, shape, name, sparsity, dense, packed, flops, round(flops * (1 - sparsity)),
            moved(dense, n) / moved(packed, left))
  if isinstance(pattern, Channel):
    return row._replace(note='cut the channels out: a smaller dense product, which takes no kernel')
  return row._replace(**_expected(pattern, k, n, tokens, sparsity, table))


def _sparsity(path: str, leaf: Any, pattern: Pattern, at: Axes) -> float:
  """What was asked, or the share of the leaf's blocks, weights or channels that are zero."""
  if pattern.sparsity is not None:
    return float(pattern.sparsity)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise errors.at_leaf('advise', path, leaf.shape, f'has no values to count; give a sparsity, as in "{pattern} 0.9".')
  sums = pattern.pooled((jnp.asarray(leaf) != 0).astype(jnp.float32), at).scores
  return float(np.mean(np.asarray(sums) == 0))


def _bytes(leaf: Any, pattern: Pattern, at: Axes, sparsity: float, k: int, n: int, layers: int) -> int:
  """Of the format that the product takes: `NMArray`, `BlockSparseArray`, `CSCArray`; or of the channels left.

  Of blocks, if no row and no column of them is empty, or as few as can be: each has one stored at least.
  """
  size, whole = np.dtype(leaf.dtype).itemsize, math.prod(leaf.shape)
  if isinstance(pattern, NM):
    w = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return formats.nbytes(jax.eval_shape(lambda w: formats.NMArray.from_dense(
        w, pattern.n, pattern.m, at, check=False, width=pattern.width), w))
  if isinstance(pattern, Block):
    grid = k // pattern.shape[0], n // pattern.shape[1]
    kept = max(math.prod(grid) - round(sparsity * math.prod(grid)), *grid)
    one = formats.BlockSparseArray.from_dense(np.ones(pattern.shape, leaf.dtype), block=pattern.shape)
    return layers * kept * one.nbytes
  if isinstance(pattern, Channel):
    return layers * (n - round(sparsity * n)) * (whole // (layers * n)) * size
  return layers * ((k * n - round(sparsity * k * n)) * (size + 12) + 4 * (k + n + 2))


# What was measured.


def _expected(pattern: Pattern, k: int, n: int, tokens: int, sparsity: float, table: Sequence[Measured]
              ) -> dict[str, Any]:
  """`forward`, `training`, `crossover` and `note` of a row."""
  if not table:
    return {'note': 'not measured on that device'}
  of_op = [row for row in table if row.op in OPS[type(pattern)]]
  rows = [row for row in of_op if row.block == _block(pattern)]
  if not rows:
    others = ', '.join(sorted({'{}x{}'.format(*row.block) for row in of_op}))
    note = 'not measured for groups of {}x{}'.format(*_block(pattern))
    return {'note': f'{note}, but for {others}' if others else note}
  away = lambda row: (abs(math.log2(row.k / k)) + abs(math.log2(row.n / n)), row.k, row.n)
  nearest = min(map(away, rows))
  near = [row for row in rows if away(row) == nearest]
  notes = [f'of {near[0].k} x {near[0].n}, the nearest measured'] if nearest[0] else []
  forward = _curves([(row.m, row.sparsity, row.ratio_forward) for row in near], tokens)
  training = _curves([(row.m, row.sparsity, row.ratio_train) for row in near if row.ratio_train is not None], tokens)
  notes += _beyond('', forward, tokens, sparsity)
  notes += _beyond('training ', training, tokens, sparsity) if training else []
  places = {s for curve in forward.values() for s in curve}
  grid = [float(s) for s in np.unique([*np.linspace(min(places), max(places), 1001), *places])]
  faster = [s for s in grid if (_at(forward, tokens, s) or 0) >= FASTER]
  return {'forward': _at(forward, tokens, sparsity), 'training': _at(training, tokens, sparsity),
          'crossover': faster[0] if faster else None, 'note': '; '.join(notes)}


Curves = dict[int, dict[float, float]]  # tokens -> sparsity -> ratio, both increasing


def _curves(points: Sequence[tuple[int, float, float]], tokens: int) -> Curves:
  """Of the measured numbers of tokens just below and above, of the fastest implementation each."""
  lengths = sorted({m for m, _, _ in points})
  around = {max([m for m in lengths if m <= tokens], default=lengths[0]),
            min([m for m in lengths if m >= tokens], default=lengths[-1])} if lengths else set()
  curves: Curves = {m: {} for m in sorted(around)}
  for m, sparsity, ratio in sorted(points):  # the largest ratio comes last
    if m in curves:
      curves[m][sparsity] = ratio
  return curves


def _at(curves: Curves, tokens: int, sparsity: float) -> float | None:
  """Linear in the sparsity and in the logarithm of the tokens; `None` where nothing was measured that is as dense."""
  if not curves or any(sparsity < min(curve) - 1e-9 for curve in curves.values()):
    return None
  each = [np.interp(sparsity, list(curve), list(curve.values())) for curve in curves.values()]
  return float(np.interp(np.log2(tokens), np.log2(list(curves)), each))


def _beyond(what: str, curves: Curves, tokens: int, sparsity: float) -> list[str]:
  """In which way the numbers are of something else than was asked."""
  lowest, highest = max(map(min, curves.values())), min(map(max, curves.values()))
  notes = [f'{what}not measured below {lowest:.1%}'] if sparsity < lowest - 1e-9 else []
  notes += [f'{what}of {highest:.1%}, the highest measured'] if sparsity > highest + 1e-9 else []
  outside = not min(curves) <= tokens <= max(curves)
  return notes + ([f'{what}of {min(curves)} tokens, the nearest measured'] if outside else [])


def _block(pattern: Pattern) -> tuple[int, int]:
  if isinstance(pattern, NM):
    return pattern.m, pattern.width
  return pattern.shape if isinstance(pattern, Block) else (1, 1)


def _sentence(rows: Sequence[Row], device: str, tokens: int) -> str:
  """What to do."""
  packed = [row for row in rows if row.bytes_packed != row.bytes_dense or row.sparsity]
  if not packed:
    return f'It will not help: none of the {len(rows)} parameters can carry the pattern or has zeros in it.'
  what = ' and '.join(dict.fromkeys(row.pattern for row in packed))
  share = sum(row.bytes_packed for row in packed) / sum(row.bytes_dense for row in packed)
  size = f'the weights take {share:.4f} of the dense bytes'
  timed = [row for row in packed if row.forward is not None]
  if not timed:
    starts = [row.crossover for row in packed if row.crossover is not None]
    if starts:
      return (f'Prune to {max(starts):.0%} or more in {what}: below, dense is as fast on {device}, or nothing was '
              f'measured; {size}.')
    bound = max(row.traffic for row in packed)
    return (f'The speed of {what} was not measured on {device}: {size}, and where memory traffic is the limit, that '
            f'bounds the gain of a product of {tokens} tokens to {bound:.2f} times.')
  fast = [row for row in timed if row.forward >= FASTER and row.crossover is not None]
  slowest, fastest = (f(row.forward for row in timed) for f in (min, max))
  span = f'{slowest:.2f}' + (f' to {fastest:.2f}' if f'{slowest:.2f}' != f'{fastest:.2f}' else '')
  times = f'{span} times as fast as dense on {device}'
  starts = [row.crossover for row in timed]
  if len(fast) == len(timed):
    return f'It helps: {what} is expected to be {times}, and faster from {max(starts):.0%} on; {size}.'
  if fast:
    return f'It helps {len(fast)} of {len(timed)} parameters: {what} is expected to be {times}; {size}.'
  if None not in starts:
    return f'Prune to {max(starts):.0%} or more in {what}: below, dense is as fast; {size}.'
  return f'It will not help: {what} is expected to be {times}, and was faster at no measured sparsity; {size}.'
