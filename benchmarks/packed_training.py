"""Compares a training step of a transformer's MLP with packed weights with the dense step: forward, backward and Adam.

The packed weights start as the weights that a recipe has pruned. The losses of the packed run are compared with the
losses of the recipe's own run, whose weights are dense and masked.

    timed = runs(Sizes(width=64, hidden=128, tokens=48, block=16))
    params, state, loss = timed['packed'].step(timed['packed'].params, timed['packed'].state)
    losses(timed['masked'], steps=10)                                                # float[10]
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.timing import Measurement
from kernels_pallas import block_sparse_matmul
from sparsejax import allocation, formats, masks, project, recipes
from sparsejax.formats import BlockSparseArray
from sparsejax.patterns import Block

WIDTH, HIDDEN, TOKENS, BLOCK, SPARSITY, BAR = 1024, 4096, 1024, 128, 0.875, 2.0


class Sizes(NamedTuple):
  """`Sizes` holds the widths of the MLP, the number of tokens of a batch, and the side of a block."""

  width: int = WIDTH
  hidden: int = HIDDEN
  tokens: int = TOKENS
  block: int = BLOCK


class TrainingRun(NamedTuple):
  """A `TrainingRun` holds the parameters, the optimizer's state, and `step(params, state) -> (params, state, loss)`."""

  params: Any
  state: Any
  step: Callable[..., Any]


def mlp(x: jax.Array, params: Any, product: Callable[[jax.Array, Any], jax.Array] = jnp.dot) -> jax.Array:
  return product(jax.nn.gelu(product(x, params['up']['kernel'])), params['down']['kernel'])


def runs(sizes: Sizes) -> dict[str, TrainingRun]:
  """Returns the runs 'dense', 'masked' (a recipe prunes at the start) and 'packed' (the same weights in blocks)."""
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  x, target = draw(0, sizes.tokens, sizes.width), draw(1, sizes.tokens, sizes.width)
  params = {'up': {'kernel': draw(2, sizes.width, sizes.hidden) * sizes.width ** -0.5},
            'down': {'kernel': draw(3, sizes.hidden, sizes.width) * sizes.hidden ** -0.5}}
  adam = optax.adam(1e-3)
  error = lambda params, product=jnp.dot: jnp.mean((mlp(x, params, product) - target) ** 2)

  def stepper(tx, loss):
    def step(params, state):
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state, value
    return jax.jit(step, donate_argnums=(0, 1))

  # Without `where`, the recipe leaves the last layer dense.
  recipe = recipes.magnitude_at_init(adam, SPARSITY, Block((sizes.block, sizes.block)),
                                     allocation=allocation.uniform, where=lambda path, leaf: True)
  state = recipe.init(params)
  pruned = project(params, state)
  packed = jax.tree.map(lambda w, mask: BlockSparseArray.from_dense(w, mask, (sizes.block, sizes.block)), pruned,
                        masks(params, state))
  values = formats.values(packed)
  of_packed = lambda values: error(formats.with_values(packed, values), block_sparse_matmul)
  own = lambda tree: jax.tree.map(jnp.copy, tree)  # Each run donates its own arrays.
  return {'dense': TrainingRun(own(params), adam.init(params), stepper(adam, error)),
          'masked': TrainingRun(own(pruned), own(state), stepper(recipe, error)),
          'packed': TrainingRun(own(values), adam.init(values), stepper(adam, of_packed))}


def losses(run: TrainingRun, steps: int) -> np.ndarray:
  """Returns the losses of the first `steps` steps of a run."""
  params, state, values = run.params, run.state, []
  for _ in range(steps):
    params, state, loss = run.step(params, state)
    values.append(float(loss))
  return np.asarray(values)


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields one claim, after a comparison of the losses."""
  learned = {name: losses(timed, 10) for name, timed in runs(Sizes()).items()}
  np.testing.assert_allclose(learned['packed'], learned['masked'], rtol=1e-4)
  timed = runs(Sizes())  # The first runs have donated their arrays.
  held = {name: [each.params, each.state] for name, each in timed.items()}

  def step(name):
    *held[name], loss = timed[name].step(*held[name])
    return loss, held[name]

  seconds = timing.take_turns({name: functools.partial(step, name) for name in ('dense', 'packed')}, rounds)
  what = f'training step of an MLP {WIDTH}, {HIDDEN}, {WIDTH}, {TOKENS} tokens, {SPARSITY:.1%} zero in {BLOCK}-blocks'
  yield timing.claim(f'{what}: times faster than dense', seconds, 'dense', 'packed', BAR)
