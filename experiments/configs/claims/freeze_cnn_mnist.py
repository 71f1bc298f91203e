r"""FreezeNet against SNIP: 1 % of the weights trained, the others left as drawn or zero, a CNN, MNIST.

  python -m experiments.train --config experiments/configs/claims/freeze_cnn_mnist.py --data_dir DIRECTORY \
      --workdir runs/freeze

The claim (Wimmer et al. 2020, 2011.14087): what is frozen at its initial value beats what is zero. Without weight
decay, which would move what is frozen.

Measured on two shared CPU cores, jax 0.10.2, 5 seeds, 342 s of training in all: 88.42 +- 1.09 % dense. 95 % intervals
of paired differences: FreezeNet > SNIP: 24.20 and 17.47 % (+6.72 +- 5.32, reproduced).
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 600
  config.data.name = 'mnist'
  config.model = {'name': 'cnn', 'widths': (16, 32, 64)}
  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.0
  config.recipes = {'dense': {'name': 'dense'}}
  for name, recipe in (('SNIP', 'snip'), ('FreezeNet', 'freeze_net')):
    config.recipes[name] = {'name': recipe, 'sparsity': 0.99}
  return config
