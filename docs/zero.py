"""Defines a training step under the stages of ZeRO, for `sparsejax plan`, which allocates nothing.

    sparsejax plan docs/zero.py --devices 8 --set stage=3 --set gather=packed
    sparsejax plan docs/zero.py --devices 8 --mesh node=2,data=4 --set copies=True --set backward=quantized
    sparsejax plan docs/zero.py --devices 8 --pipeline stages=4,microbatches=8

The model is a stack of square matrices with 2:4 zeros and a tanh. Stage 0 replicates everything. Stage 1 shards the
optimizer's state, stage 2 the gradients too, and stage 3 the parameters. The last mesh axis is within a node, and any
other axes are between nodes. Options of stage 3:

- `gather`: how each matrix is sent, in the forward and again in the backward pass: `dense`, `packed` (the kept values
  and their positions) or `quantized` (qwZ of ZeRO++: codes of 8 bits and a scale a column).
- `backward`: how gradients are sent: `dense`, `kept` (the gradients of kept weights alone, where the mask is fixed) or
  `quantized` (qgZ of ZeRO++: codes of 4 bits, within the node and then between nodes, summed in float32).
- `copies`: whether each node keeps a second copy, sharded over its devices, so that the backward pass gathers within
  the node (hpZ of ZeRO++).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import collectives, formats, planning


class Sent(NamedTuple):
  """A `Sent` says how stage 3 sends: the mesh axes, that of a node last, and the options of the module."""

  axes: tuple[str, ...]
  gather: str = 'dense'
  backward: str = 'dense'
  copies: bool = False


def program(mesh, stage=3, gather='dense', backward='dense', copies=False, layers=4, width=1024, rows=4096):
  """Returns `step(params, opt_state, x)`, and the shapes and shardings of its arguments. Parameters are bfloat16."""
  how = Sent(mesh.axis_names, gather, backward, copies)
  tx = optax.adam(1e-3)
  split, whole, batch = P(None, how.axes), P(), P(how.axes)
  place = lambda spec: NamedSharding(mesh, spec)
  shape = (layers, width, width)
  held = place(split if stage >= 3 else whole)
  owned = place(split if stage >= 1 else whole)
  params, shards = ({'w': jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=each)} for each in (held, owned))
  state = planning.abstract_state(tx, shards)
  x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=place(batch))
  layer = (lambda x, w: sharded(x, w, how)) if stage >= 3 else jax.checkpoint(product)

  def loss(params, x):
    x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, params['w'])
    return jnp.sum(jnp.square(x.astype(jnp.float32))) / (rows * width)

  def gradients(params, x):
    # Copies are varied by hand, so that the sum of the gradients is written here and not by the compiler.
    w = params['w'] if stage >= 3 else lax.pcast(params['w'], how.axes, to='varying')
    grad = jax.grad(loss)({'w': w}, x)['w']
    if stage < 3:
      grad = lax.psum_scatter(grad, how.axes, scatter_dimension=1, tiled=True) if stage == 2 else lax.psum(
          grad, how.axes)
    return {'w': grad}

  def step(params, opt_state, x):
    spec = split if stage >= 3 else whole
    grads = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, batch), out_specs=split if stage >= 2 else whole)(
        params, x)
    own, grads = lax.with_sharding_constraint((params, grads), owned)
    moves, opt_state = tx.update(grads, opt_state, own)
    return lax.with_sharding_constraint(optax.apply_updates(own, moves), held), opt_state

  return jax.jit(step, donate_argnums=(0, 1)), (params, state, x)


def stage(width=1024, rows=512):
  """Returns one stage of a pipeline, with its parameters and input."""
  return lambda w, x: product(x, w), *(jax.ShapeDtypeStruct(shape, 'float32') for shape in (
      (width, width), (rows, width)))


def product(x, w):
  """Returns the output of a layer with the whole matrix."""
  return jnp.tanh(x @ w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded(x, shard, how):
  """Returns the output of a layer whose matrix is sharded along the contraction; each shard holds 2:4 zeros."""
  return product(x, gathered(shard, how.axes, how.gather))


def _forward(x, shard, how):
  w = gathered(shard, how.axes, how.gather)
  return product(x, w), (x, shard, share_of_node(w, how.axes[-1]) if how.copies else shard)


def _backward(how, saved, grad):
  x, shard, held = saved
  w = gathered(held, how.axes[-1:] if how.copies else how.axes, how.gather)
  dx, dw = jax.vjp(product, x, w)[1](grad)
  return dx, SCATTERS[how.backward](dw, shard, how.axes)


sharded.defvjp(_forward, _backward)


def gathered(shard, axes, gather):
  """Returns the whole matrix from its shards."""
  if gather == 'dense':
    return lax.all_gather(shard, axes, axis=0, tiled=True)
  if gather == 'quantized':
    codes, scale = quantized(shard, 127)
    codes, scales = (lax.all_gather(each, axes) for each in (codes, scale))
    return (codes.astype(shard.dtype) * scales).reshape(-1, shard.shape[1])
  return collectives.packed_gather(_packed(shard), axes)


def share_of_node(w, axis):
  """Returns the rows of the whole matrix that this device keeps for its node."""
  return w.reshape(lax.axis_size(axis), -1, w.shape[1])[lax.axis_index(axis)]


def _packed(shard):
  return formats.NMArray.from_dense(shard, 2, 4, axes=(0,), check=False)


def quantized(x, most):
  """Returns codes `int8`, from `-most` to `most`, and a scale for each column of each matrix `[..., rows, columns]`."""
  scale = jnp.max(jnp.abs(x), -2, keepdims=True) / most
  return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def _dense(grad, shard, axes):
  return lax.psum_scatter(grad, axes, scatter_dimension=0, tiled=True)


def _kept(grad, shard, axes):
  return jax.vjp(lambda shard: collectives.packed_gather(_packed(shard), axes), shard)[1](grad)[0]


def _quantized(grad, shard, axes):
  """Returns the sum of all gradients for this shard: a sum over the node for each node, and then over the nodes."""
  sizes = [lax.axis_size(axis) for axis in axes]
  parts = grad.reshape(-1, sizes[-1], *shard.shape).swapaxes(0, 1)      # [devices of a node, nodes, rows, columns]
  parts = summed(parts, axes[-1])
  for axis, size in zip(axes[-2::-1], sizes[-2::-1]):
    parts = summed(parts.reshape(-1, size, *shard.shape).swapaxes(0, 1), axis)
  return parts.reshape(shard.shape).astype(shard.dtype)


def summed(parts, axis):
  """Returns the sum over the devices of a mesh axis of the part for this device, `parts[i]` for device i.

  Codes of 4 bits are sent in pairs, and decoded before they are summed in float32.
  """
  codes, scale = quantized(parts, 7)
  pairs = (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)
  pairs, scale = (lax.all_to_all(each, axis, 0, 0) for each in (pairs, scale.astype(jnp.bfloat16)))
  codes = jnp.stack([(pairs << 4) >> 4, pairs >> 4], -1).reshape(codes.shape)      # shifts of int8 keep the sign
  return jnp.sum(codes.astype(jnp.float32) * scale.astype(jnp.float32), 0)


SCATTERS = {'dense': _dense, 'kept': _kept, 'quantized': _quantized}
