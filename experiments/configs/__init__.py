"""Loads configs: Python files with `get_config()`, changed by `key=value` from the command line, strict about names.

    config = load('experiments/configs/n_m/demo_vit_digits.py', ['steps=100', 'optimizer.learning_rate=3e-4'])
    config.steps    # 100
"""

import ast
import functools
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import traceback
import types
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import CustomJSONEncoder

from experiments.configs import default
from sparsejax import arguments, errors

# The keys of these sections are the arguments of a function, which checks them: see `configs/default.py`.
OPEN = ('model', 'models', 'optimizer.options', 'optimizers', 'recipes')
# Changes of these keys make no other run. The keys say where, how often and on what a run is trained.
FREE = ('data.data_dir', 'mesh', 'shard', 'measure_every', 'validate_every', 'checkpoint_every', 'resume_changed',
        'noise', 'writers')
OWN = 'own'  # the name of a model, or of data, that a config gives as objects of the user's own


class Own:
  """An `Own` holds an object of the user's own in a config. Its text names the object, and stands for it in records."""

  def __init__(self, value: Any):
    self.value, self._text = value, _described(value)

  def __str__(self) -> str:
    return self._text


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ConfigDict:
  """Returns the config of the Python file at `path`, locked, after `overrides` (`'optimizer.learning_rate=3e-4'`).

  A key that the file leaves out has its value in `configs/default.py`. Raises `ValueError` for a file that is no
  config, an unknown key, and a value that its key cannot have.
  """
  made = running(path, module(path).get_config)
  if not isinstance(made, Mapping | ConfigDict):
    raise ValueError(f'configs.load: get_config() of {str(path)!r} returns {made!r}, not a ConfigDict or a dict.')
  return complete(made, overrides)


def complete(given: Mapping[str, Any] | ConfigDict, overrides: Iterable[str] = ()) -> ConfigDict:
  """Returns the config with the keys of `given`, after `overrides`, and all other keys at their defaults, locked.

  `model` may also be a model of the user's own, see `experiments.models.own`, and `data` the user's own splits, see
  `experiments.data.arrays`. Raises `ValueError` as `load` does.
  """
  config = ConfigDict(_wrapped(given), type_safe=False)
  _complete(config, default.get_config(), '')
  for override in overrides:
    _override(config, override)
  _complete(config, default.get_config(), '')
  _check(config)
  return config.lock()


def merged(config: ConfigDict, changes: Mapping[str, Any] | ConfigDict) -> ConfigDict:
  """Returns a copy of `config` with `changes`, locked. A section of `changes` changes single keys of its section.

  A section with a `name`, and the section `recipes`, replaces the whole section. Raises `ValueError` as `load` does.
  """
  copy = config.copy_and_resolve_references().unlock()
  for key, value in _wrapped(changes).items():
    merges = isinstance(value, Mapping | ConfigDict) and 'name' not in value and key != 'recipes'
    copy[key] = ConfigDict({**dict(copy.get(key, {})), **value}, type_safe=False) if merges else value
  return complete(copy)


def _wrapped(given: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
  """Returns a copy of `given` whose own model and own data are sections that hold an `Own`."""
  wrapped = {key: given[key] for key in given}
  for key, argument in (('model', 'make'), ('data', 'splits')):
    value = wrapped.get(key, {})
    if not isinstance(value, Mapping | ConfigDict) or key == 'data' and 'train' in value:
      wrapped[key] = {'name': OWN, argument: Own(value.to_dict() if isinstance(value, ConfigDict) else value)}
  return wrapped


def _described(value: Any) -> str:
  """Returns the name of a function, the sizes and a checksum of arrays, and the type of anything else."""
  if isinstance(value, np.ndarray):
    return f'{value.dtype}{list(value.shape)} {zlib.crc32(np.ascontiguousarray(value).tobytes()):08x}'
  if isinstance(value, Mapping):
    return ', '.join(f'{key}: {_described(part)}' for key, part in value.items())
  if isinstance(value, tuple | list):
    return ', '.join(map(_described, value))
  named = value if hasattr(value, '__qualname__') and hasattr(value, '__module__') else type(value)
  return f'{named.__module__}.{named.__qualname__}'


class _Encoder(CustomJSONEncoder):
  """An `_Encoder` writes the text of an object that JSON does not know, such as a function or an `Own`."""

  def default(self, obj: Any) -> Any:
    if isinstance(obj, Own):
      return str(obj)
    return _described(obj) if callable(obj) or isinstance(obj, np.ndarray) else super().default(obj)


def module(path: str | os.PathLike[str]) -> types.ModuleType:
  """Returns the Python file at `path` as a module. Raises `ValueError` without a file or without its `get_config()`."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'configs.load: there is no file {str(path)!r}; see experiments/configs for those that exist.')
  # The loader is named, because Python finds none for a file with another suffix than `.py`.
  loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
  loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))
  running(path, lambda: loader.exec_module(loaded))
  if not hasattr(loaded, 'get_config'):
    raise ValueError(f'configs.load: {str(path)!r} has no function get_config(); see experiments/configs/default.py.')
  return loaded


def running(path: str | os.PathLike[str], code: Callable[[], Any]) -> Any:
  """Returns `code()`, which runs code of the config file `path`. Raises `ValueError` for whatever `code` raises.

  The message has the file and the line at which the config failed, and the error.
  """
  try:
    return code()
  except (Exception, SystemExit) as error:
    within = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    syntax = isinstance(error, SyntaxError) and error.lineno
    file, line = (error.filename, error.lineno) if syntax else (path, within[-1] if within else 1)
    reason = f'{type(error).__name__}: {error.msg if syntax else error}'
    raise ValueError(f'configs.load: {file}, line {line}: {reason}') from error


def _check(config: ConfigDict) -> None:
  """Raises `ValueError` for a value that no run could use."""
  seeds, runs = config['seeds'], list(config['recipes'])
  whole = isinstance(seeds, tuple) and all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
  if not whole or not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f'config: seeds={seeds!r} must be a tuple of different whole numbers, such as (0, 1, 2).')
  for key in ('steps', 'batch_size', 'measure_every', 'validate_every', 'checkpoint_every'):
    if type(config[key]) is not int or not 1 <= config[key] < 2**31:
      raise ValueError(f'config: {key}={config[key]!r} must be a whole number from 1 to 2147483647.')
  if not isinstance(config['resume_changed'], bool):
    raise ValueError(f'config: resume_changed={config["resume_changed"]!r} must be True or False.')
  if not runs:
    raise ValueError('config: recipes is empty; name at least one run, such as {"dense": {"name": "dense"}}.')
  for run in runs:
    if not re.fullmatch(r'[\w-]+', run):
      raise ValueError(f'config: the run name {run!r} is a directory too; use letters, digits, "-" and "_".')
  for key in ('loss', 'score'):
    if config[key] is not None and not callable(config[key]):
      raise ValueError(f'config: {key}={config[key]!r} must be None or a function (outputs, labels) -> numbers.')
  for key, says, fits in (('writers', 'a tuple of functions (run, step, numbers)', callable),
                          ('noise', 'None or a tuple of globs', lambda glob: isinstance(glob, str))):
    value = config[key] if config[key] is not None or key == 'writers' else ()
    if not isinstance(value, (tuple, list)) or not all(map(fits, value)):
      raise ValueError(f'config: {key}={config[key]!r} must be {says}.')
  for section, example in (('models', '{"width": 128}'), ('optimizers', '{"learning_rate": 1e-3}')):
    refuse_unknown('config', f'run in {section}', config[section], runs)
    for run, changes in config[section].items():
      if not isinstance(changes, ConfigDict):
        raise ValueError(f'config: {section}.{run} is a section, such as {example}, not {changes!r}.')
  for run, changes in config['optimizers'].items():
    refuse_unknown('config', f'key of optimizers.{run}:', changes, default.get_config().optimizer)
  for run, section in {'': config['optimizer'], **config['optimizers']}.items():
    for key in {'learning_rate', 'weight_decay', 'clip'} & {*section}:
      arguments.verified(f'config{run and f", run {run!r}"}: optimizer', key, section[key], None)


def plain(config: ConfigDict) -> dict[str, Any]:
  """Returns `config` as JSON gives it back, its keys in the order of writing: a ConfigDict sorts the keys it shows."""
  return json.loads(config.to_json(json_encoder_cls=_Encoder))


def runs(config: ConfigDict) -> list[str]:
  """Returns the names of the runs in the order of writing: the first run is the baseline."""
  return list(plain(config)['recipes'])


def changed(config: ConfigDict, **values: Any) -> ConfigDict:
  """Returns a copy of `config` with other `values` of its keys, locked."""
  copy = config.copy_and_resolve_references().unlock()
  for key, value in values.items():
    copy[key] = value
  return copy.lock()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns one text `key: old -> new` for each value that differs. An absent key counts as `None`.

  Therefore a record stays comparable when a key is added whose default is `None`.
  """
  old, new = dict(_flat(old)), dict(_flat(new))
  return [f'{key}: {old.get(key, "absent")} -> {new.get(key, "absent")}'
          for key in sorted(old | new) if old.get(key) != new.get(key)]


def of_run(config: ConfigDict, run: str) -> dict[str, Any]:
  """Returns the part of `config` that decides the results of the run `run`, as JSON gives it back.

  The part has the run's own `recipe`, `model` and `optimizer` in the place of all, and none of the keys in `FREE`. Two
  runs with equal parts end with equal weights, up to the rounding of sums on other devices.
  """
  written = plain(config)
  of_all = written.pop('recipes')
  written |= {'recipe': of_all.get(run)} | {
      key: {**written[key], **written.pop(f'{key}s').get(run, {})} for key in ('model', 'optimizer')}
  for key in FREE:
    *sections, last = key.split('.')
    functools.reduce(dict.__getitem__, sections, written).pop(last)
  return written


def at_run(config: ConfigDict, run: str) -> ConfigDict:
  """Returns `config` with the optimizer of the run `run`, for engines that train the runs one by one."""
  return merged(config, {'optimizer': {**config.optimizer, **config.optimizers.get(run, {})}, 'optimizers': {}})


def _flat(section: Mapping[str, Any], prefix: str = '') -> Iterable[tuple[str, Any]]:
  for key, value in section.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def refuse_unknown(function: str, what: str, names: Iterable[str], valid: Collection[str]) -> None:
  """Raises `ValueError` with the closest `valid` names for the first of `names` that is not valid."""
  for name in names:
    if name not in valid:
      raise errors.unknown(function, what, name, valid)


def _complete(config: ConfigDict, known: ConfigDict, prefix: str) -> None:
  """Adds the missing keys, except in the sections of `OPEN`. Raises `ValueError` for an unknown key."""
  refuse_unknown('config', 'key', [prefix + key for key in config], [prefix + key for key in known])
  for key, value in known.items():
    if key not in config:
      config[key] = value
    elif isinstance(value, ConfigDict):
      if not isinstance(config[key], ConfigDict):
        raise ValueError(f'config: {prefix}{key} is a section, not {config[key]!r}.')
      if prefix + key not in OPEN:
        _complete(config[key], value, f'{prefix}{key}.')


def _override(config: ConfigDict, override: str) -> None:
  """Sets one `key=value`. The value is read as a Python literal, or else as a string."""
  name, equals, text = override.partition('=')
  *sections, key = name.strip().split('.')
  if not equals:
    raise ValueError(f'config: cannot read {override!r}; write key=value, such as optimizer.learning_rate=3e-4.')
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    value = text
  section = config
  for i, part in enumerate(sections):
    if part not in section or not isinstance(section[part], ConfigDict):
      raise errors.unknown('config', 'section', '.'.join(sections[:i + 1]),
                           ['.'.join([*sections[:i], k]) for k, v in section.items() if isinstance(v, ConfigDict)])
    section = section[part]
  old = section.get(key)
  kinds = {int: 'number', float: 'number', dict: 'section', ConfigDict: 'section'}
  kind = lambda x: kinds.get(type(x), type(x).__name__)
  if old is not None and value is not None and kind(old) != kind(value):
    raise ValueError(f'config: {name}={text} is a {kind(value)}, but {name} is a {kind(old)} ({old!r}).')
  section[key] = value
