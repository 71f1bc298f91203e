"""Measures an AdamW step of a multilayer perceptron of a million weights, at batch 8 and at batch 1024.

At batch 8 the gradients take little time, so that whatever a recipe adds between two updates of the mask shows. Steps
by hand, see `floors`, stand beside the recipes, and show what no recipe can leave out on this machine.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks import floors, timing
from benchmarks.timing import Measurement

SIZES = (256, 1024, 512, 512, 10)
BARS = {8: 1.3, 1024: 1.03}  # by batch: at most so many times a dense step
NAMES = ('sr_ste', 'mdgf', 'sdgf_geometric', 'st3', 'gradual_magnitude', 'movement_pruning', 'soft_movement_pruning',
         'iterative_soft_shrinkage', 'set_', 'rigl', 'snfs', 'lottery_jackpot')
# No master takes less than the first. SR-STE by hand stores no mask, which a report and a packed file read. The scores
# of soft movement pruning have an Adam of their own, which no implementation can leave out.
HANDS = ('a master under a fixed mask', 'sr_ste, by hand', 'soft_movement_pruning, by hand')
MASTERS = ('sr_ste', 'mdgf', 'sdgf_geometric')  # their masks are cheap, and are chosen at every step
RARELY = {'every': 10**6, 'refresh': sj.schedules.every(10**6), 'end': 10**7, 'total_steps': 10**7,
          'key': jax.random.key(0)}


def run(rounds: int = 20, sizes: tuple[int, ...] = SIZES) -> Iterator[Measurement]:
  """Yields one claim for each batch and recipe: the time of a step over the time of the dense step."""
  for batch, bar in BARS.items():
    steps = {name: stepping(name, batch, sizes) for name in ('dense', *NAMES, *HANDS)}
    seconds = list(timing.take_turns(steps, rounds, calls=5))
    for name in (*NAMES, *HANDS):
      yield timing.claim(f'{name}, batch {batch}: a step over dense', seconds, name, 'dense', bar, at_least=False)


def recipe(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
  """Returns AdamW under a recipe that chooses its masks once in a million steps, if masks are costly."""
  if name in HANDS:
    return floors.STEPS[name](optax.adamw(1e-3))
  make = sj.recipes.TABLE[name]
  known = {'total_steps': 10**7} if name in MASTERS else RARELY
  return make(optax.adamw(1e-3), **options, **{key: value for key, value in known.items()
                                               if key in sj.recipes.arguments(make) and name != 'dense'})


def stepping(name: str, batch: int, sizes: tuple[int, ...] = SIZES) -> Callable[[], jax.Array]:
  """Returns a function that makes one more step of the recipe at each call, and returns the loss."""
  params = {f'layer_{i}': {'kernel': jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5}
            for i, shape in enumerate(zip(sizes, sizes[1:]))}
  x, y = (jax.random.normal(jax.random.key(9), (batch, size)) for size in (sizes[0], sizes[-1]))
  where = {} if name in ('dense', *HANDS) else {'where': sj.trees.all_but(f'layer_{len(params) - 1}/*')}  # 10 outputs
  tx = recipe(name, **where)

  def loss(params):
    h = x
    for layer in params.values():
      h = jnp.tanh(h @ layer['kernel'])
    return jnp.mean((h - y) ** 2)

  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  program, held = jax.jit(step, donate_argnums=(0, 1)), (params, tx.init(params))

  def call():
    nonlocal held
    held, value = program(*held)
    return value

  return call
