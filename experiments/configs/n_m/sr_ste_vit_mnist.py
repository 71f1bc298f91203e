r"""Compares SR-STE as published, SR-STE decoupled and one-shot magnitude at 2:4: ViT on MNIST, read by TFDS.

    .venv/bin/python -m experiments.train --config experiments/configs/n_m/sr_ste_vit_mnist.py --workdir runs/mnist \
        --set data.data_dir=/where/tfds/prepared/it

Not yet run at this size.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = (0, 1, 2)
  config.steps = 2000
  config.batch_size = 128
  config.data.name = 'mnist'
  config.model = {'name': 'vit', 'patch': 4, 'width': 64, 'depth': 4, 'heads': 4, 'dtype': 'bfloat16'}
  sparse = {'pattern': '2:4', 'where': ['mlp/*/kernel', 'attention/*/kernel']}
  config.recipes = {
      'dense': {'name': 'dense'},
      'ASP': {'name': 'asp', **sparse, 'dense_steps': 0.5},
      'SR-STE': {'name': 'sr_ste', **sparse},
      'SR-STE-decoupled': {'name': 'sr_ste', **sparse, 'decoupled': True},
  }
  return config
