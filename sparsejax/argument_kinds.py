"""Defines `Kind`, the values that a parameter may have, as a test and in words, and the kinds of the library.

    TIMES.fits(3)    # True
    TIMES.says       # 'a whole number, at least 1, below 2^31'

`arguments` says which parameter is of which kind.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Test = Callable[[Any], bool]


class Kind(NamedTuple):
  """A `Kind` says what a parameter may be: `fits(value)`, and the same in words, which are the remedy.

  `coefficient`: the number only enters arithmetic, so that a scalar array will do as well, traced or not. `scheduled`:
  a function of the step will do as well. `takes`: a function must take so many arguments. `first`: whether the value of
  a schedule at step 0 is one that the parameter may have.
  """

  says: str
  fits: Test
  coefficient: bool = False
  scheduled: bool = False
  takes: int | None = None
  first: Test | None = None


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


def is_floating(value: Any) -> bool:
  """Returns whether `value` is a dtype of real numbers with a floating point, or its name. An array is none."""
  try:
    return isinstance(value, (str, type, np.dtype)) and bool(jax.numpy.issubdtype(value, np.floating))
  except TypeError:  # of an unknown name
    return False


def is_channels(value: Any) -> bool:
  """Returns whether `value` is a matrix of whole numbers from 0 on whose rows have no number twice."""
  if isinstance(value, jax.core.Tracer) or not is_series(value):
    return False
  try:
    rows = np.asarray(value)
  except (TypeError, ValueError):  # of rows that differ in length
    return False
  if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
    return False
  ordered = np.sort(rows, -1)
  return bool(ordered.min() >= 0 and (ordered[:, 1:] != ordered[:, :-1]).all())


def is_key(value: Any) -> bool:
  """Returns whether `value` is a PRNG key, typed or `uint32`, or an array of keys. A key has two or four numbers."""
  dtype = getattr(value, 'dtype', None)
  if dtype is None or dtype != np.uint32:
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
  return value.shape[-1:] in ((2,), (4,))


_PART, _RATE, _SCHEDULE = 'a number from 0 to 1', 'a finite number, at least 0', 'a schedule, a function of the step'
_AS_IN = f"{_SCHEDULE}, as in schedules.linear(end=5000), or in a configuration {{'name': 'linear', 'end': 5000}}"
ANYTHING = Kind('anything', lambda value: True)
SPARSITY = Kind(f'the fraction of zeros, {_PART}, as in 0.9 for 90 %', between(0, 1))
_MOST = 2**31 - 1  # JAX counts steps and turns of loops in 32 bits
STEP = Kind('a number of updates, whole and at least 0, below 2^31', whole(0, _MOST))
SHIFT = Kind('a whole number of updates', whole(-math.inf))
PLACE = Kind('a whole number, counted from the end if negative', whole(-math.inf))
UPDATES = Kind('a number of updates, whole and at least 1, below 2^31', whole(1, _MOST))
TIMES = Kind('a whole number, at least 1, below 2^31', whole(1, _MOST))
PART = Kind(_PART, between(0, 1), coefficient=True)
PART_OR_SCHEDULE = Kind(f'{_PART}, or {_SCHEDULE}', between(0, 1), True, True, 1, between(0, 1))
AVERAGE = Kind('a number from 0 to below 1', between(0, 1, open_at=(1,)), coefficient=True)
RATE = Kind(_RATE, between(0, math.inf), coefficient=True)
RATE_OR_SCHEDULE = Kind(f'{_RATE}, or {_SCHEDULE}', between(0, math.inf), True, True, 1, between(0, math.inf))
CHANCE = Kind('a number between 0 and 1, without both', between(0, 1, open_at=(0, 1)))
POSITIVE = Kind('positive', between(0, math.inf, open_at=(0,)), coefficient=True)
NUMBER = Kind('a finite number', between(-math.inf, math.inf), coefficient=True)
VALUE = Kind('a finite number, or a bool', lambda value: one_of(bool, np.bool_)(value) or NUMBER.fits(value),
             coefficient=True)
FLAG = Kind('True or False', one_of(bool, np.bool_))
NAME = Kind('a name, a string', one_of(str))
MESH_AXES = Kind('the name of a mesh axis, or a tuple of names', lambda value: isinstance(value, str) or (
    isinstance(value, tuple) and bool(value) and all(isinstance(name, str) for name in value)))
SCHEDULE = Kind(_AS_IN, callable, takes=1)
PART_SCHEDULE = Kind(f'{_AS_IN}, and return {_PART}', callable, takes=1, first=between(0, 1))
BOOLS = Kind(f'{_SCHEDULE} that returns a bool, as in schedules.every(100)', callable, takes=1)
FUNCTION = Kind('a function', callable)
APPLY = Kind('the function that runs the model, whose first argument holds the parameters (without data, '
             'sj.prune_weights(params, pattern) prunes by magnitude)', callable)
SCORE = Kind('a score, a function of a weight and its Signals, as in scores.magnitude', callable, takes=2)
# `patterns.parse` answers what is no pattern, with the spellings that it knows.
PATTERN = Kind("a pattern, as in sj.NM(2, 4), or its spelling, as in '2:4', or a dict of patterns by glob",
               lambda value: having('validate')(value) or isinstance(value, (str, Mapping, tuple, list)))
ALLOCATION = Kind("an allocation, as in allocation.erk, allocation.named('erk') or allocation.custom({'**': 0.9})",
                  lambda value: having('normalise', 'score')(value) or callable(value), takes=3)
OPTIMIZER = Kind('an optimizer of optax, as in optax.adamw(1e-3)', having('init', 'update'))
KEY = Kind("one PRNG key, as in jax.random.key(0), or starts.given('key')",
           lambda value: callable(value) or is_key(value) and value.ndim == (value.dtype == np.uint32))
AXES = Kind('a mapping from paths to Axes, as in sparsejax.contractions(model.apply, params, x)',
            lambda value: isinstance(value, Mapping) and all(isinstance(path, str) for path in value))
DRAWN = Kind('a PRNG key, as in jax.random.key(0)', is_key)
# `trees.select` answers a glob that stands by itself.
WHERE = Kind("a predicate of a path and a leaf, as in trees.named('tail/of/path'), or a pytree of bools",
             lambda value: not is_number(value), takes=2)
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
FLOW = Kind('a flow, as in flows.hard()', having('project', 'pull_back'))
PARAMS = Kind("a tree of arrays, as in model.init(key, x)['params']", is_tree)
MEMBERS = Kind('a list of trees of arrays', lambda value: isinstance(value, Sequence) and all(map(is_tree, value)))
SERIES = Kind('a sequence, as in a list', is_series)
LISTS = Kind('a list of lists of numbers', lambda value: is_series(value) and all(map(is_series, value)))
BATCHES = Kind('an iterable of batches, as in the list [x]; an array is one batch',
               lambda value: is_series(value) and not hasattr(value, 'dtype'))
BY_NAME = Kind('a mapping, as in a dict', one_of(Mapping))
KEEP = Kind("a mapping from names of groups to bool[units], as in {'up/kernel:1': norms > 0.1}", one_of(Mapping))
PATH = Kind('the path of a file or folder, a string or os.PathLike', is_path)
ARRAY = Kind('an array', having('shape', 'dtype'))


def shaped(text: str) -> Kind:
  """Returns the kind of arrays with the dimensions of `text`: '[B, T]', or '[..., T]' where others may come first."""
  names = text[1:-1].split(', ')
  least, more = len(names) - (names[0] == '...'), names[0] == '...'
  return Kind(f'an array {text}', lambda value: ARRAY.fits(value) and (
      len(value.shape) >= least if more else len(value.shape) == least))


PACKED = Kind("a packed array, as in sparsejax.formats.pack(params, '2:4')", having('to_dense', 'shape', 'dtype'))
SCALARS = Kind('a number or an array', lambda value: is_number(value) or ARRAY.fits(value))
BANK = Kind('a continual.Bank', having('params', 'masks', 'own'))
BLOCKS = Kind('an attention.BlockIndex', having('index', 'counts', 'overflow'))
BASELINE = Kind('a gates.Baseline', having('total', 'weight'))
ROUTED = Kind('an array [rows, blocks], or a conditional.Routing', lambda value: ARRAY.fits(value) or having(
    'tokens', 'filled')(value))
PREDICATE = Kind("a predicate of a path and a leaf, as in trees.named('tail/of/path')", callable, takes=2)
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
SKIPS = Kind('an allocation of what is skipped, as in activation.greedy()',
             lambda value: callable(value) and having('step')(value))
RULE = Kind('a rule, as in activation.wina(0.5)', having('neurons'))
NUMBERS = Kind('a number or a sequence of numbers', lambda value: is_number(value) or is_series(value))
# Decoding.
DTYPE = Kind('a dtype of floating point, as in jnp.bfloat16', lambda value: is_floating(value))
CACHE = Kind('a cache, as in decode.empty_cache(rule, 1, 4096, 8, 64)', having('k', 'v', 'labels', 'length', 'lost'))
DECODING = Kind('a DecodeRule, as in decode.quest(keep=1024)', having('page', 'keep', 'labels', 'written', 'scores'))
CHANNELS = Kind('numbers of channels, from 0 on and none twice, untraced, int[kv_heads, r], as decode.heavy_channels '
                'returns them', lambda value: is_channels(value))
# A hash has a bucket for each combination of its signs, and a bisection ends at the spacing of its numbers.
SIGNS = Kind('a whole number from 1 to 16', whole(1, 16))
WIDTH = Kind('a number from 1e-6 to 1', between(1e-6, 1))
RAISED = Kind('a number from 0.001 to 1', between(0.001, 1))

