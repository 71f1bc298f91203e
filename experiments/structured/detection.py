"""Prunes a detector by the scales of its norms and distils it channel by channel, on canvases with pasted digits.

    line = detected(Canvases(), seed=0)          # average precision of dense, fine-tuned and distilled

The detector is first trained with l1 on the scales, which is called sparse training. Units of small scale then go, and
what is left is trained on, with or without the dense detector as a teacher.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import digits
from experiments.models import detector
from sparsejax import calibration, losses, recipes, structured
from sparsejax.types import Array, PyTree

SIDE, CELL, DIGIT = 32, 4, 8  # pixels of a canvas, of a cell of the grid, and of a digit
LARGEST = 4  # cells of the largest digit, the unit of predicted sizes


class Canvases(NamedTuple):
  """A `Canvases` holds what is fixed before a run, such as the updates of each of the three trainings."""

  batch: int = 16
  steps: int = 200
  rate: float = 5e-3
  width: int = 8
  sparsity: float = 0.5
  penalty: float = 1e-3
  temperature: float = 2.0
  tests: int = 128


class Boxes(NamedTuple):
  """A `Boxes` holds one batch: images, and for each cell of the grid whether a digit has its centre there, and which.

  `images`: `float32[B, 32, 32, 1]`. `there`: `float32[B, 8, 8]`. `box`: `float32[B, 8, 8, 4]`, centre within the cell,
  and size over that of the largest digit. `label`: `int32[B, 8, 8]`.
  """

  images: Array
  there: Array
  box: Array
  label: Array


def canvases(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, count: int) -> Boxes:
  """Returns canvases with one to three digits each, at any place and of one or two times their size."""
  grid = SIDE // CELL
  images = rng.normal(0, 0.1, (count, SIDE, SIDE, 1)).astype(np.float32)
  there, box = np.zeros((count, grid, grid), np.float32), np.zeros((count, grid, grid, 4), np.float32)
  label = np.zeros((count, grid, grid), np.int32)
  for i in range(count):
    for _ in range(rng.integers(1, 4)):
      times, which = int(rng.integers(1, 3)), int(rng.integers(len(digits)))
      size = DIGIT * times
      y, x = rng.integers(0, SIDE - size + 1, 2)
      cy, cx = (y + size / 2) / CELL, (x + size / 2) / CELL
      row, column = min(int(cy), grid - 1), min(int(cx), grid - 1)
      if there[i, max(row - 2, 0):row + 3, max(column - 2, 0):column + 3].any():
        continue
      images[i, y:y + size, x:x + size, 0] += np.kron(digits[which], np.ones((times, times)))
      there[i, row, column], label[i, row, column] = 1, labels[which]
      box[i, row, column] = cy - row, cx - column, size / CELL / LARGEST, size / CELL / LARGEST
  return Boxes(*map(jnp.asarray, (images, there, box, label)))


def loss_of(found: Array, asked: Boxes) -> Array:
  """Returns the loss of predictions: cross-entropy of presence and class, and l1 of the box where a digit is."""
  presence = jnp.sum(optax.sigmoid_binary_cross_entropy(found[..., 0], asked.there))
  classes = optax.softmax_cross_entropy_with_integer_labels(found[..., 5:], asked.label)
  boxes = jnp.sum(jnp.abs(found[..., 1:5] - asked.box), -1)
  return (presence + jnp.sum(asked.there * (classes + boxes))) / len(found)


def average_precision(found: np.ndarray, asked: Boxes, overlap: float = 0.5) -> float:
  """Returns AP at this overlap: boxes of the right class that match one digit each count, all classes together.

  Of boxes of one image that overlap by more than `overlap`, the most certain stays.
  """
  hits: list[tuple[float, bool]] = []
  for i, each in enumerate(found):
    truth = _boxes(np.argwhere(np.asarray(asked.there[i]) > 0), np.asarray(asked.box[i]))
    names = [int(asked.label[i][row, column]) for row, column in np.argwhere(np.asarray(asked.there[i]) > 0)]
    score = 1 / (1 + np.exp(-each[..., 0]))
    cells = np.argwhere(score > 0.02)
    cells = cells[np.argsort([-score[row, column] for row, column in cells], kind='stable')]
    boxes, taken, kept = _boxes(cells, each[..., 1:5]), set(), []
    for (row, column), box in zip(cells, boxes):
      if any(_overlap(box, other) > overlap for other in kept):
        continue
      kept.append(box)
      name = int(np.argmax(each[row, column, 5:]))
      match = [j for j, own in enumerate(truth)
               if j not in taken and names[j] == name and _overlap(box, own) >= overlap]
      taken.update(match[:1])
      hits.append((float(score[row, column]), bool(match)))
  hits.sort(key=lambda hit: -hit[0])
  right = np.cumsum([hit for _, hit in hits]) if hits else np.zeros(1)
  precision = right / np.arange(1, len(right) + 1)
  best = np.maximum.accumulate(precision[::-1])[::-1]
  gained = np.diff(np.concatenate([[0], right])) > 0
  return float(np.sum(best[gained]) / max(float(np.sum(asked.there)), 1))


def _boxes(cells: np.ndarray, box: np.ndarray) -> list[np.ndarray]:
  """Returns the lower and the upper corner of each box, in cells."""
  made = []
  for row, column in cells:
    middle, size = box[row, column, :2] + (row, column), np.maximum(box[row, column, 2:] * LARGEST, 0.1)
    made.append(np.concatenate([middle - size / 2, middle + size / 2]))
  return made


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
  inside = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
  area = lambda c: np.prod(c[2:] - c[:2])
  return float(inside / max(area(a) + area(b) - inside, 1e-9))


def detected(sizes: Canvases, seed: int) -> dict[str, Any]:
  """Returns average precision and parameters of the dense detector, and of the cut one with and without a teacher."""
  rng, split = np.random.default_rng(seed), digits.every_fifth()
  draw = lambda name, count: canvases(rng, *split[name], count)
  train, test = [draw('train', sizes.batch) for _ in range(64)], draw('test', sizes.tests)
  model = detector.Detector(width=sizes.width)
  start = flax.core.unfreeze(model.init(jax.random.key(seed), test.images[:2]))
  groups = structured.groups(model.apply, start, test.images[:2])
  run = functools.partial(_run, model, start['batch_stats'], train)
  adam = lambda: optax.adam(optax.constant_schedule(sizes.rate))
  dense, _ = run(adam(), start['params'], None, 0, sizes.steps)
  tx = recipes.norm_scale(adam(), groups, sizes.sparsity, scales='*_norm/scale', penalty=sizes.penalty,
                          begin=sizes.steps)
  sparse, state = run(tx, dense, None, sizes.steps, sizes.steps + 1)

  def teach(found: Array, images: Array) -> Array:
    return 0.1 * losses.channelwise(found, _predicted(model, start['batch_stats'], dense, images), sizes.temperature)

  line = {'dense': _judged(model, start, train, dense, test)}
  for name, extra in (('fine-tuned', None), ('distilled', teach)):
    params, _ = run(tx, sparse, state, 2 * sizes.steps, sizes.steps, extra)
    line[name] = _judged(model, start, train, params, test, groups)
  return line


def _predicted(model: Any, stats: PyTree, params: PyTree, images: Array) -> Array:
  return model.apply({'params': params, 'batch_stats': stats}, images, train=True, mutable=['batch_stats'])[0]


def _run(model: Any, stats: PyTree, train: Sequence[Boxes], tx: Any, params: PyTree, state: Any, first: int, steps: int,
         extra: Any = None) -> tuple[PyTree, Any]:
  """Returns parameters and state after `steps` updates; `extra(found, images)` is one more term of the loss."""
  def loss(params: PyTree, batch: Boxes) -> Array:
    found = _predicted(model, stats, params, batch.images)
    return loss_of(found, batch) + (0 if extra is None else extra(found, batch.images))

  @jax.jit
  def step(params: PyTree, state: Any, batch: Boxes) -> Any:
    moves, state = tx.update(jax.grad(loss)(params, batch), state, params)
    return optax.apply_updates(params, moves), state

  state = tx.init(params) if state is None else state
  for i in range(first, first + steps):
    params, state = step(params, state, train[i % len(train)])
  return params, state


def _judged(model: Any, start: PyTree, train: Sequence[Boxes], params: PyTree, test: Boxes,
            groups: structured.Groups | None = None) -> Mapping[str, float]:
  """Returns AP and the number of parameters of a detector, which is cut first if there are groups."""
  def update(stats: PyTree, images: Array) -> PyTree:
    return model.apply({'params': params, 'batch_stats': stats}, images, train=True, mutable=['batch_stats'])[1][
        'batch_stats']

  stats = calibration.recalibrated(update, start['batch_stats'], [batch.images for batch in train[:8]])
  variables, apply = {'params': params, 'batch_stats': stats}, model.apply
  if groups is not None:
    small = structured.cut(groups, variables, structured.kept(groups, params))
    variables, apply = small.params, small.apply
  found = np.asarray(jax.jit(apply)(variables, test.images))
  return {'AP50': average_precision(found, test),
          'parameters': sum(int(w.size) for w in jax.tree.leaves(variables['params']))}
