"""Reads the batches that a user gives: the arguments of each call, the program of each shape, and which rows count.

    calls = calls_of('prune', apply, params, batches, valid)
    counted = validity('prune', calls.programs[0], calls.valid[0])      # counted(site): masks of operand and result
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.programs.contractions import read
from sparsejax.programs.evaluate import Walk
from sparsejax.programs.operands import Site
from sparsejax.programs.origins import entries, origins, rows_of
from sparsejax.programs.tracing import Program, trace
from sparsejax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Calls:
  """A `Calls` holds a program, its inputs and the mask of its valid positions for each batch.

  `given`: the arguments of each batch as the user gave them, without the parameters.
  """

  programs: list[Program]
  arrays: list[list[Any]]
  valid: list[Array | None]
  given: list[Any]

  def refuse_other_programs(self, function: str, uses: Mapping[str, list[Any]]) -> None:
    """Raises `ValueError` for a batch for which the program has other products than for the first batch.

    `uses` has the address and the operand of each product with data, by path.
    """
    for i, program in enumerate(self.programs):
      if program is self.programs[0] or program in self.programs[:i]:
        continue
      found = read(program).uses
      other = [path for path, places in uses.items()
               if places != [(use.address, use.operand) for use in found.get(path, ()) if use.data]]
      if other:
        raise ValueError(f'{function}: batch {i} runs other operations than batch 0, at the products with '
                         f'{errors.some(other)}: the function branches in Python on the shape or on an option. Give '
                         'batches of one kind.')


@dataclasses.dataclass
class BatchWalk:
  """A `BatchWalk` is the walk of one batch, with the number of the batch.

  `valid(site)` returns masks of the entries that count, of `site.x` and of the product, or `None` for all of them.
  """

  number: int
  walk: Walk
  valid: Callable[[Site], tuple[Array | None, Array | None]]


def calls_of(function: str, apply: Callable[..., Any], params: PyTree, batches: Iterable[Any],
             valid: Iterable[Array] | None) -> Calls:
  """Returns the calls of all batches; an iterator is read once. Batches of one shape share a program.

  `function` is the name of the caller for messages, here and below.
  """
  given = [_arguments(batch) for batch in batches]
  if not given:
    without = ', or prune without data by sj.prune_weights' if function == 'prune' else ''
    raise ValueError(f'{function}: there are no batches. Give at least one{without}.')
  for path, leaf in zip(*trees.flatten(params)[:2]):
    if isinstance(leaf, jax.core.Tracer):
      raise errors.at_leaf(function, path, leaf.shape, 'it is traced, and calibration reads the numbers. Call '
                           f'{function} outside of jit, grad, vmap and eval_shape.')
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((given, valid))):
    raise ValueError(f'{function}: batches are traced, and calibration reads their numbers. Call '
                     f'{function} outside of jit, grad, vmap and eval_shape.')
  masks = _masks(function, valid, len(given))
  traced: dict[Any, Program] = {}
  programs: list[Program] = []
  arrays: list[list[Any]] = []
  for args, kwargs in given:
    leaves, structure = jax.tree.flatten(((params, *args), kwargs))
    key = structure, tuple((x.shape, x.dtype) if _is_array(x) else repr(x) for x in leaves)
    if key not in traced:
      traced[key] = _traced(function, len(programs), apply, (params, *args), kwargs)
    programs.append(traced[key])
    arrays.append([x for x in leaves if _is_array(x)])
  return Calls(programs, arrays, masks, given)


def _traced(function: str, number: int, apply: Callable[..., Any], args: Any, kwargs: Any) -> Program:
  """Returns the program of a batch; raises `ValueError` for a batch that does not run although the first one does."""
  try:
    return trace(apply, args, kwargs)
  except (TypeError, ValueError) as error:
    if not number:
      raise
    shapes = [x.shape if _is_array(x) else x for x in jax.tree.leaves((args[1:], kwargs))]
    raise ValueError(f'{function}: batch {number}, of the shapes {errors.some(map(str, shapes))}, does not run, and '
                     f'batch 0 does: {error} Give batches that the function takes.') from error


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """Returns the positional and the keyword arguments of a batch."""
  if isinstance(batch, tuple) and not hasattr(batch, '_fields'):
    return batch, {}
  return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') and not isinstance(leaf, np.generic)


def _masks(function: str, valid: Iterable[Array] | None, number: int) -> list[Array | None]:
  if valid is None:
    return [None] * number
  masks = list(valid)
  if len(masks) != number:
    raise ValueError(f'{function}: `valid` has {len(masks)} arrays and there are {number} batches; give one for each '
                     'batch.')
  for i, mask in enumerate(masks):
    if not hasattr(mask, 'dtype') or not jnp.issubdtype(mask.dtype, jnp.bool_):
      raise ValueError(f'{function}: entry {i} of `valid` must be a bool array, True for rows that count, not '
                       f'{getattr(mask, "dtype", type(mask).__name__)}.')
  if not any(bool(jnp.any(mask)) for mask in masks):
    raise ValueError(f'{function}: `valid` leaves no row of any batch. Give data with at least one valid row.')
  return [jnp.asarray(mask) for mask in masks]


def validity(function: str, program: Program, valid: Array | None
             ) -> Callable[[Site], tuple[Array | None, Array | None]]:
  """Returns the function that says which entries of the operand and of the result at a site count, `None` for all.

  The function raises `ValueError` where the program does not tell which position a row comes from.
  """
  if valid is None:
    return lambda site: (None, None)
  found = origins(program, valid.shape, function)

  def counted(site: Site) -> tuple[Array | None, Array | None]:
    operand = 1 - site.use.operand
    origin = found[site.use.address][operand]
    if lost := rows_of(origin, site.eqn, operand):
      raise errors.at_leaf(function, site.path, site.weight.shape,
                           f'which rows of its input are valid cannot be told: {lost}. Leave the parameter out of '
                           '`where`, or give batches without padding and no `valid`.')
    return entries(origin, valid), entries(found[site.use.address][2], valid)

  return counted
