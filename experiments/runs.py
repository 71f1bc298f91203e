"""A config made concrete: the data, the model and, for each recipe, a compiled-to-be training step for all seeds."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import sparsejax
from experiments import configs, data, evaluate, measurements, models, optimizers, sharding
from experiments.checkpoints import State
from sparsejax.types import Array, Axes, PyTree, Schedule


class Setup(NamedTuple):
  """What all runs share: everything but the recipe."""

  config: ConfigDict
  layout: sharding.Layout
  data: Sequence[data.Data]  # one per seed: the same examples, each in its own order; of a batch, this process's rows
  model: nn.Module
  initial: Any  # () -> params
  predict: evaluate.Predict
  contractions: Mapping[str, Axes]


class Run(NamedTuple):
  """One entry of `config.recipes`, for all seeds at once: every array has a leading seed axis."""

  name: str
  directory: pathlib.Path
  start: Any  # () -> State
  state: State  # its shapes and shardings
  step: jax.stages.Lowered  # (State, batch, number of the step) -> State, loss `[seeds]`, measurements
  learning_rate: Schedule
  sparse: list[str]  # paths of the leaves that are measured


def prepare(config: ConfigDict) -> Setup:
  """Reads the data, makes the model and traces it once. Raises `ValueError` for whatever the config has wrong there."""
  layout = sharding.layout(config)
  rows = sharding.rows(layout, config.batch_size)
  sets = [data.load(**config.data, batch_size=config.batch_size, seed=seed, rows=rows) for seed in config.seeds]
  model = models.make(num_classes=sets[0].num_classes, **config.model)
  example = sets[0].example['inputs']
  params = jax.eval_shape(model.init, jax.random.key(0), example)['params']
  contractions = sparsejax.contractions(lambda p, x: model.apply({'params': p}, x), params, example)
  initial = _initial(model, config.seeds, example, layout)
  return Setup(config, layout, sets, model, initial, evaluate.predictor(model), contractions)


def build(setup: Setup, directories: Mapping[str, pathlib.Path]) -> dict[str, Run]:
  """Every run of the config, its step traced, so that what one refuses is refused before the first trains."""
  made = {name: _transform(setup, name) for name in directories}
  starts = {name: _start(setup, tx) for name, (_, tx) in made.items()}
  states = {name: sharding.like(jax.eval_shape(start), setup.layout) for name, start in starts.items()}
  sparse = {name: measurements.sparse_paths(sparsejax.masks(*state), state.params) for name, state in states.items()}
  # A run that prunes nothing is measured where the others prune, or else on all that is contracted.
  anywhere = list(dict.fromkeys(path for paths in sparse.values() for path in paths)) or list(setup.contractions)
  runs = {}
  for name, (rate, tx) in made.items():
    paths = sparse[name] or anywhere
    step = jax.vmap(_step(setup, tx, paths), in_axes=(0, 0, None))
    kept, seen = sharding.of_state(setup.layout, states[name]), setup.layout.replicated
    jitted = jax.jit(step, out_shardings=(kept, seen, seen), donate_argnums=0)
    lowered = jitted.lower(states[name], batch(setup, 0), np.int32(0))
    runs[name] = Run(name, directories[name], starts[name], states[name], lowered, rate, paths)
  return runs


def batch(setup: Setup, step: int) -> data.Batch:
  """The batch of `step` for all seeds: `inputs` and `labels`, `[seeds, B, ...]`, on the devices of all processes."""
  rows = jax.tree.map(lambda *seeds: np.stack(seeds), *(one.train[step] for one in setup.data))
  return sharding.put(setup.layout.batches, rows)


def split(setup: Setup, name: str) -> Iterator[data.Batch]:
  """The batches of `valid` or `test`, `[B, ...]`, on the devices of all processes."""
  return (sharding.put(setup.layout.batch, rows) for rows in getattr(setup.data[0], name))


def _transform(setup: Setup, name: str) -> tuple[Schedule, optax.GradientTransformationExtraArgs]:
  config = setup.config
  rate, inner = optimizers.make(total_steps=config.steps, **config.optimizer)
  recipe = configs.plain(config)['recipes'][name]
  return rate, sparsejax.recipes.from_config(inner, recipe, total_steps=config.steps, axes=setup.contractions)


def _initial(model: nn.Module, seeds: Sequence[int], example: jax.ShapeDtypeStruct, layout: sharding.Layout) -> Any:
  """`() -> params` of all seeds: weights that depend on the seed alone, or are the same pretrained ones for all."""
  drawn = lambda seed: model.init(jax.random.key(seed), jnp.zeros(example.shape, example.dtype))['params']
  given = model.initial(jax.eval_shape(drawn, 0)) if hasattr(model, 'initial') else {}
  init = jax.vmap(lambda seed, given: {**drawn(seed), **given}, in_axes=(0, None))
  # The seeds are an argument: XLA would spend seconds on folding weights that are drawn from constants.
  seeds = np.array(seeds, np.uint32)
  compiled = jax.jit(init, out_shardings=sharding.of_state(layout, jax.eval_shape(init, seeds, given)))
  return lambda: compiled(seeds, given)


def _start(setup: Setup, tx: optax.GradientTransformationExtraArgs) -> Any:
  """`() -> State`: the recipe's first sparse point of the initial weights."""
  def sparse(params: PyTree) -> State:
    opt_state = tx.init(params)
    return State(sparsejax.project(params, opt_state), opt_state)

  every = jax.vmap(sparse)
  shapes = jax.eval_shape(lambda: every(setup.initial()))
  compiled = jax.jit(every, out_shardings=sharding.of_state(setup.layout, shapes))
  return lambda: compiled(setup.initial())


def _step(setup: Setup, tx: optax.GradientTransformationExtraArgs, paths: list[str]) -> Any:
  """One update of one seed. Measured every `measure_every` steps and at the last; in between the numbers are zeros.

  The loss is NaN if it or any parameter after the update is not finite.
  """
  config = setup.config

  def loss(params: PyTree, batch: data.Batch) -> tuple[Array, Array]:
    logits = setup.model.apply({'params': params}, batch['inputs'])
    return models.loss(logits, batch['labels']), logits

  def step(state: State, batch: data.Batch, number: Array) -> tuple[State, Array, Mapping[str, Array]]:
    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = State(optax.apply_updates(state.params, updates), opt_state)
    measure = lambda: {'accuracy': models.accuracy(logits, batch['labels']), **measurements.of_step(
        paths, grads, new.params, sparsejax.masks(*state), sparsejax.masks(*new))}
    nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
    due = ((number + 1) % config.measure_every == 0) | (number + 1 == config.steps)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params)]).all()
    return new, jnp.where(finite & jnp.isfinite(value), value, jnp.nan), jax.lax.cond(due, measure, nothing)

  return step
