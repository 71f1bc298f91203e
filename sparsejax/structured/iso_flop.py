"""Returns how large a sparse layer may be that costs a dense one: Sparse-IFT (Saxena et al. 2023, 2303.11525).

    wider = wide_width(64, 0.75)                             # 128: a network twice as wide, a quarter of it kept
    asked = equal_flops(sj.contractions(f, small, x), sj.contractions(f, large, x))
    tx = sj.recipes.rigl(inner, allocation=sj.allocation.custom(asked), ...)

The functions say how large the replacement of a layer is. `equal_flops` counts both programs and says how sparse each
leaf has to be, so that FLOPs are equal by count, whatever was rounded.
"""

import math
from collections.abc import Mapping

from sparsejax import errors
from sparsejax.programs.contractions import Contractions


def branches(sparsity: float) -> int:
  """Returns round(1 / (1 - sparsity)): as many sparse branches cost as much as one dense layer (Sparse Parallel)."""
  return max(1, round(1 / (1 - _part('branches', sparsity))))


def wide_width(width: int, sparsity: float) -> int:
  """Returns `width * sqrt(k)`, rounded, with k = `branches(sparsity)`: the width of Sparse Wide.

  The authors' code rounds down, by which 64 at 50 % has 98.9 % of the FLOPs.
  """
  return round(_size('wide_width', width) * math.sqrt(branches(sparsity)))


def factor_rank(inputs: int, outputs: int, sparsity: float) -> int:
  """Returns the inner width d of U [in, d] and V [d, out], both sparse, that cost one dense layer (Sparse Factorized).
  """
  inputs, outputs = (_size('factor_rank', n) for n in (inputs, outputs))
  return round(inputs * outputs / ((1 - _part('factor_rank', sparsity)) * (inputs + outputs)))


def doped_rank(inputs: int, outputs: int, sparsity: float, taps: int = 1) -> int:
  """Returns the rank of the dense U V beside a sparse layer that cost one dense layer together (Sparse Doped).

  `taps`: the positions of a convolution kernel. The rank is rounded down, as in the authors' code.
  """
  inputs, outputs, taps = (_size('doped_rank', n) for n in (inputs, outputs, taps))
  return int(_part('doped_rank', sparsity) * taps * inputs * outputs / (taps * inputs + outputs))


def equal_flops(dense: Contractions, larger: Contractions, of: Mapping[str, str] | None = None,
                whole: tuple[str, ...] = ()) -> dict[str, float]:
  """Returns the sparsity of each leaf of the larger program with which both programs have equal multiply-adds.

  `of` maps leaves of the larger program to the leaf of the dense one that they replace. By default, a leaf replaces
  the leaf of its own path. Leaves in `whole` stay dense, and the others that replace the same leaf make up for them.
  Raises `ValueError` for a leaf without a partner, and where the replacement has fewer multiply-adds than the leaf.
  """
  partner = {path: path for path in larger} if of is None else dict(of)
  found: dict[str, float] = {}
  for path in partner:
    if path not in larger or partner[path] not in dense:
      raise errors.unknown('structured.equal_flops', 'leaf', path if path not in larger else partner[path],
                           larger if path not in larger else dense)
  for target in dict.fromkeys(partner.values()):
    own = [path for path, other in partner.items() if other == target]
    fixed = sum(larger.macs[path] for path in own if path in whole)
    free, left = sum(larger.macs[path] for path in own if path not in whole), dense.macs[target] - fixed
    if free < left or left <= 0:
      raise ValueError(f'structured.equal_flops: {errors.some(own)} have {free + fixed:,} multiply-adds, {fixed:,} of '
                       f'them dense, in the place of the {dense.macs[target]:,} of {target!r}; make the replacement '
                       'larger, or its dense part smaller.')
    found |= {path: 1 - left / free for path in own if path not in whole}
  return found


def _part(function: str, sparsity: float) -> float:
  if not 0 <= sparsity < 1:
    raise ValueError(f'structured.{function}: `sparsity` must be a number from 0 to below 1, not {sparsity!r}.')
  return float(sparsity)


def _size(function: str, n: int) -> int:
  if isinstance(n, bool) or not isinstance(n, int) or n < 1:
    raise ValueError(f'structured.{function}: a size must be a whole number, at least 1, not {n!r}.')
  return n
