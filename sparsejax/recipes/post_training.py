"""Each recipe of pruning after training is a paper's method as a value, which `sj.prune` runs on a few batches.

`sparsity` is asked of each leaf, by default the pattern's own; `allocation` shares it out otherwise. Papers that prune
one matrix as a whole and papers that prune each output by itself differ in the default `pattern`.

    out = sj.prune(apply, params, batches, sj.recipes.wanda(0.5))
    out = sj.prune(apply, params, batches, sj.recipes.sparsegpt(pattern=sj.NM(2, 4)))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparsejax import allocation as allocations
from sparsejax import calibration, patterns, scores
from sparsejax.arguments import checked
from sparsejax.patterns import NM, Block, Unstructured
from sparsejax.post_training import Recipe, repairs
from sparsejax.types import Allocation, Pattern

Patterns = Pattern | Mapping[str, Pattern]
GROUPS = Block((16, 1), 0.5, balanced=True)  # of 16 inputs of one output
Shares = Allocation | allocations.Ranked


@checked
def magnitude(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5), *,
              allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes by |w|, without data and without repair: the baseline of all papers here (Han et al. 2015, 1506.02626)."""
  return _recipe('magnitude', pattern, sparsity, allocation, score=scores.magnitude)


@checked
def wanda(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5, balanced=True), *,
          allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes by |w| times the norm of the input, compared within an output: Wanda (Sun et al. 2023, 2306.11695, eq. 1).

  No weight is repaired. The authors' code rounds the count of an output down and measures each decoder block dense,
  which `sequential=` of `sj.prune` can do. Among equal scores it prunes the lower index, and `ranking` the higher.
  """
  return _recipe('wanda', pattern, sparsity, allocation, score=scores.wanda, statistic=calibration.moments)


@checked
def sparsegpt(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5), *, block: int = 128,
              damping: float = 0.01, quantize: Any = None, allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes column by column and compensates in the columns behind: SparseGPT (Frantar and Alistarh 2023, algorithm 1).

  2301.00774. `quantize`, as in `repairs.Grid(4)`, rounds in the same pass. Deviations: see `repairs.columns`.
  """
  return _recipe('sparsegpt', pattern, sparsity, allocation, repairs.columns(block, damping, quantize), **GRAM)


@checked
def exact_obs(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5), *, damping: float = 0.01,
              rows: int = 32, allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes one weight at a time, the one that costs least: ExactOBS (Frantar et al. 2022, 2208.11580, algorithm 1).

  The cost of a row grows with the cube of its inputs. Deviations: see `repairs.greedy`. The authors' code has no
  damping by default, and adds 1 to the diagonal where it is needed.
  """
  return _recipe('exact_obs', pattern, sparsity, allocation, repairs.greedy(damping, rows), **GRAM)


@checked
def obc(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5), *, bits: int = 4, damping: float = 0.01,
        rows: int = 32, allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes by ExactOBS and then rounds what is kept by OBQ, zeros fixed: OBC (Frantar et al. 2022, sections 4 and 5).

  2208.11580. The weights lie on a grid of `2^bits` numbers for each output. Deviations: see `repairs.greedy`.
  """
  pruned = exact_obs(sparsity, pattern, damping=damping, rows=rows, allocation=allocation)
  return _named('obc', pruned.then(repairs.rounding(repairs.Grid(bits), damping, rows)))


@checked
def dsnot(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5, balanced=True), *,
          start: Callable[..., Recipe] = wanda, cycles: int = 50, guard: bool = True,
          allocation: Shares = allocations.uniform) -> Recipe:
  """Exchanges kept and pruned weights of a mask: DSnoT (Zhang et al. 2023, Dynamic Sparse No Training, 2310.08915).

  `start`: the recipe of the first mask, `wanda` or `magnitude`. `guard=False` is the published default, with which the
  squared error often rises. The authors leave the masks of MLPs as they are. Other deviations: see `repairs.swaps`.
  """
  first = dataclasses.replace(start(sparsity, pattern, allocation=allocation), statistic=calibration.moments)
  return _named('dsnot', first.then(repairs.swaps(cycles, guard=guard)))


@checked
def ecoflap(sensitivity: Mapping[str, float], sparsity: float | None = None,
            pattern: Patterns = Unstructured(0.5, balanced=True), *, most: float | None = None,
            groups: Callable[[str], str] = lambda path: path, start: Callable[..., Recipe] = wanda) -> Recipe:
  """Shares the sparsity out by zeroth-order sensitivities, then prunes each leaf: ECoFLaP (Sung et al. 2023).

  2310.02998. `sensitivity`: that of `sensitivities.zeroth_order`. `groups`: leaves of one name share one sparsity, as
  the matrices of a transformer block do in the authors' runs. `most` is by default 0.1 more than `sparsity`, as theirs.
  """
  if getattr(pattern := patterns.parse(pattern), 'fixed', False):
    raise ValueError(f'recipes.ecoflap: {pattern} keeps the same fraction of every leaf, and nothing is shared out. '
                     'Take Unstructured or Block, or the recipe `start` without shares.')
  asked = _asked('ecoflap', pattern, sparsity)
  shares = allocations.shared_by(sensitivity, min(asked + 0.1, 1.0) if most is None else most, groups)
  return _named('ecoflap', start(asked, pattern, allocation=shares))


@checked
def net_trim(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5), *, epsilon: float = 0.1,
             iterations: int = 2000, allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes by the least sum of absolute weights under a bound on the error: Net-Trim (Aghasi et al. 2017, 1611.05162).

  The linear program, each layer on the inputs that pruned layers before it give ("cascade"). Deviation: the largest
  weights of the solution are kept, as many as asked, where the paper takes the zeros that come out.
  """
  return _recipe('net_trim', pattern, sparsity, allocation, repairs.convex(epsilon, iterations=iterations), **GRAM)


@checked
def armor(sparsity: float | None = None, pattern: Patterns = NM(2, 4), *, block: int = 32, iterations: int = 3000,
          learning_rate: float = 1e-4, seed: int = 0) -> Recipe:
  """Writes each matrix as a 2:4 core between block-diagonal matrices: ARMOR (Liu et al. 2025, 2510.05528).

  `prune` returns the matrices as `formats.Wrapped`, without zeros. Deviations: see `wrapped.factorised`.
  """
  fix = repairs.wrapped(block, iterations, learning_rate, seed)
  return _recipe('armor', pattern, sparsity, allocations.uniform, fix, score=None, statistic=calibration.moments)


@checked
def gqsa(sparsity: float | None = None, pattern: Patterns = GROUPS, *, block: int = 128, damping: float = 0.01,
         allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes groups of inputs of an output by Wanda's scores, and compensates: GQSA (Zeng et al. 2024, 2412.17560).

  The pruned half of the method; the values are then quantized with a scale for each group: `post_training.quantized`.
  No code is public. Deviation: SparseGPT's sweep compensates the kept weights. The paper trains the weights of each
  block of layers by the outputs of the block, and then the scales alone, which `formats.values` gives.
  """
  return _recipe('gqsa', pattern, sparsity, allocation, repairs.columns(block, damping), score=scores.wanda,
                 statistic=calibration.gram)


GRAM: Any = {'score': None, 'statistic': calibration.gram}  # the first repair chooses the mask, from the Gram matrix


def _recipe(name: str, pattern: Any, sparsity: float | None, allocation: Shares, *fixes: Any, **words: Any) -> Recipe:
  return Recipe(patterns.parse(pattern), sparsity, repairs=fixes, allocation=allocation, name=name, **words)


def _named(name: str, recipe: Recipe) -> Recipe:
  return dataclasses.replace(recipe, name=name)


def _asked(name: str, pattern: Any, sparsity: float | None) -> float:
  """Returns the sparsity that is asked, `sparsity` or the pattern's own."""
  own = sparsity if sparsity is not None else getattr(patterns.parse(pattern), 'sparsity', None)
  if own is None:
    raise ValueError(f'recipes.{name}: what is shared out? Give `sparsity=`, or a pattern that has one.')
  return own
