r"""Tests dynamic sparse training on a perceptron: static, SET and RigL at 97 and 98 %, SGD with momentum, MNIST.

    python -m experiments.claims --workdir runs/claims --data_dir DIRECTORY --only dynamic_mlp_mnist

The claim (Evci et al. 2020, 1911.11134) is RigL > SET > static. All three methods have the same sparsity in each layer
(ERK), so they differ only in where weights grow. A pilot of two seeds at 97 % had this order.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 10 seeds, 1603 s of training in all. Not pruned: 98.02 +- 0.06 % dense.
Differences are paired by seed, with their 95 % intervals, and p is adjusted for all of `docs/claims.md`:

- RigL-97 > SET-97: 96.46 and 96.68 %, -0.22 +- 0.10, p 0.016, the opposite.
- SET-97 > static-97: 96.68 and 96.02 %, +0.66 +- 0.21, p 0.0014, reproduced.
- RigL-98 > SET-98: 95.76 and 96.23 %, -0.46 +- 0.20, p 0.012, the opposite.
- SET-98 > static-98: 96.23 and 95.35 %, +0.88 +- 0.21, p 0.00016, reproduced.
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
