r"""Sparse model soups: three members a round, averaged, two rounds to 90 % sparsity, a small ViT, digits.

  python -m experiments.tickets --config experiments/configs/claims/soup_vit_digits.py --workdir runs/soup

The claim (Zimmer et al. 2023, 2306.16788): the average of models that were retrained from one pruned model, here with
their batches in different orders, is better than they are.

Measured on one of two shared CPU cores, jax 0.10.2, 10 seeds, 510 s of training in all: test accuracy 96.89 +- 0.65 %
dense; at 90 % 94.39 % the soup and 94.35 % its members in the mean, a paired difference of 0.04 +- 0.16 that is not
told from 0; after the first round, at 68.4 %, -0.03 +- 0.13. The barrier of the test loss from one member to another is
0.0000: they hardly differ, and so an average of them cannot do much. With 5 seeds 0.19 +- 0.22 at 90 %, and with
retrainings of 200 steps 0.06 +- 0.30.
"""

from experiments.configs import claims


def get_config():
  config = claims.vit_digits(seeds=10, steps=400)
  config.tickets = {'rounds': 2, 'sparsity': 0.9, 'rewind': 'learning_rate', 'members': 3, 'retrain_steps': 400,
                    'recipe': {'where': ['attention/*/kernel', 'mlp/*/kernel']}}
  return config
