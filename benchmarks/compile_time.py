"""Measures how long an AdamW step of each recipe takes to trace, lower and compile, over the step of AdamW alone.

The parameters are 10 to 800 matrices of three shapes. The step has nothing but the optimizer: there is no model in
whose compile time that of a recipe would vanish. The size of a program is the number of its operations before and after
XLA's optimizations, which is the same in every round. Seconds are those of all threads of the process, so that other
work on the machine counts little.

Each kind of method is there by hand, too, see `floors`: a step in plain JAX that does nothing else. The seconds of the
step by hand, over dense, are those of the method on this compiler; the rest is that of the recipe. `FLOORS` says which
step by hand is the floor of a recipe.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks import floors, timing
from benchmarks.timing import Measurement

SHAPES = ((64, 64), (64, 128), (128, 64))
LEAVES = (10, 50, 200, 800)
LEAST = 'a master under a fixed mask'  # by `floors.least_master`: no recipe with a dense master can do less
HAND, AGAIN = ', by hand', 'gradual_magnitude, by hand, again'
GLOBAL, CHOOSING = 'gradual_magnitude, global, by hand', 'soft_movement_pruning, by hand, with a choice'
DENSE_MASTER = ('ste', 'sr_ste', 'mdgf', 'sdgf_stepwise', 'sdgf_geometric', 'bdwp', 'asp')  # all of N:M
FIXED = ('random_pruning', 'static_sparse', 'magnitude_at_init', 'snip', 'grasp', 'synflow', 'robust_at_init',
         'random_search', 'freeze_net', 'iterative_magnitude')
RANKED = ('gradual_magnitude', 'gradual_magnitude, global', 'iterative_soft_shrinkage', 'movement_pruning')
OTHERS = (*FIXED, *RANKED, 'soft_movement_pruning', 'set_', 'rigl', 'lottery_jackpot', 'snfs', 'st3',
          'global_sparse_momentum')
# By recipe: the step by hand that is the floor of the recipe's kind.
FLOORS = {**dict.fromkeys(DENSE_MASTER, f'sr_ste{HAND}'), 'asp': f'random_pruning{HAND}',
          **{name: f'{name}{HAND}' for name in ('mdgf', 'sdgf_geometric')},
          **dict.fromkeys(FIXED, f'random_pruning{HAND}'), **dict.fromkeys(RANKED, AGAIN),
          **dict.fromkeys(('gradual_magnitude, global', 'snip', 'freeze_net'), GLOBAL),  # of one global ranking
          'soft_movement_pruning': CHOOSING, 'lottery_jackpot': f'rigl{HAND}',
          **{name: f'{name}{HAND}' for name in ('set_', 'rigl', 'snfs', 'st3', 'global_sparse_momentum')}}
MANY = 200  # leaves from which on these few alone are compiled, since a step takes a minute
AT_MANY = (LEAST, f'sr_ste{HAND}', 'sr_ste', f'gradual_magnitude{HAND}', AGAIN, 'gradual_magnitude')
OVER_HAND = 1.5  # at most so many times the seconds of the step by hand
MASTER_BARS, OTHER_BARS = (1.5, 2.0), (3.0, 4.0)  # time and size over dense
BARS = {LEAST: MASTER_BARS, **{f'{name}{HAND}': MASTER_BARS if name in DENSE_MASTER else OTHER_BARS
                               for name in ('sr_ste', 'mdgf', 'sdgf_geometric', 'random_pruning', 'gradual_magnitude')},
        **dict.fromkeys((AGAIN, GLOBAL, CHOOSING), OTHER_BARS),
        **{f'{name}{HAND}': OTHER_BARS for name in ('set_', 'rigl', 'snfs', 'st3', 'global_sparse_momentum')},
        **dict.fromkeys(DENSE_MASTER, MASTER_BARS), **dict.fromkeys(OTHERS, OTHER_BARS)}
OPTIONS = {'gradual_magnitude, global': {'allocation': sj.allocation.global_()}, 'mdgf': {'total_steps': 5000}}
# The recipes that read the argument as `make` calls them.
READ = {'key': ('random_pruning', 'static_sparse', 'random_search', 'robust_at_init', 'set_', 'rigl', 'snfs'),
        'loss': ('grasp', 'robust_at_init', 'random_search')}
STEPS = 5000
INNER = optax.adamw(1e-3)


class Cost(NamedTuple):
  """A `Cost` is what a step costs before it runs: seconds, and the number of operations before and after XLA."""

  seconds: float
  operations: int
  compiled: int | None


def run(rounds: int = 20, leaves: Sequence[int] = LEAVES, names: Sequence[str] = tuple(BARS)) -> Iterator[Measurement]:
  """Yields the claims of each recipe and number of leaves: the seconds, and both sizes of the program, over dense.

  The seconds over those of the step by hand of its kind are a claim of their own. A round compiles everything anew, so
  that there are at most three rounds, and one from 200 leaves on. The last claim is on `init` of the largest model: its
  time, over the time that a step takes to compile.
  """
  jax.config.update('jax_enable_compilation_cache', False)
  cost(make('dense'), 2)  # JAX does some work once in a process
  for number in leaves:
    now = [name for name in names if number < MANY or name in AT_MANY]  # steps by hand come first
    turns = [{name: cost(make(name), number) for name in ('dense', *now)}
             for _ in range(min(rounds, 3 if number < 200 else 1))]
    for name in now:
      yield from _claims(name, number, turns)
  yield first_state('rigl', max(leaves))


def _claims(name: str, leaves: int, turns: Sequence[Mapping[str, Cost]]) -> Iterator[Measurement]:
  """Yields the claims on one recipe, or step by hand, with so many leaves."""
  title, (slow, large), first = f'{name}, {leaves} leaves', BARS[name], turns[0]
  seconds = [{each: cost.seconds for each, cost in turn.items()} for turn in turns]
  yield timing.claim(f'{title}: seconds to compile a step, over dense', seconds, name, 'dense', slow, False)
  if (floor := FLOORS.get(name)) in first:
    over = f'{title}: seconds to compile a step, over {floor}'
    yield timing.claim(over, seconds, name, floor, OVER_HAND, False)
  for what, field in (('operations', 'operations'), ('compiled operations', 'compiled')):
    ratio = getattr(first[name], field) / getattr(first['dense'], field)
    yield Measurement(f'{title}: {what} over dense', ratio, (ratio, ratio), large, False, 1)


def make(name: str) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer of a name of `BARS`, or AdamW alone for 'dense'."""
  if name == 'dense':
    return optax.with_extra_args_support(INNER)
  if name in floors.STEPS:
    return floors.STEPS[name](INNER)
  recipe = sj.recipes.TABLE[name.split(',')[0]]
  size = lambda params: sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
  common = {'total_steps': STEPS, 'key': jax.random.key(0), 'loss': size, 'outputs': size}
  known = {key: value for key, value in common.items()
           if key in sj.recipes.arguments(recipe) and name in READ.get(key, (name,))}
  return recipe(INNER, **known | OPTIONS.get(name, {}))


def matrices(leaves: int) -> dict[str, Any]:
  """Returns the parameters of a model of so many matrices, as shapes."""
  return {f'layer_{i}': {'kernel': jax.ShapeDtypeStruct(SHAPES[i % len(SHAPES)], jnp.float32)} for i in range(leaves)}


def stepping(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
  """Returns the step of an optimizer, `(params, state, grads) -> (params, state)`."""
  def step(params, state, grads):
    moves, state = tx.update(grads, state, params)
    return optax.apply_updates(params, moves), state

  return step


def cost(tx: optax.GradientTransformationExtraArgs, leaves: int, compiled: bool = True) -> Cost:
  """Returns the cost of a step that donates its arguments; without `compiled`, of its trace and its lowering."""
  params = matrices(leaves)
  state = jax.eval_shape(tx.init, params)
  jax.clear_caches()
  start = time.process_time()
  lowered = jax.jit(stepping(tx), donate_argnums=(0, 1)).lower(params, state, params)
  program = lowered.compile() if compiled else None
  seconds = time.process_time() - start
  operations = len(re.findall(r'^\s*(?:%|return|func|stablehlo)', lowered.as_text(), re.MULTILINE))
  after = program and len(re.findall(r'^\s+(?:ROOT )?%?[\w.-]+ = ', program.as_text(), re.MULTILINE))
  return Cost(seconds, operations, after)


def first_state(name: str, leaves: int) -> Measurement:
  """Returns the claim on the time of `init` outside of `jit`, nothing compiled yet, over that to compile a step."""
  tx = make(name)
  params = jax.tree.map(lambda w: jnp.ones(w.shape, w.dtype), matrices(leaves))
  step = cost(tx, leaves).seconds
  jax.clear_caches()
  start = time.process_time()
  jax.block_until_ready(jax.tree.leaves(tx.init(params)))
  ratio = (time.process_time() - start) / step
  what = f'{name}, {leaves} leaves: seconds of init over those to compile a step'
  return Measurement(what, ratio, (ratio, ratio), 2.0, False, 1)
