r"""Tests dynamic sparse training against a fixed random mask: static, SET and RigL at 90 and 95 %, a small ViT, digits.

    python -m experiments.claims --workdir runs/claims --only dynamic_vit_digits

The claim (Evci et al. 2020, 1911.11134) is RigL > SET > static. All three methods have the same sparsity in each layer
(ERK), so they differ only in where weights grow.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 10 seeds, 265 s of training in all. Not pruned: 97.44 +- 0.62 % dense.
Differences are paired by seed, with their 95 % intervals, and p is adjusted for all of `docs/claims.md`:

- RigL-90 > SET-90: 95.58 and 96.28 %, -0.69 +- 0.88, p 0.86, not reproduced.
- SET-90 > static-90: 96.28 and 96.08 %, +0.19 +- 0.86, p 1, not reproduced.
- RigL-95 > SET-95: 94.75 and 95.36 %, -0.61 +- 1.16, p 1, not reproduced.
- SET-95 > static-95: 95.36 and 93.78 %, +1.58 +- 1.36, p 0.27, not reproduced.
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
