"""Defines the repairs: a repair changes the weights of a pruned product, or its mask, so that its outputs change less.

A repair is a function `(stack, choose, statistic) -> stack`, see `recipe.Repair`. The functions here return repairs.
The first repair of a recipe without a score chooses the mask as well.

    sparsegpt = Recipe(NM(2, 4), score=None, statistic=calibration.gram, repairs=(columns(block=128),))
    refitted = wanda.then(least_squares())
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import counts, hessians, patterns, scores
from sparsejax.arguments import checked
from sparsejax.post_training import held, one_by_one, parts
from sparsejax.post_training.columns import Sweep, swept
from sparsejax.post_training.exchanges import InputMoments, exchanged
from sparsejax.post_training.net_trim import trimmed
from sparsejax.post_training.recipe import STACKED, Chooser, Factors, Repair, Stack, Weighed
from sparsejax.post_training.wrapped import factorised, product
from sparsejax.types import FACTORS, Array, Bound, Signals, hashes


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
  settled, told = not parts.divides(choose, length), None
  if settled:  # a unit is as long as the matrix
    values = scores.obs(stack.dense, Signals(stats=statistic, axes=STACKED), damping)
    stack = stack.kept(choose(values, stack.mask))
  elif min(block, length) % choose.group:
    raise ValueError(f'repairs.columns: block={block} would divide a group of {choose.pattern}. Use a multiple of '
                     f'{choose.group}, say {-(-block // choose.group) * choose.group}.')
  else:
    told = parts.shares(stack.mask, choose, min(block, length))
  static = None if settled else choose, min(block, length), quantize
  sweep = swept_layer if hashes(static) else inspect.unwrap(swept_layer)
  return _repaired(stack, gram, damping, functools.partial(sweep, stack.dense, stack.mask, told, static))


@functools.partial(jax.jit, static_argnums=3)
def swept_layer(dense: Array, mask: Array, told: Any, static: Any, layer: Any, factor: hessians.InverseFactor,
                gram: Array | None = None) -> tuple[Array, Array]:
  """Returns the weights and the mask of one layer of a stack, pruned by columns, `[R, K]`.

  `told` is that of `parts.shares`. `static` is the chooser, or `None` to keep the mask, the block and the grid.
  """
  del gram
  choose, block, quantize = static
  w, among, own = _of_layer((dense, mask, told), layer)
  sweep = _sweep(among, own, choose, block)
  if quantize is not None:
    sweep = sweep._replace(rounded=functools.partial(quantize.rounded, grid=quantize.fitted(w)))
  return swept(jnp.where(factor.dead[None], 0, w), factor.reversed, sweep)


def _sweep(among: Array, told: Any, choose: Chooser | None, block: int) -> Sweep:
  """Returns the sweep that chooses among the weights `among`, `[R, K]`, or that keeps all of them."""
  def chosen(values: Array, start: Any) -> Array:
    own = lax.dynamic_slice_in_dim(among, start, len(values), 1).T
    share = None if told is None else lax.dynamic_index_in_dim(told, start // block, 0, keepdims=False)
    return own if choose is None else parts.best_of_part(choose, values, own, share)

  return Sweep(block, block if choose is None or told is not None else choose.group, chosen)


@checked
def greedy(damping: float = 0.01, rows: int = 32) -> Repair:
  """Returns the repair that prunes one unit at a time, the one that costs least: OBC, algorithm 1.

  Frantar et al. 2022, Optimal Brain Compression, 2208.11580. Exact at each step and given its mask, but not the best
  mask. All outputs share the count by the losses of their own steps; with `balanced` patterns and N:M each output keeps
  its own count. `rows`: how many outputs are computed at a time, each with an inverse Hessian of its own; fewer where
  these are large. A unit of the pattern has to lie in one output.

  Deviations from the authors' code: the weights are those of one least-squares solution a row, which are the same. A
  Hessian without a factor is damped in steps, relative to its diagonal, where the code adds 1. A mask that is chosen
  already is refined: its zeros are removed first.
  """
  return Weighed(_greedy, (damping, rows), numbers=held.of_rows)


def _greedy(stack: Stack, choose: Chooser, statistic: Any, damping: float, rows: int) -> Stack:
  gram = _gram('greedy', statistic)
  width, group = _unit(choose)
  removed = functools.partial(_removed, stack.dense, stack.mask, (width, group, rows))
  _, (losses, step) = _over_layers(removed, len(stack.dense), gram, damping)
  taken: Any = losses.shape[2]
  if group is None:
    # The steps that the count keeps are those with the largest losses; a row takes as many steps as are not kept.
    kept = choose(jnp.repeat(losses, width, 2), jnp.ones(stack.mask.shape, bool))
    taken = (kept.shape[2] - jnp.sum(kept, 2, keepdims=True)) // width
  mask = jnp.repeat(step >= taken, width, 2) & stack.mask
  return _least_squares(stack._replace(mask=mask), choose, statistic, damping, rows)


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


@functools.partial(jax.jit, static_argnums=2)
def _removed(dense: Array, mask: Array, static: Any, layer: Any, factor: hessians.InverseFactor,
             gram: Array) -> one_by_one.Removals:
  del gram
  w, kept = _of_layer((dense, mask), layer)
  inverse = jnp.matmul(factor.upper.T, factor.upper, precision=lax.Precision.HIGHEST)
  width, group, rows = static
  return one_by_one.removals(jnp.where(factor.dead[None], 0, w), kept, inverse, width=width, group=group, rows=rows)


@checked
def least_squares(damping: float = 0.01, rows: int = 32) -> Repair:
  """Returns the repair that gives the kept weights their best values: the least squared output error of the mask.

  The optimum of Optimal Brain Surgeon for a given mask (Hassibi and Stork 1993), one solution a row. `damping` keeps
  the weights near their dense values, as a fraction of the mean diagonal of the Hessian; 0 minimises the error itself.
  """
  return Weighed(_least_squares, (damping, rows), numbers=held.of_rows)


def _least_squares(stack: Stack, choose: Chooser, statistic: Any, damping: float, rows: int) -> Stack:
  del choose
  fitted = functools.partial(_fitted, stack.dense, stack.mask, (_most(stack.mask), rows))
  return _repaired(stack, _gram('least_squares', statistic), damping, fitted)


@functools.partial(jax.jit, static_argnums=2)
def _fitted(dense: Array, mask: Array, static: Any, layer: Any, factor: hessians.InverseFactor,
            gram: Array) -> tuple[Array, Array]:
  (w, kept), (most, rows) = _of_layer((dense, mask), layer), static
  return one_by_one.best_weights(w, kept, _hessian(gram, layer, factor), most=most, rows=rows), kept


def _most(mask: Array) -> int:
  """Returns how many weights the fullest output keeps, rounded up to an eighth of the inputs: programs then recur."""
  length, part = mask.shape[2], -(-mask.shape[2] // 8)
  return min(-(-int(jnp.max(jnp.sum(mask, 2))) // part) * part, length)


@checked
def rounding(quantize: Grid, damping: float = 0.01, rows: int = 32) -> Repair:
  """Returns the repair that rounds kept weights one by one, each compensated by those not yet rounded: OBQ.

  The half of Optimal Brain Compression (Frantar et al. 2022, section 5) that quantises a pruned layer: its zeros stay.
  The grid is that of the present weights.
  """
  return Weighed(_rounding, (quantize, damping, rows), numbers=held.of_rows)


def _rounding(stack: Stack, choose: Chooser, statistic: Any, quantize: Grid, damping: float, rows: int) -> Stack:
  del choose
  rounded = functools.partial(_rounded, stack.w, stack.mask, (quantize, _most(stack.mask), rows))
  return _repaired(stack, _gram('rounding', statistic), damping, rounded)


@functools.partial(jax.jit, static_argnums=2)
def _rounded(w: Array, mask: Array, static: Any, layer: Any, factor: hessians.InverseFactor,
             gram: Array) -> tuple[Array, Array]:
  (own, kept), (quantize, most, rows) = _of_layer((w, mask), layer), static
  hessian, grid = _hessian(gram, layer, factor), quantize.fitted(own)
  return one_by_one.roundings(own, kept, hessian, grid, quantize.rounded, most=most, rows=rows), kept


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
  return Weighed(_swaps, (cycles, threshold, guard, power), numbers=held.of_swaps)


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
  rows = jnp.maximum(statistic.rows, 1).astype(statistic.square.dtype)[:, None]
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
  return Weighed(_convex, (epsilon, rho, iterations), numbers=held.of_convex)


def _convex(stack: Stack, choose: Chooser, statistic: Any, epsilon: float, rho: float, iterations: int) -> Stack:
  solved = _repaired(stack, _gram('convex', statistic), hessians.LEAST,
                     functools.partial(_trimmed, stack.dense, stack.mask, (rho, iterations), epsilon))
  mask = choose(jnp.abs(solved.w), stack.mask)
  return solved._replace(w=jnp.where(mask & (solved.w != 0), solved.w, 0), mask=mask)


@functools.partial(jax.jit, static_argnums=2)
def _trimmed(dense: Array, mask: Array, static: Any, epsilon: Any, layer: Any, factor: hessians.InverseFactor,
             gram: Array) -> tuple[Array, Array]:
  (w, kept), (rho, iterations) = _of_layer((dense, mask), layer), static
  root = lax.linalg.cholesky(_hessian(gram, layer, factor), symmetrize_input=False)
  most = epsilon * jnp.linalg.norm(jnp.matmul(w, root, precision=lax.Precision.HIGHEST))
  return trimmed(w.T, root, most, rho=rho, iterations=iterations).T, kept


@checked
def wrapped(block: int = 32, iterations: int = 3000, learning_rate: float = 1e-4, seed: int = 0) -> Repair:
  """Returns the repair that writes each matrix as a 2:4 core between block-diagonal matrices: ARMOR (Liu et al. 2025).

  See `wrapped.factorised` for the algorithm and its deviation. The pattern is NM(2, 4), and the statistic has the mean
  squares of the inputs. The products are dense, so that `prune` returns these parameters as `formats.Wrapped`. Raises
  `ValueError` for another pattern, for weights that are pruned already, and for sizes that `block` does not divide.
  """
  return Weighed(_wrapped, (block, iterations, learning_rate, seed), (FACTORS,), numbers=held.of_wrapped)


def _wrapped(stack: Stack, choose: Chooser, statistic: Any, block: int, iterations: int, rate: float,
             seed: int) -> Stack:
  if choose.pattern != patterns.NM(2, 4):
    raise ValueError(f'repairs.wrapped: the core is 2:4, and the pattern {choose.pattern}. Use NM(2, 4).')
  if not bool(jnp.all(stack.mask | (stack.dense != 0))):
    raise ValueError('repairs.wrapped: weights are pruned already, and the product of the factors has no zeros. Pass '
                     'keep=False to prune, or take another recipe.')
  rows = jnp.maximum(statistic.rows, 1).astype(statistic.square.dtype)[:, None]
  square = jnp.broadcast_to(statistic.square / rows, stack.dense.shape[::2])
  made = [factorised(w, own, key=jax.random.fold_in(jax.random.key(seed), layer), block=block, iterations=iterations,
                     learning_rate=rate) for layer, (w, own) in enumerate(zip(stack.dense, square))]
  factors = Factors(*(jnp.stack([getattr(each, name) for each in made]) for name in Factors._fields))
  return stack._replace(w=jax.vmap(product)(*factors), mask=factors.core != 0, factors=factors)


def _repaired(stack: Stack, gram: Array, damping: float, function: Callable[..., tuple[Array, Array]]) -> Stack:
  """Returns the stack with the weights and the masks that `function` gives for each of its layers."""
  (used, raised), (w, mask) = _over_layers(function, len(stack.dense), gram, damping)
  as_many = lambda numbers: jnp.broadcast_to(jnp.stack(numbers), len(stack.dense))
  return stack._replace(w=w, mask=mask, damping=as_many(used), raised=as_many(raised))


def _over_layers(function: Callable[..., Any], layers: int, gram: Array, damping: float) -> Any:
  """Returns what `function(layer, factor, gram)` gives, stacked, behind the dampings and the times that they rose.

  Layers that read the same inputs share a factor. Only one factor is in memory at a time.
  """
  found: list[Any] = []
  used: list[Array] = []
  raised: list[Array] = []
  for layer in map(np.int32, range(layers)):
    if layer < len(gram):
      factor = hessians.inverse_factor(gram, damping, layer)
      used, raised = [*used, factor.damping], [*raised, factor.raised]
    found.append(function(layer, factor, gram))
  return (used, raised), jax.tree.map(lambda *rows: jnp.stack(rows), *found)


def _hessian(gram: Array, layer: Any, factor: hessians.InverseFactor) -> Array:
  return hessians.damped(_of_layer(gram, layer), factor.damping)


def _of_layer(arrays: Any, layer: Any) -> Any:
  """Returns one layer of each array; an array of one layer has the same for all."""
  return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), arrays)


def _gram(repair: str, statistic: Any) -> Array:
  """Returns the Gram matrices of a statistic, `[L, K, K]` or `[1, K, K]`."""
  if getattr(statistic, 'gram', None) is None:
    raise ValueError(f'repairs.{repair}: needs the Gram matrix of the inputs; give the recipe '
                     '`statistic=calibration.gram`.')
  return statistic.gram
