r"""Dynamic sparse training against a fixed random mask: static, SET and RigL at 90 and 95 %, a small ViT, digits.

  python -m experiments.train --config experiments/configs/claims/dynamic_vit_digits.py --workdir runs/dynamic

The claim (Evci et al. 2020, 1911.11134): RigL > SET > static. All three have the same shares of the layers (ERK), so
that only where weights grow differs.

Measured on two shared CPU cores, jax 0.10.2, 5 seeds, 385 s of training in all, 95 % intervals of paired differences:
RigL-90 > SET-90: 75.44 and 79.78 % (-4.33 +- 5.58, not reproduced); SET-90 > static-90: 79.78 and 78.00 % (+1.78 +-
3.74, not reproduced); RigL-95 > SET-95: 65.33 and 60.67 % (+4.67 +- 7.02, not reproduced); SET-95 > static-95: 60.67
and 55.83 % (+4.83 +- 5.59, not reproduced).
"""

from experiments.configs import claims


def get_config():
  config = claims.vit_digits(seeds=10, steps=1000)
  methods = {
      'static': {'name': 'static_sparse'},
      'SET': {'name': 'set_', 'every': 20},
      'RigL': {'name': 'rigl', 'every': 20},
  }
  shared = {'where': ['attention/*/kernel', 'mlp/*/kernel'], 'allocation': 'erk'}
  config.recipes = {'dense': {'name': 'dense'}}
  for percent in (90, 95):
    for name, method in methods.items():
      config.recipes[f'{name}-{percent}'] = {**method, **shared, 'sparsity': percent / 100}
  return config
