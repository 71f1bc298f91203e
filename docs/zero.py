"""Defines a training step under the stages of ZeRO, for `sparsejax plan`, which allocates nothing.

    sparsejax plan docs/zero.py --devices 8 --set stage=3 --set gather=packed
    sparsejax plan docs/zero.py --devices 8 --pipeline stages=4,microbatches=8

The model is a stack of square matrices with 2:4 zeros and a tanh. Stage 0 replicates everything. Stage 1 shards the
optimizer's state, stage 2 the gradients too, and stage 3 the parameters. Stage 3 gathers each matrix in the forward and
again in the backward pass: `dense`, `packed` (the kept values and their positions) or `quantized` (ZeRO++: codes of 8
bits and a scale a column). `backward=kept` scatters gradients of kept weights alone, where the mask is fixed.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import collectives, formats, planning

AXIS = 'data'


def program(mesh, stage=3, gather='dense', backward='dense', layers=4, width=1024, rows=4096):
  """Returns `step(params, opt_state, x)`, and the shapes and shardings of its arguments. Parameters are bfloat16."""
  tx = optax.adam(1e-3)
  split, whole = P(None, AXIS), P()
  place = lambda spec: NamedSharding(mesh, spec)
  shape = (layers, width, width)
  held = place(split if stage >= 3 else whole)
  owned = place(split if stage >= 1 else whole)
  params, shards = ({'w': jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=each)} for each in (held, owned))
  state = planning.abstract_state(tx, shards)
  x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=place(P(AXIS)))
  fetch = functools.partial(fetched, gather=gather, backward=backward) if stage >= 3 else lambda w: w

  def loss(params, x):
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ fetch(w)))
    x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, params['w'])
    return jnp.sum(jnp.square(x.astype(jnp.float32))) / (rows * width)

  def gradients(params, x):
    # Copies are varied by hand, so that the sum of the gradients is written here and not by the compiler.
    w = params['w'] if stage >= 3 else lax.pcast(params['w'], AXIS, to='varying')
    grad = jax.grad(loss)({'w': w}, x)['w']
    if stage < 3:
      grad = lax.psum_scatter(grad, AXIS, scatter_dimension=1, tiled=True) if stage == 2 else lax.psum(grad, AXIS)
    return {'w': grad}

  def step(params, opt_state, x):
    spec = split if stage >= 3 else whole
    grads = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, P(AXIS)), out_specs=split if stage >= 2 else whole)(
        params, x)
    own, grads = lax.with_sharding_constraint((params, grads), owned)
    moves, opt_state = tx.update(grads, opt_state, own)
    return lax.with_sharding_constraint(optax.apply_updates(own, moves), held), opt_state

  return jax.jit(step, donate_argnums=(0, 1)), (params, state, x)


def stage(width=1024, rows=512):
  """Returns one stage of a pipeline, with its parameters and input."""
  layer = lambda w, x: jnp.tanh(x @ w)
  return layer, jax.ShapeDtypeStruct((width, width), 'float32'), jax.ShapeDtypeStruct((rows, width), 'float32')


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fetched(shard, gather, backward):
  """Returns the whole matrix from its shards along the contraction, each of which holds 2:4 zeros."""
  if gather == 'dense':
    return lax.all_gather(shard, AXIS, axis=0, tiled=True)
  if gather == 'quantized':
    scale = jnp.max(jnp.abs(shard), 0, keepdims=True) / 127
    codes = jnp.round(shard / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    codes, scales = (lax.all_gather(each, AXIS) for each in (codes, scale))
    return (codes.astype(shard.dtype) * scales).reshape(-1, shard.shape[1])
  return collectives.packed_gather(_packed(shard), AXIS)


def _packed(shard):
  return formats.NMArray.from_dense(shard, 2, 4, axes=(0,), check=False)


def _forward(shard, gather, backward):
  return fetched(shard, gather, backward), shard


def _backward(gather, backward, shard, grad):
  if backward == 'kept':
    return jax.vjp(lambda shard: collectives.packed_gather(_packed(shard), AXIS), shard)[1](grad)
  return (lax.psum_scatter(grad, AXIS, scatter_dimension=0, tiled=True),)


fetched.defvjp(_forward, _backward)
