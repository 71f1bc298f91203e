"""A config made concrete: the data, the models and, for each recipe, a compiled-to-be training step for all seeds."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import sparsejax
from experiments import configs, data, models
from experiments.loop import evaluate, measurements, optimizers, sharding, tasks
from experiments.loop.checkpoints import State
from sparsejax import trees
from sparsejax.types import Array, Axes, PyTree, Schedule

SCORED = 10  # training examples a class that a recipe scores weights by at initialisation


class Model(NamedTuple):
  """What is trained, for all seeds."""

  apply: Callable[[PyTree, Array], Array]  # of one seed: (params, inputs) -> outputs
  initial: Callable[[], PyTree]
  predict: evaluate.Predict
  contractions: Mapping[str, Axes]
  by_seed: Callable[..., Any]  # wraps a function of one seed's params so that `jax.vmap` of it is fast
  signals: Callable[[], Mapping[str, PyTree]] = lambda: {}  # further ones for the first sparse point, of all seeds


class Setup(NamedTuple):
  """What the runs share: everything but the recipe."""

  config: ConfigDict
  layout: sharding.Layout
  task: tasks.Task
  data: Sequence[data.Data]  # one per seed: the same examples, each in its own order; of a batch, this process's rows
  models: Mapping[str, Model]  # by run; equal ones are one


class Run(NamedTuple):
  """One entry of `config.recipes`, for all seeds at once: every array has a leading seed axis."""

  name: str
  directory: pathlib.Path
  model: Model
  start: Callable[[], State]
  state: State  # its shapes and shardings
  step: jax.stages.Lowered  # (State, batch, number of the step) -> State, loss `[seeds]`, measurements
  learning_rate: Schedule
  sparse: list[str]  # paths of the leaves that are measured


def prepare(config: ConfigDict) -> Setup:
  """Reads the data, makes each model, traces it once. Raises `ValueError` for whatever the config has wrong there."""
  layout = sharding.layout(config)
  rows = sharding.rows(layout, config.batch_size)
  sets = [data.load(**config.data, batch_size=config.batch_size, seed=seed, rows=rows) for seed in config.seeds]
  written, made = configs.plain(config), {}
  sections = {run: {**written['model'], **written['models'].get(run, {})} for run in written['recipes']}
  keys = {run: json.dumps(section, sort_keys=True) for run, section in sections.items()}
  for run, key in keys.items():
    if key not in made:
      made[key] = _model(sections[run], sets[0], config.seeds, layout)
  return Setup(config, layout, tasks.named(config.data.task), sets, {run: made[key] for run, key in keys.items()})


def build(setup: Setup, directories: Mapping[str, pathlib.Path]) -> dict[str, Run]:
  """Every run of the config, its step traced, so that what one refuses is refused before the first trains."""
  scored = _scored(setup)
  starts = {name: _start(setup, name, scored) for name in directories}
  states = {name: sharding.like(jax.eval_shape(start), setup.layout) for name, start in starts.items()}
  sparse = {name: measurements.sparse_paths(sparsejax.masks(*state), state.params) for name, state in states.items()}
  anywhere = list(dict.fromkeys(path for paths in sparse.values() for path in paths))
  runs = {}
  for name, state in states.items():
    model = setup.models[name]
    # A run that prunes nothing is measured where the others prune, or else on all that is contracted.
    own = [path for path in anywhere if path in trees.flatten(state.params)[0]]
    paths = sparse[name] or own or list(model.contractions)
    kept, seen = sharding.of_state(setup.layout, state), setup.layout.replicated
    jitted = jax.jit(_step(setup, name, paths), out_shardings=(kept, seen, seen), donate_argnums=0)
    lowered = jitted.lower(state, batch(setup, 0), np.int32(0))
    rate, _ = optimizers.make(total_steps=setup.config.steps, **setup.config.optimizer)
    runs[name] = Run(name, directories[name], model, starts[name], state, lowered, rate, paths)
  return runs


def batch(setup: Setup, step: int) -> data.Batch:
  """The batch of `step` for all seeds: `inputs` and `labels`, `[seeds, B, ...]`, on the devices of all processes."""
  rows = jax.tree.map(lambda *seeds: np.stack(seeds), *(one.train[step] for one in setup.data))
  return sharding.put(setup.layout.batches, rows)


def split(setup: Setup, name: str) -> Iterator[data.Batch]:
  """The batches of `valid` or `test`, `[B, ...]`, on the devices of all processes."""
  return (sharding.put(setup.layout.batch, rows) for rows in getattr(setup.data[0], name))


def _model(section: Mapping[str, Any], first: data.Data, seeds: Sequence[int], layout: sharding.Layout) -> Model:
  module = models.make(num_classes=first.num_classes, **section)
  example = first.example['inputs']
  apply = lambda params, inputs: module.apply({'params': params}, inputs)
  params = jax.eval_shape(module.init, jax.random.key(0), example)['params']
  contractions = sparsejax.contractions(apply, params, example)
  convolutional = any(axes.spatial for axes in contractions.values())
  by_seed = evaluate.one_by_one if convolutional else lambda function: function
  predict = evaluate.predictor(by_seed(apply))
  return Model(apply, _initial(module, seeds, example, layout), predict, contractions, by_seed)


def _transform(setup: Setup, name: str, signals: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
  config, axes = setup.config, setup.models[name].contractions
  _, inner = optimizers.make(total_steps=config.steps, **config.optimizer)
  recipe = configs.plain(config)['recipes'][name]
  return sparsejax.recipes.from_config(inner, recipe, total_steps=config.steps, signals={'axes': axes, **signals})


def _scored(setup: Setup) -> data.Batch:
  """The first training batches of each seed as one `[seeds, B, ...]`: at least `SCORED` labels for each output."""
  labels = math.prod(setup.data[0].example['labels'].shape)
  count = -(-SCORED * setup.data[0].num_classes // labels)
  of_seed = lambda one: jax.tree.map(lambda *parts: np.concatenate(parts), *(one.train[step] for step in range(count)))
  return sharding.put(setup.layout.batches, jax.tree.map(lambda *seeds: np.stack(seeds), *map(of_seed, setup.data)))


def _initial(model: nn.Module, seeds: Sequence[int], example: jax.ShapeDtypeStruct, layout: sharding.Layout) -> Any:
  """`() -> params` of all seeds: weights that depend on the seed alone, or are the same pretrained ones for all."""
  drawn = lambda seed: model.init(jax.random.key(seed), jnp.zeros(example.shape, example.dtype))['params']
  given = model.initial(jax.eval_shape(drawn, 0)) if hasattr(model, 'initial') else {}
  init = jax.vmap(lambda seed, given: {**drawn(seed), **given}, in_axes=(0, None))
  # The seeds are an argument: XLA would spend seconds on folding weights that are drawn from constants.
  seeds = np.array(seeds, np.uint32)
  compiled = jax.jit(init, out_shardings=sharding.of_state(layout, jax.eval_shape(init, seeds, given)))
  return lambda: compiled(seeds, given)


def _start(setup: Setup, name: str, scored: data.Batch) -> Callable[[], State]:
  """`() -> State`: the recipe's first sparse point of the initial weights.

  What it may choose that by: the loss on `scored`, the outputs on an input of ones, a key of the seed, and what the
  model has as `signals`.
  """
  model, seeds = setup.models[name], np.array(setup.config.seeds, np.uint32)

  def sparse(seed: Array, params: PyTree, batch: data.Batch, given: Mapping[str, PyTree]) -> State:
    tx = _transform(setup, name, {
        'loss': lambda params, temperature=1.0: setup.task.loss(
            model.apply(params, batch['inputs']) / temperature, batch['labels']),
        'outputs': lambda params: model.apply(params, jnp.ones_like(batch['inputs'][:1])),
        'key': _key(seed),
        **given,
    })
    opt_state = tx.init(params)
    return State(sparsejax.project(params, opt_state), opt_state)

  every = jax.vmap(sparse)
  shapes = jax.eval_shape(every, seeds, *jax.eval_shape(lambda: (model.initial(), scored, model.signals())))
  compiled = jax.jit(every, out_shardings=sharding.of_state(setup.layout, shapes))
  return lambda: compiled(seeds, model.initial(), scored, model.signals())


def _key(seed: Array) -> Array:
  """Not the one that the weights are drawn from."""
  return jax.random.fold_in(jax.random.key(seed), 1)


def _step(setup: Setup, name: str, paths: list[str]) -> Callable[..., tuple[State, Array, Mapping[str, Array]]]:
  """One update of all seeds. Measured every `measure_every` steps and at the last; in between the numbers are zeros.

  The loss is NaN if it or any parameter after the update is not finite.
  """
  config, task, model = setup.config, setup.task, setup.models[name]

  def loss(params: PyTree, batch: data.Batch) -> tuple[Array, Array]:
    outputs = model.apply(params, batch['inputs'])
    return task.loss(outputs, batch['labels']), outputs

  gradients = model.by_seed(jax.value_and_grad(loss, has_aux=True))

  def only_at_start(params: PyTree) -> Array:
    raise ValueError(f'{name}: `loss` and `outputs` are for the scores at initialisation; an update has the gradient.')

  def step(state: State, batch: data.Batch, seed: Array, number: Array) -> tuple[State, Array, Mapping[str, Array]]:
    tx = _transform(setup, name, {'loss': only_at_start, 'outputs': only_at_start, 'key': _key(seed)})
    (value, outputs), grads = gradients(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = State(optax.apply_updates(state.params, updates), opt_state)
    measure = lambda: {task.name: task.score(outputs, batch['labels'], None), **measurements.of_step(
        paths, grads, new.params, sparsejax.masks(*state), sparsejax.masks(*new))}
    nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
    due = ((number + 1) % config.measure_every == 0) | (number + 1 == config.steps)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params)]).all()
    return new, jnp.where(finite & jnp.isfinite(value), value, jnp.nan), jax.lax.cond(due, measure, nothing)

  seeds = np.array(config.seeds, np.uint32)
  every = jax.vmap(step, in_axes=(0, 0, 0, None))
  return lambda state, batch, number: every(state, batch, seeds, number)
