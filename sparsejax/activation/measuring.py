"""Measures what products are given on calibration batches, and what a sparse model does on batches that were held out.

    found = statistics(calls, places, rule)                  # statistics of each unit
    sums, results = tested(calls, places, below(thresholds), {})    # what tokens skip, and what comes out
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import calibration, formats
from sparsejax.activation.places import Seen, SkippableWeight, Unit, Weights, walked
from sparsejax.activation.rules import Rest, Rule
from sparsejax.programs.calls import BatchWalk, Calls, validity
from sparsejax.programs.evaluate import Walk
from sparsejax.types import Array

FUNCTION = 'activation.sparsify'
BLOCK = 16  # inputs that a product on a CPU skips together
TOKENS = 8  # tokens of a batch whose bytes are counted

Thresholds = Mapping[Unit, np.ndarray]


class Observed(NamedTuple):
  """An `Observed` is a product at which the walk of a batch waits; `valid`: the entries of its operand that count."""

  product: Seen
  valid: Array | None
  batch: int

  def rows(self, array: Array) -> calibration.Rows:
    """Returns the rows of an array like the operand; refuses rows that count and are not finite."""
    rows = calibration.Rows(*self.product.rows(array, self.valid))
    if not bool(rows.finite):
      path, unit = self.product.unit
      raise ValueError(f'{FUNCTION}: the input of {path}{list(unit) if unit else ""} holds NaN or infinities in batch '
                       f'{self.batch}. Look at the batch and at the products before, or leave the rows out with '
                       '`valid`.')
    return rows


def walks(calls: Calls, places: Weights) -> Iterator[BatchWalk]:
  """Returns the walk of each batch, started when the walk is asked for."""
  for i, (program, arrays, valid) in enumerate(zip(calls.programs, calls.arrays, calls.valid)):
    yield BatchWalk(i, walked(FUNCTION, program, arrays, places), validity(FUNCTION, program, valid))


def observed_at(each: BatchWalk, walk: Walk) -> Observed:
  """Returns the product at which a walk of a batch, or a copy of the walk, waits."""
  return Observed(walk.site, each.valid(walk.site.site)[0], each.number)


def runs(calls: Calls, places: Weights, visit: Callable[[Observed], Any]) -> list[list[Any]]:
  """Runs every batch; `visit` may answer each product with other results. Returns the results of each batch."""
  results: list[list[Any]] = []
  for each in walks(calls, places):
    while each.walk.stopped:
      each.walk.answer(visit(observed_at(each, each.walk)))
    results.append(each.walk.results or [])
  return results


def mean_of_up(seen: Observed) -> np.ndarray:
  """Returns the mean magnitude of the product that multiplies an activation, `[L, K]`; ones in a plain layer."""
  x, up = seen.product.x, seen.product.up
  found = calibration.magnitudes(seen.rows(jnp.ones_like(x) if up is None else up))
  return np.asarray(found.total) / np.maximum(np.asarray(found.rows), 1)[:, None]


def scale_of(rule: Rule, place: SkippableWeight, unit: Unit, means: list[np.ndarray]) -> Any:
  """Returns by what the magnitudes of a unit are multiplied, `[L, K]`, before they are compared.

  `means` are those of `up` in each batch, which only rules for neurons read.
  """
  return rule.scale(jnp.asarray(np.mean(means, 0)) if rule.neurons else place.stack(unit))


def scales(calls: Calls, places: Weights, rule: Rule) -> dict[Unit, Any]:
  """Returns by what the magnitudes of each unit are multiplied, with all products dense."""
  means: dict[Unit, list[Any]] = {unit: [] for place in places.values() for unit in place.units}
  if rule.neurons:
    runs(calls, places, lambda seen: means[seen.product.unit].append(mean_of_up(seen)))
  return {unit: scale_of(rule, places[unit[0]], unit, each) for unit, each in means.items() if each or not rule.neurons}


def magnitudes_of(seen: Observed, scale: Any) -> calibration.Magnitudes:
  """Returns the scaled magnitudes of an operand as arrays of the host."""
  return jax.tree.map(np.asarray, calibration.magnitudes(seen.rows(seen.product.x), scale))


def are_counted(each: list[calibration.Magnitudes]) -> bool:
  """Returns whether a row of each matrix counts in some batch."""
  return bool(each) and all(int(sum(one.rows[l] for one in each)) > 0 for l in range(len(each[0].rows)))


def statistics(calls: Calls, places: Weights, own: Mapping[Unit, Any]) -> dict[Unit, list[Any]]:
  """Returns the `Magnitudes` of each unit in each batch, scaled by `own`, with all products dense."""
  found: dict[Unit, list[Any]] = {}
  runs(calls, places, lambda seen: found.setdefault(seen.product.unit, []).append(
      magnitudes_of(seen, own[seen.product.unit])))
  return {unit: each for unit, each in found.items() if are_counted(each)}


def over_batches(each: list[Any]) -> calibration.Magnitudes:
  """Returns the magnitudes of all batches, counted in 64 bits."""
  wide = lambda a: np.asarray(a).astype(np.int64 if a.dtype.kind == 'i' else np.float64)
  return jax.tree.map(lambda *parts: functools.reduce(np.add, map(wide, parts)), *each)


class SkipReport(NamedTuple):
  """A `SkipReport` is the row of one unit: a weight, or one layer of it that the program takes by itself.

  `shape`: `(matrices, outputs, inputs)`. `asked`: the fraction of inputs that was to be skipped. `achieved`: the
  fraction that tokens skipped while all products were sparse. `blocks`: the fraction of blocks of 16 inputs that one
  token reads. `rows`: how many tokens were counted. `error`: the squared error of the product over the squared dense
  product of the same input. `read`: the bytes of the weight that the compiled product reads for one token, over those
  of the weight, if `reads` was given. `note` says what else a reader must know.
  """

  path: str
  unit: tuple[int, ...]
  shape: tuple[int, ...]
  asked: float | None
  achieved: float
  blocks: float
  rows: int
  error: float | None
  read: float | None = None
  note: str = ''

  @property
  def name(self) -> str:
    return self.path + (f'[{", ".join(map(str, self.unit))}]' if self.unit else '')

  @property
  def cells(self) -> tuple[str, ...]:
    """The row as the texts of a table."""
    number = lambda value, form='.4f': '-' if value is None else format(value, form)
    return (self.name, ' x '.join(map(str, self.shape)), number(self.asked), number(self.achieved),
            number(self.blocks), str(self.rows), number(self.error, '.3g'), number(self.read), self.note)


HEAD = ('parameter', 'stack', 'asked', 'achieved', 'blocks', 'rows', 'error', 'bytes read', '')
Reads = Callable[[Array, formats.ActiveArray], int]


def below(thresholds: Thresholds) -> Callable[[Seen], Array]:
  """Returns the function that says which entries of an operand are below their thresholds."""
  return lambda seen: jnp.abs(seen.x.astype(jnp.float32)) < seen.place.spread(thresholds[seen.unit], seen.number)


def tested(calls: Calls, places: Weights, skips: Callable[[Seen], Array], rests: Mapping[Unit, Rest],
           reads: Reads | None = None) -> tuple[dict[Unit, list[float]], list[list[Any]]]:
  """Runs the sparse model. Returns sums of each unit, and the results of each batch.

  `skips(seen)` says which entries of the operand are skipped. The first three sums are those of skipped entries, of
  entries, and of entries in blocks that are read. Two are the squares of the error of the product, and of the dense
  product. With `reads(x, w)`, two more are the bytes that a token reads, one for each batch, and those of the weight.
  """
  sums: dict[Unit, list[float]] = {}

  def visit(observed: Observed) -> list[Any]:
    seen, valid, skipped = observed.product, observed.valid, skips(observed.product)
    own = sums.setdefault(seen.unit, [0.0] * 7)
    own[:3] = [a + b for a, b in zip(own, _counted(seen, skipped, valid))]
    kept, answer = skipping(seen, skipped, rests)
    if reads is not None:
      own[5:] = [a + b for a, b in zip(own[5:], _bytes(seen, kept, valid, reads))]
    if seen.place.layer is None:
      dense, = seen.answered(seen.x)
      square = lambda a: float(jnp.sum(jnp.square(a.astype(jnp.float32))))
      own[3:5] = [own[3] + square(dense - answer[0]), own[4] + square(dense)]
    return answer

  return sums, runs(calls, places, visit)


def results_moved(dense: list[list[Any]], sparse: list[list[Any]]) -> float:
  """Returns the squared difference of the results of all batches over the squared norm of the dense results."""
  error, whole = 0.0, 0.0
  for a, b in [pair for each in zip(dense, sparse) for pair in zip(*each)]:
    if jnp.issubdtype(a.dtype, jnp.floating):
      error += float(jnp.sum(jnp.square((a - b).astype(jnp.float32))))
      whole += float(jnp.sum(jnp.square(a.astype(jnp.float32))))
  return error / whole if whole else 0.0


def skipping(seen: Seen, skipped: Array, rests: Mapping[Unit, Rest]) -> tuple[Array, list[Any]]:
  """Returns the operand without what is skipped, and the results of the sparse operation."""
  kept = jnp.where(skipped, jnp.zeros((), seen.x.dtype), seen.x)
  answer = seen.answered(kept)
  return kept, [answer[0] + _rest_of(seen, seen.x - kept, rests[seen.unit])] if seen.unit in rests else answer


def _bytes(seen: Seen, kept: Array, valid: Array | None, reads: Reads) -> tuple[float, float]:
  """Returns the bytes that the product of one token reads of its matrix, and those of the matrix.

  The bytes are the mean over the first `TOKENS` tokens that count.
  """
  rows, counted = seen.rows(kept, valid)
  tokens = np.arange(rows.shape[1]) if counted is None else np.flatnonzero(np.asarray(counted[0]))
  matrix = seen.place.stack(seen.unit)[0].T
  weight = formats.ActiveArray.of(matrix)
  found = [reads(rows[:1, token], weight) for token in tokens[:TOKENS]]
  return float(np.mean(found or [0])), matrix.nbytes if found else 0


def _rest_of(seen: Seen, skipped: Array, rest: Rest) -> Array:
  """Returns the product of the skipped inputs and of the low-rank weight."""
  own, place = seen.place.arrangements[seen.number], seen.place
  low = jnp.einsum('lkr,lrn->lnk', rest.left, rest.right)
  part = [n for a, n in enumerate(place.array.shape) if a not in own.gone]
  return seen.site.product(x=skipped, weight=own.operand(own.part(low, part)).astype(seen.site.weight.dtype))


def _counted(seen: Seen, skipped: Array, valid: Array | None) -> list[float]:
  """Returns how many entries are skipped, how many there are, and how many blocks are read, by rows that count."""
  passed, counted = seen.rows(jnp.where(skipped, 0.0, 1.0), valid)
  there = jnp.ones(passed.shape[:2], bool) if counted is None else counted
  there = jnp.broadcast_to(there, (max(len(there), len(passed)), passed.shape[1]))
  k = passed.shape[-1]
  rows = jnp.broadcast_to(passed, (len(there), *passed.shape[1:]))
  block = math.gcd(BLOCK, k)
  read = jnp.any(rows.reshape(*rows.shape[:2], k // block, block) > 0, -1)
  count = float(jnp.sum(there))
  entries = count * k
  return [entries - float(jnp.sum(jnp.where(there[..., None], rows, 0))), entries,
          float(jnp.sum(jnp.where(there[..., None], read, False))) * block]
