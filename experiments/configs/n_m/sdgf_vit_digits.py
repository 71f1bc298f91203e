"""Compares structure decay in stages, stepwise and geometric, with SR-STE: ViT on digits at 1:8.

    .venv/bin/python -m experiments.train --config experiments/configs/n_m/sdgf_vit_digits.py --workdir runs/sdgf

Not yet run at this size.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = (0, 1, 2, 3)
  config.steps = 400
  config.validate_every = 50
  config.model = {'name': 'vit', 'patch': 2, 'width': 64, 'depth': 3, 'heads': 4}
  sparse = {'pattern': '1:8', 'where': ['mlp/*/kernel'], 'fine_tune_steps': 0.1}
  config.recipes = {
      'dense': {'name': 'dense'},
      'SR-STE': {'name': 'sr_ste', **sparse},
      'SdGf-Stepwise': {'name': 'sdgf_stepwise', **sparse},
      'SdGf-Geometric': {'name': 'sdgf_geometric', **sparse, 'k': 8},  # first 8:64; 64 divides both widths
  }
  return config
