"""Measures sparse models, losses around them, and their predictions.

    before = sj.masks(params, state)
    ...                                                     # some training steps
    metrics.sad(before, sj.masks(params, state))['mlp/kernel'].fraction

`models` has functions of masks and weights, `landscapes` of the loss around a model, and `predictions` of predictions.
Users find all names here.
"""

from sparsejax.metrics.landscapes import Barrier, barrier, layer_barriers, sharpness
from sparsejax.metrics.models import (
  Change,
  Exploration,
  Flops,
  Overlap,
  Variance,
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
from sparsejax.metrics.predictions import CalibrationError, Forgetting, calibration, forgetting, ndcg_at, recall_at

__all__ = [
  'Barrier', 'CalibrationError', 'Change', 'Exploration', 'Flops', 'Forgetting', 'Overlap', 'Variance', 'barrier',
  'calibration', 'collapsed', 'density', 'flops', 'forgetting', 'gradient_variance', 'itop_rate', 'kept',
  'layer_barriers', 'model_soup', 'ndcg_at', 'overlap', 'recall_at', 'sad', 'sharpness', 'strength', 'union',
]
