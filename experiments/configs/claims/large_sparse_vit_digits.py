r"""Large and sparse against small and dense, at the same number of non-zero parameters: gradual magnitude, digits.

  python -m experiments.train --config experiments/configs/claims/large_sparse_vit_digits.py --workdir runs/large_sparse

The claim (Zhu and Gupta 2017, 1710.01878): the large sparse model is better. A ViT of width 64 has 102,090 parameters,
98,304 of them in the matrices that are pruned; one of width 32 has 26,474 and one of width 16 has 7,098.

Not yet run.
"""

from experiments.configs import default

PARAMETERS, PRUNED = 102_090, 98_304
SMALL = {32: 26_474, 16: 7_098}


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(8))
  config.steps = 400
  config.model = {'name': 'vit', 'patch': 2, 'width': 64, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  pruned = {'name': 'gradual_magnitude', 'begin': 0.1, 'end': 0.7, 'every': 10,
            'where': ['attention/*/kernel', 'mlp/*/kernel']}
  config.recipes = {'dense-64': {'name': 'dense'}}
  for width, parameters in SMALL.items():
    config.recipes[f'dense-{width}'] = {'name': 'dense'}
    config.recipes[f'sparse-{width}'] = {**pruned, 'sparsity': (PARAMETERS - parameters) / PRUNED}
    config.models[f'dense-{width}'] = {'width': width}
  return config
