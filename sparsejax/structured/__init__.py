"""Makes models smaller: finds which slices of parameters go together, and removes them from the arrays."""

from sparsejax.structured.groups import Group, Groups, Member, groups
from sparsejax.structured.removal import Cut, cut, masks

__all__ = ['Cut', 'Group', 'Groups', 'Member', 'cut', 'groups', 'masks']
