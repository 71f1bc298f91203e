"""Reads the peak memory of a donated AdamW step of a 12-layer, 512-wide transformer from the compiled program."""

from collections.abc import Iterator
from typing import Any

import jax

import sparsejax as sj
from benchmarks import training_step
from benchmarks.timing import Measurement

# A bar counts the bytes for each sparse weight over dense: a mask of one byte, and a float32 master of four bytes.
# With bfloat16 parameters, each of AdamW's two moments takes two bytes more: the optimizer updates the float32 master.
BARS = {'float32': {'sr_ste': 5.001, 'mdgf': 5.001, 'asp': 1.001}, 'bfloat16': {'sr_ste': 9.001, 'asp': 1.001}}
# A bar counts what a recipe keeps (mask, master, memory of its score), and four bytes in which masks are chosen.
MOVING = {'set_': 5.001, 'rigl': 5.001, 'snfs': 9.001, 'movement_pruning': 13.001, 'soft_movement_pruning': 21.001}


def run(rounds: int = 1) -> Iterator[Measurement]:
  """Yields claims on the bytes that a recipe holds over dense, and on the share that donation updates in place.

  The numbers are the same in every round.
  """
  del rounds
  for dtype, bars in BARS.items():
    bars = bars | (MOVING if dtype == 'float32' else {})
    model, params, tokens = training_step.problem(dtype=dtype)
    sparse = sum(w.size for path, w in zip(*sj.trees.flatten(params)[:2]) if sj.trees.matrices(path, w))
    dense, _ = measured(model, params, tokens, 'dense')
    for name, bar in bars.items():
      peak, in_place = measured(model, params, tokens, name)
      extra = (peak - dense) / sparse
      kind = f'{name}, {dtype}' if name in MOVING else f'{name} 2:4, {dtype}'
      yield Measurement(f'{kind}, extra bytes a sparse weight at the peak of a step', extra, (extra,) * 2,
                        bar, False, 1)
      yield Measurement(f'{kind}, share of parameters and state updated in place', in_place,
                        (in_place,) * 2, 1.0, True, 1)


def measured(model: Any, params: Any, tokens: jax.Array, name: str) -> tuple[int, float]:
  """Returns the bytes at the peak of a step, and the share of parameters and state that are updated in place."""
  compiled, state = training_step.compiled(model, params, tokens, name, abstract=True)
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  given = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  return held + memory.temp_size_in_bytes, memory.alias_size_in_bytes / given
