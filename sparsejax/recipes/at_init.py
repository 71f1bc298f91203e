"""Pruning at initialisation chooses the mask once, in `init`, and keeps it fixed.

The sparse model trains like a dense model.

`sparsity` is asked of all sparse leaves together, by default the pattern's own. `allocation` shares it out. If
`allocation` is `None`, all leaves are ranked together; with N:M, whose counts are fixed, each leaf by itself. Each
recipe also takes the options of `transforms.sparsify`. `loss` is a function `params -> scalar` on a scoring batch, a
mean over as many batches as memory takes. Only weights are pruned, never biases. The scored weights are then trained.

    tx = sj.recipes.snip(optax.adamw(1e-3), 0.9, loss=lambda params: loss(params, batch))
    tx = sj.recipes.snip(optax.adamw(1e-3), 0.9, loss=sj.starts.given('loss'))
    state = tx.init(params, loss=lambda params: loss(params, batch))
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import allocation as allocations
from sparsejax import errors, flows, schedules, scores, selections, starts, transforms, trees, updates
from sparsejax.patterns import Channel, Unstructured
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Allocation, Array, Flow, Inner, Optimizer, Pattern, PyTree, Score, Start

Shares = Allocation | allocations.Ranked
Loss = Callable[[PyTree], Array]


def chosen_once(inner: Inner, pattern: Pattern, sparsity: float | None, allocation: Shares | None, score: Score,
                start: Start | None = None, *, flow: Flow = flows.hard(), at_first_update: bool = False,
                **options: Any) -> Optimizer:
  """Returns the sentence of all recipes here: a fixed mask, by `score`, from `init` or the first update's gradient."""
  selection = selections.leafwise(pattern, score=score, sparsity=sparsity, allocation=allocation or together(pattern))
  dense_steps = options.pop('dense_steps', 0) + int(at_first_update)
  return transforms.sparsify(inner, flow, selection, start=start, pause=at_first_update, refresh=schedules.once(0),
                             dense_steps=dense_steps, **options)


def together(pattern: Pattern | Mapping[str, Pattern]) -> Shares:
  """Returns the allocation that ranks all leaves together, where their counts are free to differ; else `uniform`."""
  several = pattern.values() if isinstance(pattern, Mapping) else [pattern]
  return allocations.uniform if any(getattr(p, 'fixed', False) for p in several) else allocations.global_()


def most(pattern: Pattern | Mapping[str, Pattern], sparsity: float | None) -> float:
  """Returns the sparsity that is asked: `sparsity`, or the pattern's own (1 if unknown), the highest of several."""
  own = pattern.values() if isinstance(pattern, Mapping) else [pattern]
  return max(1.0 if each.sparsity is None else each.sparsity for each in own) if sparsity is None else sparsity


@sentence('refresh', 'where')
def fixed(inner: Inner, masks: PyTree, **options: Any) -> Optimizer:
  """Trains under the given masks, which never change: fine-tuning of a pruned model, with any `inner` and loss.

  `masks`: a tree like the parameters, of bools with the shape of a sparse leaf, or a scalar `True` for a dense leaf.
  `sj.prune` and `sj.masks` give such trees. The zeros of parameters have the masks
  `jax.tree.map(lambda w: w != 0, params)`.
  """
  paths, leaves, treedef = trees.flatten(masks)
  for path, mask in zip(paths, leaves):
    if jnp.result_type(mask) != np.dtype(bool):
      raise errors.at_leaf('recipes.fixed', path, jnp.shape(mask), f'dtype {jnp.result_type(mask)} is no mask; give '
                           'bools, as in params != 0, or True for a dense leaf.')
  where, sparse = treedef.unflatten([bool(jnp.ndim(mask)) for mask in leaves]), [m for m in leaves if jnp.ndim(m)]
  size, kept = sum(mask.size for mask in sparse), sum(int(np.sum(mask)) for mask in sparse)
  return chosen_once(inner, Unstructured(), 1 - kept / max(size, 1), allocations.global_(), scores.gradient,
                     starts.masks(masks), where=where, **options)


@sentence('refresh')
def random_pruning(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                   loss: Loss | None = None, allocation: Shares = allocations.erk, **options: Any) -> Optimizer:
  """Prunes at random (Liu et al. 2022, The Unreasonable Effectiveness of Random Pruning, 2202.02643). Needs `key=`.

  `loss` is read by an `allocation` that looks at gradients: `allocation.from_scores(scores.snip)`, the SNIP ratios.
  With another allocation `loss` is refused. Counts are exact, while the authors' code draws every weight by itself.
  """
  start = loss and starts.probed(starts.gradient(loss))
  return chosen_once(inner, pattern, sparsity, allocation, scores.random, start, **options)


@sentence('refresh')
def magnitude_at_init(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                      allocation: Shares | None = None, **options: Any) -> Optimizer:
  """Prunes by |w| at initialisation, ranked over all leaves (the baseline of Frankle et al. 2021, 2009.08576)."""
  return chosen_once(inner, pattern, sparsity, allocation, scores.magnitude, **options)


@sentence('refresh')
def snip(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *, loss: Loss | None = None,
         allocation: Shares | None = None, **options: Any) -> Optimizer:
  """Prunes by |w dL/dw|, ranked over all leaves: SNIP (Lee et al. 2019, 1810.02340, algorithm 1).

  Without `loss`, scores read the gradient of the first update, and that update only prunes. The authors' code also
  scores biases, and trains another draw of the weights than the draw that it scored.
  """
  return _by_snip(inner, sparsity, pattern, loss, allocation, **options)


def _by_snip(inner: Inner, sparsity: float | None, pattern: Pattern, loss: Loss | None, allocation: Shares | None,
             **options: Any) -> Optimizer:
  start = loss and starts.probed(starts.gradient(loss))
  return chosen_once(inner, pattern, sparsity, allocation, scores.snip, start, at_first_update=loss is None, **options)


@sentence('refresh')
def grasp(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
          loss: Callable[..., Array] | None = None, temperature: float | None = None, allocation: Shares | None = None,
          **options: Any) -> Optimizer:
  """Keeps the highest w (H g), so that gradient flow falls least: GraSP (Wang et al. 2020, 2002.07376, algorithm 1).

  The authors divide the logits by 200, without which most scores change sign. Either `loss` divides them, or `loss`
  takes a keyword `temperature`, which is then passed on. The authors' code keeps one weight more than asked, and scores
  redrawn linear layers.
  """
  loss = starts.needed('grasp', 'loss', loss, 'a function params -> scalar whose gradient and Hessian it looks at')
  loss = loss if temperature is None else _at_temperature(loss, temperature)
  start = starts.probed(starts.hessian_gradient(loss))
  return chosen_once(inner, pattern, sparsity, allocation, scores.grasp, start, **options)


def _at_temperature(loss: Callable[..., Array], temperature: float) -> Callable[..., Array]:
  takes = {} if isinstance(loss, starts.Given) else inspect.signature(loss).parameters
  if takes and not any(p.name == 'temperature' or p.kind is p.VAR_KEYWORD for p in takes.values()):
    raise ValueError('recipes.grasp: temperature= would have no effect: `loss` takes no keyword `temperature`, by '
                     'which it would divide its logits. Give it one, or leave temperature out.')
  return functools.partial(loss, temperature=temperature)


@sentence('refresh')
def synflow(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
            outputs: Callable[[PyTree], Array] | None = None, rounds: int = 100, allocation: Shares | None = None,
            **options: Any) -> Optimizer:
  """Prunes by |w| dR/d|w| without data, exponentially more in each of `rounds`: SynFlow (Tanaka 2020, algorithm 1).

  `outputs` maps parameters to the model's outputs for an input of ones. A pruned weight stays pruned. The authors' code
  prunes all weights that tie at the threshold, while the count here is exact.
  """
  outputs = starts.needed('synflow', 'outputs', outputs, 'a function params -> outputs of the model for ones')
  start = starts.probed(starts.synaptic_flow(outputs), rounds)
  ramp = schedules.density_decay(most(pattern, sparsity), end=rounds)
  selection = selections.leafwise(pattern, score=scores.synflow, update=updates.prune_to, sparsity=sparsity, ramp=ramp,
                                  allocation=allocation or together(pattern))
  return transforms.sparsify(inner, flows.hard(), selection, start=start, refresh=schedules.once(0), **options)


@sentence('refresh')
def robust_at_init(
    inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    loss: Loss | None = None, gain: float = 2.0, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """Prunes by SBP with the rescaling trick (Hayou et al. 2021, Robust Pruning at Initialization, section 3).

  2002.08797.   The scores are SNIP's, of weights rescaled to the edge of chaos, E[fan_in w^2] = `gain` (2 for ReLU,
  1.2981 for tanh). The pruned weights are rescaled to the edge again, by one factor a layer. The authors' code has one
  factor a row and another constant, and initialises on the edge instead of rescaling to it.
  """
  loss = starts.needed('robust_at_init', 'loss', loss, 'a function params -> scalar on a scoring batch')
  return _by_snip(inner, sparsity, pattern, loss, allocation, flow=flows.on_the_edge(gain), **options)


@sentence('refresh')
def freeze_net(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.99), *,
               loss: Loss | None = None, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """Trains the weights that SNIP picks, and freezes all others: FreezeNet (Wimmer et al. 2020, 2011.14087).

  `sparsity` is the fraction of frozen weights, which keep their initial value and are not zero.
  `formats.freeze_net_trained` returns what a file has to hold, and the seed of the first parameters stands for the
  rest. `loss` is that of `snip`.
  """
  return _by_snip(inner, sparsity, pattern, loss, allocation, flow=flows.frozen(), **options)


@sentence('refresh')
def random_search(inner: Inner, sparsity: float | None = None, pattern: Pattern = Channel(0.5), *,
                  loss: Loss | None = None, candidates: int = 100, allocation: Shares = allocations.uniform,
                  **options: Any) -> Optimizer:
  """Keeps the random subset of nodes with the lowest initial loss: random search in node space (Farahani 2024).

  No code is public, and that the initial loss decides is our reading. Leave the output layer out of `where`, since its
  nodes are the classes. Another `pattern` searches among random masks of that pattern. Needs `key=`.
  """
  loss = starts.needed('random_search', 'loss', loss, 'a function params -> scalar that ranks the candidates')
  return chosen_once(inner, pattern, sparsity, allocation, scores.random, starts.best_of(loss, candidates), **options)
