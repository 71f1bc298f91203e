"""Makes models in Flax Linen by name. Each model computes in its `dtype` and keeps its parameters in float32.

    model = models.make('vit', num_classes=10, depth=2, dtype='bfloat16')
    params = model.init(jax.random.key(0), images)['params']  # images: float[B, H, W, C]
    model.apply({'params': params}, images)                   # float32[B, 10]
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments import configs
from experiments.models.convolutional import CNN, Perceptron, SuperResolution
from experiments.models.encoders import MiniLM
from experiments.models.lm import LM
from experiments.models.own import Adapted, adapted
from experiments.models.vit import ViT
from sparsejax import errors

__all__ = ['CNN', 'LM', 'MODELS', 'MiniLM', 'Perceptron', 'SuperResolution', 'ViT', 'make']

# The first field of each model is its number of outputs.
MODELS: dict[str, type[nn.Module]] = {
    'vit': ViT, 'lm': LM, 'minilm': MiniLM, 'mlp': Perceptron, 'cnn': CNN, 'sr': SuperResolution,
}


def make(name: str, num_classes: int, **config: Any) -> nn.Module | Adapted:
  """Returns the model `name` of `MODELS` with `num_classes` outputs; `config` gives its other fields.

  The name `own` stands for the user's own model, which is the field `make` and has as many outputs as it has.

  `num_classes` is the size of the vocabulary for a language model, and the number of channels for super-resolution.
  `dtype` may be a name, such as `'bfloat16'`. Raises `ValueError` with the closest names for an unknown model, field or
  dtype.
  """
  if name == configs.OWN:
    configs.refuse_unknown('models.make', f'key of model {name!r}', config, ['make'])
    return adapted(config['make'])
  configs.refuse_unknown('models.make', 'model', [name], MODELS)
  outputs, *fields = (field.name for field in dataclasses.fields(MODELS[name]) if field.name not in ('parent', 'name'))
  configs.refuse_unknown('models.make', f'key of model {name!r}', config, fields)
  if 'dtype' in config:
    config['dtype'] = _dtype(config['dtype'])
  config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}  # from JSON
  return MODELS[name](**{outputs: num_classes}, **config)


def _dtype(name: Any) -> jnp.dtype:
  valid = {dtype.__name__: jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)}
  if name not in valid and name not in valid.values():
    raise errors.unknown('models.make', 'dtype', name, valid)
  return jnp.dtype(name)
