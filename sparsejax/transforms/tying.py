"""Ties leaves of the parameters together: a follower has the mask of its leader, and is asked for nothing itself.

    tied = {'**/rho': '**/mean', 'dense/bias': 'dense/kernel'}     # an option of `transforms.sparsify`
    leader_of(tied, {'dense/rho': rho, 'dense/mean': mean})        # {'dense/rho': 'dense/mean'}

A deviation goes with its mean, and the bias of a channel with the channel. The selection sees the leaders alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import errors, globs
from sparsejax.plans import SparseLeaf
from sparsejax.types import Array, Asked, Axes

Leaves = Sequence[SparseLeaf]


def leader_of(tied: Mapping[str, str], leaves: Mapping[str, Any]) -> dict[str, str]:
  """Maps the path of each follower to the path of its leader, in the order of `tied`.

  `tied` maps globs of followers to globs of leaders with the same wildcards. Raises `ValueError` for a glob that
  matches no path, for a missing leader, and for a leaf with two leaders. No leader may follow another leaf.
  """
  found: dict[str, str] = {}
  for glob, other in tied.items():
    mine = {path: globs.renamed(path, glob, other) for path in leaves if globs.matches(glob, path)}
    if not mine:
      raise errors.unknown('sparsejax', 'path in `tied`', glob, leaves)
    for path, leader in mine.items():
      _refuse_leader(path, leader, leaves, found)
    found |= {path: str(leader) for path, leader in mine.items()}
  for path, leader in found.items():
    if leader in found:
      raise _problem(path, leaves, f'it is tied to {leader!r}, which is tied to {found[leader]!r}. Tie both to '
                     'the last.')
  return found


def _refuse_leader(path: str, leader: str | None, leaves: Mapping[str, Any], found: Mapping[str, str]) -> None:
  if leader not in leaves:
    hint = errors.closest(str(leader), leaves)
    raise _problem(path, leaves, f'it is tied to {leader!r}, which is no parameter.{hint} Let the glob in `tied` match '
                   'fewer parameters.')
  if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
    raise _problem(path, leaves, f'it is tied to {leader!r}, and its dtype {leaves[path].dtype} is not floating. Let '
                   'the glob in `tied` match fewer parameters.')
  if leader == path or path in found:
    raise _problem(path, leaves, f'it is tied to {leader!r}{f" and to {found[path]!r}" if path in found else ""}. Tie '
                   'it to one other parameter.')


def refuse_alone(leader_of: Mapping[str, str], picked: Mapping[str, bool]) -> None:
  """Raises `ValueError` for a follower that `where` picks without its leader, and that would stay dense."""
  for path, leader in leader_of.items():
    if picked[path] and not picked[leader]:
      raise ValueError(f'sparsejax: `where` picks {path!r}, and not {leader!r}, whose mask it is to have. Name both '
                       f'or neither, as in where=trees.named({leader!r}).')


def _problem(path: str, leaves: Mapping[str, Any], what: str) -> ValueError:
  return errors.at_leaf('sparsejax', path, leaves[path].shape, what)


def follower(leader: SparseLeaf, path: str, shape: tuple[int, ...]) -> SparseLeaf:
  """Returns the leaf at `path` that follows `leader`. Raises `ValueError` for a follower of another shape.

  A follower has the shape of its leader, or one entry for each output of the leader.
  """
  own = tuple(leader.shape[a] for a in _outputs(leader.axes))
  if shape == leader.shape:
    return dataclasses.replace(leader, path=path, asked=Asked() if leader.asked.together else leader.asked)
  if shape != own:
    raise errors.at_leaf('sparsejax', path, shape, f'it is tied to {leader.path!r} of shape {leader.shape}, and has '
                         f'neither that shape nor one entry for each output, {own}. Leave it out of `tied`.')
  places = lambda meant: tuple(i for i, a in enumerate(_outputs(leader.axes)) if a in meant)
  axes = Axes((), places(leader.axes.output), (), places(leader.axes.layer), leader.axes.source)
  return SparseLeaf(path, shape, axes, None)


def _outputs(axes: Axes) -> tuple[int, ...]:
  """Returns the axes of the outputs of each layer, in the order of the parameter."""
  return tuple(sorted((*axes.layer, *axes.output)))


@dataclasses.dataclass(frozen=True)
class Tied:
  """A `Tied` chooses the masks of leaders by `select`, and gives each follower the mask of its leader.

  `leaders`: the place of the leader, for each follower. Followers are the last of all leaves. A follower shaped like
  its leader is an entry of the tuple `signals.stats` of the leader, unless the leader has a memory. A follower with one
  entry for each output is kept where the leader keeps a weight of the output.
  """

  select: Callable[..., Any]
  leaders: tuple[int, ...]

  def __call__(self, leaves: Leaves, weights: list[Array], masks: list[Array], signals: list[Any]) -> Any:
    chosen, thresholds = self.select(*self.of_leaders(leaves, weights, masks, signals))
    first = len(leaves) - len(self.leaders)
    rows = zip(leaves[first:], self.leaders)
    return [*chosen, *(_shared(chosen[i], leaves[i], leaf.shape) for leaf, i in rows)], thresholds

  def of_leaders(self, leaves: Leaves, weights: list[Array], masks: list[Array], signals: list[Any]) -> Any:
    """Returns the arguments of a selection without those of followers, which the signals of leaders then hold."""
    first = len(leaves) - len(self.leaders)
    stats: list[tuple[Array, ...]] = [() for _ in range(first)]
    for w, i in zip(weights[first:], self.leaders):
      stats[i] += (w,) if w.shape == leaves[i].shape else ()
    seen = [s._replace(stats=own) if own and not jax.tree.leaves(s.stats) else s for s, own in zip(signals, stats)]
    return leaves[:first], weights[:first], masks[:first], seen


def _shared(mask: Array, leader: SparseLeaf, shape: tuple[int, ...]) -> Array:
  """Returns the mask of a follower of this shape."""
  if shape == leader.shape:
    return mask
  rest = tuple(a for a in range(mask.ndim) if a not in _outputs(leader.axes))
  return jnp.any(mask, rest)
