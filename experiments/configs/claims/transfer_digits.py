r"""Tests tickets for another task: digits 0 to 4 to 5 to 9, ten labels a class, dense against 95 % sparse.

    python -m experiments.claims --workdir runs/claims --only transfer_digits

The hidden cost of model compression (Misra et al. 2023, 2308.14969): tickets transfer worse than dense models, and
dense models are always better calibrated. A score of calibration is 1 minus the expected calibration error.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: dense > ticket: -1.01 +- 2.70, not reproduced; dense-prompt > ticket-prompt: +11.84 +- 11.48, not reproduced;
dense-ece > ticket-ece: +7.39 +- 3.48, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=300, learning_rate=2e-3)
  config.recipes['dense-ece'] = {'name': 'dense'}
  config.recipes['dense-prompt'] = {'name': 'dense'}
  for run in ('ticket-ece', 'ticket-prompt', 'ticket'):
    config.recipes[run] = {'name': 'iterative_magnitude', 'sparsity': 0.95}
  calibrated, border = {'measure': 'calibration'}, {'use': 'prompt'}
  config.protocol = {'name': 'transferred', 'runs': {
      'dense-ece': calibrated, 'ticket-ece': calibrated, 'dense-prompt': border, 'ticket-prompt': border}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Reprogrammed tickets',
    sentence='A dense model transfers better than a ticket, by a probe and by a prompt, and is better calibrated.',
    reference='Misra et al. 2023, Uncovering the Hidden Cost of Model Compression, 2308.14969',
    comparisons=[claims.better('dense', 'ticket'),
                 claims.better('dense-prompt', 'ticket-prompt'),
                 claims.better('dense-ece', 'ticket-ece')])
