"""Measures sparse models, losses around them, and their predictions.

    before = sj.masks(params, state)
    ...                                                     # some training steps
    metrics.sad(before, sj.masks(params, state))['mlp/kernel'].fraction

Functions of masks and weights are in `models`, those of the loss around a model in `landscapes`, and those of
predictions in `predictions`; all have their names here.
"""

from sparsejax.metrics.landscapes import layer_barriers, sharpness
from sparsejax.metrics.models import (
  Barrier,
  Change,
  Exploration,
  Flops,
  Overlap,
  Variance,
  barrier,
  collapsed,
  density,
  flops,
  gradient_variance,
  itop_rate,
  kept,
  model_soup,
  overlap,
  sad,
  strength,
  union,
)
from sparsejax.metrics.predictions import Calibration, Forgetting, calibration, forgetting, ndcg_at, recall_at

__all__ = [
  'Barrier', 'Calibration', 'Change', 'Exploration', 'Flops', 'Forgetting', 'Overlap', 'Variance', 'barrier',
  'calibration', 'collapsed', 'density', 'flops', 'forgetting', 'gradient_variance', 'itop_rate', 'kept',
  'layer_barriers', 'model_soup', 'ndcg_at', 'overlap', 'recall_at', 'sad', 'sharpness', 'strength', 'union',
]
