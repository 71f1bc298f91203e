"""Rotates the residual stream of a model, which changes nothing, so that its last directions can be cut: SliceGPT.

    small = slice_gpt(found, params, [tokens], sparsity=0.25)        # a Cut: a stream of three quarters of the width
    rotated = rotate(found, params, 'embed/embedding:1', matrix)     # the same function with other parameters

A rotation commutes with sums, with products whose weights take it in, and with an RMS norm without a scale. Scales are
therefore folded into the weights behind them first, and means into the weights before them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.programs.arrangements import arrangement_of
from sparsejax.programs.contractions import read
from sparsejax.programs.evaluate import evaluate, rules_at
from sparsejax.programs.jaxprs import Address
from sparsejax.programs.operands import Site, operands
from sparsejax.programs.tracing import Program, trace
from sparsejax.structured.groups import Groups, Member, UnitGroup
from sparsejax.structured.groups import groups as read_groups
from sparsejax.structured.removal import Cut, cut, leaves_of
from sparsejax.structured.streams import Norm, Turning, turning
from sparsejax.types import PyTree
from sparsejax.units import CONTRACTED

DAMPING = 0.01  # of the mean of the diagonal of the statistic, as in the authors' code


@checked
def slice_gpt(groups: Groups, params: PyTree, batches: Iterable[Any], sparsity: float = 0.25, *,
              stream: str | None = None, multiple_of: int = 8) -> Cut:
  """Returns the model with a narrower residual stream: SliceGPT (Ashkboos et al. 2024, 2401.15024).

  The stream is rotated to the principal directions of what its norms hand on over `batches`, and the last directions
  are cut. `int((1 - sparsity) * width)`, rounded down to a multiple of `multiple_of`, stay. `stream`: the name of the
  group, by default the group with the most members. In `batches` a tuple is several inputs.

  LayerNorms become RMS norms first, see `centered`. The function of the result is then another one than the user's, and
  `load` takes `without_means(apply, stream)`. The paper rotates each block on its own, with matrices on the shortcuts.
  In this function a single rotation serves all blocks, so that no matrix is added. The paper reads the stream before a
  norm, and this function behind it, where each token counts alike. The norm divides by the old width, as in the
  authors' code.

  Raises `ValueError` for a stream that cannot be rotated, see `rotate`. Raises `ValueError` if the rotated model
  differs on the first batch before anything is cut, by more than the square root of the machine epsilon.
  """
  if not groups:
    raise ValueError('structured.slice_gpt: there is no group; structured.groups prints what is pinned, and why.')
  stream = stream or max(groups, key=lambda name: (len(groups[name].members), groups[name].weights))
  own, given, inputs = groups.apply, params, [_inputs(batch) for batch in batches]
  groups, params = centered(groups, params, stream)
  folded = fold(groups, params, stream)
  matrix = _principal(groups, folded, stream, inputs)
  width = len(matrix)
  kept = int((1 - sparsity) * width) // multiple_of * multiple_of
  if not kept:
    raise ValueError(f'structured.slice_gpt: sparsity={sparsity:g} leaves less than {multiple_of} of {width} '
                     'directions. Ask for less, or for a smaller multiple_of.')
  rotated = rotate(groups, folded, stream, matrix)
  _refuse_others(own, given, groups.apply, rotated, inputs[0])
  return cut(groups, rotated, {_group_of(groups, stream).name: np.arange(width) < kept})


@checked
def rotate(groups: Groups, params: PyTree, stream: str, matrix: Any) -> PyTree:
  """Returns parameters of the same function whose stream is `x @ matrix`; `matrix` is orthogonal, `[width, width]`.

  `stream` names a group whose units are the whole of each axis that they lie on. Scales of norms are ones afterwards,
  as `fold` makes them. The sums are in float64. `is_rotated` compares both models on inputs.

  Raises `ValueError` if a norm subtracts a mean, see `centered`, and if a tied embedding would have to take in a scale.
  The stream may go through sums, through products with weights, and through norms before such products. Any other
  operation is refused with its place, and so is a norm whose result goes back to the stream (a post-norm).
  """
  group, matrix = _whole(groups, stream), np.asarray(matrix, np.float64)
  if matrix.shape != (group.size,) * 2 or not np.allclose(matrix @ matrix.T, np.eye(group.size), atol=1e-5):
    raise ValueError(f'structured.rotate: the matrix must be orthogonal, [{group.size}, {group.size}], as many rows as '
                     f'the group {stream!r} has units; it is {list(matrix.shape)}.')
  seen = _turning(groups, stream)
  if seen.means:
    raise ValueError(f'structured.rotate: norms subtract the mean of the stream {stream!r}, which a rotation changes; '
                     'rotate what structured.centered(groups, params, stream) returns.')
  return _changed(fold(groups, params, stream), {
    member: lambda w, axis: np.moveaxis(np.tensordot(w, matrix, (axis, 0)), -1, axis)
    for member in group.members if member.path not in seen.multiplied})


def fold(groups: Groups, params: PyTree, stream: str) -> PyTree:
  """Returns parameters of the same function in which the scales of the stream's norms are ones.

  The scale of a norm multiplies the rows of each weight behind the norm, and divides the shift of the norm.
  Raises `ValueError` as `rotate` does.
  """
  held = leaves_of('structured.rotate', groups, params)
  group, seen = _whole(groups, stream), _turning(groups, stream)
  norms = [norm for path, norm in seen.norms.items() if path]
  looked_up = read(_traced(groups)).lookups
  if lost := seen.multiplied - {norm.scale for norm in norms}:
    raise errors.at_leaf('structured.rotate', min(lost), (group.size,), 'it multiplies the stream, and no weight takes '
                         'it in.')
  changes: dict[Member, Any] = {}
  for member in group.members:
    norm = seen.norms.get(member.path, Norm()) if member.side == CONTRACTED else Norm()
    if norm.scale is not None and not np.all(np.asarray(held[norm.scale]) == 1):
      if member.path in looked_up:
        raise errors.at_leaf('structured.rotate', member.path, member.shape, f'it is an embedding too, and cannot take '
                             f'in the scale {norm.scale!r}; untie the two, or train with the scale at 1.')
      changes[member] = _times(np.asarray(held[norm.scale], np.float64))
  for member in group.members:
    own = next((norm for norm in norms if member.path in (norm.scale, norm.shift)), Norm())
    if member.path == own.scale:
      changes[member] = lambda w, axis: np.ones_like(w)
    elif own.scale is not None:
      changes[member] = _over(member, np.asarray(held[own.scale], np.float64))
  return _changed(params, changes)


@checked
def centered(groups: Groups, params: PyTree, stream: str) -> tuple[Groups, PyTree]:
  """Returns groups and parameters of the same function with RMS norms in the place of the stream's LayerNorms.

  Each weight that adds to the stream loses its mean over the units. The mean that a LayerNorm subtracts is then zero,
  and the function of the new groups, `without_means(groups.apply, stream)`, does not compute it (SliceGPT, section
  3.2). `stream` is the name of a group, or the 'path:axis' of an axis that is pinned because of a variance of two
  passes. The name of the stream stays. Without a LayerNorm both come back as they are. Raises `ValueError` for a stream
  that is also read as it is, or through an RMS norm, and as `rotate` does.
  """
  leaves_of('structured.centered', groups, params)
  seen = _turning(groups, stream)
  if not seen.means:
    return groups, params
  if whole := [path or 'a product without a weight' for path, norm in seen.norms.items() if not norm.centred]:
    raise ValueError(f'structured.centered: {errors.some(whole)} of the stream {stream!r} keeps the mean that other '
                     'norms subtract; give each the same kind of norm.')
  found = read_groups(without_means(groups.apply, stream), groups.shapes, *groups.inputs)
  shifts = {norm.shift for norm in seen.norms.values()} | seen.multiplied
  written = [member for member in _whole(found, stream).members
             if member.side != CONTRACTED and member.path not in shifts]
  return found, _changed(params, {member: lambda w, axis: w - w.mean(axis, keepdims=True) for member in written})


@checked
def without_means(apply: Callable[..., Any], stream: str) -> Callable[..., Any]:
  """Returns `apply(params, ...)` with zero in the place of each mean over the stream, so that LayerNorms are RMS norms.

  `stream` is the 'path:axis' of a parameter that the stream runs along. The result is another function, unless the
  parameters are those of `centered`. `load` takes it as the function of a model that `slice_gpt` has cut.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    program = trace(apply, args, kwargs)
    means: dict[Address, dict[str, Any]] = {address: {'a mean': None} for address in turning(program, stream).means}
    zeros = lambda eqn, values, here: [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    rules = rules_at('structured.without_means', program, means, zeros)
    return program.unflatten(evaluate(program, program.arrays, rules))

  return call


@checked
def is_rotated(groups: Groups, params: PyTree, rotated: PyTree, *inputs: Any) -> float:
  """Returns the largest difference of the results of both parameters, over the largest result."""
  for each in (params, rotated):
    leaves_of('structured.is_rotated', groups, each)
  return _difference(groups.apply(params, *inputs), groups.apply(rotated, *inputs))


def _difference(one: PyTree, other: PyTree) -> float:
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
  return max(float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-30)) for a, b in pairs)


def _refuse_others(apply: Callable[..., Any], params: PyTree, turned: Callable[..., Any], rotated: PyTree,
                   inputs: tuple[Any, ...]) -> None:
  """Raises `ValueError` if the rotated model computes something else, before anything is cut."""
  before, after = apply(params, *inputs), turned(rotated, *inputs)
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(before) if jnp.issubdtype(leaf.dtype, np.inexact)]
  eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
  if not (off := _difference(before, after)) <= np.sqrt(eps):
    raise ValueError(f'structured.slice_gpt: the rotated model differs by {off:.2g} of the largest result before '
                     f'anything is cut, and may by {np.sqrt(eps):.2g}. Norms with very different scales may round so '
                     'much; otherwise please report the model.')


def _inputs(batch: Any) -> tuple[Any, ...]:
  return batch if isinstance(batch, tuple) else (batch,)


def _beside(scale: np.ndarray, rank: int, axis: int) -> np.ndarray:
  """Returns a scale `[width]` or `[layers, width]`, shaped to multiply a weight along the axis of the stream."""
  shape = [1] * rank
  shape[axis] = scale.shape[-1]
  if scale.ndim == 2:
    shape[0] = len(scale)
  return scale.reshape(shape)


def _times(scale: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
  return lambda w, axis: w * _beside(scale, w.ndim, axis)


def _over(shift: Member, scale: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
  """Returns the shift of a norm divided by the scale of the norm. Raises `ValueError` where only the scale is zero."""
  def divided(w: np.ndarray, axis: int) -> np.ndarray:
    if np.any((scale == 0) & (w != 0)):
      raise errors.at_leaf('structured.rotate', shift.path, shift.shape, 'it shifts units whose scale is zero, which '
                           'no weight can take in. Set the shift to zero there, or the scale to another number.')
    return w / np.where(scale == 0, 1, scale)
  return divided


def _traced(groups: Groups) -> Program:
  return trace(groups.apply, (groups.shapes, *groups.inputs))


def _turning(groups: Groups, stream: str) -> Turning:
  return turning(_traced(groups), stream if stream in groups.pinned else _group_of(groups, stream).members[0].name)


def _group_of(groups: Groups, stream: str) -> UnitGroup:
  """Returns the group with this name, or with a member of this name."""
  named = (name for name, group in groups.items() if any(member.name == stream for member in group.members))
  return groups[stream if stream in groups else next(named, stream)]


def _whole(groups: Groups, stream: str) -> UnitGroup:
  group = _group_of(groups, stream)
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


def _principal(groups: Groups, folded: PyTree, stream: str, batches: Sequence[tuple[Any, ...]]) -> np.ndarray:
  """Returns the principal directions of what the stream hands to its weights, as columns, the largest first."""
  group, leaves = _group_of(groups, stream), dict(zip(*trees.flatten(folded)[:2]))
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
