r"""Tests ISS-P against hard magnitude in 2x super-resolution: 90 and 95 % from a random start, a small EDSR, digits.

    python -m experiments.train --config experiments/configs/claims/shrinkage_sr_digits.py --workdir runs/shrinkage

The claim (Wang et al. 2023, 2303.09650) is that weights that shrink a little at each step end better than two
others: weights that are set to zero at each step (`shrink=0`, the hard thresholding of the authors' code), and
magnitude pruning at initialisation.

Measured with 600 steps on two busy CPU cores, jax 0.10.2, 9 to 11 s of training a run: 20.04 dB dense. ISS-P minus hard
was -0.06 +- 0.10 dB at 90 % and -0.23 +- 0.28 at 95 %; ISS-P minus once was -0.06 +- 0.06 and -0.38 +- 0.23.

Measured on two shared CPU cores, jax 0.10.2, 5 seeds, 150 s of training in all. Not pruned: 21.10 +- 0.13 dB dense.
Differences are paired by seed, with their 95 % intervals:

- ISS-P-90 > hard-90: 18.46 and 18.34 dB, +0.13 +- 0.07, reproduced.
- ISS-P-90 > once-90: 18.46 and 18.14 dB, +0.32 +- 0.13, reproduced.
- ISS-P-95 > hard-95: 17.46 and 17.48 dB, -0.03 +- 0.38, not reproduced.
- ISS-P-95 > once-95: 17.46 and 17.28 dB, +0.18 +- 0.33, not reproduced.
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
