"""A pattern says which sets of weights may be zero together.

A pattern is a small frozen dataclass with the methods of `types.Pattern`. A call `pattern(scores, count, axes)` returns
a mask. Patterns compare, hash and print by value, so that they can be part of a configuration. The methods that
patterns of units share are `counts.best_units` and `counts.too_many`.

    mask = NM(2, 4)(scores, None, Axes((0,), (1,)))        # 2 of every 4 neighbours along axis 0
    mask = Unstructured()(scores, 100)                     # the 100 largest
    parse('2:4x128') == NM(2, 4, width=128)
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, conventions, counts, errors, neighbours, ranking
from sparsejax.argument_kinds import whole
from sparsejax.counts import MATRIX, best_units, kept_of, too_many, units
from sparsejax.stages import Staged, Switch
from sparsejax.types import Array, Axes, Pattern, Pooled

__all__ = ['MATRIX', 'NM', 'TABLE', 'Block', 'Channel', 'Spelling', 'Staged', 'Switch', 'Unstructured', 'kept_of',
           'parse', 'units']


def _needs_axes(pattern: Any, axes: Axes) -> str | None:
  """Returns why a pattern that lies along axes cannot be carried by a leaf of unknown axes, or `None`."""
  if axes.source != 'unknown':
    return None
  return (f'{pattern} lies along what is contracted, and neither name, rank nor container says which axes those are. '
          f'{conventions.REMEDY}')


@dataclasses.dataclass(frozen=True)
class NM:
  """An `NM` keeps exactly `n` of every `m` neighbours along the contraction axis, 1 <= m <= 1024.

  Several contracted axes count as one axis, in the program's order (`[heads, head_dim]` of an attention output kernel
  is one row of a matrix product). Groups never cross a row, a spatial tap or a layer. `n` may be a traced `int32[]`;
  `sparsity` is then `None`. Ties keep the lower index, and NaN is pruned first.

  With a `width`, `width` neighbours along the output are kept or pruned together ("vector-wise N:M"). Several output
  axes count as one axis, too. The `m` vectors of a group are ranked by the `float32` sums of their scores; a vector
  with a NaN has the score NaN. A kernel then reads one index for `width` weights.
  """

  n: Any
  m: int
  width: int = 1
  fixed = True

  def __post_init__(self):
    if not whole(1)(self.m) or self.m > 1024:
      raise ValueError(f'NM: m must be a whole number from 1 to 1024, not {self.m!r}.')
    if isinstance(self.n, (int, np.integer)) and not 0 <= self.n <= self.m:
      raise ValueError(f'NM: {self.n}:{self.m} keeps {self.n} of {self.m}; n must be from 0 to m.')
    if isinstance(self.n, bool) or not isinstance(self.n, (int, np.integer, np.ndarray, jnp.ndarray)):
      raise ValueError(f'NM: n must be a whole number, not {self.n!r}; give sparsity to Unstructured instead.')
    if not whole(1)(self.width):
      raise ValueError(f'NM: width must be a whole number, at least 1, not {self.width!r}.')

  def __str__(self) -> str:
    return f'{self.n if self.static else "n"}:{self.m}' + (f'x{self.width}' if self.width > 1 else '')

  @property
  def static(self) -> bool:
    return isinstance(self.n, (int, np.integer))

  @property
  def sparsity(self) -> float | None:
    return 1 - self.n / self.m if self.static else None

  @property
  def group(self) -> tuple[int, int]:
    return self.m, self.width

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    if why := _needs_axes(self, axes):
      return why
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

  def __call__(self, scores: Array, count: Any = None, axes: Axes = MATRIX) -> Array:
    n = self.n if count is None else ranking.count(counts.checked(f'patterns.{self}', count)).low
    pool, place = self.pooled(scores, axes), self._place(axes)
    mask = ranking.top_n_in_groups(neighbours.joined(pool.scores, place), n, self.m, place - 1)
    return pool.whole(neighbours.split(mask, self.m, place - 1))

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    """Returns the scores of the vectors, `[..., groups, m, ...]`; the sizes of the other axes stay in front.

    Every group is a layer of its own, because a count holds for each group by itself.
    """
    place = self._place(axes)
    if self.width > 1:
      vectors, restored = neighbours.tiled(scores, axes.contracted, axes.output, (self.m, self.width))
      sums = jnp.sum(vectors, -1, dtype=jnp.float32)
      whole = lambda mask: restored(jnp.broadcast_to(mask[..., None], vectors.shape))
    else:
      contracted, sizes = axes.contracted, tuple(scores.shape[a] for a in axes.contracted)
      sums = neighbours.split(neighbours.merged(scores, contracted, self.m), self.m, place - 1)
      whole = lambda mask: neighbours.unmerged(neighbours.joined(mask, place), contracted, sizes)
    layers = tuple(a for a in range(sums.ndim) if a != place)
    return Pooled(sums, layers, lambda mask: neighbours.alike(whole(mask), scores))

  def _place(self, axes: Axes) -> int:
    """Returns the axis of `pooled` scores along which the `m` vectors of a group are."""
    return 1 + (min(axes.contracted) if self.width == 1 else len(axes.spatial) + len(axes.layer))

  def survivors(self, scores: Array, count: Any, axes: Axes, drop: Any) -> Array:
    """Returns the mask of the survivors of a drop: the best of the layer, since a group may keep any number of them."""
    loose = Unstructured() if self.width == 1 else Block((1, self.width))
    n = self.n if count is None else ranking.count(count).low
    whole = kept_of(1 - n / self.m, units(loose, scores.shape, axes)[0])
    return loose(scores, counts.fewer(ranking.count(whole), drop), axes)

  def excess(self, nonzero: Array, axes: Axes) -> Array:
    """Returns how many more vectors than `n` each group keeps, at least 0: `int32`, one number for each group.

    Without a `width` the shape is that of the weights, with the contraction merged and shortened to groups. With a
    `width` the shape is `[..., K / m, N / width]`, layers and taps in front, and a vector counts unless it is all zero.
    """
    kept = self.pooled(nonzero.astype(jnp.float32), axes).scores > 0
    return jnp.maximum(jnp.sum(kept, self._place(axes), dtype=jnp.int32) - self.n, 0)

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


def _check_sparsity(pattern: Any) -> None:
  own = arguments.verified(type(pattern).__name__, 'sparsity', pattern.sparsity, None)
  object.__setattr__(pattern, 'sparsity', own)  # a number out of a scalar array


def _with_sparsity(name: str, sparsity: float | None) -> str:
  return name if sparsity is None else f'{name} {sparsity:g}'


@dataclasses.dataclass(frozen=True)
class Unstructured:
  """An `Unstructured` prunes any weights: exactly `round(sparsity * size)` of each layer of a leaf, half to even.

  A leaf of unknown axes is one matrix without layers: the count then holds for the leaf as a whole. `balanced`: the
  count holds for the weights of each output by itself, which then do not compete with those of other outputs.
  """

  sparsity: float | None = None
  balanced: bool = False
  static = True
  unit = 'weights'
  __call__, violation = best_units, too_many
  group = 1, 1

  def __post_init__(self):
    _check_sparsity(self)
    arguments.verified('Unstructured', 'balanced', self.balanced)

  def __str__(self) -> str:
    return _with_sparsity('unstructured' + (' balanced' if self.balanced else ''), self.sparsity)

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return _needs_axes(self, axes) if self.balanced else None

  def pooled(self, scores: Array, axes: Axes | None) -> Pooled:
    """Returns the scores themselves: every weight is a unit."""
    layers = () if axes is None else (*axes.layer, *axes.output) if self.balanced else axes.layer
    return Pooled(scores, tuple(sorted(layers)), lambda mask: mask)


@dataclasses.dataclass(frozen=True)
class Block:
  """A `Block` prunes blocks of `shape`, along contraction and output: exactly `round(sparsity * blocks)` of a layer.

  Several contracted axes count as one axis, in the program's order, and so do several output axes. No block crosses a
  spatial tap or a layer. The blocks of all taps of a layer compete. A block's score is the `float32` sum of its scores
  (of magnitudes: the L1 norm); a block with a NaN has the score NaN. NaN is pruned first. Ties keep the lower index: by
  tap, then along the contraction, then along the output. Sharded leaves exchange only counts where no block crosses a
  shard. Where a block does cross one, the order of its sum may change, and with it a near tie.

  `balanced`: every column of blocks, which one range of outputs is computed from, keeps the same number of blocks,
  exactly `round(sparsity * blocks)` being pruned. Kernels are then given one number for every column.
  """

  shape: tuple[int, int]
  sparsity: float | None = None
  balanced: bool = False
  static = True
  unit = 'blocks'
  __call__, violation = best_units, too_many

  def __post_init__(self):
    shape = self.shape if isinstance(self.shape, Iterable) else (self.shape,)
    object.__setattr__(self, 'shape', tuple(shape))  # a list, from a configuration
    if len(self.shape) != 2 or not all(map(whole(1), self.shape)):
      raise ValueError('Block: shape is two whole numbers, weights along the contraction and along the output, as in '
                       f'(128, 128), not {self.shape!r}.')
    _check_sparsity(self)
    arguments.verified('Block', 'balanced', self.balanced)

  def __str__(self) -> str:
    return _with_sparsity('{}x{}'.format(*self.shape) + (' balanced' if self.balanced else ''), self.sparsity)

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    if why := _needs_axes(self, axes):
      return why
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

  @property
  def group(self) -> tuple[int, int]:
    return self.shape

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    """Returns the sums of the blocks, taps and layers first, then along contraction and output."""
    blocks, restored = neighbours.tiled(scores, axes.contracted, axes.output, self.shape)
    whole = lambda kept: restored(jnp.broadcast_to(jnp.expand_dims(kept, (-3, -1)), blocks.shape))
    front = sorted((*axes.spatial, *axes.layer))
    layers = tuple(front.index(a) for a in axes.layer) + ((blocks.ndim - 3,) if self.balanced else ())
    return Pooled(jnp.sum(blocks, (-3, -1), dtype=jnp.float32), layers,
                  lambda kept: neighbours.alike(whole(kept), scores))


@dataclasses.dataclass(frozen=True)
class Channel:
  """A `Channel` prunes whole output channels: exactly `round(sparsity * channels)` of each layer, half to even.

  A channel holds all weights of one index of the output axes, through all spatial taps: a neuron's incoming weights, a
  convolution's filter. A channel's score is the `float32` sum of its scores. NaN is pruned first, ties keep the lower
  index. Only the weights are zero: a bias of the channel stays.
  """

  sparsity: float | None = None
  static = True
  unit = 'channels'
  __post_init__ = _check_sparsity
  __call__, violation = best_units, too_many
  group = 1, 1

  def __str__(self) -> str:
    return _with_sparsity('channel', self.sparsity)

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    if why := _needs_axes(self, axes):
      return why
    if axes.contracted and axes.output:
      return None
    return (f'{self} lies along output axes, and contracted and output axes are {axes.contracted} and {axes.output} '
            f'({axes.source}); leave the leaf out of `where`.')

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    """Returns the sums of the channels, `[*layers, *outputs]` in the order of the leaf's axes."""
    along = (*axes.contracted, *axes.spatial)
    left = [a for a in range(scores.ndim) if a not in along]
    whole = lambda kept: jnp.broadcast_to(jnp.expand_dims(kept, along), scores.shape)
    return Pooled(jnp.sum(scores, along, dtype=jnp.float32), tuple(left.index(a) for a in axes.layer),
                  lambda kept: neighbours.alike(whole(kept), scores))


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
  'balanced': Spelling('unstructured balanced', lambda: Unstructured(balanced=True), ('unstructured balanced',)),
  'channel': Spelling('channel', Channel, ('channel',)),
}


def parse(text: Any) -> Any:
  """Returns the pattern that `text` spells by `TABLE`: `'2:4'` is `NM(2, 4)`, `'128x128'` is `Block((128, 128))`.

  `'2:4x128'` is `NM(2, 4, width=128)`. A number behind a pattern is its sparsity: `'128x128 0.9'` is `Block((128, 128),
  0.9)`. A pattern is returned as it is, and a dict of patterns is parsed entry by entry. Raises `ValueError` for
  anything else.
  """
  if isinstance(text, Mapping):
    return {glob: parse(each) for glob, each in text.items()}
  if callable(text):
    return text
  for spelling in TABLE.values():
    if match := re.fullmatch(spelling.regex, str(text).strip(), re.IGNORECASE):
      return spelling.make(*(int(number) for number in match.groups() if number is not None))
  name, _, number = str(text).strip().rpartition(' ')
  if name and re.fullmatch(r'[01]|[01]?\.\d+', number):
    pattern = parse(name)
    if pattern.sparsity is not None:
      raise ValueError(f'patterns.parse: {text!r}: {pattern} says how sparse it is; leave {number} out.')
    return dataclasses.replace(pattern, sparsity=float(number))
  examples = [example for spelling in TABLE.values() for example in spelling.examples]
  raise errors.unknown('patterns.parse', 'pattern', str(text), examples)
