"""Says when an input, or a neuron of a gated layer, is small enough to be skipped: the rules of TEAL, WINA and others.

A `Rule` compares magnitudes, each times a scale, with one number tau for each matrix. The number comes from calibration
data, and the scale from the weight, so that each input k has the threshold `tau / scale[k]`.

    rule = wina(0.5)                                # half of the inputs of each product are skipped
    rule.thresholds(tau, scale)                     # float32[L, K]

Rules for inputs change the operand of any product with a parameter. Rules for neurons change the activation of a gated
layer, so that columns of `up` and rows of `down` are skipped together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import arguments
from sparsejax.argument_kinds import WIDTH
from sparsejax.arguments import checked
from sparsejax.types import Array

arguments.declare('ppl', tolerance=WIDTH)


class Rest(NamedTuple):
  """A `Rest` holds what the skipped inputs of L matrices are multiplied by: `left [L, K, r]` and `right [L, r, N]`."""

  left: Array
  right: Array


@dataclasses.dataclass(frozen=True)
class Rule:
  """A `Rule` says which entries a token skips.

  `sparsity`: the fraction of entries that is to be skipped, asked of calibration data. `scale(w)` returns `[L, K]` from
  the weights `[L, N, K]`, or, in a rule for `neurons`, from the mean magnitudes of the outputs of `up`, `[L, K]`.
  `level(sparsity)` is the quantile of scaled magnitudes at which the threshold lies. `rest(w, sparsity)` returns the
  `Rest`, or `None`. `strict`: an entry at the threshold is skipped too. `each_batch`: tau is the mean of the quantiles
  of the batches, and not the quantile of all. `unfit(shape)` says why weights of this shape `(L, N, K)` are too small
  for a number of the rule, or returns an empty string.
  """

  name: str
  sparsity: float
  scale: Callable[[Array], Array]
  level: Callable[[float], float] = lambda sparsity: sparsity
  rest: Callable[[Array, float], Rest] | None = None
  neurons: bool = False
  strict: bool = True
  each_batch: bool = False
  unfit: Callable[[tuple[int, ...]], str] = lambda shape: ''

  def thresholds(self, tau: Any, scale: Any) -> np.ndarray:
    """Returns the thresholds `float32[L, K]` of `tau`, `[L]`. A threshold is infinite where the scale is zero."""
    found = over_scale(np.asarray(tau, np.float32)[:, None], np.asarray(scale, np.float32))
    return np.nextafter(found, np.float32(np.inf)) if self.strict else found


def over_scale(tau: Any, scale: np.ndarray) -> np.ndarray:
  """Returns `tau` over `scale`: infinite where the scale is zero, and never so small that a zero would be kept.

  Devices compare denormal numbers as zeros, so that the least threshold is the least normal number.
  """
  found = np.divide(tau, scale, out=np.full(scale.shape, np.inf, np.float32), where=scale > 0)
  return np.maximum(found, np.finfo(np.float32).tiny)


class TopNeurons(NamedTuple):
  """A `TopNeurons` keeps the `k` largest activations of each token."""

  k: int
  neurons: bool = True

  def unfit(self, shape: tuple[int, ...]) -> str:
    """Returns why layers whose `down` has this shape `(L, N, F)` are too small, or an empty string."""
    few = self.k <= shape[2]
    return '' if few else f'top_k({self.k}) keeps more than its {shape[2]} neurons; give at most {shape[2]}.'


class PerplexityRule(NamedTuple):
  """A `PerplexityRule` skips as much as raises the perplexity by `percent` %.

  `loss(results, *inputs)` returns the mean loss of a token, in nats, of the results of a batch. `tolerance` is the
  width at which the bisection ends.
  """

  percent: float
  loss: Callable[..., Any]
  tolerance: float
  neurons: bool = True  # the layers are gated; what is compared are the inputs of `down`

  def unfit(self, shape: tuple[int, ...]) -> str:
    return ''


def norms(w: Array) -> Array:
  """Returns the norms of the weights of each input, `[L, K]` of `[L, N, K]`: by how much an input can move outputs."""
  return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), 1))


def _alike(w: Array) -> Array:
  return jnp.ones((len(w), w.shape[-1]), jnp.float32)


@checked
def teal(sparsity: float) -> Rule:
  """Returns the rule of TEAL (Liu et al. 2024, 2408.14690): small inputs are skipped, whatever the weights.

  Deviation from the authors' code: the quantile is that of magnitudes, not of a distribution taken for symmetric, and
  all tokens are sparse, not the last half of a prompt.
  """
  return Rule('teal', _below_one('teal', sparsity), _alike)


@checked
def wina(sparsity: float) -> Rule:
  """Returns the rule of WINA (Chen et al. 2025, 2505.19427): inputs times the norms of their weights are compared.

  Deviations from the authors' code: the norms are those of all weights, where the code takes 1 for q, o, up and down.
  Weights are not rotated. The first tokens of a prompt are sparse too.
  """
  return Rule('wina', _below_one('wina', sparsity), norms)


@checked
def r_sparse(sparsity: float, alpha: float = 0.9, rank: int | None = None) -> Rule:
  """Returns the rule of R-Sparse (Zhang et al. 2025, 2504.19449): skipped inputs go through a low-rank weight.

  `alpha` is the part of the kept budget that goes to channels; the rest pays for `rank`, by default `int((K N (1 - s) -
  int(K (1 - s) alpha) N) / (K + N))`. The low-rank weight is the truncated singular value decomposition of the weight.
  Of the inputs, `1 - (1 - s) alpha` are skipped. With `alpha=1` the rule is `wina`. Deviation: all weights have one
  `alpha`, and the authors search one for each layer. A `rank` above that of a full matrix is refused.
  """
  sparsity = _below_one('r_sparse', sparsity)
  if rank is None and alpha == 1.0:
    return dataclasses.replace(wina(sparsity), name='r_sparse')
  return Rule('r_sparse', sparsity, norms, lambda s: 1 - (1 - s) * alpha,
              lambda w, s: _low_rank(w, rank_of(w, s, alpha) if rank is None else rank),
              unfit=lambda shape: _above(rank, min(shape[1:])))


def _above(rank: int | None, most: int) -> str:
  fits = rank is None or rank <= most
  return '' if fits else f'r_sparse has `rank` {rank}, above the rank of its matrices; give at most {most}.'


def rank_of(w: Array, sparsity: float, alpha: float) -> int:
  """Returns the rank that the budget of weights `[L, N, K]` pays for beside the channels."""
  n, k = w.shape[1:]
  channels = int(k * (1 - sparsity) * alpha)
  return max(int((k * n * (1 - sparsity) - channels * n) / (k + n)), 0)


def _low_rank(w: Array, rank: int) -> Rest:
  u, s, vt = np.linalg.svd(np.asarray(w, np.float32).swapaxes(1, 2), full_matrices=False)  # of [L, K, N]
  return Rest(jnp.asarray(u[..., :rank] * s[:, None, :rank]), jnp.asarray(vt[:, :rank]))


@checked
def cats(sparsity: float) -> Rule:
  """Returns the rule of CATS (Lee et al. 2024, 2404.08763): small activations of gated layers are switched off.

  An activation at the threshold is kept.
  """
  return Rule('cats', _below_one('cats', sparsity), _alike, neurons=True, strict=False)


@checked
def chess(sparsity: float) -> Rule:
  """Returns the rule of CHESS (He et al. 2024, 2409.01366): activations times the mean magnitude of `up` are compared.

  Tau is the mean of the quantiles of the batches, so that a batch is a sample, as in the authors' code. A neuron of
  which `up` was always zero is never active. Deviation: the inputs of the query and output projections are not
  thresholded; `teal` with `where` does so.
  """
  return Rule('chess', _below_one('chess', sparsity), lambda mean: mean, neurons=True, strict=False, each_batch=True)


@checked
def top_k(k: int) -> TopNeurons:
  """Returns the rule that keeps the `k` largest activations of each token (Lazy Neuron, Li et al. 2022, 2210.06313).

  Ties go to the lower index, and NaN ranks last. Gradients flow through kept activations alone, so that
  `activation.ruled(apply, top_k(16))` trains too.
  """
  return TopNeurons(k)


@checked
def ppl(percent: float, loss: Callable[..., Any], tolerance: float = 1e-3) -> PerplexityRule:
  """Returns the rule of PPL-p% sparsity (Luo et al. 2024, Sparsing Law, 2411.02335): as sparse as perplexity allows.

  All gated layers get one bound on the relative error of their outputs (CETT). Bisection finds the largest bound at
  which the loss rises by at most `log(1 + percent / 100)`. `loss(results, *inputs)` is the mean loss of a token of a
  batch, in nats. Deviations from the authors' code: a bound below the error of the first candidate skips nothing, where
  the code takes the largest threshold. Bisection ends at a width of `tolerance`, at the lower end, which keeps the
  promise.
  """
  return PerplexityRule(percent, loss, tolerance)


def _below_one(name: str, sparsity: float) -> float:
  if sparsity >= 1:
    raise ValueError(f'activation.{name}: `sparsity` must be below 1, not {sparsity}: a product of no input is zero.')
  return sparsity


def error_bound(h: Any, w: Any, bound: float, counted: Any, candidates: int = 2**16) -> tuple[float, float]:
  """Returns the largest threshold tau whose relative output error (CETT) is at most `bound`, and the error at tau.

  `h [T, K]` are the inputs of `w [N, K]`. An entry is skipped where `|h| |w_k| < tau`. CETT is the mean over the tokens
  that `counted`, `bool[T]`, of the norm of what the skipped entries make over the norm of the output. Tau is one of
  `candidates` evenly spaced numbers, from the least magnitude to the 0.99 quantile. Bisection finds tau as if the error
  rose with tau everywhere. Tokens with an output of zero do not count.
  """
  h, w = (np.asarray(a, np.float32) for a in (h[np.asarray(counted)], w))
  sizes = np.abs(h) * np.sqrt(np.sum(np.square(w), 0))
  grid = np.linspace(sizes.min(), np.quantile(sizes, 0.99), candidates, dtype=np.float32)
  whole = np.linalg.norm(h @ w.T, axis=-1)

  def error(tau: np.float32) -> float:
    part = np.linalg.norm(np.where(sizes <= tau, h, 0) @ w.T, axis=-1)
    return float(np.mean((part / np.where(whole > 0, whole, 1))[whole > 0])) if np.any(whole > 0) else 0.0

  left, right = 0, candidates
  while left < right:
    middle = (left + right) // 2
    left, right = (left, middle) if error(grid[middle]) > bound else (middle + 1, right)
  if left == 0:
    return 0.0, 0.0
  return float(grid[left - 1]), error(grid[left - 1])
