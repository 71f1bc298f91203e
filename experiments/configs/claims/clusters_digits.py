r"""Tests Turbo-VBI: zeros at 90 % with a Markov prior and without, accuracy and runs of zeros, digits.

    python -m experiments.claims --workdir runs/claims --only clusters_digits

Xia et al. 2023 prune with a prior under which zeros cluster, for more regular structure at equal accuracy. A score of
runs is 1 minus the number of runs of zeros over the number of weights. The control has the same sparsity by magnitude.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: Turbo-VBI-runs > magnitude-runs: +5.92 +- 0.09, reproduced; Turbo-VBI > magnitude -1: -2.72 +- 2.55, not
reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=600, learning_rate=2e-3)
  turbo, control = {'name': 'turbo_vbi', 'sparsity': 0.9}, {'name': 'gradual_magnitude', 'sparsity': 0.9}
  for suffix in ('-runs', ''):
    config.recipes[f'magnitude{suffix}'] = dict(control)
    config.recipes[f'Turbo-VBI{suffix}'] = dict(turbo)
  config.protocol = {'name': 'posteriors', 'runs': {
      run: {'measure': 'runs'} for run in ('magnitude-runs', 'Turbo-VBI-runs')}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Turbo-VBI',
    sentence='A Markov prior leaves fewer runs of zeros than magnitude, at most one point of accuracy below.',
    reference='Xia et al. 2023, Structured Bayesian Compression by Turbo-VBI',
    comparisons=[claims.better('Turbo-VBI-runs', 'magnitude-runs'),
                 claims.better('Turbo-VBI', 'magnitude', bar=-1.0)])
