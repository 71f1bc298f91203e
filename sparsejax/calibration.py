"""Statistics of what a product is given, collected over batches: a recipe of pruning names the statistic that it needs.

A statistic is a function from the `Rows` of one batch to a NamedTuple of arrays. `add` adds two of them, in any
grouping, so that batches and shards can be summed in parts. Each tuple counts its rows.

    statistic = add(moments(Rows(x0)), moments(Rows(x1)))     # `x` is `[L, T, K]`: L matrices, T tokens, K inputs
    statistic.square / statistic.rows[:, None]                # the mean of the squares of each input, `[L, K]`

`Magnitudes` is a histogram of the magnitudes of inputs, for thresholds that skip a given share of them.

`recalibrated` measures the statistics of batch norms anew, after weights have changed. `distilled` makes inputs that
have the statistics which a model has recorded, where no data are at hand.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparsejax import trees
from sparsejax.arguments import checked
from sparsejax.types import Array, PyTree

__all__ = ['Gram', 'Magnitudes', 'Moments', 'Rows', 'add', 'gram', 'magnitudes', 'moments', 'recalibrated']


class Rows(NamedTuple):
  """A `Rows` holds the rows that a stack of L matrices was multiplied by in one batch.

  `x`: `[L, T, K]`, or `[1, T, K]` if all matrices are given the same rows. `valid`: `bool[L, T]` or `bool[1, T]`,
  `False` for rows that do not count (padding, tokens of another expert); `None` counts all rows.
  """

  x: Array
  valid: Array | None = None

  @property
  def counted(self) -> Array:
    """The mask of the rows that count, `bool[L, T]` or `bool[1, T]`."""
    return jnp.ones(self.x.shape[:2], bool) if self.valid is None else self.valid

  @property
  def finite(self) -> Array:
    """Whether all rows that count are free of NaN and infinities, `bool[]`."""
    return jnp.all(jnp.isfinite(self.x) | ~self.counted[..., None])


class Moments(NamedTuple):
  """A `Moments` holds sums over the rows of each input of L matrices.

  `rows`: `int32[L]`, how many rows were counted. `total`, `square`: `[L, K]`, `float32` or, of `float64` rows,
  `float64`: the sums of `x` and of `x^2`.
  `within`: `[L, K]`, the sum over batches of the batch's rows times the (biased) variance within the batch.
  """

  rows: Array
  total: Array
  square: Array
  within: Array


class Gram(NamedTuple):
  """A `Gram` holds the sums of `x x^T` over the rows of L matrices, not divided by their number and not damped.

  `rows`: `int32[L]`. `total`: `[L, K]`, the sum of `x`. `gram`: `[L, K, K]`, `float32` or `float64`.
  """

  rows: Array
  total: Array
  gram: Array

  @property
  def square(self) -> Array:
    """The sums of `x^2`, `[L, K]`: the diagonal of `gram`."""
    return jnp.diagonal(self.gram, axis1=-2, axis2=-1)


Statistic = Callable[[Rows], Any]


@jax.jit
def moments(rows: Rows) -> Moments:
  """Returns the `Moments` of the rows of one batch."""
  count, total, valid = _sums(rows)
  square = jnp.einsum('lt,ltk->lk', valid, jnp.square(_zeroed(rows)), precision=lax.Precision.HIGHEST)
  mean = total / jnp.maximum(count, 1).astype(total.dtype)[:, None]
  return Moments(count, total, square, square - mean * total)


@jax.jit
def gram(rows: Rows) -> Gram:
  """Returns the `Gram` of the rows of one batch, one matrix after the other, in the highest precision of the device."""
  count, total, valid = _sums(rows)
  x = jnp.broadcast_to(_zeroed(rows), (valid.shape[0], *rows.x.shape[1:])) if len(rows.x) > 1 else _zeroed(rows)

  def one(l: Array) -> Array:
    own = lax.dynamic_index_in_dim(x, jnp.minimum(l, len(x) - 1), 0, keepdims=False)
    weight = lax.dynamic_index_in_dim(valid, l, 0, keepdims=False)
    return jnp.matmul((own * weight[:, None]).T, own, precision=lax.Precision.HIGHEST)

  return Gram(count, total, lax.map(one, jnp.arange(len(valid))))


class Magnitudes(NamedTuple):
  """A `Magnitudes` is a histogram of the magnitudes of the entries of the rows of L matrices, scaled by input.

  `counts`: `[L, 2^15]`, how many entries have the same leading 15 bits after the sign: 128 bins an octave, without a
  range to choose. `sums`: `float32[L, 2^15]`, the sum of the magnitudes in a bin. `total`: `[L, K]`, the sum of the
  magnitudes of each input, not scaled. `rows`: `int32[L]`.
  """

  rows: Array
  counts: Array
  sums: Array
  total: Array

  def quantile(self, fraction: float) -> np.ndarray:
    """Returns the magnitude below which lies this fraction of the entries, `float32[L]`.

    The mean of each bin that holds entries stands at the fraction of the entries up to and with the bin. Between bins
    the quantile is linear, and below the first it is the mean of the first (as in the code of WINA, Chen et al. 2025,
    2505.19427, on values in float16). Raises `ValueError` for a matrix of which no row was counted.
    """
    return np.stack([_quantile(counts, sums, fraction)
                     for counts, sums in zip(np.asarray(self.counts), np.asarray(self.sums))])


def _quantile(counts: np.ndarray, sums: np.ndarray, fraction: float) -> np.float32:
  there = counts > 0
  if not there.any():
    raise ValueError('calibration.Magnitudes: no row was counted; give data with at least one valid row.')
  ends = np.cumsum(counts[there], dtype=np.float64) / counts.sum(dtype=np.float64)
  return np.float32(np.interp(fraction, ends, sums[there] / counts[there]))


@jax.jit
def magnitudes(rows: Rows, scale: Array | float = 1.0) -> Magnitudes:
  """Returns the `Magnitudes` of the rows of one batch, each entry times the `scale` of its input, `[L, K]`."""
  counted = rows.counted[..., None]
  size = jnp.where(counted, jnp.abs(rows.x.astype(jnp.float32)), 0)
  scaled = size * jnp.reshape(jnp.asarray(scale, jnp.float32), (-1, 1, jnp.shape(scale)[-1] if jnp.ndim(scale) else 1))
  stack, (t, k) = max(len(scaled), len(counted)), scaled.shape[1:]
  scaled, there = (jnp.broadcast_to(a, (stack, t, k)).reshape(stack, -1) for a in (scaled, counted))
  bins = lax.bitcast_convert_type(scaled, jnp.uint32) >> jnp.uint32(16)
  add = lambda into, weights: jax.vmap(lambda i, w: jnp.zeros(2**15, w.dtype).at[i].add(w, mode='drop'))(into, weights)
  return Magnitudes(jnp.broadcast_to(jnp.sum(rows.counted, 1, dtype=jnp.int32), (stack,)),
                    add(bins, there.astype(jnp.int32)), add(bins, jnp.where(there, scaled, 0)),
                    jnp.broadcast_to(jnp.sum(size, 1), (stack, k)))


def add(a: Any, b: Any) -> Any:
  """Returns the statistic of the rows of both statistics."""
  return jax.tree.map(jnp.add, a, b)


def wide(x: Array) -> Array:
  """Returns `x` as `float32`, or as it is if it is `float64`: the dtype in which sums are taken."""
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _zeroed(rows: Rows) -> Array:
  """Returns `x` in the dtype of its sums, with zeros for rows that count for no matrix: NaN in padding is no NaN."""
  anywhere = jnp.any(rows.counted, 0)
  return jnp.where(anywhere[None, :, None], wide(rows.x), 0)


def _sums(rows: Rows) -> tuple[Array, Array, Array]:
  """Returns the number of rows `int32[L]`, the sums of `x`, and the rows that count as `[L, T]` of the same dtype."""
  stack = max(len(rows.x), len(rows.counted))
  counted = jnp.broadcast_to(rows.counted, (stack, rows.x.shape[1]))
  valid = counted.astype(rows.x.dtype if rows.x.dtype == jnp.float64 else jnp.float32)
  total = jnp.einsum('lt,ltk->lk', valid, _zeroed(rows), precision=lax.Precision.HIGHEST)
  return jnp.sum(counted, 1, dtype=jnp.int32), total, valid


@checked
def recalibrated(update: Callable[[PyTree, Any], PyTree], running: PyTree, batches: Iterable[Any]) -> PyTree:
  """Returns the running statistics of batch norms, measured anew: the mean over `batches` of each batch's statistic.

  Weights that were pruned or rounded give other means and variances than those that training has recorded. `running`:
  the recorded statistics. `update(running, batch)` returns these after one forward pass in training mode. With Flax:

      update = lambda stats, x: model.apply({'params': params, 'batch_stats': stats}, x, mutable=['batch_stats'],
                                            use_running_average=False)[1]['batch_stats']
      stats = calibration.recalibrated(update, stats, batches)

  The momentum need not be known: `update` is linear in the recorded statistics, and its results for zeros and for ones
  give the momentum and the statistic of the batch. Batches count alike, as in `update_bn` of Izmailov et al. 2018,
  1803.05407. Leaves that are no floats stay. Raises `ValueError` without a batch, for a statistic that is not finite,
  and for a leaf that is no running mean.
  """
  paths, leaves, structure = trees.flatten(running)
  is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
  filled = lambda value: structure.unflatten([_filled(leaf, value) for leaf in leaves])
  run = jax.jit(lambda running, batch: trees.flatten(update(running, batch))[1])
  total, number, momentum = [jnp.zeros_like(leaf) for leaf in leaves], 0, None
  for batch in batches:
    low = run(filled(0), batch)
    if momentum is None:
      momentum = [high - low for high, low in zip(run(filled(1), batch), low)]
      _refuse_other_leaves(paths, is_float, leaves, low, momentum, run(running, batch))
    total, number = [a + b for a, b in zip(total, low)], number + 1
  if momentum is None:
    raise ValueError('calibration.recalibrated: there is no batch; give at least one.')
  found = [a / (number * (1 - m)) if own else a for a, m, own in zip(total, momentum, is_float)]
  for path, new in zip(paths, found):
    if not bool(jnp.all(jnp.isfinite(new))):
      raise ValueError(f'calibration.recalibrated: the statistic of {path!r} is not finite. Look at the batches.')
  return structure.unflatten([new if own else leaf for leaf, own, new in zip(leaves, is_float, found)])


def distilled(statistics: Callable[[Any], PyTree], recorded: PyTree, start: PyTree, *,
              generate: Callable[[PyTree], Any] = lambda latent: latent, steps: int = 500,
              learning_rate: float = 0.5) -> Any:
  """Returns inputs whose statistics are close to those that a model has recorded: data for `sj.prune` without data.

  ZeroQ (Cai et al. 2020, 2001.00281, equation 1). `statistics(inputs)` runs the model and returns, for example, the
  means and standard deviations that each batch norm gets. `recorded` is a tree like it. Leaves of `statistics` may have
  leading axes more, as for each example. `start` is what Adam changes: noise like the inputs, by default. With
  `generate(start)`, it holds latents and the parameters of a generator: Genie (Jeon et al. 2023, 2212.04780), whose
  rounding is the quantizer's affair. The best inputs of all steps are returned. The rate halves where 50 steps bring
  nothing.

  Deviation: the authors' code pairs convolutions with batch norms by their order, and here `statistics` says what is
  compared. Raises `ValueError` for trees that differ, and where the first loss, or the loss after the first step, is
  not finite.
  """
  found = jax.eval_shape(lambda each: statistics(generate(each)), start)
  own, wanted = (str(jax.tree.structure(tree)) for tree in (found, recorded))
  if own != wanted:
    raise ValueError(f'calibration.distilled: statistics() returns {own}, and `recorded` is {wanted}. Return the same '
                     'tree.')
  loss = lambda each: _distance(statistics(generate(each)), recorded)
  tx = optax.chain(optax.adam(learning_rate), optax.contrib.reduce_on_plateau(factor=0.5, patience=50))

  @jax.jit
  def step(now: PyTree, state: Any, best: PyTree, least: Array) -> Any:
    value, slope = jax.value_and_grad(loss)(now)
    best = jax.tree.map(lambda new, old: jnp.where(value < least, new, old), now, best)
    update, state = tx.update(slope, state, now, value=value)
    return optax.apply_updates(now, update), state, best, jnp.fmin(value, least), value

  first = jax.jit(loss)(start)
  if not bool(jnp.isfinite(first)):
    raise ValueError('calibration.distilled: the statistics of `start` are not finite. Start nearer to the data.')
  now, best, least = start, start, first
  with jax.numpy_dtype_promotion('standard'):  # Adam counts its steps in int32
    state = tx.init(start)
    for i in range(steps):
      now, state, best, least, value = step(now, state, best, least)
      if i == 1 and not bool(jnp.isfinite(value)):
        raise ValueError('calibration.distilled: the first step makes the loss infinite or NaN. A standard deviation '
                         'of zero has no slope: add a small number under its root, or lower learning_rate=.')
  return generate(best)


def _distance(found: PyTree, recorded: PyTree) -> Array:
  """Returns the sum over leaves of the squared distance, a mean over the axes that `recorded` does not have."""
  apart = lambda a, b: jnp.sum(jnp.square(a - jnp.broadcast_to(b, a.shape))) / max(a.size // max(jnp.size(b), 1), 1)
  return sum(jax.tree.leaves(jax.tree.map(apart, found, recorded)), jnp.zeros(()))


def _filled(leaf: Array, value: float) -> Array:
  return jnp.full_like(leaf, value) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf


def _refuse_other_leaves(paths: list[str], *found: Any) -> None:
  """Raises `ValueError` for a float leaf that is no running mean: `momentum * leaf + (1 - momentum) * statistic`."""
  for path, own, leaf, low, momentum, after in zip(paths, *found):
    if own and not (jnp.all((momentum >= -1e-6) & (momentum < 1)) and
                    jnp.allclose(after, low + momentum * leaf, rtol=1e-3, atol=1e-5)):
      raise ValueError(f'calibration.recalibrated: {path!r} is no running mean with a momentum below 1. Pass only the '
                       'statistics of batch norms, and an `update` in training mode.')
