"""Names the leaves of a pytree by paths, says which leaves are sparse (`where`), and finds the axes of a leaf.

A path joins the keys of a leaf by `/`, for example `blocks_0/mlp/Dense_0/kernel` or `layers/3/weight`. Dicts, NNX
States, Equinox modules, NamedTuples and lists all give such paths. In trees of masks and masters, `DENSE` holds the
place of a leaf that stays dense. `DENSE` is `optax.MaskedNode()`, a node without leaves, which takes no memory and
which every tool of optax understands.

    where = trees.all_but('head/kernel')                             # the default, without the last layer
    where = trees.named('mlp/*/kernel')                              # by globs
    where = lambda path, leaf: leaf.ndim == 2 and leaf.size > 10_000
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import conventions, errors
from sparsejax.types import Array, Axes, Predicate, PyTree

DENSE = optax.MaskedNode()


def is_dense(node: Any) -> bool:
  """Returns whether `node` is the placeholder of a leaf that stays dense."""
  return isinstance(node, optax.MaskedNode)


def path_name(keys: tuple[Any, ...]) -> str:
  """Returns the path, such as `a/b/0/kernel`, for `keys` of `jax.tree_util`; the last `.value` of NNX is left out."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in _own(keys))


def _own(keys: tuple[Any, ...]) -> tuple[Any, ...]:
  """Returns the keys without the last `.value` of NNX."""
  held = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in ('value', 'raw_value')
  return keys[:-1] if held else keys


def flatten(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[str], list[Any], Any]:
  """Returns the paths, the leaves and the treedef of `tree`, in the order of `jax.tree`."""
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [path_name(keys) for keys, _ in with_paths], [leaf for _, leaf in with_paths], treedef


@functools.lru_cache(maxsize=4096)
def _regex(glob: str) -> re.Pattern[str]:
  words = {'**/': '(?:[^/]+/)*', '**': '.*', '*': '[^/]*', '?': '[^/]'}
  parts = re.split(r'(\*\*/|\*\*|\*|\?)', glob.strip('/'))
  return re.compile('(?:.*/)?' + ''.join(words.get(part, re.escape(part)) for part in parts))


def matches(glob: str, path: str) -> bool:
  """Returns whether `glob` matches `path` or a tail of `path` that begins at a key.

  `*` matches any characters of one key, `**` any number of keys, and `?` one character of a key.
  """
  return _regex(glob).fullmatch(path) is not None


def named(*globs: str) -> Predicate:
  """Returns the predicate of all leaves whose path, or a tail of the path, matches one of `globs`; see `matches`."""
  return lambda path, leaf: any(matches(glob, path) for glob in globs)


def places(tree: PyTree) -> dict[str, conventions.Place]:
  """Maps the path of each leaf of `tree` that has a shape to its `Place`: keys, container and siblings."""
  leaves = [(_own(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if hasattr(leaf, 'shape')]
  names = [conventions.keys_of(path_name(keys)) for keys, _ in leaves]
  siblings: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
  for name, (_, leaf) in zip(names, leaves):
    siblings.setdefault(name[:-1], {})[name[-1]] = tuple(leaf.shape)
  found = {}
  for name, (keys, leaf) in zip(names, leaves):
    attribute = bool(keys) and isinstance(keys[-1], jax.tree_util.GetAttrKey)
    module, taps = conventions.module_of(_container(tree, keys) if attribute else None)
    found[path_name(keys)] = conventions.Place(name, tuple(leaf.shape), siblings[name[:-1]], module, attribute, taps)
  return found


def _container(tree: PyTree, keys: tuple[Any, ...]) -> Any:
  """Returns the node of `tree` that holds the leaf at `keys`, or `None` if the keys do not lead there."""
  for key in keys[:-1]:
    try:
      tree = getattr(tree, key.name) if hasattr(key, 'name') else tree[key.idx if hasattr(key, 'idx') else key.key]
    except (AttributeError, IndexError, KeyError, TypeError):
      return None
  return tree


def matrices(path: str, leaf: Array) -> bool:
  """Returns whether a leaf is sparse by default.

  A floating leaf is sparse if two of its axes and more are longer than one, except lookup tables, norms, biases, scales
  and vectors. These are known by the leaf's own name, and the layer's own name, see `conventions.is_matrix`. Where
  `where=trees.matrices` meets a whole tree (`over`), the container and the leaves beside a leaf are looked at as well:
  an `equinox.nn.Embedding` or a stack of norms is known under any name. A `weight` without a bias under a name that
  says nothing may be a lookup table or a matrix. Such a leaf is sparse, and `report` lists it.
  """
  place = conventions.Place(conventions.keys_of(path), tuple(getattr(leaf, 'shape', ())))
  return _is_floating(leaf) and conventions.is_matrix(place)


def _is_floating(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)


def _matrices_over(tree: PyTree) -> Predicate:
  sparse = {path for path, place in places(tree).items() if conventions.is_matrix(place)}
  return lambda path, leaf: _is_floating(leaf) and path in sparse


matrices.over = _matrices_over


def over(where: Predicate, tree: PyTree) -> Predicate:
  """Returns the predicate that `where` is for the leaves of `tree`.

  A predicate with an attribute `over`, as `trees.matrices` has, looks at more than one leaf: `where.over(tree)` is the
  predicate `(path, leaf) -> bool` for `tree`. Any other predicate is returned as it is.
  """
  return where.over(tree) if hasattr(where, 'over') else where


def default_where(axes: Mapping[str, Axes] | None) -> Predicate:
  """Returns the predicate for `where=None`: `matrices`, or what a traced program says.

  With `axes=contractions(...)` the program decides: the leaves that it contracts are sparse, but those of which it also
  looks up rows (tied embeddings) and vectors are not. Of another mapping with traced axes, the matrices in it are
  sparse. Axes that a user wrote do not change which leaves are sparse.
  """
  if not is_traced(axes):
    return matrices
  if hasattr(axes, 'lookups'):
    return lambda path, leaf: (_is_floating(leaf) and sum(n > 1 for n in leaf.shape) > 1
                               and bool(tails(path, axes)) and not tails(path, axes.lookups))
  among = lambda where: lambda path, leaf: where(path, leaf) and bool(tails(path, axes))
  predicate = among(matrices)
  predicate.over = lambda tree: among(over(matrices, tree))
  return predicate


def is_traced(axes: Mapping[str, Axes] | None) -> bool:
  """Returns whether `axes` were read from a program, at least one of them: what they do not name is not contracted."""
  if axes is None:
    return False
  return hasattr(axes, 'lookups') or any(Axes(*each).source == 'traced' for each in axes.values())


def all_but(*globs: str, where: Predicate = matrices) -> Predicate:
  """Returns the predicate of the leaves of `where` without the leaves whose path matches one of `globs`.

  `all_but('patch/kernel', 'head/kernel')` keeps the first and the last layer dense.
  """
  dense = named(*globs)
  without = lambda where: lambda path, leaf: where(path, leaf) and not dense(path, leaf)
  predicate = without(where)
  predicate.over = lambda tree: without(over(where, tree))
  return predicate


def select(function: str, where: Predicate | PyTree, tree: PyTree) -> list[bool]:
  """Returns one bool for each leaf of `tree`: whether `where` picks the leaf.

  `where` is a predicate `(path, leaf) -> bool`, or a pytree of bools that is a prefix of `tree`. `function` is the name
  of the caller, for messages. Raises `ValueError` if `where` picks no leaf, with the paths of `tree`. Raises
  `ValueError` if `where` picks a leaf that is not floating, or if `where` is neither a predicate nor a prefix.
  """
  names, leaves, _ = flatten(tree)
  if callable(where):
    where = over(where, tree)
    picked = [bool(where(name, leaf)) for name, leaf in zip(names, leaves)]
  else:
    picked = _prefixed(function, where, tree)
  if not any(picked):
    raise ValueError(f'{function}: `where` picks no parameter. Paths look like {errors.some(names)}; '
                     "match them with trees.named('tail/of/path'), * for one key and ** for several.")
  for name, leaf, pick in zip(names, leaves, picked):
    if pick and not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise errors.at_leaf(function, name, leaf.shape, f'dtype {leaf.dtype} is not floating; leave it out of `where`.')
  return picked


def _prefixed(function: str, where: PyTree, tree: PyTree) -> list[bool]:
  """Returns one bool for each leaf of `tree` from `where`, a prefix of `tree`; raises `ValueError` for other values."""
  for value in jax.tree.leaves(where):  # a glob would count as `True` everywhere
    if not isinstance(value, (bool, np.bool_)):
      raise ValueError(f'{function}: `where` holds {value!r}, which is no bool; '
                       f'match paths with trees.named({value!r}).')
  try:
    return [bool(value) for value in jax.tree.leaves(jax.tree.broadcast(where, tree))]
  except ValueError as error:
    raise ValueError(f'{function}: `where` is a pytree, but no prefix of the parameters; give it their structure, or a '
                     f'predicate such as trees.named(...). {error}') from error


def per_leaf(function: str, what: str, value: Any, paths: list[str]) -> list[Any]:
  """Returns one value for each path: `value` itself, or, if `value` is a dict, the value of the first matching glob.

  `what` is the name of the argument, for messages. Raises `ValueError` for a path that no glob of the dict matches, and
  for a glob that matches no path.
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
  """Returns the `Axes` of a leaf by `conventions.TABLE`, from its path and shape alone.

  A leaf without a convention has the source `unknown`. `axes_by_path` looks at the container and at the leaves beside
  a leaf as well, which can only turn a convention into `unknown`, except for convolutions of Equinox.
  """
  return conventions.axes(conventions.Place(conventions.keys_of(path), tuple(shape)))


def tails(path: str, names: Iterable[str]) -> list[str]:
  """Returns the `names` that can mean the leaf at `path`.

  The result is `path` alone if `names` has it. Otherwise it is every name that is a tail of `path`, or of which `path`
  is a tail.
  """
  matching = [name for name in names if name == path or name.endswith('/' + path) or path.endswith('/' + name)]
  return [path] if path in matching else matching


def axes_of(function: str, axes: Mapping[str, Axes] | None, path: str, shape: tuple[int, ...],
            place: conventions.Place | None = None) -> Axes:
  """Returns the `Axes` of one leaf: from `axes`, or else by the conventions; `place` says what is beside the leaf.

  The traced tree and the tree of the optimizer may have different first keys, such as `params/...`. A leaf therefore
  takes the axes of the name of which its path is a tail, or vice versa; a name in `axes` may also be a glob. Axes that
  a user wrote (source `given`) need not name all leaves: the others follow the conventions. Raises `ValueError` if no
  traced path or several names match, and if the axes are of another shape.
  """
  names = [] if axes is None else tails(path, axes) or [name for name in axes if matches(name, path)][:1]
  if not names and not is_traced(axes):
    return conventional_axes(path, shape) if place is None else conventions.axes(place)
  if len(names) != 1:
    problem = f'fits {errors.some(names)}' if names else f'is none of {errors.some(axes)}'
    raise errors.at_leaf(function, path, shape, f'its axes are not in `axes`: the path {problem}. '
                         'Trace a program that uses it in one contraction, or leave it out of `where`.')
  found = Axes(*axes[names[0]])
  if sorted(a for group in found[:4] for a in (group if isinstance(group, tuple) else (None,))) != [*range(len(shape))]:
    raise errors.at_leaf(function, path, shape, f'the {found.source} axes {found} are of another shape; trace again, or '
                         'put each axis of the parameter in one of the four tuples.')
  return found


def axes_by_path(function: str, axes: Mapping[str, Axes] | None, tree: PyTree,
                 paths: Iterable[str] | None = None) -> dict[str, Axes]:
  """Returns the `Axes` of the leaves of `tree` at `paths` (default: of all leaves), see `axes_of`.

  Raises `ValueError` for a name in axes that a user wrote which is the name of no leaf of `tree`.
  """
  found, known = places(tree), [] if axes is None else flatten(tree, is_leaf=is_dense)[0]
  for name in () if is_traced(axes) else axes or ():
    if not any(matches(name, path) or name.endswith('/' + path) for path in known):
      raise errors.unknown(function, 'path in `axes`', name, known)
  return {path: axes_of(function, axes, path, found[path].shape, found[path])
          for path in (found if paths is None else paths)}


def undecided(tree: PyTree) -> list[str]:
  """Returns the paths of the leaves that are matrices or lookup tables; their names do not say which."""
  return [path for path, place in places(tree).items() if conventions.is_undecided(place)]
