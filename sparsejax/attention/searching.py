"""Searches the pattern of each head once, and reuses patterns over steps: SparseD, Sparse-vDiT.

    patterns = {'full': full(16), 'band': band(1, 16), 'columns': columns(2, 16)}
    choice = search(apply, params, batches, patterns, budget=0.4)          # {site.name: the pattern of each head}
    builder = of_choice(choice, patterns)

    masks = found(apply, measured(0.3, block=16))(params, x)               # what a builder chooses here, by site.name
    builder = given(masks, capacity=5, block=16)                           # the same blocks for every later step
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import errors
from sparsejax.arguments import checked
from sparsejax.attention.masks import BlockMask, Builder, diagonal
from sparsejax.attention.routing import best_blocks
from sparsejax.attention.sites import AttentionSite, attended
from sparsejax.types import Array


def _visible(site: AttentionSite, builder: Builder) -> tuple[np.ndarray, BlockMask]:
  """Returns the blocks that a builder keeps at a site and masks leave, `bool[heads, nq, nk]`, with the diagonal."""
  blocks = builder(site)
  rows, columns = blocks.mask.shape[-2:]
  own = diagonal(rows, columns, blocks.block_q, blocks.block_k)
  kept = np.asarray(blocks.mask) & site.blocks(blocks.block_q, blocks.block_k)
  kept = kept | (own & ~kept.any(-1, keepdims=True))
  return np.broadcast_to(kept, (site.heads, *kept.shape[-2:])), blocks


def of_tokens(mask: Any, block_q: int, block_k: int, queries: int, keys: int) -> Any:
  """Returns a mask of blocks `[..., nq, nk]` as a mask of tokens `[..., Tq, Tk]`."""
  xp = np if isinstance(mask, np.ndarray) else jnp
  return xp.repeat(xp.repeat(mask, block_q, -2), block_k, -1)[..., :queries, :keys]


@checked
def search(apply: Callable[..., Any], params: Any, batches: Iterable[Any], patterns: Mapping[str, Builder],
           budget: float) -> dict[str, tuple[str, ...]]:
  """Returns the name of the pattern of each head of each attention, by `site.name`.

  `budget` is the fraction of all visible blocks that may be computed. The error of a pattern at a head is the squared
  difference to the head's dense output, summed over all batches. All heads begin with the pattern of most blocks. The
  change with the least additional error per block saved is made until the budget is kept. `apply(params, batch)` runs
  operation by operation. Sparse-vDiT (Chen et al. 2025, 2506.03065) minimises error plus a weighted cost for each head;
  a budget over all heads chooses the weight. Raises `ValueError` if no choice keeps the budget, and for an attention
  inside of a loop. Raises `ValueError` for patterns that read queries and keys, or whose blocks differ.
  """
  if not patterns:
    raise ValueError("attention.search: there are no patterns to choose from; give some by name, as {'full': full()}.")
  found: dict[str, np.ndarray] = {}
  costs: dict[str, np.ndarray] = {}
  totals: dict[str, int] = {}

  def answer(site: AttentionSite) -> None:
    if site.enclosed:
      raise ValueError(f'attention.search: {site.place} is inside of a loop or remat; unroll it.')
    dense = np.asarray(site.attend())
    _refuse_blocks('attention.search', {name: builder(site) for name, builder in patterns.items()})
    rows = [_measured(site, builder, dense) for builder in patterns.values()]
    found[site.name] = found.get(site.name, 0) + np.stack([error for error, _, _ in rows], 1)
    costs[site.name], totals[site.name] = np.stack([cost for _, cost, _ in rows], 1), rows[0][2]

  run = attended(apply, answer)
  for batch in batches:
    run(params, batch)
  names, picks = list(patterns), _greedy(found, costs, budget * sum(totals.values()))
  return {site: tuple(names[i] for i in row) for site, row in picks.items()}


def _measured(site: AttentionSite, builder: Builder, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns a pattern's error and number of blocks at each head, and how many blocks masks leave in all heads."""
  kept, blocks = _visible(site, builder)
  seen = of_tokens(kept, blocks.block_q, blocks.block_k, site.q.shape[1], site.k.shape[1])
  error = np.square(np.asarray(site.attend(jnp.asarray(seen)[None])) - dense).sum((0, 1, 3))
  whole = np.broadcast_to(site.blocks(blocks.block_q, blocks.block_k), kept.shape)
  return error, kept.sum((1, 2)), int(whole.sum())


def _greedy(gaps: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray], budget: float
            ) -> dict[str, np.ndarray]:
  """Returns the pattern of each head: the cheapest error per block saved first, until the budget is kept."""
  picks = {site: cost.argmax(1) for site, cost in costs.items()}
  spent = lambda: sum(float(np.take_along_axis(costs[s], p[:, None], 1).sum()) for s, p in picks.items())
  while spent() > budget:
    best = min(((_rate(gaps[s][h], costs[s][h], p[h], i), s, h, i) for s, p in picks.items() for h in range(len(p))
                for i in range(costs[s].shape[1]) if costs[s][h, i] < costs[s][h, p[h]]), default=None)
    if best is None:
      raise ValueError(f'attention.search: no choice has at most {budget:.0f} blocks, the least is {spent():.0f}; '
                       'raise the budget, or add a pattern of fewer blocks, as attention.empty().')
    picks[best[1]][best[2]] = best[3]
  return picks


def _rate(error: np.ndarray, cost: np.ndarray, now: int, then: int) -> float:
  return float(error[then] - error[now]) / float(cost[now] - cost[then])


def _refuse_blocks(function: str, made: Mapping[str, BlockMask]) -> None:
  """Raises `ValueError` for patterns that read queries and keys, and unless the blocks of all have one size."""
  if wrong := [name for name, blocks in made.items() if blocks.capacity is not None]:
    raise ValueError(f'{function}: pattern {wrong[0]!r} reads queries and keys; give patterns that are known, as '
                     'band(1).')
  sizes = {name: (blocks.block_q, blocks.block_k) for name, blocks in made.items()}
  if len({*sizes.values()}) > 1:
    raise ValueError(f'{function}: the patterns have blocks of {sizes} tokens; give all one block.')


def _chosen(site: AttentionSite, choice: Any, patterns: Any) -> BlockMask:
  own = site.own('attention.of_choice', 'choice', choice)
  for name in own:
    if name not in patterns:
      raise errors.unknown('attention.of_choice', 'pattern', name, patterns)
  if len(own) != site.heads:
    raise site.refused('attention.of_choice', f'the choice has {len(own)} patterns for {site.heads} heads.')
  made = {name: patterns[name](site) for name in dict.fromkeys(own)}
  _refuse_blocks('attention.of_choice', made)
  wide = {name: np.broadcast_to(m.mask, (site.heads, *m.mask.shape[-2:])) for name, m in made.items()}
  first = next(iter(made.values()))
  return first._replace(mask=np.stack([wide[name][h] for h, name in enumerate(own)]))


@checked
def of_choice(choice: Mapping[str, Any], patterns: Mapping[str, Builder]) -> Builder:
  """Returns the builder of what `search` found: each head of each attention has its own pattern."""
  return functools.partial(_chosen, choice=choice, patterns=patterns)


# Patterns that are found once.


def _measured_blocks(site: AttentionSite, select: float, block: int, prompt: int) -> BlockMask:
  weights = site.weights()
  if prompt > weights.shape[3]:
    raise site.refused('attention.measured', f'`prompt` of {prompt} tokens is longer than the keys.')
  queries, keys = (-(-n // block) for n in weights.shape[2:])
  pad = [(0, n * block - m) for n, m in zip((queries, keys), weights.shape[2:])]
  split = jnp.pad(weights, [(0, 0), (0, 0), *pad]).reshape(*weights.shape[:2], queries, block, keys, block)
  rows = np.minimum(block, weights.shape[2] - block * np.arange(queries)).astype('float32')
  scores = split.sum((3, 5)) / rows[None, None, :, None]
  first = -(-prompt // block)
  parts = [range(first), range(first, keys)]
  chosen, room = jnp.zeros(scores.shape, bool), 0
  for part in parts:
    if len(part):
      keep = min(len(part), max(1, int(len(part) * select) + 1))
      here = np.isin(np.arange(keys), list(part))[None, None, None]
      chosen |= best_blocks(site, jnp.where(here, scores, -jnp.inf), keep, block).mask & here
      room += keep
  return BlockMask(chosen, block, block, room, fits=True)


@checked
def measured(select: float, block: int = 64, prompt: int = 0) -> Builder:
  """Returns the builder of SparseD: the blocks of keys with the most attention weight, from the whole attention.

  A block of queries keeps `int(n select) + 1` of n blocks, of the first `prompt` tokens and of all others apart. The
  score of a block is the sum of its weights, and a shorter last block has no disadvantage of padding. The whole
  attention is computed, so take this builder with `found`. SparseD (Wang et al. 2025, 2509.24014); the authors' code
  scales by `sqrt(heads)`, takes the mean over padding too, and cannot keep all blocks.
  """
  return lambda site: _measured_blocks(site, select, block, prompt)


@checked
def found(apply: Callable[..., Any], builder: Builder) -> Callable[..., dict[str, Array]]:
  """Returns a function of the arguments of `apply`: the mask of the builder at each attention, by `site.name`.

  The masks are arrays `[batch or 1, heads or 1, nq, nk]`, which a loop may carry. Raises `ValueError` for an attention
  inside of a loop of the program.
  """
  def call(*args: Any, **kwargs: Any) -> dict[str, Array]:
    masks: dict[str, Array] = {}

    def answer(site: AttentionSite) -> None:
      if site.enclosed:
        raise ValueError(f'attention.found: {site.place} is inside of a loop or remat, which no mask can leave.')
      mask = jnp.asarray(builder(site).mask)
      masks[site.name] = mask if mask.ndim == 4 else mask[None]

    attended(apply, answer)(*args, **kwargs)
    return masks

  return call


@checked
def given(masks: Mapping[str, Array], capacity: int, block: int = 64) -> Builder:
  """Returns the builder of masks that were found before, by `site.name`; a list has room for `capacity` blocks."""
  def build(site: AttentionSite) -> BlockMask:
    mask = site.own('attention.given', 'mask', masks)
    return BlockMask(mask[0] if mask.shape[0] == 1 else mask, block, block, capacity)

  return build


