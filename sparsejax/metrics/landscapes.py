"""Measures the loss around a model, layer by layer: barriers between two models, and sharpness.

    heights = layer_barriers(loss, a, b)                       # {'mlp/kernel': Barrier(height, alpha, losses), ...}
    stragglers = [path for path, barrier in heights.items() if barrier.height > 0.1]
    sharpness(loss, a, 0.05, jax.random.key(0))['mlp/kernel']
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, globs, trees
from sparsejax.arguments import checked
from sparsejax.metrics.models import pairs
from sparsejax.types import Array, PyTree

__all__ = ['Barrier', 'barrier', 'layer_barriers', 'sharpness']

_POINTS = 2**24  # steps of equal size from 0 to 1 that float32 tells apart

Groups = Mapping[str, Sequence[str]]


class Barrier(NamedTuple):
  """A `Barrier` is the loss barrier between two models, in `float32`.

  `height` is the barrier, and `alpha` its place on the line, which is 0 at `a` and 1 at `b`. `losses`, of shape
  `[points]`, holds the losses on the line from `a` to `b`.
  """

  height: Array
  alpha: Array
  losses: Array


@checked
def barrier(loss: Callable[[PyTree], Array], a: PyTree, b: PyTree, points: int = 11) -> Barrier:
  """Returns how far `loss` rises above the chord, at most, on the straight line from parameters `a` to `b`.

  The height is the maximum, over alpha, of

      loss((1 - alpha) a + alpha b) - ((1 - alpha) loss(a) + alpha loss(b))

  for `points` values of alpha, evenly spaced from 0 to 1. The height is at least 0, and is 0 if `loss` is convex on the
  line. A barrier of about 0 is called linear mode connectivity (Frankle et al. 2020). Frankle et al. subtract the mean
  of the two end losses; `barrier` subtracts the chord (Entezari et al. 2022), which is the same for equal end losses.
  Among equal heights `alpha` is the first. The height is NaN if any loss is NaN, or if the loss of an end is infinite.

  A weight is zero on the line only if it is zero in both `a` and `b`. Models between two different masks are therefore
  denser than both ends. Losses are computed one after the other, in the memory of one more model.
  """
  if not 2 <= points <= _POINTS:
    raise ValueError(f'metrics.barrier: points={points}; the two ends alone are 2 points, and float32 has no more than '
                     f'{_POINTS:,} points of equal distance from 0 to 1. The default is 11.')
  leaves, structure = pairs('barrier', a, b), jax.tree.structure(a)
  for path, x, _ in leaves:
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      raise errors.at_leaf('metrics.barrier', path, jnp.shape(x), f'dtype {jnp.result_type(x)} has no points between; '
                           'give only the parameters, and let `loss` hold the rest.')

  def between(alpha: Array) -> Array:
    value = loss(structure.unflatten([_between(alpha, jnp.asarray(x), jnp.asarray(y)) for _, x, y in leaves]))
    if jnp.ndim(value):
      raise ValueError(f'metrics.barrier: `loss` gives shape {jnp.shape(value)}; it must give a scalar.')
    return jnp.asarray(value).astype(jnp.float32)

  alphas = jnp.linspace(0, 1, points, dtype=jnp.float32)
  losses = jax.lax.map(between, alphas)
  heights = losses - ((1 - alphas) * losses[0] + alphas * losses[-1])
  highest = jnp.argmax(heights)
  return Barrier(heights[highest], alphas[highest], losses)


def _between(alpha: Array, x: Array, y: Array) -> Array:
  wide = x.dtype if x.dtype.itemsize >= 4 else jnp.float32  # bfloat16 rounds alpha to 8 bits
  alpha = alpha.astype(wide)
  return ((1 - alpha) * x.astype(wide) + alpha * y.astype(wide)).astype(x.dtype)


@checked
def layer_barriers(loss: Callable[[PyTree], Array], a: PyTree, b: PyTree, groups: Groups | None = None,
                   points: int = 11) -> dict[str, Barrier]:
  """Returns the `Barrier` of each group of leaves, which move from `a` to `b` while all other leaves stay at `a`.

  Layer-wise linear mode connectivity (Adilova et al. 2024). `groups` maps a name to globs of leaves. Without groups
  each floating leaf is a group. A height is that of `metrics.barrier`, above the chord. Statistics of batch norm stay
  as they are. Raises `ValueError` for a glob that matches no leaf.
  """
  paths, _, treedef = trees.flatten(a)
  first, last = treedef.flatten_up_to(a), treedef.flatten_up_to(b)
  found = {}
  for name, members in _members('layer_barriers', paths, first, groups).items():
    mixed = [new if path in members else old for path, old, new in zip(paths, first, last)]
    found[name] = barrier(loss, a, treedef.unflatten(mixed), points)
  return found


@checked
def sharpness(loss: Callable[[PyTree], Array], params: PyTree, rho: float, key: Array, groups: Groups | None = None, *,
              samples: int = 8, worst: int = 0) -> dict[str, Array]:
  """Returns how much the loss rises, `float32[]` for each group, if weights move by a fraction `rho` of themselves.

  The result is the mean over `samples` normal draws z of `loss(w + rho |w| z) - loss(w)`. A weight of zero stays zero,
  so that the sharpness is that of the sparse model. With `worst` steps, the result is the largest rise on the way of
  signed gradient ascent from w; a step is `rho / worst` of |w| long. The scale
  of |w| makes the number independent of how two layers share a factor (Kwon et al. 2021, ASAM). The norm in the
  paper on CLIP's interpolation could not be read, so that this definition is ours. `groups`: see `layer_barriers`.
  """
  paths, leaves, treedef = trees.flatten(params)
  base = jnp.asarray(loss(params), jnp.float32)
  found = {}
  for number, (name, members) in enumerate(_members('sharpness', paths, leaves, groups).items()):
    own = [i for i, path in enumerate(paths) if path in members]

    def moved(parts: list[Array], own: list[int] = own) -> Array:
      placed = dict(zip(own, parts))
      return jnp.asarray(loss(treedef.unflatten([placed.get(i, w) for i, w in enumerate(leaves)])), jnp.float32)

    weights = [leaves[i] for i in own]
    if worst:
      found[name] = _ascended(moved, weights, rho, worst) - base
    else:
      keys = jax.random.split(jax.random.fold_in(key, number), samples)
      found[name] = jnp.mean(jax.lax.map(lambda key, f=moved, ws=weights: f(_perturbed(ws, rho, key)), keys)) - base
  return found


def _perturbed(weights: Sequence[Array], rho: float, key: Array) -> list[Array]:
  keys = jax.random.split(key, len(weights))
  return [w + (rho * jnp.abs(w) * jax.random.normal(k, w.shape, w.dtype)).astype(w.dtype)
          for k, w in zip(keys, weights)]


def _ascended(loss: Callable[[list[Array]], Array], weights: list[Array], rho: float, steps: int) -> Array:
  """Returns the largest loss on the way of signed gradient ascent; each step is `rho / steps` of |w| long."""
  def step(carry: tuple[list[Array], Array], _: None) -> tuple[tuple[list[Array], Array], None]:
    now, most = carry
    slopes = jax.grad(loss)(now)
    now = [x + (rho / steps * jnp.abs(w) * jnp.sign(g)).astype(w.dtype) for x, w, g in zip(now, weights, slopes)]
    return (now, jnp.maximum(most, loss(now))), None

  return jax.lax.scan(step, (weights, loss(weights)), None, steps)[0][1]


def _members(function: str, paths: Sequence[str], leaves: Sequence[Array], groups: Groups | None
             ) -> dict[str, set[str]]:
  """Returns the paths of the leaves of each group. Raises `ValueError` for a glob that matches none."""
  floating = [path for path, w in zip(paths, leaves) if jnp.issubdtype(jnp.result_type(w), jnp.floating)]
  if groups is None:
    return {path: {path} for path in floating}
  for each in (glob for members in groups.values() for glob in members):
    if not any(globs.matches(each, path) for path in floating):
      raise errors.unknown(f'metrics.{function}', 'path in `groups`', each, floating)
  return {name: {path for path in floating if any(globs.matches(each, path) for each in members)}
          for name, members in groups.items()}
