"""Trains a recurrent network in Equinox to tell which way a spiral turns.

    python equinox_sequences.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax


class Classifier(eqx.Module):
  cell: eqx.nn.GRUCell
  head: eqx.nn.Linear

  def __init__(self, width, key):
    first, second = jax.random.split(key)
    self.cell, self.head = eqx.nn.GRUCell(2, width, key=first), eqx.nn.Linear(width, 1, key=second)

  def __call__(self, points):
    start = jnp.zeros(self.cell.hidden_size)
    last, _ = jax.lax.scan(lambda state, point: (self.cell(point, state), None), start, points)
    return self.head(last)[0]


def spirals(key, count, length=16):
  """Returns points `[count, length, 2]` and labels, 1 where the spiral turns left."""
  labels = jax.random.bernoulli(key, shape=(count, 1))
  angles = jnp.linspace(0, 6, length) + jax.random.uniform(key, (count, 1), maxval=6)
  points = jnp.stack([jnp.cos(angles), jnp.where(labels, 1, -1) * jnp.sin(angles)], -1)
  return points / (1 + jnp.linspace(0, 6, length)[:, None]), labels[:, 0]


def loss(model, points, labels):
  return optax.sigmoid_binary_cross_entropy(jax.vmap(model)(points), labels).mean()


def main(steps=500, batch_size=64, width=32):
  model = Classifier(width, jax.random.key(0))
  tx = optax.adam(3e-3)
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def train_step(model, state, points, labels):
    value, grads = eqx.filter_value_and_grad(loss)(model, points, labels)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, value

  for step in range(steps):
    model, state, value = train_step(model, state, *spirals(jax.random.key(step), batch_size))
  print(f'loss {value:.3f}')
  return model, state


if __name__ == '__main__':
  main()
