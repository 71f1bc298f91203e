r"""Tests dynamic sparse training against a fixed random mask: static, SET and RigL at 90 and 95 %, a small ViT, digits.

    python -m experiments.train --config experiments/configs/claims/dynamic_vit_digits.py --workdir runs/dynamic

The claim (Evci et al. 2020, 1911.11134) is RigL > SET > static. All three methods have the same sparsity in each layer
(ERK), so they differ only in where weights grow.

Measured on one of two shared CPU cores, jax 0.10.2, 10 seeds, 994 s of training in all. Not pruned: 97.58 +- 0.41 %
dense. Differences are paired by seed, with their 95 % intervals:

- RigL-90 > SET-90: 94.00 and 94.94 %, -0.94 +- 0.79, the opposite.
- SET-90 > static-90: 94.94 and 94.31 %, +0.64 +- 0.57, reproduced.
- RigL-95 > SET-95: 90.47 and 91.75 %, -1.28 +- 1.91, not reproduced.
- SET-95 > static-95: 91.75 and 91.75 %, +0.00 +- 1.12, not reproduced.

The first run had 5 seeds and 400 steps and told nothing apart. These seeds and 5 more were then run for 1000 steps.
"""

from experiments.configs import claims


def get_config():
  config = claims.vit_digits(seeds=10, steps=1000)
  config.recipes.update(claims.moving((90, 95), where=['attention/*/kernel', 'mlp/*/kernel']))
  return config


def get_sweep():
  return claims.tuned(1e-3, 2e-3, 4e-3)


CLAIM = claims.Claim(
    title='Dynamic sparse training',
    sentence='At 90 and 95 % RigL is better than SET, and SET than a fixed random mask.',
    reference='Evci et al. 2020, Rigging the Lottery, 1911.11134, figure 2',
    comparisons=claims.moving_is_better((90, 95)))
