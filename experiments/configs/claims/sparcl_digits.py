r"""Tests SparCL: five tasks of two digits, 75 % of the weights pruned, a buffer of 200 examples, no task is told.

    python -m experiments.tasks --config experiments/configs/claims/sparcl_digits.py --workdir runs/sparcl_digits

Wang et al. 2022 (2209.09476) keep 25 % of the weights under a mask that moves with the tasks. A fifth of the gradients
passes, and the accuracy is that of dense replay (DER++). Their removal of examples is left out.

Not yet run at size.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=200, batch_size=32)  # of each task
  config.optimizer = {**config.optimizer.to_dict(), 'name': 'sgd', 'learning_rate': 0.03, 'options': {'momentum': 0.9}}
  config.tasks = {'told': False, 'buffer': 200}
  config.recipes['SparCL'] = {'name': 'sparcl', 'sparsity': 0.75, 'every': 20}
  config.recipes['static'] = {'name': 'static_sparse', 'sparsity': 0.75}
  return config


CLAIM = claims.Claim(
    title='SparCL',
    sentence='With 25 % of the weights and a fifth of the gradients SparCL is at most one point below dense replay, '
    'and above a static random mask.',
    reference='Wang et al. 2022, SparCL, 2209.09476',
    comparisons=[claims.better('SparCL', 'dense', bar=-1.0),
                 claims.better('SparCL', 'static')])
