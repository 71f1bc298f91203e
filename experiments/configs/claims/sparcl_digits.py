r"""Tests SparCL: five tasks of two digits, 75 % of the weights pruned, a buffer of 200 examples, no task is told.

    python -m experiments.claims --workdir runs/claims --only sparcl_digits

Wang et al. 2022 (2209.09476) keep 25 % of the weights under a mask that moves with the tasks. A fifth of the gradients
passes, 30 % of the examples of a task go in its course, and the accuracy is that of dense replay (DER++).

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: SparCL > dense -1: -2.58 +- 1.67, not reproduced; SparCL > SparCL-all -1: -1.00 +- 2.97, not reproduced;
SparCL > static: +3.66 +- 3.63, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=200, batch_size=32)  # of each task
  config.optimizer = {**config.optimizer.to_dict(), 'name': 'sgd', 'learning_rate': 0.03, 'options': {'momentum': 0.9}}
  config.tasks = {'told': False, 'buffer': 200, 'removed': {'SparCL': 0.3}}
  config.recipes['SparCL'] = {'name': 'sparcl', 'sparsity': 0.75, 'every': 20}
  config.recipes['SparCL-all'] = dict(config.recipes['SparCL'])  # all examples stay
  config.recipes['static'] = {'name': 'static_sparse', 'sparsity': 0.75}
  return config


def get_sweep():
  return claims.tuned(0.03, 0.1)


CLAIM = claims.Claim(
    title='SparCL',
    sentence='With 25 % of the weights, a fifth of the gradients and 70 % of the examples SparCL is at most one point '
    'below dense replay and below SparCL with all examples, and above a static random mask.',
    reference='Wang et al. 2022, SparCL, 2209.09476',
    comparisons=[claims.better('SparCL', 'dense', bar=-1.0),
                 claims.better('SparCL', 'SparCL-all', bar=-1.0),
                 claims.better('SparCL', 'static')])
