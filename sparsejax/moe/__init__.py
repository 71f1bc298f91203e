"""Has the words of mixtures of experts: gates, routing with a static capacity, experts of few bits, and placement.

    gate = moe.top_k(2)
    weights, penalty = gate(x @ w, key, step)                       # [T, E], exactly zero for all but two experts
    routing = moe.plan(weights, moe.capacity_of(len(x), 8, 2))      # counts what does not fit
    routing = moe.fill_in(routing, jax.nn.softmax(x @ w))           # vacant slots take the best other tokens
    y = moe.mixture(expert, params, x, routing)                     # computes E * C rows, and no others

A weight of zero saves nothing by itself. `mixture` computes `capacity` rows of each expert, which the compiled program
shows: `jax.jit(...).lower(...).compile().cost_analysis()['flops']`.
"""

from sparsejax.moe.comet import comet, smooth_step
from sparsejax.moe.gating import Gated, balance, dense_to_sparse, hashed, softmax, top_k
from sparsejax.moe.nested import Nested, nested
from sparsejax.moe.permutations import assigned, disorder, permuted, sinkhorn
from sparsejax.moe.placement import device_loads, makespan, placement, schedule
from sparsejax.moe.routing import Routing, capacity_of, fill_in, local, mixture, plan, renormalised

__all__ = [
  'Gated', 'Nested', 'Routing', 'assigned', 'balance', 'capacity_of', 'comet', 'dense_to_sparse', 'device_loads',
  'disorder', 'fill_in', 'hashed', 'local', 'makespan', 'mixture', 'nested', 'permuted', 'placement', 'plan',
  'renormalised', 'schedule', 'sinkhorn', 'smooth_step', 'softmax', 'top_k',
]
