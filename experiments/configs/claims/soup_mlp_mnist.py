r"""Tests sparse model soups: three members a round, averaged, two rounds to 95 % sparsity, a perceptron, MNIST.

    python -m experiments.tickets --config experiments/configs/claims/soup_mlp_mnist.py --data_dir DIRECTORY \
        --workdir runs/soup

The claim (Zimmer et al. 2023, 2306.16788) is about models that were retrained from one pruned model, here with their
batches in different orders: the average of the models is better than the models are.

The first test had a small ViT on digits and Adam. Its members hardly differed: the barrier of the test loss from one
to another was 0.0000, and the soup was 0.04 +- 0.16 points better at 90 %. Members of this test are retrained by SGD
with momentum at a large rate, and differ. In a pilot of one round to 97 %, the soup was 0.17 +- 0.49 points better
(two seeds, one CPU core, jax 0.10.2, dense 97.52 %).

Not yet run at this size.
"""

import numpy as np

from experiments.configs import claims


def get_config():
  config = claims.mlp_mnist(seeds=10, steps=1000, momentum=0.9)
  config.optimizer.learning_rate = 0.1
  config.tickets = {'rounds': 2, 'sparsity': 0.95, 'rewind': 'learning_rate', 'members': 3, 'retrain_steps': 1000,
                    'recipe': {'where': ['fc*/kernel']}}
  return config


def better_than_members(scores):
  members = [score for run, score in scores.test.items() if run.startswith('member-')]
  return claims.Comparison('soup > mean of members', scores.unit, scores.test['soup'], np.mean(members, axis=0))


CLAIM = claims.Claim(
    title='Sparse model soups',
    sentence='At 95 % the average of models that were retrained from one pruned model is better than these are in the '
    'mean.',
    reference='Zimmer et al. 2023, Sparse Model Soups, 2306.16788',
    comparisons=[better_than_members])
