r"""Tests robust pruning at initialisation against SNIP in a perceptron of 30 layers at 90 %, SGD with momentum, MNIST.

    python -m experiments.claims --workdir runs/claims --data_dir DIRECTORY --only robust_deep_mlp_mnist

The claim (Hayou et al. 2021, 2002.08797) is that a pruned deep model leaves the edge of chaos and trains badly. Its
layers are then rescaled to the edge. The dense model starts on the edge: `E[fan_in w^2]` is 2. Adam makes up for the
scale of a layer's gradient, so the optimizer is SGD. Gradients are clipped, because a pilot without clipping diverged.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 5 seeds, 207 s of training in all. Not pruned: 94.78 +- 0.27 % dense.
The difference is paired by seed, with its 95 % interval, and p is adjusted for all of `docs/claims.md`:

- robust > SNIP: 50.97 and 65.76 %, -14.79 +- 4.78, p 0.018, the opposite.
"""

from experiments.configs import claims


def get_config():
  config = claims.mlp_mnist(seeds=5, steps=1500, momentum=0.9)
  config.model = {'name': 'mlp', 'widths': (100,) * 30, 'gain': 2.0}
  for name, recipe in (('SNIP', 'snip'), ('robust', 'robust_at_init')):
    config.recipes[name] = {'name': recipe, 'sparsity': 0.9, 'allow_empty': True}
  return config


def get_sweep():
  return claims.tuned(0.003, 0.01, 0.03)


CLAIM = claims.Claim(
    title='Robust pruning at initialisation',
    sentence='In a perceptron of 30 layers, robust pruning at initialisation trains better than SNIP.',
    reference='Hayou et al. 2021, Robust Pruning at Initialization, 2002.08797',
    comparisons=[claims.better('robust', 'SNIP')],
    needs=[claims.at_least('dense', 90.0)])
