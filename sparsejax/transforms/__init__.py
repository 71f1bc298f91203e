"""Contains the optax transforms that make parameters sparse. `sparsify` is behind every recipe.

    tx = transforms.sparsify(optax.adamw(1e-3), flows.hard(), selections.leafwise(NM(2, 4)))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

from sparsejax.transforms.leaves import Leaves
from sparsejax.transforms.method import Method
from sparsejax.transforms.penalised import penalised, proximal
from sparsejax.transforms.small import identity, only, protected, resting, updating
from sparsejax.transforms.sparsify import placeholders, sparsify, under_name
from sparsejax.types import moved

__all__ = [
  'Leaves', 'Method', 'identity', 'only', 'penalised', 'placeholders', 'protected',
  'proximal', 'resting', 'sparsify', 'under_name', 'updating',
]
moved(__name__, {'gated': (updating, 'transforms.updating')})
