"""A start says how the first masks are chosen, where they are more than the pattern over a score of the weights.

A start is `start(choose, place, masks, key) -> masks`, over all sparse leaves at once, inside of `init`. `place(masks)`
returns the whole parameter pytree at the point that the masks give. `choose(masks, probe=None, step=0, key=None)` runs
the selection, with a leaf of `probe`, a pytree like the parameters, as the `signals.grad` of scores. `choose(masks,
given=tree)` runs no selection, and returns the masks in `tree`. A probe is any
function `params -> pytree like params`; the probes of the literature are defined here.

    start = starts.probed(starts.gradient(loss))             # SNIP's
    tx = sj.recipes.snip(optax.sgd(0.1), 0.9, loss=starts.given('loss'))
    state = tx.init(params, loss=lambda params: ...)         # one optimizer, another loss for each `init`
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments, errors, trees
from sparsejax.arguments import checked
from sparsejax.programs.arrangements import arrangement_of
from sparsejax.programs.operands import operands
from sparsejax.types import Array, Bound, PyTree, Start

__all__ = [
  'Given', 'best_of', 'correlation', 'fill', 'given', 'gradient', 'hessian_gradient', 'hutchinson', 'masks', 'names',
  'of', 'probed',  'synaptic_flow',
]

Probe = Callable[[PyTree], PyTree]
Loss = Callable[[PyTree], Array]


@dataclasses.dataclass(frozen=True)
class Given:
  """A `Given` is a placeholder for a value that `init` is given by its name: `tx.init(params, loss=..., key=...)`."""

  name: str

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(f'starts.given({self.name!r}): the placeholder is called before `init` filled it. A start of your '
                     'own has to hold it where it can be filled: in the arguments of a types.Bound.')


@checked
def given(name: str) -> Any:
  """Returns a placeholder for `loss`, `outputs`, `ticket` or `key`, which `tx.init(params, name=value)` fills."""
  return Given(name)


def names(word: Any) -> frozenset[str]:
  """Returns the names of the placeholders in `word`: a placeholder, or a `Bound` or partial that holds placeholders."""
  return frozenset([word.name]) if isinstance(word, Given) else frozenset().union(*map(names, _parts(word)))


def fill(word: Any, values: Mapping[str, Any]) -> Any:
  """Returns `word` with every placeholder replaced by its value."""
  if isinstance(word, Given):
    return values[word.name]
  if not names(word):
    return word
  if isinstance(word, Bound):
    return dataclasses.replace(word, arguments=tuple(fill(part, values) for part in word.arguments))
  return functools.partial(fill(word.func, values), *(fill(part, values) for part in word.args),
                           **{key: fill(part, values) for key, part in word.keywords.items()})


def _parts(word: Any) -> tuple[Any, ...]:
  if isinstance(word, functools.partial):
    return (word.func, *word.args, *word.keywords.values())
  return word.arguments if isinstance(word, Bound) else ()


@checked
def probed(probe: Probe, rounds: int = 1) -> Start:
  """Returns a start that chooses masks `rounds` times by scores of `probe`, each time at the point of the masks before.

  The selection sees the number of the round, 1 to `rounds`, as the step.
  """
  return Bound(_probed, (probe, rounds))


def _probed(choose: Any, place: Any, masks: Any, key: Array | None, probe: Probe, rounds: int) -> Any:
  once = lambda round, masks: choose(masks, probe(place(masks)), round, key)
  return once(rounds, jax.lax.fori_loop(1, rounds, once, masks) if rounds > 1 else masks)


@checked
def best_of(loss: Loss, candidates: int) -> Start:
  """Returns a start that keeps the random mask with the lowest `loss(params)` out of `candidates`.

  The first of equal masks is kept, and a mask with a NaN as its loss is no candidate.
  """
  return Bound(_best_of, (loss, candidates))


def _best_of(choose: Any, place: Any, masks: Any, key: Array, loss: Loss, candidates: int) -> Any:
  keys = jax.random.split(key, candidates)
  losses = jax.lax.map(lambda key: called(loss, place(choose(masks, key=key))), keys)
  return choose(masks, key=keys[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))])


@checked
def masks(tree: PyTree) -> Start:
  """Returns a start that takes the first masks from `tree`, a pytree like the parameters, of bools.

  `sj.masks(params, state)` and `sj.prune` give such trees. A scalar stands for all of a leaf, and the entries of dense
  leaves are not read. The selection chooses again from the first refresh on. Raises `ValueError` in `init` for a tree
  of another structure, and for a leaf that is no mask of its parameter. `check` says where a mask breaks the pattern.
  """
  return Bound(_masks, (tree,))


def _masks(choose: Any, place: Any, masks: Any, key: Array | None, tree: PyTree) -> Any:
  return choose(masks, given=tree)


@checked
def gradient(loss: Loss) -> Probe:
  """Returns the probe dL/dw."""
  return Bound(_gradient, (loss,))


def _gradient(params: PyTree, loss: Loss) -> PyTree:
  return jax.grad(_loss_of(loss))(params)


def _loss_of(loss: Loss) -> Callable[[PyTree], Array]:
  """Returns `loss`, whose result must be one number that has a gradient."""
  def checked_loss(params: PyTree) -> Array:
    value = called(loss, params)
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
      raise ValueError(f'sparsejax: {arguments.shown(loss)}, the `loss` of a first mask, returned '
                       f'{jnp.result_type(value)}{list(jnp.shape(value))}; return one floating number, as in a mean.')
    return value

  return checked_loss


@checked
def hessian_gradient(loss: Loss) -> Probe:
  """Returns the probe H g: the Hessian of the loss times its gradient, g held fixed (Wang et al. 2020, equation 8).

  g is the gradient of the matrices alone, as in the authors' code of GraSP: biases and norms have no part in g.
  """
  return Bound(_hessian_gradient, (loss,))


def _hessian_gradient(params: PyTree, loss: Loss) -> PyTree:
  loss = _loss_of(loss)
  paths, leaves, treedef = trees.flatten(jax.grad(loss)(params))
  sparse = trees.over(trees.matrices, params)
  moving = [g if sparse(path, g) else jnp.zeros_like(g) for path, g in zip(paths, leaves)]
  return jax.jvp(jax.grad(loss), (params,), (treedef.unflatten(moving),))[1]


@checked
def hutchinson(loss: Loss, samples: int, key: Array) -> Probe:
  """Returns the probe v (H v), the mean over `samples` draws of v, whose sum over weights estimates the trace of H.

  H is the Hessian of the loss over all parameters at once, and v is +1 or -1 (Hutchinson 1990). HAP's authors
  draw 300 times; the standard error falls with the square root of the number.
  """
  return Bound(_hutchinson, (loss, samples, key))


def _hutchinson(params: PyTree, loss: Loss, samples: int, key: Array) -> PyTree:
  _, leaves, treedef = trees.flatten(params)

  def once(total: PyTree, key: Array) -> tuple[PyTree, None]:
    keys = jax.random.split(key, len(leaves))
    v = treedef.unflatten([jax.random.rademacher(k, w.shape, w.dtype) for k, w in zip(keys, leaves)])
    product = jax.jvp(jax.grad(loss), (params,), (v,))[1]
    return jax.tree.map(lambda t, a, b: t + a * b / samples, total, v, product), None

  return jax.lax.scan(once, jax.tree.map(jnp.zeros_like, params), jax.random.split(key, samples))[0]


@checked
def synaptic_flow(outputs: Callable[[PyTree], Array]) -> Probe:
  """Returns the probe dR/d|w|, R the sum of `outputs(|params|)` for an input of ones (Tanaka et al. 2020, algorithm 1).

  All parameters are made positive, biases and norms too, as in the authors' code of SynFlow. R is a product over the
  layers and may leave the range of float32 in very deep networks.
  """
  return Bound(_synaptic_flow, (outputs,))


def _synaptic_flow(params: PyTree, outputs: Callable[[PyTree], Array]) -> PyTree:
  return jax.grad(lambda params: jnp.sum(called(outputs, params)))(jax.tree.map(jnp.abs, params))


@checked
def correlation(apply: Callable[..., Any], *inputs: Any) -> Probe:
  """Returns the probe of the correlation between each input and each output of a layer, over the rows of one batch.

  The Hebbian rule of G2GNet grows weights where |correlation| is largest. `apply(params, *inputs)` is the model. The
  outputs are the products themselves, without bias and activation. Entries of a unit that is constant over the batch
  are 0, and so are leaves that no product takes. A weight that is used several times has the mean over its uses. The
  form of the correlation is ours: the abstract names none. Raises `ValueError` where `programs.operands` does.
  """
  return Bound(_correlation, (apply, inputs))


def _correlation(params: PyTree, apply: Callable[..., Any], inputs: tuple[Any, ...]) -> PyTree:
  paths, leaves, structure = trees.flatten(params)
  place, found = dict(zip(paths, range(len(paths)))), [jnp.zeros(w.shape, jnp.float32) for w in leaves]
  used: dict[tuple[int, Any], int] = {}

  def note(site: Any) -> None:
    at = place[site.path]
    own = arrangement_of(site.use, site.eqn, leaves[at].shape)
    if isinstance(own, str):
      raise errors.at_leaf('starts.correlation', site.path, leaves[at].shape, own)
    picked = dict(zip(own.gone, site.layer))
    index = tuple(picked.get(a, slice(None)) for a in range(leaves[at].ndim))
    part = leaves[at][index]
    new = own.part(_correlated(*own.rows(site.x, site.others), own.stack(part)), part.shape)
    count = used[at, site.layer] = used.get((at, site.layer), 0) + 1
    found[at] = found[at].at[index].add((new - found[at][index]) / count)

  operands(apply, note)(params, *inputs)
  return structure.unflatten(found)


def _correlated(x: Array, counted: Array | None, w: Array) -> Array:
  """Returns the correlation of rows `x`, `[L, T, K]`, with the products `x w^T`, as a stack `[L, R, K]` like `w`."""
  x, w = (jnp.asarray(each, jnp.float32) for each in (x, w))
  weight = jnp.ones(x.shape[:2]) if counted is None else counted.astype(jnp.float32)
  share = (weight / jnp.maximum(jnp.sum(weight, 1, keepdims=True), 1))[..., None]
  y = jnp.einsum('ltk,lrk->ltr', jnp.broadcast_to(x, (len(w), *x.shape[1:])), w)
  x, y = (each - jnp.sum(share * each, 1, keepdims=True) for each in (x, y))
  deviation = lambda each: jnp.sqrt(jnp.sum(share * jnp.square(each), 1))
  scale = deviation(y)[:, :, None] * deviation(x)[:, None]
  both = jnp.einsum('ltr,ltk->lrk', share * y, jnp.broadcast_to(x, (len(w), *x.shape[1:])))
  return jnp.where(scale > 1e-12, both / jnp.where(scale > 1e-12, scale, 1), 0)


def of(other: PyTree) -> Probe:
  """Returns the probe that is `other` for all parameters: `scores.gradient` is then the magnitude of `other`."""
  return Bound(_other, (other,))


def _other(params: PyTree, other: PyTree) -> PyTree:
  return other


def called(function: Callable[[PyTree], Array], params: PyTree) -> Array:
  """Returns `function(params)`. Raises `ValueError` that names the cause if optax hides parameters from the function.

  `optax.masked`, `multi_transform` and `partition` give the recipe a tree with `MaskedNode` in the place of the
  parameters of other optimizers. A function that has the whole tree may fill them in.
  """
  try:
    return function(params)
  except Exception as error:
    hidden = [path for path, leaf in zip(*trees.flatten(params, is_leaf=trees.is_dense)[:2]) if trees.is_dense(leaf)]
    if not hidden:
      raise
    raise ValueError(
        f'sparsejax: {arguments.shown(function)} failed in `init` on parameters of which optax.masked or '
        f'multi_transform hides {errors.some(hidden, 3)} ({type(error).__name__}: {error}). Wrap the whole '
        'optimizer in the recipe and say by where= what is sparse, or fill the hidden parameters in before the model '
        'runs.') from error


def needed(recipe: str, name: str, value: Any, what: str) -> Any:
  """Returns `value`. Raises `ValueError` if `value` is `None`."""
  if value is None:
    raise ValueError(f'recipes.{recipe}: needs `{name}=`, {what}.')
  return value
