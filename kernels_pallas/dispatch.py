"""Which implementation of an op runs: chosen by the platform when the program is lowered, by name, or explained.

An op is a table of `Implementation`s by name. `reference.py` of its folder is 'xla' and always there; 'dense' unpacks
the weight inside of the program; `gpu.py` is 'mosaic_gpu' and `tpu.py` 'mosaic_tpu', both written in Pallas.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sparsejax import errors

NAMES = ('xla', 'dense', 'mosaic_gpu', 'mosaic_tpu')
PLATFORMS = {'cpu': None, 'cuda': 'mosaic_gpu', 'tpu': 'mosaic_tpu'}  # the kernel that a platform alone can run


class Implementation(NamedTuple):
  """`function(*args)` runs it. `refusal(*args)` is why shapes and dtypes keep it from running, and the remedy."""

  function: Callable[..., Any]
  refusal: Callable[..., str | None] = lambda *args: None


class Choice(NamedTuple):
  """What runs on a platform, and why that."""

  implementation: str
  reason: str


class Explanation(dict):
  """`Choice`s by platform; prints as a table."""

  def __str__(self) -> str:
    width = max(map(len, self), default=0)
    return '\n'.join(f'{platform:{width}}  {choice.implementation:10}  {choice.reason}'
                     for platform, choice in self.items())


Prefer = Callable[..., Choice]


def run(op: str, args: tuple[Any, ...], table: Mapping[str, Implementation], implementation: str | None,
        prefer: Prefer) -> Any:
  """`args` through the implementation of that name, or, for `None`, through what `chosen` gives for the platform.

  Raises `ValueError` for a name that there is not or that cannot run, with why and with those that can.
  """
  if implementation is not None:
    return table[named(op, args, table, implementation)].function(*args)
  choices = {platform: choice.implementation for platform, choice in chosen(args, table, prefer).items()}
  default = table[choices.pop('cpu')].function
  special = {platform: table[name].function for platform, name in choices.items() if name == PLATFORMS[platform]}
  # Branches of other platforms are traced, not lowered.
  return jax.lax.platform_dependent(*args, default=default, **special) if special else default(*args)


def chosen(args: tuple[Any, ...], table: Mapping[str, Implementation], prefer: Prefer) -> Explanation:
  """What `implementation=None` runs on each platform: its own kernel if that can, else what `prefer(*args)` says."""
  found = Explanation(cpu=prefer(*args))
  for platform, kernel in PLATFORMS.items():
    if kernel is None:
      continue
    why = table[kernel].refusal(*args) if kernel in table else 'this op has no kernel for it'
    found[platform] = (Choice(kernel, 'its own kernel can run this') if why is None
                       else Choice(found['cpu'].implementation, f'not {kernel}: {why}'))
  return found


def folding(function: Callable[[jax.Array, Any], jax.Array]) -> Callable[[jax.Array, Any], jax.Array]:
  """`function(x, w)`, x `[M, ...]`, for which `vmap` over x makes M longer: a batched kernel would read w again."""
  whole = jax.custom_batching.custom_vmap(function)

  @whole.def_vmap
  def rule(size, batched, x, w):
    if batched[0] and not any(jax.tree.leaves(batched[1])):
      y = whole(x.reshape(size * x.shape[1], *x.shape[2:]), w)
      return y.reshape(size, -1, *y.shape[1:]), True
    along = [jax.tree.map(lambda b: 0 if b else None, part) for part in batched]
    return jax.vmap(function, along, 0, axis_size=size)(x, w), True

  return whole


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Within `shard_map`, all of them varying over the devices' axes over which one does; so do then their gradients."""
  own = [jax.typeof(a).manual_axis_type.varying for a in arrays]
  missing = [frozenset().union(*own) - axes for axes in own]
  return tuple(jax.lax.pcast(a, tuple(axes), to='varying') if axes else a for a, axes in zip(arrays, missing))


def named(op: str, args: tuple[Any, ...], table: Mapping[str, Implementation], implementation: str) -> str:
  """The name, if that implementation can run here; raises `ValueError` otherwise."""
  if implementation not in table:
    raise errors.unknown(op, 'implementation', implementation, ['None', *table])
  if (why := _unable(args, table, implementation)) is not None:
    able = [name for name in table if _unable(args, table, name) is None]
    raise ValueError(f'{op}: implementation {implementation!r} cannot run this: {why}. {errors.some(able)} can; None '
                     'chooses.')
  return implementation


def _unable(args: tuple[Any, ...], table: Mapping[str, Implementation], name: str) -> str | None:
  """Why the implementation of this name cannot run these `args` here."""
  here = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  away = [platform for platform, kernel in PLATFORMS.items() if kernel == name and platform != here]
  return f'it is for {away[0]}, and the default device is {here}' if away else table[name].refusal(*args)
