r"""The sweep trains N:M recipes from 2:4 to 1:32 on three tasks, to test progressive gradient flow on its own ground.

    .venv/bin/python -m experiments.sweep --config experiments/configs/sweeps/progressive_gradient_flow.py \
        --workdir runs/progressive --data_dir /where/tfds/prepared/them

Written down before any run, and not to be changed after one:

- No task is saturated. `lm`: bytes of Tiny Shakespeare, loss in nats, 750 steps, 5 seeds. `digits`: a ViT after 120
  steps, 5 seeds. Dense reached 94.5 % (93.1 to 95.6 over 5 seeds; AMD EPYC, 2 cores, jax 0.10.2) when the size was
  chosen. `cifar`: a ViT on CIFAR-10, 600 steps, 3 seeds. The images are JPEG copies, so an accuracy is not comparable
  to one on the original pixels in the last percent.
- All matrices of the blocks are sparse, attention included. Embeddings, positions, norms and the head are dense.
- The learning rate of each recipe and task is the best of four on the validation split, at 1:16 and on two seeds of
  their own: the same budget for all. The metric of the verdicts is the test loss, and the baseline is SR-STE.
- A pilot of nine cells of `lm` came before, at batches of 16 and three rates. The largest rate was best for SR-STE, so
  a rate of 0.1 was added. The batch was halved to fit the processor time. No MdGf cell had run.
- Every decay of MdGf ends at half of the steps, while the learning rate is high. The exponential decay never reaches
  zero, so its last quarter is a fine-tune phase under the mask, as is that of SdGf.
- What is dropped first, because it runs last: the repeat at equal training FLOPs, then 2:4 and 1:4, then CIFAR-10. No
  cell begins after 12 CPU hours, and the report names what is left out.
- SdGf-geometric goes through 2N:2M (`k=2`): 8N:8M and 1:32 need groups of 256, which a width of 64 does not have.
- `bdwp` is left out. Without a product of its own in the model it trains as `ste` does, see `sparsejax.recipes.bdwp`.
- Gradient noise is measured on the feed-forward layers: see `experiments.loop.measurements.noise`.

Measured on single cores of an AMD EPYC, jax 0.10.2: `docs/progressive_gradient_flow.md` has the tables. On `lm`, dense
has 2.0701 +- 0.0072 nats (5 seeds), and SR-STE at 1:8 2.0430 +- 0.0200. `experiments.train` trains these two from the
same file, at a rate that is not tuned.
"""

from experiments.configs import default

BLOCKS = ['mlp/*/kernel', 'attention/*/kernel']
HIGH, LOW = ('1:8', '1:16', '1:32'), ('1:4', '2:4')
DECAYS = {  # of the mask: arguments of `mdgf`
    'linear': {'decay': {'name': 'linear', 'begin': 0.0, 'end': 0.5}},
    'cosine': {'decay': {'name': 'cosine', 'begin': 0.0, 'end': 0.5}},
    'exponential': {'decay': {'name': 'exponential', 'half_life': 0.05}, 'fine_tune_steps': 0.25},
}
TASKS = {
    'lm': {'steps': 750, 'batch_size': 8, 'seeds': (0, 1, 2, 3, 4),
           'data': {'name': 'tiny_shakespeare', 'sequence_length': 64},
           'model': {'name': 'lm', 'width': 64, 'depth': 2, 'heads': 4}},
    'digits': {'steps': 120, 'batch_size': 32, 'seeds': (0, 1, 2, 3, 4), 'data': {'name': 'digits'},
               'model': {'name': 'vit', 'patch': 2, 'width': 64, 'depth': 2, 'heads': 4}},
    'cifar': {'steps': 600, 'batch_size': 32, 'seeds': (0, 1, 2), 'data': {'name': 'cifar10'},
              'model': {'name': 'vit', 'patch': 8, 'width': 64, 'depth': 3, 'heads': 4}},
}


def get_config():
  config = default.get_config()
  config.noise = ('mlp/*/kernel',)
  config.validate_every = 750  # Validation takes as long as 100 steps, so it comes at the end alone.
  config.optimizer.weight_decay = 0.01
  config.optimizer.warmup = 0.05
  config.optimizer.learning_rate = 1e-2
  config.recipes = {'dense': {'name': 'dense'}, 'SR-STE': {'name': 'sr_ste', 'pattern': '1:8', 'where': BLOCKS}}
  for key, value in TASKS['lm'].items():
    config[key] = value
  return config


def get_sweep():
  recipes = {
      'SR-STE': {'name': 'sr_ste'},
      'SR-STE-decoupled': {'name': 'sr_ste', 'decoupled': True},
      'STE': {'name': 'ste'},
      'ASP': {'name': 'asp', 'dense_steps': 0.5},
      **{f'MdGf-{decay}-{gradient}': {'name': 'mdgf', 'gradient': gradient, **arguments}
         for decay, arguments in DECAYS.items() for gradient in ('scaled', 'straight_through')},
      'SdGf-stepwise': {'name': 'sdgf_stepwise', 'fine_tune_steps': 0.25},
      'SdGf-geometric': {'name': 'sdgf_geometric', 'k': 2, 'fine_tune_steps': 0.25},
      'ST-3': {'name': 'st3', 'fine_tune_steps': 0.25},
  }
  return {
      'recipe': {'dense': {'name': 'dense'}, **{name: {**recipe, 'where': BLOCKS} for name, recipe in recipes.items()}},
      'baseline': 'SR-STE',
      'pattern': HIGH + LOW,
      'task': TASKS,
      'learning_rate': (3e-3, 1e-2, 3e-2, 1e-1),
      'tuning': {'seeds': (1000, 1001), 'pattern': '1:16'},
      'order': [{'task': ('lm', 'digits'), 'pattern': HIGH}, {'task': ('cifar',), 'pattern': HIGH}],
      'equal_flops': True,
      'cpu_hours': 12,
  }
