r"""Sparse model soups: three members a round, averaged, two rounds to 90 % sparsity, a small ViT, digits.

  python -m experiments.tickets --config experiments/configs/claims/soup_vit_digits.py --workdir runs/soup

The claim (Zimmer et al. 2023, 2306.16788): the average of models that were retrained from one pruned model, here with
their batches in different orders, is better than they are.

Not yet run.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 400
  config.batch_size = 32
  config.model = {'name': 'vit', 'patch': 2, 'width': 32, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  config.tickets = {'rounds': 2, 'sparsity': 0.9, 'rewind': 'learning_rate', 'members': 3, 'retrain_steps': 400,
                    'recipe': {'where': ['attention/*/kernel', 'mlp/*/kernel']}}
  return config
