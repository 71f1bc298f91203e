"""Measures one rule of activation sparsity on the pretrained encoder: its scores, and what one token reads of weights.

A line has these keys beside those of `engine`:

- `asked`: the fraction of inputs to skip, of the weights that the rule makes sparse, or `None`.
- `achieved`: the fraction that tokens of held-out sentences skip.
- `blocks`: the fraction of blocks of 16 inputs that one of these tokens reads.
- `bytes`: the bytes that one token reads of all matrices of the layers, by the text of the compiled product in blocks.
- `flops`: the operations with the inputs that are left.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.frontier.rules import DENSE, RULES, ActivationModel
from experiments.models import encoders
from experiments.pruning import encoder
from kernels_pallas import bytes_read, packed
from sparsejax import activation, formats, trees
from sparsejax.types import Array, PyTree

BATCHES, BATCH = 4, 16  # of sentences to calibrate on; the last batch is held out
DIGITS = 5  # of the scores that a line keeps
FACTS = {'calibration': f'{BATCHES} x {BATCH} sentences, the last {BATCH} of them held out for what is skipped',
         'probe': f'{encoder.PROBED} sentences', 'held out': f'{encoder.HELD_OUT} sentences'}


class ActivationBench:
  """An `ActivationBench` has the scores of the pretrained encoder on SST-2, with any rule of activation sparsity."""

  def __init__(self, data_dir: str | None, seed: int):
    self._judge = encoder.judge(data_dir, seed)
    self._params = jax.tree.map(jnp.asarray, encoders.load_pretrained())
    tokens, labels = (jnp.asarray(self._judge.calibration[key][:BATCHES * BATCH]) for key in ('inputs', 'labels'))
    self._batches = [(tokens[i:i + BATCH], tokens[i:i + BATCH] != encoders.PADDING, labels[i:i + BATCH])
                     for i in range(0, len(tokens), BATCH)]
    hidden = self._params['block_0']['mlp']['fc1']['kernel'].shape[1]
    self._model = ActivationModel(hidden, lambda found, tokens, mask, labels: self._judge.nats(found, labels))
    self._embeds: dict[Any, Callable[..., Array]] = {}

  def line(self, rule: str, sparsity: float) -> dict[str, Any]:
    """Returns the scores and the costs of a rule."""
    sizes = {path: math.prod(leaf.shape) for path, leaf in zip(*trees.flatten(self._params)[:2])
             if encoder.WHERE(path, leaf)}
    if rule == DENSE:
      scores = rounded(self._judge.scored(encoders.embed, self._params))
      return {'asked': 0.0, 'achieved': 0.0, 'blocks': 1.0, 'scores': scores, 'bytes': 4 * sum(sizes.values()),
              'flops': 2 * sum(sizes.values())}
    small = activation.sparsify(_embedded, self._params, self._batches, valid=[mask for _, mask, _ in self._batches],
                                reads=functools.partial(bytes_read, implementation='xla'),
                                **RULES['activation'][rule](sparsity, self._model))
    scores = self._judge.scored(self._embed(small.apply), small.params)
    return {'asked': small.report.asked, 'achieved': small.report.achieved, 'scores': rounded(scores),
            'blocks': float(np.average([row.blocks for row in small.report.rows], weights=small.report.sizes)),
            **_costs(sizes, small)}

  def _embed(self, apply: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `apply` for packed parameters; rules for inputs share one function, whose programs are compiled once."""
    if apply is not _embedded:
      return _on_packed(apply)
    return self._embeds.setdefault(apply, _on_packed(apply))


def _embedded(params: PyTree, tokens: Array, mask: Array, labels: Array | None) -> Array:
  """Returns the embeddings; the labels are those that `ActivationModel.loss` reads."""
  return encoders.embed(params, tokens, mask)


def _on_packed(apply: Callable[..., Array]) -> Callable[..., Array]:
  return lambda params, tokens, mask: packed(apply)(params, tokens, mask, None)


def _costs(sizes: Mapping[str, int], small: activation.Rewritten) -> dict[str, float]:
  """Returns what one token reads and computes with the matrices of `sizes`, entries by path, dense ones too."""
  rows = {row.path: row for row in small.report.rows}
  extra = sum(part.size for leaf in jax.tree.leaves(small.params, is_leaf=formats.is_packed)
              if isinstance(leaf, formats.ActiveArray) for part in (leaf.left, leaf.right) if part is not None)
  read = sum(n * (rows[path].read if path in rows else 1.0) for path, n in sizes.items())
  left = sum(n * (1 - rows[path].achieved if path in rows else 1.0) for path, n in sizes.items())
  return {'bytes': 4 * (read + extra), 'flops': 2 * (left + extra)}


def rounded(scores: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
  """Returns the scores as a line keeps them."""
  return {name: np.round(np.asarray(values, np.float64), DIGITS).tolist() for name, values in scores.items()}
