r"""Runs the main job: dense, SR-STE and MdGf-Linear at 1:8 on the feed-forward layers of a small ViT, digits, 8 seeds.

    python -m experiments.train --config experiments/configs/n_m/demo_vit_digits.py --workdir runs/demo

`make demo` runs the same command. The digits are scikit-learn's, written as a TFDS data set at the first use; nothing
is downloaded.

Measured on two shared CPU cores, jax 0.10.2, in about five minutes of a busy machine. Test accuracy: 97.81 +- 0.50 %
dense, 97.47 +- 0.57 % SR-STE, 97.57 +- 0.65 % MdGf-Linear. Paired differences to dense: -0.35 +- 0.60, -0.24 +- 0.40.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(8))
  config.steps = 400
  config.validate_every = 25
  config.model = {'name': 'vit', 'patch': 2, 'width': 48, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  sparse = {'pattern': '1:8', 'where': ['mlp/*/kernel']}
  config.recipes = {
      'dense': {'name': 'dense'},
      'SR-STE': {'name': 'sr_ste', **sparse},
      'MdGf-Linear': {'name': 'mdgf', **sparse, 'decay': {'name': 'linear', 'begin': 0.0, 'end': 0.75}},
  }
  return config
