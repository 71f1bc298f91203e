"""Transforms of optax that make the parameters sparse: `sparsify` is behind every recipe."""

from sparsejax.transforms.sparsify import gated, identity, only, sparsify

__all__ = ['gated', 'identity', 'only', 'sparsify']
