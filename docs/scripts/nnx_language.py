"""Trains a language model of characters on its own source in Flax NNX, and saves it with Orbax.

    python nnx_language.py runs/language
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

TEXT = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8).astype(np.int32)


class Block(nnx.Module):
  def __init__(self, width, heads, rngs):
    self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
    self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
    self.heads = heads

  def __call__(self, x):
    heads = lambda x: x.reshape(*x.shape[:2], self.heads, -1)
    q, k, v = map(heads, jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
    x += self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class LanguageModel(nnx.Module):
  def __init__(self, rngs, length, width=64, heads=4, depth=2):
    self.tokens, self.places = nnx.Embed(256, width, rngs=rngs), nnx.Embed(length, width, rngs=rngs)
    self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(depth))
    self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 256, rngs=rngs)

  def __call__(self, tokens):
    x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x))


@nnx.jit
def train_step(model, optimizer, tokens):
  def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


def rate_of(optimizer):
  return float(optax.tree.get(optimizer.opt_state, 'hyperparams')['learning_rate'][...])


def main(workdir, steps=500, batch_size=16, length=32, **sizes):
  model = LanguageModel(nnx.Rngs(0), length, **sizes)
  schedule = optax.cosine_decay_schedule(1e-3, steps)
  tx = optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  random = np.random.default_rng(0)
  for step in range(steps):
    starts = random.integers(len(TEXT) - length, size=(batch_size, 1))
    loss = train_step(model, optimizer, TEXT[starts + np.arange(length + 1)])
    if step % 100 == 0:
      print(f'step {step}, loss {loss:.3f}, rate {rate_of(optimizer):.4f}')
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(workdir).absolute() / 'checkpoint', nnx.state((model, optimizer)))
  return model, optimizer


if __name__ == '__main__':
  main(sys.argv[1])
