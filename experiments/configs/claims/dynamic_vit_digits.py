r"""Dynamic sparse training against a fixed random mask: static, SET and RigL at 90 and 95 %, a small ViT, digits.

  python -m experiments.train --config experiments/configs/claims/dynamic_vit_digits.py --workdir runs/dynamic

The claim (Evci et al. 2020, 1911.11134): RigL > SET > static. All three have the same shares of the layers (ERK), so
that only where weights grow differs.

Not yet run.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 400
  config.batch_size = 32
  config.model = {'name': 'vit', 'patch': 2, 'width': 32, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  methods = {
      'static': {'name': 'static_sparse'},
      'SET': {'name': 'set_', 'every': 20},
      'RigL': {'name': 'rigl', 'every': 20},
  }
  shared = {'where': ['attention/*/kernel', 'mlp/*/kernel'], 'allocation': 'erk'}
  config.recipes = {f'{name}-{percent}': {**method, **shared, 'sparsity': percent / 100}
                    for percent in (90, 95) for name, method in methods.items()}
  return config
