"""Reads the tables of measured products, and interpolates within them the speed to expect of another product.

    table = advice.read_table('cpu')                       # a list of `Measured`, from advice/tables/cpu.json
    measured.speed(table, ('nm_matmul',), (4, 1), (1024, 1024), tokens=256, sparsity=0.5)
    # Speed(forward=..., training=..., crossover=..., note='')

A number beyond the measurements is the nearest measured one, and `note` says so. No shape stands for another one that
is more than `FAR` times as long or as short along an axis. Where nothing was measured there is no number.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.arguments import checked

TABLES = pathlib.Path(__file__).parent / 'tables'
DEVICES = ('cpu', 'h200', 'tpu')  # There are kernels for these devices, measured or not.
FAR = 4  # times as long or as short along an axis; the speed of such a shape says nothing
FASTER = 1.05  # times dense, from which a sparsity is said to pay
_NUMBERS = {'m': int, 'k': int, 'n': int, 'sparsity': (int, float), 'ratio_forward': (int, float)}
_TEXTS = ('op', 'implementation', 'hardware', 'jax', 'commit')


class Measured(NamedTuple):
  """A `Measured` is one measurement: `m` tokens times a weight `[k, n]`, and how many times as fast as dense that was.

  `op`: the function of `kernels_pallas`. `implementation`: the implementation that ran.
  `block`: the lengths of a group of weights along contraction and output. The group is the block of a block-sparse
  weight, `[m, width]` for N:M (with `sparsity` 1 - N / M), and `[1, 1]` for an unstructured weight.
  `sparsity`: the fraction of zeros.
  `ratio_forward`: the dense time over the packed time of the product. `ratio_train`: the same of the product together
  with the gradients of both operands, or `None`.
  `hardware`, `jax` and `commit`: the device, the version of JAX and the revision of the code that were measured.
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


class Speed(NamedTuple):
  """A `Speed` says how many times as fast as dense a packed product is expected to be; `None` means not measured.

  `forward` is for the product, `training` for the product together with both gradients. `crossover` is the sparsity
  from which the product is faster by 5 % or more. `note` says in which way the measurements differ from the product.
  """

  forward: float | None = None
  training: float | None = None
  crossover: float | None = None
  note: str = ''


@checked
def read_table(device: str, tables: str | pathlib.Path = TABLES) -> list[Measured]:
  """Returns the measurements of a device from `<device>.json` in the folder `tables`; none if there is no such file.

  The file is a list of objects with the fields of `Measured`; `ratio_train` may be missing or null. Raises `ValueError`
  naming the file and the row for anything else.
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
  """Returns row `i` of the file as a `Measured`, or raises `ValueError` naming its wrong fields."""
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


# Interpolation.


def near_tokens(table: Sequence[Measured], tokens: int) -> list[Measured]:
  """Returns all measurements of each product that was measured with about `tokens` tokens.

  A product is an op with a shape and a group. About as many means at most `FAR` times as many or as few, or both fewer
  and more.
  """
  product = lambda row: (row.op, row.block, row.k, row.n)
  lengths: dict[Any, set[int]] = {}
  for row in table:
    lengths.setdefault(product(row), set()).add(row.m)
  near = lambda measured: min(measured) <= FAR * tokens and max(measured) * FAR >= tokens
  return [row for row in table if near(lengths[product(row)])]


def speed(table: Sequence[Measured], ops: Sequence[str], group: tuple[int, int], shape: tuple[int, int], tokens: int,
          sparsity: float) -> Speed:
  """Returns the speed to expect of a product of `tokens` rows with a packed weight of `shape`, `(k, n)`.

  The speed is that of the fastest implementation of `ops`, at the nearest measured shape with the same `group`. Shapes
  that were measured with about as many tokens come first, see `near_tokens`. Without a measured shape within a factor
  of `FAR` along both axes, there is no speed. The interpolation is linear in the sparsity and in the logarithm of the
  tokens.
  """
  if not table:
    return Speed(note='not measured on that device')
  of_ops = [row for row in near_tokens(table, tokens) if row.op in ops] or [row for row in table if row.op in ops]
  rows = [row for row in of_ops if row.block == group]
  if not rows:
    others = ', '.join(sorted({'{}x{}'.format(*row.block) for row in of_ops}))
    note = 'not measured for groups of {}x{}'.format(*group)
    return Speed(note=f'{note}, but for {others}' if others else note)
  away = lambda row: [abs(math.log2(length / asked)) for length, asked in zip((row.k, row.n), shape)]
  distance = lambda row: (sum(away(row)), row.k, row.n)
  nearest = min([distance(row) for row in rows if max(away(row)) <= math.log2(FAR)], default=None)
  if not nearest:
    _, k, n = min(map(distance, rows))
    return Speed(note=f'not measured within {FAR} times of {shape[0]} x {shape[1]}: the nearest is {k} x {n}')
  near = [row for row in rows if distance(row) == nearest]
  notes = [f'of {near[0].k} x {near[0].n}, the nearest measured'] if nearest[0] else []
  forward = _curves([(row.m, row.sparsity, row.ratio_forward) for row in near], tokens)
  training = _curves([(row.m, row.sparsity, row.ratio_train) for row in near if row.ratio_train is not None], tokens)
  notes += _extrapolations('', forward, tokens, sparsity)
  notes += _extrapolations('training ', training, tokens, sparsity) if training else []
  return Speed(_interpolated(forward, tokens, sparsity), _interpolated(training, tokens, sparsity),
               _crossover(forward, tokens), '; '.join(notes))


Curves = dict[int, dict[float, float]]  # tokens -> sparsity -> ratio, both increasing


def _curves(points: Sequence[tuple[int, float, float]], tokens: int) -> Curves:
  """Returns curves of the measured numbers of tokens just below and just above `tokens`.

  Each point is (tokens, sparsity, ratio); of equal tokens and sparsities the largest ratio, the fastest implementation,
  counts.
  """
  lengths = sorted({m for m, _, _ in points})
  around = {max([m for m in lengths if m <= tokens], default=lengths[0]),
            min([m for m in lengths if m >= tokens], default=lengths[-1])} if lengths else set()
  curves: Curves = {m: {} for m in sorted(around)}
  for m, sparsity, ratio in sorted(points):  # The largest ratio comes last.
    if m in curves:
      curves[m][sparsity] = ratio
  return curves


def _interpolated(curves: Curves, tokens: int, sparsity: float) -> float | None:
  """Returns the ratio at `tokens` and `sparsity`, or `None` below the lowest measured sparsity."""
  if not curves or any(sparsity < min(curve) - 1e-9 for curve in curves.values()):
    return None
  ratios = [np.interp(sparsity, list(curve), list(curve.values())) for curve in curves.values()]
  return float(np.interp(np.log2(tokens), np.log2(list(curves)), ratios))


def _crossover(curves: Curves, tokens: int) -> float | None:
  """Returns the lowest of 1001 and of the measured sparsities that is faster than dense, or `None`."""
  measured = {sparsity for curve in curves.values() for sparsity in curve}
  grid = np.unique([*np.linspace(min(measured), max(measured), 1001), *measured]).tolist()
  return next((sparsity for sparsity in grid if (_interpolated(curves, tokens, sparsity) or 0) >= FASTER), None)


def _extrapolations(quantity: str, curves: Curves, tokens: int, sparsity: float) -> list[str]:
  """Returns notes on each way in which `tokens` and `sparsity` are outside of the measurements."""
  lowest, highest = max(map(min, curves.values())), min(map(max, curves.values()))
  notes = [f'{quantity}not measured below {lowest:.1%}'] if sparsity < lowest - 1e-9 else []
  notes += [f'{quantity}of {highest:.1%}, the highest measured'] if sparsity > highest + 1e-9 else []
  outside = not min(curves) <= tokens <= max(curves)
  return notes + ([f'{quantity}of {min(curves)} tokens, the nearest measured'] if outside else [])
