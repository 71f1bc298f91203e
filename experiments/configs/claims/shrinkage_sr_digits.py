r"""Tests ISS-P against hard magnitude in 2x super-resolution: 90 and 95 % from a random start, a small EDSR, digits.

    python -m experiments.claims --workdir runs/claims --only shrinkage_sr_digits

The claim (Wang et al. 2023, 2303.09650) is that weights that shrink a little at each step end better than two
others: weights that are set to zero at each step (`shrink=0`, the hard thresholding of the authors' code), and
magnitude pruning at initialisation.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 5 seeds, 109 s of training in all. Not pruned: 22.03 +- 0.17 dB dense.
Differences are paired by seed, with their 95 % intervals, and p is adjusted for all of `docs/claims.md`:

- ISS-P-90 > hard-90: 19.57 and 19.29 dB, +0.28 +- 0.18, p 0.17, not reproduced.
- ISS-P-90 > once-90: 19.57 and 19.00 dB, +0.57 +- 0.10, p 0.002, reproduced.
- ISS-P-95 > hard-95: 18.63 and 18.30 dB, +0.33 +- 0.27, p 0.27, not reproduced.
- ISS-P-95 > once-95: 18.63 and 17.93 dB, +0.70 +- 0.28, p 0.033, reproduced.
"""

from experiments.configs import claims, default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 1200
  config.batch_size = 32
  config.data.task = 'super_resolution'
  config.model = {'name': 'sr', 'width': 24, 'depth': 3}
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.0
  shrinkage = {'name': 'iterative_soft_shrinkage', 'fine_tune_steps': 0.5}
  methods = {
      'once': {'name': 'magnitude_at_init', 'allocation': 'uniform'},
      'hard': {**shrinkage, 'shrink': 0.0},
      'ISS-P': {**shrinkage, 'shrink': 0.95},
  }
  config.recipes.update(claims.at_sparsities((90, 95), methods))
  return config


def get_sweep():
  return claims.tuned(1e-3, 2e-3, 4e-3, metric='psnr')


CLAIM = claims.Claim(
    title='Soft shrinkage',
    sentence='In 2x super-resolution shrinking a little at each step is better than setting to zero.',
    reference='Wang et al. 2023, ISS-P, 2303.09650',
    comparisons=[claims.better(f'ISS-P-{percent}', f'{other}-{percent}')
                 for percent in (90, 95) for other in ('hard', 'once')])
