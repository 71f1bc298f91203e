"""Reads the values that options of the command `sparsejax` take.

    spellings.mesh('data=8,fsdp=32')     # {'data': 8, 'fsdp': 32}
    spellings.option('steps=100')        # ('steps', 100)
"""

import argparse
import ast
import inspect
import json
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def positive(text: str) -> int:
  """Returns the whole number that a text is, at least 1."""
  if not text.isdigit() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number, at least 1')
  return int(text)


def mesh(text: str, option: str = '--mesh', example: str = 'data=8,fsdp=32') -> dict[str, int]:
  """Returns the axes of a mesh, as in `data=8,fsdp=32`, with their lengths. `option`, `example`: for messages."""
  axes = [axis.partition('=') for axis in text.split(',')]
  if not all(name.isidentifier() and size.isdigit() and int(size) for name, _, size in axes):
    raise ValueError(f'{option} {text}: name each axis with its length, as in {example}.')
  if len({name for name, _, _ in axes}) != len(axes):
    raise ValueError(f'{option} {text}: two axes have one name.')
  return {name: int(size) for name, _, size in axes}


def option(text: str) -> tuple[str, object]:
  """Returns the name and the value of `name=value`: the value is a Python literal or else the text itself."""
  name, equals, value = text.partition('=')
  if not equals:
    raise ValueError(f'--set {text}: give NAME=VALUE.')
  try:
    literal = ast.literal_eval(value)
    json.dumps(literal)
    return name, literal
  except (ValueError, SyntaxError, TypeError):
    return name, value


def data(path: str) -> np.ndarray | str:
  """Returns the token ids of a file of NumPy, or the path itself of a text."""
  if not path.endswith('.npy'):
    return path
  try:
    with open(path, 'rb') as file:
      return np.lib.format.read_array(file, allow_pickle=False)
  except ValueError as error:
    raise ValueError(f'--data {path}: it is no array of numbers that NumPy saved ({error}).') from error


def required(function: Callable[..., Any]) -> list[str]:
  """Returns the names of the arguments that a function has no default of."""
  return [name for name, each in inspect.signature(function).parameters.items() if each.default is each.empty]


def function(text: str) -> Callable[..., Any]:
  """Returns the function that `MODULE:FUNCTION` names; a module is a dotted name, or the path of a Python file."""
  module, _, name = text.rpartition(':')
  try:
    names = runpy.run_path(module) if module.endswith('.py') else _run_module(module)
  except ImportError as error:
    raise ValueError(f'--apply {text}: {error}. Give MODULE:FUNCTION, or FILE.py:FUNCTION.') from error
  if not callable(names.get(name)):
    raise ValueError(f'--apply {text}: there is no function {name!r} in {module!r}. Give MODULE:FUNCTION.')
  return names[name]


def _run_module(name: str) -> dict[str, Any]:
  sys.path.insert(0, os.getcwd())  # A command, unlike `python -m`, does not look into its folder.
  try:
    return runpy.run_module(name)
  finally:
    sys.path.pop(0)
