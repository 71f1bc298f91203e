"""Makes a config concrete: the data, the models and, for each recipe, one optimizer and one training step of all seeds.

    setup = prepare(config)
    run = build(setup, {'SR-STE': workdir / 'SR-STE'})['SR-STE']
    state, loss, numbers = run.compiled()(run.start(), batch(setup, 0), np.int32(0), run.peak)

Learning rate and seeds are arguments of the programs, so runs that differ only in these numbers share what is compiled.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import sparsejax
from experiments import configs, data, models
from experiments.loop import evaluate, measurements, optimizers, sharding, tasks
from experiments.loop.checkpoints import State
from experiments.loop.shared import Shared
from sparsejax import recipes, starts, transforms, trees
from sparsejax.types import Array, Axes, PyTree, Schedule

SCORED = 10  # training examples of each class on which a recipe scores weights at initialisation
VALUES = ('loss', 'outputs', 'key', 'ticket')  # The arguments of a recipe that exist only where `init` is called.

Optimizer = optax.GradientTransformationExtraArgs
Made = TypeVar('Made')
Step = Callable[[State, data.Batch, Array, Array], tuple[State, Array, Mapping[str, Array]]]


class Model(NamedTuple):
  """A `Model` holds the function that is trained and the initial parameters of all seeds."""

  apply: Callable[[PyTree, Array], Array]  # (params of one seed, inputs) -> outputs
  initial: Callable[[], PyTree]
  predict: evaluate.Predict
  contractions: Mapping[str, Axes]
  by_seed: Callable[..., Any]  # Wraps a function of one seed's parameters so that `jax.vmap` of the function is fast.


class Ticket(NamedTuple):
  """A `Ticket` says where a run starts if not at the model's initial weights. Both trees hold all seeds.

  The magnitudes of `trained` choose the mask, see `sparsejax.recipes.iterative_magnitude`; `weights` are then trained.
  Both are read when the run starts, because an earlier run of the same config may have to produce them.
  """

  weights: Callable[[], PyTree]
  trained: Callable[[], PyTree]


class Setup(NamedTuple):
  """A `Setup` holds what the runs of a config share: everything but the recipe."""

  config: ConfigDict
  layout: sharding.Layout
  task_name: str
  task: tasks.Task
  data: Sequence[data.Data]  # A `Data` for each seed, in the seed's order. A batch holds the rows of this process.
  models: Mapping[str, Model]  # Keyed by run name. Runs whose model configs are equal share one `Model`.


class Run(NamedTuple):
  """A `Run` is one entry of `config.recipes`, for all seeds at once: every array has a leading seed axis."""

  name: str
  directory: pathlib.Path
  model: Model
  start: Callable[[], State]
  state: State  # shapes and shardings
  step: jax.stages.Lowered  # (state, batch, number of the step, `peak`) -> state, loss `[seeds]`, measurements
  compiled: Callable[[], jax.stages.Compiled]  # `step`, compiled at the first call
  peak: np.float32  # of the learning rate
  learning_rate: Schedule
  sparse: list[str]  # paths of the measured leaves


def prepare(config: ConfigDict, shared: Shared | None = None) -> Setup:
  """Reads the data, makes each model and traces the model once. Raises `ValueError` for a wrong value of the config.

  Data and models that `shared` holds from an earlier config are taken from there.
  """
  layout, shared = sharding.layout(config), shared or Shared()
  sets = _sets(config, layout, shared)
  sections = {run: {**config.model, **config.models.get(run, {})} for run in configs.runs(config)}
  keys = {run: json.dumps(configs.of_run(config, run)['model'], sort_keys=True) for run in sections}
  objects = [section.get('make') for section in sections.values()]
  made = shared.of('models', (keys, objects, _data_key(config), _layout_key(config)), lambda: {
      key: _of_run(run, lambda run=run: _model(sections[run], sets[0], layout)) for run, key in keys.items()})
  seeds = np.array(config.seeds, np.uint32)
  made = {key: model._replace(initial=functools.partial(model.initial, seeds)) for key, model in made.items()}
  name, task = tasks.of_config(config)
  if name == 'classification':
    tasks.refuse_no_classes(sets[0].example['labels'], sets[0].least)
  for run, key in keys.items() if name == 'classification' else ():
    _of_run(run, functools.partial(_refuse_too_few_outputs, made[key], sets[0]))
  return Setup(config, layout, name, task, sets, {run: made[key] for run, key in keys.items()})


def _of_run(name: str, make: Callable[[], Made]) -> Made:
  """Returns `make()`. Raises `ValueError` with the name of the run for what `make`, or the user's code, raises."""
  try:
    return make()
  except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
    what = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    raise ValueError(f'config, run {name!r}: {what}{error}') from error


def _data_key(config: ConfigDict) -> tuple[Any, ...]:
  """Returns what decides the batches besides the seed. Functions of the user's own are compared as objects."""
  return json.dumps(configs.plain(config)['data']), config.data.splits, config.batch_size


def _layout_key(config: ConfigDict) -> tuple[Any, ...]:
  return config.mesh.to_json(), config.shard, len(config.seeds)


def _sets(config: ConfigDict, layout: sharding.Layout, shared: Shared) -> list[data.Data]:
  """Returns the data of each seed."""
  rows = sharding.local_rows(layout, config.batch_size)
  known = shared.of('data', (_data_key(config), rows), dict)
  for seed in config.seeds:
    if seed not in known:
      known[seed] = data.load(**config.data, batch_size=config.batch_size, seed=seed, rows=rows)
  return [known[seed] for seed in config.seeds]


def build(setup: Setup, directories: Mapping[str, pathlib.Path], tickets: Mapping[str, Ticket] = MappingProxyType({}),
          shared: Shared | None = None) -> dict[str, Run]:
  """Returns the `Run` of each name in `directories`, its step traced. Raises `ValueError` for what a run refuses.

  `tickets` holds, by run name, where a run starts if not at the model's initial weights. The step of a config that
  differs from an earlier one in learning rate and seeds alone is taken from `shared`.
  """
  scored = _scored(setup)
  makes = {name: functools.partial(_optimizer, setup, name, name in tickets) for name in directories}
  made = {name: _of_run(name, lambda name=name: makes[name](_peak(setup, name))) for name in makes}
  shared = shared or Shared()
  begun = {name: _of_run(name, lambda name=name: _start(setup, name, made[name], scored, tickets.get(name), shared))
           for name in made}
  sparse = {name: measurements.sparse_paths(sparsejax.masks(*state), state.params)
            for name, (_, state) in begun.items()}
  anywhere = list(dict.fromkeys(path for paths in sparse.values() for path in paths))
  runs = {}
  for name, (start, state) in begun.items():
    model = setup.models[name]
    # A run that prunes nothing is measured where the other runs prune, or else on all contracted parameters.
    names = trees.flatten(state.params)[0]
    paths = sparse[name] or [path for path in anywhere if path in names] or list(model.contractions)
    kept, seen = sharding.state_shardings(setup.layout, state), setup.layout.replicated
    noisy = measurements.noisy_paths(setup.config.noise, state.params, paths)
    b1 = _section(setup, name)['options'].get('b1', 0.9)
    step = _step(setup, model, makes[name], paths, noisy, b1)
    jitted = jax.jit(step, out_shardings=(kept, seen, seen), donate_argnums=0)
    peak = _peak(setup, name)
    lowered, compiled = shared.of('step', (_program_key(setup, name), paths, name in tickets), functools.partial(
        _of_run, name, functools.partial(_lowered, jitted, state, batch(setup, 0), np.int32(0), peak)))
    rate, _ = _inner(setup, name, peak)
    runs[name] = Run(name, directories[name], model, start, state, lowered, compiled, peak, rate, paths)
  return runs


def _lowered(jitted: Any, *arguments: Any) -> tuple[jax.stages.Lowered, Callable[[], jax.stages.Compiled]]:
  """Returns the traced program, and a function that compiles the program at its first call."""
  lowered = jitted.lower(*arguments)
  return lowered, functools.cache(lowered.compile)


def _program_key(setup: Setup, name: str) -> tuple[Any, ...]:
  """Returns what decides the programs of a run: its config without the peak of the learning rate and the seeds."""
  config, section = setup.config, configs.of_run(setup.config, name)
  section['optimizer'].pop('learning_rate')
  section.pop('seeds')
  objects = (config.loss, config.score, {**config.model, **config.models.get(name, {})}.get('make'))
  return (json.dumps(section), objects, _data_key(config), _layout_key(config), config.measure_every,
          config.noise and tuple(config.noise))


def _refuse_too_few_outputs(model: Model, first: data.Data) -> None:
  """Raises `ValueError` if the model returns fewer numbers than there are classes: the loss would be NaN."""
  params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), jax.eval_shape(model.initial))
  outputs, labels = jax.eval_shape(model.apply, params, first.example['inputs']), first.example['labels']
  if outputs.shape[:-1] != labels.shape or outputs.shape[-1] < first.num_classes:
    raise ValueError(f'the model returns {[*outputs.shape]}, and {first.num_classes} classes of labels '
                     f'{[*labels.shape]} need {[*labels.shape, first.num_classes]}.')


def batch(setup: Setup, step: int) -> data.Batch:
  """Returns the training batch of `step`: `inputs` and `labels`, `[seeds, B, ...]`, on the devices of all processes."""
  rows = jax.tree.map(lambda *seeds: np.stack(seeds), *(of_seed.train[step] for of_seed in setup.data))
  return sharding.global_batch(setup.layout.batches, rows)


def split(setup: Setup, name: str) -> Iterator[data.Batch]:
  """Yields the batches of the split `valid` or `test`, `[B, ...]`, on the devices of all processes."""
  return (sharding.global_batch(setup.layout.batch, rows) for rows in getattr(setup.data[0], name))


def _model(section: Mapping[str, Any], first: data.Data, layout: sharding.Layout) -> Model:
  """Returns the `Model` of a section of the config, with an `initial` that takes the seeds."""
  module = models.make(num_classes=first.num_classes, **section)
  example = first.example['inputs']
  apply = lambda params, inputs: module.apply({'params': params}, inputs)
  params = jax.eval_shape(module.init, jax.random.key(0), example)['params']
  contractions = sparsejax.contractions(apply, params, example)
  if not contractions:
    raise ValueError('the model multiplies no parameter with anything, so that there is nothing to prune.')
  convolutional = any(axes.spatial for axes in contractions.values())
  # Accelerators, and devices that share a batch, are faster with all seeds in one operation.
  loops = not convolutional and layout.mesh.size == 1 and jax.default_backend() == 'cpu'
  by_seed = functools.partial(evaluate.one_by_one, loop=loops) if convolutional or loops else lambda function: function
  predict = evaluate.predictor(by_seed(apply))
  return Model(apply, _initial(module, example, layout), predict, contractions, by_seed)


def _initial(model: Any, example: jax.ShapeDtypeStruct, layout: sharding.Layout) -> Callable[[Array], PyTree]:
  """Returns `seeds -> params` of all seeds. Weights depend on the seed alone; pretrained weights are equal for all."""
  drawn = lambda seed: model.init(jax.random.key(seed), jnp.zeros(example.shape, example.dtype))['params']
  given = model.initial(jax.eval_shape(drawn, 0)) if hasattr(model, 'initial') else {}
  init = jax.vmap(lambda seed, given: {**drawn(seed), **given}, in_axes=(0, None))
  # The seeds are an argument: XLA would spend seconds on folding weights that are drawn from constants.
  shapes = jax.eval_shape(init, np.zeros(1, np.uint32), given)
  compiled = jax.jit(init, out_shardings=sharding.state_shardings(layout, shapes))
  return lambda seeds: compiled(seeds, given)


def _section(setup: Setup, name: str) -> dict[str, Any]:
  """Returns the section `optimizer` of the run `name`, with the changes that are the run's own."""
  return {**setup.config.optimizer, **setup.config.optimizers.get(name, {})}


def _peak(setup: Setup, name: str) -> np.float32:
  return np.float32(_section(setup, name)['learning_rate'])


def _inner(setup: Setup, name: str, peak: Array) -> tuple[Schedule, optax.GradientTransformation]:
  section = {**_section(setup, name), 'learning_rate': peak}
  return optimizers.make(total_steps=setup.config.steps, **section)


def _optimizer(setup: Setup, name: str, ticket: bool, peak: Array) -> Optimizer:
  """Returns the recipe of the run `name` around its inner optimizer, whose learning rate rises to `peak`.

  The values that `_values` fills in are placeholders.
  """
  placeholders = {value: starts.given(value) for value in VALUES if ticket or value != 'ticket'}
  recipe = configs.plain(setup.config)['recipes'][name]
  return recipes.from_config(_inner(setup, name, peak)[1], recipe, total_steps=setup.config.steps,
                             axes=setup.models[name].contractions, signals=placeholders)


def _scored(setup: Setup) -> data.Batch:
  """Returns the first training batches of each seed as one batch `[seeds, B, ...]`: `SCORED` labels a class or more."""
  labels = math.prod(setup.data[0].example['labels'].shape)
  count = -(-SCORED * setup.data[0].num_classes // labels)
  of_seeds = [jax.tree.map(lambda *parts: np.concatenate(parts), *(of_seed.train[step] for step in range(count)))
              for of_seed in setup.data]
  return sharding.global_batch(setup.layout.batches, jax.tree.map(lambda *seeds: np.stack(seeds), *of_seeds))


def _start(setup: Setup, name: str, tx: Optimizer, scored: data.Batch, ticket: Ticket | None,
           shared: Shared) -> tuple[Callable[[], State], State]:
  """Returns `() -> State`, the recipe's first sparse point of the initial weights, and the shapes of the state."""
  seeds, model = np.array(setup.config.seeds, np.uint32), setup.models[name]

  def sparse(seed: Array, params: PyTree, batch: data.Batch, trained: PyTree) -> State:
    values = _values(setup, model, seed, batch, trained)
    opt_state = tx.init(params, **{name: values[name] for name in transforms.placeholders(tx)})
    return State(sparsejax.project(params, opt_state), opt_state)

  def traced() -> tuple[Any, State]:
    every, params = jax.vmap(sparse), jax.eval_shape(model.initial)
    shapes = jax.eval_shape(every, seeds, params, scored, ticket and params)
    return jax.jit(every, out_shardings=sharding.state_shardings(setup.layout, shapes)), shapes

  compiled, shapes = shared.of('start', (_program_key(setup, name), ticket is None), traced)
  weights, trained = ticket or (model.initial, lambda: None)
  return lambda: compiled(seeds, weights(), scored, trained()), sharding.with_shardings(shapes, setup.layout)


def _values(setup: Setup, model: Model, seed: Array, batch: data.Batch, ticket: PyTree | None) -> dict[str, Any]:
  """Returns the `VALUES` of one seed, by which a recipe chooses its first masks.

  `loss` maps parameters to the loss on `batch`. `outputs` maps parameters to the outputs for an input of ones.
  """
  def loss(params: PyTree, temperature: float = 1.0) -> Array:
    return setup.task.loss(model.apply(params, batch['inputs']) / temperature, batch['labels'])

  def outputs(params: PyTree) -> Array:
    return model.apply(params, jnp.ones_like(batch['inputs'][:1]))

  key = jax.random.fold_in(jax.random.key(seed), 1)  # not the key that the weights are drawn from
  return {'loss': loss, 'outputs': outputs, 'key': key, 'ticket': ticket}


def _step(setup: Setup, model: Model, optimizer: Callable[[Array], Optimizer], paths: list[str],
          noisy: list[str], b1: float) -> Step:
  """Returns one update of all seeds: `(state, batch, number, peak) -> state, loss, measurements`.

  `optimizer` maps the peak of the learning rate to the recipe's optimizer. The measurements are taken every
  `measure_every` steps and at the last step, and are zeros at the other steps. `b1` decays Adam's first moment. The
  loss is NaN if the loss, or any parameter after the update, is not finite.
  """
  config, task = setup.config, setup.task

  def loss(params: PyTree, batch: data.Batch) -> tuple[Array, Array]:
    outputs = model.apply(params, batch['inputs'])
    return task.loss(outputs, batch['labels']), outputs

  gradients = model.by_seed(jax.value_and_grad(loss, has_aux=True))

  def step(state: State, batch: data.Batch, number: Array, peak: Array) -> tuple[State, Array, Mapping[str, Array]]:
    tx = optimizer(peak)
    (value, outputs), grads = gradients(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = State(optax.apply_updates(state.params, updates), opt_state)

    def measure() -> Mapping[str, Array]:
      score = task.score(outputs, batch['labels'], None)
      noise = measurements.noise(noisy, grads, state, new, b1)
      return {task.name: score, **measurements.of_step(paths, grads, state, new), **noise}

    zeros = lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(measure))
    due = ((number + 1) % config.measure_every == 0) | (number + 1 == config.steps)
    return new, _nan_unless_finite(value, new.params), jax.lax.cond(due, measure, zeros)

  return jax.vmap(step, in_axes=(0, 0, None, None))


def _nan_unless_finite(loss: Array, params: PyTree) -> Array:
  finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
  return jnp.where(finite & jnp.isfinite(loss), loss, jnp.nan)
