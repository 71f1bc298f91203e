r"""Tests large sparse against small dense models with as many non-zero parameters: gradual magnitude pruning, digits.

    python -m experiments.claims --workdir runs/claims --only large_sparse_vit_digits

The claim (Zhu and Gupta 2017, 1710.01878) is that the large sparse model is better. A ViT of width 48 has 58,138
parameters, 55,296 of them in the pruned matrices. A ViT of width 24 has 15,250 parameters, a ViT of width 12 has 4,174.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 5 seeds, 57 s of training in all. Not pruned: 98.44 +- 0.52 % dense-48,
96.83 +- 1.13 % dense-24, 91.56 +- 2.53 % dense-12. Differences are paired by seed, with their 95 % intervals, and p is
adjusted for all of `docs/claims.md`:

- sparse-24 > dense-24: 97.17 and 96.83 %, +0.33 +- 1.45, p 1, not reproduced.
- sparse-12 > dense-12: 89.33 and 91.56 %, -2.22 +- 4.36, p 1, not reproduced.

The job was meant for 600 steps and 8 seeds, and cut to fit the time.
"""

from experiments.configs import claims

PARAMETERS, PRUNED = 58_138, 55_296
SMALL = {24: 15_250, 12: 4_174}


def get_config():
  config = claims.vit_digits(seeds=5, steps=400, width=48)
  pruned = {'name': 'gradual_magnitude', 'begin': 0.1, 'end': 0.7, 'every': 10,
            'where': ['attention/*/kernel', 'mlp/*/kernel']}
  config.recipes = {'dense-48': {'name': 'dense'}}
  for width, parameters in SMALL.items():
    config.recipes[f'dense-{width}'] = {'name': 'dense'}
    config.recipes[f'sparse-{width}'] = {**pruned, 'sparsity': (PARAMETERS - parameters) / PRUNED}
    config.models[f'dense-{width}'] = {'width': width}
  return config


def get_sweep():
  return claims.tuned(1e-3, 2e-3, 4e-3)


CLAIM = claims.Claim(
    title='Large sparse, small dense',
    sentence='With as many non-zero parameters, a large model pruned gradually is better than a small dense one.',
    reference='Zhu and Gupta 2017, 1710.01878',
    comparisons=[claims.better(f'sparse-{width}', f'dense-{width}') for width in SMALL])
