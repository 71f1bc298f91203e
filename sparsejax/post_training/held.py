"""Counts the numbers that repairs hold at their peak, by the memory of XLA's programs on CPUs for several shapes.

    held.of_swaps((1, 512, 256), 50, 4.9e-5, True, 1.0)     # of a stack `(L, R, K)`, and the arguments of the repair
"""

from typing import Any

from sparsejax.post_training import one_by_one


def of_rows(shape: tuple[int, int, int], *arguments: Any) -> int:
  """Returns how many numbers a repair holds that solves row by row. The last argument says how many rows at a time."""
  return one_by_one.held(arguments[-1], shape)


def of_swaps(shape: tuple[int, int, int], *arguments: Any) -> int:
  """Returns how many numbers DSnoT holds: four sorts of one matrix, each with its places."""
  del arguments
  return 15 * shape[1] * shape[2]


def of_convex(shape: tuple[int, int, int], *arguments: Any) -> int:
  """Returns how many numbers Net-Trim holds: the variables of ADMM, and a root of the Gram matrix."""
  del arguments
  return 11 * shape[1] * shape[2] + shape[2]**2


def of_wrapped(shape: tuple[int, int, int], *arguments: Any) -> int:
  """Returns how many numbers ARMOR holds: the factors, the best of them, Adam's moments, and the gradient."""
  del arguments
  return 12 * shape[1] * shape[2]
