r"""Tests DASS: a search among sparse operations against a dense search that is pruned, both 90 % sparse, digits.

    python -m experiments.claims --workdir runs/claims --only dass_digits

Mousavi et al. 2023: networks found among sparse operations are better than networks that are found dense and then
pruned. Both searches take 900 steps, and the found networks train for 400 more under their masks.

Not yet run at this size.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=900, learning_rate=2e-3)
  config.recipes = {'DASS': {'name': 'dass'}, 'dense-search': {'name': 'dense'}}
  config.protocol = {'name': 'searched', 'runs': {'dense-search': {'sparse': False}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3, 1e-2)


CLAIM = claims.Claim(
    title='DASS',
    sentence='A network that was found among sparse operations is better than one that was found dense and pruned.',
    reference='Mousavi et al. 2023, DASS: Differentiable Architecture Search for Sparse neural networks',
    comparisons=[claims.better('DASS', 'dense-search')])
