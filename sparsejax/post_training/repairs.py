"""Defines the repairs: a repair changes the weights of a pruned product, or its mask, so that its outputs change less.

A repair is a function `(stack, choose, statistic) -> stack`, see `recipe.Repair`. The functions here return repairs.
The first repair of a recipe without a score chooses the mask as well.

    sparsegpt = Recipe(NM(2, 4), score=None, statistic=calibration.gram, repairs=(columns(block=128),))
    refitted = wanda.then(least_squares())
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax import counts, hessians, scores
from sparsejax.arguments import checked
from sparsejax.post_training import one_by_one, parts
from sparsejax.post_training.columns import Sweep, swept
from sparsejax.post_training.exchanges import InputMoments, exchanged
from sparsejax.post_training.net_trim import trimmed
from sparsejax.post_training.recipe import STACKED, Chooser, Repair, Stack
from sparsejax.types import Array, Bound, Signals


class Grid(NamedTuple):
  """A `Grid` rounds weights to `2^bits` evenly spaced numbers for each output, of which one is zero.

  The numbers reach from the least to the largest weight of the output, zero included (Frantar et al. 2022, OBQ).
  """

  bits: int

  def fitted(self, w: Array) -> tuple[Array, Array]:
    """Returns the step of the grid and the number of steps below zero, each `[R]`, for weights `[R, K]`."""
    low, high = jnp.minimum(jnp.min(w, 1), 0), jnp.maximum(jnp.max(w, 1), 0)
    step = (high - low) / (2**self.bits - 1)
    step = jnp.where(step == 0, 1, step)
    return step, jnp.round(-low / step)

  def rounded(self, w: Array, grid: tuple[Array, Array]) -> Array:
    """Returns the numbers of the `grid`, as `fitted` gives it, that are closest to `w`."""
    step, below = grid
    return step * (jnp.clip(jnp.round(w / step) + below, 0, 2**self.bits - 1) - below)


@checked
def columns(block: int = 128, damping: float = 0.01, quantize: Grid | None = None) -> Repair:
  """Returns the repair that prunes column by column and compensates in the columns behind: SparseGPT, algorithm 1.

  Frantar and Alistarh 2023, 2301.00774. The masks of `block` columns at a time are chosen by `w^2 / U_jj^2`, N:M masks
  group by group. A mask that is as sparse as asked is kept. `damping` is a fraction of the mean diagonal of the Hessian
  over live inputs, and is raised tenfold while the Hessian has no factor. Weights of dead inputs become zero and count.
  `quantize` rounds the kept weights in the same sweep, as GPTQ does (Frantar et al. 2022), so that zeros stay zero.

  Deviations from the authors' code: the counts of all blocks add up to that of the matrix, where the code prunes one
  weight more in each block. Weights that were pruned before stay pruned, and dead inputs are not in the mean.
  """
  return Bound(_columns, (block, damping, quantize))


def _columns(stack: Stack, choose: Chooser, statistic: Any, block: int, damping: float, quantize: Grid | None) -> Stack:
  gram, length = _gram('columns', statistic), stack.dense.shape[2]
  if not parts.divides(choose, length):  # a unit is as long as the matrix
    values = scores.obs(stack.dense, Signals(stats=statistic, axes=STACKED), damping)
    return _swept(stack.kept(choose(values, stack.mask)), gram, None, damping, None, block, quantize)
  if min(block, length) % choose.group:
    raise ValueError(f'repairs.columns: block={block} would divide a group of {choose.pattern}. Use a multiple of '
                     f'{choose.group}, say {-(-block // choose.group) * choose.group}.')
  return _swept(stack, gram, parts.shares(stack.mask, choose, min(block, length)), damping, choose, block, quantize)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _swept(stack: Stack, gram: Array, told: Any, damping: Any, choose: Chooser | None, block: int,
           quantize: Grid | None) -> Stack:
  def one(factor: hessians.InverseFactor, gram: Array, row: Any) -> tuple[Array, Array]:
    dense, among, own = row
    sweep = _sweep(among.T, own, choose, min(block, len(gram)))
    if quantize is not None:
      sweep = sweep._replace(rounded=functools.partial(quantize.rounded, grid=quantize.fitted(dense)))
    w, mask = swept(jnp.where(factor.dead[None], 0, dense).T, factor.upper, sweep)
    return w.T, mask.T

  return _each(one, stack, gram, damping, (stack.dense, stack.mask, told))


def _sweep(among: Array, told: Any, choose: Chooser | None, block: int) -> Sweep:
  """Returns the sweep that chooses among the weights `among`, `[K, R]`, or that keeps all of them."""
  def chosen(values: Array, start: Any) -> Array:
    own = lax.dynamic_slice_in_dim(among, start, len(values), 0)
    share = None if told is None else lax.dynamic_index_in_dim(told, start // block, 0, keepdims=False)
    return own if choose is None else parts.best_of_part(choose, values, own, share)

  return Sweep(block, block if choose is None or told is not None else choose.group, chosen)


@checked
def greedy(damping: float = 0.01, rows: int = 32) -> Repair:
  """Returns the repair that prunes one unit at a time, the one that costs least: OBC, algorithm 1.

  Frantar et al. 2022, Optimal Brain Compression, 2208.11580. Exact at each step and given its mask, but not the best
  mask. All outputs share the count by the losses of their own steps; with `balanced` patterns and N:M each output keeps
  its own count. `rows`: how many outputs are computed at a time, each with an inverse Hessian of its own. A unit of the
  pattern has to lie in one output.

  Deviations from the authors' code: the weights are those of one least-squares solution a row, which are the same. A
  Hessian without a factor is damped in steps, relative to its diagonal, where the code adds 1. A mask that is chosen
  already is refined: its zeros are removed first.
  """
  return Bound(_greedy, (damping, rows))


def _greedy(stack: Stack, choose: Chooser, statistic: Any, damping: float, rows: int) -> Stack:
  gram = _gram('greedy', statistic)
  width, group = _unit(choose)
  losses, step = _removed(stack, gram, damping, width, group, rows)
  if group is None:
    # The steps that the count keeps are those with the largest losses; a row takes as many steps as are not kept.
    kept = choose(jnp.repeat(losses, width, 2), jnp.ones(stack.mask.shape, bool))
    taken = (kept.shape[2] - jnp.sum(kept, 2, keepdims=True)) // width
  else:
    taken = losses.shape[2]
  mask = jnp.repeat(step >= taken, width, 2) & stack.mask
  return _fitted(stack._replace(mask=mask), gram, damping, rows)


def _unit(choose: Chooser) -> tuple[int, tuple[int, int] | None]:
  """Returns how many inputs a unit of the pattern has, and (n, m) of N:M."""
  pattern, (size, weights) = choose.pattern, counts.units(choose.pattern, (1, choose.pattern.group[1], choose.group),
                                                          STACKED)
  if getattr(pattern, 'fixed', False) and weights == 1:
    return 1, (counts.kept_of(pattern.sparsity, size), size)
  if weights != choose.group or not parts.divides(choose, 2 * choose.group):
    raise ValueError(f'repairs.greedy: a unit of {pattern} has weights of several outputs, or all weights of one; '
                     'greedy removes units inside of one output. Use repairs.columns, or Unstructured, N:M or Block '
                     'of (k, 1).')
  return weights, None


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _removed(stack: Stack, gram: Array, damping: Any, width: int, group: Any, rows: int) -> tuple[Array, Array]:
  def one(factor: hessians.InverseFactor, gram: Array, row: Any) -> one_by_one.Removals:
    inverse = jnp.matmul(factor.upper.T, factor.upper, precision=lax.Precision.HIGHEST)
    w = jnp.where(factor.dead[None], 0, row[0])
    return one_by_one.removals(w, row[1], inverse, width=width, group=group, rows=rows)

  return _over_layers(one, gram, damping, (stack.dense, stack.mask))[1]


@checked
def least_squares(damping: float = 0.01, rows: int = 32) -> Repair:
  """Returns the repair that gives the kept weights their best values: the least squared output error of the mask.

  The optimum of Optimal Brain Surgeon for a given mask (Hassibi and Stork 1993), one solution a row. `damping` keeps
  the weights near their dense values, as a fraction of the mean diagonal of the Hessian; 0 minimises the error itself.
  """
  return Bound(_least_squares, (damping, rows))


def _least_squares(stack: Stack, choose: Chooser, statistic: Any, damping: float, rows: int) -> Stack:
  del choose
  return _fitted(stack, _gram('least_squares', statistic), damping, rows)


@functools.partial(jax.jit, static_argnums=(3,))
def _fitted(stack: Stack, gram: Array, damping: Any, rows: int) -> Stack:
  def one(factor: hessians.InverseFactor, gram: Array, row: Any) -> tuple[Array, Array]:
    dense, mask = row
    return one_by_one.best_weights(dense, mask, hessians.damped(gram, factor.damping), rows=rows), mask

  return _each(one, stack, gram, damping, (stack.dense, stack.mask))


@checked
def rounding(quantize: Grid, damping: float = 0.01, rows: int = 32) -> Repair:
  """Returns the repair that rounds kept weights one by one, each compensated by those not yet rounded: OBQ.

  The half of Optimal Brain Compression (Frantar et al. 2022, section 5) that quantises a pruned layer: its zeros stay.
  The grid is that of the present weights.
  """
  return Bound(_rounding, (quantize, damping, rows))


def _rounding(stack: Stack, choose: Chooser, statistic: Any, quantize: Grid, damping: float, rows: int) -> Stack:
  del choose
  return _rounded(stack, _gram('rounding', statistic), damping, quantize, rows)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded(stack: Stack, gram: Array, damping: Any, quantize: Grid, rows: int) -> Stack:
  def one(factor: hessians.InverseFactor, gram: Array, row: Any) -> tuple[Array, Array]:
    w, mask = row
    hessian = hessians.damped(gram, factor.damping)
    return one_by_one.roundings(w, mask, hessian, quantize.fitted(w), quantize.rounded, rows=rows), mask

  return _each(one, stack, gram, damping, (stack.w, stack.mask))


@checked
def swaps(cycles: int = 50, threshold: float = 4.9e-5, guard: bool = True, power: float = 1.0) -> Repair:
  """Returns the repair that exchanges kept and pruned weights of an output: DSnoT (Zhang et al. 2023, 2310.08915).

  Each of up to `cycles` exchanges reduces the error of the mean output, until it is at most `threshold`. Kept weights
  have their dense values, and every output keeps its count. The statistic is `calibration.moments`. `guard`: an output
  stops before its error changes sign. Without it, as published, the squared error often rises. `power` is that of the
  variance, by which an input's term is divided.

  Deviations from the authors' code: means are those of a token, and so is `threshold` (0.1 for a sequence of 2048). An
  output is done where the code would take a weight of the wrong sign, a kept weight twice, or an index out of bounds.
  """
  return Bound(_swaps, (cycles, threshold, guard, power))


def _swaps(stack: Stack, choose: Chooser, statistic: Any, cycles: int, threshold: float, guard: bool,
           power: float) -> Stack:
  if getattr(statistic, 'within', None) is None:
    raise ValueError('repairs.swaps: needs the means and variances of the inputs; give the recipe '
                     '`statistic=calibration.moments`.')
  group = choose.group if getattr(choose.pattern, 'fixed', False) else None
  if counts.units(choose.pattern, (1, choose.pattern.group[1], 2 * choose.group), STACKED)[1] != 1:
    raise ValueError(f'repairs.swaps: {choose.pattern} prunes several weights together, and swaps exchanges single '
                     'ones. Use Unstructured or N:M.')
  return stack.kept(_exchanged(stack, statistic, threshold, power, cycles, guard, group))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _exchanged(stack: Stack, statistic: Any, threshold: Any, power: Any, cycles: int, guard: bool,
               group: int | None) -> Array:
  rows = jnp.maximum(statistic.rows, 1).astype(jnp.float32)[:, None]
  means = [jnp.broadcast_to(x / rows, stack.dense.shape[::2]) for x in (statistic.total, statistic.within)]
  inputs = InputMoments(*means)
  values = scores.wanda(stack.dense, Signals(stats=statistic, axes=STACKED))
  one = lambda row: exchanged(*row, cycles=cycles, threshold=threshold, guard=guard, power=power, group=group)
  return lax.map(one, (stack.dense, stack.mask, values, inputs))


@checked
def convex(epsilon: float = 0.1, rho: float = 10.0, iterations: int = 2000) -> Repair:
  """Returns the repair that minimises the sum of absolute weights: Net-Trim (Aghasi et al. 2017, 1611.05162), linear.

  The outputs on the calibration rows change by at most `epsilon`, a fraction of their norm. `rho` and `iterations` are
  those of ADMM. The mask is then chosen by the magnitudes of the solution, which keep their values. Deviation: the
  solution has no exact count, so that what is pruned beyond its zeros adds to the error. `net_trim.trimmed` solves the
  program of layers that a ReLU follows, which needs all rows.
  """
  return Bound(_convex, (epsilon, rho, iterations))


def _convex(stack: Stack, choose: Chooser, statistic: Any, epsilon: float, rho: float, iterations: int) -> Stack:
  solved = _trimmed(stack, _gram('convex', statistic), epsilon, rho, iterations)
  mask = choose(jnp.abs(solved.w), stack.mask)
  return solved._replace(w=jnp.where(mask & (solved.w != 0), solved.w, 0), mask=mask)


@functools.partial(jax.jit, static_argnums=(4,))
def _trimmed(stack: Stack, gram: Array, epsilon: Any, rho: Any, iterations: int) -> Stack:
  def one(factor: hessians.InverseFactor, gram: Array, row: Any) -> tuple[Array, Array]:
    dense, mask = row
    root = lax.linalg.cholesky(hessians.damped(gram, factor.damping), symmetrize_input=False)
    most = epsilon * jnp.linalg.norm(jnp.matmul(dense, root, precision=lax.Precision.HIGHEST))
    return trimmed(dense.T, root, most, rho=rho, iterations=iterations).T, mask

  return _each(one, stack, gram, hessians.LEAST, (stack.dense, stack.mask))


def _each(function: Callable[..., tuple[Array, Array]], stack: Stack, gram: Array, damping: Any, rows: Any) -> Stack:
  """Returns the stack with the weights and masks that `function` gives for each of its matrices."""
  factors, (w, mask) = _over_layers(function, gram, damping, rows)
  as_many = lambda x: jnp.broadcast_to(x, stack.damping.shape).astype(jnp.result_type(x))
  return stack._replace(w=w.astype(stack.w.dtype), mask=mask, damping=as_many(factors[0]), raised=as_many(factors[1]))


def _over_layers(function: Callable[..., Any], gram: Array, damping: Any, rows: Any) -> Any:
  """Returns damping and times raised of all Gram matrices, and `function(factor, gram, row)` of each matrix, stacked.

  Matrices that read the same inputs share a factor. Only one factor is in memory at a time.
  """
  if len(gram) == 1:
    factor = hessians.inverse_factor(gram[0], damping)
    found = lax.map(lambda row: function(factor, gram[0], row), rows)
    return (factor.damping[None], factor.raised[None]), found

  def one(pair: Any) -> Any:
    factor = hessians.inverse_factor(pair[0], damping)
    return (factor.damping, factor.raised), function(factor, *pair)

  return lax.map(one, (gram, rows))


def _gram(repair: str, statistic: Any) -> Array:
  """Returns the Gram matrices of a statistic, `[L, K, K]` or `[1, K, K]`."""
  if getattr(statistic, 'gram', None) is None:
    raise ValueError(f'repairs.{repair}: needs the Gram matrix of the inputs; give the recipe '
                     '`statistic=calibration.gram`.')
  return statistic.gram
