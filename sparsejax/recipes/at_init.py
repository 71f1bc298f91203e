"""Pruning at initialisation: the mask is chosen once, in `init`, and fixed; the sparse model trains like a dense one.

`sparsity` is that of all sparse leaves together, by default the pattern's own. `allocation` shares it out; where it is
`None` all leaves are ranked together, and with N:M, whose counts are fixed, each by itself. Besides these each recipe
takes the options of `transforms.sparsify`. `loss` is a function `params -> scalar` on a scoring batch of the user's
choice, a mean over as many batches as memory takes. Weights alone are pruned, never biases; the same weights are scored
and then trained.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from sparsejax import allocation as allocations
from sparsejax import flows, formats, schedules, scores, selections, starts, states, transforms, updates
from sparsejax.patterns import NM, Channel, Unstructured
from sparsejax.types import Allocation, Array, Flow, Pattern, PyTree, Score, Start

Optimizer = optax.GradientTransformationExtraArgs
Shares = Allocation | allocations.Ranked
Loss = Callable[[PyTree], Array]


def fixed(
    inner: optax.GradientTransformation, pattern: Pattern, sparsity: float | None, allocation: Shares | None,
    score: Score, start: Start | None = None, *, flow: Flow = flows.hard(), at_first_update: bool = False,
    **options: Any) -> Optimizer:
  """The sentence of them all: one mask, by `score`, in `init`, or from the gradient of the first update."""
  selection = selections.leafwise(pattern, score=score, sparsity=sparsity, allocation=allocation or together(pattern),
                                  start=start, instead=at_first_update)
  dense_steps = options.pop('dense_steps', 0) + int(at_first_update)
  return transforms.sparsify(inner, flow, selection, refresh=schedules.once(0), dense_steps=dense_steps, **options)


def together(pattern: Pattern) -> Shares:
  """All leaves ranked together, where their counts are free to differ."""
  several = pattern.values() if isinstance(pattern, Mapping) else [pattern]
  return allocations.uniform if any(isinstance(one, NM) for one in several) else allocations.global_()


def random_pruning(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    loss: Loss | None = None, allocation: Shares = allocations.erk, **options: Any) -> Optimizer:
  """Random pruning (Liu et al. 2022, The Unreasonable Effectiveness of Random Pruning, 2202.02643). Needs `key=`.

  `loss` is for an `allocation` that looks at gradients: `allocation.from_scores(scores.snip)`, SNIP ratios. Counts are
  exact; the authors' code draws every weight by itself.
  """
  looks = isinstance(allocation, allocations.Ranked) and allocation.score and loss
  start = starts.probed(starts.gradient(loss)) if looks else None
  return fixed(inner, pattern, sparsity, allocation, scores.random, start, **options)


def magnitude_at_init(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    allocation: Shares | None = None, **options: Any) -> Optimizer:
  """|w| at initialisation, ranked over all leaves (the baseline of Frankle et al. 2021, 2009.08576)."""
  return fixed(inner, pattern, sparsity, allocation, scores.magnitude, **options)


def snip(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    loss: Loss | None = None, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """SNIP: |w dL/dw|, ranked over all leaves (Lee et al. 2019, 1810.02340, algorithm 1).

  Without `loss` the first update's gradient is taken, and that update only prunes. The authors' code also scores biases
  and trains another draw of the weights than the one it scored.
  """
  start = loss and starts.probed(starts.gradient(loss))
  return fixed(inner, pattern, sparsity, allocation, scores.snip, start, at_first_update=loss is None, **options)


def grasp(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    loss: Callable[..., Array] | None = None, temperature: float | None = None,
    allocation: Shares | None = None, **options: Any) -> Optimizer:
  """GraSP: keeps the highest w (H g), so that gradient flow falls least (Wang et al. 2020, 2002.07376, algorithm 1).

  The authors divide the logits by 200, without which most scores change sign: let `loss` do so, or take `temperature`
  as a keyword, which is then passed on. Their code keeps one weight more than asked and scores redrawn linear layers.
  """
  loss = starts.needed('grasp', 'loss', loss, 'a function params -> scalar whose gradient and Hessian it looks at')
  loss = loss if temperature is None else functools.partial(loss, temperature=temperature)
  start = starts.probed(starts.hessian_gradient(loss))
  return fixed(inner, pattern, sparsity, allocation, scores.grasp, start, **options)


def synflow(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    outputs: Callable[[PyTree], Array] | None = None, rounds: int = 100,
    allocation: Shares | None = None, **options: Any) -> Optimizer:
  """SynFlow: |w| dR/d|w| without data, in `rounds` of exponentially more sparsity (Tanaka et al. 2020, algorithm 1).

  `outputs`: `params -> array`, the model's outputs for an input of ones. What is pruned stays so. The authors' code
  prunes all that ties at the threshold; here the count is exact.
  """
  outputs = starts.needed('synflow', 'outputs', outputs, 'a function params -> outputs of the model for ones')
  start = starts.probed(starts.synaptic_flow(outputs), rounds)
  ramp = schedules.density_decay(pattern.sparsity if sparsity is None else sparsity, end=rounds)
  selection = selections.leafwise(pattern, score=scores.synflow, update=updates.prune_to, sparsity=sparsity, ramp=ramp,
                                  allocation=allocation or together(pattern), start=start)
  return transforms.sparsify(inner, flows.hard(), selection, refresh=schedules.once(0), **options)


def robust_at_init(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    loss: Loss | None = None, gain: float = 2.0, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """SBP with the rescaling trick (Hayou et al. 2021, Robust Pruning at Initialization, 2002.08797, section 3).

  SNIP's scores of weights rescaled to the edge of chaos, E[fan_in w^2] = `gain` (2 for ReLU, 1.2981 for tanh), and the
  pruned weights rescaled to it again: one factor a layer. The authors' code has one a row and another constant, and
  initialises on the edge instead of rescaling to it.
  """
  loss = starts.needed('robust_at_init', 'loss', loss, 'a function params -> scalar on a scoring batch')
  start = starts.probed(starts.gradient(loss))
  return fixed(inner, pattern, sparsity, allocation, scores.snip, start, flow=flows.on_the_edge(gain), **options)


def freeze_net(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.99), *,
    loss: Loss | None = None, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """FreezeNet: SNIP says which weights are trained, the rest keep their initial value (Wimmer et al. 2020, 2011.14087).

  `sparsity` is the fraction of frozen weights, which are not zero: `freeze_net_trained` is what a file has to hold, and
  the seed of the first parameters stands for the rest. `loss` as in `snip`.
  """
  start = loss and starts.probed(starts.gradient(loss))
  return fixed(inner, pattern, sparsity, allocation, scores.snip, start, flow=flows.frozen(),
               at_first_update=loss is None, **options)


def freeze_net_trained(params: PyTree, opt_state: Any) -> PyTree:
  """What `freeze_net` trained: the kept weights of each sparse leaf and their places; dense leaves as they are.

  `io.save` writes it, and `formats.unpack(io.load(path), first_parameters)` is `params` again, bit for bit: at 99 % a
  file of under 2 % of the bytes. Outside of `jit`.
  """
  packed = lambda w, mask: formats.RelativeIndexArray.from_dense(w, mask) if mask.shape == w.shape else w
  return jax.tree.map(packed, params, states.masks(params, opt_state))


def random_search(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Channel(0.5), *,
    loss: Loss | None = None, candidates: int = 100, allocation: Shares = allocations.uniform, **options: Any,
) -> Optimizer:
  """Random search in node space: of random subsets of nodes the one with the lowest initial loss (Farahani 2024).

  No code is public, and that the initial loss decides is our reading. Leave the output layer out of `where`: its nodes
  are the classes. With another `pattern` it searches among random masks of that. Needs `key=`.
  """
  loss = starts.needed('random_search', 'loss', loss, 'a function params -> scalar that ranks the candidates')
  return fixed(inner, pattern, sparsity, allocation, scores.random, starts.best_of(loss, candidates), **options)
