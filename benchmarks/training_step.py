"""Measures an AdamW step of a 12-layer, 512-wide transformer on a batch of 8 x 128 tokens.

A step of each recipe at 2:4 is compared with the dense step. A step of dynamic sparse training at 90 %, between two
updates of the mask, is compared with a step with a fixed mask.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks import timing
from benchmarks.timing import Measurement
from experiments import models
from experiments.loop import tasks

BATCH, LENGTH, VOCABULARY = 8, 128, 256
BARS = {'sr_ste': 1.06, 'mdgf': 1.06, 'asp': 1.03}  # at most so many times a dense step
DYNAMIC = {'rigl': 1.05, 'set_': 1.05}  # at most so many times a step of static_sparse
RARELY = {'every': 10**6, 'end': 10**7}
OPTIONS = {'static_sparse': {'key': jax.random.key(0)}, 'movement_pruning': RARELY,
           'soft_movement_pruning': {'end': 10**7},
           **dict.fromkeys((*DYNAMIC, 'snfs'), {'key': jax.random.key(0), **RARELY})}


def run(rounds: int = 20, width: int = 512, depth: int = 12) -> Iterator[Measurement]:
  """Yields one claim for each recipe: the time of its step over the time of the dense step, or of the fixed mask's."""
  for base, bars, what in (('dense', BARS, '2:4, training step over dense'),
                           ('static_sparse', DYNAMIC, '90 %, training step between mask updates over a fixed mask')):
    steps = {name: _step(*problem(width, depth), name) for name in (base, *bars)}
    seconds = list(timing.take_turns(steps, rounds))
    for name, bar in bars.items():
      yield timing.claim(f'{name} {what}', seconds, name, base, bar, at_least=False)


def problem(width: int = 512, depth: int = 12, dtype: str = 'float32') -> tuple[Any, Any, jax.Array]:
  """Returns the model, its parameters, and tokens, `int32[batch, length + 1]`."""
  model = models.make('lm', VOCABULARY, width=width, depth=depth, heads=8)
  tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCABULARY)
  params = model.init(jax.random.key(1), tokens[:, :-1])['params']
  return model, jax.tree.map(lambda w: w.astype(dtype), params), tokens


def compiled(model: Any, params: Any, tokens: jax.Array, name: str, abstract: bool = False) -> tuple[Any, Any]:
  """Returns the compiled step of the recipe `name`, which donates its arguments, and the arguments.

  If `abstract`, the arguments are shapes only.
  """
  apply = lambda params, tokens: model.apply({'params': params}, tokens)
  axes = {} if name == 'dense' else {'axes': sj.contractions(apply, params, tokens[:, :-1])}
  tx = sj.recipes.TABLE[name](optax.adamw(1e-3), **OPTIONS.get(name, {}), **axes)
  start = lambda params: (params, tx.init(params))
  state = jax.eval_shape(start, params) if abstract else start(jax.tree.map(jnp.copy, params))

  def loss(params):
    return tasks.cross_entropy(model.apply({'params': params}, tokens[:, :-1]), tokens[:, 1:])

  def step(params, opt_state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  return jax.jit(step, donate_argnums=(0, 1)).lower(*state).compile(), state


def _step(model: Any, params: Any, tokens: jax.Array, name: str) -> Any:
  """Returns a function that makes one more step at each call and returns the loss."""
  program, state = compiled(model, params, tokens, name)

  def call():
    nonlocal state
    state, value = program(*state)
    return value

  return call
