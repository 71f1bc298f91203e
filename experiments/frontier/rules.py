"""Lists the rules of a frontier: how attention, or what is multiplied, is made sparse, as a function of the sparsity.

A rule of the encoder is a builder of blocks, `sparsity -> builder`. A rule of the decoder says what is read,
`(sparsity, tokens, keys) -> [DecodeRule of each layer]`. A rule for activations returns arguments of
`activation.sparsify`, `(sparsity, model) -> arguments`. A rule from outside is one line in `RULES`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparsejax import activation, attention, trees
from sparsejax.attention import decode
from sparsejax.types import Array

DENSE = 'dense'
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


class ActivationModel(NamedTuple):
  """An `ActivationModel` says of a model how many neurons a layer has, and its `loss(results, *inputs)` in nats."""

  neurons: int
  loss: Callable[..., Any]


def _calibrated(make: Callable[..., Any], **more: Any) -> Callable[..., Any]:
  """Returns the rule that is `make(sparsity)`, with `more` arguments of `sparsify`."""
  return lambda sparsity, model: {'rule': make(sparsity), **more}


def _top_k(sparsity: float, model: ActivationModel) -> dict[str, Any]:
  return {'rule': activation.top_k(max(round((1 - sparsity) * model.neurons), 1))}


def _ppl(sparsity: float, model: ActivationModel) -> dict[str, Any]:
  """Returns the rule that raises the perplexity by a tenth of what is asked: by 5 % at 0.5."""
  return {'rule': activation.ppl(10 * sparsity, model.loss, tolerance=0.02)}


_ALL: dict[str, Any] = {'where': trees.named('attention/*/kernel', 'mlp/*/kernel')}
RULES: dict[str, dict[str, Callable[..., Any]]] = {
    'encoder': {'sliding': _sliding, 'routed': functools.partial(_routed, builder=attention.routed),
                'quest': functools.partial(_routed, builder=attention.quest)},
    'decoder': {'newest': _alike(decode.newest, PAGE), 'quest': _alike(decode.quest, PAGE),
                'double_sparsity': functools.partial(_double_sparsity, page=1),
                'double_sparsity in pages': functools.partial(_double_sparsity, page=PAGE)},
    'activation': {'teal': _calibrated(activation.teal, **_ALL), 'wina': _calibrated(activation.wina, **_ALL),
                   'wina in sequence': _calibrated(activation.wina, sequential='weight', **_ALL),
                   'wina greedily': _calibrated(activation.wina, allocation=activation.greedy(), **_ALL),
                   'r_sparse': _calibrated(activation.r_sparse, **_ALL), 'cats': _calibrated(activation.cats),
                   'chess': _calibrated(activation.chess), 'top_k': _top_k, 'ppl': _ppl}}
