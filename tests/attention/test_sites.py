"""Tests that attention is found in programs of every kind, that it is replaced exactly, and that nothing is silent."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from products import normal

import kernels_pallas
from sparsejax import attention

B, T, H, D = 2, 8, 4, 8
CAUSAL = jnp.tril(jnp.ones((T, T), bool))[None, None]
SHARED = [normal((B, T, heads, D), seed=i) for i, heads in enumerate((H, 2, 2))]  # two heads of q share one of k
EQUAL = [normal((B, T, H, D), seed=i) for i in range(3)]
X, PAD = normal((B, T, 16)), jnp.arange(T)[None, None, None] < jnp.array([5, T])[:, None, None, None]


@functools.cache
def linen():
  model = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.3)
  return model, model.init(jax.random.key(0), X, X, deterministic=True)


def linen_case(mask=None, **options):
  model, params = linen()
  return lambda params, x, *more: model.apply(params, x, x, mask=mask(x, *more) if mask else None, **options)


def of_linen(*more, mask=None, **options):
  options = options or {'deterministic': True}
  return lambda: (linen_case(mask, **options), (linen()[1], X, *more))


def of_nnx(mask, *more):
  def made():
    graph, state = nnx.split(nnx.MultiHeadAttention(2, 16, decode=False, deterministic=True, rngs=nnx.Rngs(0)))
    return lambda state, x, *more: nnx.merge(graph, state)(x, mask=mask(*more)), (state, X, *more)
  return made


def by_hand(q, k, v):
  scores = jnp.where(CAUSAL, jnp.einsum('bqhd,bkhd->bhqk', q, k) / jnp.sqrt(8.), -1e9)
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores.astype('float32')).astype(q.dtype), v)


def capped(q, k, v):
  """Returns attention with heads first, scaled before, with a soft cap, and with a softmax that is written out."""
  q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
  scores = 5 * jnp.tanh((q * 0.5) @ k.swapaxes(-1, -2) / 5)
  exps = jnp.exp(scores - scores.max(-1, keepdims=True))
  return (exps * (1 / exps.sum(-1, keepdims=True)) @ v).swapaxes(1, 2)


def stacked(weights, x):
  def layer(x, w):
    q, k, v = (x @ w[i] for i in range(3))
    mask = jnp.tril(jnp.ones((T, T), bool))
    one = lambda q, k, v, mask: jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(-1, -2) / 8, -jnp.inf)) @ v
    return x + jax.checkpoint(one)(q, k, v, mask), None
  return jax.lax.scan(layer, x, weights)[0]


jnn = jax.nn.dot_product_attention


def in_bfloat16(q, k, v):
  with jax.numpy_dtype_promotion('standard'):  # JAX promotes inside
    return jnn(q, k, v, mask=PAD)


# For each program: a function and its arguments, the edits that are read, and the shape of the scores.
PROGRAMS = {
    'linen': (of_linen(), '', (2, 2, 8, 8)),
    'linen, causal': (of_linen(mask=lambda x: nn.make_causal_mask(x[..., 0])), 'causal', (2, 2, 8, 8)),
    'linen, padding': (of_linen(PAD, mask=lambda x, pad: nn.combine_masks(
        nn.make_causal_mask(x[..., 0], dtype=bool), pad, dtype=bool)), 'causal, mask', (2, 2, 8, 8)),
    'linen, dropout': (of_linen(mask=lambda x: CAUSAL, deterministic=False, rngs={'dropout': jax.random.key(1)}),
                       'causal, weigh', (2, 2, 8, 8)),
    'nnx': (of_nnx(lambda: CAUSAL), 'causal', (2, 2, 8, 8)),
    'nnx, padding': (of_nnx(lambda pad: pad, PAD), 'mask', (2, 2, 8, 8)),
    'jax.nn': (lambda: (lambda q, k, v, b: jnn(q, k, v, is_causal=True, bias=b),
                        (*SHARED, normal((1, H, T, T), seed=4))), 'causal, add', (2, 4, 8, 8)),
    'jax.nn, lengths': (lambda: (lambda q, k, v, n: jnn(q, k, v, key_value_seq_lengths=n),
                                 (*SHARED, jnp.array([4, 8]))), 'mask', (2, 4, 8, 8)),
    'jax.nn, window': (lambda: (lambda q, k, v: jnn(q, k, v, local_window_size=(2, 0)), SHARED), 'mask', (2, 4, 8, 8)),
    'jax.nn, across': (lambda: (jnn, (SHARED[0], *(a[:, :5] for a in SHARED[1:]))), '', (2, 4, 8, 5)),
    'jax.nn, bfloat16': (lambda: (in_bfloat16, [a.astype('bfloat16') for a in SHARED]),
                         'mask', (2, 4, 8, 8)),
    'by hand': (lambda: (by_hand, EQUAL), 'causal', (2, 4, 8, 8)),
    'capped': (lambda: (capped, EQUAL), 'tanh, multiply', (2, 4, 8, 8)),
    'one head': (lambda: (lambda q, k, v: jax.nn.softmax(q @ k.T) @ v, [a[0, :, 0] for a in EQUAL]), '', (1, 1, 8, 8)),
    'vmap': (lambda: (jax.vmap(jax.vmap(lambda q, k, v: jax.nn.softmax(q @ k.T) @ v, 1, 1)), EQUAL), '',
             (2, 4, 8, 8)),
    'scan and remat': (lambda: (stacked, (normal((3, 3, 16, 16)) / 4, X)), 'causal', (1, 2, 8, 8)),
}

OF_KEYS = {'linen, padding', 'nnx, padding', 'jax.nn, lengths', 'jax.nn, bfloat16'}  # masks that kernels compute


@pytest.mark.parametrize('name', PROGRAMS)
def test_attention_is_read(name):
  made, edits, shape = PROGRAMS[name]
  apply, args = made()
  report = kernels_pallas.sparse_attention(apply, attention.full(block=4), explain=True)(*args)
  assert [(row.edits, row.shape, row.problem, row.achieved) for row in report.rows] == [(edits, shape, '', 0.0)]
  assert 'the lists have all of its blocks' in str(report)
  last, runs = edits.split(', ')[-1], report.rows[0].runs
  lacks = last not in ('', 'causal') and name not in OF_KEYS  # No kernel computes other edits, which is said.
  assert ('of scores' in runs) == lacks and ('cuda: xla (it has no ' in runs and repr(last) in runs) == lacks


def loss(apply):
  return lambda args: jnp.sin(apply(*args).astype('float32')).sum()


@pytest.mark.sampled(5)
@pytest.mark.parametrize('name', ['linen, dropout', 'nnx, padding', 'jax.nn', 'jax.nn, window', 'capped',
                                  'scan and remat', 'linen, padding', 'by hand', 'jax.nn, across', 'vmap'])
def test_all_blocks_are_the_dense_program_with_its_gradients(name):
  apply, args = PROGRAMS[name][0]()
  floats = [a for a in args if not isinstance(a, jax.Array) or jnp.issubdtype(a.dtype, jnp.floating)]
  run = kernels_pallas.sparse_attention(apply, attention.full(block=3))
  both = lambda some: tuple(jax.value_and_grad(lambda some, f=f: loss(f)([*some, *args[len(some):]]))(some)
                            for f in (apply, run))
  expected, found = jax.jit(both)(list(floats))
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
    if jnp.issubdtype(a.dtype, jnp.floating):
      np.testing.assert_allclose(a, b, atol=2e-4 * max(1, float(jnp.abs(a).max())))


@pytest.mark.parametrize('implementation', ['xla', 'dense'])
def test_a_query_whose_blocks_are_hidden_keeps_its_own_key(implementation):
  builder = attention.strided(2, block=2)
  program = lambda q, k, v, pad: jnn(q, k, v, is_causal=True, mask=pad)
  run = kernels_pallas.sparse_attention(program, builder, implementation=implementation)
  pad = jnp.arange(T)[None, None, None] >= jnp.array([0, 3])[:, None, None, None]  # early queries see nothing
  seen = jnp.asarray(np.kron(np.arange(4)[:, None] % 2 == np.arange(4) % 2, np.ones((2, 2))))[None, None] > 0
  left = seen & pad & CAUSAL
  own = jnp.eye(T, dtype=bool)[None, None] & ~left.any(-1, keepdims=True)
  assert own.any()
  exact, found = jax.jit(lambda *a: (jnn(*a[:3], mask=left | own), run(*a)))(*SHARED, pad)
  np.testing.assert_allclose(found, exact, atol=1e-5)


WINDOW = CAUSAL[0, 0] & ~jnp.tril(jnp.ones((T, T), bool), -2)


@pytest.mark.parametrize('mask, blocks', [(WINDOW, (2, 2)), (CAUSAL[0, 0], (4, 2)), (WINDOW[4:], (2, 2))],
                         ids=['window', 'tall', 'last'])
def test_no_query_is_left_without_a_key(mask, blocks):
  """One block of keys is asked for, in which some queries of a block see keys and others none."""
  q = EQUAL[0][:, -len(mask):]
  program = lambda q, k, v: jnn(q, k, v, mask=mask[None, None])
  for column in range(T // blocks[1]):
    pick = lambda site, n=column: attention.BlockMask(np.broadcast_to(
        np.arange(T // blocks[1])[None, None] == n, (1, len(mask) // blocks[0], T // blocks[1])), *blocks)
    seen = np.asarray(kernels_pallas.sparse_attention(program, pick)(q, EQUAL[1], jnp.ones_like(EQUAL[2])))
    np.testing.assert_allclose(seen, 1, rtol=1e-5)  # weights that sum to 1


@jax.custom_vjp
def flash(q, k, v):
  return by_hand(q, k, v)


flash.defvjp(lambda q, k, v: (flash(q, k, v), (q, k, v)), lambda saved, dy: saved)


def sharded_program(q, k, v):
  mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec('data')
  return jax.shard_map(by_hand, mesh=mesh, in_specs=spec, out_specs=spec)(q, k, v)


def late(q, k, v):
  """Divides by the sum after the product with the values."""
  exps = jnp.exp(jnp.einsum('bqhd,bkhd->bhqk', q, k))
  return jnp.einsum('bhqk,bkhd->bqhd', exps, v) / exps.sum(-1).swapaxes(1, 2)[..., None]


def sorted_scores(q, k, v):
  scores = jnp.sort(jnp.einsum('bqhd,bkhd->bhqk', q, k))
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v)


def of_halves(q, k, v):
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k).reshape(B, H, T, 2, 4)
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores).reshape(B, H, T, T), v)


def unnormalised(q, k, v):
  return jnp.einsum('bhqk,bkhd->bqhd', jnp.exp(jnp.einsum('bqhd,bkhd->bhqk', q, k)), v)


@jax.custom_jvp
def ruled(q, k, v):
  return by_hand(q, k, v)


ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0]))


def with_weights(q, k, v):
  weights = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k))
  return jnp.einsum('bhqk,bkhd->bqhd', weights, v), weights


UNREAD = {
    'a tangent rule': (ruled, 'function with a derivative rule of its own'),
    'a derivative rule': (flash, 'function with a derivative rule of its own'),
    'shard_map': (sharded_program, 'inside of a shard_map'), 'late': (late, 'before they are divided by their sum'),
    'sorted': (sorted_scores, 'scores go through sort'), 'halves': (of_halves, 'softmax|reduce_max'),
    'no softmax': (unnormalised, 'before they are divided by their sum'),
    'a Pallas kernel': (lambda q, k, v: pl.pallas_call(lambda q, k, v, y: None, jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q, k, v), 'pallas_call is a kernel that cannot be read'),
    'a library': (lambda q, k, v: jax.ffi.ffi_call('flash', jax.ShapeDtypeStruct(q.shape, q.dtype))(q, k, v),
                  'ffi_call is a kernel that cannot be read'),
    'parameters': (lambda p, x: jax.nn.softmax(x @ p) @ p.T, 'keys and values are parameters'),
}


@pytest.mark.parametrize('name', UNREAD)
def test_what_cannot_be_read_is_listed_and_stays_dense(name):
  apply, why = UNREAD[name]
  args = (normal((16, 5)), X) if name == 'parameters' else EQUAL
  report = kernels_pallas.sparse_attention(apply, attention.empty(block=4), explain=True)(*args)
  row, = report.rows
  assert re.search(why, row.problem) and report.violations == [row]
  assert row.problem in str(report)
  if name in ('late', 'a derivative rule'):
    run = kernels_pallas.sparse_attention(apply, attention.empty(block=4))
    np.testing.assert_allclose(jax.jit(run)(*args), jax.jit(apply)(*args), rtol=2e-5)


def test_weights_that_are_used_elsewhere_are_listed():
  report = kernels_pallas.sparse_attention(with_weights, attention.empty(block=4), explain=True)(*EQUAL)
  assert [bool(row.problem) for row in report.rows] == [False, True]
  assert 'replaced, and computed densely too, because its weights are a result' in report.rows[1].problem


@pytest.mark.parametrize('builder', [attention.band(0, 2), attention.sliding(2, 2), attention.strided(4, block=2),
                                     attention.sharded(1, 2, block=2)], ids=['band', 'sliding', 'strided', 'sharded'])
def test_distances_count_from_the_keys_at_which_queries_stand(builder):
  """The last four queries alone see the blocks that they see among all, and queries without a place are refused."""
  def of(length, causal=True):
    masks = []
    mask = jnp.tril(jnp.ones((length, T), bool), T - length)
    apply = lambda q, k, v: jnn(q, k, v, mask=mask[None, None] if causal else None)
    attention.attended(apply, lambda site: masks.append(builder(site).mask & site.blocks(2, 2)))(
        EQUAL[0][:, T - length:], *EQUAL[1:])
    return masks[0]

  if builder != attention.sharded(1, 2, block=2):  # which differs without `causal`
    np.testing.assert_array_equal(of(4), of(T)[:, 2:])
  kernels_pallas.sparse_attention(lambda *qkv: jnn(*qkv, is_causal=True), builder)(EQUAL[0][:, :4], *EQUAL[1:])
  with pytest.raises(ValueError, match=r'queries \(2, 4, 4, 8\) and keys .* does not know at which keys'):
    of(4, causal=False)
  with pytest.raises(ValueError, match='its queries begin at key 3, which is not whole blocks of 2'):
    of(5)


def test_other_products_are_no_attention():
  program = lambda p, x: jax.nn.softmax(jax.nn.silu(jax.nn.gelu(x @ p) @ p.T) @ p)
  report = kernels_pallas.sparse_attention(program, attention.full(), explain=True)(normal((16, 5)), X)
  assert report.rows == ()


def test_overflow_is_counted_and_warned_about():
  every = lambda site: site.q[0, ::2, :, 0].T[:, :, None] > jnp.full((1, 1, 4), -9.0)
  threshold = lambda room: lambda site: attention.BlockMask(every(site), 2, 2, room)
  q = EQUAL[0]
  run = lambda room, **options: kernels_pallas.sparse_attention(jnn, threshold(room), **options)
  y, counts = run(3, counted=True)(q, q, q)
  assert [c.tolist() for c in counts.values()] == [[4 * 4 * 3, 4 * 4]] and y.shape == q.shape
  with pytest.warns(UserWarning, match=r'16 blocks at .* did not fit into the capacity'):
    run(3)(q, q, q).block_until_ready()
    jax.effects_barrier()
  with pytest.raises(ValueError, match='loop or remat, which counts cannot leave'):
    kernels_pallas.sparse_attention(stacked, attention.full(4), counted=True)(normal((3, 3, 16, 16)), X)


REFUSED = {
    'a builder without a mask': (lambda: kernels_pallas.sparse_attention(jnn, lambda site: 1)(*EQUAL),
                                 'returned a int at .*BlockMask'),
    'a mask of another shape': (lambda: kernels_pallas.sparse_attention(
        jnn, lambda site: attention.BlockMask(np.ones((1, 3, 3), bool), 2, 2))(*EQUAL), r'need \[\.\.\., 4, 4\]'),
    'a mask of numbers': (lambda: kernels_pallas.sparse_attention(
        jnn, lambda site: attention.BlockMask(np.ones((1, 4, 4)), 2, 2))(*EQUAL), r'give bool\[1 or 4, nq, nk\]'),
    'a mask of other heads': (lambda: kernels_pallas.sparse_attention(
        jnn, lambda site: attention.BlockMask(np.ones((3, 4, 4), bool), 2, 2))(*EQUAL), r'bool\[3, 4, 4\] at '),
    'gates of another program': (lambda: kernels_pallas.sparse_attention(
        jnn, attention.gated_blocks({'a': 1}, keep=1, block=2))(*EQUAL), r"no gate '.*are for \['a'\]"),
    'gates of other heads': (lambda: kernels_pallas.sparse_attention(jnn, lambda site: attention.gated_blocks(
        {site.name: {'key': jnp.ones((2, 16, 8))}}, keep=1, block=2)(site))(*EQUAL), r'query \[4, 8, size\] and key'),
    'a predictor of other lengths': (lambda: kernels_pallas.sparse_attention(jnn, attention.predicted(
        {'query': jnp.ones((8, 4))}, keep=1, block=2))(*EQUAL),
        r"pool and basis \[8, n\].*'query': \(8, 4\), 'key': None"),
    'an answer that is none': (lambda: attention.attended(jnn, attention.full(2))(*EQUAL),
                               r'the answer is no array .2, 8, 4, 8., but a BlockMask'),
    'a long prompt': (lambda: kernels_pallas.sparse_attention(jnn, attention.measured(0.5, 2, prompt=9))(*EQUAL),
                      r'keys \(2, 8, 4, 8\): `prompt` of 9 tokens is longer'),
    'an unknown implementation': (lambda: kernels_pallas.sparse_attention(jnn, attention.full(), implementation='x'),
                                  "implementation 'x'.* Valid: None, dense, "),
    'no function': (lambda: kernels_pallas.sparse_attention(jnn, 3), '`builder` must be a function'),
    'an unknown edit': (lambda: kernels_pallas.block_sparse_attention(
        *EQUAL, jnp.zeros((4, 4, 1), jnp.int32), block_q=2, block_k=2,
        edits=[attention.ScoreEdit('square', EQUAL[0])]), "edit 'square' is none of"),
    'an edit of another shape': (lambda: kernels_pallas.block_sparse_attention(
        *EQUAL, jnp.zeros((4, 4, 1), jnp.int32), block_q=2, block_k=2,
        edits=[attention.ScoreEdit('add', jnp.ones((3, 3)))]), r'shape \(1, 1, 3, 3\), which must broadcast'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_what_to_give(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call()
