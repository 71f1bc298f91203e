"""Trains what takes the place of dense layers on the digits: wider and sparser layers (Sparse-IFT), and gates (FTWT).

    line = wide(Replacements(), seed=0)           # accuracy and multiply-adds of dense, and of wide networks
    line = gated(Replacements(), seed=0)          # of dense, and of a network that computes few filters of each image

Both count the multiply-adds of one image. Sizes are fixed before a run.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax
from experiments.data import digits as source
from sparsejax import allocation, gates, recipes, trees
from sparsejax.structured import iso_flop
from sparsejax.types import Array, PyTree

SPARSITIES = (0.5, 0.75)  # of the wide networks


class Replacements(NamedTuple):
  """A `Replacements` holds what is fixed before a run. `mass`: the share of a layer's response that stays computed."""

  batch: int = 64
  steps: int = 600
  rate: float = 3e-3
  width: int = 16
  mass: float = 0.9


class DigitSplit(NamedTuple):
  """A `DigitSplit` holds images, `float32[n, 8, 8, 1]`, and labels; every fifth image is for the test."""

  images: Array
  labels: Array
  tests: Array
  truth: Array


@functools.cache
def digits() -> DigitSplit:
  """Returns the digits of scikit-learn, with values from 0 to 1."""
  (images, labels), (tests, truth) = map(source.every_fifth().get, ('train', 'test'))
  return DigitSplit(*map(jnp.asarray, (images[..., None], labels, tests[..., None], truth)))


def after_training(loss: Callable[[PyTree, Array, Array], Array], params: PyTree, tx: Any, sizes: Replacements,
                   seed: int) -> PyTree:
  """Returns the parameters after `sizes.steps` updates, on batches that are drawn with the seed."""
  data = digits()
  rows = jax.random.randint(jax.random.key(seed), (sizes.steps, sizes.batch), 0, len(data.labels))

  @jax.jit
  def step(params: PyTree, state: Any, own: Array) -> Any:
    moves, state = tx.update(jax.grad(loss)(params, data.images[own], data.labels[own]), state, params)
    return optax.apply_updates(params, moves), state

  state = tx.init(params)
  for own in rows:  # XLA runs the convolutions of a `scan` many times slower on a CPU.
    params, state = step(params, state, own)
  return params


def wide(sizes: Replacements, seed: int) -> dict[str, Any]:
  """Returns a perceptron and its Sparse Wide replacements, trained by RigL at equal multiply-adds by count."""
  larger = {f'wide for {100 * s:.0f} % zeros': iso_flop.wide_width(sizes.width, s) for s in SPARSITIES}
  shapes = {name: _perceptron(width) for name, width in {'dense': sizes.width, **larger}.items()}
  count = lambda params: sparsejax.contractions(_apply, params, digits().images[:1])
  line: dict[str, Any] = {}
  for name, shape in shapes.items():
    start, inner = _started(shape, seed), _adam(sizes)
    own, dense = count(start), count(shapes['dense'])
    asked = {} if name == 'dense' else iso_flop.equal_flops(dense, own)
    tx = inner if not asked else recipes.rigl(
      inner, allocation=allocation.custom(asked), every=max(sizes.steps // 30, 1), total_steps=sizes.steps,
      key=jax.random.key(seed), where=trees.named(*asked), axes=own)
    params = after_training(lambda p, x, y: _entropy(_apply(p, x), y), start, tx, sizes, seed)
    left = {path: float(np.mean(np.asarray(w) != 0)) for path, w in params.items()}
    line[name] = {'accuracy': _accuracy(_apply(params, digits().tests)),
                  'multiply-adds': sum(macs * left[path] for path, macs in own.macs.items())}
  return line


def gated(sizes: Replacements, seed: int) -> dict[str, Any]:
  """Returns a network of two convolutions, and one whose gates foresee which filters an image needs (FTWT).

  Gates are trained beside the layers: the input of a gate is detached, as in the decoupled form of the paper. The
  multiply-adds of an image are those of open filters, of their open inputs, and of the gates.
  """
  shapes = {'first': (3, 3, 1, 2 * sizes.width), 'second': (3, 3, 2 * sizes.width, 4 * sizes.width),
            'head': (4 * sizes.width, 10)}
  plain = lambda p, x: _convolved(p, x)[0]
  dense = after_training(lambda p, x, y: _entropy(plain(p, x), y), _started(shapes, seed), _adam(sizes), sizes, seed)
  keys = jax.random.split(jax.random.key(seed + 1))
  both = {**_started(shapes, seed), 'gates': [gates.gate_of(key, *shapes[name][2:]) for key, name in zip(keys, (
    'first', 'second'))]}

  def loss(p: PyTree, x: Array, y: Array) -> Array:
    found, seen = _convolved(p, x)
    foreseen = [gates.foresight(logits, gates.mass(gates.response(h), sizes.mass)) for logits, h in seen]
    return _entropy(found, y) + sum(foreseen) / len(foreseen)

  params = after_training(loss, both, _adam(sizes), sizes, seed)
  found, seen = _convolved(params, digits().tests)
  macs = lambda path: sparsejax.contractions(plain, dense, digits().images[:1]).macs[path]
  first, second = (jnp.mean(logits > 0, -1) for logits, _ in seen)
  active = macs('first') * first + macs('second') * first * second + macs('head') * second
  of_gates = sum(int(gate['kernel'].size) for gate in params['gates'])
  name = f'gates, {100 * sizes.mass:.0f} % of the response'
  return {'dense': {'accuracy': _accuracy(plain(dense, digits().tests)), 'multiply-adds': sum(map(macs, shapes))},
          name: {'accuracy': _accuracy(found), 'multiply-adds': float(jnp.mean(active)) + of_gates}}


def _perceptron(width: int) -> dict[str, jax.ShapeDtypeStruct]:
  sizes = (64, width, width, 10)
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32)
          for name, shape in zip(('first', 'second', 'third'), zip(sizes, sizes[1:]))}


def _apply(params: Mapping[str, Array], x: Array) -> Array:
  h = x.reshape(len(x), -1)
  for name in ('first', 'second'):
    h = jax.nn.relu(h @ params[name])
  return h @ params['third']


def _convolved(params: Mapping[str, Any], x: Array) -> tuple[Array, list[tuple[Array, Array]]]:
  """Returns logits of the classes, and for each gate its logits with what the whole layer would give."""
  seen = []
  for i, name in enumerate(('first', 'second')):
    h = jax.nn.relu(jax.lax.conv_general_dilated(x, params[name], (1, 1), 'SAME', dimension_numbers=(
      'NHWC', 'HWIO', 'NHWC')))
    if 'gates' in params:
      logits = gates.foreseen(params['gates'][i], jax.lax.stop_gradient(x))
      seen.append((logits, jax.lax.stop_gradient(h)))
      h = h * gates.straight_open(logits)[:, None, None]
    x = h
  return jnp.mean(x, (1, 2)) @ params['head'], seen


def _started(shapes: Mapping[str, Any], seed: int) -> dict[str, Array]:
  """Returns normal weights of the scale of He et al. 2015."""
  shape_of = {name: getattr(shape, 'shape', shape) for name, shape in shapes.items()}
  keys = jax.random.split(jax.random.key(seed), len(shape_of))
  return {name: jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:-1]))
          for key, (name, shape) in zip(keys, shape_of.items())}


def _adam(sizes: Replacements) -> Any:
  return optax.adam(optax.cosine_decay_schedule(sizes.rate, sizes.steps))


def _entropy(found: Array, labels: Array) -> Array:
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, labels))


def _accuracy(found: Array) -> float:
  return float(jnp.mean(jnp.argmax(found, -1) == digits().truth))
