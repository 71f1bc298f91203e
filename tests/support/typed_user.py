"""What a user writes, under strict type checkers: `tests/house/test_types.py` checks this file and never runs it.

A line with `type: ignore` is a mistake that the checkers have to find: an ignored line without one is an error, too.
"""

import dataclasses

import jax
import optax

import kernels_pallas
import sparsejax as sj
from experiments import sweep
from sparsejax.types import Allocation, Array, Axes, Flow, Optimizer, Pattern, Pooled, Predicate, Schedule, Signals

Params = dict[str, dict[str, jax.Array]]


def score(w: Array, signals: Signals) -> Array:
  return w if signals.grad is None else w * signals.grad


def whole(mask: Array) -> Array:
  return mask


@dataclasses.dataclass(frozen=True)
class Rows:
  """A pattern of one's own, which no class of the library is a base of."""

  sparsity: float | None = 0.5
  static: bool = True
  group: tuple[int, int] = (1, 1)

  def __call__(self, scores: Array, count: int | Array | None = None, axes: Axes = Axes((0,), (1,))) -> Array:
    return scores > 0

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return None if len(axes.contracted) == 1 else 'rows need one contracted axis'

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    return ''

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    return Pooled(scores, (), whole)


def stage(step: int) -> Pattern:
  return sj.NM(4, 16) if step < 100 else sj.NM(2, 8)


staged = sj.patterns.Staged(sj.NM(2, 8), stage)
switch = sj.patterns.Switch((sj.NM(4, 16), sj.NM(2, 8)), 0)
patterns: list[Pattern] = [sj.NM(2, 4), sj.Block((16, 16)), sj.Unstructured(0.9), sj.Channel(), staged, switch,
                           Rows()]
where: Predicate = sj.trees.named('dense/kernel')
rest: Predicate = sj.trees.all_but('head/*', where=where)
decay: Schedule = sj.schedules.linear(1.0, 0.0, begin=0, end=100)
erk: Allocation = sj.allocation.erk
flow: Flow = sj.flows.hard()


def apply(params: Params, x: Array) -> Array:
  return x @ params['dense']['kernel'] + params['dense']['bias']


def optimizers(inner: optax.GradientTransformation, key: Array, axes: sj.programs.Contractions) -> list[Optimizer]:
  return [
      sj.recipes.sr_ste(inner, sj.NM(2, 4), where=where, axes=axes),
      sj.recipes.sr_ste(inner, {'dense/kernel': Rows(), '*': sj.NM(2, 4)}),
      sj.recipes.mdgf(inner, sj.NM(1, 8), decay=decay),
      sj.recipes.rigl(inner, 0.9, total_steps=100, allocation=erk, key=key),
      sj.recipes.gradual_magnitude(inner, 0.9, total_steps=100, score=score),
      sj.recipes.from_config(inner, {'name': 'mdgf', 'pattern': '1:8'}, total_steps=100),
      sj.transforms.sparsify(inner, flow, sj.selections.leafwise(Rows()), refresh=sj.schedules.once(0)),
  ]


def train(params: Params, grads: Params, x: Array) -> Params:
  axes = sj.contractions(apply, params, x)
  tx = sj.recipes.sr_ste(optax.adamw(1e-3), sj.NM(2, 4), where=where, axes=axes)
  state: optax.OptState = tx.init(params)
  params = sj.project(params, state)
  updates, state = tx.update(grads, state, params)
  params = sj.apply_masks(params, state)
  report: sj.Report = sj.report(params, state)
  checked: sj.Report = sj.check(params, pattern=sj.NM(2, 4), axes=axes)
  print(report, checked.achieved, [row.path for row in checked.rows], sj.masks(params, state), updates)
  print(sj.advise(params, '2:4'))
  packed = sj.formats.pack(params, sj.NM(2, 4), where=where)
  sj.io.save('model.safetensors', packed)
  dense: Params = sj.formats.unpack(sj.io.load('model.safetensors'))
  return dense


def pruned(params: Params, batches: list[Array]) -> Params:
  """Prunes a trained model with data and without, by every kind of recipe, and draws what was kept."""
  by_data: sj.post_training.Pruned = sj.prune(apply, params, batches, sj.recipes.wanda(0.5), where=where,
                                              sequential='dense', progress=print)
  alone: sj.post_training.Pruned = sj.prune_weights(by_data.params, {'dense/*': sj.NM(2, 4), '**': Rows()})
  tuned: Optimizer = sj.recipes.fixed(optax.sgd(0.1), alone.masks)
  with sj.plot.saved('kept.png', 1, 2) as axes:
    sj.plot.sparsity(sj.report(alone.params), axes[0, 0])
    sj.plot.matrix(params['dense']['kernel'], axes[0, 1], limit=1.0)
  print(alone.report, sj.metrics.kept(alone.masks), sj.metrics.overlap(alone.masks, by_data.masks), tuned)
  kept: Params = alone.params
  return kept


def cut(params: Params, x: Array, keep: dict[str, Array]) -> sj.structured.Cut:
  groups: sj.structured.Groups = sj.structured.groups(apply, params, x)
  tx: Optimizer = sj.recipes.oto(optax.sgd(0.1), groups, 0.5, total_steps=10)
  small = sj.structured.cut(groups, params, keep)
  print(tx, [group.size for group in groups.values()], small.apply(small.params, x))
  print(sj.structured.prove(groups, params, small, x))
  sj.structured.save('small.safetensors', small)
  return sj.structured.load('small.safetensors', apply)


def run(params: Params, x: Array) -> Array:
  """Runs the model on packed parameters, and trains the cells of a sweep, from a checkout."""
  fast: Params = kernels_pallas.prepared(sj.formats.pack(params, '2:4'), tokens=1)
  print(sweep.run('config.py', 'runs/mine', {'seed': [0, 1]}))
  y: Array = kernels_pallas.packed(apply)(fast, x)
  return y


def penalised(params: Params, inner: optax.GradientTransformation, x: Array) -> optax.GradientTransformation:
  penalty: sj.penalties.Penalty = sj.penalties.l1(1e-4)
  flops: sj.metrics.Flops = sj.metrics.flops(sj.contractions(apply, params, x))
  sizes: dict[str, float] = dict(sj.allocation.uniform(params['dense'], 0.5))
  print(flops.inference, sizes, sj.formats.nbytes(params), sj.io.metadata('model.safetensors'))
  return optax.chain(sj.transforms.penalised(penalty, where=where), sj.transforms.proximal(inner, penalty, decay))


def mistakes(inner: optax.GradientTransformation, params: Params) -> None:
  print(sj.recipes.sr_stee)  # type: ignore
  sj.recipes.sr_ste(inner, 'dense')  # type: ignore
  sj.recipes.sr_ste(inner, sj.NM(2, 4), decoupled=2.5)  # type: ignore
  sj.NM(2)  # type: ignore
  sj.schedules.linear(1.0, 0.0)  # type: ignore
  sj.trees.named(3)  # type: ignore
  sj.io.save('model.safetensors')  # type: ignore
  print(sj.report(params).nothing)  # type: ignore
  sj.prune(apply, params)  # type: ignore
  sj.prune_weights(params, 0.5)  # type: ignore
  sj.structured.cut(params, params)  # type: ignore
  sj.plot.over_steps([], 3)  # type: ignore
