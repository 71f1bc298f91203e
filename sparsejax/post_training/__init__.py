"""Prunes trained models from a few batches of data, for any JAX function."""

from sparsejax.post_training import quantized
from sparsejax.post_training.essential import Essential, essential_sparsity
from sparsejax.post_training.pruning import prune, prune_weights
from sparsejax.post_training.recipe import STACKED, Chooser, Recipe, Repair, Stack, stack_of
from sparsejax.post_training.results import Pruned, StackReport
from sparsejax.tables import Report
from sparsejax.types import moved

__all__ = ['STACKED', 'Chooser', 'Essential', 'Pruned', 'Recipe', 'Repair', 'Stack', 'StackReport',
           'essential_sparsity', 'prune', 'prune_weights', 'quantized', 'stack_of']
moved(__name__, {'PruningReport': (Report, 'reports.Report')})
