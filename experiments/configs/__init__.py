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
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import default
from sparsejax import errors

# The keys of these sections are the arguments of a function, which checks them: see `configs/default.py`.
OPEN = ('model', 'models', 'optimizer.options', 'recipes')
# Changes of these keys make no other run. The keys say where, how often and on what a run is trained.
FREE = ('data.data_dir', 'mesh', 'shard', 'measure_every', 'validate_every', 'checkpoint_every', 'resume_changed')


def load(path: str | os.PathLike, overrides: Iterable[str] = ()) -> ConfigDict:
  """Returns the config of the Python file at `path`, locked, after `overrides` (`'optimizer.learning_rate=3e-4'`).

  A key that the file leaves out has its value in `configs/default.py`. Raises `ValueError` for a file that is no
  config, an unknown key, and a value that its key cannot have.
  """
  made = _running(path, module(path).get_config)
  if not isinstance(made, Mapping | ConfigDict):
    raise ValueError(f'configs.load: get_config() of {str(path)!r} returns {made!r}, not a ConfigDict or a dict.')
  config = ConfigDict(made, type_safe=False)
  _complete(config, default.get_config(), '')
  for override in overrides:
    _override(config, override)
  _complete(config, default.get_config(), '')
  _check(config)
  return config.lock()


def module(path: str | os.PathLike) -> types.ModuleType:
  """Returns the Python file at `path` as a module. Raises `ValueError` without a file or without its `get_config()`."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'configs.load: there is no file {str(path)!r}; see experiments/configs for those that exist.')
  # The loader is named, because Python finds none for a file with another suffix than `.py`.
  loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
  loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))
  _running(path, lambda: loader.exec_module(loaded))
  if not hasattr(loaded, 'get_config'):
    raise ValueError(f'configs.load: {str(path)!r} has no function get_config(); see experiments/configs/default.py.')
  return loaded


def _running(path: str | os.PathLike, code: Callable[[], Any]) -> Any:
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
    if not isinstance(config[key], int) or config[key] < 1:
      raise ValueError(f'config: {key}={config[key]!r} must be a whole number of at least 1.')
  if not isinstance(config['resume_changed'], bool):
    raise ValueError(f'config: resume_changed={config["resume_changed"]!r} must be True or False.')
  if not runs:
    raise ValueError('config: recipes is empty; name at least one run, such as {"dense": {"name": "dense"}}.')
  for run in runs:
    if not re.fullmatch(r'[\w-]+', run):
      raise ValueError(f'config: the run name {run!r} is a directory too; use letters, digits, "-" and "_".')
  refuse_unknown('config', 'run in models', config['models'], runs)
  for run, changes in config['models'].items():
    if not isinstance(changes, ConfigDict):
      raise ValueError(f'config: models.{run} is a section, such as {{"width": 128}}, not {changes!r}.')


def plain(config: ConfigDict) -> dict[str, Any]:
  """Returns `config` as JSON gives it back, its keys in the order of writing: a ConfigDict sorts the keys it shows."""
  return json.loads(config.to_json())


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
  """Returns one text `key: old -> new` for each value that differs."""
  old, new = dict(_flat(old)), dict(_flat(new))
  return [f'{key}: {old.get(key, "absent")} -> {new.get(key, "absent")}'
          for key in sorted(old | new) if old.get(key, _flat) != new.get(key, _flat)]


def of_run(config: ConfigDict, run: str) -> dict[str, Any]:
  """Returns the part of `config` that decides the results of the run `run`, as JSON gives it back.

  The part has the run's own `recipe` and `model` in the place of all, and none of the keys in `FREE`. Two runs with
  equal parts end with equal weights, up to the rounding of sums on other devices.
  """
  written = plain(config)
  of_all, changes = written.pop('recipes'), written.pop('models')
  written |= {'recipe': of_all.get(run), 'model': {**written['model'], **changes.get(run, {})}}
  for key in FREE:
    *sections, last = key.split('.')
    functools.reduce(dict.__getitem__, sections, written).pop(last)
  return written


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
