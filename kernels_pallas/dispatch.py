"""Chooses which implementation of an op runs: by the platform when the program is lowered, or by name.

An op is a table that maps names to `Implementation`s. 'xla' is `reference.py` in the folder of the op, and every op has
it. 'dense' unpacks the weight inside of the program. 'mosaic_gpu' is `gpu.py` and 'mosaic_tpu' is `tpu.py`, both
written in Pallas.

    table = {'xla': Implementation(reference.matmul), 'mosaic_tpu': Implementation(tpu.matmul, tpu.refusal)}
    y = run('nm_matmul', (x, w), table, None, prefer)                                # or a name instead of None
    print(chosen((x, w), table, prefer))                                             # the choice of each platform
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sparsejax import errors, tables

PLATFORMS = {'cuda': 'mosaic_gpu', 'tpu': 'mosaic_tpu'}  # the kernel that only this platform can run; CPUs have none
NAMES = ('xla', 'dense', *PLATFORMS.values())  # the implementations of attention


class Implementation(NamedTuple):
  """An `Implementation` runs as `function(*args)`, if its shapes and dtypes allow.

  `refusal(*args)` returns why `function` cannot run these shapes and dtypes, with the remedy, or `None`.
  """

  function: Callable[..., Any]
  refusal: Callable[..., str | None] = lambda *args: None


class Choice(NamedTuple):
  """A `Choice` names the implementation that runs on a platform, and says why."""

  implementation: str
  reason: str


class Choices(dict):
  """`Choices` maps each platform to its `Choice`, and prints as a table."""

  def __str__(self) -> str:
    return tables.aligned(('platform', *Choice._fields), [(platform, *choice) for platform, choice in self.items()])


Table = Mapping[str, Implementation]


def run(op: str, args: tuple[Any, ...], table: Table, implementation: str | None, prefer: Callable[..., Choice]) -> Any:
  """Returns the result of `args` by the implementation of that name; `None` takes the choice of each platform.

  `op` is the name of the op for error messages, and `prefer` is as in `chosen`. Raises `ValueError` for an unknown
  name, and for an implementation that cannot run, with the reason and the names that can.
  """
  if implementation is not None:
    return table[runnable(op, args, table, implementation)].function(*args)
  choices = {platform: choice.implementation for platform, choice in chosen(args, table, prefer).items()}
  default = table[choices.pop('cpu')].function
  special = {platform: table[name].function for platform, name in choices.items() if name == PLATFORMS[platform]}
  # JAX traces the branches of other platforms, but does not lower them.
  return jax.lax.platform_dependent(*args, default=default, **special) if special else default(*args)


def chosen(args: tuple[Any, ...], table: Table, prefer: Callable[..., Choice]) -> Choices:
  """Returns what `implementation=None` runs on each platform.

  A platform runs its own kernel if the kernel can run `args`, and otherwise the choice of `prefer(*args)`. A gradient
  whose table lacks this choice runs the first implementation of its table.
  """
  choices = Choices(cpu=prefer(*args))
  if choices['cpu'].implementation not in table:
    first, choice = next(iter(table)), choices['cpu']
    choices['cpu'] = Choice(first, f'{choice.reason}; this direction has no {choice.implementation}')
  for platform, kernel in PLATFORMS.items():
    why = table[kernel].refusal(*args) if kernel in table else 'this op has no kernel for it'
    choices[platform] = (Choice(kernel, 'its own kernel can run this') if why is None
                         else Choice(choices['cpu'].implementation, f'not {kernel}: {why}'))
  return choices


def folding(function: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
  """Returns `function(x, w)` with a batching rule: `vmap` over x alone makes M longer.

  `x` is a pytree of arrays `[M, ...]`. A batched kernel would read `w` again for each x of the batch.
  """
  folded = jax.custom_batching.custom_vmap(function)

  @folded.def_vmap
  def rule(size, batched, x, w):
    if all(jax.tree.leaves(batched[0])) and not any(jax.tree.leaves(batched[1])):
      y = folded(jax.tree.map(lambda a: a.reshape(size * a.shape[1], *a.shape[2:]), x), w)
      return y.reshape(size, -1, *y.shape[1:]), True
    axes = [jax.tree.map(lambda b: 0 if b else None, part) for part in batched]
    return jax.vmap(function, axes, 0, axis_size=size)(x, w), True

  return folded


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the arrays, each marked as varying over every mesh axis that any of them varies over.

  Within `shard_map`, the gradients of the arrays then vary over these axes too. Elsewhere, nothing changes.
  """
  own = [jax.typeof(a).manual_axis_type.varying for a in arrays]
  missing = [frozenset().union(*own) - axes for axes in own]
  return tuple(jax.lax.pcast(a, tuple(axes), to='varying') if axes else a for a, axes in zip(arrays, missing))


def refuse_other_names(function: str, implementation: str | None) -> None:
  """Raises `ValueError` for a name that no implementation of attention has, before any program is there."""
  if implementation is not None and implementation not in NAMES:
    raise errors.unknown(function, 'implementation', implementation, ['None', *NAMES])


def runnable(op: str, args: tuple[Any, ...], table: Table, implementation: str) -> str:
  """Returns the name `implementation` if it can run `args` here; raises `ValueError` otherwise, with those that can."""
  if implementation not in table:
    raise errors.unknown(op, 'implementation', implementation, ['None', *table])
  if (why := _unable(args, table, implementation)) is not None:
    able = [name for name in table if _unable(args, table, name) is None]
    raise ValueError(f'{op}: implementation {implementation!r} cannot run this: {why}. {errors.some(able)} can; None '
                     'chooses.')
  return implementation


def _unable(args: tuple[Any, ...], table: Table, name: str) -> str | None:
  """Returns why the implementation `name` cannot run `args` on the default device, or `None`."""
  backend = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  others = [platform for platform, kernel in PLATFORMS.items() if kernel == name and platform != backend]
  return f'it is for {others[0]}, and the default device is {backend}' if others else table[name].refusal(*args)
