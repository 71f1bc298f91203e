"""Names the leaves of a pytree by paths, says which leaves are sparse (`where`), and finds the axes of a leaf.

A path joins the keys of a leaf by `/`, for example `blocks_0/mlp/Dense_0/kernel` or `layers/3/weight`. Dicts, NNX
States, Equinox modules, NamedTuples and lists all give such paths. In trees of masks and masters, `DENSE` holds the
place of a leaf that stays dense. `DENSE` is `optax.MaskedNode()`, a node without leaves, which takes no memory and
which every tool of optax understands.

    where = trees.all_but('head/kernel')                             # the default, without the last layer
    where = trees.named('mlp/*/kernel')                              # by globs
    where = lambda path, leaf: leaf.ndim == 2 and leaf.size > 10_000
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import conventions, errors
from sparsejax.argument_kinds import is_tree
from sparsejax.arguments import checked, shown
from sparsejax.conventions import path_name
from sparsejax.globs import matches, tails
from sparsejax.types import Array, Axes, Bound, Predicate, PyTree

__all__ = [
  'DENSE', 'all_but', 'axes_by_path', 'conventional_axes', 'default_where', 'flatten', 'is_dense', 'matrices',
  'named', 'over', 'per_leaf', 'select', 'undecided',
]

DENSE = optax.MaskedNode()


def is_dense(node: Any) -> bool:
  """Returns whether `node` is the placeholder of a leaf that stays dense."""
  return isinstance(node, optax.MaskedNode)


def flatten(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[str], list[Any], Any]:
  """Returns the paths, the leaves and the treedef of `tree`, in the order of `jax.tree`."""
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [path_name(keys) for keys, _ in with_paths], [leaf for _, leaf in with_paths], treedef


@checked
def named(*globs: str) -> Predicate:
  """Returns the predicate of all leaves whose path, or a tail of the path, matches one of `globs`; see `matches`.

  A tree in which one of the globs matches no path is refused by `select`.
  """
  return Bound(_named, globs)


def _named(path: str, leaf: Array, *globs: str) -> bool:
  return any(matches(glob, path) for glob in globs)


def matrices(path: str, leaf: Array) -> bool:
  """Returns whether a leaf is sparse by default.

  A floating leaf is sparse unless it is a vector (fewer than two axes longer than one, as of a class token), a lookup
  table, a norm, a bias or a scale. The leaf's own name and the layer's own name tell which, see
  `conventions.is_matrix`. Where `where=trees.matrices` meets a whole tree (`over`), the container and the leaves beside
  a leaf are looked at as well: an `equinox.nn.Embedding` or a stack of norms is known under any name. Without a bias, a
  `weight` under a name that says nothing may be a lookup table or a matrix. That leaf is sparse; `report` lists it.
  """
  place = conventions.Place(conventions.keys_of(path), tuple(getattr(leaf, 'shape', ())))
  return _is_floating(leaf) and conventions.is_matrix(place)


def _is_floating(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)


def _matrices_over(tree: PyTree) -> Predicate:
  sparse = {path for path, place in conventions.places(tree).items() if conventions.is_matrix(place)}
  return lambda path, leaf: _is_floating(leaf) and path in sparse


matrices.over = _matrices_over


def over(where: Predicate, tree: PyTree) -> Predicate:
  """Returns the predicate that `where` is for the leaves of `tree`.

  A predicate with an attribute `over`, as `trees.matrices` has, looks at more than one leaf: `where.over(tree)` is the
  predicate `(path, leaf) -> bool` for `tree`. A `Bound` is asked for the predicates among its arguments, as `all_but`
  has one. Any other predicate is returned as it is.
  """
  if isinstance(where, Bound):
    return dataclasses.replace(where, arguments=tuple(over(a, tree) if callable(a) else a for a in where.arguments))
  return where.over(tree) if hasattr(where, 'over') else where


def default_where(axes: Mapping[str, Axes] | None) -> Predicate:
  """Returns the predicate for `where=None`: `matrices`, or what a traced program says.

  With `axes=contractions(...)` the program decides: the leaves that it contracts are sparse, but those of which it also
  looks up rows (tied embeddings) and vectors are not. Of another mapping with traced axes, the matrices in it are
  sparse. Axes that a user wrote do not change which leaves are sparse.
  """
  if not is_traced(axes):
    return matrices
  return Bound(_contracted, (axes,)) if hasattr(axes, 'lookups') else Bound(_among, (matrices, axes))


def _contracted(path: str, leaf: Array, axes: Mapping[str, Axes]) -> bool:
  names = names_in(axes, path) if _is_floating(leaf) and not conventions.is_vector(leaf.shape) else []
  return bool(names) and not any(name in axes.lookups for name in names)


def _among(path: str, leaf: Array, where: Predicate, axes: Mapping[str, Axes]) -> bool:
  return bool(where(path, leaf)) and bool(tails(path, axes))


def is_traced(axes: Mapping[str, Axes] | None) -> bool:
  """Returns whether `axes` were read from a program, at least one of them. The program contracts no other leaf."""
  if axes is None:
    return False
  return hasattr(axes, 'lookups') or any(isinstance(each, tuple) and 'traced' in each for each in axes.values())


@checked
def all_but(*globs: str, where: Predicate = matrices) -> Predicate:
  """Returns the predicate of the leaves of `where` without the leaves whose path matches one of `globs`.

  `all_but('patch/kernel', 'head/kernel')` keeps the first and the last layer dense. A tree in which one of the globs
  matches no path is refused by `select`.
  """
  return Bound(_all_but, (where, *globs))


def _all_but(path: str, leaf: Array, where: Predicate, *globs: str) -> bool:
  return bool(where(path, leaf)) and not _named(path, leaf, *globs)


def globs_of(where: Any) -> tuple[str, ...]:
  """Returns the globs that `named` and `all_but` were given, nested ones too; none of another predicate."""
  if not isinstance(where, Bound) or where.function not in (_named, _all_but):
    return ()
  return where.arguments if where.function is _named else globs_of(where.arguments[0]) + where.arguments[1:]


def select(function: str, where: Predicate | PyTree, tree: PyTree) -> list[bool]:
  """Returns one bool for each leaf of `tree`: whether `where` picks the leaf.

  `where` is a predicate `(path, leaf) -> bool`, or a pytree of bools that is a prefix of `tree`. A predicate is called
  with arrays only: a number, a function or an empty array, which has nothing to prune, is never picked. `function` is
  the name of the caller, for messages. Raises `ValueError` if `where` picks no leaf, or if one of its globs, an
  exclusion too, matches no path. The message has the closest paths of `tree`, and leaves that optax masks have paths as
  well. Raises `ValueError` if `where` picks leaves that are not floating or that share their path, or is no prefix.
  """
  names, leaves, _ = flatten(tree)
  picked = _picked(function, where, tree)
  _refuse_globs(function, where, tree, any(picked))
  if not any(picked):
    raise ValueError(f'{function}: `where` picks no parameter. {_kinds(leaves)}{_looks(names)}')
  rows, seen = [(name, leaf) for name, leaf, pick in zip(names, leaves, picked) if pick], collections.Counter(names)
  if problems := [errors.Problem(name, w.shape, f'dtype {w.dtype} is not floating; leave it out of `where`.')
                  for name, w in rows if not jnp.issubdtype(w.dtype, jnp.floating)]:
    raise refused(errors.at_leaves(function, problems), where, tree)
  if problems := [errors.Problem(name, w.shape, 'two leaves have this path. Rename a key, so that no key holds a `/`.')
                  for name, w in rows if seen[name] > 1]:
    raise errors.at_leaves(function, problems)
  return picked


def _kinds(leaves: list[Any]) -> str:
  """Returns what keeps every leaf from being picked, or an empty string."""
  arrays = [leaf for leaf in leaves if hasattr(leaf, 'dtype')]
  if not arrays:
    return 'The tree holds no array. '
  if not any(map(_is_floating, arrays)):
    return f'No array is floating, but {errors.some(sorted({str(leaf.dtype) for leaf in arrays}))}. '
  return ''


def _looks(names: list[str]) -> str:
  if not names:
    return 'Pass the parameters, a tree of arrays.'
  return (f'Paths look like {errors.some(names)}; '
          "match them with trees.named('tail/of/path'), * for one key and ** for several.")


def _refuse_globs(function: str, where: Any, tree: PyTree, picks: bool) -> None:
  """Raises `ValueError` for a glob of `where` that matches no path; placeholders and `None` have paths, too."""
  globs = globs_of(where)
  names = flatten(tree, is_leaf=lambda node: node is None or is_dense(node))[0] if globs else []
  for glob in globs:
    if not any(matches(glob, name) for name in names):
      keys = glob.strip('/').count('/') + 1
      hint = errors.closest(glob, {'/'.join(name.split('/')[-keys:]) for name in names})
      what = f'names {glob!r}, which matches no parameter' if picks else 'picks no parameter'
      raise ValueError(f'{function}: `where` {what}. {_looks(names)}{hint}')


def refused(refusal: errors.AtLeaves, where: Any, tree: PyTree) -> errors.AtLeaves:
  """Returns the refusal of leaves of `tree` with the line that leaves them dense, to paste in the place of `where`.

  `where`: the predicate or prefix pytree that picked the leaves. The line keeps the globs of `named` and `all_but`, and
  lists paths where `where` is another predicate or a pytree. There is no line if no other leaf is picked.
  """
  names = flatten(tree)[0]
  bad = {problem.path for problem in refusal.problems}
  good = [name for name, pick in zip(names, _picked(refusal.function, where, tree)) if pick and name not in bad]
  usual = [name for name, pick in zip(names, _picked(refusal.function, matrices, tree)) if pick]
  others = [name for name in usual if name not in good]
  composed = [(functools.partial(all_but, where=where), sorted(bad))] if where is matrices or globs_of(where) else []
  lists = [(all_but, others)] * ({*good} <= {*usual}) + [(named, good)]
  for word, paths in composed + sorted(lists, key=lambda each: len(each[1])) if good else ():
    predicate = word(*('/' * (sum(matches(path, name) for name in names) > 1) + path for path in paths))
    picked = _picked(refusal.function, predicate, tree)
    if (text := written(predicate)) and good == [name for name, pick in zip(names, picked) if pick]:
      return errors.at_leaves(refusal.function, refusal.problems, f'where={text}')
  return refusal


def written(where: Any) -> str:
  """Returns `where` as code, for example "sj.trees.all_but('head/kernel')"; nothing for a predicate of one's own."""
  if where is matrices:
    return 'sj.trees.matrices'
  if not globs_of(where):
    return ''
  if where.function is _named:
    return f'sj.trees.named({", ".join(map(repr, where.arguments))})'
  base, *globs = where.arguments
  if isinstance(base, Bound) and base.function is _all_but:  # exclusions make one list
    return written(all_but(*base.arguments[1:], *globs, where=base.arguments[0]))
  inner = written(base)
  also = [] if base is matrices else [f'where={inner}']
  return f'sj.trees.all_but({", ".join([*map(repr, globs), *also])})' if inner else ''


def _picked(function: str, where: Any, tree: PyTree) -> list[bool]:
  names, leaves, _ = flatten(tree)
  arrays = [hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') and 0 not in leaf.shape for leaf in leaves]
  if not callable(where) or is_tree(where) and not isinstance(where, functools.partial):  # a module that holds bools
    return [pick and array for pick, array in zip(_prefixed(function, where, tree), arrays)]
  where = over(where, tree)
  return [array and bool(where(name, leaf)) for name, leaf, array in zip(names, leaves, arrays)]


def _prefixed(function: str, where: PyTree, tree: PyTree) -> list[bool]:
  """Returns one bool for each leaf of `tree` from `where`, a prefix of `tree`; raises `ValueError` for other values."""
  for value in jax.tree.leaves(where):  # a glob would count as `True` everywhere
    if not isinstance(value, (bool, np.bool_)):
      remedy = f'match paths with trees.named({value!r})' if isinstance(value, str) else 'give True or False for a leaf'
      raise ValueError(f'{function}: `where` holds {shown(value)}, which is no bool; {remedy}.')
  try:
    return [bool(value) for value in jax.tree.leaves(jax.tree.broadcast(where, tree))]
  except ValueError as error:
    raise ValueError(f'{function}: `where` is a pytree, but no prefix of the parameters; give it, or the `masks` of '
                     f'recipes.fixed, their structure, or a predicate such as trees.named(...). {error}') from error


def per_leaf(function: str, what: str, value: Any, paths: list[str]) -> list[Any]:
  """Returns one value for each path: `value` itself, or, if `value` is a dict, the value of the first matching glob.

  `what` names the argument. Raises `ValueError` for a path that no glob matches, and for a glob, other than `**`, to
  which earlier globs leave no path.
  """
  if not isinstance(value, Mapping):
    return [value] * len(paths)
  for glob in (glob for glob in value if not any(matches(glob, path) for path in paths)):
    raise errors.unknown(function, f'path in `{what}`', glob, paths)
  uncovered = [path for path in paths if not any(matches(glob, path) for glob in value)]
  if uncovered:
    raise ValueError(f'{function}: `{what}` says nothing about {errors.some(uncovered)}; '
                     "add a last entry '**' for the rest.")
  first = [next(glob for glob in value if matches(glob, path)) for path in paths]
  if idle := [glob for glob in value if glob not in (*first, '**')]:
    raise ValueError(f'{function}: `{what}` has {errors.some(idle)}, and for every such path an earlier entry decides. '
                     'The first entry that matches counts: move it up, or leave it out.')
  return [value[glob] for glob in first]


def conventional_axes(path: str, shape: tuple[int, ...]) -> Axes:
  """Returns the `Axes` of a leaf by `conventions.TABLE`, from its path and shape alone.

  A leaf without a convention has the source `unknown`. `axes_by_path` also looks at the container and at the leaves
  beside a leaf: a bias may speak against a convention, and a module of Equinox tells a convolution of any rank.
  """
  return conventions.axes(conventions.Place(conventions.keys_of(path), tuple(shape)))


def names_in(axes: Mapping[str, Axes], path: str) -> list[str]:
  """Returns the names in `axes` that mean the leaf at `path`, see `tails`.

  A traced program also has parameters that it does not contract: nothing in `axes` means these. Axes that a user wrote
  may be named by globs, of which the first that matches counts.
  """
  names = [] if path in getattr(axes, 'elsewhere', ()) else tails(path, axes)
  return names if names or is_traced(axes) else [name for name in axes if matches(name, path)][:1]


def axes_of(function: str, axes: Mapping[str, Axes] | None, path: str, shape: tuple[int, ...],
            place: conventions.Place | None = None) -> Axes:
  """Returns the `Axes` of one leaf: from `axes`, or else by the conventions; `place` says what is beside the leaf.

  The traced tree and the tree of the optimizer may have different first keys, such as `params/...`. A leaf therefore
  takes the axes of the name of which its path is a tail, or vice versa. A name in `axes` may also be a glob. Axes that
  a user wrote (source `given`) need not name all leaves: the others follow the conventions. Raises `ValueError` if no
  traced path or several names match, and if the axes are of another shape.
  """
  names = [] if axes is None else names_in(axes, path)
  if not names and not is_traced(axes):
    return conventional_axes(path, shape) if place is None else conventions.axes(place)
  if len(names) != 1:
    problem = f'fits {errors.some(names)}' if names else f'is none of {errors.some(axes)}'
    raise errors.at_leaf(function, path, shape, f'its axes are not in `axes`: the path {problem}. '
                         'Trace a program that uses it in one contraction, or leave it out of `where`.')
  try:
    found = Axes(*axes[names[0]])
  except TypeError:
    raise errors.at_leaf(function, path, shape, f'`axes` says {axes[names[0]]!r} of it, which is no Axes; write '
                         'sj.types.Axes(contracted=(0,), output=(1,)).') from None
  meant = [a for group in found[:4] if isinstance(group, tuple) for a in group]
  if len(meant) != len(shape) or {*meant} != {*range(len(shape))}:
    source = 'given' if found.source == 'convention' else found.source
    raise errors.at_leaf(function, path, shape, f'the {source} axes {found[:4]} are of another shape; trace again, '
                         'or put each axis into one of the four tuples.')
  return found


def axes_by_path(function: str, axes: Mapping[str, Axes] | None, tree: PyTree,
                 paths: Iterable[str] | None = None) -> dict[str, Axes]:
  """Returns the `Axes` of the leaves of `tree` at `paths` (default: of all leaves), see `axes_of`.

  Raises `ValueError` for a name in axes that a user wrote which is the name of no leaf of `tree`.
  """
  found, known = conventions.places(tree), [] if axes is None else flatten(tree, is_leaf=is_dense)[0]
  for name in () if is_traced(axes) else axes or ():
    if not any(matches(name, path) or name.endswith('/' + path) for path in known):
      raise errors.unknown(function, 'path in `axes`', name, known)
  own = {path: axes_of(function, axes, path, found[path].shape, found[path])
         for path in (found if paths is None else paths)}
  if axes is None or is_traced(axes):
    return own
  return {path: each._replace(source='given') if each.source == 'convention' and names_in(axes, path) else each
          for path, each in own.items()}


def undecided(tree: PyTree) -> list[str]:
  """Returns the paths of the leaves that are matrices or lookup tables; their names do not say which."""
  return [path for path, place in conventions.places(tree).items() if conventions.is_undecided(place)]
