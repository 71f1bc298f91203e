"""Where: the paths, predicates and axes of a pytree's leaves. The only module that knows a leaf can stay dense.

A path is the leaf's keys joined by `/`, the same string for dicts, NNX States, Equinox modules, NamedTuples and lists:
`blocks_0/mlp/Dense_0/kernel`, `layers/3/weight`. A dense leaf's place in masks and masters is held by
`optax.MaskedNode()`, a node without leaves, so that it costs nothing and every optax tool knows it.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import errors
from sparsejax.types import Array, Axes, Predicate, PyTree

DENSE = optax.MaskedNode()

# Parameters of rank two and more that are no matrices: biases of DenseGeneral, stacked norms, lookup tables.
_NOT_MATRICES = re.compile(
    r'(^|.*/)(bias\w*|b|scale|offset|gamma|beta)$|.*(embed|norm|pos_enc|cls_token).*', re.IGNORECASE)


def is_dense(node: Any) -> bool:
  """Is this the placeholder of a leaf that stays dense?"""
  return isinstance(node, optax.MaskedNode)


def path_name(keys: tuple[Any, ...]) -> str:
  """The keys of `jax.tree_util`'s paths as `a/b/0/kernel`. NNX's closing `.value` says nothing and is left out."""
  if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in ('value', 'raw_value'):
    keys = keys[:-1]
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in keys)


def flatten(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[str], list[Any], Any]:
  """Paths, leaves and treedef of `tree`, in `jax.tree` order."""
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [path_name(keys) for keys, _ in with_paths], [leaf for _, leaf in with_paths], treedef


@functools.lru_cache(maxsize=4096)
def _regex(glob: str) -> re.Pattern[str]:
  words = {'**/': '(?:[^/]+/)*', '**': '.*', '*': '[^/]*', '?': '[^/]'}
  parts = re.split(r'(\*\*/|\*\*|\*|\?)', glob.strip('/'))
  return re.compile('(?:.*/)?' + ''.join(words.get(part, re.escape(part)) for part in parts))


def matches(glob: str, path: str) -> bool:
  """Does `glob` match `path` or its tail? `*` stays within one key, `**` crosses keys, `?` is one character."""
  return _regex(glob).fullmatch(path) is not None


def named(*globs: str) -> Predicate:
  """Leaves whose path, or the tail of it, matches one of `globs`: `named('mlp/*/kernel')`."""
  return lambda path, leaf: any(matches(glob, path) for glob in globs)


def matrices(path: str, leaf: Array) -> bool:
  """The default: floating leaves of rank two and more, except biases, norms and embeddings by their names."""
  return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and not _NOT_MATRICES.fullmatch(path)


def all_but(*globs: str, where: Predicate = matrices) -> Predicate:
  """The leaves of `where` except those that match: `all_but('patch/kernel', 'head/kernel')` for first and last."""
  dense = named(*globs)
  return lambda path, leaf: where(path, leaf) and not dense(path, leaf)


def select(function: str, where: Predicate | PyTree, tree: PyTree) -> list[bool]:
  """Which leaves `where` picks: a predicate `(path, leaf) -> bool`, or a pytree of bools that is a prefix of `tree`.

  Raises `ValueError` if it picks none, naming the paths there are, and if it is neither predicate nor such a prefix.
  """
  names, leaves, _ = flatten(tree)
  picked = [bool(where(*at)) for at in zip(names, leaves)] if callable(where) else _prefixed(function, where, tree)
  if not any(picked):
    raise ValueError(f'{function}: `where` picks no parameter. Paths look like {errors.some(names)}; '
                     "match them with trees.named('tail/of/path'), * for one key and ** for several.")
  for name, leaf, pick in zip(names, leaves, picked):
    if pick and not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise errors.at_leaf(function, name, leaf.shape, f'dtype {leaf.dtype} is not floating; leave it out of `where`.')
  return picked


def _prefixed(function: str, where: PyTree, tree: PyTree) -> list[bool]:
  """One bool for each leaf of `tree`, from a prefix of it. A glob is refused: it would count as true everywhere."""
  for value in jax.tree.leaves(where):
    if not isinstance(value, (bool, np.bool_)):
      raise ValueError(f'{function}: `where` holds {value!r}, which is no bool; '
                       f'match paths with trees.named({value!r}).')
  try:
    return [bool(value) for value in jax.tree.leaves(jax.tree.broadcast(where, tree))]
  except ValueError as error:
    raise ValueError(f'{function}: `where` is a pytree, but no prefix of the parameters; give it their structure, or a '
                     f'predicate such as trees.named(...). {error}') from error


def per_leaf(function: str, what: str, value: Any, paths: list[str]) -> list[Any]:
  """One value per path: `value` itself, or, from a dict of globs, that of the first glob that matches.

  Raises `ValueError` for a path that no glob covers and for a glob that covers no path.
  """
  if not isinstance(value, Mapping):
    return [value] * len(paths)
  for glob in value:
    if not any(matches(glob, path) for path in paths):
      raise errors.unknown(function, f'path in `{what}`', glob, paths)
  uncovered = [path for path in paths if not any(matches(glob, path) for glob in value)]
  if uncovered:
    raise ValueError(f'{function}: `{what}` says nothing about {errors.some(uncovered)}; '
                     "add a last entry '**' for the rest.")
  return [next(value[glob] for glob in value if matches(glob, path)) for path in paths]


def conventional_axes(path: str, shape: tuple[int, ...]) -> Axes:
  """The axes of a leaf by the conventions of Flax, Haiku and Equinox, for when no program has been traced.

  `weight` (Equinox) is `[out, in, *spatial]`. `query|key|value/kernel` is `[*layer, in, heads, head_dim]` and
  `out/kernel` with three axes and more `[*layer, heads, head_dim, out]` (Flax attention). Everything else is
  `[*leading, in, out]`, where the leading axes are taps under a name with `conv` in it or with rank four or five, and
  layers otherwise. N:M groups come out the same either way.
  """
  rank, keys = len(shape), path.split('/')
  parent = keys[-2].lower() if len(keys) > 1 else ''
  if rank < 2:
    return Axes(contracted=(), output=tuple(range(rank)))
  if keys[-1] == 'weight':
    return Axes(contracted=(1,), output=(0,), spatial=tuple(range(2, rank)))
  if rank >= 3 and parent in ('query', 'key', 'value'):
    return Axes(contracted=(rank - 3,), output=(rank - 2, rank - 1), layer=tuple(range(rank - 3)))
  if rank >= 3 and parent == 'out':
    return Axes(contracted=(rank - 3, rank - 2), output=(rank - 1,), layer=tuple(range(rank - 3)))
  leading = tuple(range(rank - 2))
  spatial, layer = (leading, ()) if 'conv' in path.lower() or rank in (4, 5) else ((), leading)
  return Axes(contracted=(rank - 2,), output=(rank - 1,), spatial=spatial, layer=layer)


def tails(path: str, names: Iterable[str]) -> list[str]:
  """Those of `names` that name the same leaf as `path`: itself, or else those of which one is the other's tail."""
  found = [name for name in names if name == path or name.endswith('/' + path) or path.endswith('/' + name)]
  return [path] if path in found else found


def axes_of(function: str, axes: Mapping[str, Axes] | None, path: str, shape: tuple[int, ...]) -> Axes:
  """The axes of one leaf: from the traced program if there is one, else by `conventional_axes`.

  The traced tree and the optimizer's may differ in what is above the parameters (`params/...`), so paths match if one
  is the tail of the other. Raises `ValueError` if the program does not contract the leaf, or if two traced paths fit.
  """
  if axes is None:
    return conventional_axes(path, shape)
  found = tails(path, axes)
  if len(found) != 1:
    problem = f'fits {errors.some(found)}' if found else f'is none of {errors.some(axes)}'
    raise errors.at_leaf(function, path, shape, f'its axes are not in `axes`: the path {problem}. '
                         'Trace a program that uses it in one contraction, or leave it out of `where`.')
  found_axes = Axes(*axes[found[0]])
  if sorted(sum(found_axes[:4], ())) != list(range(len(shape))):
    raise errors.at_leaf(function, path, shape, f'the traced axes {found_axes} are of another shape; trace again.')
  return found_axes


def fill_dense(tree: PyTree, other: PyTree) -> PyTree:
  """`tree` with `other`'s leaves in its dense places."""
  leaves, treedef = jax.tree.flatten(tree, is_leaf=is_dense)
  return treedef.unflatten([o if is_dense(leaf) else leaf for leaf, o in zip(leaves, treedef.flatten_up_to(other))])
