r"""Tests masks for tasks: five tasks of two digits each, 80 % of the weights pruned in each task, the task is told.

    python -m experiments.claims --workdir runs/claims --only task_masks_digits

Yildirim et al. 2023 (2308.14831) train each task under a mask of its own, and freeze the weights of earlier tasks, so
that nothing is forgotten. The dense model is trained on from task to task.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: CL-DST > dense: -0.07 +- 1.91, not reproduced; CL-DST > static-masks: -0.50 +- 0.93, not reproduced.
`docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=200, learning_rate=3e-3, batch_size=32)  # of each task
  config.tasks = {'told': True}
  config.recipes['CL-DST'] = {'name': 'cl_dst', 'sparsity': 0.8, 'every': 20}
  config.recipes['static-masks'] = {'name': 'cl_dst', 'sparsity': 0.8, 'every': 20, 'fraction': 0.0}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='CL with DST',
    sentence='A mask for each task forgets nothing, and is better after all tasks than one dense model trained on; '
    'masks that move are better than static masks.',
    reference='Yildirim et al. 2023, Continual Learning with Dynamic Sparse Training, 2308.14831',
    comparisons=[claims.better('CL-DST', 'dense'),
                 claims.better('CL-DST', 'static-masks')])
