r"""Compares the decays of MdGf at 1:8: linear, cosine, exponential. A language model on Tiny Shakespeare, read by TFDS.

    .venv/bin/python -m experiments.train --config experiments/configs/n_m/mdgf_lm_shakespeare.py --workdir runs/text \
        --set data.data_dir=/where/tfds/prepared/it

Any UTF-8 text file can replace the data set: `--set data.name=book.txt`. Not yet run at this size.
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.steps = 5000
  config.batch_size = 32
  config.data.name = 'tiny_shakespeare'
  config.data.sequence_length = 128
  config.model = {'name': 'lm', 'width': 128, 'depth': 4, 'heads': 4, 'dtype': 'bfloat16', 'scan': True}
  sparse = {'name': 'mdgf', 'pattern': '1:8', 'where': ['mlp/*/kernel'], 'fine_tune_steps': 0.1}
  config.recipes = {
      'dense': {'name': 'dense'},
      'SR-STE': {**sparse, 'name': 'sr_ste'},
      'MdGf-Linear': {**sparse, 'decay': {'name': 'linear', 'begin': 0.0, 'end': 0.75}},
      'MdGf-Cosine': {**sparse, 'decay': {'name': 'cosine', 'begin': 0.0, 'end': 0.75}},
      'MdGf-Exponential': {**sparse, 'decay': {'name': 'exponential', 'half_life': 0.1}},
  }
  return config
