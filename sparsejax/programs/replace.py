"""Gives other values to intermediates of a program: to those with a name, and to what parameters are multiplied by.

    def model(params, x):
      h = checkpoint_name(jnp.tanh(x @ params['up']), 'hidden')
      return h @ params['down']

    replace(model, {'hidden': jnp.zeros((8, 64))})(params, x)                  # a value
    replace(model, {('down', 0): lambda h: h * (abs(h) > 0.1)})(params, x)     # a function: first use of `down`
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from sparsejax import errors
from sparsejax.arguments import checked
from sparsejax.programs import jaxprs
from sparsejax.programs.evaluate import Operation, evaluate, rules_at
from sparsejax.programs.operands import Numbered, uses_by_address
from sparsejax.programs.tracing import Program, trace

Key = str | Numbered


@checked
def replace(apply: Callable[..., Any], values: Mapping[Key, Any]) -> Callable[..., Any]:
  """Returns a function like `apply` in which some intermediates have other values.

  A key of `values` is a name, as given by `jax.ad_checkpoint.checkpoint_name`, or `(path, number)`. `(path, number)`
  stands for the other operand of a product with the parameter at `path`; `number` is an index into
  `contractions(...).uses[path]`. The first argument of `apply` holds the parameters.
  A value is an array of the intermediate's shape and dtype, or a function that maps the intermediate to such an array.

  Loops stay loops: every round of a loop gets the same value, or calls the same function. A function with a derivative
  rule of its own computes with the new values, but its derivatives are those of the function without replacements.
  Raises `ValueError` for an unknown key, with the valid keys, for another shape or dtype, and for an intermediate
  inside of `shard_map`.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    program = trace(apply, args, kwargs)
    sites = _sites(program, values)

    def rule(eqn: Any, operands: list[Any], here: Operation) -> list[Any]:
      operands = list(operands)
      for key, i in sites[here.address].items():
        operands[i] = _replaced(key, values[key], operands[i], eqn)
      return here.dense(operands)

    return program.unflatten(evaluate(program, program.arrays, rules_at('replace', program, sites, rule)))

  return call


def _sites(program: Program, values: Mapping[Key, Any]) -> dict[jaxprs.Address, dict[Key, int]]:
  """Maps the address of each operation with a replaced operand to the keys and the numbers of these operands."""
  sites = {address: {name: 0} for address, eqn in jaxprs.equations(program) if (name := jaxprs.given_name(eqn))}
  for address, uses in uses_by_address(program).items():
    sites[address] = {key: 1 - use.operand for key, use in uses.items()}
  valid = {key for keys in sites.values() for key in keys}
  if unknown := [key for key in values if key not in valid]:
    raise errors.unknown('replace', 'intermediate', unknown[0], map(str, valid))
  sites = {address: {key: i for key, i in keys.items() if key in values} for address, keys in sites.items()}
  return {address: keys for address, keys in sites.items() if keys}


def _replaced(key: Key, value: Any, old: Any, eqn: Any) -> Any:
  new = value(old) if callable(value) else jnp.asarray(value)
  if (new.shape, new.dtype) != (old.shape, old.dtype):
    raise ValueError(f'replace: the value for {key!r} is {new.dtype}{list(new.shape)}, but the intermediate at '
                     f'{jaxprs.place(eqn)} is {old.dtype}{list(old.shape)}; give an array of this shape and dtype.')
  return new
