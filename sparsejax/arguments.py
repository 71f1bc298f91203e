"""Says once what the parameters of words and recipes may be, by name, and refuses other values where they enter.

`KINDS` maps the name of a parameter to its kind. `checked` is the decorator that looks the names of a signature up.

    @checked
    def cubic(init_value: float = 0.0, end_value: float = 1.0, *, begin: int = 0, end: int) -> Schedule: ...

    cubic(end=-1)  # ValueError: schedules.cubic: `end` must be a number of updates, whole and at least 0, not -1.
"""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sparsejax import errors

F = TypeVar('F', bound=Callable[..., Any])
Test = Callable[[Any], bool]


class Kind(NamedTuple):
  """A `Kind` says what a parameter may be: `fits(value)`, and the same in words, which are the remedy.

  `coefficient`: the number only enters arithmetic, so that a scalar array will do as well, traced or not. `scheduled`:
  a function of the step will do as well.
  """

  says: str
  fits: Test
  coefficient: bool = False
  scheduled: bool = False


def is_number(value: Any) -> bool:
  """Returns whether `value` is a real number that an array can hold: an integer has 64 bits at most. A bool is none."""
  if isinstance(value, int):
    return not isinstance(value, bool) and -2**63 <= value < 2**63
  return isinstance(value, (float, np.integer, np.floating))


def between(low: float, high: float, *, open_at: tuple[float, ...] = ()) -> Test:
  """Returns the test for finite numbers from `low` to `high`, without the ends in `open_at`."""
  return lambda value: is_number(value) and math.isfinite(value) and low <= value <= high and value not in open_at


def whole(low: float, high: float = math.inf) -> Test:
  """Returns the test for whole numbers of an integer type from `low` to `high`."""
  return lambda value: is_number(value) and isinstance(value, (int, np.integer)) and low <= value <= high


def having(*names: str) -> Test:
  """Returns the test for values with these attributes. A class, which has them too, is no such value."""
  return lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names)


def one_of(*types: Any) -> Test:
  """Returns the test for values of these types."""
  return lambda value: isinstance(value, types)


def is_tree(value: Any) -> bool:
  """Returns whether `value` may be a tree of arrays: an array, a container of JAX or a mapping, and no other leaf."""
  if hasattr(value, 'dtype') or isinstance(value, Mapping):
    return True
  return value is not None and not jax.tree_util.all_leaves([value])


def is_series(value: Any) -> bool:
  """Returns whether `value` can be gone through item by item, and is no text and no mapping."""
  return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) and getattr(value, 'ndim', 1) > 0


def is_path(value: Any) -> bool:
  """Returns whether `value` is the path of a file or a folder; a number would be an open file of the process."""
  return isinstance(value, (str, os.PathLike)) and os.fspath(value) not in ('', b'')


def is_key(value: Any) -> bool:
  """Returns whether `value` is a PRNG key, typed or `uint32`, or an array of keys."""
  dtype = getattr(value, 'dtype', None)
  return dtype is not None and (dtype == np.uint32 or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))


_PART, _RATE, _SCHEDULE = 'a number from 0 to 1', 'a finite number, at least 0', 'a schedule, a function of the step'
_AS_IN = f"{_SCHEDULE}, as in schedules.linear(end=5000), or in a configuration {{'name': 'linear', 'end': 5000}}"
ANYTHING = Kind('anything', lambda value: True)
SPARSITY = Kind(f'the fraction of zeros, {_PART}, as in 0.9 for 90 %', between(0, 1))
_MOST = 2**31 - 1  # JAX counts steps and turns of loops in 32 bits
STEP = Kind('a number of updates, whole and at least 0, below 2^31', whole(0, _MOST))
SHIFT = Kind('a whole number of updates', whole(-math.inf))
UPDATES = Kind('a number of updates, whole and at least 1, below 2^31', whole(1, _MOST))
TIMES = Kind('a whole number, at least 1, below 2^31', whole(1, _MOST))
PART = Kind(_PART, between(0, 1), coefficient=True)
PART_OR_SCHEDULE = Kind(f'{_PART}, or {_SCHEDULE}', between(0, 1), coefficient=True, scheduled=True)
AVERAGE = Kind('a number from 0 to below 1', between(0, 1, open_at=(1,)), coefficient=True)
RATE = Kind(_RATE, between(0, math.inf), coefficient=True)
RATE_OR_SCHEDULE = Kind(f'{_RATE}, or {_SCHEDULE}', between(0, math.inf), coefficient=True, scheduled=True)
CHANCE = Kind('a number between 0 and 1, without both', between(0, 1, open_at=(0, 1)))
POSITIVE = Kind('positive', between(0, math.inf, open_at=(0,)), coefficient=True)
NUMBER = Kind('a finite number', between(-math.inf, math.inf), coefficient=True)
VALUE = Kind('a finite number, or a bool', lambda value: one_of(bool, np.bool_)(value) or NUMBER.fits(value),
             coefficient=True)
FLAG = Kind('True or False', one_of(bool, np.bool_))
NAME = Kind('a name, a string', one_of(str))
SCHEDULE = Kind(_AS_IN, callable)
BOOLS = Kind(f'{_SCHEDULE} that returns a bool, as in schedules.every(100)', callable)
FUNCTION = Kind('a function', callable)
# `patterns.parse` answers what is no pattern, with the spellings that it knows.
PATTERN = Kind("a pattern, as in sj.NM(2, 4), or its spelling, as in '2:4', or a dict of patterns by glob",
               lambda value: having('validate')(value) or isinstance(value, (str, Mapping, tuple, list)))
ALLOCATION = Kind("an allocation, as in allocation.erk, allocation.named('erk') or allocation.custom({'**': 0.9})",
                  lambda value: having('normalise', 'score')(value) or callable(value))
OPTIMIZER = Kind('an optimizer of optax, as in optax.adamw(1e-3)', having('init', 'update'))
KEY = Kind("a PRNG key, as in jax.random.key(0), or starts.given('key')",
           lambda value: callable(value) or is_key(value))
AXES = Kind('a mapping from paths to Axes, as in sparsejax.contractions(model.apply, params, x)',
            lambda value: isinstance(value, Mapping) and all(isinstance(path, str) for path in value))
DRAWN = Kind('a PRNG key, as in jax.random.key(0)', is_key)
# `trees.select` answers a glob that stands by itself.
WHERE = Kind("a predicate, as in trees.named('tail/of/path'), or a pytree of bools", lambda value: not is_number(value))
MEMORY = Kind('a scores.Memory', having('start', 'observe'))
SELECTION = Kind('a selection, as in selections.leafwise(sj.NM(2, 4))', having('plan', 'select'))
FOLDER = Kind('the path of a folder', lambda value: one_of(str, os.PathLike)(value) and (
    os.path.isdir(value) or not os.path.lexists(value)))
CONFIG = Kind("a mapping, as in {'name': 'sr_ste', 'pattern': '2:4'}", having('keys', '__getitem__'))
TIED = Kind("a mapping from globs to globs, as in {'**/rho': '**/mean'}", lambda value: isinstance(value, Mapping) and
            all(isinstance(text, str) for pair in value.items() for text in pair))
QUANTIZE = Kind('a grid, as in repairs.Grid(bits=4)', having('fitted', 'rounded'))
GROUPS = Kind('the groups of a program, as in structured.groups(apply, params, x), or some of them in a dict',
              lambda value: isinstance(value, Mapping) and all(map(having('members', 'size'), value.values())))
PENALTY = Kind('a penalty, as in penalties.l1(1e-4)', having('value', 'prox', 'lmo'))
BUDGET = Kind('a fraction of a cost, as in structured.flops(0.5)', having('fraction', 'cost'))
# Functions of which `groups` are those of units; other functions take names of groups of leaves.
_OVER_GROUPS = ('grouped', 'kept', 'group_norm', 'sparse_envelope', 'latency', 'oto', 'hesso', 'dhspg', 'wgsef',
                'norm_scale', 'group_magnitude', 'group_taylor', 'hap', 'latency_aware', 'choose', 'seconds',
                'slice_gpt', 'multi_pruner', 'tyr')
FLOW = Kind('a flow, as in flows.hard()', having('project', 'pull_back'))
PARAMS = Kind("a tree of arrays, as in model.init(key, x)['params']", is_tree)
MEMBERS = Kind('a list of trees of arrays', lambda value: isinstance(value, Sequence) and all(map(is_tree, value)))
SERIES = Kind('a sequence, as in a list', is_series)
LISTS = Kind('a list of lists of numbers', lambda value: is_series(value) and all(map(is_series, value)))
BATCHES = Kind('an iterable of batches, as in a list', is_series)
BY_NAME = Kind('a mapping, as in a dict', one_of(Mapping))
KEEP = Kind("a mapping from names of groups to bool[units], as in {'up/kernel:1': norms > 0.1}", one_of(Mapping))
PATH = Kind('the path of a file or folder, a string or os.PathLike', is_path)
ARRAY = Kind('an array', having('shape', 'dtype'))
PACKED = Kind("a packed array, as in sparsejax.formats.pack(params, '2:4')", having('to_dense', 'shape', 'dtype'))
SCALARS = Kind('a number or an array', lambda value: is_number(value) or ARRAY.fits(value))
BANK = Kind('a continual.Bank', having('params', 'masks', 'own'))
BASELINE = Kind('a gates.Baseline', having('total', 'weight'))
ROUTED = Kind('an array [rows, blocks], or a conditional.Routing', lambda value: ARRAY.fits(value) or having(
    'tokens', 'filled')(value))
PREDICATE = Kind("a predicate, as in trees.named('tail/of/path')", callable)
CONTRACTIONS = Kind('the contractions of a program, as in sparsejax.contractions(apply, params, x)',
                    having('uses', 'macs', 'other_macs'))
UNITS = Kind('the groups of a program, as in structured.groups(apply, params, x)', having('shapes', 'apply', 'items'))
CUT = Kind('what structured.cut returns', having('params', 'apply', 'kept'))
NAMED = Kind('a name, or the mapping or the word of a configuration',
             lambda value: isinstance(value, (str, Mapping)) or callable(value) or hasattr(value, 'score'))
REPORT = Kind('what sparsejax.report returns', having('rows'))
SEQUENTIAL = Kind("'weight', 'dense' or a function path -> key",
                  lambda value: isinstance(value, str) or callable(value))
WHOLE = Kind('a whole number, at least 0', whole(0))
PAIR = Kind('two whole numbers from 1 on, as in (128, 128)',
            lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(TIMES.fits, value)))
ADAPTIVE = Kind('an activation.AdaptiveWeight', having('weight', 'aim', 'before'))
RULE = Kind('a rule, as in activation.wina(0.5)', having('neurons'))
NUMBERS = Kind('a number or a sequence of numbers', lambda value: is_number(value) or is_series(value))

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
    **dict.fromkeys(('restriction', 'ramp', 'schedule', 'mdgf.decay', 'accumulated_movement.penalty',
                     'score_threshold.threshold', 'global_threshold.sparsity', 'drop_and_grow.fraction',
                     'swap.fraction', 'redistributed.fraction'), SCHEDULE),
    'refresh': BOOLS, 'value': VALUE,
    **dict.fromkeys(('loss', 'outputs', 'score', 'update', 'grow', 'start', 'groups', 'apply', 'progress'), FUNCTION),
    'pattern': PATTERN, 'allocation': ALLOCATION, 'key': KEY, 'axes': AXES, 'memory': MEMORY, 'flow': FLOW,
    **dict.fromkeys(('inner', 'score_optimizer', 'optimizer'), OPTIMIZER),
    **dict.fromkeys(('selection', 'first'), SELECTION),
    **dict.fromkeys(('half_space.epsilon', 'oto.epsilon'), PART),
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
    **dict.fromkeys(('unseen', 'device', 'item', 'input_gradient', 'globs', 'implementation', 'given.name',
                     'identity.name', 'over_steps.key'), NAME), 'named.name': NAMED,
    **dict.fromkeys(('check', 'signed_zeros', 'own', 'exact', 'explain', 'band'), FLAG),
    **dict.fromkeys(('callback', 'metric', 'probe', 'essential_sparsity.pruned', 'schedule.value'), FUNCTION),
    **dict.fromkeys(('either.first', 'either.second'), BOOLS), 'all_but.where': PREDICATE, 'zeroth_order.key': DRAWN,
    'x': ARRAY, 'w': ARRAY, 'packed': PACKED, 'contractions': CONTRACTIONS, 'small': CUT, 'report': REPORT,
    **dict.fromkeys((f'{name}.groups' for name in ('cut', 'cut_state', 'masks', 'multiply_adds', 'prove')), UNITS),
    **dict.fromkeys(('points', 'columns', 'window'), TIMES),
    **dict.fromkeys(('dpi', 'limit'), POSITIVE), **dict.fromkeys(('costs', 'means', 'halves'), NUMBERS),
    **dict.fromkeys(('knapsack.costs', 'sizes'), LISTS), 'knapsack.budget': NUMBER, 'tolerance': RATE,
    'effective_sizes.groups': GROUPS,
    **dict.fromkeys((f'{name}.groups' for name in (
        'choose_in_rounds', 'clustered', 'erasable', 'implanted', 'is_rotated', 'permuted', 'rotate', 'search',
        'weights')), UNITS),
    **dict.fromkeys(('erase', 'order', 'stages', 'computed.widths'), SERIES), 'array': PAIR, 'seed': WHOLE,
    **dict.fromkeys(('among', 'orders', 'gate'), BY_NAME), 'rotated': PARAMS, 'implants': PART, 'mass.fraction': PART,
    **dict.fromkeys(('stream', 'widths', 'heads', 'clustered.name'), NAME), 'gate_of.key': DRAWN,
    **dict.fromkeys(('tune', 'activation', 'choose_in_rounds.grads'), FUNCTION), 'weight': RATE,
    **dict.fromkeys(('width', 'gate_of.inputs', 'gate_of.units', 'tile_share.inputs', 'tile_share.outputs'), TIMES),
    'rule': RULE, 'alpha': PART, 'greedy.step': POSITIVE, 'percent': POSITIVE, 'rank': TIMES, 'thresholds': BY_NAME,
    **dict.fromkeys(('p', 'raw', 'segments', 'relu_router.scale', 'used.raw', 'chunk_sparsity.used', 'chunk_loss.valid',
                     'adapted.loss'), ARRAY),
    **dict.fromkeys(('sparse_step', 'full_step', 'back', 'reads'), FUNCTION), 'adapted.state': ADAPTIVE,
    **dict.fromkeys(('length', 'period'), TIMES), 'sharpness': POSITIVE, 'delta.threshold': RATE,
    **dict.fromkeys(('into', 'out', 'logits', 'strength', 'matrix', 'computed.keep', 'foresight.target',
                     'response.outputs'), ARRAY),
    # Attention.
    **dict.fromkeys(('band.width', 'strided.width', 'columns.count', 'sharded.offset', 'measured.prompt',
                     'once.after'), WHOLE),
    **dict.fromkeys(('local', 'period', 'capacity', 'hashes', 'orthogonal.d', 'orthogonal.features', 'shift.parts',
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
  if kind is None or value is default or kind.scheduled and callable(value):
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


_NUMBERS = {kind.fits for kind in KINDS.values() if kind.coefficient} | {
    kind.fits for kind in (SPARSITY, STEP, UPDATES, TIMES)}


def shown(value: Any) -> str:
  """Returns a value as messages show it: functions by name, other objects without a repr by type, 60 characters."""
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


def public_name(function: Callable[..., Any]) -> str:
  """Returns how users call a function: 'recipes.mdgf' for `mdgf` of `sparsejax.recipes.n_m`."""
  package, *module = function.__module__.split('.')
  alone = function.__name__ in _TOP or package != 'sparsejax'
  return function.__name__ if alone else '.'.join([*module[:1], function.__name__])
