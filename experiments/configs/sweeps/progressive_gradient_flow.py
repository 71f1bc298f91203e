r"""Sweeps the N:M recipes from 2:4 to 1:32 on three tasks, to test progressive gradient flow in its own regime.

    .venv/bin/python -m experiments.sweep --config experiments/configs/sweeps/progressive_gradient_flow.py \
        --workdir runs/progressive --data_dir /where/tfds/prepared/them

Not yet run at this size.
"""

from experiments.configs import default

BLOCKS = {'where': ['mlp/*/kernel', 'attention/*/kernel']}  # all matrices but embeddings and head
PATTERNS = ('2:4', '1:4', '1:8', '1:16', '1:32')
HALF = {'begin': 0.0, 'end': 0.5}  # the decay ends while the learning rate is still high


def get_config():
  config = default.get_config()
  config.noise = ('mlp/*/kernel',)
  config.optimizer.weight_decay = 0.01
  config.optimizer.warmup = 0.05
  config.measure_every = 10
  config.recipes = {
      'SR-STE': {'name': 'sr_ste', 'pattern': '1:8', **BLOCKS},
      'dense': {'name': 'dense'},
  }
  config.data.name = 'tiny_shakespeare'
  config.data.sequence_length = 64
  config.model = {'name': 'lm', 'width': 64, 'depth': 2, 'heads': 4}
  config.batch_size = 16
  config.seeds = (0, 1, 2, 3, 4)
  config.steps = 1000
  return config
