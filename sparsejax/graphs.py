"""Ranks the edges of a graph, and passes messages along the edges that are kept.

A graph has `nodes` nodes and undirected edges: the ends of edge e are `senders[e]` and `receivers[e]`, and each edge
stands once, in either direction. A mask therefore cannot cut one direction of an edge alone.

    scores = graphs.degree_score(senders, receivers, nodes)
    mask = graphs.kept_edges(scores, 0.3)                                  # 30 % of the edges go
    weights = graphs.normalised(senders, receivers, nodes, mask)
    h = graphs.propagate(x @ w, senders, receivers, weights)         # one layer of a graph convolution
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, counts, patterns
from sparsejax.argument_kinds import ARRAY, TIMES, Kind, having
from sparsejax.arguments import checked
from sparsejax.types import Array, Axes

__all__ = ['Convolved', 'degree_score', 'kept_edges', 'normalised', 'propagate']

_EDGES = Axes((), (0,), source='given')
arguments.declare('degree_score normalised propagate', senders=ARRAY, receivers=ARRAY, nodes=TIMES, mask=ARRAY,
                  weights=Kind('what graphs.normalised returns', having('edges', 'nodes')))
arguments.declare('kept_edges', scores=ARRAY)


class Convolved(NamedTuple):
  """A `Convolved` holds the weights of a graph convolution: of each edge, `float32[E]`, and of each node's own value.

  A pruned edge has the weight 0.
  """

  edges: Array
  nodes: Array


@checked
def degree_score(senders: Array, receivers: Array, nodes: int) -> Array:
  """Returns the score of each edge, `float32[E]`: the product of M(v) / deg(v) of both ends (Seo et al. 2024, TEDDY).

  M(v) is the mean of deg^(-1/2) over the neighbours of v. Edges between nodes of high degree get small scores, and go
  first. The score reads no features. The authors' code (hyunjin72/TEDDY) ranks both directions of an edge apart, and
  may cut one alone. In this list an edge is one entry, and ties go to the lower index. Self-loops, which the code
  never prunes, are not in the list but in `Convolved.nodes`. Raises `ValueError` for a graph without edges, for ends
  of another shape or kind, and for known ends that are no nodes or are equal.
  """
  _refuse('degree_score', senders, receivers, nodes)
  sums = lambda values: _at_nodes(values, senders, receivers, nodes)
  degree = sums((jnp.ones(senders.shape, jnp.float32),) * 2)
  root = jax.lax.rsqrt(jnp.maximum(degree, 1))
  own = sums((root[receivers], root[senders])) / jnp.maximum(degree, 1) ** 2
  return own[senders] * own[receivers]


@checked
def kept_edges(scores: Array, sparsity: float) -> Array:
  """Returns the mask of the edges that stay, `bool[E]`: exactly `round(sparsity * E)` edges of the least scores go.

  Masks of rising sparsities over one score are nested. TEDDY rounds the count down, and rises over levels i by the
  sparsity 1 - (1 - p)^i.
  """
  if scores.ndim != 1 or not scores.size:
    raise ValueError(f'graphs.kept_edges: scores of shape {scores.shape}; give one score an edge, `[E]`, of a graph '
                     'with at least one edge.')
  return patterns.Unstructured(sparsity)(scores, counts.kept_of(sparsity, scores.shape[0]), _EDGES)


@checked
def normalised(senders: Array, receivers: Array, nodes: int, mask: Array | None = None) -> Convolved:
  """Returns the weights D^(-1/2) (A + I) D^(-1/2) of a graph convolution, over the edges in `mask`, `bool[E]`.

  Degrees are counted on the pruned graph, with the self-loop (Kipf and Welling 2017, 1609.02907, equation 2). The
  default of `mask` is every edge.
  """
  _refuse('normalised', senders, receivers, nodes)
  there = jnp.ones(senders.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
  if there.shape != senders.shape:
    raise ValueError(f'graphs.normalised: `mask` has shape {there.shape} and there are {senders.shape[0]} edges; give '
                     'one bool an edge.')
  root = jax.lax.rsqrt(1 + _at_nodes((there, there), senders, receivers, nodes))
  return Convolved(there * root[senders] * root[receivers], root**2)


@checked
def propagate(x: Array, senders: Array, receivers: Array, weights: Convolved) -> Array:
  """Returns for each node the weighted sum of its own value and of its neighbours' values; `x` is `[nodes, ...]`.

  Every edge is computed, a pruned edge with the weight 0. To save the work of pruned edges, drop these edges from all
  three arrays before `jit`: the result is the same.
  """
  if not x.ndim or (weights.edges.shape, weights.nodes.shape) != (senders.shape, x.shape[:1]):
    raise ValueError(f'graphs.propagate: `x` has shape {x.shape}, and `weights` are of {weights.edges.shape} edges and '
                     f'{weights.nodes.shape} nodes; give what graphs.normalised returns for these edges and nodes.')
  _refuse('propagate', senders, receivers, x.shape[0])
  widen = lambda w: w.reshape(*w.shape, *(1,) * (x.ndim - 1)).astype(x.dtype)
  sent = tuple(widen(weights.edges) * x[ends] for ends in (receivers, senders))
  return widen(weights.nodes) * x + _at_nodes(sent, senders, receivers, x.shape[0])


def _at_nodes(values: tuple[Array, Array], senders: Array, receivers: Array, nodes: int) -> Array:
  """Returns the sums at the nodes: `values[0]` of each edge at its sender, and `values[1]` at its receiver."""
  add = lambda each, ends: jax.ops.segment_sum(each, ends, nodes)
  return add(values[0], senders) + add(values[1], receivers)


def _refuse(function: str, senders: Array, receivers: Array, nodes: int) -> None:
  shapes = jnp.shape(senders), jnp.shape(receivers)
  if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not jnp.issubdtype(senders.dtype, jnp.integer):
    raise ValueError(f'graphs.{function}: `senders` and `receivers` have the shapes {shapes[0]} and {shapes[1]} and '
                     f'the dtype {senders.dtype}; give two integer arrays [E], the ends of each edge.')
  if not shapes[0][0]:
    raise ValueError(f'graphs.{function}: the graph has no edges, so that there is nothing to rank or to send along; '
                     'give at least one edge, or a model without messages.')
  if arguments.is_known(senders) and arguments.is_known(receivers):
    ends = np.stack([senders, receivers])  # with NumPy, since under `jit` the results of JAX are traced
    if ends.min() < 0 or ends.max() >= nodes:
      raise ValueError(f'graphs.{function}: ends run from {ends.min()} to {ends.max()}, and the graph has the nodes 0 '
                       f'to {nodes - 1}.')
    if np.any(ends[0] == ends[1]):
      raise ValueError(f'graphs.{function}: edge {int(np.argmax(ends[0] == ends[1]))} is a self-loop; leave self-loops '
                       'out, a graph convolution adds one to every node.')
    more = ends.shape[1] - np.unique(np.sort(ends, 0), axis=1).shape[1]
    if more:
      raise ValueError(f'graphs.{function}: {more} edges stand more than once, in the same or in the other direction; '
                       'give each edge once, as with senders < receivers.')
