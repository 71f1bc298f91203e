"""Trains three loops as public scripts write them, at toy size: the optimizer is wrapped, and `update` has `params`.

The loops are a vision transformer under `pmap`, PPO with all seeds in one compiled program, and a GAN in Equinox.
"""

import functools
import io
from typing import NamedTuple

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax import lax

import sparsejax as sj

pytestmark = pytest.mark.usefixtures('standard_promotion')


def zeros_hold(params, state):
  """Returns whether each pruned weight is zero, as a traced value."""
  masks = sj.masks(params, state)
  return jnp.stack(jax.tree.leaves(jax.tree.map(lambda w, m: jnp.where(m, True, w == 0).all(), params, masks))).all()


def equal(one, two):
  return jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, two))


def first_of(tree):
  """Returns the first replica in NumPy: `flax.jax_utils.unreplicate` compiles a program for each shape."""
  return jax.tree.map(lambda x: x[0], jax.device_get(tree))


# The transformer clips its gradients, has momentum in bfloat16 and accumulates micro-batches.


class Encoder(nn.Module):
  @nn.compact
  def __call__(self, images):
    x = nn.Conv(8, (4, 4), strides=(4, 4), name='embedding')(images)
    x = x.reshape(len(x), -1, 8)
    token = self.param('cls', nn.initializers.normal(1.0), (1, 1, 8))
    x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
    x += self.param('pos_embedding', nn.initializers.normal(0.02), (1, x.shape[1], 8))
    x += nn.MultiHeadDotProductAttention(2, name='attention')(nn.LayerNorm()(x))
    x += nn.Dense(8, name='mlp_out')(nn.gelu(nn.Dense(16, name='mlp_in')(nn.LayerNorm()(x))))
    return nn.Dense(3, kernel_init=nn.initializers.zeros_init(), name='head')(nn.LayerNorm()(x[:, 0]))


def test_a_vision_transformer_under_pmap():
  devices, model = jax.local_devices()[:2], Encoder()
  images, labels = jax.random.normal(jax.random.key(0), (2, 8, 8, 8, 1)), jnp.arange(16).reshape(2, 8) % 3
  params = jax.jit(model.init)(jax.random.key(1), images[0])['params']
  rate = optax.warmup_cosine_decay_schedule(0.0, 0.3, 2, 8)
  axes = sj.contractions(lambda params, x: model.apply({'params': params}, x), params, images[0])
  tx = sj.recipes.sr_ste(
      optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9, accumulator_dtype='bfloat16')),
      sj.NM(2, 4), axes=axes, where=sj.trees.all_but('embedding/kernel', 'head/kernel'))

  @functools.partial(jax.pmap, axis_name='batch', donate_argnums=(0, 1), devices=devices)
  def update(params, opt_state, images, labels):
    def loss(params, images, labels):
      logits = model.apply({'params': params}, images)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def micro(i, total):
      rows = lambda x: lax.dynamic_slice_in_dim(x, 4 * i, 4)
      return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, rows(images), rows(labels)))

    first = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    value, grads = jax.tree.map(lambda x: lax.pmean(x / 2, 'batch'), lax.fori_loop(0, 2, micro, first))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, value, zeros_hold(params, opt_state)

  replicated = lambda tree: jax.tree.map(lambda x: np.stack([x] * len(devices)), jax.device_get(tree))
  held = replicated((params, jax.jit(tx.init)(params)))
  losses = []
  for step in range(8):
    if step == 5:  # Saved and restored in the middle, as flax.training.checkpoints does.
      target = first_of(held)
      restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(target))
      assert equal(restored, target)
      held = replicated(restored)
    *held, value, zeros = update(*held, images, labels)
    assert zeros.all()
    losses.append(float(value[0]))
  params, state = first_of(tuple(held))
  assert equal(params, jax.tree.map(lambda x: x[1], jax.device_get(held[0])))
  rows = sj.check(params, state, axes=axes).rows
  assert {row.path.split('/')[0] for row in rows} == {'attention', 'mlp_in', 'mlp_out'} and len(rows) == 6
  assert {row.achieved for row in rows} == {0.5}
  assert (params['cls'] != 0).all() and (params['pos_embedding'] != 0).all()
  assert optax.tree.get(state, 'trace')['mlp_in']['kernel'].dtype == jnp.bfloat16
  assert losses[-1] < losses[0] - 0.1


# Environment, epochs, minibatches and updates of PPO are one program, mapped over the seeds.


class ActorCritic(nn.Module):
  @nn.compact
  def __call__(self, x):
    hidden = nn.tanh(nn.Dense(16, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
    mean = nn.Dense(1, kernel_init=nn.initializers.orthogonal(0.01))(hidden)
    log_std = self.param('log_std', nn.initializers.zeros_init(), (1,))
    critic = nn.Dense(1)(nn.tanh(nn.Dense(16)(x)))
    return mean[..., 0], jnp.exp(log_std[0]), critic[..., 0]


class Transition(NamedTuple):
  state: jax.Array
  action: jax.Array
  reward: jax.Array
  value: jax.Array
  log_prob: jax.Array


UPDATES, STEPS, ENVS, EPOCHS, PARTS = 6, 4, 4, 2, 2


def log_prob(action, mean, std):
  return -0.5 * ((action - mean) / std)**2 - jnp.log(std)


def ppo(rng):
  """Returns the trained state of one seed, and for each update the mean reward and whether pruned weights are zero.

  The agent pushes a point on a line towards the origin.
  """
  network = ActorCritic()
  rate = lambda count: 3e-2 * (1 - count // (EPOCHS * PARTS) / UPDATES)
  tx = sj.recipes.rigl(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate, eps=1e-5)), 0.75,
                       total_steps=UPDATES * EPOCHS * PARTS, every=3, key=jax.random.key(0))
  rng, first, start = jax.random.split(rng, 3)
  params = network.init(first, jnp.zeros(2))
  state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
  state = state.replace(params=sj.project(params, state.opt_state))

  def step(carry, _):
    train, points, rng = carry
    rng, noise = jax.random.split(rng)
    mean, std, value = train.apply_fn(train.params, points)
    action = mean + std * jax.random.normal(noise, mean.shape)
    speed = points[:, 1] + 0.1 * jnp.clip(action, -1, 1)
    place = points[:, 0] + 0.1 * speed
    seen = Transition(points, action, -jnp.square(place), value, log_prob(action, mean, std))
    return (train, jnp.stack([place, speed], 1), rng), seen

  def advantages(seen, last):
    def back(carry, transition):
      later, value = carry
      delta = transition.reward + 0.99 * value - transition.value
      gain = delta + 0.99 * 0.95 * later
      return (gain, transition.value), gain

    return lax.scan(back, (jnp.zeros_like(last), last), seen, reverse=True)[1]

  def loss(params, seen, gains):
    mean, std, value = network.apply(params, seen.state)
    ratio = jnp.exp(log_prob(seen.action, mean, std) - seen.log_prob)
    gains, targets = (gains - gains.mean()) / (gains.std() + 1e-8), gains + seen.value
    return -jnp.minimum(ratio * gains, jnp.clip(ratio, 0.8, 1.2) * gains).mean() + jnp.square(value - targets).mean()

  def learn(train, batch):
    train = train.apply_gradients(grads=jax.grad(loss)(train.params, *batch))
    return train, zeros_hold(train.params, train.opt_state)

  def update(carry, _):
    (train, points, rng), seen = lax.scan(step, carry, None, STEPS)
    gains = advantages(seen, train.apply_fn(train.params, points)[2])
    flat = jax.tree.map(lambda x: x.reshape(STEPS * ENVS, *x.shape[2:]), (seen, gains))

    def epoch(carry, _):
      train, rng = carry
      rng, order = jax.random.split(rng)
      order = jax.random.permutation(order, STEPS * ENVS)
      parts = jax.tree.map(lambda x: x[order].reshape(PARTS, -1, *x.shape[1:]), flat)
      train, zeros = lax.scan(learn, train, parts)
      return (train, rng), zeros

    (train, rng), zeros = lax.scan(epoch, (train, rng), None, EPOCHS)
    return (train, points, rng), (seen.reward.mean(), zeros.all())

  points = jax.random.normal(start, (ENVS, 2))
  (train, _, _), (rewards, zeros) = lax.scan(update, (state, points, rng), None, UPDATES)
  return train, rewards, zeros


def test_ppo_in_one_scan_with_seeds_under_vmap():
  train, rewards, zeros = jax.jit(jax.vmap(ppo))(jax.random.split(jax.random.key(0), 3))
  assert zeros.shape == (3, UPDATES) and zeros.all() and np.isfinite(rewards).all()
  assert train.step.tolist() == [UPDATES * EPOCHS * PARTS] * 3
  kept = []
  for seed in range(3):
    params, state = jax.tree.map(lambda x, seed=seed: x[seed], (train.params, train.opt_state))
    report = sj.check(params, state)
    assert report.achieved == pytest.approx(0.75, abs=0.02) and len(report.rows) >= 2
    kept.append(params['params']['Dense_0']['kernel'] != 0)
    assert int(state.step) == UPDATES * EPOCHS * PARTS
  assert not np.array_equal(kept[0], kept[1])


# The two models of a GAN have one optimizer each.


class Generator(eqx.Module):
  linear: eqx.nn.Linear
  upsample: eqx.nn.ConvTranspose2d

  def __init__(self, key):
    one, two = jax.random.split(key)
    self.linear, self.upsample = eqx.nn.Linear(4, 64, key=one), eqx.nn.ConvTranspose2d(4, 1, 4, 2, padding=1, key=two)

  def __call__(self, noise):
    return jnp.tanh(self.upsample(jax.nn.relu(self.linear(noise)).reshape(4, 4, 4)))


class Discriminator(eqx.Module):
  conv: eqx.nn.Conv2d
  norm: eqx.nn.LayerNorm
  linear: eqx.nn.Linear
  slope: float = 0.2

  def __init__(self, key):
    one, two = jax.random.split(key)
    self.conv, self.norm = eqx.nn.Conv2d(1, 4, 4, 2, padding=1, key=one), eqx.nn.LayerNorm((4, 4, 4))
    self.linear = eqx.nn.Linear(64, 1, key=two)

  def __call__(self, image):
    return self.linear(self.norm(jax.nn.leaky_relu(self.conv(image), self.slope)).ravel())[0]


ADAM = functools.partial(optax.adam, 2e-3, b1=0.5, b2=0.999)


def gan():
  """Returns one optimizer for the generator and one for the discriminator."""
  of_generator = sj.recipes.gradual_magnitude(ADAM(), 0.8, end=4, every=1)
  return of_generator, sj.recipes.sr_ste(ADAM(), sj.NM(2, 4), where=sj.trees.named('linear/weight'))


def arrays(model):
  return eqx.filter(model, eqx.is_inexact_array)


def test_a_gan_of_two_optimizers():
  of_generator, of_discriminator = gan()
  models = eqx.filter_jit(lambda: (Generator(jax.random.key(0)), Discriminator(jax.random.key(1))))()
  states = tuple(jax.jit(tx.init)(arrays(model)) for tx, model in zip((of_generator, of_discriminator), models))
  entropy = lambda logits, label: optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, label)).mean()

  @eqx.filter_jit(donate='all')
  def step(models, states, real, key):
    (generator, discriminator), (of_g, of_d) = models, states
    noise = jax.random.normal(key, (4, 4))

    @eqx.filter_value_and_grad
    def judge(discriminator):
      fake = jax.vmap(generator)(noise)
      return entropy(jax.vmap(discriminator)(real), 1.0) + entropy(jax.vmap(discriminator)(fake), 0.0)

    @eqx.filter_value_and_grad
    def fool(generator):
      return entropy(jax.vmap(discriminator)(jax.vmap(generator)(noise)), 1.0)

    loss_d, grads = judge(discriminator)
    updates, of_d = of_discriminator.update(grads, of_d, arrays(discriminator))
    discriminator = eqx.apply_updates(discriminator, updates)
    loss_g, grads = fool(generator)
    updates, of_g = of_generator.update(grads, of_g, arrays(generator))
    return (eqx.apply_updates(generator, updates), discriminator), (of_g, of_d), (loss_g, loss_d)

  for i in range(6):
    if i == 3:  # Saved and restored in the middle, as Equinox serialises: arrays into trees of the same structure.
      file = io.BytesIO()
      eqx.tree_serialise_leaves(file, (models, states))
      file.seek(0)
      again = eqx.tree_deserialise_leaves(file, (models, states))
      assert equal(*(jax.tree.leaves(eqx.filter(each, eqx.is_array)) for each in (again, (models, states))))
      models, states = again
    real = jax.random.normal(jax.random.key(2 * i), (4, 1, 8, 8))
    models, states, losses = step(models, states, real, jax.random.key(2 * i + 1))
    assert np.isfinite(losses).all()
    for model, state in zip(models, states):
      assert zeros_hold(arrays(model), state)
  generated, judged = (sj.check(arrays(model), state) for model, state in zip(models, states))
  assert {row.path for row in generated.rows} == {'linear/weight', 'upsample/weight'}
  assert generated.achieved == pytest.approx(0.8, abs=0.01)
  assert [(row.path, row.achieved) for row in judged.rows] == [('linear/weight', 0.5)]
  assert (models[1].conv.weight != 0).all()


@pytest.mark.parametrize('tx', gan())
def test_the_line_of_equinox_is_in_the_refusal(tx):
  grads = eqx.nn.Linear(4, 4, key=jax.random.key(0))
  model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))  # holds its activation function
  for held, params in ((grads, None), ([grads], None), (arrays(model), model)):
    with pytest.raises(ValueError) as error:
      tx.update(held, None, params)
    line = str(error.value).splitlines()[-1]
    assert line == 'updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))'
