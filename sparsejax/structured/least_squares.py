"""Removes inputs of weights so that the outputs stay, by least squares, and searches how many each weight loses: Týr.

    small = tyr(found, params, [tokens], loss, 0.5)         # a Cut, with consumers that make up for what is gone
    steps = removals(gram, product, labels)                 # which group of inputs goes when, by the rule of OBS

`gram` is the sum of x x^T over the rows of calibration, `[K, K]`, and `product` is `gram @ w`, `[K, R]`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.programs.arrangements import Arrangement, arrangement_of
from sparsejax.programs.operands import Site, operands
from sparsejax.structured.groups import Groups, Member
from sparsejax.structured.removal import Cut, cut, leaves_of
from sparsejax.structured.searching import evolved
from sparsejax.types import Array, PyTree
from sparsejax.units import CONTRACTED

DAMPING = 0.01  # of the mean of the diagonal, as in the authors' code


@checked
def tyr(groups: Groups, params: PyTree, batches: Iterable[Any], loss: Callable[[PyTree], Array], sparsity: float = 0.5,
        *, levels: int = 9, generations: int = 10, offspring: int = 16, rounds: int = 16, seed: int = 0) -> Cut:
  """Returns the model without the units that Týr-the-Pruner removes (Li et al. 2025, 2503.09657).

  Groups take part if one product contracts their units, such as heads and the widths of MLPs. Units leave each consumer
  by the rule of optimal brain surgery, at `levels` counts around `sparsity`. The weights that stay are fitted again by
  least squares to the inputs of `batches`. An evolution of the levels then looks for the least `loss` of the masked
  and fitted model, with the same number of levels in all. In `batches` a tuple is several inputs.

  The published score adds a term to that of optimal brain surgery, by which it may prefer worse units; here the term is
  left out. The authors prune each layer on the pruned inputs of the layers before, and repeat search and pruning four
  times with smaller steps. In this function all layers see the dense inputs, and the search runs once. Raises
  `ValueError` if no group takes part.
  """
  leaves_of('structured.tyr', groups, params)
  batches = list(batches)
  if not batches:
    raise ValueError('structured.tyr: there is no batch; give at least one.')
  own = _consumers(groups)
  grams = _grams(groups, params, {name: member.path for name, member in own.items()}, batches)
  table = {name: _levels(groups[name].size, grams[name], own[name], params, sparsity, levels, rounds) for name in grams}
  if not table:
    raise ValueError('structured.tyr: no group has one product that contracts its units; the groups are '
                     f'{errors.some(groups)}.')
  made = lambda state: _replaced(params, {name: table[name][level] for name, level in state.items()}, own)
  best, _ = evolved({name: len(each) for name, each in table.items()}, lambda state: float(loss(made(state))),
                    {name: len(each) // 2 for name, each in table.items()}, generations=generations,
                    offspring=offspring, seed=seed)
  return cut(groups, made(best), {name: table[name][level].keep for name, level in best.items()})


class Level(NamedTuple):
  """A `Level` is what is kept of the units of a group, `bool[units]`, and the fitted weight of the consumer."""

  keep: np.ndarray
  weight: Array


def removals(gram: np.ndarray, product: np.ndarray, labels: np.ndarray, counts: Sequence[int], rounds: int = 16
             ) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns, for each of the falling `counts` of units, the kept units and the fitted weights `[K, R]`.

  `labels`: `int[K]`, the unit of each input, -1 for an input that stays. The unit P with the least `w_P^T [H^-1]_PP^-1
  w_P / 2` goes first (Hassibi and Stork 1993, optimal brain surgery). Ties go to the lower unit. Several units go at
  once, so that there are at most `rounds` rounds, and the last is exact. Weights are fitted to the inputs that stay.
  """
  damped = gram + (DAMPING * np.mean(np.diagonal(gram)) or 1.0) * np.eye(len(gram))  # of zeros alone, 1 is any number
  inverse, alive = np.linalg.inv(damped), np.ones(labels.max() + 1, bool)
  w = inverse @ product
  most, found = max(1, -(-(len(alive) - min(counts)) // rounds)), []
  for count in counts:
    while alive.sum() > count:
      losses = [_loss(w, inverse, labels == unit) if alive[unit] else np.inf for unit in range(len(alive))]
      for unit in np.argsort(losses, kind='stable')[:min(most, alive.sum() - count)]:
        w, inverse = _removed(w, inverse, np.flatnonzero(labels == unit))
        alive[unit] = False
    stays = (labels < 0) | alive[labels]
    fitted = np.zeros_like(w)
    fitted[stays] = np.linalg.solve(damped[np.ix_(stays, stays)], product[stays])
    found.append((alive.copy(), fitted))
  return found


def _loss(w: np.ndarray, inverse: np.ndarray, inside: np.ndarray) -> float:
  """Returns the rise of the squared error when a group of inputs goes and all others make up for the group."""
  part = w[inside]
  return float(np.sum(part * np.linalg.solve(inverse[np.ix_(inside, inside)], part))) / 2


def _removed(w: np.ndarray, inverse: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weights, and the inverse of the Hessian, without a group of inputs."""
  solved = np.linalg.solve(inverse[np.ix_(inside, inside)], np.concatenate([w[inside], inverse[inside]], 1))
  w, inverse = w - inverse[:, inside] @ solved[:, :w.shape[1]], inverse - inverse[:, inside] @ solved[:, w.shape[1]:]
  w[inside], inverse[inside], inverse[:, inside] = 0, 0, 0
  inverse[inside, inside] = 1
  return w, inverse


def _consumers(groups: Groups) -> dict[str, Member]:
  """Maps the groups that take part to their consumers; of two groups of one consumer, that with the larger units."""
  found: dict[str, tuple[str, Member]] = {}
  for name in sorted(groups, key=lambda name: groups[name].weights):
    if (member := _consumer(groups[name].members)) is not None:
      found[member.path] = (name, member)
  return dict(found.values())


def _consumer(members: Sequence[Member]) -> Member | None:
  """Returns the one member that contracts the units of a group without layers, or `None`."""
  inside = [member for member in members if member.side == CONTRACTED]
  return inside[0] if len(inside) == 1 and len(inside[0].labels) == 1 else None


class _Gram(NamedTuple):
  gram: np.ndarray
  own: Arrangement


def _grams(groups: Groups, params: PyTree, paths: Mapping[str, str], batches: Iterable[Any]) -> dict[str, _Gram]:
  """Maps each group whose consumer is one plain matrix to the sum of x x^T over the rows of its inputs."""
  leaves, names = dict(zip(*trees.flatten(params)[:2])), {path: name for name, path in paths.items()}
  found: dict[str, _Gram] = {}
  refused: set[str] = set()

  def noted(site: Site) -> None:
    name = names.get(site.path, '')
    own = arrangement_of(site.use, site.eqn, leaves[site.path].shape) if name else ''
    if isinstance(own, str) or own.shape[0] != 1 or own.gone:
      refused.add(name)
      return
    x = np.asarray(own.rows(site.x, site.others)[0], np.float64)[0]
    before = found.get(name)
    found[name] = _Gram(x.T @ x + (0 if before is None else before.gram), own)

  for batch in batches:
    operands(groups.apply, noted)(params, *(batch if isinstance(batch, tuple) else (batch,)))
  return {name: gram for name, gram in found.items() if name not in refused}


def _levels(size: int, gram: _Gram, member: Member, params: PyTree, sparsity: float, levels: int, rounds: int
            ) -> list[Level]:
  """Returns the levels of one group, the most units first, evenly spaced around the sparsity."""
  w = dict(zip(*trees.flatten(params)[:2]))[member.path]
  stack = np.asarray(gram.own.stack(jnp.asarray(w, jnp.float32)), np.float64)[0].T
  shape = [-1 if a == member.axis else 1 for a in range(w.ndim)]
  labels = np.asarray(gram.own.stack(jnp.asarray(np.broadcast_to(member.labels[0].reshape(shape), w.shape))))[0, 0]
  step = max(1, round(size * min(sparsity, 1 - sparsity) / (levels // 2 + 1)))
  counts = [round(size * (1 - sparsity)) + step * (levels // 2 - i) for i in range(levels)]
  counts = [count for count in counts if 1 <= count <= size]
  made = removals(gram.gram, gram.gram @ stack, labels, counts, rounds)
  return [Level(keep, jnp.asarray(gram.own.part(jnp.asarray(fitted.T[None]), w.shape), w.dtype))
          for keep, fitted in made]


def _replaced(params: PyTree, chosen: Mapping[str, Level], own: Mapping[str, Member]) -> PyTree:
  paths, leaves, treedef = trees.flatten(params)
  found = dict(zip(paths, leaves))
  for name, level in chosen.items():
    found[own[name].path] = level.weight
  return treedef.unflatten(list(found.values()))
