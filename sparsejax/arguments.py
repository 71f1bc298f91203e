"""Says once what the parameters of words and recipes may be, by name, and refuses other values where they enter.

`KINDS` maps the name of a parameter to its kind. `checked` is the decorator that looks the names of a signature up.

    @checked
    def cubic(init_value: float = 0.0, end_value: float = 1.0, *, begin: int = 0, end: int) -> Schedule: ...

    cubic(end=-1)  # ValueError: schedules.cubic: `end` must be a number of updates, whole and at least 0, not -1.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sparsejax import errors
from sparsejax.argument_kinds import (
  ADAPTIVE,
  ALLOCATION,
  ANYTHING,
  APPLY,
  ARRAY,
  AVERAGE,
  AXES,
  BANK,
  BASELINE,
  BATCHES,
  BOOLS,
  BUDGET,
  BY_NAME,
  CHANCE,
  CONFIG,
  CONTRACTIONS,
  CUT,
  DRAWN,
  FLAG,
  FLOW,
  FOLDER,
  FUNCTION,
  GROUPS,
  KEEP,
  KEY,
  LISTS,
  MEMBERS,
  MEMORY,
  NAME,
  NAMED,
  NUMBER,
  NUMBERS,
  OPTIMIZER,
  PACKED,
  PAIR,
  PARAMS,
  PART,
  PART_OR_SCHEDULE,
  PART_SCHEDULE,
  PATH,
  PATTERN,
  PENALTY,
  POSITIVE,
  PREDICATE,
  QUANTIZE,
  RATE,
  RATE_OR_SCHEDULE,
  REPORT,
  ROUTED,
  RULE,
  SCALARS,
  SCHEDULE,
  SCORE,
  SELECTION,
  SEQUENTIAL,
  SERIES,
  SHIFT,
  SKIPS,
  SPARSITY,
  STEP,
  TIED,
  TIMES,
  UNITS,
  UPDATES,
  VALUE,
  WHERE,
  WHOLE,
  Kind,
  is_tree,
)

F = TypeVar('F', bound=Callable[..., Any])

# Functions of which `groups` are those of units; other functions take names of groups of leaves.
_OVER_GROUPS = ('grouped', 'kept', 'group_norm', 'sparse_envelope', 'latency', 'oto', 'hesso', 'dhspg', 'wgsef',
                'norm_scale', 'group_magnitude', 'group_taylor', 'hap', 'latency_aware', 'choose', 'seconds',
                'slice_gpt', 'multi_pruner', 'tyr')
# The kind of each parameter by its name. `function.name` is the kind where a function means something else by the name.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(('sparsity', 'initial', 'target'), SPARSITY),
    **dict.fromkeys(('begin', 'end', 'dense_steps', 'fine_tune_steps', 'at'), STEP), 'delayed.steps': SHIFT,
    **dict.fromkeys(('every', 'steps', 'total_steps', 'ramp_steps', 'set_.end', 'rigl.end', 'snfs.end',
                     'iterative_soft_shrinkage.fine_tune_steps'), UPDATES),
    **dict.fromkeys(('rounds', 'candidates', 'k', 'block', 'rows', 'cycles', 'iterations', 'bits', 'tokens',
                     'memory_limit'), TIMES),
    **dict.fromkeys(('threshold', 'least', 'damping', 'most'), PART),
    **dict.fromkeys(('fraction', 'shrink', 'ratio', 'beta'), PART_OR_SCHEDULE),
    'momentum': AVERAGE, 'gradient_average.decay': AVERAGE, 'squared_gradient_average.decay': AVERAGE,
    **dict.fromkeys(('weight_decay', 'penalty', 'config: optimizer.learning_rate'), RATE),
    'lasso.penalty': RATE_OR_SCHEDULE,
    **dict.fromkeys(('decay', 'learning_rate'), RATE_OR_SCHEDULE),
    **dict.fromkeys(('gain', 'temperature', 'power', 'rate', 'half_life', 'clip', 'eps', 'epsilon', 'rho'), POSITIVE),
    **dict.fromkeys(('init_value', 'end_value', 'kept', 'pruned'), NUMBER),
    **dict.fromkeys(('decoupled', 'sigma', 'scaled', 'allow_empty', 'pause', 'balanced', 'at_first_update',
                     'guard'), FLAG),
    **dict.fromkeys(('gradient', 'slots', 'sparsify.name', 'uniform_plus.first', 'uniform_plus.last'), NAME),
    **dict.fromkeys(('restriction', 'mdgf.decay'), PART_SCHEDULE),
    **dict.fromkeys(('gradual_magnitude.score', 'turbo_vbi.score', 'leafwise.score', 'score_threshold.score',
                     'from_scores.score', 'smoothed.score', 'offset.score', 'drop_and_grow.grow', 'redistributed.grow',
                     'cl_dst.grow'), SCORE),
    **dict.fromkeys(('ramp', 'schedule', 'accumulated_movement.penalty',
                     'score_threshold.threshold', 'global_threshold.sparsity', 'drop_and_grow.fraction',
                     'swap.fraction', 'redistributed.fraction'), SCHEDULE),
    'refresh': BOOLS, 'value': VALUE,
    **dict.fromkeys(('loss', 'outputs', 'score', 'update', 'grow', 'start', 'groups', 'apply', 'progress'), FUNCTION),
    'prune.apply': APPLY,
    'pattern': PATTERN, 'allocation': ALLOCATION, 'key': KEY, 'axes': AXES, 'memory': MEMORY, 'flow': FLOW,
    **dict.fromkeys(('inner', 'score_optimizer', 'alpha_optimizer', 'optimizer'), OPTIMIZER),
    **dict.fromkeys(('selection', 'first'), SELECTION),
    **dict.fromkeys(('half_space.epsilon', 'oto.epsilon'), PART),
    **dict.fromkeys(('below_zero.until', 'half_space.until', 'since'), UPDATES),
    'alone': FLAG, **dict.fromkeys(('multiple_of', 'samples', 'wgsef.kept', 'sparse_envelope.kept'), TIMES),
    **dict.fromkeys(('scales', 'matching.glob'), NAME), 'cost': FUNCTION,
    **dict.fromkeys((f'{name}.groups' for name in _OVER_GROUPS), GROUPS),
    **dict.fromkeys((f'{name}.fraction' for name in ('flops', 'parameters', 'latency')), SPARSITY),
    **dict.fromkeys(('points', 'periods', 'generations', 'offspring', 'levels', 'step'), TIMES), 'budget': BUDGET,
    'penalised.penalty': PENALTY, 'proximal.penalty': PENALTY,
    # Gates and work that they skip.
    **dict.fromkeys(('bernoulli.rate', 'noisy_rectifier.rate'), CHANCE), 'baseline': SCALARS,
    **dict.fromkeys(('drawn', 'losses', 'polarized.weights', 'polarized.costs', 'routed.weights'), ARRAY),
    'observed.baseline': BASELINE, 'average': AVERAGE, 'polarization': RATE, 'polarized.activation': RATE,
    **dict.fromkeys(('estimator', 'noise'), NAME), 'capacity': TIMES, 'apply.block': FUNCTION, 'apply.weights': ROUTED,
    # Tasks, features and recommendations.
    'removed': CHANCE, 'gradient_sparsity': SPARSITY, 'hold': UPDATES, 'gamma': RATE_OR_SCHEDULE,
    'alpha': POSITIVE, 'bank': BANK, 'separate.key': DRAWN, 'g2gnet.groups': TIMES, 'used': PARAMS,
    **dict.fromkeys((f'{name}.end' for name in ('sparcl', 'dsl', 'quick_selection', 'g2gnet', 'cl_dst')), UPDATES),
    **dict.fromkeys(('layer_barriers.groups', 'sharpness.groups'), BY_NAME), 'worst': WHOLE, 'sharpness.key': DRAWN,
    **dict.fromkeys(('probs', 'labels', 'truth', 'recall_at.scores', 'ndcg_at.scores'), ARRAY), 'bins': TIMES,
    'tied': TIED, 'modular.groups': TIMES, 'shuffle': DRAWN, 'lam': RATE, **dict.fromkeys(('p01', 'p10'), CHANCE),
    'quantize': QUANTIZE, 'swaps.threshold': RATE, 'where': WHERE, 'ticket': ANYTHING,
    'workdir': FOLDER, 'config': CONFIG,
    # The tools.
    **dict.fromkeys(('params', 'tree', 'base', 'like', 'a', 'b', 'before', 'after', 'seen', 'masks', 'grads', 'running',
                     'cut_state.state', 'with_values.values'), PARAMS),
    **dict.fromkeys(('batches', 'valid'), BATCHES), 'squarehead.valid': ARRAY, 'members': MEMBERS,
    **dict.fromkeys(('states', 'teacher_states', 'weights', 'sparsities', 'names', 'values', 'records', 'ends',
                     'colours', 'marks', 'bars', 'boundaries'), SERIES),
    **dict.fromkeys(('metadata', 'densities', 'scores', 'leaves', 'cut_state.kept', 'custom.sparsities',
                     'replace.values'), BY_NAME), 'keep': KEEP, 'prune.keep': ANYTHING,
    **dict.fromkeys(('path', 'tables', 'folder'), PATH), 'sequential': SEQUENTIAL,
    'sparsify.sequential': NAME, 'sparsify.allocation': SKIPS,
    **dict.fromkeys(('unseen', 'device', 'item', 'input_gradient', 'globs', 'implementation', 'given.name',
                     'identity.name', 'over_steps.key'), NAME), 'named.name': NAMED,
    **dict.fromkeys(('check', 'signed_zeros', 'own', 'exact', 'explain', 'measure', 'band'), FLAG),
    **dict.fromkeys(('callback', 'metric', 'probe', 'essential_sparsity.pruned', 'schedule.value'), FUNCTION),
    **dict.fromkeys(('either.first', 'either.second'), BOOLS), 'zeroth_order.key': DRAWN,
    **dict.fromkeys(('all_but.where', 'alphas'), PREDICATE),
    'x': ARRAY, 'w': ARRAY, 'packed': PACKED, 'contractions': CONTRACTIONS, 'small': CUT, 'report': REPORT,
    **dict.fromkeys((f'{name}.groups' for name in ('cut', 'cut_state', 'masks', 'multiply_adds', 'prove')), UNITS),
    **dict.fromkeys(('points', 'columns', 'window'), TIMES),
    **dict.fromkeys(('dpi', 'limit'), POSITIVE), **dict.fromkeys(('costs', 'means', 'halves'), NUMBERS),
    **dict.fromkeys(('knapsack.costs', 'sizes'), LISTS), 'knapsack.budget': NUMBER, 'tolerance': RATE,
    'effective_sizes.groups': GROUPS,
    **dict.fromkeys((f'{name}.groups' for name in (
        'centered', 'choose_in_rounds', 'clustered', 'erasable', 'implanted', 'is_rotated', 'permuted', 'rotate',
        'search', 'weights')), UNITS),
    **dict.fromkeys(('erase', 'order', 'stages', 'computed.widths'), SERIES), 'array': PAIR, 'seed': WHOLE,
    **dict.fromkeys(('among', 'orders', 'gate'), BY_NAME), 'rotated': PARAMS, 'implants': PART, 'mass.fraction': PART,
    **dict.fromkeys(('stream', 'widths', 'heads', 'clustered.name'), NAME), 'gate_of.key': DRAWN,
    **dict.fromkeys(('tune', 'activation', 'choose_in_rounds.grads'), FUNCTION), 'weight': RATE,
    **dict.fromkeys(('width', 'gate_of.inputs', 'gate_of.units', 'tile_share.inputs', 'tile_share.outputs'), TIMES),
    'rule': RULE, 'r_sparse.alpha': PART, 'percent': POSITIVE, 'rank': TIMES,
    'thresholds': BY_NAME,
    **dict.fromkeys(('p', 'raw', 'segments', 'relu_router.scale', 'used.raw', 'chunk_sparsity.used', 'chunk_loss.valid',
                     'adapted.loss'), ARRAY),
    **dict.fromkeys(('sparse_step', 'full_step', 'back', 'reads'), FUNCTION), 'adapted.state': ADAPTIVE,
    **dict.fromkeys(('length', 'period'), TIMES), 'sharpness': POSITIVE, 'delta.threshold': RATE,
    **dict.fromkeys(('into', 'out', 'logits', 'strength', 'matrix', 'computed.keep', 'foresight.target',
                     'response.outputs'), ARRAY),
    # Attention.
    **dict.fromkeys(('band.width', 'strided.width', 'columns.count', 'sharded.offset', 'measured.prompt',
                     'once.after'), WHOLE),
    **dict.fromkeys(('local', 'period', 'capacity', 'orthogonal.d', 'orthogonal.features', 'shift.parts',
                     'kronecker_by_powers.degree', 'windows.height', 'windows.size', 'init_gates.size',
                     *(f'{name}.keep' for name in ('routed', 'quest', 'lsh', 'predicted', 'gated_blocks'))), TIMES),
    **dict.fromkeys(('builder', 'answer', 'unread'), FUNCTION), 'counted': FLAG, 'per_head': FLAG,
    **dict.fromkeys(('of_mask.mask', 'projections', *(f'{name}.{a}' for name in (
        'page_scores', 'predicted_scores', 'scatter') for a in 'qk')), ARRAY), 'search.budget': PART,
    **dict.fromkeys(('gates', 'predictors', 'predictor', 'patterns', 'choice', 'given.masks'), BY_NAME),
    'search.params': ANYTHING, 'measured.select': PART,
}


def declare(functions: str, **kinds: Kind) -> None:
  """Writes the kinds of the parameters of `functions`, names with blanks between, into `KINDS`.

  A family says so, in its own module, what its functions take.
  """
  KINDS.update({f'{function}.{name}': kind for function in functions.split() for name, kind in kinds.items()})


def kind_of(function: str, name: str) -> Kind | None:
  """Returns the kind of the parameter `name` of a function, 'recipes.mdgf' for example, or `None` if it has none."""
  return KINDS.get(f'{function.rpartition(".")[2]}.{name}') or KINDS.get(name)


def verified(function: str, name: str, value: Any, default: Any = inspect.Parameter.empty) -> Any:
  """Returns the value of one parameter; a scalar array becomes a number where the number decides shapes or counts.

  `default` is always valid. `function` is the name for messages. Raises `ValueError` for a value that does not fit.
  """
  kind = kind_of(function, name)
  if kind is None or value is default:
    return value
  if callable(value):
    _refuse_function(function, name, kind, value)
    if kind.scheduled:
      return value
  scalar = isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0 and kind.fits in _NUMBERS
  if scalar and isinstance(value, jax.core.Tracer):
    if kind.coefficient:
      return value
    raise ValueError(f'{function}: `{name}` decides shapes or counts, so that JAX cannot trace it; pass a number that '
                     'Python knows.')
  number = value.item() if scalar else value
  if not kind.fits(number):
    several = name == 'sparsity' and (callable(value) or isinstance(value, Mapping))
    remedy = ' Numbers by leaf are an allocation.custom; recipes.gradual_magnitude raises it over the steps.' * several
    raise ValueError(f'{function}: `{name}` must be {kind.says}, not {shown(value)}.{remedy}')
  return value if kind.coefficient else number


def _refuse_function(function: str, name: str, kind: Kind, value: Callable[..., Any]) -> None:
  """Raises `ValueError` for a function of other arguments, and for a schedule whose first value does not fit."""
  wrong = f'{function}: `{name}` must be {kind.says}, and {shown(value)}'
  if kind.takes and not is_tree(value) and not _takes(value, kind.takes):
    raise ValueError(f'{wrong} does not take {kind.takes} argument{"s" * (kind.takes > 1)}.')
  if kind.first:
    with jax.ensure_compile_time_eval():
      first = value(np.int32(0))
    if is_known(first) and (np.shape(first) or not kind.first(np.asarray(first).item())):
      raise ValueError(f'{wrong} returns {shown(first)} at step 0.')


def _takes(function: Callable[..., Any], number: int) -> bool:
  """Returns whether `function` can be called with so many arguments, or does not say what it takes."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return True
  try:
    signature.bind(*[None] * number)
    return True
  except TypeError:
    return False


_NUMBERS = {kind.fits for kind in KINDS.values() if kind.coefficient} | {
    kind.fits for kind in (SPARSITY, STEP, UPDATES, TIMES)}


def shown(value: Any) -> str:
  """Returns a value as messages show it: functions by name, arrays by shape, objects without a repr by type."""
  if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
    return f'{value.dtype}{list(value.shape)}'
  text = repr(value)
  if ' at 0x' in text:
    text = f'the function {value.__name__}' if inspect.isfunction(value) else f'a {type(value).__name__}'
  return text if len(text) <= 60 else text[:57] + '...'


def known(function: str, names: Iterable[str], valid: Iterable[str]) -> None:
  """Raises `ValueError` for the first of `names` that is no name of a parameter, with the closest of the valid ones."""
  valid = set(valid)
  for name in names:
    if name not in valid:
      raise errors.unknown(function, 'argument', name, valid)


def checked(function: F) -> F:
  """Returns the function with every argument verified by its kind, under the same name, signature and docstring."""
  parameters = inspect.signature(function).parameters
  name = public_name(function)

  of_kind = lambda *kinds: [key for key, parameter in parameters.items() if parameter.kind in kinds]
  places = of_kind(inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  rest, others = of_kind(inspect.Parameter.VAR_POSITIONAL), of_kind(inspect.Parameter.VAR_KEYWORD)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    known(name, () if others else kwargs, parameters)
    one = lambda key, value: verified(name, key, value, parameters[key].default)
    first = [one(*each) for each in zip(places + rest * len(args), args)]
    return function(*first, *args[len(first):], **{
        key: one(key, value) if key in parameters else value for key, value in kwargs.items()})

  return call  # type: ignore[return-value]


def is_known(array: Any) -> bool:
  """Returns whether `array` has values here, and is neither traced nor a mere shape."""
  return not isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct))


def refuse_unknown(function: str, arrays: Mapping[str, Any], traced: bool = False) -> None:
  """Raises `ValueError` for the first of `arrays`, by path, without values; with `traced`, a traced array will do."""
  for path, array in arrays.items():
    if not is_known(array) and not (traced and isinstance(array, jax.core.Tracer)):
      raise errors.at_leaf(function, path, array.shape, 'its values are not known here (traced, or a mere shape). '
                           f'Call {function} with arrays, ' + ('or under jax.eval_shape.' if traced else
                                                               'outside of jit, vmap and grad.'))


# Messages call these functions by their own names, as users do.
_TOP = ('advise', 'check', 'contractions', 'pack', 'prune', 'prune_weights', 'report')
# A message names such a module and not its package: `decode.every` is what users call, not `attention.every`.
_INSIDE = ('decode',)


def public_name(function: Callable[..., Any]) -> str:
  """Returns how users call a function: 'recipes.mdgf' for `mdgf` of `sparsejax.recipes.n_m`."""
  package, *module = function.__module__.split('.')
  space = [name for name in module if name in _INSIDE] or module[:1]
  alone = package != 'sparsejax' or function.__name__ in _TOP and space == module[:1]
  return function.__name__ if alone else '.'.join([*space, function.__name__])
