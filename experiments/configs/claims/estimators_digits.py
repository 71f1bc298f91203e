r"""Tests four gradients of stochastic gates, and blocks that are skipped where a gate is closed, digits.

    python -m experiments.claims --workdir runs/claims --only estimators_digits

Bengio et al. 2013 (1308.3432) compare REINFORCE, smooth times stochastic units, noisy rectifiers and straight-through
gradients in the gates of a conditional computation on MNIST. The straight-through gradient has the least error there.
The layer has 32 blocks of 16 units, and the gates are asked to open a tenth of them. `open`, `dropped`, `sure` and
`work` in `outcome.json` say what was opened, and how many FLOPs the compiled test has. Beside them stands a network
without gates, whose FLOPs are about those of the gated test. The weight 100 of the penalty, and the steps, were set
before the seeds were run. With 1, and gates that began half open, 42 % were open after 600 steps (straight-through,
seed 100).

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: straight-through > REINFORCE: +2.33 +- 1.68, not reproduced; straight-through > smooth: +12.56 +- 2.60,
reproduced; straight-through > noisy: +3.56 +- 0.66, reproduced; straight-through > dense -1: -2.83 +- 0.89, not
reproduced; straight-through > narrow: -2.39 +- 0.96, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=1500, learning_rate=3e-3)
  for run in ('straight-through', 'REINFORCE', 'smooth', 'noisy', 'narrow'):
    config.recipes[run] = {'name': 'dense'}
  config.protocol = {'name': 'gaters', 'runs': {
      'dense': {'gate': None}, 'REINFORCE': {'gate': 'reinforce'}, 'smooth': {'gate': 'smooth'},
      'noisy': {'gate': 'noisy_rectifier'}, 'narrow': {'gate': None, 'part': 0.28}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Stochastic gates',
    sentence='The straight-through gradient is better than REINFORCE, smooth times stochastic units and noisy '
    'rectifiers. With a tenth of the blocks open its network is at most one point below that of all blocks, and above '
    'one with as much work and no gates.',
    reference='Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons, 1308.3432',
    comparisons=[*(claims.better('straight-through', other) for other in ('REINFORCE', 'smooth', 'noisy')),
                 claims.better('straight-through', 'dense', bar=-1.0), claims.better('straight-through', 'narrow')])
