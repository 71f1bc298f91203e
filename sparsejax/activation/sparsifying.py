"""Makes a trained model skip what is small: `sparsify` calibrates a rule on a few batches and returns packed leaves.

    small = sparsify(model.apply, variables, batches, wina(0.5))
    print(small.report)                                             # asked and achieved, on batches held out
    y = kernels_pallas.packed(small.apply)(small.params, x)         # skips; under jit, grad, vmap and scan too
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, errors, formats, trees
from sparsejax.activation.allocating import Greedy, bounded, shared
from sparsejax.activation.in_order import in_order
from sparsejax.activation.measuring import (
  FUNCTION,
  HEAD,
  Observed,
  Reads,
  SkipReport,
  Thresholds,
  are_counted,
  below,
  magnitudes_of,
  mean_of_up,
  over_batches,
  results_moved,
  runs,
  scale_of,
  scales,
  statistics,
  tested,
)
from sparsejax.activation.places import Seen, Unit, Weights, places_of, refuse_unfit
from sparsejax.activation.rules import PerplexityRule, Rest, Rule, TopNeurons
from sparsejax.activation.ruling import ruled, switched
from sparsejax.programs.calls import Calls, calls_of
from sparsejax.tables import Report
from sparsejax.types import Array, Predicate, PyTree

SEQUENCES = ('dense', 'weight')


class Rewritten(NamedTuple):
  """A `Rewritten` is a model after a data-driven rewrite: packed parameters, the function that takes them, a report.

  `apply` is the user's own function where thresholds on the inputs of products suffice. For a rule behind an activation
  function, `apply` is another function, which switches neurons off with dense parameters too.
  `kernels_pallas.packed(apply)` runs `apply` on `params`.
  """

  params: PyTree
  apply: Callable[..., Any]
  report: Report


@arguments.checked
def sparsify(apply: Callable[..., Any], params: PyTree, batches: Iterable[Any],
             rule: Rule | TopNeurons | PerplexityRule, *, where: Predicate | PyTree | None = None,
             valid: Iterable[Array] | None = None, allocation: Greedy | None = None,
             sequential: str = 'dense', reads: Reads | None = None) -> Rewritten:
  """Returns the model that skips inputs or neurons as a rule says, with thresholds from calibration batches.

  `apply(params, *inputs)`: any JAX function whose first argument holds the parameters. In `batches` a tuple is
  positional arguments, a dict is keyword arguments, anything else is one argument. The last quarter of several batches
  is held out: the report counts there what tokens skip while all products are sparse, and how far the results move.
  `sequential`: 'dense' finds thresholds with all products dense (TEAL, R-Sparse, CHESS). 'weight' finds them one weight
  after the other, with all products before a weight sparse already, as `prune` does (WINA's option `layer_wise`).

  A rule for inputs (`teal`, `wina`, `r_sparse`, `ppl`) makes each weight that `where` picks a `formats.ActiveArray`. By
  default these are the weights of all products of matrices, without the head. A rule for neurons (`cats`, `chess`,
  `top_k`) takes the gated layers that the program has, by the path of `down`. Then `up` and `down` become
  `ActiveArray`s, and both are skipped together. `valid` has one `bool` array a batch, whose shape begins the shapes of
  the inputs; padding does not count. `allocation=greedy()` gives weights different sparsities with the same mean.
  `reads=kernels_pallas.bytes_read` adds the bytes that one token reads of each weight, from the compiled products.

  Raises `ValueError` without batches or valid rows, for NaN, for packed parameters, and for parameters that `where`
  picks and no product can skip. Raises `ValueError` for another `sequential`, and for `top_k` in sequence. Raises
  `ValueError` for a gated layer whose activation is not zero at zero. Raises `ValueError` for a `top_k` or a rank above
  the size of a weight. The report lists what stays dense, and why.
  """
  began = time.perf_counter()
  _refuse_packed(params)
  calls = calls_of(FUNCTION, apply, params, batches, valid)
  places, dense = places_of(FUNCTION, calls.programs[0], params, where, rule.neurons)
  _refuse_not_finite(places)
  refuse_unfit(FUNCTION, rule, places)
  calls.refuse_other_programs(FUNCTION, {path: [(use.address, use.operand) for use in place.uses.values()]
                                         for path, place in places.items()})
  neurons = rule.neurons and not isinstance(rule, PerplexityRule)
  if not neurons:  # the inputs of `down` are compared, not the activation
    places = {path: dataclasses.replace(place, layer=None) for path, place in places.items()}
  used, kept_out = _split(calls)
  solved = _solved(used, places, rule, allocation, _is_sequential(sequential, rule))
  if not solved.asked and not isinstance(rule, PerplexityRule):
    raise ValueError(f'{FUNCTION}: no row of the {len(used.given)} batches reaches a product of {errors.some(places)}. '
                     'Give batches with rows that count.')
  rows, notes = _rows(apply, params, kept_out or calls, places, solved, reads)
  measured_on = (f'measured on {len(kept_out.given)} of {len(calls.given)} batches, which were held out' if kept_out
                 else 'measured on the calibration batch, as there is no other')
  found_with = f'thresholds were found with all products {"before sparse" if sequential == "weight" else "dense"}'
  left = [f'left dense: {path} ({why})' for path, why in dense.items()]
  report = Report(rows, (measured_on, *([] if isinstance(rule, TopNeurons) else [found_with]), *notes, *left),
                  _mean_asked(rows), HEAD, dense, seconds=time.perf_counter() - began)
  limits = {path: place.joined(solved.thresholds) for path, place in places.items() if solved.thresholds}
  small = _packed(params, places, limits, solved.rests, neurons)
  if isinstance(rule, PerplexityRule) or not neurons:
    return Rewritten(small, apply, report)
  return Rewritten(small, ruled(apply, rule, limits or None, where=where), report)


@arguments.checked
def sparsity(apply: Callable[..., Any], params: PyTree, batches: Iterable[Any], *,
             where: Predicate | PyTree | None = None, valid: Iterable[Array] | None = None) -> dict[str, np.ndarray]:
  """Returns the fraction of neurons that are zero in each gated layer, `float32[*layers]`, by the path of `down`.

  The arguments are those of `sparsify`, and all tokens that count weigh the same. Lazy Neuron (Li et al. 2022,
  2210.06313) reports 1 minus this number, for ReLU. A smooth activation, such as GELU, is hardly ever zero.
  """
  calls = calls_of('activation.sparsity', apply, params, batches, valid)
  places, _ = places_of('activation.sparsity', calls.programs[0], params, where, neurons=True)
  found: dict[Unit, list[Any]] = {}

  def visit(observed: Observed) -> None:
    seen = observed.product
    off, counted = seen.rows(jnp.where(seen.x == 0, 1.0, 0.0), observed.valid)
    there = jnp.ones(off.shape[:2], bool) if counted is None else jnp.broadcast_to(counted, off.shape[:2])
    found.setdefault(seen.unit, []).append([jnp.sum(jnp.where(there, off.mean(-1), 0), 1), jnp.sum(there, 1)])

  runs(calls, places, visit)
  share = lambda each: np.divide(*(np.sum(np.asarray(parts, np.float32), 0) for parts in zip(*each)))
  return {path: place.joined({unit: share(found[unit]) for unit in place.units}) for path, place in places.items()
          if all(unit in found for unit in place.units)}


def _is_sequential(sequential: str, rule: Any) -> bool:
  if sequential not in SEQUENCES:
    raise errors.unknown(FUNCTION, '`sequential`', sequential, SEQUENCES)
  if sequential == 'weight' and isinstance(rule, TopNeurons):
    raise ValueError(f'{FUNCTION}: top_k compares the activations of one token and finds no thresholds; leave '
                     '`sequential` out.')
  return sequential == 'weight'


def _refuse_packed(params: PyTree) -> None:
  paths, leaves, _ = trees.flatten(params, is_leaf=formats.is_packed)
  packed = [path for path, leaf in zip(paths, leaves) if formats.is_packed(leaf)]
  if packed:
    raise ValueError(f'{FUNCTION}: {packed[0]} is packed already. Calibrate on formats.unpack(params), and give packed '
                     'weights their thresholds by formats.ActiveArray.of(packed, threshold).')


def _refuse_not_finite(places: Weights) -> None:
  why = 'it holds NaN or infinities. Repair it, or leave it out of `where`.'
  problems = [errors.Problem(path, place.array.shape, why) for path, place in places.items()
              if not bool(jnp.all(jnp.isfinite(place.array)))]
  if problems:
    raise errors.at_leaves(FUNCTION, problems)


def _split(calls: Calls) -> tuple[Calls, Calls | None]:
  """Returns the calls to calibrate on, and the last quarter, which is held out, or `None` of a single batch."""
  number = len(calls.given)
  first = number - max(number // 4, 1) if number > 1 else number
  part = lambda begin, end: Calls(*(getattr(calls, field.name)[begin:end] for field in dataclasses.fields(calls)))
  used, rest = part(0, first), part(first, number)
  for each in (used, rest):
    if number > 1 and each.valid[0] is not None and not any(bool(np.any(np.asarray(mask))) for mask in each.valid):
      raise ValueError(f'{FUNCTION}: `valid` leaves no row in the first {first} batches, or none in the others, which '
                       'are held out. Give batches with valid rows in both parts.')
  return used, rest if number > 1 else None


class Calibrated(NamedTuple):
  """A `Calibrated` holds what a rule found: thresholds, what skipped inputs are multiplied by, and what was asked.

  `skips(seen)` says which entries of an operand are skipped.
  """

  thresholds: Thresholds
  rests: Mapping[Unit, Rest]
  asked: Mapping[Unit, float | None]
  skips: Callable[[Seen], Array]


def _solved(used: Calls, places: Weights, rule: Any, allocation: Greedy | None, sequential: bool) -> Calibrated:
  """Returns what a rule finds for all units on the calibration batches."""
  units = [unit for place in places.values() for unit in place.units]
  if isinstance(rule, TopNeurons):
    share = lambda unit: 1 - rule.k / places[unit[0]].first.shape[2]
    return Calibrated({}, {}, {unit: share(unit) for unit in units}, lambda seen: switched(seen.x, rule) == 0)
  if isinstance(rule, PerplexityRule):
    if allocation is not None:
      raise ValueError(f'{FUNCTION}: ppl divides the sparsity among the layers itself; leave `allocation` out.')
    limits = _everywhere(places, bounded(used, places, rule, sequential))
    return Calibrated(limits, {}, dict.fromkeys(limits), below(limits))
  return _compared(used, places, rule, allocation, sequential)


def _compared(used: Calls, places: Weights, rule: Rule, allocation: Greedy | None, sequential: bool) -> Calibrated:
  """Returns what a rule finds that compares magnitudes with one number for each matrix."""
  units, make_rest = [unit for place in places.values() for unit in place.units], rule.rest
  dense = not sequential or allocation is not None
  own = scales(used, places, rule) if dense else {}
  found = statistics(used, places, own) if dense else {}
  asked = dict.fromkeys(found if dense else units, rule.sparsity) if allocation is None else shared(
      used, places, rule, own, found, allocation)
  rests = {} if make_rest is None else {
      unit: make_rest(places[unit[0]].stack(unit), asked.get(unit, rule.sparsity)) for unit in units}
  if sequential:
    thresholds = in_order(used, places, functools.partial(_limit, rule, places, asked), rests)[0]
  else:
    thresholds = {unit: rule.thresholds(tau_of(rule, each, asked[unit]), own[unit]) for unit, each in found.items()}
  asked = {unit: rule.level(asked[unit]) for unit in thresholds if unit in asked}
  thresholds = _everywhere(places, thresholds)
  return Calibrated(thresholds, rests, asked, below(thresholds))


def _limit(rule: Rule, places: Weights, asked: dict[Unit, float], unit: Unit, seen: list[Observed]) -> np.ndarray:
  """Returns the thresholds `[L, K]` of one unit from what its products are given in all batches.

  A unit of which no row counts skips nothing, and is dropped from `asked`.
  """
  scale = scale_of(rule, places[unit[0]], unit, [mean_of_up(each) for each in seen] if rule.neurons else [])
  found = [magnitudes_of(each, scale) for each in seen]
  if unit not in asked or not are_counted(found):
    asked.pop(unit, None)
    return np.zeros(scale.shape, np.float32)
  return rule.thresholds(tau_of(rule, found, asked[unit]), scale)


def _everywhere(places: Weights, found: Thresholds) -> dict[Unit, np.ndarray]:
  """Returns thresholds of all units; where no token came, nothing is skipped."""
  none = lambda place: np.zeros((place.first.shape[0], place.first.shape[2]), np.float32)
  return {unit: found[unit] if unit in found else none(place) for place in places.values() for unit in place.units}


def tau_of(rule: Rule, each: list[Any], sparsity: float) -> np.ndarray:
  """Returns the number with which a rule compares scaled magnitudes, `[L]`, from the magnitudes of each batch."""
  level = rule.level(sparsity)
  if rule.each_batch:
    return np.mean([one.quantile(level) for one in each], 0)
  return over_batches(each).quantile(level)


def _rows(apply: Callable[..., Any], params: PyTree, calls: Calls, places: Weights,
          solved: Calibrated, reads: Reads | None) -> tuple[tuple[SkipReport, ...], list[str]]:
  sums, results = tested(calls, places, solved.skips, solved.rests, reads)
  rows, asked = [], solved.asked
  for place in places.values():
    l, n, k = place.first.shape
    for unit in place.units:
      skipped, entries, blocks, error, dense, read, whole = sums.get(unit, [0.0] * 7)
      note = '' if unit in asked and entries else 'no token reached it: skips nothing'
      rows.append(SkipReport(place.path, unit[1], (l, n, k), asked.get(unit), skipped / max(entries, 1),
                             blocks / max(entries, 1), round(entries / k), error / dense if dense else None,
                             read / whole if whole else None, note))
  return tuple(rows), [_apart(apply, params, calls, results)]


def _apart(apply: Callable[..., Any], params: PyTree, calls: Calls, results: list[list[Any]]) -> str:
  """Returns the note on how far the results of the sparse model are from those of the dense model."""
  dense = [[leaf for leaf in jax.tree.leaves(apply(params, *args, **kwargs)) if isinstance(leaf, jax.Array)]
           for args, kwargs in calls.given]
  return f'the results move by {np.sqrt(results_moved(dense, results)):.3g} of their norm'


def _mean_asked(rows: tuple[SkipReport, ...]) -> float | None:
  if any(row.asked is None for row in rows):
    return None
  sizes = [np.prod(row.shape) for row in rows]
  return float(sum(n * (row.asked or 0.0) for n, row in zip(sizes, rows)) / sum(sizes))


def _packed(params: PyTree, places: Weights, limits: Mapping[str, np.ndarray], rests: Mapping[Unit, Rest],
            neurons: bool) -> PyTree:
  """Returns the parameters with `ActiveArray`s: of `up` and `down` where neurons are switched off."""
  paths, leaves, structure = trees.flatten(params)
  held = dict(zip(paths, leaves))
  made: dict[str, Any] = {}
  for path, place in places.items():
    parts = [place.joined({unit: rests[unit][i] for unit in place.units}) if all(unit in rests for unit in place.units)
             else None for i in range(2)]
    left, right = (None if part is None else jnp.asarray(part) for part in parts)
    limit = 0.0 if neurons else limits[path]
    made[path] = formats.ActiveArray.of(place.array, limit, left, right, axes=place.axes)
    if neurons and place.layer is not None and place.layer.up is not None:
      up = place.layer.up_use
      assert up is not None and up.axes is not None
      made[place.layer.up] = formats.ActiveArray.of(held[place.layer.up], axes=up.axes, outputs=True)
  return structure.unflatten([made.get(path, leaf) for path, leaf in zip(paths, leaves)])
