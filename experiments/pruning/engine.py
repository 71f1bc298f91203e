"""Prunes a subject by each recipe at each pattern, judges the result, and keeps one line for each cell.

A line of the ledger has these keys:

- `recipe`, `pattern`, `seed`; `status`: `done` or `refused`; `reason`; `environment`; `facts`, those of the subject.
- `achieved`, the sparsity; `rows`, the least number of calibration rows of a matrix; `damping raised`, how many times.
- `before` and `after`: the mean over the matrices of the relative squared error on the calibration rows.
- `scores`: a number for each held-out example, by name. `cpu` and `wall`: the seconds that pruning took.
- `config`: the facts that have to be the same for the line to count.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import sparsejax
from experiments.loop import outcomes, training
from experiments.loop.stopping import StopRequest
from experiments.pruning import quantised
from experiments.pruning.subjects import Subject
from experiments.sweep.ledger import Ledger, Line
from sparsejax import allocation, formats, patterns, recipes, sensitivities
from sparsejax.post_training import Recipe

DENSE = 'dense'
OWN = 'own'  # the pattern of a form, which says its pattern itself
ONE_SHOT = 'global magnitude'  # the weights of all matrices ranked together; one batch measures the errors
SWEEP = ('0.1', '0.2', '0.3', '0.4', '0.5', '0.6', '0.7', '0.8', '0.9')  # sparsities of ONE_SHOT
# Iterations of the recipes that iterate, far fewer than their defaults: a cell takes minutes, and not hours.
ITERATIONS = {'net_trim': 100, 'armor': quantised.ITERATIONS}
PATTERNS = ('0.5', '0.6', '0.7', '2:4')
DIGITS = 5  # of the scores that a line keeps


class Cell(NamedTuple):
  """A `Cell` is one recipe at one pattern, on the data that one seed draws; the recipe `dense` prunes nothing."""

  recipe: str
  pattern: str
  seed: int

  @property
  def place(self) -> str:
    return '/'.join([self.recipe, *[self.pattern] * bool(self.pattern), f'seed {self.seed}'])


def cells(names: Sequence[str], asked: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
  """Returns the cells in their order: for each seed the dense model, then all recipes pattern by pattern."""
  return [Cell(*words, seed) for seed in seeds
          for words in [(DENSE, ''), *((name, pattern) for pattern in asked for name in names)]]


class Bench:
  """A `Bench` makes the subject of a seed when a cell needs it first, and keeps what its cells share.

  `make(seed)` returns the subject. `tell(text)` is told the progress.
  """

  def __init__(self, make: Callable[[int], Subject], request: StopRequest, tell: Callable[[str], None]):
    self._make, self._request, self._tell = make, request, tell
    self._seed: int | None = None

  def subject(self, seed: int) -> Subject:
    if seed != self._seed:
      self._seed, self._subject, self._sensitivity, self._forms = seed, self._make(seed), None, None
    return self._subject

  def sensitivity(self, seed: int) -> Mapping[str, float]:
    """Returns the sensitivities that `ecoflap` shares the sparsity out by, of the first calibration batch."""
    own = self.subject(seed)
    if self._sensitivity is None:
      self._tell('sensitivities')
      self._sensitivity = sensitivities.zeroth_order(own.loss, own.params, own.batches[:1], jax.random.key(seed),
                                                     where=own.where)
    return self._sensitivity

  def forms(self, seed: int) -> quantised.Forms:
    """Returns what the quantised forms of a subject share."""
    own = self.subject(seed)
    self._forms = self._forms or quantised.Forms(own)
    return self._forms

  def progress(self, cell: Cell) -> Callable[[str], None]:
    """Returns the function that `prune` tells each finished matrix, and that stops where a signal asks for it."""
    def told(text: str) -> None:
      self._tell(f'{cell.place}: {text}')
      if self._request.received:
        raise training.Stopped(cell.place, self._request)
    return told


def cell_lines(bench: Bench, ledger: Ledger, workdir: Any, todo: Sequence[Cell], facts: Mapping[str, Any]
               ) -> Iterator[tuple[Line, bool]]:
  """Yields the line of each cell, and whether the cell ran now. Finished cells make no subject.

  `facts` are what the caller knows without a subject; a cell that was finished under others is refused.
  """
  for cell in todo:
    line = ledger.get(cell.place, {**facts, 'seed': cell.seed})
    ran = line is None
    if line is None:
      folder = workdir / 'matrices' / cell.place.replace('/', ' ')
      line = ledger.add(cell.place, {**_ran(bench, cell, folder), 'config': {**facts, 'seed': cell.seed}})
      shutil.rmtree(folder, ignore_errors=True)
    yield line, ran


def _ran(bench: Bench, cell: Cell, folder: Any) -> dict[str, Any]:
  own, line = bench.subject(cell.seed), {**cell._asdict(), 'environment': outcomes.environment()}
  began, worked = time.monotonic(), time.process_time()
  params, found = own.params, {}
  if cell.pattern == OWN:
    made = quantised.FORMS[cell.recipe](bench.forms(cell.seed))
    params = quantised.dense_of(made)
    found = {'bits': quantised.bits_of(made, own), 'file': quantised.file_share(made, own)}
  elif cell.recipe != DENSE:
    try:
      part = slice(1 if cell.recipe == ONE_SHOT else None)
      made = sparsejax.prune(own.apply, own.params, own.batches[part], recipe_of(cell, bench), where=own.where,
                             valid=own.valid and own.valid[part], workdir=folder, progress=bench.progress(cell))
    except ValueError as error:
      return {**line, 'status': 'refused', 'reason': ' '.join(str(error).split())}
    params, rows = formats.unpack(made.params), made.report.rows  # `armor` returns packed leaves
    mean = lambda name: float(np.mean([getattr(row, name) for row in rows]))
    found = {'achieved': made.report.achieved, 'rows': min(row.rows for row in rows), 'before': mean('before'),
             'after': mean('after'), 'damping raised': sum(row.raised for row in rows)}
  seconds = {'wall': time.monotonic() - began, 'cpu': time.process_time() - worked}
  scores = {name: np.round(values, DIGITS).tolist() for name, values in own.scored(params).items()}
  return {**line, 'status': 'done', 'reason': None, **found, **seconds, 'scores': scores, 'facts': dict(own.facts)}


def recipe_of(cell: Cell, bench: Bench) -> Recipe:
  """Returns the recipe of a cell. A sparsity leaves a recipe its own pattern, N:M is a pattern of its own."""
  if cell.recipe == ONE_SHOT:
    return recipes.magnitude(float(cell.pattern), allocation=allocation.global_())
  own = recipes.POST_TRAINING[cell.recipe]
  given = {'pattern': patterns.parse(cell.pattern)} if ':' in cell.pattern else {'sparsity': float(cell.pattern)}
  if cell.recipe == 'ecoflap':
    return own(bench.sensitivity(cell.seed), groups=bench.subject(cell.seed).groups, **given)
  if cell.recipe in ITERATIONS:
    given['iterations'] = ITERATIONS[cell.recipe]
  return own(**given)
