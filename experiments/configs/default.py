"""Holds every key of a config with its default. A config changes these values; a key that is not here is refused.

The sections `data`, `model`, `optimizer` and each of `recipes` are the keyword arguments of `experiments.data.load`,
`experiments.models.make`, `experiments.loop.optimizers.make` and `sparsejax.recipes.from_config`, which check them.
A number of steps that is a float of at most 1.0 is a fraction of `steps`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the default config."""
  config = ConfigDict(type_safe=False)  # a value may be of another type, such as a model in the place of a section
  # A model is trained for each seed, all side by side in one program. The seed decides the initial weights and the
  # order of the batches; both are the same for all runs.
  config.seeds = (0,)
  config.steps = 1000
  config.batch_size = 64  # examples per step and seed
  config.mesh = {'data': -1}  # devices that share each batch; -1: all devices of all processes
  config.shard = 'replicated'  # the state is copied to every device; `fully` splits the state over the devices
  config.data = {
      'name': 'digits',  # `digits`, `sst2_sentences`, a TFDS set in `data_dir`, a text file, or one of `data.sets.MADE`
      'data_dir': None,  # None: the user's cache directory
      'sequence_length': None,  # text: bytes in a window; None: 128. Sentences: tokens; None: 32
      'valid_fraction': 0.1,
      'augment': False,  # images are shifted by up to an eighth of the height
      'task': 'classification',  # or `super_resolution`: an image from the same image at half the size
      'splits': None,  # own arrays or sources; shorter: `config.data = splits`, see `experiments.data.arrays`
      'num_classes': None,  # of own data; None: the largest label plus one
  }
  config.model = {'name': 'vit'}
  # A model of the user's own is given as `config.model = make`, see `experiments.models.own`.
  config.models = {}  # changes of `model` for single runs: {'wide': {'width': 128}}
  config.optimizer = {
      'name': 'adamw',
      'learning_rate': 1e-3,  # the peak
      'warmup': 0.1,  # steps of linear warm-up from 0
      'decay': 'cosine',  # after the warm-up: `cosine` or `linear` to 0, or `constant`
      'weight_decay': 1e-4,  # applied to leaves of rank two and more
      'clip': 1.0,  # largest global norm of the gradient; None: no clipping
      'options': {},  # further keyword arguments of the optimizer: {'b2': 0.95}, {'momentum': 0.9}
  }
  config.optimizers = {}  # changes of `optimizer` for single runs: {'SET': {'name': 'sgd'}}
  # `loss` and `score` are functions (outputs, labels) -> `[B]` or `[B, T]`, a number for each label. `None` stands for
  # the functions of `data.task`. A larger score is better.
  config.loss = None
  config.score = None
  # Each entry is one run; they run in this order. The first run is the baseline of the differences in the results.
  config.recipes = {'dense': {'name': 'dense'}}
  # Rounds of pruning and retraining, for experiments.tickets alone: changes of its `DEFAULTS`.
  config.tickets = None
  # Tasks one after the other, for experiments.tasks alone: changes of its `DEFAULTS`.
  config.tasks = None
  # A protocol has loops of its own, for experiments.protocols alone; the config gives its `name`, `runs` and sizes.
  config.protocol = None
  # With True, an unfinished run goes on from its newest checkpoint although its config has changed. With False, such a
  # run is refused. The checkpoints and the outcome of the run keep the step and the change.
  config.resume_changed = False
  config.measure_every = 10  # steps between two records of metrics
  config.noise = None  # globs of the leaves whose gradient noise is measured; None: the sparse leaves
  # Functions (run, step, numbers) that get each record, means over the seeds: for W&B and others, beside TensorBoard.
  config.writers = ()
  config.validate_every = 100
  config.checkpoint_every = 100
  return config
