"""A recipe is a paper's method as a sentence of the grammar. `TABLE` lists the training sentences by name.

    tx = sj.recipes.mdgf(optax.adamw(1e-3), sj.NM(1, 8))
    tx = sj.recipes.TABLE['mdgf'](optax.adamw(1e-3), sj.NM(1, 8))
    tx = sj.recipes.from_config(optax.adamw(1e-3), {'name': 'mdgf', 'pattern': '1:8'}, total_steps=10_000)
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optax

from sparsejax import allocation, errors, formats, metrics, patterns, schedules, states, trees
from sparsejax.argument_kinds import is_number
from sparsejax.arguments import known, shown, verified
from sparsejax.recipes.at_init import (
  fixed,
  freeze_net,
  grasp,
  magnitude_at_init,
  random_pruning,
  random_search,
  robust_at_init,
  snip,
  synflow,
)
from sparsejax.recipes.bayesian import ssvi, turbo_vbi
from sparsejax.recipes.dynamic import dsl, quick_selection, rigl, set_, snfs, sparcl, static_sparse
from sparsejax.recipes.gradual import (
  global_sparse_momentum,
  gradual_magnitude,
  iterative_soft_shrinkage,
  movement_pruning,
  soft_movement_pruning,
)
from sparsejax.recipes.graphs import teddy
from sparsejax.recipes.modular import cl_dst, g2gnet
from sparsejax.recipes.n_m import asp, bdwp, dense, mdgf, sdgf_geometric, sdgf_stepwise, sr_ste, st3, ste
from sparsejax.recipes.post_training import (
  armor,
  dsnot,
  ecoflap,
  exact_obs,
  gqsa,
  magnitude,
  net_trim,
  obc,
  sparsegpt,
  wanda,
)
from sparsejax.recipes.regularized import irrelevant_weights
from sparsejax.recipes.searched import dass
from sparsejax.recipes.sentence import parameters, without_effect
from sparsejax.recipes.structured import (
  dhspg,
  group_magnitude,
  group_taylor,
  hap,
  hesso,
  latency_aware,
  norm_scale,
  oto,
  wgsef,
)
from sparsejax.recipes.tickets import iterative_magnitude, l1_sparse, lottery_jackpot
from sparsejax.types import Inner, Optimizer, moved

TABLE = {f.__name__: f for f in (
    dense,
    ste, sr_ste, asp, mdgf, sdgf_stepwise, sdgf_geometric, st3, bdwp,
    random_pruning, magnitude_at_init, snip, grasp, synflow, robust_at_init, freeze_net, random_search,
    gradual_magnitude, movement_pruning, soft_movement_pruning, global_sparse_momentum, iterative_soft_shrinkage,
    irrelevant_weights,
    static_sparse, set_, rigl, snfs, sparcl, dsl, quick_selection, g2gnet, cl_dst,
    iterative_magnitude, lottery_jackpot, l1_sparse, dass,
    teddy, turbo_vbi)}
# Each kind of sentence has a table. A family adds the table of its kind.
POST_TRAINING = {f.__name__: f for f in (
    magnitude, wanda, sparsegpt, exact_obs, obc, dsnot, ecoflap, net_trim, armor, gqsa)}
STRUCTURED = {f.__name__: f for f in (
    group_magnitude, group_taylor, oto, hesso, dhspg, wgsef, norm_scale, latency_aware, hap)}
TABLES = {'train': TABLE, 'prune': POST_TRAINING, 'cut': STRUCTURED}
# Type checkers read this list, and cannot read a table: a test compares both.
__all__ = [
    'POST_TRAINING', 'STRUCTURED', 'TABLE', 'TABLES', 'arguments', 'fixed', 'from_config',
    'armor', 'dsnot', 'ecoflap', 'exact_obs', 'gqsa', 'magnitude', 'net_trim', 'obc', 'sparsegpt', 'wanda',
    'dhspg', 'group_magnitude', 'group_taylor', 'hap', 'hesso', 'latency_aware', 'norm_scale', 'oto', 'wgsef',
    'asp', 'bdwp', 'cl_dst', 'dass', 'dense', 'dsl', 'freeze_net', 'g2gnet', 'global_sparse_momentum',
    'gradual_magnitude', 'grasp', 'irrelevant_weights', 'iterative_magnitude', 'iterative_soft_shrinkage', 'l1_sparse',
    'lottery_jackpot', 'magnitude_at_init', 'mdgf', 'movement_pruning', 'quick_selection', 'random_pruning',
    'random_search', 'rigl', 'robust_at_init', 'sdgf_geometric', 'sdgf_stepwise', 'set_', 'snfs', 'snip',
    'soft_movement_pruning', 'sparcl', 'sr_ste', 'ssvi', 'st3', 'static_sparse', 'ste', 'synflow', 'teddy', 'turbo_vbi',
]
moved(__name__, {
    'bdwp_backward': (states.bdwp_backward, 'states.bdwp_backward'),
    'freeze_net_trained': (formats.freeze_net_trained, 'formats.freeze_net_trained'),
    'model_soup': (metrics.model_soup, 'metrics.model_soup')})

# Arguments of recipes that count updates; a float is a fraction of all updates.
_STEPS = ('dense_steps', 'fine_tune_steps', 'ramp_steps', 'begin', 'end', 'every')
_SCHEDULE_STEPS = ('begin', 'end', 'half_life')


def arguments(recipe: Callable[..., Any]) -> list[str]:
  """Returns the names that a recipe takes besides the optimizer: its own, and the options that it hands to `sparsify`.

  `memory`, `start` and the words that the recipe chooses by itself are no options: a recipe takes them only where its
  own signature names them.
  """
  return sorted({*parameters(recipe)} - {'inner'})


def from_config(inner: Inner, config: Mapping[str, Any], *, total_steps: int, axes: Mapping[str, Any] | None = None,
                signals: Mapping[str, Any] = MappingProxyType({})) -> Optimizer:
  """Returns the recipe that plain data describe: `{'name': 'mdgf', 'pattern': '1:8', 'where': ['mlp/*/kernel'], ...}`.

  `signals`: values that a configuration cannot hold (`loss`, `outputs`, `ticket`, `key`). The recipe gets those that it
  takes and reads. `starts.given(name)` as a value is filled by `init`, and `transforms.placeholders(tx)` says which
  names `init` needs. `pattern`: `'N:M'`, or a dict of them by glob. `where`: globs. A schedule goes by its name,
  `{'name': 'linear', 'begin': 0.0, 'end': 0.75}`, and `refresh` is a number of updates. `allocation`: a name, or
  sparsities by glob. A float among the numbers of steps is a fraction of `total_steps`. Raises `ValueError` with the
  closest names for a name or key that does not exist, and what the recipe itself raises.
  """
  verified('recipes.from_config', 'total_steps', total_steps)
  config = dict(verified('recipes.from_config', 'config', config))
  name = config.pop('name', None)
  if not isinstance(name, str) or name not in TABLE:
    raise errors.unknown('recipes.from_config', 'recipe', name, TABLE)
  valid = arguments(TABLE[name])
  _refuse_keys(config, name, valid, total_steps)
  read = {key: _read(key, value, total_steps) for key, value in config.items()}
  rest = {'total_steps': total_steps, 'axes': axes, **signals}
  values = {key: value for key, value in rest.items() if key in valid} | read
  offered = {key for key in signals if key not in read and without_effect(TABLE[name], key, values)}
  return TABLE[name](inner, **{key: value for key, value in values.items() if key not in offered})


def _refuse_keys(config: Mapping[str, Any], name: str, valid: list[str], total_steps: int) -> None:
  """Raises `ValueError` for a key that the recipe does not take, and for a number of steps that is told twice."""
  for key in config:
    if key not in valid:
      raise errors.unknown('recipes.from_config', f'key of recipe {name!r}:', key, ['name', *valid])
  if config.get('total_steps', total_steps) != total_steps:
    raise ValueError(f'recipes.from_config: the configuration says total_steps={shown(config["total_steps"])}, and the '
                     f'call total_steps={total_steps}. Leave it out of the configuration.')


def _globs(value: Any) -> Any:
  globs = [value] if isinstance(value, str) else value
  return trees.named(*globs) if isinstance(globs, (list, tuple)) and all(isinstance(g, str) for g in globs) else value


def _adam(value: Any) -> Any:
  if not isinstance(value, Mapping):
    return value
  known('recipes.from_config, `score_optimizer` (optax.adam)', value, inspect.signature(optax.adam).parameters)
  return optax.adam(**value)


_READERS = {'pattern': patterns.parse, 'allocation': allocation.named, 'where': _globs, 'alphas': _globs,
            'score_optimizer': _adam, 'alpha_optimizer': _adam}


def _read(key: str, value: Any, total_steps: int) -> Any:
  """Returns one entry of a configuration as the recipe takes it."""
  if key in _READERS:
    return _READERS[key](value)
  if key in _STEPS:
    return _steps(key, value, total_steps)
  if isinstance(value, Mapping) and 'name' in value:
    steps = {k: _steps(k, v, total_steps) if k in _SCHEDULE_STEPS else v for k, v in value.items() if k != 'name'}
    return schedules.named(value['name'], **steps)
  return schedules.every(value) if key == 'refresh' and is_number(value) else value


def _steps(key: str, value: Any, total_steps: int) -> int:
  if not is_number(value) or not (value >= 0 and float(value).is_integer() or 0 <= value <= 1):
    raise ValueError(f'recipes.from_config: {key}={value!r} is neither a number of updates nor a fraction of them.')
  if not isinstance(value, float) or value > 1:
    return int(value)
  return max(round(value * total_steps), int(key == 'every' and value > 0))
