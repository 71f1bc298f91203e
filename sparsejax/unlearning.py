"""Removes the influence of some training examples from a trained sparse model, without training the model anew.

    retained, forgotten = unlearning.parted(len(labels), forget)
    tx = recipes.l1_sparse(optax.sgd(0.01, 0.9), 0.95, ticket=params, total_steps=1000)      # on retained examples
    reference = recipes.iterative_magnitude(optax.sgd(0.1), 0.95, ticket=params)      # retrained, under the same mask
    unlearning.gap(scores, scores_of_the_reference)

Sparse models are compared with a retraining under the same mask (Jia et al. 2023, 2304.04934). Pruned weights stay zero
under every function here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, errors, labelled, trees
from sparsejax.argument_kinds import ARRAY, BY_NAME, DRAWN, PARAMS, POSITIVE, RATE, SERIES, TIMES
from sparsejax.arguments import checked
from sparsejax.types import Array, PyTree

__all__ = ['Parted', 'fisher', 'gap', 'membership', 'modified_entropy', 'noised', 'parted', 'woodfisher']

arguments.declare('parted', examples=TIMES, forget=SERIES)
arguments.declare('noised', information=PARAMS, key=DRAWN, alpha=RATE, most=POSITIVE)
arguments.declare('woodfisher', examples=PARAMS, direction=PARAMS, damping=POSITIVE)
arguments.declare('membership', inside=ARRAY, outside=ARRAY, asked=ARRAY)
arguments.declare('modified_entropy', probabilities=ARRAY, labels=ARRAY)
arguments.declare('gap', scores=BY_NAME, reference=BY_NAME)


class Parted(NamedTuple):
  """A `Parted` holds the numbers of the examples that a model may keep, and of those that the model must forget."""

  retained: np.ndarray
  forgotten: np.ndarray


@checked
def parted(examples: int, forget: Iterable[int]) -> Parted:
  """Returns the numbers of the other examples, in order, and those of `forget`, in order.

  Raises `ValueError` for a number that is no example or stands twice, for nothing to forget, and where nothing would be
  left: a model that must forget everything is a fresh one.
  """
  asked = np.sort(np.asarray(list(forget)))
  if not asked.size or asked.dtype.kind not in 'iu' or asked[0] < 0 or asked[-1] >= examples or (
      len(np.unique(asked)) < len(asked)):
    raise ValueError(f'unlearning.parted: `forget` must hold different numbers from 0 to {examples - 1}, at least one; '
                     'it has ' + (f'{len(asked)}, from {asked[0]} to {asked[-1]}.' if asked.size else 'none.'))
  if len(asked) == examples:
    raise ValueError(f'unlearning.parted: all {examples} examples are to be forgotten, so that nothing is left to '
                     'retain; initialise the model anew instead.')
  return Parted(np.setdiff1d(np.arange(examples), asked), asked)


@checked
def fisher(apply: Callable[[PyTree, Array], Array], params: PyTree, batches: Iterable[Array]) -> PyTree:
  """Returns the diagonal Fisher information of a classifier, `float32` like `params`, the mean over batches.

  A batch gives the sum over classes y of mean p(y) times the squared gradient of the mean cross-entropy to y. As in the
  authors' code (`fisher_new`), a mean over examples is squared, and not the mean of squares taken. `apply(params, x)`
  returns logits `[batch, classes]`; `batches` holds inputs `x`. Raises `ValueError` without batches.
  """
  batches = list(batches)
  if not all(map(len, batches)) or not batches:
    raise ValueError('unlearning.fisher: no batches, or an empty one; give the inputs of the retained examples.')
  of_batch = jax.jit(lambda params, x: _fisher(lambda params: apply(params, x), params))
  found = [of_batch(params, x) for x in batches]
  return jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)


def _fisher(logits: Callable[[PyTree], Array], params: PyTree) -> PyTree:
  logs, pull = jax.vjp(lambda params: jnp.mean(jax.nn.log_softmax(logits(params)), 0), params)
  weights = jnp.mean(jax.nn.softmax(logits(params)), 0)
  grads = jax.vmap(lambda direction: pull(direction)[0])(jnp.eye(len(weights), dtype=logs.dtype))
  return jax.tree.map(lambda g: jnp.tensordot(weights.astype(jnp.float32), jnp.square(g.astype(jnp.float32)), 1), grads)


@checked
def noised(params: PyTree, information: PyTree, key: Array, alpha: float, most: float = 1e3) -> PyTree:
  """Returns the parameters with Gaussian noise of variance `alpha min(1 / (F + 1e-8), most)` (Golatkar et al. 2020).

  `information`: F, from `fisher`. A weight that is exactly zero stays zero. The authors' code of sparse unlearning
  also averages the variance over the inputs. In the last layer it caps the variance at 100, and takes it tenfold
  there and for vectors. This function has one rule for every parameter. Raises `ValueError` for the information of
  another model.
  """
  paths, leaves, treedef = trees.flatten(params)
  keys = jax.random.split(key, len(leaves))

  def move(path: str, w: Array, f: Array, key: Array) -> Array:
    if f.shape != w.shape:
      raise errors.at_leaf('unlearning.noised', path, w.shape, f'`information` has shape {f.shape} there; give what '
                           'fisher returns for these parameters.')
    deviation = jnp.sqrt(alpha * jnp.minimum(1 / (f + 1e-8), most))
    noise = deviation * jax.random.normal(key, w.shape, jnp.float32)
    return jnp.where(w == 0, w, w + noise.astype(w.dtype))

  return treedef.unflatten(map(move, paths, leaves, treedef.flatten_up_to(information), keys))


@checked
def woodfisher(loss: Callable[[PyTree, PyTree], Array], params: PyTree, examples: PyTree, direction: PyTree,
               damping: float = 1000.0) -> PyTree:
  """Returns an estimate of the inverse Fisher information times `direction`, like `params` (Singh and Alistarh 2020).

  Influence unlearning adds a multiple of the result to the weights. Its `direction` is the gradient of the examples
  to forget, weighted against that of the others. `loss(params, example)` is the loss of one example, and `examples` a
  pytree of arrays `[n, ...]`. The recursion is that of the unlearning code: k starts at `direction` and o at the first
  gradient; each gradient g takes (k.g) / (N + o.g) o from k and (o.g) / (N + o.g) o from o, with N = `damping`. Entries
  of weights that are exactly zero are zero, and count in no product.
  """
  if not all(map(len, jax.tree.leaves(examples))):
    raise ValueError('unlearning.woodfisher: there are no examples; give those that the model may keep.')
  kept = jax.tree.map(lambda w: w != 0, params)
  masked = lambda tree: jax.tree.map(lambda m, x: jnp.where(m, x.astype(jnp.float32), 0), kept, tree)
  grad = lambda example: masked(jax.grad(loss)(params, example))
  less = lambda x, factor, o: jax.tree.map(lambda a, b: a - factor * b, x, o)

  def take(carry: tuple[PyTree, PyTree], example: PyTree) -> tuple[tuple[PyTree, PyTree], None]:
    k, o = carry
    g = grad(example)
    along, own = _dot(k, g), _dot(o, g)
    return (less(k, along / (damping + own), o), less(o, own / (damping + own), o)), None

  first = grad(jax.tree.map(lambda x: x[0], examples))
  return jax.lax.scan(take, (masked(direction), first), examples)[0][0]


def _dot(a: PyTree, b: PyTree) -> Array:
  return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b))))


@checked
def modified_entropy(probabilities: Array, labels: Array) -> Array:
  """Returns `-(1 - p_y) log p_y - sum_{j != y} p_j log(1 - p_j)` of each example (Song and Mittal 2021, 2003.10595).

  `probabilities`: `[n, classes]`. Small where the model is sure and right, as on its own training data. The code of
  sparse unlearning takes log p where log(1 - p) is meant. Probabilities are clipped at 1e-12. Raises `ValueError` for
  logits, and for labels of other examples or of no class.
  """
  labelled.refuse_predictions('unlearning.modified_entropy', probabilities, labels)
  log = lambda p: jnp.log(jnp.maximum(p, 1e-12))
  right = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=bool)
  own, other = -(1 - probabilities) * log(probabilities), -probabilities * log(1 - probabilities)
  return jnp.sum(jnp.where(right, own, other), -1)


@checked
def membership(inside: Array, outside: Array, asked: Array) -> Array:
  """Returns the fraction of `asked` that an attack takes for data outside of the training set, `float32[]`.

  All three are confidences `[n]`: of training examples, of unseen examples, and of the examples to forget. The attack
  is the threshold that best tells `inside` from `outside`, with both classes weighted equally (Yeom et al. 2018); of
  equal thresholds the lowest. The paper fits a support vector machine with a Gaussian kernel to the same confidences.
  Raises `ValueError` for arrays that are empty or no vectors.
  """
  if any(x.ndim != 1 or not x.size for x in (inside, outside, asked)):
    raise ValueError(f'unlearning.membership: confidences of shapes {inside.shape}, {outside.shape} and {asked.shape}; '
                     'give one number for each example, at least one of each.')
  thresholds = jnp.sort(jnp.concatenate([inside, outside]))
  above = lambda x: 1 - jnp.searchsorted(jnp.sort(x), thresholds) / x.size
  best = thresholds[jnp.argmax(above(inside) - above(outside))]
  return jnp.mean(asked < best, dtype=jnp.float32)


@checked
def gap(scores: Mapping[str, float], reference: Mapping[str, float]) -> float:
  """Returns the mean of `|score - reference|` over the metrics of both, such as accuracies and membership.

  Raises `ValueError` for other metrics on one side.
  """
  if set(scores) != set(reference) or not scores:
    raise ValueError(f'unlearning.gap: {sorted(scores)} against {sorted(reference)}; give the same metrics of both, at '
                     'least one.')
  return float(np.mean([abs(float(scores[name]) - float(reference[name])) for name in scores]))
