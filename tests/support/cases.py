"""Defines the cases of the conformance tests: recipes with their promises, small parameters of every kind, and a loop.

A recipe in `recipes.TABLE` is a case at once, by itself and between a dense and a fine-tune phase. Further promises
(patterns on the way, zeros before the end) are an entry in `PROMISES`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax
from sparsejax import allocation, recipes, schedules, trees, types

STEPS, DENSE, TUNED = 12, 2, 3  # updates in all, of the dense phase, of the fine-tune phase
F32, BF16 = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
# Two axes that are contracted as one, a stack of layers in bfloat16, and what stays dense.
SHAPES = {
    'attention': {'out': {'kernel': F32((12, 8, 4)), 'bias': F32((4,))}},
    'stack': {'kernel': BF16((2, 96, 4)), 'bias': BF16((2, 4))},
    'norm': {'scale': F32((8,))},
    'embed': {'embedding': F32((7, 8))},
}
SMALL = {'stack': SHAPES['stack'], 'norm': SHAPES['norm']}  # for the variants, which differ in time and not in space
PATTERNS = {'2:4': sparsejax.NM(2, 4), 'block': sparsejax.Block((8, 2), 0.5), 'channel': sparsejax.Channel(0.5)}
# A rank of three has no convention. These axes are as a program would give them.
AXES = {'attention/out/kernel': types.Axes((0, 1), (2,), source='traced'),
        'stack/kernel': types.Axes((1,), (2,), layer=(0,), source='traced')}
CONTRACTED = {path: axes.contracted for path, axes in AXES.items()}


class Promise(NamedTuple):
  """A `Promise` says what the tests may expect of a recipe.

  `stages`: the (N, M) that the masks go through. `zeros_from`: updates until pruned weights are zero, if ever. `fixed`:
  the mask never changes. `counts`: the number of kept weights is the same at every update. `memory`: bytes per sparse
  weight, besides those of the optimizer. `trained`: all other parameters move as under the optimizer alone.
  """

  stages: tuple[tuple[int, int], ...] = ()
  zeros_from: int | None = 0
  fixed: bool = False
  counts: bool = False
  memory: int = 5
  trained: bool = True


class Case(NamedTuple):
  """A `Case` is a recipe with its options, the phases included, and its promise."""

  recipe: str
  options: dict[str, Any]
  promise: Promise
  shapes: Any

  @property
  def dense(self) -> int:
    """Updates of the dense phase."""
    return self.options.get('dense_steps', 0)

  @property
  def tuned(self) -> int:
    """Updates of the fine-tune phase."""
    return self.options.get('fine_tune_steps', 0)

  def make(self, inner: optax.GradientTransformation | None = None,
           axes: Any = AXES) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer, made from scratch every time, as users do inside of a step."""
    recipe = recipes.TABLE[self.recipe]
    signals = {key: value for key, value in read(self.recipe, axes=axes).items()
               if key != 'key' or self.recipe in RANDOM}
    return recipe(optax.sgd(0.3, momentum=0.5) if inner is None else inner, **signals | self.options)


PROMISES = {
    'dense': Promise(),
    'ste': Promise(((2, 4),)),
    'sr_ste': Promise(((2, 4),)),
    'asp': Promise(((2, 4),), memory=1),
    'mdgf': Promise(((2, 4),), None),  # by default it decays up to the last update
    'sdgf_stepwise': Promise(((3, 4), (2, 4))),
    'sdgf_geometric': Promise(((16, 32), (8, 16), (4, 8), (2, 4))),
    'st3': Promise(),
    'bdwp': Promise(((2, 8),)),
    **dict.fromkeys(('random_pruning', 'magnitude_at_init', 'grasp', 'synflow', 'random_search', 'static_sparse',
                     'iterative_magnitude', 'l1_sparse', 'snip'), Promise(fixed=True, counts=True, memory=1)),
    'robust_at_init': Promise(fixed=True, counts=True),
    'freeze_net': Promise(zeros_from=None, fixed=True, counts=True, memory=1),
    'set_': Promise(counts=True, memory=1),
    'rigl': Promise(counts=True, memory=1, trained=False),  # an update of its mask moves no weight
    'snfs': Promise(counts=True),
    'irrelevant_weights': Promise(memory=1),
    **dict.fromkeys(('quick_selection', 'g2gnet'), Promise(counts=True, memory=1)),
    'sparcl': Promise(counts=True, memory=3),  # two masks, and a counter
    'dsl': Promise(counts=True), 'cl_dst': Promise(counts=True),
    **dict.fromkeys(('gradual_magnitude', 'turbo_vbi'), Promise(memory=1)),
    'movement_pruning': Promise(memory=9),
    'soft_movement_pruning': Promise(memory=17),
    'global_sparse_momentum': Promise(memory=1),
    'iterative_soft_shrinkage': Promise(zeros_from=None),
    'lottery_jackpot': Promise(counts=True, memory=9, trained=False),
    'dass': Promise(memory=9, trained=False),  # the weights rest while the masks are trained
}
# The options that a recipe needs, or without which it would do nothing within a dozen updates.
OPTIONS = {
    **dict.fromkeys(('set_', 'rigl', 'snfs', 'sparcl', 'dsl', 'quick_selection', 'g2gnet', 'cl_dst'),
                    {'every': 2, 'fraction': 0.4}),
    'irrelevant_weights': {'every': 2, 'removed': 0.5},
    **dict.fromkeys(('gradual_magnitude', 'turbo_vbi'), {'every': 2}),
    'soft_movement_pruning': {'score_optimizer': optax.sgd(5.0)},
    'dass': {'score_optimizer': optax.sgd(5.0), 'alpha_optimizer': optax.sgd(1.0, momentum=0.5)},
    'iterative_soft_shrinkage': {'fine_tune_steps': TUNED}, 'synflow': {'rounds': 5},
    'random_search': {'candidates': 3},
    'global_sparse_momentum': {'sparsity': 0.7},
}
UNREAD = {'random_pruning': {'loss'}}  # its allocation, erk, looks at no gradient
RANDOM = ('random_pruning', 'random_search', 'static_sparse', 'set_', 'rigl', 'snfs', 'sparcl', 'dsl',
          'quick_selection', 'g2gnet', 'cl_dst')
# At initialisation a recipe may look at a loss, at outputs and at a key: of any pytree of parameters, and of each leaf
# by itself, so that it is the same for a shard of it.
SIGNALS = {
    'loss': lambda params: sum(jnp.sum(jnp.cos(3 * w.astype(jnp.float32))) for w in jax.tree.leaves(params)),
    'outputs': lambda params: sum(jnp.sum(jnp.square(w.astype(jnp.float32))) for w in jax.tree.leaves(params)),
    'key': jax.random.key(0),
    'alphas': lambda path, leaf: leaf.ndim < 2 or path.startswith(('head/', 'b/', 'layer_5/')),  # of all trees here
}


def read(name: str, **more: Any) -> dict[str, Any]:
  """Returns the values that a recipe takes and reads, of `SIGNALS` and of `more`."""
  valid = {*recipes.arguments(recipes.TABLE[name])} - UNREAD.get(name, set())
  return {key: value for key, value in {**SIGNALS, **more}.items() if key in valid}


DECAYS = {
    'linear': schedules.linear(1.0, 0.0, end=5), 'cosine': schedules.cosine(1.0, 0.0, end=5),
    'exponential': schedules.exponential(half_life=2),
}
VARIANTS = {
    **{f'mdgf-{gradient}-{name}': ('mdgf', {'decay': DECAYS[name], 'gradient': gradient},
                                   Promise(((2, 4),), None if name == 'exponential' else 5))
       for gradient, name in (('scaled', 'linear'), ('straight_through', 'cosine'),
                              ('straight_through', 'exponential'))},
    'sr_ste-decoupled': ('sr_ste', {'pattern': sparsejax.NM(1, 8), 'decoupled': True, 'decay': 0.1},
                         Promise(((1, 8),))),
    'sdgf_stepwise-odd': ('sdgf_stepwise', {'pattern': sparsejax.NM(2, 12), 'gradient': 'scaled'},
                          Promise(((11, 12), (6, 12), (3, 12), (2, 12)))),
    'sdgf_geometric-2': ('sdgf_geometric', {'pattern': sparsejax.NM(1, 4), 'k': 2}, Promise(((2, 8), (1, 4)))),
    'sdgf_geometric-1': ('sdgf_geometric', {'k': 1}, Promise(((2, 4),))),
    'st3-sigma': ('st3', {'sigma': True, 'sparsity': 0.7}, Promise()),
    'asp-dense': ('asp', {'dense_steps': DENSE}, Promise(((2, 4),))),
    'mdgf-dense': ('mdgf', {'dense_steps': DENSE, 'decay': DECAYS['linear']}, Promise(((2, 4),), 5)),
    'sr_ste-tuned': ('sr_ste', {'fine_tune_steps': TUNED}, Promise(((2, 4),))),
    'snip-at-first-update': ('snip', {'loss': None}, Promise(counts=True, memory=1)),
    **{f'{recipe}-{pattern}': (recipe, OPTIONS.get(recipe, {}) | {
           'pattern': PATTERNS[pattern], 'allocation': allocation.uniform}, PROMISES[recipe])
       for recipe in ('snip', 'rigl', 'gradual_magnitude') for pattern in PATTERNS},
    'ste-mixed': ('ste', {'pattern': {'stack/kernel': sparsejax.NM(1, 16), '**': sparsejax.NM(2, 4)}}, Promise()),
}


_NO_DENSE_PHASE = ('set_', 'rigl', 'snfs', 'sparcl', 'dsl', 'quick_selection', 'g2gnet', 'cl_dst',
                   'snip', 'global_sparse_momentum', 'lottery_jackpot')


def _cases() -> dict[str, Case]:
  plain = {name: (name, OPTIONS.get(name, {}), PROMISES.get(name, Promise(zeros_from=None)))
           for name in recipes.TABLE} | VARIANTS
  phases = {'dense_steps': DENSE, 'fine_tune_steps': TUNED}
  found = {}
  for name, (recipe, options, promise) in plain.items():
    valid = {*recipes.arguments(recipes.TABLE[recipe])}
    timed = options | ({'total_steps': STEPS} if 'total_steps' in valid else {})
    shapes = SHAPES if name in recipes.TABLE or name == 'ste-mixed' else SMALL
    found[name] = Case(recipe, timed, promise, shapes)
    several = name in recipes.TABLE and not promise.fixed and recipe not in _NO_DENSE_PHASE
    if valid >= {*phases} and not {*options} & {*phases} and several:
      found[f'{name}-phases'] = Case(recipe, timed | phases, promise, shapes)
  return found


CASES = _cases()
BY_NAME = [name for name, case in CASES.items() if name.removesuffix('-phases') in recipes.TABLE]


def random(seed: int, lead: tuple[int, ...] = (), like: Any = SHAPES) -> Any:
  """Returns normal numbers `[*lead, *shape]` for each leaf of `like`."""
  draw = np.random.default_rng(seed).normal
  return jax.tree.map(lambda s: jnp.asarray(draw(size=lead + s.shape), s.dtype), like)


@functools.cache
def _all_gradients(seed: int, name: str) -> Any:
  return jax.tree.map(np.asarray, random(seed + 1, (STEPS,), CASES[name].shapes))


def start(name: str, seed: int = 0) -> Any:
  """Returns the parameters with which `run` begins."""
  return random(seed, like=CASES[name].shapes)


def gradients(name: str, t: int | slice = slice(None), seed: int = 0) -> Any:
  """Returns the gradients of update `t` in `run`, or the gradients of all updates, stacked."""
  return jax.tree.map(lambda x: x[t], _all_gradients(seed, name))


def step(tx, params, state, grads, **extra):
  """Returns parameters and state after one update of a training loop, for given gradients."""
  updates, state = tx.update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state


def scanned(make, params, grads, watch=True, **extra):
  """Runs all updates in one program: returns the last parameters and state, and all parameters, points and masks."""
  def body(carry, grads):
    params, state = step(make(), *carry, grads, **extra)
    seen = (params, sparsejax.project(params, state), sparsejax.masks(params, state)) if watch else None
    return (params, state), seen

  return jax.lax.scan(body, (params, make().init(params)), grads)


@functools.cache
def program(name: str) -> Any:
  """Returns a case from the first update to the last, as a compiled function of parameters and gradients."""
  return jax.jit(functools.partial(scanned, CASES[name].make))


@functools.cache
def run(name: str, seed: int = 0) -> tuple[Any, Any, Any]:
  """Returns the result of `program` as numpy, cached for several tests."""
  return jax.tree.map(np.asarray, program(name)(start(name, seed), gradients(name, seed=seed)))


@functools.cache
def stepper(name: str) -> tuple[Any, list[int]]:
  """Returns a compiled update of a case, which donates its arguments, and a list that grows with every trace."""
  traced = []

  def update(params, state, grads):
    traced.append(1)
    return step(CASES[name].make(), params, state, grads)

  return jax.jit(update, donate_argnums=(0, 1)), traced


def stepped(name, params, state, times):
  """Returns parameters and state after the updates of `stepper` at `times`, with the gradients of `run`."""
  for t in times:
    params, state = stepper(name)[0](params, state, gradients(name, t))
  return params, state


def by_path(tree: Any) -> dict[str, Any]:
  paths, leaves, _ = trees.flatten(tree)
  return dict(zip(paths, leaves))


def assert_same(a: Any, b: Any, rounding: float = 0.0) -> None:
  """Asserts that two trees are the same bits, dtypes and structure; floats up to `rounding` of their leaf's largest."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(by_path(a).items(), jax.tree.leaves(b)):
    assert x.dtype == y.dtype, path
    x, y = np.asarray(x), np.asarray(y)
    if rounding and np.issubdtype(x.dtype, np.floating):
      np.testing.assert_allclose(x, y, rtol=0, atol=rounding * np.max(np.abs(y), initial=0), err_msg=path)
    else:
      np.testing.assert_array_equal(x, y, err_msg=path)


def rounding(name: str) -> float:
  """Returns the tolerance of `assert_same`: memories sum up products, which XLA rounds once or twice, as it fuses."""
  return 1e-6 if CASES[name].promise.memory > Promise().memory else 0.0


def assert_at_the_point(before: Any, params: Any, point: Any, of_the_largest: bool = False) -> None:
  """Asserts that zeros are exactly zero, and all else is right up to the rounding of `p + (q - p)` in its dtype.

  `of_the_largest`: up to the rounding of the leaf's largest weight. XLA may compute the same q twice, with and without
  a fused multiplication and addition. A small q is then off by the rounding of the terms of its difference.
  """
  for (path, p), old, q in zip(by_path(params).items(), jax.tree.leaves(before), jax.tree.leaves(point)):
    eps = float(jnp.finfo(p.dtype).eps)
    p, q, old = (np.asarray(x, np.float64) for x in (p, q, old))
    assert np.all(p[q == 0] == 0), f'{path}: {np.sum(p[q == 0] != 0)} zeros are none'
    size = np.abs(q) + np.abs(old)
    assert np.all(np.abs(p - q) <= eps * (np.max(size, initial=0) if of_the_largest else size)), (
        f'{path}: {np.max(np.abs(p - q))}')


def assert_always_at_the_point(start: Any, seen: Any, points: Any, of_the_largest: bool = False) -> None:
  """Asserts `assert_at_the_point` after every update of `scanned`."""
  before, times = start, len(jax.tree.leaves(seen)[0])
  for t in range(times):
    params, point = (jax.tree.map(lambda x, t=t: x[t], tree) for tree in (seen, points))
    assert_at_the_point(before, params, point, of_the_largest)
    before = params
