r"""Layer collapse: SNIP, SynFlow and robust pruning at initialisation, 300 times fewer weights or 20 layers, MNIST.

  python -m experiments.train --config experiments/configs/claims/collapse_mlp_mnist.py --data_dir DIRECTORY \
      --workdir runs/collapse

The claims: SNIP prunes whole layers where SynFlow does not (Tanaka et al. 2020, 2006.05467); in a deep model that
starts off the edge of chaos, what SNIP leaves does not train, and what is rescaled to the edge does (Hayou et al. 2021,
2002.08797).

Not yet run.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 600
  config.data.name = 'mnist'
  config.model = {'name': 'mlp', 'widths': (100,) * 6}
  config.optimizer.learning_rate = 2e-3
  deep = {'widths': (100,) * 20, 'gain': 1.0}
  config.recipes = {}
  for name, recipe in (('SNIP', 'snip'), ('SynFlow', 'synflow'), ('robust', 'robust_at_init')):
    config.recipes[f'{name}-300'] = {'name': recipe, 'sparsity': 1 - 1 / 300, 'allow_empty': True}
  for name, recipe in (('SNIP', 'snip'), ('robust', 'robust_at_init')):
    config.recipes[f'{name}-deep'] = {'name': recipe, 'sparsity': 0.9}
    config.models[f'{name}-deep'] = deep
  return config
