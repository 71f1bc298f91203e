"""Prunes trained models from a few batches of data, for any JAX function."""

from sparsejax.post_training.recipe import STACKED, Chooser, Recipe, Repair, Stack, stack_of

__all__ = ['STACKED', 'Chooser', 'Recipe', 'Repair', 'Stack', 'stack_of']
