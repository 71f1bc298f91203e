r"""Tests experts that are read from nested bits: fewer bits for experts of fewer images, digits.

    python -m experiments.claims --workdir runs/claims --only nested_bits_digits

D2MoE (Wang et al. 2025, 2504.15299) serves experts with bits that differ from request to request, from one store, with
53 % less memory and the accuracy of 8 bits. Three bits on average, and a bit that tells the zeros, are 55 % fewer bytes
than eight. `bytes` and `active` in `outcome.json` say what a request reads. The throughput of the paper, 1.39 times, is
that of a device and not tested.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: 8-bits > dense -1: +0.06 +- 0.15, reproduced; 3-by-load > 8-bits -1: -0.28 +- 0.42, not reproduced; 3-by-load
> 3-bits: +0.61 +- 1.15, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=600, learning_rate=3e-3)
  for run in ('8-bits', '3-bits', '3-by-load'):
    config.recipes[run] = {'name': 'dense'}
  config.protocol = {'name': 'served', 'runs': {
      '8-bits': {'bits': 8}, '3-bits': {'bits': 3}, '3-by-load': {'bits': 3, 'by_load': True}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Nested bits',
    sentence='Experts of 8 bits are at most one point below those of 32. Experts of 3 bits on average, and of more '
    'bits where there are more images, are at most one point below 8 bits, and above 3 bits for each expert.',
    reference='Wang et al. 2025, D2MoE, 2504.15299',
    comparisons=[claims.better('8-bits', 'dense', bar=-1.0), claims.better('3-by-load', '8-bits', bar=-1.0),
                 claims.better('3-by-load', '3-bits')])
