"""The models that are trained, by name."""

from experiments.models.vit import LM, MLP, Block, ViT, make

__all__ = ['LM', 'MLP', 'Block', 'ViT', 'make']
