"""N:M training keeps a dense master behind an N:M point, from straight-through to progressive gradient flow.

Every recipe takes the user's optimizer first, then its own arguments and the options of `transforms.sparsify`: `where`,
`axes`, `dense_steps`, `fine_tune_steps`, `total_steps`, `refresh`. The mask is chosen anew from the master after every
step (`refresh`). In the fine-tune phase the mask is fixed, the master becomes the sparse point, and pruned weights get
no gradient. Published code goes on choosing masks in that phase.

    tx = sj.recipes.sr_ste(optax.adamw(1e-3), sj.NM(2, 4), decay=2e-4)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import flows, schedules, selections, transforms, updates
from sparsejax.patterns import NM, Staged, Switch
from sparsejax.recipes.sentence import sentence
from sparsejax.types import ENDLESS, Bound, Inner, Optimizer, Pattern, Schedule, says

Patterns = Pattern | Mapping[str, Pattern]
LINEAR_5000 = schedules.linear(1.0, 0.0, begin=0, end=5000)  # as a default it is no longer than the training


@sentence()
def dense(inner: Inner) -> Optimizer:
  """Returns the baseline: `inner` as it is, in the same state as every recipe, so that a table can hold both."""
  return transforms.identity(inner, 'dense')


@sentence()
def ste(inner: Inner, pattern: Patterns = NM(2, 4), **options: Any) -> Optimizer:
  """Trains N:M weights straight-through (Bengio et al. 2013, arXiv 1308.3432; the baseline of Zhou et al. 2021)."""
  return transforms.sparsify(inner, flows.straight_through(), selections.leafwise(pattern), **options)


@sentence()
def sr_ste(inner: Inner, pattern: Patterns = NM(2, 4), *, decay: float | Schedule = 2e-4, decoupled: bool = False,
           learning_rate: float | Schedule | None = None, **options: Any) -> Optimizer:
  """Trains straight-through with a decay of the pruned weights: SR-STE (Zhou et al. 2021, equation 8).

  arXiv 2102.04010. As published, the term is in the gradient, where Adam divides it by its own size. `decoupled=True`
  is an extension: after the optimizer's step pruned weights lose `learning_rate * decay` of themselves. Pass the
  optimizer's own learning rate or schedule to follow it. The default, 1, makes `decay` the loss per step. `decay` is a
  number or a schedule of the step. Raises `ValueError` for a `learning_rate` without `decoupled`, which needs none.
  """
  flow = flows.sr_ste(decay, decoupled=decoupled, learning_rate=learning_rate)
  return transforms.sparsify(inner, flow, selections.leafwise(pattern), **options)


@sentence('refresh')
def asp(inner: Inner, pattern: Patterns = NM(2, 4), **options: Any) -> Optimizer:
  """Prunes by magnitude once, after `dense_steps`, then trains under the mask: ASP (Mishra et al. 2021, section 4).

  arXiv 2104.08378. No master is stored. NVIDIA's code also permutes channels first; this recipe does not.
  """
  selection = selections.leafwise(pattern, update=updates.prune_to)
  return transforms.sparsify(inner, flows.hard(), selection, refresh=schedules.once(0), **options)


@sentence()
def mdgf(inner: Inner, pattern: Patterns = NM(2, 4), *, decay: Schedule = LINEAR_5000,
         gradient: str = 'scaled', dense_steps: int = 0, **options: Any) -> Optimizer:
  """Shrinks pruned weights by a mask decay beta: MdGf (Bambhaniya et al. 2024, Progressive Gradient Flow, 2402.04744).

  `decay` is beta by the number of steps since the dense phase. The default, linear over 5,000 steps, is the released
  code's 2e-4 a step. With `total_steps` it is no longer than the steps between the dense and the fine-tune phase.
  `gradient='scaled'` multiplies the gradient of pruned weights by beta, as the abstract says and the authors' earlier
  JAX code does. `'straight_through'` leaves the gradient whole, as the released PyTorch code does. The grid of
  docs/progressive_gradient_flow.md decided the default: 1:8, 1:16 and 1:32, three decays, three tasks. On bytes of Tiny
  Shakespeare `'scaled'` has the lower test loss, by 0.056 +- 0.008 nats on average. On digits `'straight_through'` has
  it, by 0.011 +- 0.013, and on CIFAR-10 by 0.028 +- 0.008. The mean over all is a tie, which the abstract decides.

  The result is N:M only if beta reaches 0 or `fine_tune_steps` is given; `schedules.exponential` never reaches 0. Any
  other schedule that is not 0 at its own end, or at that of `total_steps` without a fine-tune phase, is refused. Two
  bugs of the released code are not repeated: a decay that starts a hundredth too late, and a fine-tune phase one epoch
  short.
  """
  decay = _until_the_end(decay, dense_steps, **options)
  flow = flows.decayed(schedules.delayed(decay, dense_steps), gradient)
  return transforms.sparsify(inner, flow, selections.leafwise(pattern), dense_steps=dense_steps, **options)


def _until_the_end(decay: Schedule, dense_steps: int, *, total_steps: int | None = None,
                   fine_tune_steps: int = 0, **options: Any) -> Schedule:
  """Returns the decay, by default one that fits. Raises `ValueError` if a schedule without an end does not reach 0."""
  if total_steps is None:
    if (end := schedules.reach(decay)) is not None and not says(decay, ENDLESS):
      _refuse_unless_zero(decay, end)
    return decay
  last = total_steps - dense_steps - fine_tune_steps
  if last < 1:
    raise ValueError(f'recipes.mdgf: {last} updates are left for the decay between dense_steps ({dense_steps}) and '
                     f'fine_tune_steps ({fine_tune_steps}) of total_steps ({total_steps}).')
  if decay is LINEAR_5000:
    return schedules.linear(end=min(5000, last))
  if not fine_tune_steps and not says(decay, ENDLESS):
    _refuse_unless_zero(decay, last)
  return decay


def _refuse_unless_zero(decay: Schedule, last: int) -> None:
  with jax.ensure_compile_time_eval():
    beta = float(decay(last))
  if beta:
    raise ValueError(f'recipes.mdgf: `decay` is still {beta:g} after the last of {last} updates, so that no weight '
                     'would be zero. Let it reach 0 by then, or pass fine_tune_steps=.')


@sentence()
def sdgf_stepwise(inner: Inner, pattern: Patterns = NM(2, 4), *, gradient: str = 'straight_through',
                  **options: Any) -> Optimizer:
  """Trains through (M-1):M, M/2:M, M/4:M, ... N:M, stages of equal length: SdGf-Stepwise (progressive gradient flow).

  Needs `total_steps`. `gradient='straight_through'` is the released code's. `'scaled'` blocks the gradient of pruned
  weights, as the authors' earlier JAX code does. The released code ends at M / 2^floor(log2(M / N)), above N when M / N
  is no power of two. The released code takes its stage from the epoch in which it starts, so a resumed run is in the
  wrong stage. This recipe repeats neither.
  """
  return _sdgf(inner, pattern, stepwise_stages, gradient, **options)


@sentence()
def sdgf_geometric(inner: Inner, pattern: Patterns = NM(2, 4), *, k: int = 8, gradient: str = 'straight_through',
                   **options: Any) -> Optimizer:
  """Trains through kN:kM, kN/2:kM/2, ... N:M, constant density in ever smaller groups: SdGf-Geometric (2402.04744).

  `k`, a power of two, is 8 in the released code and 16 in its comments. `gradient` and `total_steps` are those of
  `sdgf_stepwise`. The contraction axis has to be divisible by kM.
  """
  return _sdgf(inner, pattern, Bound(geometric_stages, (k,)), gradient, **options)


def _sdgf(inner: Inner, pattern: Patterns, stages: Any, gradient: str, **options: Any) -> Optimizer:
  if options.get('total_steps') is None:
    raise ValueError('recipes.sdgf: its stages share out the training; pass total_steps=, the number of updates.')
  begin, end = options.get('dense_steps', 0), options['total_steps'] - options.get('fine_tune_steps', 0)
  selection = selections.leafwise(_staged(pattern, stages, begin, end))
  return transforms.sparsify(inner, flows.decayed(schedules.constant(0.0), gradient), selection, **options)


def _staged(pattern: Patterns, stages: Callable[[NM], tuple[NM, ...]], begin: int, end: int) -> Patterns:
  """Returns the pattern that goes through `stages(pattern)` in equal parts of the steps from `begin` to `end`."""
  if isinstance(pattern, Mapping):
    return {glob: _staged(each, stages, begin, end) for glob, each in pattern.items()}
  if not isinstance(pattern, NM):
    raise ValueError(f'recipes.sdgf: structure decay goes through N:M patterns, not {pattern}.')
  through = stages(pattern)
  if len(through) > end - begin:
    raise ValueError(f'recipes.sdgf: {len(through)} stages ({", ".join(map(str, through))}) do not fit into the '
                     f'{end - begin} updates between the dense and the fine-tune phase; raise total_steps.')
  boundaries = [begin + i * (end - begin) // len(through) for i in range(len(through))]
  return Staged(pattern, Bound(_stage, (through, schedules.stepwise(range(len(through)), boundaries))))


def _stage(step: Any, through: tuple[NM, ...], index: Schedule) -> Pattern:
  counts, (m, *others) = jnp.asarray([stage.n for stage in through]), {stage.m: None for stage in through}
  # A single group size needs a traced count. Several group sizes need a branch each, because the shapes differ.
  return Switch(through, index(step)) if others else NM(counts[index(step)], m, through[0].width)


def stepwise_stages(pattern: NM) -> tuple[NM, ...]:
  """Returns M-1, M/2, M/4, ... N of M, each count once and N last."""
  halvings = [pattern.m - 1] + [pattern.m >> i for i in range(1, pattern.m.bit_length())]
  counts = sorted({n for n in halvings if n > pattern.n}, reverse=True)
  return tuple(NM(n, pattern.m, pattern.width) for n in [*counts, pattern.n])


def geometric_stages(pattern: NM, k: int) -> tuple[NM, ...]:
  """Returns kN:kM, kN/2:kM/2, ... N:M."""
  if k < 1 or k & (k - 1):
    raise ValueError(f'recipes.sdgf_geometric: k must be a power of two, not {k}.')
  return tuple(NM(pattern.n * (k >> i), pattern.m * (k >> i), pattern.width) for i in range(k.bit_length()))


@sentence()
def st3(inner: Inner, sparsity: float = 0.9, *, sigma: bool = False, total_steps: int | None = None,
        ramp_steps: int | None = None, dense_steps: int = 0, fine_tune_steps: int = 0, **options: Any) -> Optimizer:
  """Trains under a global soft threshold, straight-through: ST-3 (Vanderschueren and De Vleeschouwer 2023, WACV).

  The masks are unstructured. `sparsity` is that of all sparse leaves together, reached by a cubic ramp `ramp_steps`
  after the dense phase (default: the start of the fine-tune phase, or else the end). `sigma=True` measures each leaf in
  units of 1 / sqrt(sum of its dimensions), as the authors' code does where the paper says standard deviation. After
  each step the threshold is the quantile of |W|. Output channels are rescaled as in the code, by the weights before the
  threshold. Fine-tuning keeps the learning rate's own schedule; the code's restarts of it are not repeated.
  """
  if ramp_steps is None and total_steps is None:
    raise ValueError('recipes.st3: its ramp needs an end; pass total_steps= or ramp_steps=, in updates.')
  ramp = total_steps - dense_steps - fine_tune_steps if ramp_steps is None else ramp_steps
  if ramp < 1:
    raise ValueError(f'recipes.st3: a ramp over {ramp} updates: it needs updates between the dense and the fine-tune '
                     'phase: raise total_steps.')
  cubic = schedules.cubic(0.0, sparsity, begin=dense_steps, end=dense_steps + ramp)
  return transforms.sparsify(
      inner, flows.soft_threshold(), selections.global_threshold(cubic, sparsity, scaled=sigma),
      total_steps=total_steps, dense_steps=dense_steps, fine_tune_steps=fine_tune_steps, **options)


@sentence()
def bdwp(inner: Inner, pattern: Patterns = NM(2, 8), **options: Any) -> Optimizer:
  """Prunes N:M in the forward and in the input-gradient product: BDWP (Fang et al. 2023, arXiv 2309.13015).

  The user holds m_f W, the mask along the contraction axis, straight-through into the dense W. The input gradient goes
  through m_b W, the mask along the output axis of the same W. The input gradient needs another rule for the matrix
  product; without that rule the model trains as `ste` does:

      backward = sparsejax.states.bdwp_backward(params, opt_state)  # m_b W, once a step, outside the gradient
      matmul = sparsejax.flows.bidirectional(jnp.matmul)
      y = matmul(x, params['w'], backward['w'])                     # where the model has x @ params['w']

  A Flax model takes the rule unchanged: in the loss, `with nn.intercept_methods(rule):` around `model.apply`, where

      def rule(call, args, kwargs, context):
        if not isinstance(context.module, nn.Dense) or context.method_name != '__call__':
          return call(*args, **kwargs)
        own, other = context.module.variables['params'], functools.reduce(dict.get, context.module.path, backward)
        return matmul(args[0], own['kernel'], other['kernel']) + own['bias']

  No public code exists. By our reading of the abstract and the algebra, m_b is chosen from W and not from m_f W, and
  there is no decay term.
  """
  return transforms.sparsify(inner, flows.straight_through(), selections.leafwise(pattern), **options)
