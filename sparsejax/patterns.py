"""Patterns: which sets of weights may be zero together.

A pattern is a small frozen dataclass, called as `pattern(scores, sparsity, axes) -> mask`. It compares, hashes and
prints, so that it can be part of a configuration; the counting is `ranking`'s.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import errors, groups, ranking
from sparsejax.types import Array, Axes, Pattern


@dataclasses.dataclass(frozen=True)
class NM:
  """Keeps `n` of every `m` neighbours along the contraction axis, 1 <= m <= 1024, exactly `n` of them.

  Several contracted axes count as one, in the program's order (`[heads, head_dim]` of an attention output kernel is one
  row of a matrix product). Groups never cross a row, a spatial tap or a layer. `n` may be a traced `int32[]`, and then
  `sparsity` is `None`. Ties keep the lower index, NaN goes first.
  """

  n: Any
  m: int

  def __post_init__(self):
    if not isinstance(self.m, (int, np.integer)) or not 1 <= self.m <= 1024:
      raise ValueError(f'NM: m must be a whole number from 1 to 1024, not {self.m!r}.')
    if isinstance(self.n, (int, np.integer)) and not 0 <= self.n <= self.m:
      raise ValueError(f'NM: {self.n}:{self.m} keeps {self.n} of {self.m}; n must be from 0 to m.')
    if isinstance(self.n, (float, str, type(None))):
      raise ValueError(f'NM: n must be a whole number, not {self.n!r}; give sparsity to Unstructured instead.')

  def __str__(self) -> str:
    return f'{self.n if self.static else "n"}:{self.m}'

  @property
  def static(self) -> bool:
    return isinstance(self.n, (int, np.integer))

  @property
  def sparsity(self) -> float | None:
    return 1 - self.n / self.m if self.static else None

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    length = int(np.prod([shape[a] for a in axes.contracted], dtype=np.int64))
    if not axes.contracted:
      return f'no axis is contracted, so {self} has nothing to group along; leave the leaf out of `where`.'
    if length % self.m:
      divisors = [d for d in range(2, self.m) if length % d == 0]
      smaller = f', use an m that divides it (say {divisors[-1]})' if divisors else ''
      padded = -(-length // self.m) * self.m
      return (f'{self} needs a contraction axis that {self.m} divides, and axes {axes.contracted} ({axes.source}) have '
              f'{length}. Leave the leaf dense (trees.all_but){smaller}, or pad the axis to {padded}.')
    return None

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes = Axes((0,), (1,))) -> Array:
    n = self.n if sparsity is None else _kept(sparsity, self.m)
    contracted, sizes = axes.contracted, tuple(scores.shape[a] for a in axes.contracted)
    mask = ranking.top_n_in_groups(groups.merged(scores, contracted), n, self.m, min(contracted))
    return groups.unmerged(mask, contracted, sizes)

  def excess(self, nonzero: Array, axes: Axes) -> Array:
    """How many more than `n` each group keeps, at least 0: `int32`, the contraction merged and shortened to groups."""
    axis = min(axes.contracted)
    grouped = groups.split(groups.merged(nonzero, axes.contracted), self.m, axis)
    return jnp.maximum(jnp.sum(grouped, axis + 1, dtype=jnp.int32) - self.n, 0)


@dataclasses.dataclass(frozen=True)
class Unstructured:
  """Any weight of the leaf may be zero: exactly `round(sparsity * size)` are, half to even."""

  sparsity: float | None = None
  static = True

  def __post_init__(self):
    if self.sparsity is not None and not 0 <= self.sparsity <= 1:
      raise ValueError(f'Unstructured: sparsity is the fraction of zeros, from 0 to 1, not {self.sparsity!r}.')

  def __str__(self) -> str:
    return 'unstructured' if self.sparsity is None else f'unstructured {self.sparsity:g}'

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return None

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes | None = None) -> Array:
    return ranking.top_n(scores, _kept(self.sparsity if sparsity is None else sparsity, scores.size))


@dataclasses.dataclass(frozen=True)
class Staged:
  """One of several patterns, by a traced `index`: only the chosen one's mask is computed (all of them under `vmap`)."""

  stages: tuple[Pattern, ...]
  index: Any
  sparsity = None
  static = False

  def __str__(self) -> str:
    return ' -> '.join(map(str, self.stages))

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return next((why for why in (stage.validate(shape, axes) for stage in self.stages) if why), None)

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes = Axes((0,), (1,))) -> Array:
    branches: list[Callable[[Array], Array]] = [lambda s, p=stage: p(s, sparsity, axes) for stage in self.stages]
    return lax.switch(self.index, branches, scores)


def _kept(sparsity: Any, size: int) -> Any:
  """How many of `size` are kept: all but `sparsity * size`, rounded half to even. A Python int for a number."""
  if isinstance(sparsity, (int, float, np.floating, np.integer)):
    return size - round(float(sparsity) * size)
  return size - jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)


def parse(text: Any) -> Any:
  """`'2:4'` is `NM(2, 4)`, `'unstructured'` is `Unstructured()`; a pattern is itself; a dict of them, each for itself.

  Raises `ValueError` for anything else.
  """
  if isinstance(text, Mapping):
    return {glob: parse(each) for glob, each in text.items()}
  if callable(text):
    return text
  text = str(text)
  n, colon, m = text.partition(':')
  if colon and n.strip().isdigit() and m.strip().isdigit():
    return NM(int(n), int(m))
  if text.strip().lower() == 'unstructured':
    return Unstructured()
  raise errors.unknown('patterns.parse', 'pattern', text, ['2:4', '1:8', 'N:M', 'unstructured'])
