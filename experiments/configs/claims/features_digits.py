r"""Tests QuickSelection: 12 of the 64 pixels of the digits are selected without labels.

    python -m experiments.claims --workdir runs/claims --only features_digits

Atashgahi et al. 2022 (2012.00560) rank features by the strengths of a denoising autoencoder that SET trains. Trees that
read the selected features alone judge them. Beside them stand random features, features of the largest variance, all
features, and those of a dense autoencoder. Width and steps are smaller than in the paper, with its rates.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: QuickSelection > random: +6.56 +- 11.93, not reproduced; QuickSelection > variance -1: -6.39 +- 8.78, not
reproduced; QuickSelection > dense -1: -3.11 +- 9.02, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def selecting(features, sparsity, **sizes):
  """Returns the config in which so many features are selected, by an autoencoder of this sparsity."""
  config = claims.digits(steps=2000, batch_size=100)
  config.optimizer = {**config.optimizer.to_dict(), 'name': 'sgd', 'learning_rate': 0.01, 'clip': None,
                      'options': {'momentum': 0.9}}
  config.recipes['QuickSelection'] = {'name': 'quick_selection', 'sparsity': sparsity, 'every': 20}
  for run in ('random', 'variance', 'all'):
    config.recipes[run] = {'name': 'dense'}
  config.protocol = {'name': 'features', 'features': features, **sizes, 'runs': {
      run: {'chosen': run} for run in ('random', 'variance', 'all')}}
  return config


def claim(data):
  """Returns the claim on the selected features of `data`."""
  return claims.Claim(
      title=f'QuickSelection on {data}',
      sentence='Features of the largest strength are better than random ones, at least as good as those of the largest '
      'variance, and as those of a dense autoencoder.',
      reference='Atashgahi et al. 2022, Quick and Robust Feature Selection, 2012.00560',
      comparisons=[claims.better('QuickSelection', 'random'), claims.better('QuickSelection', 'variance', bar=-1.0),
                   claims.better('QuickSelection', 'dense', bar=-1.0)])


def get_config():
  return selecting(12, 0.8)


def get_sweep():
  return claims.tuned(3e-3, 1e-2)


CLAIM = claim('digits')
