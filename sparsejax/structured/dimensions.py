"""Unifies the dimensions of a program, as the types of an expression are unified.

A dimension is a product of factors of `programs.factors`, major first, each of which is a whole *variable*. A variable
is unbound, or bound to a product of variables, or bound to a sum of segments. Binding a variable changes it wherever it
is used. `programs.factors` alone cannot do so, since a reshape there splits a factor in one value only.

    variables = Variables()
    heads, width, fused = (variables.named(name, n) for name, n in (('heads', 4), ('width', 3), ('fused', 12)))
    variables.unify(fused, heads + width, 'a reshape')
    variables.kept(fused, {heads[0].axes[0]: np.array([True, True, False, True])})      # `bool[12]`

A variable of which units may not go is *pinned*: `pinned` holds the units, as the bits of an `int`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsejax.programs.factors import Factor

Dim = tuple[Factor, ...]
Bits = int  # a set of units: bit `i` stands for unit `i`


def length(dim: Dim) -> int:
  """Returns the length of a dimension; a dimension of length 1 has no factors."""
  return math.prod(factor.size for factor in dim)


@dataclasses.dataclass(eq=False)
class Variables:
  """`Variables` hold the variables of a program, and what they are bound to.

  `products` maps a variable to the dimension that it equals. `sums` maps a variable to its segments, in order. `pinned`
  maps a variable to the units that may not go, and `reasons` to the first reason and the operation. `changes` counts
  bindings.
  """

  sizes: list[int] = dataclasses.field(default_factory=list)
  products: dict[int, Dim] = dataclasses.field(default_factory=dict)
  sums: dict[int, tuple[Dim, ...]] = dataclasses.field(default_factory=dict)
  pinned: dict[int, Bits] = dataclasses.field(default_factory=dict)
  reasons: dict[int, tuple[str, Any]] = dataclasses.field(default_factory=dict)
  made: dict[Hashable, Dim] = dataclasses.field(default_factory=dict)
  changes: int = 0
  _known: dict[Dim, list[int]] = dataclasses.field(default_factory=dict)  # the results of `leaves` since `_known_at`
  _known_at: int = -1

  def new(self, size: int) -> Dim:
    """Returns a dimension of one new variable."""
    if size == 1:
      return ()
    self.sizes.append(size)
    return (Factor((len(self.sizes) - 1,), size, 1),)

  def named(self, name: Hashable, size: int) -> Dim:
    """Returns the dimension of the variable that was made under this name, or makes the variable."""
    if name not in self.made:
      self.made[name] = self.new(size)
    return self.made[name]

  def every(self, variable: int) -> Bits:
    """Returns all units of a variable."""
    return (1 << self.sizes[variable]) - 1

  def resolved(self, dim: Dim) -> Dim:
    """Returns a dimension with the products in place of the variables that are bound to products."""
    if not any(factor.axes[0] in self.products for factor in dim):
      return dim
    return tuple(part for factor in dim for part in self._expanded(factor))

  def _expanded(self, factor: Factor) -> Dim:
    v = factor.axes[0]
    if v not in self.products:
      return (factor,)
    self.products[v] = self.resolved(self.products[v])
    return self.products[v]

  def leaves(self, dim: Dim) -> list[int]:
    """Returns the unbound variables of a dimension, those of its segments too, without repetition."""
    if self._known_at != self.changes:
      self._known.clear()
      self._known_at = self.changes
    if dim not in self._known:
      self._known[dim] = self._leaves(dim)
    return self._known[dim]

  def _leaves(self, dim: Dim) -> list[int]:
    found: dict[int, None] = {}
    for factor in self.resolved(dim):
      parts = self.sums.get(factor.axes[0])
      found.update(dict.fromkeys([factor.axes[0]] if parts is None else
                                 itertools.chain.from_iterable(map(self.leaves, parts))))
    return list(found)

  def pin(self, dim: Dim, why: tuple[str, Any]) -> None:
    """Marks all units of the variables of a dimension as pinned."""
    for v in self.leaves(dim):
      self.pin_units(v, self.every(v), why)

  def pin_units(self, v: int, units: Bits, why: tuple[str, Any]) -> None:
    """Marks some units of an unbound variable as pinned."""
    self.pinned[v] = self.pinned.get(v, 0) | units
    self.reasons.setdefault(v, why)

  def unify(self, a: Dim, b: Dim, why: tuple[str, Any]) -> None:
    """Makes two dimensions of one length equal; pins both if their factors cannot be aligned."""
    while True:
      a, b = self._different(self.resolved(a), self.resolved(b))
      if not a or not b:
        return
      (x, *_), (y, *_) = a, b
      if x.size == y.size:
        self._bind(x, y, why)
      elif not (self._split(x, y.size, why) or self._split(y, x.size, why)):
        self.pin(a, ('it is reshaped across other factors', why[1]))
        self.pin(b, ('it is reshaped across other factors', why[1]))
        return

  def _different(self, a: Dim, b: Dim) -> tuple[Dim, Dim]:
    """Returns two dimensions without the factors that both begin or end with."""
    while a and b and a[0] == b[0]:
      a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
      a, b = a[:-1], b[:-1]
    return a, b

  def _bind(self, x: Factor, y: Factor, why: tuple[str, Any]) -> None:
    """Makes two variables of one size equal, of which each is unbound or a sum."""
    v, w = x.axes[0], y.axes[0]
    if v in self.sums and w not in self.sums:
      (v, x), (w, y) = (w, y), (v, x)
    self.changes += 1
    parts = self.sums.get(v)
    self.products[v] = (y,)
    if parts is not None:
      self.join((y,), self.sums.pop(v), why)

  def join(self, dim: Dim, parts: Sequence[Dim], why: tuple[str, Any]) -> None:
    """Makes a dimension equal to the sum of these segments."""
    dim = self.resolved(dim)
    if len(dim) == 1 and dim[0].axes[0] not in self.sums:
      self.changes += 1
      self.sums[dim[0].axes[0]] = tuple(parts)
      return
    bounds = list(itertools.accumulate(map(length, parts)))[:-1]
    pieces = self.cut(dim, bounds)
    if pieces is None:
      for each in (dim, *parts):
        self.pin(each, ('its parts are joined across other factors', why[1]))
      return
    for piece, part in zip(pieces, parts):
      self.unify(piece, part, why)

  def _split(self, x: Factor, major: int, why: tuple[str, Any]) -> bool:
    """Returns whether a variable could be bound to a product whose major part has this size, and binds it."""
    v, minor = x.axes[0], x.size // major
    if x.size % major or v in self.sums and any(length(part) % minor for part in self.sums[v]):
      return False
    self.changes += 1
    parts, low = self.sums.pop(v, None), self.new(minor)
    if parts is None:
      self.products[v] = self.new(major) + low
      return True
    heads = [self.new(length(part) // minor) for part in parts]
    self.products[v] = self._sum(heads, v) + low
    for part, head in zip(parts, heads):
      self.unify(part, head + low, why)
    return True

  def _sum(self, parts: Sequence[Dim], name: Hashable) -> Dim:
    """Returns a dimension that is the sum of these segments: the segment itself if there is one."""
    if len(parts) == 1:
      return parts[0]
    dim = self.named(('sum', name, tuple(parts)), sum(map(length, parts)))
    if dim and dim[0].axes[0] not in self.sums and dim[0].axes[0] not in self.products:
      self.sums[dim[0].axes[0]] = tuple(parts)
    return dim

  def cut(self, dim: Dim, bounds: Iterable[int]) -> list[Dim] | None:
    """Returns the segments of a dimension between these bounds, or `None` if a bound is inside of a minor factor."""
    dim = self.resolved(dim)
    bounds = sorted({b for b in bounds if 0 < b < length(dim)})
    if not bounds:
      return [dim]
    head, rest = dim[0], dim[1:]
    minor = length(rest)
    if any(b % minor for b in bounds):
      return None
    parts = self._segments(head.axes[0], [b // minor for b in bounds])
    return parts and [part + rest for part in parts]

  def _segments(self, v: int, bounds: list[int]) -> list[Dim] | None:
    """Returns the segments between these bounds, after the variable is cut at each bound."""
    ends = [*bounds, self.sizes[v]]
    if v not in self.sums:
      self.changes += 1
      self.sums[v] = tuple(self.new(b - a) for a, b in zip([0, *bounds], ends))
      return list(self.sums[v])
    fine: list[Dim] = []
    at = 0
    for part in self.sums[v]:
      pieces = self.cut(part, [b - at for b in bounds])
      if pieces is None:
        return None
      fine, at = fine + pieces, at + length(part)
    self.changes += len(fine) != len(self.sums[v])
    self.sums[v] = tuple(fine)
    places = list(itertools.accumulate(map(length, fine)))
    between = [[part for part, end in zip(fine, places) if a < end <= b] for a, b in zip([0, *bounds], ends)]
    return [self._sum(parts, None) for parts in between]

  # Units and the indices of dimensions.

  def labels(self, dim: Dim, v: int) -> list[np.ndarray]:
    """Returns, for each place of a variable in a dimension, the unit of each index, `int[n]`; -1 stands for none."""
    dim = self.resolved(dim)
    found, shape = [], [factor.size for factor in dim]
    for i, factor in enumerate(dim):
      for own in self._own_labels(factor, v):
        spread = np.broadcast_to(own.reshape([-1 if i == j else 1 for j in range(len(dim))]), shape)
        found.append(spread.reshape(-1))
    return found

  def _own_labels(self, factor: Factor, v: int) -> list[np.ndarray]:
    if factor.axes[0] == v:
      return [np.arange(factor.size)]
    rows, at = [], 0
    for part in self.sums.get(factor.axes[0], ()):
      for own in self.labels(part, v):
        rows.append(np.full(factor.size, -1))
        rows[-1][at:at + len(own)] = own
      at += length(part)
    return rows

  def kept(self, dim: Dim, keep: Mapping[int, np.ndarray]) -> np.ndarray:
    """Returns which indices of a dimension are kept, `bool[n]`; `keep` maps a variable to its kept units."""
    each = [self._own_kept(factor, keep) for factor in self.resolved(dim)]
    return functools.reduce(lambda a, b: np.logical_and.outer(a, b).reshape(-1), each, np.ones(1, bool))

  def _own_kept(self, factor: Factor, keep: Mapping[int, np.ndarray]) -> np.ndarray:
    v = factor.axes[0]
    if v in self.sums:
      return np.concatenate([self.kept(part, keep) for part in self.sums[v]])
    return keep.get(v, np.ones(factor.size, bool))
