"""Patterns: which sets of weights may be zero together.

A pattern is a small frozen dataclass, called as `pattern(scores, sparsity, axes) -> mask`. It compares, hashes and
prints, so that it can be part of a configuration; the counting is `ranking`'s.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import errors, neighbours, ranking
from sparsejax.types import Array, Axes, Pattern


class Pooled(NamedTuple):
  """`scores`: one for each unit that is kept or pruned whole. `layers`: which of its axes are layers. `whole(mask)`:
  the mask of the units as one of the weights."""

  scores: Array
  layers: tuple[int, ...]
  whole: Callable[[Array], Array]


class Ramp(NamedTuple):
  """A sparsity on its way to `target`, which it reaches, exactly, when `progress` (traced or not) is 1."""

  target: float
  progress: Any


@dataclasses.dataclass(frozen=True)
class NM:
  """Keeps `n` of every `m` neighbours along the contraction axis, 1 <= m <= 1024, exactly `n` of them.

  Several contracted axes count as one, in the program's order (`[heads, head_dim]` of an attention output kernel is one
  row of a matrix product). Groups never cross a row, a spatial tap or a layer. `n` may be a traced `int32[]`, and then
  `sparsity` is `None`. Ties keep the lower index, NaN goes first.

  With a `width`, `width` neighbours along the output (several output axes count as one, too) are kept or pruned
  together, "vector-wise N:M": what is ranked in a group are `m` vectors, each by the `float32` sum of its scores, NaN
  if one of them is. A kernel then reads one index for `width` weights.
  """

  n: Any
  m: int
  width: int = 1

  def __post_init__(self):
    if not isinstance(self.m, (int, np.integer)) or not 1 <= self.m <= 1024:
      raise ValueError(f'NM: m must be a whole number from 1 to 1024, not {self.m!r}.')
    if isinstance(self.n, (int, np.integer)) and not 0 <= self.n <= self.m:
      raise ValueError(f'NM: {self.n}:{self.m} keeps {self.n} of {self.m}; n must be from 0 to m.')
    if isinstance(self.n, (float, str, type(None))):
      raise ValueError(f'NM: n must be a whole number, not {self.n!r}; give sparsity to Unstructured instead.')
    if not isinstance(self.width, (int, np.integer)) or self.width < 1:
      raise ValueError(f'NM: width must be a whole number, at least 1, not {self.width!r}.')

  def __str__(self) -> str:
    return f'{self.n if self.static else "n"}:{self.m}' + (f'x{self.width}' if self.width > 1 else '')

  @property
  def static(self) -> bool:
    return isinstance(self.n, (int, np.integer))

  @property
  def sparsity(self) -> float | None:
    return 1 - self.n / self.m if self.static else None

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    length, across = (math.prod(shape[a] for a in group) for group in (axes.contracted, axes.output))
    if not axes.contracted:
      return f'no axis is contracted, so {self} has nothing to group along; leave the leaf out of `where`.'
    if length % self.m:
      divisors = [d for d in range(2, self.m) if length % d == 0]
      smaller = f', use an m that divides it (say {divisors[-1]})' if divisors else ''
      padded = -(-length // self.m) * self.m
      return (f'{self} needs a contraction axis that {self.m} divides, and axes {axes.contracted} ({axes.source}) have '
              f'{length}. Leave the leaf dense (trees.all_but){smaller}, or pad the axis to {padded}.')
    if self.width > 1 and not axes.output:
      return f'{self} lies along output axes, and there are none ({axes.source}); use {NM(self.n, self.m)}.'
    if across % self.width:
      fits = max(d for d in range(1, self.width) if across % d == 0)
      return (f'{self} needs output axes that {self.width} divides, and axes {axes.output} ({axes.source}) have '
              f'{across}. Leave the leaf dense (trees.all_but), use a width that divides it (say {fits}), or pad the '
              f'axis to {-(-across // self.width) * self.width}.')
    return None

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes = Axes((0,), (1,)), drop: Any = None) -> Array:
    n = self.n if sparsity is None else ranking.count(kept_of(sparsity, self.m)).low
    if drop is not None:  # what is left of a group may be of any size: those left are the best of the layer
      return (Unstructured() if self.width == 1 else Block((1, self.width)))(scores, 1 - n / self.m, axes, drop)
    if self.width > 1:
      vectors, restored = neighbours.tiled(scores, axes.contracted, axes.output, (self.m, self.width))
      sums = neighbours.joined(jnp.sum(vectors, -1, dtype=jnp.float32), vectors.ndim - 3)
      kept = neighbours.split(ranking.top_n_in_groups(sums, n, self.m, sums.ndim - 2), self.m, sums.ndim - 2)
      return neighbours.alike(restored(jnp.broadcast_to(kept[..., None], vectors.shape)), scores)
    contracted, sizes = axes.contracted, tuple(scores.shape[a] for a in axes.contracted)
    mask = ranking.top_n_in_groups(neighbours.merged(scores, contracted, self.m), n, self.m, min(contracted))
    return neighbours.alike(neighbours.unmerged(mask, contracted, sizes), scores)

  @property
  def group(self) -> tuple[int, int]:
    return self.m, self.width

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    if why := self.validate(w.shape, axes):
      return why
    n = self.n if sparsity is None else kept_of(sparsity, self.m)
    excess = NM(n, self.m, self.width).excess(w != 0, axes)
    bad = int(jnp.sum(excess > 0, dtype=jnp.int32))
    if not bad:
      return ''
    first = tuple(int(i) for i in jnp.unravel_index(jnp.argmax(excess.reshape(-1) > 0), excess.shape))
    return (f'{bad} of {excess.size} groups keep more than {n} of {self.m}, the first, {first}, keeps '
            f'{int(excess[first]) + n}')

  def excess(self, nonzero: Array, axes: Axes) -> Array:
    """How many more than `n` each group keeps, at least 0: `int32`, the contraction merged and shortened to groups.

    With a width, of vectors that are not all zero: `[..., K / m, N / width]`, layers and taps in front.
    """
    if self.width > 1:
      vectors = jnp.any(neighbours.tiled(nonzero, axes.contracted, axes.output, (self.m, self.width))[0], -1)
      return jnp.maximum(jnp.sum(vectors, -2, dtype=jnp.int32) - self.n, 0)
    axis = min(axes.contracted)
    grouped = neighbours.split(neighbours.merged(nonzero, axes.contracted, self.m), self.m, axis)
    return jnp.maximum(jnp.sum(grouped, axis + 1, dtype=jnp.int32) - self.n, 0)


@dataclasses.dataclass(frozen=True)
class Unstructured:
  """Any weight may be zero: exactly `round(sparsity * size)` of each layer of the leaf are, half to even."""

  sparsity: float | None = None
  static = True
  group = 1, 1

  def __post_init__(self):
    _check_share('Unstructured', self.sparsity)

  def __str__(self) -> str:
    return 'unstructured' if self.sparsity is None else f'unstructured {self.sparsity:g}'

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return None

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes | None = None, drop: Any = None) -> Array:
    return _best_units(self, scores, sparsity, axes, drop)

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    return too_many(self, w, axes, sparsity, 'weights')

  def pooled(self, scores: Array, axes: Axes | None) -> Pooled:
    """Every weight is a unit."""
    return Pooled(scores, () if axes is None else axes.layer, lambda mask: mask)


@dataclasses.dataclass(frozen=True)
class Block:
  """Blocks of `shape` (along contraction and output) are zero: exactly `round(sparsity * blocks)` of each layer.

  Several contracted axes count as one, in the program's order, and so do several output axes. No block crosses a
  spatial tap or a layer; the blocks of all taps of a layer compete. A block's score is the `float32` sum of its scores
  (of magnitudes: the L1 norm), NaN if one of them is. NaN goes first, ties keep the lower index: by tap, then along the
  contraction, then along the output. Sharded leaves need no more than counts from each other where no block
  crosses a shard; where one does, the order in which its sum is taken, and with it a near tie, may change.

  `balanced`: as many in each column of blocks, all that one range of outputs is computed of; exactly
  `round(sparsity * blocks)` of each. For kernels, which are then told the same number for every column.
  """

  shape: tuple[int, int]
  sparsity: float | None = None
  balanced: bool = False
  static = True

  def __post_init__(self):
    object.__setattr__(self, 'shape', tuple(self.shape))  # a list, from a configuration
    if len(self.shape) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in self.shape):
      raise ValueError('Block: shape is two whole numbers, weights along the contraction and along the output, as in '
                       f'(128, 128), not {self.shape!r}.')
    _check_share('Block', self.sparsity)

  def __str__(self) -> str:
    balanced = ' balanced' if self.balanced else ''
    return '{}x{}'.format(*self.shape) + balanced + ('' if self.sparsity is None else f' {self.sparsity:g}')

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    if not axes.contracted or not axes.output:
      return (f'{self} lies along contracted and output axes, and those are {axes.contracted} and {axes.output} '
              f'({axes.source}); leave the leaf out of `where`.')
    lengths = [math.prod(shape[a] for a in group) for group in (axes.contracted, axes.output)]
    if not any(length % n for length, n in zip(lengths, self.shape)):
      return None
    fits = lambda length, n: max(d for d in range(1, n + 1) if length % d == 0)
    smaller, padded = map(fits, lengths, self.shape), [-(-length // n) * n for length, n in zip(lengths, self.shape)]
    return (f'{self} needs axes that {self.shape[0]} and {self.shape[1]} divide, and contracted {axes.contracted} and '
            f'output {axes.output} ({axes.source}) have {lengths[0]} and {lengths[1]}. Leave the leaf dense '
            f'(trees.all_but), use a block that divides it (say {"x".join(map(str, smaller))}), or pad the axes to '
            f'{padded[0]} and {padded[1]}.')

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes = Axes((0,), (1,)), drop: Any = None) -> Array:
    return _best_units(self, scores, sparsity, axes, drop)

  @property
  def group(self) -> tuple[int, int]:
    return self.shape

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    return too_many(self, w, axes, sparsity, 'blocks')

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    """The sums of the blocks, taps and layers first, then along contraction and output."""
    blocks, restored = neighbours.tiled(scores, axes.contracted, axes.output, self.shape)
    whole = lambda kept: restored(jnp.broadcast_to(jnp.expand_dims(kept, (-3, -1)), blocks.shape))
    columns = (blocks.ndim - 3,) if self.balanced else ()
    return Pooled(jnp.sum(blocks, (-3, -1), dtype=jnp.float32), (*self._layers(axes), *columns),
                  lambda kept: neighbours.alike(whole(kept), scores))

  def _layers(self, axes: Axes) -> tuple[int, ...]:
    """The layers' axes among those that are left in front."""
    front = sorted((*axes.spatial, *axes.layer))
    return tuple(front.index(a) for a in axes.layer)


@dataclasses.dataclass(frozen=True)
class Channel:
  """Whole output channels are zero: exactly `round(sparsity * channels)` of each layer, half to even.

  A channel is all that one index of the output axes is contracted with, through all spatial taps: a neuron's incoming
  weights, a convolution's filter. Its score is the `float32` sum of its scores. NaN goes first, ties keep the lower
  index. Only the weights are zero: a bias of the channel stays.
  """

  sparsity: float | None = None
  static = True
  group = 1, 1

  def __post_init__(self):
    _check_share('Channel', self.sparsity)

  def __str__(self) -> str:
    return 'channel' if self.sparsity is None else f'channel {self.sparsity:g}'

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    if axes.contracted and axes.output:
      return None
    return (f'{self} lies along output axes, and contracted and output axes are {axes.contracted} and {axes.output} '
            f'({axes.source}); leave the leaf out of `where`.')

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes = Axes((0,), (1,)), drop: Any = None) -> Array:
    return _best_units(self, scores, sparsity, axes, drop)

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    return too_many(self, w, axes, sparsity, 'channels')

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    """The sums of the channels, `[*layers, *outputs]` in the order of the leaf's axes."""
    along = (*axes.contracted, *axes.spatial)
    left = [a for a in range(scores.ndim) if a not in along]
    whole = lambda kept: jnp.broadcast_to(jnp.expand_dims(kept, along), scores.shape)
    return Pooled(jnp.sum(scores, along, dtype=jnp.float32), tuple(left.index(a) for a in axes.layer),
                  lambda kept: neighbours.alike(whole(kept), scores))


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

  def __call__(self, scores: Array, sparsity: Any = None, axes: Axes = Axes((0,), (1,)), drop: Any = None) -> Array:
    branches: list[Callable[[Array], Array]] = [lambda s, p=stage: p(s, sparsity, axes, drop) for stage in self.stages]
    return lax.switch(self.index, branches, scores)


def units(pattern: Pattern, shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
  """How many units that are kept or pruned whole one layer of a leaf has, and of how many weights each is.

  A group of N:M is `m` units of `width` weights each.
  """
  if not hasattr(pattern, 'pooled'):
    return pattern.m, pattern.width
  pooled = jax.eval_shape(lambda w: pattern.pooled(w, axes).scores, jax.ShapeDtypeStruct(shape, jnp.float32))
  layers = math.prod(shape[a] for a in axes.layer)
  return math.prod(pooled.shape) // max(layers, 1), math.prod(shape) // max(math.prod(pooled.shape), 1)


def _best_units(pattern: Any, scores: Array, sparsity: Any, axes: Axes | None, drop: Any) -> Array:
  """Layers are matrices of their own, however they are stored: a stack of them is as sparse as each of them."""
  pooled, layers, whole = pattern.pooled(scores, axes)
  size = math.prod(n for a, n in enumerate(pooled.shape) if a not in layers)
  kept = kept_of(pattern.sparsity if sparsity is None else sparsity, size)
  if drop is not None:
    kept = fewer(ranking.count(kept), drop)
  each = 0 if isinstance(kept, ranking.Count) and jnp.ndim(kept.low) else None  # a count for each layer
  select = ranking.top_n
  for _ in layers:
    select = jax.vmap(select, in_axes=(0, each))
  front = tuple(range(len(layers)))
  return whole(jnp.moveaxis(select(jnp.moveaxis(pooled, layers, front), kept), front, layers))


def too_many(pattern: Any, w: Array, axes: Axes, sparsity: float | None, noun: str) -> str:
  """Says in which layer `w` keeps more units, called `noun`, than `sparsity` allows; empty if in none.

  `sparsity=None` stands for the pattern's own.
  """
  if why := pattern.validate(w.shape, axes):
    return why
  pool = pattern.pooled((w != 0).astype(jnp.float32), axes)
  units = np.asarray(pool.scores > 0)
  kept = np.sum(units, tuple(a for a in range(units.ndim) if a not in pool.layers)).reshape(-1)
  sparsity = pattern.sparsity if sparsity is None else sparsity
  allowed = kept_of(sparsity or 0, units.size // max(kept.size, 1))
  where = f' in layer {kept.argmax()}' if pool.layers else ''
  return f'{kept.max()} {noun} are kept{where}, {allowed} asked' if kept.max(initial=0) > allowed else ''


def _check_share(name: str, sparsity: float | None) -> None:
  if sparsity is not None and not 0 <= sparsity <= 1:
    raise ValueError(f'{name}: sparsity is the fraction of zeros, from 0 to 1, not {sparsity!r}.')


def kept_of(sparsity: Any, size: int) -> Any:
  """How many of `size` are kept: all but `sparsity * size`, rounded half to even. A Python int for a number.

  A `ranking.Count` is the number of those kept itself. Of a `Ramp` `progress * round(target * size)` are pruned,
  exactly `round(target * size)` from 1 on. A traced sparsity is a `float32`, and so is the product: above 2^24 weights
  the count may be off by up to `size / 2^23`. All are kept at 0 and none at 1.
  """
  if sparsity is None:
    raise ValueError('patterns: how many weights are kept? Give a sparsity, as in Unstructured(0.9).')
  if isinstance(sparsity, ranking.Count):
    return sparsity
  if isinstance(sparsity, (int, float, np.floating, np.integer)):
    return size - round(float(sparsity) * size)
  if isinstance(sparsity, Ramp):
    pruned, progress = round(sparsity.target * size), jnp.asarray(sparsity.progress, jnp.float32)
    kept, done = _all_but(size, progress * np.float32(pruned)), ranking.count(size - pruned)
    return ranking.Count(*(jnp.where(progress < 1, word, last) for word, last in zip(kept, done)))
  share = jnp.asarray(sparsity, jnp.float32)
  return ranking.Count(*(jnp.where(share < 1, word, 0) for word in _all_but(size, share * np.float32(size))))


def _all_but(size: int, pruned: Array) -> ranking.Count:
  return ranking.minus(ranking.count(size), ranking.count(jnp.round(pruned)))


def fewer(kept: ranking.Count, drop: Any) -> ranking.Count:
  """`kept - floor(drop * kept)`, the product in `float32`."""
  whole = jnp.asarray(kept.high, jnp.float32) * 2.0**31 + jnp.asarray(kept.low, jnp.float32)
  return ranking.minus(kept, ranking.count(jnp.floor(jnp.asarray(drop, jnp.float32) * whole)))


class Spelling(NamedTuple):
  """A `Spelling` says how a pattern is written in configurations and on command lines.

  `regex` matches the whole text. `make` builds the pattern from the numbers that the groups of `regex` match.
  `examples` are shown to whoever misspells a name.
  """

  regex: str
  make: Callable[..., Pattern]
  examples: tuple[str, ...]


# A pattern from outside is one line: `patterns.TABLE['diagonal'] = Spelling('diagonal', Diagonal, ('diagonal',))`.
TABLE = {
  'n_m': Spelling(r'(\d+)\s*:\s*(\d+)\s*(?:x\s*(\d+))?', NM, ('2:4', '1:8', 'N:M', '2:4x128')),
  'block': Spelling(r'(\d+)\s*x\s*(\d+)', lambda k, n: Block((k, n)), ('128x128',)),
  'unstructured': Spelling('unstructured', Unstructured, ('unstructured',)),
  'channel': Spelling('channel', Channel, ('channel',)),
}


def parse(text: Any) -> Any:
  """Returns the pattern that `text` spells by `TABLE`: `'2:4'` is `NM(2, 4)`, `'128x128'` is `Block((128, 128))`.

  `'2:4x128'` is `NM(2, 4, width=128)`. A pattern is returned as it is, and a dict of patterns is parsed entry by entry.
  Raises `ValueError` for anything else.
  """
  if isinstance(text, Mapping):
    return {glob: parse(each) for glob, each in text.items()}
  if callable(text):
    return text
  for spelling in TABLE.values():
    if match := re.fullmatch(spelling.regex, str(text).strip(), re.IGNORECASE):
      return spelling.make(*(int(number) for number in match.groups() if number is not None))
  examples = [example for spelling in TABLE.values() for example in spelling.examples]
  raise errors.unknown('patterns.parse', 'pattern', str(text), examples)
