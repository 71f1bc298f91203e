r"""Tests modules between layers: 75 % of the weights of a perceptron pruned, digits.

    python -m experiments.claims --workdir runs/claims --only modules_mlp_digits

G2GNet begins with weights within modules and moves the mask. Its abstract is above the dense model; here the modules
are compared with a random mask of the same counts, with and without moves. Growth is by the gradient, without a probe.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: modules-that-move > random: -0.06 +- 1.13, not reproduced; modules > random -1: -0.72 +- 1.02, not
reproduced; modules-that-move > dense: -0.72 +- 0.99, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=600, batch_size=32)
  config.model = {'name': 'mlp', 'widths': (100, 100)}
  config.recipes['random'] = {'name': 'static_sparse', 'sparsity': 0.75, 'allocation': 'uniform'}
  config.recipes['modules'] = {'name': 'g2gnet', 'sparsity': 0.75, 'groups': 5, 'fraction': 0.0}
  config.recipes['modules-that-move'] = {'name': 'g2gnet', 'sparsity': 0.75, 'groups': 5}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='G2GNet',
    sentence='At 75 % sparsity modules that move are better than a static random mask of the same counts, and static '
    'modules are not worse.',
    reference='G2GNet, ensembles to ensembles with Hebbian rewiring',
    comparisons=[claims.better('modules-that-move', 'random'), claims.better('modules', 'random', bar=-1.0),
                 claims.better('modules-that-move', 'dense')])
