"""Makes models smaller: finds which slices of parameters go together, and removes them from the arrays.

    found = groups(model.apply, variables, x)            # prints groups, units, and what is pinned and why
    keep = {name: score(group) > 0 for name, group in found.items()}
    small = cut(found, variables, keep)                  # smaller parameters, and the function that runs on them
    prove(found, variables, small, x)                    # compares the masked model with the smaller one
    save('small.safetensors', small)

A unit is what can be removed together: a neuron, a head, a channel of a residual stream. Groups are read from the
program, as `groups` says, so that no model is changed or registered. `cut_state` cuts the state of the optimizer.
"""

from sparsejax.structured import architecture, iso_flop, sharing
from sparsejax.structured.costs import Allowance, flops, latency, multiply_adds, parameters, seconds, weights
from sparsejax.structured.erasing import erasable
from sparsejax.structured.files import load, save
from sparsejax.structured.groups import Groups, Member, UnitGroup, groups
from sparsejax.structured.implants import Implanted, implanted, split_centers
from sparsejax.structured.least_squares import tyr
from sparsejax.structured.ordering import clustered, permuted
from sparsejax.structured.proof import Proof, prove
from sparsejax.structured.removal import Cut, cut, masks
from sparsejax.structured.rotating import centered, is_rotated, rotate, slice_gpt, without_means
from sparsejax.structured.searching import Stage, multi_pruner, search
from sparsejax.structured.selecting import choose, choose_in_rounds, grouped, kept
from sparsejax.structured.training import cut_state

__all__ = [
  'Allowance', 'Cut', 'Groups', 'Implanted', 'Member', 'Proof', 'Stage', 'UnitGroup', 'architecture', 'centered',
  'choose', 'choose_in_rounds', 'clustered', 'cut', 'cut_state', 'erasable', 'flops', 'grouped', 'groups', 'implanted',
  'is_rotated', 'iso_flop', 'kept', 'latency', 'load', 'masks', 'multi_pruner', 'multiply_adds', 'parameters',
  'permuted', 'prove', 'rotate', 'save', 'search', 'seconds', 'sharing', 'slice_gpt', 'split_centers', 'tyr', 'weights',
  'without_means',
]
