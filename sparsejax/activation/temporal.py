"""Runs a model on a stream of frames by what changes from frame to frame: delta layers.

    start, step = delta(model.apply, 0.1)
    y, state = start(params, frames[0])
    y, state = step(params, state, frames[1])        # products take only changes of at least 0.1

Each product with a parameter keeps the input that was last sent, r, and its output, a. Of the change d = x - r, entries
below the threshold are dropped; then r becomes r + d, and a becomes a + d w.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax.arguments import checked
from sparsejax.programs.evaluate import Operation, evaluate, rules_at
from sparsejax.programs.operands import uses_by_address
from sparsejax.programs.tracing import trace
from sparsejax.types import Array, PyTree


class Sent(NamedTuple):
  """A `Sent` holds what a product has sent so far, `x`, and the product of it, `y`."""

  x: Array
  y: Array


State = dict[str, Sent]  # by path, number of the use, and rounds of the loops around the product


@checked
def delta(apply: Callable[..., Any], threshold: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns the functions `start(params, *inputs)` and `step(params, state, *inputs)`; both return `(y, state)`.

  Parameters, inputs and results are those of `apply`. `state` is a pytree, so that `step` runs under `jit` and `scan`.
  With `threshold=0` results are those of `apply`, up to rounding. With another, `|x - r| < threshold` holds for each
  input, always, because r holds what was sent, and not the last input (Delta Activation Layer, Yousefzadeh and
  Sifalakis 2022; no code is published). Biases are outside of products and count once. A float sum drifts by rounding:
  call `start` again every some hundred frames.

  A change of a stream multiplies the weight of a whole product, convolutions too. To skip zeros of the change, run
  `kernels_pallas.packed(step)` on weights of `formats.ActiveArray.of(w)`. Loops over layers are unrolled. Raises
  `ValueError` for a product inside of `shard_map`, and for a state of another model.
  """
  def start(params: PyTree, *inputs: Any) -> tuple[Any, State]:
    return _run(apply, params, inputs, lambda key, x, product: Sent(x, product(x)))

  def step(params: PyTree, state: State, *inputs: Any) -> tuple[Any, State]:
    def changed(key: str, x: Array, product: Callable[[Array], Array]) -> Sent:
      if key not in state or state[key].x.shape != x.shape:
        raise ValueError(f'activation.delta: the state has no entry of {key} with an input of shape {x.shape}; it is '
                         'of another model or of other frames. Call start(params, *inputs) first.')
      d = x - state[key].x
      d = jnp.where(jnp.abs(d) < jnp.asarray(threshold, d.dtype), jnp.zeros((), d.dtype), d)
      return Sent(state[key].x + d, state[key].y + product(d))

    return _run(apply, params, inputs, changed)

  return start, step


def _run(apply: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...],
         sent: Callable[[str, Array, Callable[[Array], Array]], Sent]) -> tuple[Any, State]:
  """Runs `apply` with the products that `sent` returns, layer by layer."""
  program = trace(apply, (params, *inputs))
  sites = {address: uses for address, uses in uses_by_address(program).items()
           if all(use.data for use in uses.values())}
  state: State = {}

  def rule(eqn: Any, values: list[Any], here: Operation) -> list[Any]:
    (path, number), use = next(iter(sites[here.address].items()))
    key = '/'.join(map(str, (path, number, *here.steps)))
    product = lambda x: here.dense([value if i == use.operand or i > 1 else x for i, value in enumerate(values)])[0]
    state[key] = sent(key, values[1 - use.operand], product)
    return [state[key].y]

  results = evaluate(program, program.arrays, rules_at('activation.delta', program, sites, rule, lambda eqn: False))
  return program.unflatten(results), state


@checked
def temporal_l1(apply: Callable[..., Any], params: PyTree, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array:
  """Returns the mean, over products, of the mean change of their inputs between two frames, `float32[]`.

  `before`, `after`: the inputs of `apply` after the parameters. Added to a training loss, the penalty makes changes
  sparse, so that `delta` skips more. Differentiable in `params`; rules of derivatives that the model brings are not
  used. Deviation from the papers: the authors train on quantized activations.
  """
  seen: list[State] = [_run(apply, params, inputs, lambda key, x, product: Sent(x, product(x)))[1]
                       for inputs in (before, after)]
  changes = [jnp.mean(jnp.abs(seen[1][key].x - seen[0][key].x).astype(jnp.float32)) for key in seen[0]]
  if not changes:
    raise ValueError('activation.temporal_l1: the program has no product of a parameter with data.')
  return jnp.mean(jnp.stack(changes))
