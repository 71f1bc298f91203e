"""Runs models of Hugging Face folders in plain JAX: the one place of the library that knows architectures.

    apply = hub.forward(json.load(open('folder/config.json')))
    y = apply(params, tokens, valid)          # `params` maps the names in the safetensors files to the tensors

A reader is a function `config -> apply`. Parameters keep their names and layouts, so that a pruned model is written
back name by name. `TABLE` maps `model_type` to the reader; a reader from outside is one line.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sparsejax import errors
from sparsejax.hub import bert, gpt2, llama
from sparsejax.hub.layers import Required
from sparsejax.types import Array

__all__ = ['MATRICES', 'TABLE', 'WORDS', 'forward', 'reader']

# A reader returns (params, tokens `int[B, T]`, valid `bool[B, T]`) -> hidden states or logits `[B, T, ...]`.
TABLE: dict[str, Callable[[Mapping[str, Any]], Callable[..., Array]]] = {
  'bert': bert.forward, 'gpt2': gpt2.forward, 'llama': llama.forward}
# The names of the matrices in the transformer layers, as globs.
MATRICES: dict[str, tuple[str, ...]] = {'bert': bert.MATRICES, 'gpt2': gpt2.MATRICES, 'llama': llama.MATRICES}
# How the name of the table of tokens ends, `[vocab_size, D]`.
WORDS: dict[str, str] = {'bert': bert.WORDS, 'gpt2': gpt2.WORDS, 'llama': llama.WORDS}


def reader(config: Mapping[str, Any]) -> str:
  """Returns the name of the reader of a configuration; raises `ValueError` for a model of another type."""
  kind = config.get('model_type')
  if not isinstance(kind, str) or kind not in TABLE:
    raise errors.unknown('hub', '`model_type`', kind, TABLE)
  return kind


def forward(config: Mapping[str, Any]) -> Callable[..., Array]:
  """Returns the forward pass `apply(params, tokens, valid)` of a configuration, or raises `ValueError`."""
  return TABLE[reader(config)](Required('config.json', config))
