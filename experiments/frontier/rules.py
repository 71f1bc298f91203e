"""Lists the rules of a frontier: how attention is made sparse, as a function of the sparsity.

A rule of the encoder is a builder of blocks, `sparsity -> builder`. A rule of the decoder says what is read,
`(sparsity, tokens, keys) -> [DecodeRule of each layer]`. A rule from outside is one line in `RULES`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from sparsejax import attention
from sparsejax.attention import decode
from sparsejax.types import Array

BLOCK = 4  # tokens of a block of the encoder, whose sentences have at most 32
PAGE = 16  # tokens of a page of the decoder
CHANNELS = 8  # that Double Sparsity scores by, of 64


def tokens_kept(sparsity: float, tokens: int, page: int) -> int:
  """Returns how many of `tokens` are read at this sparsity: whole pages, at least one."""
  return max(round((1 - sparsity) * tokens / page), 1) * page


def _routed(sparsity: float, tokens: int, builder: Callable[..., Any]) -> Any:
  return builder(keep=tokens_kept(sparsity, tokens, BLOCK) // BLOCK, block=BLOCK)


def _sliding(sparsity: float, tokens: int) -> Any:
  return attention.sliding(tokens_kept(sparsity, tokens, BLOCK) // 2, block=BLOCK)


def _alike(make: Callable[..., Any], page: int) -> Callable[..., Any]:
  """Returns the rule that is `make(keep, page)` in every layer."""
  return lambda sparsity, tokens, keys: [make(tokens_kept(sparsity, tokens, page), page)] * len(keys)


def _double_sparsity(sparsity: float, tokens: int, keys: Sequence[Array], page: int) -> Any:
  keep = tokens_kept(sparsity, tokens, page)
  return [decode.double_sparsity(decode.heavy_channels(k, min(CHANNELS, k.shape[-1])), keep, page) for k in keys]


RULES: dict[str, dict[str, Callable[..., Any]]] = {
    'encoder': {'sliding': _sliding, 'routed': functools.partial(_routed, builder=attention.routed),
                'quest': functools.partial(_routed, builder=attention.quest)},
    'decoder': {'newest': _alike(decode.newest, PAGE), 'quest': _alike(decode.quest, PAGE),
                'double_sparsity': functools.partial(_double_sparsity, page=1),
                'double_sparsity, pages': functools.partial(_double_sparsity, page=PAGE)}}
