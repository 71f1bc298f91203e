r"""Tests FreezeNet against SNIP: 1 % of the weights are trained, the others stay as drawn or are zero, a CNN, MNIST.

    python -m experiments.train --config experiments/configs/claims/freeze_cnn_mnist.py --data_dir DIRECTORY \
        --workdir runs/freeze

The claim (Wimmer et al. 2020, 2011.14087) is that weights frozen at their initial value beat weights that are zero.
There is no weight decay, because weight decay would move the frozen weights.

Measured on two shared CPU cores, jax 0.10.2, 5 seeds, 342 s of training in all. Not pruned: 88.42 +- 1.09 % dense.
The difference is paired by seed, with its 95 % interval:

- FreezeNet > SNIP: 24.20 and 17.47 %, +6.72 +- 5.32, reproduced.
"""

from experiments.configs import claims, default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 600
  config.data.name = 'mnist'
  config.model = {'name': 'cnn', 'widths': (16, 32, 64)}
  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.0
  for name, recipe in (('SNIP', 'snip'), ('FreezeNet', 'freeze_net')):
    config.recipes[name] = {'name': recipe, 'sparsity': 0.99}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3, 1e-2)


CLAIM = claims.Claim(
    title='FreezeNet',
    sentence='With 1 % of the weights trained, the others frozen are better than the others zero (SNIP).',
    reference='Wimmer et al. 2020, FreezeNet, 2011.14087',
    comparisons=[claims.better('FreezeNet', 'SNIP')])
