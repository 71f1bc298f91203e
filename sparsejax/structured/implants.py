"""Splits filters that are left with their centre from the others, so that they cost a 1 x 1 convolution: HAP's implant.

    selection = implanted(found, 0.5, 0.1)                # a tenth of what would go keeps a centre
    small = cut(found, params)
    split = split_centers(small.apply, small.params, x)
    y = split.apply(split.params, x)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, saliences, trees, updates
from sparsejax.arguments import checked
from sparsejax.programs import jaxprs, sizes
from sparsejax.programs.contractions import read
from sparsejax.programs.evaluate import ValueRules, evaluate
from sparsejax.programs.operands import uses_by_address
from sparsejax.programs.tracing import trace
from sparsejax.saliences import Salience
from sparsejax.selections import Selection
from sparsejax.structured.groups import Groups
from sparsejax.structured.selecting import chooser
from sparsejax.types import Array, PyTree, Signals
from sparsejax.units import PRODUCED, Places

FULL, CENTER, ORDER = 'full', 'center', 'order'


class Implanted(NamedTuple):
  """An `Implanted` is a model whose filters with a centre alone are 1 x 1 convolutions.

  In `params`, a kernel with such filters is a dict of the full filters, the centres, and the order of the outputs.
  `filters` maps paths of kernels to the number of implants.
  """

  params: PyTree
  apply: Callable[..., Any]
  filters: dict[str, int]


@checked
def implanted(groups: Groups, sparsity: float, implants: float, *, score: Salience = saliences.mean_magnitude,
              budget: Any = None, multiple_of: int = 1) -> Selection:
  """Returns the selection in which a part of the units that would go keeps the centre of their filters (HAP, 2022).

  Of the units that `grouped` prunes, the fraction `implants` with the largest score is not pruned: kernels of
  convolutions with several taps keep the centre tap of such units, and other members keep all (Yu et al., section 3).
  """
  if not 0 <= implants < 1:
    raise ValueError(f'structured.implanted: `implants` is the fraction of the pruned units that keep a centre, from 0 '
                     f'to below 1, not {implants!r}.')
  make = lambda share, budget: chooser(groups, share, budget, score, updates.reselect, None, False, multiple_of, ())
  every = make(sparsity, budget)
  if not implants:
    return Selection(every.plan, every.select)
  centers = {path: jnp.asarray(mask) for path, mask in _centers(groups).items()}

  def select(leaves: Any, weights: list[Array], masks: list[Array], signals: list[Signals]) -> Any:
    places = Places.of(every.groups, {leaf.path: w for leaf, w in zip(leaves, weights)})
    alive = places.alive(masks)
    whole = every.keep(places, weights, alive, signals)
    real = jnp.asarray(places.real)
    ranks = jnp.where(real & ~whole, every.score(saliences.Units(places, weights, signals)), -jnp.inf)
    gone = jnp.sum(real & ~whole).astype(jnp.float32)
    place = jnp.argsort(jnp.argsort(-ranks.reshape(-1), stable=True), stable=True).reshape(ranks.shape)
    kept = whole | real & ~whole & (place < jnp.round(gone * implants).astype(place.dtype))
    both = zip(places.paths, places.masks(kept), places.spread(whole, (PRODUCED,), outside=True))
    return [mask if path not in by_tail or full is None else mask & (full | by_tail[path])
            for by_tail in [_tails(centers, places.paths)] for path, mask, full in both], None

  return Selection(every.plan, select)


def _tails(centers: dict[str, Array], paths: tuple[str, ...]) -> dict[str, Array]:
  """Maps the path of each leaf that is the tail of a kernel's path to the mask of the kernel's centre."""
  return {leaf: mask for path, mask in centers.items() for leaf in paths if path == leaf or path.endswith(f'/{leaf}')}


def _centers(groups: Groups) -> dict[str, np.ndarray]:
  """Maps the path of each kernel of several taps to the mask of its centre, shaped to broadcast against the kernel."""
  found = read(trace(groups.apply, (groups.shapes, *groups.inputs)))
  masks: dict[str, np.ndarray] = {}
  for path, axes in found.axes.items():
    shape = found.shapes[path]
    if any(shape[a] > 1 for a in axes.spatial):
      center = [(np.arange(n) == (n - 1) // 2) if a in axes.spatial else np.ones(n, bool) for a, n in enumerate(shape)]
      masks[path] = _outer(center)
  return masks


def _outer(parts: list[np.ndarray]) -> np.ndarray:
  mask = np.ones((1,) * len(parts), bool)
  for axis, part in enumerate(parts):
    if not part.all():
      mask = mask & part.reshape([-1 if a == axis else 1 for a in range(len(parts))])
  return mask


@checked
def split_centers(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> Implanted:
  """Returns the model with a convolution of one tap for the filters that are zero beside their centre.

  `params` are concrete. A kernel without such filters stays, and so does one whose convolution has feature groups or
  that is used otherwise. The function traces `apply` anew in each call. The results are those of `apply`, in another
  order of sums.
  """
  program = trace(apply, (params, *inputs))
  paths, leaves, treedef = trees.flatten(params)
  arguments.refuse_unknown('structured.split_centers', {p: x for p, x in zip(paths, leaves) if hasattr(x, 'shape')})
  found, split = dict(zip(paths, leaves)), _kernels(program)
  centers = {path: _only_center(np.asarray(found[path]), *kernel) for path, kernel in split.items()}
  filters = {path: own for path, own in centers.items() if own.any() and not own.all()}
  for path, centre in filters.items():
    axis, taps = split[path]
    middle = tuple(slice((n - 1) // 2, (n + 1) // 2) if a in taps else slice(None)
                   for a, n in enumerate(found[path].shape))
    take = lambda w, own, axis=axis: jnp.take(w, np.flatnonzero(own), axis)
    order = np.argsort(np.argsort(centre, kind='stable'))
    found[path] = {FULL: take(found[path], ~centre), CENTER: take(found[path][middle], centre),
                   ORDER: jnp.asarray(order, jnp.int32)}
  made = _split_apply(apply, {path: split[path][0] for path in filters})
  return Implanted(treedef.unflatten(list(found.values())), made, {path: int(c.sum()) for path, c in filters.items()})


def _kernels(program: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
  """Maps the path of each kernel that plain convolutions take to its axis of outputs, and to those of its taps."""
  equations, found = dict(jaxprs.equations(program)), {}
  for path, uses in read(program).uses.items():
    eqns = [equations[use.address] for use in uses]
    if all(map(_is_plain, eqns, uses)):
      numbers = jaxprs.convolution(eqns[0])
      found[path] = numbers.rhs[0], numbers.rhs[2:]
  return found


def _is_plain(eqn: Any, use: Any) -> bool:
  """Returns whether a use is a convolution without groups of the whole kernel, outside of loops."""
  if eqn.primitive.name != 'conv_general_dilated' or use.operand != 1 or use.view.loops or use.axes is None:
    return False
  numbers = jaxprs.convolution(eqn)
  return numbers.groups == numbers.batch_groups == 1 and use.axes.output == numbers.rhs[:1] and (
    use.axes.contracted == numbers.rhs[1:2])


def _only_center(w: np.ndarray, axis: int, taps: tuple[int, ...]) -> np.ndarray:
  """Returns which outputs have a centre tap and nothing beside it, `bool[outputs]`; none if there is a single tap."""
  rest = tuple(a for a in range(w.ndim) if a != axis)
  center = _outer([np.arange(n) == (n - 1) // 2 if a in taps else np.ones(n, bool) for a, n in enumerate(w.shape)])
  return ~np.any(np.where(center, 0, w) != 0, rest) & np.any(w != 0, rest) & any(w.shape[a] > 1 for a in taps)


def _split_apply(apply: Callable[..., Any], outputs: dict[str, int]) -> Callable[..., Any]:
  is_split = lambda node: isinstance(node, dict) and set(node) == {FULL, CENTER, ORDER}

  def call(params: PyTree, *inputs: Any) -> Any:
    parts = {}

    def whole(path: str, node: Any) -> Any:
      if path not in outputs:
        return node
      parts[path] = node
      full, center = node[FULL], node[CENTER]
      shape = [n + center.shape[a] * (a == outputs[path]) for a, n in enumerate(full.shape)]
      return jax.ShapeDtypeStruct(tuple(shape), full.dtype)

    paths, nodes, treedef = trees.flatten(params, is_leaf=is_split)
    program = trace(apply, (treedef.unflatten([whole(*pair) for pair in zip(paths, nodes)]), *inputs))
    sites = {address: next(iter(uses))[0] for address, uses in uses_by_address(program).items()
             if next(iter(uses))[0] in parts}

    def rule(eqn: Any, values: list[Any], here: Any) -> Any:
      node = parts.get(sites.get(here.address, ''))
      return None if node is None else [_convolved(eqn, values[0], node)]

    # The large kernels are never made: the sites alone read them.
    arrays = [jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x for x in program.arrays]
    return program.unflatten(evaluate(program, arrays, ValueRules(rule)))

  return call


def _convolved(eqn: Any, x: Array, node: Any) -> Array:
  axis = jaxprs.convolution(eqn).out[1]
  both = [sizes.with_kernel(eqn, x, node[FULL]), sizes.at_center(eqn, x, node[CENTER])]
  return jnp.take(jnp.concatenate(both, axis), node[ORDER], axis)
