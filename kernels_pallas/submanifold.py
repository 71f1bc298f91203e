"""Convolves features at few active places of a grid: the output lives at the same places, and reads active ones alone.

    table = places_of(coordinates, kernel=(3, 3, 3))      # `int32[n, 27]`, once for all layers of one set of places
    y = separable(x, depthwise, pointwise, table)              # x: `[n, C]`, depthwise: `[27, C]`, pointwise: `[C, D]`

There is no kernel here: the gathers and sums are XLA's on every platform. Less is More (Li et al. 2023, 2303.11203)
replaces dense sparse convolutions by separable ones, with k^3 C + C D in the place of k^3 C D parameters.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sparsejax.types import Array


def places_of(coordinates: Array, kernel: Sequence[int]) -> Array:
  """Returns, for each active place, the number of the active place under each tap, `int32[n, taps]`, and n for none.

  `coordinates`: whole numbers `[n, d]`, each at most 2^(62 / d) apart, no two alike. `kernel`: odd lengths, d of them.
  Taps are in row-major order. Runs on the host. Raises `ValueError` for other shapes and for places that occur twice.
  """
  found = np.asarray(coordinates)
  if found.ndim != 2 or found.shape[1] != len(kernel) or not np.issubdtype(found.dtype, np.integer):
    raise ValueError(f'submanifold.places_of: coordinates are whole numbers [n, {len(kernel)}], one for each of the '
                     f'kernel {tuple(kernel)}, not {found.dtype}{list(found.shape)}.')
  if any(k % 2 == 0 for k in kernel):
    raise ValueError(f'submanifold.places_of: the lengths of a kernel are odd, not {tuple(kernel)}.')
  reach = np.array(kernel) // 2
  low = found.min(0) if len(found) else np.zeros(len(kernel), int)
  moved = found.astype(np.int64) - low + reach
  spans = (moved.max(0) if len(found) else reach) + reach + 1
  strides = np.append(np.cumprod(spans[::-1])[-2::-1], 1).astype(np.int64)
  keys = moved @ strides
  order = np.argsort(keys, kind='stable')
  if (np.diff(keys[order]) == 0).any():
    raise ValueError('submanifold.places_of: a place occurs twice; add up the features of equal places first.')
  taps = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing='ij'), -1).reshape(-1, len(kernel))
  wanted = keys[:, None] + (taps @ strides)[None]
  at = np.minimum(np.searchsorted(keys[order], wanted), max(len(keys) - 1, 0))
  hit = keys[order][at] == wanted if len(keys) else np.zeros(wanted.shape, bool)
  return jnp.asarray(np.where(hit, order[at], len(keys)), jnp.int32)


def depthwise_at(x: Array, kernel: Array, table: Array) -> Array:
  """Returns the convolution of each channel with its own kernel, `[n, C]`. `kernel`: `[taps, C]`; `x`: `[n, C]`.

  A tap over no active place adds nothing.
  """
  if kernel.shape != (table.shape[1], x.shape[1]) or len(table) != len(x):
    raise ValueError(f'submanifold.depthwise_at: features {list(x.shape)} and the table {list(table.shape)} need a '
                     f'kernel [{table.shape[1]}, {x.shape[1]}], not {list(kernel.shape)}.')
  padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])
  total = jnp.zeros_like(x)
  for tap in range(table.shape[1]):  # Each gather needs the memory of one output.
    total = total + padded[table[:, tap]] * kernel[tap][None]
  return total


def separable(x: Array, depthwise: Array, pointwise: Array, table: Array) -> Array:
  """Returns `depthwise_at(x, depthwise, table) @ pointwise`, `[n, D]`: the separable submanifold convolution."""
  return depthwise_at(x, depthwise, table) @ pointwise
