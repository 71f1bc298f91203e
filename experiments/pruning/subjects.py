"""Defines what a table of pruned models needs of a model: how it runs, what it is calibrated on, how it is judged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.types import Array, Predicate, PyTree


class Subject(NamedTuple):
  """A `Subject` is a trained model that each recipe prunes.

  `apply(params, *batch)` runs on each of `batches`, tuples of arrays, which `sj.prune` is given together with `valid`.
  `where`: the matrices to prune. `loss(params, batch)`: a scalar, by which `ecoflap` measures sensitivities on the
  first batch. `groups(path)`: the name of the block whose matrices share one sparsity.
  `scored(params)`: numbers of the held-out examples by name, each `float[N]`, in a fixed order of the examples.
  `facts`: data and sizes, for the reader of the table.
  """

  apply: Callable[..., Array]
  params: PyTree
  batches: Sequence[tuple[Array, ...]]
  valid: Sequence[Array] | None
  where: Predicate
  loss: Callable[[PyTree, Any], Array]
  groups: Callable[[str], str]
  scored: Callable[[PyTree], Mapping[str, np.ndarray]]
  facts: Mapping[str, Any]
