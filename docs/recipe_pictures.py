"""Draws the picture of each recipe from a training or a pruning of a tiny network."""

import pathlib

import jax
import jax.numpy as jnp
import optax
from generator import CONFIGS, STEPS

import sparsejax as sj


def draw(folder: pathlib.Path) -> None:
  """Draws the picture of each recipe, `folder/<kind>/<name>.png`, where none is newer than the library's code."""
  code = [pathlib.Path(__file__), *pathlib.Path(sj.__file__).parent.rglob('*.py')]
  newest = max(path.stat().st_mtime for path in code)
  drawings = {'train': _trained, 'prune': _pruned, 'cut': _faded}
  for kind, table in sj.recipes.TABLES.items():
    for name in table:
      path = folder / kind / f'{name}.png'
      if kind in drawings and not (path.exists() and path.stat().st_mtime > newest):
        with sj.plot.saved(path, figsize=(6, 2.6)) as axes:
          drawings[kind](name, axes[0, 0])


def network(*widths: int, mixture: bool = False):
  """Returns the parameters of a network of matrices, its function, a batch, and a loss.

  With `mixture`, the first layer is a mixture of two nonlinearities, with the weights `mixture/alpha`.
  """
  keys = jax.random.split(jax.random.key(0), len(widths))
  params = {f'layer{i}': {'kernel': jax.random.normal(key, shape) * shape[0] ** -0.5}
            for i, (key, shape) in enumerate(zip(keys, zip(widths, widths[1:])), 1)}
  x = jax.random.normal(keys[-1], (64, widths[0])) * jnp.linspace(0.2, 2.0, widths[0])

  if mixture:
    params['mixture'] = {'alpha': jnp.zeros(2)}

  def apply(params, x):
    *hidden, last = (layer for layer in params.values() if 'kernel' in layer)
    for i, layer in enumerate(hidden):
      x = x @ layer['kernel']
      if mixture and i == 0:
        first, second = jax.nn.softmax(params['mixture']['alpha'])
        x = first * jnp.tanh(x) + second * jnp.sin(x)
      else:
        x = jnp.tanh(x)
    return x @ last['kernel']

  loss = lambda params: jnp.mean((apply(params, x) - jnp.sin(x[:, :widths[-1]])) ** 2)
  return params, apply, x, loss


def training(name: str):
  """Returns the parameters and the loss of a tiny network, and a recipe of `sj.recipes.TABLE` for it."""
  params, apply, x, loss = network(32, 64, 16, mixture=name == 'dass')
  signals = {'loss': loss, 'outputs': lambda params: apply(params, x), 'key': jax.random.key(1), 'ticket': params}
  tx = sj.recipes.from_config(optax.adam(1e-2), {'name': name, **CONFIGS.get(name, {})}, total_steps=STEPS,
                              axes=sj.contractions(apply, params, x), signals=signals)
  return params, loss, tx


def _trained(name: str, axis) -> None:
  params, loss, tx = training(name)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, records = tx.init(params), []
  params = sj.project(params, state)
  for i in range(STEPS + 1):
    shares = {path: float(jnp.mean(layer['kernel'] == 0)) for path, layer in params.items() if 'kernel' in layer}
    records.append({'step': i, **shares})
    params, state = step(params, state)
  for path in shares:
    sj.plot.over_steps(records, path, axis, label=path, drawstyle='steps-post')
  axis.set(ylim=(-0.02, 1.02), xlabel='update', ylabel='sparsity')
  axis.legend(loc='best')


def _pruned(name: str, axis) -> None:
  params, apply, x, _ = network(16, 32, 24, 8)
  needed = {'ecoflap': {'sensitivity': {'layer1/kernel': 1.0, 'layer2/kernel': 0.2}},
            'armor': {'block': 8, 'iterations': 20}, 'gqsa': {'pattern': sj.Block((4, 1), 0.5, balanced=True)}}
  recipe = sj.recipes.POST_TRAINING[name](sparsity=0.5, **needed.get(name, {}))
  sj.plot.sparsity(sj.prune(apply, params, [x], recipe).report, axis)


def _faded(name: str, axis) -> None:
  params, apply, x, loss = network(32, 24, 16, 8)
  groups = sj.structured.groups(apply, params, x)
  signals = {'loss': loss, 'key': jax.random.key(1), 'samples': 8, 'kept': 20, 'learning_rate': 0.02, 'every': 5,
             'total_steps': STEPS, 'scales': 'kernel', 'cost': None, 'epsilon': 0.98, 'steps': 30, 'begin': 10}
  penalties = {'oto': 1.5, 'wgsef': 1.0, 'norm_scale': 1e-3, 'latency_aware': 1e-6}
  recipe = sj.recipes.STRUCTURED[name]
  own = {key: value for key, value in signals.items() if key in sj.recipes.arguments(recipe)}
  tx = recipe(optax.sgd(0.02), groups, **own, **({'penalty': penalties[name]} if name in penalties else {}))

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, records = tx.init(params), []
  for i in range(STEPS + 1):
    keep = sj.structured.kept(groups, params)
    records.append({'step': i, **{group: 1 - mask.mean() for group, mask in keep.items()}})
    params, state = step(params, state)
  for group in groups:
    sj.plot.over_steps(records, group, axis, label=group, drawstyle='steps-post')
  axis.set(ylim=(-0.02, 1.02), xlabel='update', ylabel='zero units')
  axis.legend(loc='best')
