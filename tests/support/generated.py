"""Draws random programs, which are nested, with constants captured at every level and weights used more than once.

    drawn = program(seed=3)
    drawn.apply(drawn.params, *drawn.inputs)        # `float32[4, 8]`, the same on every call

A program is drawn once, as a tree of blocks `block(params, h) -> h` over `h`, `float32[4, 8]`. Drawing is separate from
running, so that every trace of `apply` is the same program.
"""

import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS, WIDTH, STACK = 4, 8, 3


class Drawer:
  """A `Drawer` draws blocks, and collects the parameters that the blocks use."""

  def __init__(self, seed):
    self.random, self.params, self.operations, self.half = random.Random(seed), {}, 0, False

  def array(self, *shape):
    values = np.random.default_rng(self.random.randrange(2**31)).standard_normal(shape)
    return np.asarray(values / np.sqrt(shape[-1]), np.float32)

  def weight(self, *shape):
    """Returns the name of a parameter of this shape, in two of five cases one that another block uses too."""
    same = [name for name, w in self.params.items() if w.shape == shape]
    if same and self.random.random() < 0.4:
      return self.random.choice(same)
    name = f'w{len(self.params)}'
    self.params[name] = jnp.asarray(self.array(*shape))
    return name

  def block(self, depth, kinds=()):
    """Returns a block; at depth 0 a product or an elementwise operation, else any of the structures around blocks."""
    self.operations += 1
    kinds = kinds or (LEAVES if depth == 0 or self.random.random() < 0.25 else STRUCTURES)
    return self.random.choice(kinds)(self, depth)

  def sequence(self, depth):
    """Returns one to three blocks in a row, in half of the cases with a constant in front."""
    blocks = [self.block(depth) for _ in range(self.random.randint(1, 3))]
    blocks = [_constant(self, 0), *blocks] if self.random.random() < 0.5 else blocks

    def run(p, h):
      for block in blocks:
        h = block(p, h)
      return h

    return run


# Products and elementwise operations.


def _product(draw, depth):
  name, kind = draw.weight(WIDTH, WIDTH), draw.random.randrange(10)
  draw.half |= kind == 5
  ways = [lambda w, h: h @ w, lambda w, h: h @ w.T, lambda w, h: (w @ h.T).T,
          lambda w, h: jnp.einsum('bi,io->bo', h, w), lambda w, h: h @ (w * 0.5),
          lambda w, h: (h.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
          lambda w, h: jnp.concatenate([h @ w[:, :4], h @ w[:, 4:]], 1),
          lambda w, h: (h @ w.reshape(WIDTH, 2, 4).transpose(0, 2, 1).reshape(WIDTH, WIDTH)),
          lambda w, h: h @ jnp.where(h[:1, :1] > 0, w, -w),
          lambda w, h: h @ w.astype(jnp.bfloat16).astype(jnp.float32)]
  return lambda p, h: jnp.tanh(ways[kind](p[name], h))


def _wide(draw, depth):
  up, down = draw.weight(WIDTH, 2 * WIDTH), draw.weight(2 * WIDTH, WIDTH)
  return lambda p, h: jnp.tanh(jax.nn.relu(h @ p[up]) @ p[down])


def _constant(draw, depth):
  """Returns an operation with a constant: an array of the device or of the host, a scalar, or a list of indices."""
  kind = draw.random.randrange(6)
  table, mask = jnp.asarray(draw.array(ROWS, WIDTH)), np.tril(np.ones((ROWS, ROWS), np.float32))
  order = jnp.asarray(draw.random.sample(range(WIDTH), WIDTH))
  ways = [lambda h: h + table, lambda h: jnp.asarray(mask) @ h, lambda h: h[:, order], lambda h: jnp.sin(h * table),
          lambda h: h * np.float32(0.75) + table[0, 0], lambda h: h + 0.25]
  return lambda p, h: jnp.tanh(ways[kind](h))


LEAVES = [_product, _product, _wide, _constant]


# Structures around blocks.


def _jit(draw, depth):
  inside, table = draw.sequence(depth - 1), jnp.asarray(draw.array(ROWS, WIDTH))
  call = jax.jit(lambda p, h, unused: inside(p, h + table))
  return lambda p, h: call(p, h, 2 * h)


def _remat(draw, depth):
  inside = draw.sequence(depth - 1)
  return lambda p, h: jax.checkpoint(inside)(p, h)


def _cond(draw, depth):
  first, second = draw.sequence(depth - 1), draw.sequence(depth - 1)
  return lambda p, h: lax.cond(h.sum() > 0, lambda: first(p, h), lambda: second(p, h))


def _switch(draw, depth):
  blocks = [draw.block(depth - 1) for _ in range(3)]
  return lambda p, h: lax.switch(jnp.argmax(h[0, :3]), blocks, p, h)


def _rounds(draw, depth):
  inside, rounds = draw.sequence(depth - 1), draw.random.randint(0, 3)
  return lambda p, h: lax.fori_loop(0, rounds, lambda i, h: inside(p, h), h)


def _while(draw, depth):
  """Returns a loop whose number of rounds is no constant; JAX cannot differentiate such a loop in reverse."""
  inside, most = draw.sequence(depth - 1), draw.random.randint(1, 3)

  def run(p, h):
    p, start = lax.stop_gradient((p, h))
    proceed = lambda carry: (carry[0] < most) & (jnp.abs(carry[1]).sum() < 1e3)
    return h + lax.while_loop(proceed, lambda carry: (carry[0] + 1, inside(p, carry[1])), (0, start))[1]

  return run


def _carried(draw, depth):
  """Returns a scan that carries two weights along, and exchanges them."""
  first, second, inside = draw.weight(WIDTH, WIDTH), draw.weight(WIDTH, WIDTH), draw.block(depth - 1)
  step = lambda p: lambda carry, _: ((inside(p, jnp.tanh(carry[0] @ carry[1])), carry[2], carry[1]), None)
  return lambda p, h: lax.scan(step(p), (h, p[first], p[second]), None, length=2)[0][0]


def _chosen(draw, depth):
  """Returns a product with a weight that a branch returns."""
  first, second = draw.weight(WIDTH, WIDTH), draw.weight(WIDTH, WIDTH)
  return lambda p, h: jnp.tanh(h @ lax.cond(h[0, 0] > 0, lambda: p[first], lambda: p[second].T))


def _gradient(draw, depth):
  """Returns a gradient inside of the program, whose own gradient is a second derivative."""
  inside = draw.sequence(depth - 1)
  return lambda p, h: h + jnp.tanh(jax.grad(lambda h: jnp.sum(inside(p, h) ** 2))(h))


def _layers(draw, depth):
  """Returns a scan over a stack of weights, whose body also runs other blocks."""
  name, inside, reverse = draw.weight(STACK, WIDTH, WIDTH), draw.block(depth - 1), draw.random.random() < 0.5
  scanned = lambda p, h: lax.scan(
      lambda h, w: (inside(p, jnp.tanh(h @ w)), h.sum()), h, p[name], reverse=reverse)
  return lambda p, h: (lambda last, sums: last + sums.mean())(*scanned(p, h))


def _shared(draw, depth):
  inside, table = draw.sequence(depth - 1), jnp.asarray(draw.array(STACK, ROWS, WIDTH))
  return lambda p, h: lax.scan(lambda h, t: (inside(p, h + t), None), h, table)[0]


def _members(draw, depth):
  """Returns a `vmap` over a stack of weights, all of which read the same input or one of their own."""
  name, own = draw.weight(STACK, WIDTH, WIDTH), draw.random.random() < 0.5
  inputs = lambda h: jnp.stack([h, -h, 2 * h]) if own else h
  return lambda p, h: jnp.tanh(jax.vmap(lambda w, h: h @ w, in_axes=(0, 0 if own else None))(p[name], inputs(h)).sum(0))


def _rows(draw, depth):
  name, table = draw.weight(WIDTH, WIDTH), jnp.asarray(draw.array(WIDTH))
  return lambda p, h: jax.vmap(lambda row: jnp.tanh((row + table) @ p[name]))(h)


def _custom_jvp(draw, depth):
  inside = draw.sequence(depth - 1)
  call = jax.custom_jvp(inside)
  call.defjvp(lambda primals, tangents: jax.jvp(inside, primals, tangents))
  return call


def _custom_vjp(draw, depth):
  inside = draw.sequence(depth - 1)
  call = jax.custom_vjp(inside)
  call.defvjp(lambda p, h: (inside(p, h), (p, h)), lambda saved, dy: jax.vjp(inside, *saved)[1](dy))
  return call


STRUCTURES = [_jit, _remat, _cond, _switch, _rounds, _while, _layers, _shared, _carried, _chosen, _members, _rows,
              _custom_jvp, _custom_vjp, _gradient]


class Drawn(NamedTuple):
  """A `Drawn` holds a random program `apply(params, *inputs)`; `half` tells whether it multiplies 16-bit numbers."""

  apply: Any
  params: dict[str, jax.Array]
  inputs: tuple[jax.Array, ...]
  half: bool


def program(seed, least=15):
  """Returns a random program of at least `least` blocks. Five seeds in a row have every structure at least once."""
  draw = Drawer(seed)
  blocks = [draw.block(2, [kind]) for kind in STRUCTURES[seed % 5::5]]
  while draw.operations < least:
    blocks.append(draw.block(draw.random.randint(1, 3)))
  draw.random.shuffle(blocks)

  def apply(p, h):
    for block in blocks:
      h = block(p, h)
    return h

  return Drawn(apply, draw.params, (jnp.asarray(draw.array(ROWS, WIDTH)),), draw.half)
