"""Defines a training step of a Llama-like decoder of 70B parameters, for `sparsejax plan`, which allocates nothing.

    sparsejax plan docs/llama_70b.py --devices 256 --mesh fsdp=256 --set recipe=sr_ste

Parameters and optimizer state are sharded over the mesh axis `fsdp`, and sequences over all axes. A second axis, as in
`--mesh data=8,fsdp=32`, replicates the parameters. A `shard_map` gathers the weights of each layer and reduces the
gradients to shards. The collectives of the model are thus written in the program. The optimizer runs under plain `jit`,
and the compiler chooses the collectives of the optimizer.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import planning, recipes, trees, types

HEAD = 128  # width of one attention head


def program(
    mesh, recipe='sr_ste', pattern='2:4', sparsity=0.5, dtype='bfloat16', layers=80, width=8192, hidden=28672, heads=64,
    kv_heads=8, vocabulary=128256, sequences=256, length=4096,
):
  """Returns `step(params, opt_state, tokens)`, and the shapes and shardings of its arguments.

  `dtype` is that of the parameters; the model computes in bfloat16 for every `dtype`. `sparsity` is for `st3`, and
  `pattern` is for all other recipes.
  """
  config = {'dense': {}, 'st3': {'sparsity': sparsity}}.get(recipe, {'pattern': pattern})
  blocks = {'blocks/*': types.Axes((1,), (2,), layer=(0,)), 'head': types.Axes((0,), (1,))}
  own = {} if recipe == 'dense' else {'where': trees.all_but('head'), 'axes': blocks}
  tx = recipes.from_config(optax.adamw(1e-4), {'name': recipe, **config, **own}, total_steps=100_000)
  specs, params = _params(mesh, jnp.dtype(dtype), layers, width, hidden, heads, kv_heads, vocabulary)
  state = planning.abstract_state(tx, params)
  rows = P(mesh.axis_names)
  tokens = jax.ShapeDtypeStruct((sequences, length + 1), jnp.int32, sharding=NamedSharding(mesh, rows))

  copied = tuple(axis for axis in mesh.axis_names if axis != 'fsdp')

  def loss(params, tokens):
    # The parameters are replicated before any gather, so that the gradients are summed once, and as shards.
    params = jax.tree.map(lambda w: lax.pcast(w, copied, to='varying'), params) if copied else params
    own = jnp.sum(_cross_entropy(params, tokens, heads, kv_heads))
    return lax.psum(own, mesh.axis_names) / (sequences * length)

  def step(params, opt_state, tokens):
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(specs, rows), out_specs=P())
    value, grads = jax.value_and_grad(sharded)(params, tokens)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  shardings = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
  outputs = (shardings(params), shardings(state), NamedSharding(mesh, P()))
  return jax.jit(step, donate_argnums=(0, 1), out_shardings=outputs), (params, state, tokens)


def _params(mesh, dtype, layers, width, hidden, heads, kv_heads, vocabulary):
  """Returns specs and abstract parameters; the stack of layers is `[layers, in, out]`, sharded along `in`."""
  sizes = {'query': (width, heads * HEAD), 'key': (width, kv_heads * HEAD), 'value': (width, kv_heads * HEAD),
           'attention_out': (heads * HEAD, width), 'gate': (width, hidden), 'up': (width, hidden),
           'down': (hidden, width), 'attention_norm': (width,), 'mlp_norm': (width,)}
  shapes = {'embed': (vocabulary, width), 'blocks': {name: (layers, *size) for name, size in sizes.items()},
            'norm': (width,), 'head': (width, vocabulary)}
  specs = {'embed': P('fsdp'), 'blocks': dict.fromkeys(sizes, P(None, 'fsdp')), 'norm': P('fsdp'), 'head': P('fsdp')}
  make = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
  return specs, jax.tree.map(make, shapes, specs, is_leaf=lambda node: isinstance(node, tuple))


def _gathered(w):
  """Returns a whole weight in bfloat16 from its shards; the transposed operation sums gradients into shards."""
  return lax.all_gather(w.astype(jnp.bfloat16), 'fsdp', axis=0, tiled=True)


def _cross_entropy(params, tokens, heads, kv_heads):
  """Returns the cross entropy of the sequences of this device, as `[sequences, length]`."""
  x = _gathered(params['embed'])[tokens[:, :-1]]
  block = jax.checkpoint(functools.partial(_block, heads=heads, kv_heads=kv_heads))
  x, _ = lax.scan(lambda x, weights: (block(x, weights), None), x, params['blocks'])
  logits = _normed(x, params['norm']) @ _gathered(params['head'])
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:])


def _block(x, weights, heads, kv_heads):
  w = {name: _gathered(leaf) for name, leaf in weights.items() if leaf.ndim == 2}
  split = lambda y, n: y.reshape(*y.shape[:2], n, HEAD)
  normed = _normed(x, weights['attention_norm'])
  q, k = _rotated(split(normed @ w['query'], heads)), _rotated(split(normed @ w['key'], kv_heads))
  y = jax.nn.dot_product_attention(q, k, split(normed @ w['value'], kv_heads), is_causal=True)
  x += y.reshape(*x.shape[:2], heads * HEAD) @ w['attention_out']
  normed = _normed(x, weights['mlp_norm'])
  return x + (jax.nn.silu(normed @ w['gate']) * (normed @ w['up'])) @ w['down']


def _normed(x, scale):
  variance = jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True)
  return x * lax.rsqrt(variance + 1e-5).astype(x.dtype) * _gathered(scale)[None, None]


def _rotated(x):
  """Returns `x`, of shape `[sequences, length, heads, head]`, with rotary position embedding."""
  angles = jnp.arange(x.shape[1])[:, None] * 5e5 ** (-jnp.arange(0, HEAD, 2) / HEAD)
  cos, sin = jnp.cos(angles).astype(x.dtype)[None, :, None], jnp.sin(angles).astype(x.dtype)[None, :, None]
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
