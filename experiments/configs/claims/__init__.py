"""Claims of papers, a config each. The small ViT on digits, which several are tested on, is here."""

from ml_collections import ConfigDict

from experiments.configs import default


def vit_digits(seeds: int, steps: int, width: int = 32) -> ConfigDict:
  config = default.get_config()
  config.seeds = tuple(range(seeds))
  config.steps = steps
  config.batch_size = 32
  config.model = {'name': 'vit', 'patch': 2, 'width': width, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  return config
