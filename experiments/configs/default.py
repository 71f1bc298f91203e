"""Every key of a config and its default. A config is this one, changed; keys that are not here are refused.

The sections `data`, `model`, `optimizer` and each of `recipes` are the keyword arguments of `experiments.data.load`,
`experiments.models.make`, `experiments.optimizers.make` and `sparsejax.recipes.from_config`, which check them.
A number of steps that is a float of at most 1.0 is a fraction of `steps`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  # One model per seed, trained side by side under `jax.vmap`. A seed decides a model's initial weights and the order of
  # its batches; both are the same for all runs.
  config.seeds = (0,)
  config.steps = 1000
  config.batch_size = 64  # examples a step and seed
  config.mesh = {'data': -1}  # devices that share each batch; -1: all of all processes
  config.shard = 'replicated'  # parameters and optimizer state on every device; `fully`: split over them
  config.data = {
      'name': 'digits',  # `digits`, `sst2_sentences` or any TFDS set in `data_dir`, or a UTF-8 text file's path
      'data_dir': None,  # None: the user's cache directory
      'sequence_length': None,  # text: bytes in a window; None: 128. Sentences: tokens; None: 32
      'valid_fraction': 0.1,
      'augment': False,  # images: shift by up to an eighth of the height
      'task': 'classification',  # or `super_resolution`: images from themselves at half the size
  }
  config.model = {'name': 'vit'}
  config.models = {}  # what is different in the model of one run: {'wide': {'width': 128}}
  config.optimizer = {
      'name': 'adamw',
      'learning_rate': 1e-3,  # at the peak
      'warmup': 0.1,  # steps of linear warm-up from 0
      'decay': 'cosine',  # after the warm-up: `cosine` or `linear` to 0, or `constant`
      'weight_decay': 1e-4,  # on leaves of rank two and more
      'clip': 1.0,  # global norm of the gradient, None: no clipping
      'options': {},  # further keyword arguments of the optimizer: {'b2': 0.95}, {'momentum': 0.9}
  }
  # One run each, in this order. The first is the baseline of the differences in the results.
  config.recipes = {'dense': {'name': 'dense'}}
  # Rounds of pruning and retraining, by experiments.tickets alone: what is not as in its `DEFAULTS`.
  config.tickets = None
  config.measure_every = 10  # steps from one line of metrics to the next
  config.validate_every = 100
  config.checkpoint_every = 100
  return config
