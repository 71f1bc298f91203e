"""Trains a convolutional network on digits in Flax Linen, with `TrainState`, Grain and TensorBoard.

    python linen_images.py runs/images
"""

import sys

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import optax
import tensorboardX
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.avg_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.avg_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
    return nn.Dense(10)(x)


class Digits:
  def __init__(self):
    self.images, self.labels = load_digits().images[..., None].astype('float32') / 16, load_digits().target

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, row):
    return {'image': self.images[row], 'label': self.labels[row]}


@jax.jit
def train_step(state, batch):
  def loss(params):
    logits = state.apply_fn({'params': params}, batch['image'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

  value, grads = jax.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=grads), value


def main(workdir, steps=500, batch_size=64):
  data = grain.MapDataset.source(Digits()).seed(0).shuffle().repeat().batch(batch_size)
  model = CNN()
  params = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))['params']
  schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
  tx = optax.adamw(schedule)
  state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  with tensorboardX.SummaryWriter(workdir) as writer:
    for step in range(steps):
      state, loss = train_step(state, data[step])
      writer.add_scalar('loss', float(loss), step)
  return state.params, state.opt_state


if __name__ == '__main__':
  main(sys.argv[1])
