"""Rows and packed weights between eight devices: equal to one device, and the bytes that the compiled text sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax import collectives, formats, moe, patterns
from sparsejax.programs import hlo

EXPERTS, WIDTH, TOKENS = 16, 4, 32
MESH = functools.cache(lambda: jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)))


def sharded(f, ins, outs):
  return jax.jit(jax.shard_map(f, mesh=MESH(), in_specs=ins, out_specs=outs))


def drawn(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sent(f, *args):
  return {each.kind: each.sent for each in hlo.collectives(f.lower(*args).compile().as_text())}


def test_copies_of_hot_experts_give_the_outputs_and_gradients_of_one_device():
  """Each token uses expert 3 or 9, which device 1 and device 4 own; all devices hold copies while they compute."""
  w, x, pick = drawn(EXPERTS, WIDTH, WIDTH), drawn(TOKENS, WIDTH, seed=1), jnp.arange(TOKENS) % 2
  loads = jnp.zeros(EXPERTS).at[jnp.asarray([3, 9])].set(16)
  ids = moe.placement(loads, 2)

  def loss(w, x, pick):
    return jnp.sum(jnp.tanh(jnp.einsum('ti,tio->to', x, w[pick])))

  def of_shard(w, x, pick):
    return lax.psum(loss(collectives.gather_rows(w, ids, 'data'), x, pick), 'data')

  f = sharded(jax.value_and_grad(of_shard), (P('data'), P('data'), P('data')), (P(), P('data')))
  value, grad = f(w, x, pick)
  wanted, dense = jax.value_and_grad(loss)(w, x, ids[pick])
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(grad, dense, atol=1e-5)
  rows = 2 * WIDTH * WIDTH * 4  # bytes; one all-reduce of h rows forward and one backward, and that of the loss
  total = sum(each.sent for each in hlo.collectives(f.lower(w, x, pick).compile().as_text()))
  assert 2 * (2 * 7 * rows // 8) <= total <= 2 * (2 * 7 * rows // 8) + 64


def test_scattered_rows_are_summed_at_their_owners():
  rows, ids = drawn(8, 3, WIDTH), jnp.asarray([5, 0, 15])
  f = sharded(lambda rows: collectives.scatter_rows(rows[0], ids, 2, 'data'), P('data'), P('data'))
  wanted = jnp.zeros((EXPERTS, WIDTH)).at[ids].add(jnp.sum(rows, 0))
  np.testing.assert_allclose(f(rows), wanted, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('n, m', [(2, 4), (1, 8)])
def test_a_packed_gather_is_the_dense_one_bit_for_bit_and_sends_packed_bytes(n, m):
  """bfloat16 is sent as its 16 bits, which a CPU does not widen: 0.5625 of the dense bytes at 2:4, 0.1484 at 1:8."""
  w = drawn(512, 8).astype(jnp.bfloat16)
  w = jnp.where(patterns.NM(n, m)(jnp.abs(w.astype(jnp.float32))), w, 0)
  shards = w.reshape(8, 64, 8)

  def gathered(shard, packed):
    if not packed:
      return lax.all_gather(shard[0], 'data', tiled=True)[None]
    own = formats.NMArray.from_dense(shard[0], n, m, axes=(0,), check=False)
    return collectives.packed_gather(own, 'data')[None]

  make = lambda packed: sharded(functools.partial(gathered, packed=packed), P('data'), P('data'))
  found = {packed: make(packed) for packed in (True, False)}
  np.testing.assert_array_equal(found[True](shards)[5].astype(jnp.float32), w.astype(jnp.float32))
  values = {packed: sum(each.sent_values for each in hlo.collectives(f.lower(shards).compile().as_text()))
            for packed, f in found.items()}
  assert values[True] / values[False] == {(2, 4): 0.5625, (1, 8): 0.1484375}[n, m]


def test_a_gradient_through_a_packed_gather_is_that_of_the_kept_weights():
  w = jnp.where(patterns.NM(2, 4)(jnp.abs(drawn(64, 8))), drawn(64, 8), 0)
  direction = drawn(64, 8, seed=2)

  def loss(shard):
    own = formats.NMArray.from_dense(shard, 2, 4, axes=(0,), check=False)
    return jnp.sum(collectives.packed_gather(own, 'data') * direction)

  grad = sharded(jax.grad(loss), P('data'), P('data'))(w)
  np.testing.assert_allclose(grad, 8 * jnp.where(w != 0, direction, 0), rtol=1e-5)


def test_an_axis_that_is_not_there_is_refused():
  f = sharded(lambda w: collectives.packed_gather(formats.NMArray.from_dense(w, 2, 4, axes=(0,), check=False), 'data',
                                                  2), P('data'), P())
  with pytest.raises(ValueError, match='collectives.packed_gather: axis=2 of shards of shape'):
    jax.eval_shape(f, drawn(64, 8))
