r"""Tests QuickSelection: 20 of 500 features are selected without labels.

    python -m experiments.claims --workdir runs/claims --only features_madelon

Atashgahi et al. 2022 (2012.00560) rank features by the strengths of a denoising autoencoder that SET trains. Trees that
read the selected features alone judge them. Beside them stand random features, features of the largest variance, all
features, and those of a dense autoencoder. Width and steps are smaller than in the paper, with its rates.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: QuickSelection > random: +20.73 +- 3.05, not testable; QuickSelection > variance -1: +12.31 +- 3.33,
reproduced; QuickSelection > dense -1: +21.08 +- 3.29, not testable. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs.claims import features_digits


def get_config():
  config = features_digits.selecting(20, 0.9, useful=20)
  config.data.name = 'madelon'
  return config


get_sweep = features_digits.get_sweep
CLAIM = features_digits.claim('madelon')
