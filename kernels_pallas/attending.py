"""`sparse_attention(apply, builder)` runs any JAX function with sparse attention, without a change to the model.

Attention is found in the function's program (`sparsejax.attention`). A builder says which blocks of keys each block of
queries sees, and `block_sparse_attention` computes these blocks alone.

    run = sparse_attention(model.apply, attention.sliding(256, block=64))
    logits = run(variables, x)
    print(sparse_attention(model.apply, builder, explain=True)(variables, x))      # each attention, or why it is dense
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch
from kernels_pallas.attention import block_sparse_attention
from sparsejax import tables
from sparsejax.argument_kinds import ARRAY, TIMES
from sparsejax.arguments import checked
from sparsejax.attention import (
  AttentionSite,
  BlockIndex,
  BlockMask,
  ScoreEdit,
  UnreadAttention,
  attended,
  found,
  given,
  of_mask,
)
from sparsejax.attention.masks import Builder, diagonal
from sparsejax.types import Array


@checked
def sparse_attention(apply: Callable[..., Any], builder: Builder, *, implementation: str | None = None,
                     explain: bool = False, counted: bool = False) -> Callable[..., Any]:
  """Returns `apply` with each softmax attention of its program replaced by attention to the builder's blocks.

  `builder(site)` returns the `BlockMask` of an `AttentionSite`; `sparsejax.attention` has builders, such as `sliding`,
  `sharded` and `routed`. Blocks that a causal mask, or another mask known at trace time, hides as a whole are not
  computed. All other masks, bias, soft caps and dropout have their effect within the blocks. No query is
  left without a key: a query block of which a query would see none keeps its diagonal. If a traced mask may hide keys,
  every query block does. Derivatives are those of the sparse attention. `implementation` is that of
  `block_sparse_attention`.

  All that looks like attention and cannot be read stays dense, and `explain=True` lists it with the reason. The
  function then returns a `tables.Report` and computes nothing: each attention, its fraction of blocks left out, what
  CPU, GPU and TPU run, and why a platform does not run its own kernel. `counted=True`: the function returns the result
  and, by address of the site, `int32[2]`: the blocks in all lists, and the blocks that did not fit into the capacity.
  Without `counted`, blocks that do not fit
  raise a warning when the program runs. Counts cannot leave a loop or `remat`: `counted=True` refuses such sites.
  """
  dispatch.refuse_other_names('sparse_attention', implementation)

  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    replaced = Replaced(builder, implementation, explain, counted)
    run = attended(apply, replaced.answer, replaced.rows.append)
    if explain:
      jax.eval_shape(lambda: None if run(*args, **kwargs) is None else None)
      return _report(replaced.rows)
    result = run(*args, **kwargs)
    return (result, replaced.counts) if counted else result

  return call


@dataclasses.dataclass(frozen=True)
class AttentionRow:
  """An `AttentionRow` says what became of one attention of a program, in a `tables.Report`.

  `shape` is that of the scores, `[batch, heads, Tq, Tk]`. `achieved` is the fraction of blocks that are left out, of
  those that masks leave. `problem` is the reason why the attention is dense, or ''.
  """

  scope: str
  place: str
  shape: tuple[int, ...]
  achieved: float
  edits: str
  runs: str
  problem: str

  @property
  def cells(self) -> tuple[str, ...]:
    return (self.scope or '-', 'x'.join(map(str, self.shape)), self.edits, tables.number(self.achieved), self.runs,
            self.problem and f'{self.place}: {self.problem}')


HEAD = ('attention', 'shape', 'edits', 'achieved', 'runs', 'dense because')


def _report(rows: list[Any]) -> tables.Report:
  whole = [row if isinstance(row, AttentionRow) else AttentionRow(
    row.scope, row.place, row.shape, 0.0, '', '', row.why) for row in rows]
  notes = tuple(f'nothing is left out of {row.place}: the lists have all of its blocks' for row in whole
                if not row.problem and row.achieved == 0) if whole else ('the program has no softmax attention',)
  return tables.Report(tuple(whole), notes, head=HEAD)


@dataclasses.dataclass
class Replaced:
  """A `Replaced` answers each site of a program with block-sparse attention, and keeps rows and counts."""

  builder: Builder
  implementation: str | None
  explain: bool
  counted: bool
  rows: list[AttentionRow | UnreadAttention] = dataclasses.field(default_factory=list)
  counts: dict[Any, Array] = dataclasses.field(default_factory=dict)

  def answer(self, site: AttentionSite) -> Array:
    """Returns the attention of a site to the builder's blocks."""
    blocks = self.builder(site)
    if not isinstance(blocks, BlockMask) or not ARRAY.fits(blocks.mask):
      raise ValueError(f'sparse_attention: the builder returned a {type(blocks).__name__} at {site.place}; it must '
                       'return an attention.BlockMask, whose mask is an array.')
    numbers = blocks.block_q, blocks.block_k, 1 if blocks.capacity is None else blocks.capacity
    if not all(map(TIMES.fits, numbers)):
      raise ValueError(f'sparse_attention: the builder returned block_q, block_k and capacity {numbers} at '
                       f'{site.place}; each must be {TIMES.says}.')
    if blocks.capacity is None and isinstance(blocks.mask, jax.core.Tracer):
      raise ValueError(f'sparse_attention: the builder returned a traced mask at {site.place}; give BlockMask '
                       'capacity=, the most blocks of keys in a list.')
    index = lists(site, blocks)
    if self.explain:
      self.rows.append(_row(site, blocks, index, self.implementation))
    elif self.counted:
      if site.enclosed:
        raise ValueError(f'sparse_attention: {site.place} is inside of a loop or remat, which counts cannot leave; '
                         'take counted=False, which warns about an overflow.')
      self.counts[site.address] = jnp.stack([index.counts.sum(), index.overflow])
    elif blocks.capacity is not None and not blocks.fits:
      jax.debug.callback(functools.partial(_warn, site.place), index.overflow)
    return attend(site, blocks, index, self.implementation)


def _warn(place: str, overflow: Any) -> None:
  if (overflow := int(np.sum(overflow))) > 0:
    warnings.warn(f'sparse_attention: {overflow} blocks at {place} did not fit into the capacity of the lists; give '
                  'the builder a larger capacity.', stacklevel=2)


def lists(site: AttentionSite, blocks: BlockMask) -> BlockIndex:
  """Returns the lists of the builder's blocks at a site, without blocks that are hidden, and never empty."""
  mask, seen = blocks.mask, site.blocks(blocks.block_q, blocks.block_k)
  if mask.shape[-2:] != seen.shape[-2:] or mask.ndim not in (3, 4):
    raise ValueError(f'sparse_attention: the builder returned a mask of shape {mask.shape} at {site.place}; '
                     f'{site.q.shape[1]} queries and {site.k.shape[1]} keys in blocks of {blocks.block_q} and '
                     f'{blocks.block_k} need [..., {seen.shape[-2]}, {seen.shape[-1]}].')
  shared = (1, site.heads), (1, site.q.shape[0])  # heads, and examples
  if mask.dtype != bool or any(n not in fit for n, fit in zip(mask.shape[-3::-1], shared)):
    raise ValueError(f'sparse_attention: the builder returned a mask {mask.dtype}{list(mask.shape)} at {site.place}; '
                     f'give bool[1 or {site.heads}, nq, nk], or one such mask for each of the {site.q.shape[0]} '
                     'examples.')
  ranked: Callable[[Any], Any] = lambda a: a.reshape((1,) * (mask.ndim - a.ndim) + a.shape)
  rows, columns = seen.shape[-2:]
  own, mask = ranked(diagonal(rows, columns, blocks.block_q, blocks.block_k, site.offset or 0)), mask & ranked(seen)
  kept = mask | (own if site.traced_masks else own & _left_alone(site, blocks, mask))
  wide, least = (*kept.shape[:-3], site.heads, *kept.shape[-2:]), int(own.sum(-1).max())
  kept = (jnp if isinstance(kept, jax.Array) else np).broadcast_to(kept, wide)
  if blocks.capacity is None:
    return of_mask(kept)
  more = site.traced_masks or site.masks or blocks.block_q != blocks.block_k
  return of_mask(kept, blocks.capacity + least if more else max(blocks.capacity, least))


def _left_alone(site: AttentionSite, blocks: BlockMask, mask: Any) -> Any:
  """Returns which blocks of queries have a query that sees no key of the blocks of `mask`: `bool[..., nq, 1]`."""
  queries = site.blocks_of_queries(blocks.block_q, blocks.block_k)
  queries = queries.reshape((1,) * (mask.ndim - 3) + queries.shape)
  sees = (mask[..., None, :] & queries).any(-1)
  return (~sees & queries.any(-1)).any(-1)[..., None] | ~mask.any(-1)[..., None]


def attend(site: AttentionSite, blocks: BlockMask, index: BlockIndex, implementation: str | None = None) -> Array:
  """Returns the attention of a site to the listed blocks; lists that differ between examples are mapped over."""
  fixed: dict[str, Any] = dict(block_q=blocks.block_q, block_k=blocks.block_k, causal=site.causal, scale=site.scale,
               implementation=implementation)
  op: Any = block_sparse_attention
  run: Callable[..., Array] = functools.partial(op, **fixed)
  kinds, arrays = [edit.kind for edit in site.edits], [edit.array for edit in site.edits]
  if index.index.ndim == 3:
    return run(site.q, site.k, site.v, index.index, index.counts, edits=site.edits)

  def one(q: Array, k: Array, v: Array, index: Array, counts: Array, arrays: list[Any]) -> Array:
    edits = tuple(map(ScoreEdit, kinds, arrays))
    return run(q[None], k[None], v[None], index, counts, edits=edits)[0]

  axes = [None if a is None or a.shape[0] == 1 else 0 for a in arrays]
  given = [a if a is None or a.shape[0] == 1 else a[:, None] for a in arrays]
  return jax.vmap(one, (0, 0, 0, 0, 0, axes))(site.q, site.k, site.v, index.index, index.counts, given)


def _row(site: AttentionSite, blocks: BlockMask, index: BlockIndex, implementation: str | None) -> AttentionRow:
  """Returns the row of a site that is replaced; the capacity counts where lists are not known at trace time."""
  seen = np.broadcast_to(site.blocks(blocks.block_q, blocks.block_k), (site.heads, *index.counts.shape[-1:], 1)[:2] + (
    -(-site.k.shape[1] // blocks.block_k),))
  known = blocks.capacity is None
  listed = int(np.asarray(index.counts).sum()) if known else int(
    np.minimum(seen.sum(-1), index.index.shape[-1]).sum())
  examples = 1 if index.counts.ndim == 2 or not known else index.counts.shape[0]
  shape = (site.q.shape[0], site.heads, site.q.shape[1], site.k.shape[1])
  choices: Any = block_sparse_attention(
    site.q[:1], site.k[:1], site.v[:1], *(a if a.ndim == n else a[0] for a, n in ((index.index, 3), (index.counts, 2))),
    block_q=blocks.block_q, block_k=blocks.block_k, causal=site.causal, scale=site.scale, explain=True,
    edits=tuple(edit._replace(array=None if edit.array is None else edit.array[:1]) for edit in site.edits))
  runs = implementation or ', '.join(map(_told, choices.items()))
  edits = ', '.join((['causal'] if site.causal else []) + [edit.kind for edit in site.edits])
  return AttentionRow(site.scope, site.place, shape, 1 - listed / max(examples * int(seen.sum()), 1), edits, runs, '')


def _told(choice: tuple[str, Any]) -> str:
  """Returns what a platform runs, and why its own kernel cannot."""
  platform, (name, reason) = choice
  why = reason.partition(f'not {dispatch.PLATFORMS.get(platform)}: ')[2]
  return f'{platform}: {name}' + (f' ({why})' if why else '')


class Reused(NamedTuple):
  """A `Reused` is the state of `once`: how many steps were made, and the blocks of each attention, by `site.name`."""

  step: Array
  masks: dict[str, Array]


@checked
def once(apply: Callable[..., Any], builder: Builder, after: int, *, implementation: str | None = None
         ) -> tuple[Callable[..., Reused], Callable[..., tuple[Any, Reused]]]:
  """Returns `(init, step)`: attention is dense up to step `after`, which chooses the blocks of all later steps.

  `init(*args)` returns the `Reused` before step 0, and `step(state, *args)` the result of `apply(*args)` with the next
  state. Both can be compiled, and `step` may be the body of a loop. A step computes either form, not both. A later step
  whose inputs have another shape is refused. Denoisers reuse patterns of 20 % of their steps (SparseD, Wang et al.
  2025, 2509.24014), whose blocks `attention.measured` finds.
  """
  dispatch.refuse_other_names('once', implementation)
  choose = found(apply, builder)

  def init(*args: Any) -> Reused:
    shapes = jax.eval_shape(choose, *args)
    return Reused(jnp.zeros((), jnp.int32), {name: jnp.zeros(a.shape, a.dtype) for name, a in shapes.items()})

  def step(state: Reused, *args: Any) -> tuple[Any, Reused]:
    choice = lambda args: _alike(choose(*args), state.masks)
    masks = jax.lax.cond(state.step == after, choice, lambda args: state.masks, args)
    sparse = lambda args: sparse_attention(apply, _given(state.masks, builder), implementation=implementation)(*args)
    result = jax.lax.cond(state.step <= after, lambda args: apply(*args), sparse, args)
    return result, Reused(state.step + 1, masks)

  return init, step


def _alike(masks: dict[str, Array], before: dict[str, Array]) -> dict[str, Array]:
  shapes = lambda of: {name: mask.shape for name, mask in of.items()}
  if shapes(masks) != shapes(before):
    raise ValueError(f'once: the state is for masks of shapes {shapes(before)}, and this step has {shapes(masks)}: its '
                     'inputs have another shape, or it is of another program. Call init for these inputs.')
  return masks


def _given(masks: dict[str, Array], builder: Builder) -> Builder:
  """Returns the builder of these masks, with the blocks and the room that `builder` would have."""
  def build(site: AttentionSite) -> BlockMask:
    like = builder(site)  # only its lengths are used
    mask = given(masks, capacity=like.capacity or like.mask.shape[-1], block=like.block_q)(site)
    return mask._replace(fits=like.fits or like.capacity is None)

  return build
