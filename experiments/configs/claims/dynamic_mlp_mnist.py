r"""Tests dynamic sparse training on a perceptron: static, SET and RigL at 97 and 98 %, SGD with momentum, MNIST.

    python -m experiments.claims --workdir runs/claims --data_dir DIRECTORY --only dynamic_mlp_mnist

The claim (Evci et al. 2020, 1911.11134) is RigL > SET > static. All three methods have the same sparsity in each layer
(ERK), so they differ only in where weights grow. A pilot of two seeds at 97 % had this order.

Not yet run at this size.
"""

from experiments.configs import claims


def get_config():
  config = claims.mlp_mnist(seeds=10, steps=2500, momentum=0.9)
  config.recipes.update(claims.moving((97, 98), where=['fc*/kernel']))
  return config


def get_sweep():
  return claims.tuned(0.03, 0.1, 0.3)


CLAIM = claims.Claim(
    title='Dynamic sparse training of a perceptron',
    sentence='At 97 and 98 % RigL is better than SET, and SET than a fixed random mask.',
    reference='Evci et al. 2020, Rigging the Lottery, 1911.11134, figure 2',
    comparisons=claims.moving_is_better((97, 98)))
