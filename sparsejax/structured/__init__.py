"""Makes models smaller: finds which slices of parameters go together, and removes them from the arrays."""

from sparsejax.structured.groups import Group, Groups, Member, groups

__all__ = ['Group', 'Groups', 'Member', 'groups']
