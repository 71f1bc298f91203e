"""Rotates the residual stream of a model, which changes nothing, so that its last directions can be cut: SliceGPT.

    small = slice_gpt(found, params, [tokens], sparsity=0.25)        # a Cut: a stream of three quarters of the width
    rotated = rotate(found, params, 'embed/embedding:1', matrix)     # the same function with other parameters

A rotation commutes with sums, with products whose weights take it in, and with an RMS norm without a scale. Scales are
therefore folded into the weights behind them first.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.programs.arrangements import arrangement_of
from sparsejax.programs.contractions import read
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.operands import Site, operands
from sparsejax.programs.tracing import trace
from sparsejax.structured.groups import Groups, Member, UnitGroup
from sparsejax.structured.removal import Cut, cut
from sparsejax.types import PyTree
from sparsejax.units import BESIDE, CONTRACTED

# Operations that hand a scale, or what a scale has multiplied, on as it is.
MOVES = {'broadcast_in_dim', 'reshape', 'convert_element_type', 'transpose', 'squeeze', 'copy', 'slice', 'name',
         'optimization_barrier', 'reduce_precision'}
DAMPING = 0.01  # of the mean of the diagonal of the statistic, as in the authors' code


@checked
def slice_gpt(groups: Groups, params: PyTree, batches: Iterable[Any], sparsity: float = 0.25, *,
              stream: str | None = None, multiple_of: int = 8) -> Cut:
  """Returns the model with a narrower residual stream: SliceGPT (Ashkboos et al. 2024, 2401.15024).

  The stream is rotated to the principal directions of what its norms hand on over `batches`, and the last directions
  are cut. `int((1 - sparsity) * width)`, rounded down to a multiple of `multiple_of`, stay. `stream`: the name of the
  group, by default the group with the most weights a unit. In `batches` a tuple is several inputs.

  The paper rotates each block on its own, with matrices on the shortcuts. In this function a single rotation serves all
  blocks, so that no matrix is added and the user's function stays. The paper reads the stream before a norm, and this
  function behind it, where each token counts alike. The norm divides by the old width, as in the authors' code. Raises
  `ValueError` for a stream that cannot be rotated, see `rotate`.
  """
  stream = stream or max(groups, key=lambda name: groups[name].weights)
  folded = fold(groups, params, stream)
  matrix = _principal(groups, folded, stream, [_inputs(batch) for batch in batches])
  width = len(matrix)
  kept = int((1 - sparsity) * width) // multiple_of * multiple_of
  if not kept:
    raise ValueError(f'structured.slice_gpt: sparsity={sparsity:g} leaves less than {multiple_of} of {width} '
                     'directions. Ask for less, or for a smaller multiple_of.')
  return cut(groups, rotate(groups, folded, stream, matrix), {stream: np.arange(width) < kept})


@checked
def rotate(groups: Groups, params: PyTree, stream: str, matrix: Any) -> PyTree:
  """Returns parameters of the same function whose stream is `x @ matrix`; `matrix` is orthogonal, `[width, width]`.

  `stream` names a group whose units are the whole of each axis that they lie on. Scales of norms are ones afterwards,
  as `fold` makes them. The sums are in float64. Raises `ValueError` if a norm subtracts a mean or adds a shift, or if a
  tied embedding would have to take in a scale. `is_rotated` compares both models on inputs.
  """
  group, matrix = _whole(groups, stream), np.asarray(matrix, np.float64)
  if matrix.shape != (group.size,) * 2 or not np.allclose(matrix @ matrix.T, np.eye(group.size), atol=1e-5):
    raise ValueError(f'structured.rotate: the matrix must be orthogonal, [{group.size}, {group.size}], as many rows as '
                     f'the group {stream!r} has units; it is {list(matrix.shape)}.')
  folded = fold(groups, params, stream)
  scales = {scale for scale in _scales(groups, group).values() if scale is not None}
  return _changed(folded, {member: lambda w, axis: np.moveaxis(np.tensordot(w, matrix, (axis, 0)), -1, axis)
                           for member in group.members if member.path not in scales})


def fold(groups: Groups, params: PyTree, stream: str) -> PyTree:
  """Returns parameters of the same function in which the scales of the stream's norms are ones.

  The rows of each weight behind a norm are multiplied by the scale of the norm. Raises `ValueError` as `rotate` does.
  """
  group = _whole(groups, stream)
  behind = _scales(groups, group)
  leaves = dict(zip(*trees.flatten(params)[:2]))
  looked_up = read(trace(groups.apply, (groups.shapes, *groups.inputs))).lookups
  changes: dict[Member, Any] = {}
  for member in group.members:
    scale = behind.get(member.path) if member.side == CONTRACTED else None
    if scale is None or np.all(np.asarray(leaves[scale]) == 1):
      continue
    if member.path in looked_up:
      raise errors.at_leaf('structured.rotate', member.path, member.shape, f'it is an embedding too, and cannot take '
                           f'in the scale {scale!r}; untie the two, or train with the scale at 1.')
    changes[member] = lambda w, axis, scale=leaves[scale]: w * _beside(np.asarray(scale, np.float64), w.ndim, axis)
  ones = {member: lambda w, axis: np.ones_like(w) for member in group.members if member.path in set(behind.values())}
  return _changed(params, {**changes, **ones})


@checked
def is_rotated(groups: Groups, params: PyTree, rotated: PyTree, *inputs: Any) -> float:
  """Returns the largest difference of the results of both parameters, over the largest result."""
  pairs = zip(*(jax.tree.leaves(groups.apply(each, *inputs)) for each in (params, rotated)))
  return max(float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-30)) for a, b in pairs)


def _inputs(batch: Any) -> tuple[Any, ...]:
  return batch if isinstance(batch, tuple) else (batch,)


def _beside(scale: np.ndarray, rank: int, axis: int) -> np.ndarray:
  """Returns a scale `[width]` or `[layers, width]`, shaped to multiply a weight along the axis of the stream."""
  shape = [1] * rank
  shape[axis] = scale.shape[-1]
  if scale.ndim == 2:
    shape[0] = len(scale)
  return scale.reshape(shape)


def _whole(groups: Groups, stream: str) -> UnitGroup:
  group = groups[stream]
  for member in group.members:
    if len(member.labels) != 1 or not np.array_equal(member.labels[0], np.arange(group.size)):
      raise errors.at_leaf('structured.rotate', member.path, member.shape, f'axis {member.axis} is not the stream '
                           f'{stream!r} alone, so that nothing can be rotated along it.')
  return group


def _changed(params: PyTree, changes: Mapping[Member, Any]) -> PyTree:
  """Returns parameters with some of them changed along an axis, in float64, and cast back."""
  paths, leaves, treedef = trees.flatten(params)
  found = dict(zip(paths, leaves))
  for member, change in changes.items():
    w = found[member.path]
    found[member.path] = jnp.asarray(change(np.asarray(w, np.float64), member.axis), w.dtype)
  return treedef.unflatten(list(found.values()))


# Scales and the weights behind them.


@dataclasses.dataclass(frozen=True)
class _Scaled:
  """A `_Scaled` is the fact that a value is a parameter (`whole`), or was multiplied by one."""

  path: str
  whole: bool


def _scales(groups: Groups, group: UnitGroup) -> dict[str, str | None]:
  """Maps the path of each weight that contracts the stream to the scale before it, or to `None`."""
  vectors = {member.path for member in group.members if member.side == BESIDE}
  readers = {member.path for member in group.members if member.side == CONTRACTED}
  found: dict[str, set[str | None]] = {path: set() for path in readers}

  def operation(eqn: Any, facts: Sequence[_Scaled | None], here: Position) -> list[_Scaled | None]:
    name, known = eqn.primitive.name, [fact for fact in facts if fact is not None]
    if name in MOVES:
      return [facts[0]] * len(eqn.outvars)
    if name == 'mul' and any(fact.whole and fact.path in vectors for fact in known):
      scale = next(fact.path for fact in known if fact.whole and fact.path in vectors)
      return [_Scaled(scale, False)]
    if name in ('add', 'sub') and any(not fact.whole for fact in known) and any(
        fact.whole and fact.path in vectors for fact in known):
      scale, shift = (next(fact.path for fact in known if fact.whole == whole) for whole in (False, True))
      raise errors.at_leaf('structured.rotate', shift, (group.size,), f'it shifts what {scale!r} has scaled, as a '
                           'LayerNorm does; a rotation needs RMS norms. Fold the shift into biases first.')
    if name == 'dot_general':
      for fact, other in zip(facts[:2], facts[1::-1]):
        if fact is not None and fact.whole and fact.path in readers:
          found[fact.path].add(None if other is None or other.whole else other.path)
    return [None] * len(eqn.outvars)

  program = trace(groups.apply, (groups.shapes, *groups.inputs))
  inputs = [_Scaled(path, True) if argument == 0 else None for argument, path in zip(program.arguments, program.paths)]
  follow(program, inputs, FactRules(operation, joined=lambda facts: facts[0] if len(set(facts)) == 1 else None))
  for path, scales in found.items():
    if len(scales) != 1:
      raise errors.at_leaf('structured.rotate', path, (), 'it contracts the stream behind several norms, or in no '
                           'plain product; give each use a weight of its own.')
  return {path: next(iter(scales)) for path, scales in found.items()}


def _principal(groups: Groups, folded: PyTree, stream: str, batches: Sequence[tuple[Any, ...]]) -> np.ndarray:
  """Returns the principal directions of what the stream hands to its weights, as columns, the largest first."""
  group, leaves = groups[stream], dict(zip(*trees.flatten(folded)[:2]))
  readers = {member.path for member in group.members if member.side == CONTRACTED}
  total = np.zeros((group.size, group.size))
  if not batches:
    raise ValueError('structured.slice_gpt: there is no batch; give at least one.')

  def noted(site: Site) -> None:
    if site.path in readers:
      own = arrangement_of(site.use, site.eqn, leaves[site.path].shape)
      x = None if isinstance(own, str) else np.asarray(own.rows(site.x, site.others)[0], np.float64)
      if x is None or x.shape[-1] != group.size:
        raise errors.at_leaf('structured.slice_gpt', site.path, leaves[site.path].shape, 'it contracts more than the '
                             'stream, so that its inputs do not tell the directions of the stream.')
      rows = x.reshape(-1, group.size)
      total[:] += rows.T @ rows

  for inputs in batches:
    operands(groups.apply, noted)(folded, *inputs)
  damped = total + DAMPING * np.mean(np.diagonal(total)) * np.eye(group.size)
  return np.linalg.eigh(damped)[1][:, ::-1]
