"""One AdamW step of a 12-layer, 512-wide transformer, batch 8 x 128 tokens: each recipe at 2:4 over dense."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks import timing
from experiments import models

BATCH, LENGTH, VOCABULARY = 8, 128, 256
BARS = {'sr_ste': 1.06, 'mdgf': 1.06, 'asp': 1.03}  # at most so many times a dense step


def run(rounds: int = 20, width: int = 512, depth: int = 12) -> Iterator[timing.Claim]:
  """Time claims, then memory claims: bytes of parameters and state, donated, over one master and a byte a weight."""
  model = models.make('lm', VOCABULARY, width=width, depth=depth, heads=8)
  tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCABULARY)
  params = model.init(jax.random.key(1), tokens[:, :-1])['params']
  programs = {name: _program(model, params, tokens, name) for name in ('dense', *BARS)}
  seconds = list(timing.take_turns({name: step for name, (step, _) in programs.items()}, rounds))
  for name, bar in BARS.items():
    slower, spread = timing.ratio(seconds, name, 'dense')
    yield timing.Claim(f'{name} 2:4, training step over dense', slower, spread, bar, False, rounds)
  sparse = sum(w.size for path, w in zip(*sj.trees.flatten(params)[:2]) if sj.trees.matrices(path, w))
  for name in BARS:
    # One float32 master copy and one byte of mask a weight; asp keeps no master.
    extra = programs[name][1] - programs['dense'][1]
    bytes_a_weight = extra / sparse
    yield timing.Claim(f'{name} 2:4, extra bytes a sparse weight', bytes_a_weight, (bytes_a_weight,) * 2,
                       1.001 if name == 'asp' else 5.001, False, 1)


def _program(model: Any, params: Any, tokens: jax.Array, name: str) -> tuple[Any, int]:
  """A call that makes one more step and returns the loss, and the bytes the compiled step holds at its peak."""
  tx = sj.recipes.TABLE[name](optax.adamw(1e-3))
  state = {'params': jax.tree.map(jnp.copy, params)}
  state['opt'] = tx.init(state['params'])

  def loss(params):
    return models.loss(model.apply({'params': params}, tokens[:, :-1]), tokens[:, 1:])

  def step(params, opt_state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(state['params'], state['opt']).compile()

  def call():
    state['params'], state['opt'], value = compiled(state['params'], state['opt'])
    return value

  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return call, held + memory.temp_size_in_bytes
