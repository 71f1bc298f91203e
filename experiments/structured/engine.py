"""Trains a dense model, cuts copies of it by structured recipes, and measures both.

A line of the ledger has `method`, `left` (the FLOPs asked, as a fraction), `seed`, `accuracy`, `parameters`, `flops`,
`bytes`, `speed-up` (dense seconds over cut seconds) with `rounds` of interleaved runs, `cpu`, and the `config`.
"""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.structured.subjects import Cuttable, RunSizes
from sparsejax import contractions, io, recipes, structured
from sparsejax.types import Array, PyTree
from sparsejax.units import CONTRACTED

DENSE, ROUNDS = 'dense', 15
TIMED = 256  # inputs of a call whose seconds are measured
METHODS = ('oto', 'group_taylor', 'hap', 'wgsef')


class CutCell(NamedTuple):
  """A `CutCell` is one method at one fraction of the FLOPs, on one seed; `dense` has the fraction 1."""

  method: str
  left: float
  seed: int

  @property
  def place(self) -> str:
    return f'{self.method}/{self.left:g}/seed {self.seed}'


class Trained:
  """A `Trained` is the dense model of one seed after training, with its groups."""

  def __init__(self, own: Cuttable, sizes: RunSizes):
    self.own, self.sizes = own, sizes
    tx = optax.adam(optax.cosine_decay_schedule(sizes.rate, sizes.steps))
    self.variables = own.settled(_trained(own, tx, own.start, 0, sizes.steps))
    self.inputs = jnp.asarray(own.test[0][:sizes.batch])
    self.groups = _apart(structured.groups(own.apply, self.variables, self.inputs))
    self.dense = structured.Cut(self.variables, own.apply, {})

  def measured(self, cell: CutCell) -> dict[str, Any]:
    """Returns the line of a cell: of the dense model, or of a copy that is trained by the method and cut."""
    start = time.process_time()
    small = self.dense if cell.method == DENSE else self._cut(cell)
    taken = time.process_time() - start
    speed = _speed(self.dense, small, jnp.asarray(self.own.test[0][:TIMED])) if cell.method != DENSE else [1.0]
    size = lambda cut: sum(int(w.size) for w in jax.tree.leaves(cut.params))
    return {**cell._asdict(), 'accuracy': self._accuracy(small), 'parameters': size(small), 'bytes': _bytes(small),
            'flops': 2 * contractions(small.apply, small.params, self.inputs[:1]).total_macs,
            'speed-up': float(np.median(speed)), 'rounds': len(speed), 'cpu': taken}

  def _cut(self, cell: CutCell) -> structured.Cut:
    tx = _optimizer(self, cell)
    variables = _trained(self.own, tx, self.variables, self.sizes.steps, self.sizes.tuned)
    keep = structured.kept(self.groups, variables['params'])
    small = structured.cut(self.groups, self.own.settled(variables), keep)
    return structured.Cut(jax.tree.map(jnp.asarray, small.params), small.apply, small.kept)

  def _accuracy(self, cut: structured.Cut) -> float:
    inputs, labels = self.own.test
    run, right, size = jax.jit(cut.apply), [], self.sizes.batch
    for i in range(0, len(labels) - size + 1, size):
      right.append(np.argmax(run(cut.params, inputs[i:i + size]), -1) == labels[i:i + size])
    return float(np.mean(right))


def _apart(groups: structured.Groups) -> structured.Groups:
  """Returns the groups whose units share no produced weight, the largest units first: heads, and not their widths.

  The proximal step of `wgsef` needs this. All methods choose among the same units.
  """
  taken: dict[str, int] = {}
  picked = []
  for name in sorted(groups, key=lambda name: -groups[name].weights):
    own = {member.path: member.axis for member in groups[name].members if member.side != CONTRACTED}
    if all(taken.get(path, axis) == axis for path, axis in own.items()):
      taken |= own
      picked.append(name)
  return groups.only(*picked)


def loss_of(own: Cuttable, variables: PyTree, inputs: Array, labels: Array) -> Array:
  """Returns the mean cross-entropy of one batch."""
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(own.trained(variables, inputs), labels))


def _optimizer(dense: Trained, cell: CutCell) -> Any:
  """Returns the method of a cell around Adam, which prunes in the first half of the updates and then trains on."""
  sizes, asked = dense.sizes, {'budget': structured.flops(cell.left), 'multiple_of': dense.sizes.multiple}
  inner, middle = optax.adam(optax.cosine_decay_schedule(sizes.rate / 3, sizes.tuned)), sizes.tuned // 2
  if cell.method == 'oto':
    return recipes.oto(inner, dense.groups, penalty=1e-2, epsilon=0.995, begin=sizes.tuned // 4, end=middle,
                       **asked)
  if cell.method == 'group_taylor':
    return recipes.group_taylor(inner, dense.groups, begin=1, end=middle, every=max(middle // 8, 1), **asked)
  if cell.method == 'hap':
    x, y = (jnp.asarray(each[-1]) for each in dense.own.batches)
    rest = {name: value for name, value in dense.variables.items() if name != 'params'}
    loss = lambda params: loss_of(dense.own, {**rest, 'params': params}, x, y)
    return recipes.hap(inner, dense.groups, loss=loss, samples=sizes.samples, key=jax.random.key(cell.seed),
                       **asked)
  if cell.method == 'wgsef':
    keep = structured.choose(dense.groups, dense.variables, **asked)
    return recipes.wgsef(inner, dense.groups, int(sum(mask.sum() for mask in keep.values())), sizes.rate / 3,
                         begin=middle, **asked)
  return getattr(recipes, cell.method)(inner, dense.groups, begin=1, **asked)


def _trained(own: Cuttable, tx: Any, variables: PyTree, first: int, steps: int) -> PyTree:
  """Returns the variables after `steps` updates of the parameters, on the batches from `first` on."""
  rest = {name: value for name, value in variables.items() if name != 'params'}

  @functools.partial(jax.jit, donate_argnums=1)
  def step(params: PyTree, state: Any, x: Array, y: Array) -> Any:
    grads = jax.grad(lambda params: loss_of(own, {**rest, 'params': params}, x, y))(params)
    moves, state = tx.update(grads, state, params)
    return optax.apply_updates(params, moves), state

  params, state = variables['params'], tx.init(variables['params'])
  for i in range(first, first + steps):
    params, state = step(params, state, *(each[i] for each in own.batches))
  return {**rest, 'params': params}


def _speed(dense: structured.Cut, small: structured.Cut, inputs: Array) -> list[float]:
  """Returns the ratio of the seconds of both models in each of several rounds, in which both run in turn."""
  runs = [functools.partial(jax.jit(cut.apply), cut.params, inputs) for cut in (dense, small)]
  seconds = [[_seconds(run) for run in runs] for _ in range(ROUNDS + 1)][1:]  # the first call compiles
  return [a / b for a, b in seconds]


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def _bytes(cut: structured.Cut) -> int:
  """Returns the bytes of the file that holds a model."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model.safetensors'
    if cut.kept:
      structured.save(path, cut)
    else:
      io.save(path, cut.params)
    return path.stat().st_size


def facts_of(sizes: RunSizes, table: str, data_dir: str | None) -> Mapping[str, Any]:
  """Returns what has to be the same for a finished line to count."""
  return {'table': table, 'data': 'given' if data_dir else 'embedded', **sizes._asdict()}
