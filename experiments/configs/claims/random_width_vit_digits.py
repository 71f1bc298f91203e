r"""Tests random pruning at 95 %: ERK against uniform sparsity, and the distance to dense at growing width, digits.

    python -m experiments.claims --workdir runs/claims --only random_width_vit_digits

ERK is claimed to be better than uniform sparsity (Evci et al. 2020, 1911.11134). Random pruning is claimed to come
nearer to dense with the width (Liu et al. 2022, 2202.02643). The patch embedding, the first layer, is dense.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 5 seeds, 70 s of training in all. Not pruned: 91.56 +- 2.53 % dense-12,
96.83 +- 1.13 % dense-24, 98.44 +- 0.52 % dense-48. Differences are paired by seed, with their 95 % intervals, and p is
adjusted for all of `docs/claims.md`:

- ERK-48 > uniform-48: 89.67 and 83.06 %, +6.61 +- 9.17, p 0.86, not reproduced.
- gap of ERK-12 > gap of ERK-24: 59.83 and 34.50 %, +25.33 +- 14.97, p 0.13, not reproduced.
- gap of ERK-24 > gap of ERK-48: 34.50 and 8.78 %, +25.72 +- 8.74, p 0.021, reproduced.

The job was meant for 600 steps and 8 seeds, and cut to fit the time.
"""

from experiments.configs import claims

WIDTHS = (12, 24, 48)


def get_config():
  config = claims.vit_digits(seeds=5, steps=400, width=48)
  pruned = {'name': 'random_pruning', 'sparsity': 0.95, 'where': ['attention/*/kernel', 'mlp/*/kernel', 'head/kernel']}
  recipes = {'dense': {'name': 'dense'}, 'ERK': {**pruned, 'allocation': 'erk'}}
  config.recipes = {f'{name}-{width}': recipe for width in WIDTHS for name, recipe in recipes.items()}
  config.recipes['uniform-48'] = {**pruned, 'allocation': 'uniform'}
  config.models = {f'{name}-{width}': {'width': width} for width in WIDTHS for name in recipes}
  return config


def get_sweep():
  return claims.tuned(1e-3, 2e-3, 4e-3)


def closing(narrow, wide):
  gap = lambda scores, width: scores.test[f'dense-{width}'] - scores.test[f'ERK-{width}']
  return lambda scores: claims.Comparison(f'gap of ERK-{narrow} > gap of ERK-{wide}', scores.unit,
                                          gap(scores, narrow), gap(scores, wide))


CLAIM = claims.Claim(
    title='Random pruning',
    sentence='At 95 % ERK is better than uniform shares, and the gap to dense closes with the width.',
    reference='Evci et al. 2020, 1911.11134, figure 2; Liu et al. 2022, Random Pruning, 2202.02643, figure 1',
    comparisons=[claims.better('ERK-48', 'uniform-48'), *map(closing, WIDTHS, WIDTHS[1:])])
