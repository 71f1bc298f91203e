r"""Tests layer collapse: SNIP, SynFlow and robust pruning at initialisation, 1/300 of the weights, MNIST.

    python -m experiments.claims --workdir runs/claims --data_dir DIRECTORY --only collapse_mlp_mnist

SNIP prunes whole layers where SynFlow does not (Tanaka et al. 2020, 2006.05467). The claim on deep models is tested by
`robust_deep_mlp_mnist.py`.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 5 seeds, 57 s of training in all. Not pruned: 95.60 +- 0.18 % dense.
Differences are paired by seed, with their 95 % intervals, and p is adjusted for all of `docs/claims.md`:

- empty: SNIP-300 > SynFlow-300: 0.80 and 0.00 layers, +0.80 +- 0.56, p 0.19, not reproduced.
- SynFlow-300 > SNIP-300: 28.76 and 11.35 %, +17.41 +- 13.58, p 0.26, not reproduced.
- empty: SNIP-300 > robust-300: 0.80 and 0.80 layers, +0.00 +- 0.00, p 1, not reproduced.
- robust-300 > SNIP-300: 11.35 and 11.35 %, +0.00 +- 0.00, p 1, not reproduced.

The model was chosen so that SNIP does empty a layer.
"""

from experiments.configs import claims, default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 600
  config.data.name = 'mnist'
  config.model = {'name': 'mlp', 'widths': (100,) * 6}
  config.optimizer.learning_rate = 2e-3
  for name, recipe in (('SNIP', 'snip'), ('SynFlow', 'synflow'), ('robust', 'robust_at_init')):
    config.recipes[f'{name}-300'] = {'name': recipe, 'sparsity': 1 - 1 / 300, 'allow_empty': True}
  return config


def get_sweep():
  return claims.tuned(1e-3, 2e-3, 4e-3)


CLAIM = claims.Claim(
    title='Layer collapse',
    sentence='SNIP empties whole layers, and nothing trains then, where SynFlow and robust pruning at initialisation '
    'do not.',
    reference='Tanaka et al. 2020, SynFlow, 2006.05467, figure 1; Hayou et al. 2021, Robust Pruning at Initialization, '
    '2002.08797',
    comparisons=[claims.emptier('SNIP-300', 'SynFlow-300'), claims.better('SynFlow-300', 'SNIP-300', trains=False),
                 claims.emptier('SNIP-300', 'robust-300'), claims.better('robust-300', 'SNIP-300', trains=False)])
