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

from sparsejax import errors
from sparsejax.types import Array, Axes, Bound, Predicate, PyTree

DENSE = optax.MaskedNode()

# The pattern matches parameters of rank two and more that are no matrices: biases of DenseGeneral, stacked norms and
# embeddings.
_NOT_MATRICES = re.compile(
    r'(^|.*/)(bias\w*|b|scale|offset|gamma|beta)$|.*(embed|norm|pos_enc|cls_token).*', re.IGNORECASE)


def is_dense(node: Any) -> bool:
  """Returns whether `node` is the placeholder of a leaf that stays dense."""
  return isinstance(node, optax.MaskedNode)


def path_name(keys: tuple[Any, ...]) -> str:
  """Returns the path, such as `a/b/0/kernel`, for `keys` of `jax.tree_util`; the last `.value` of NNX is left out."""
  if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in ('value', 'raw_value'):
    keys = keys[:-1]
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in keys)


def flatten(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[str], list[Any], Any]:
  """Returns the paths, the leaves and the treedef of `tree`, in the order of `jax.tree`."""
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [path_name(keys) for keys, _ in with_paths], [leaf for _, leaf in with_paths], treedef


@functools.lru_cache(maxsize=4096)
def _regex(glob: str) -> re.Pattern[str]:
  words = {'**/': '(?:[^/]+/)*', '**': '.*', '*': '[^/]*', '?': '[^/]'}
  parts = re.split(r'(\*\*/|\*\*|\*|\?)', glob.strip('/'))
  above = '' if glob.startswith('/') else '(?:.*/)?'
  return re.compile(above + ''.join(words.get(part, re.escape(part)) for part in parts))


def matches(glob: str, path: str) -> bool:
  """Returns whether `glob` matches `path` or a tail of `path` that begins at a key.

  `*` matches any characters of one key, `**` any number of keys, and `?` one character of a key. A glob that begins
  with `/` matches whole paths only.
  """
  return _regex(glob).fullmatch(path) is not None


def named(*globs: str) -> Predicate:
  """Returns the predicate of all leaves whose path, or a tail of the path, matches one of `globs`; see `matches`.

  A tree in which one of the globs matches no path is refused by `select`.
  """
  return Bound(_named, globs)


def _named(path: str, leaf: Array, *globs: str) -> bool:
  return any(matches(glob, path) for glob in globs)


def matrices(path: str, leaf: Array) -> bool:
  """Returns whether a leaf is sparse by default.

  Floating leaves of rank two and more are sparse, except biases, norms and embeddings, which are known by their names.
  """
  return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and not _NOT_MATRICES.fullmatch(path)


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

  `where` is a predicate `(path, leaf) -> bool`, or a pytree of bools that is a prefix of `tree`. A leaf of size zero is
  never picked, since it has nothing to prune. `function` is the name
  of the caller, for messages. Raises `ValueError` if `where` picks no leaf, or if one of its globs, an exclusion too,
  matches no path. The message has the closest paths of `tree`, and leaves that optax masks have paths as well. Raises
  `ValueError` if `where` picks leaves that are not floating, or is neither a predicate nor a prefix.
  """
  names, leaves, _ = flatten(tree)
  picked = [pick and getattr(leaf, 'size', 1) > 0 for pick, leaf in zip(_picked(function, where, tree), leaves)]
  _refuse_globs(function, where, tree, any(picked))
  if not any(picked):
    raise ValueError(f'{function}: `where` picks no parameter. {_looks(names)}')
  wrong = lambda leaf: not jnp.issubdtype(leaf.dtype, jnp.floating)
  problems = [errors.Problem(name, leaf.shape, f'dtype {leaf.dtype} is not floating; leave it out of `where`.')
              for name, leaf, pick in zip(names, leaves, picked) if pick and wrong(leaf)]
  if problems:
    raise refused(errors.at_leaves(function, problems), where, tree)
  return picked


def _looks(names: list[str]) -> str:
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
  names, leaves, _ = flatten(tree)
  bad = {problem.path for problem in refusal.problems}
  good = [name for name, pick in zip(names, _picked(refusal.function, where, tree)) if pick and name not in bad]
  usual = [name for name, leaf in zip(names, leaves) if matrices(name, leaf)]
  others = [name for name in usual if name not in good]
  composed = [(functools.partial(all_but, where=where), sorted(bad))] if where is matrices or globs_of(where) else []
  lists = [(all_but, others)] * ({*good} <= {*usual}) + [(named, good)]
  for word, paths in composed + sorted(lists, key=lambda each: len(each[1])) if good else ():
    predicate = word(*('/' * (sum(matches(path, name) for name in names) > 1) + path for path in paths))
    if (text := written(predicate)) and good == [n for n, leaf in zip(names, leaves) if predicate(n, leaf)]:
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
  if not callable(where):
    return _prefixed(function, where, tree)
  names, leaves, _ = flatten(tree)
  return [bool(where(name, leaf)) for name, leaf in zip(names, leaves)]


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
  """Returns the `Axes` of a leaf by the naming conventions of Flax, Haiku and Equinox, if no program has been traced.

  - `weight` (Equinox) is `[out, in, *spatial]`.
  - `query/kernel`, `key/kernel` and `value/kernel` (attention in Flax) are `[*layer, in, heads, head_dim]`.
  - `out/kernel` of rank three and more (attention in Flax) is `[*layer, heads, head_dim, out]`.
  - Every other leaf is `[*leading, in, out]`. Leading axes are taps if the path contains `conv` or if the rank is four
    or five, and layers otherwise. The N:M groups are the same for taps and for layers.
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
  """Returns the `names` that can mean the leaf at `path`.

  The result is `path` alone if `names` has it. Otherwise it is every name that is a tail of `path`, or of which `path`
  is a tail.
  """
  matching = [name for name in names if name == path or name.endswith('/' + path) or path.endswith('/' + name)]
  return [path] if path in matching else matching


def axes_of(function: str, axes: Mapping[str, Axes] | None, path: str, shape: tuple[int, ...]) -> Axes:
  """Returns the `Axes` of one leaf: from `axes`, read from a traced program, or else by `conventional_axes`.

  The traced tree and the tree of the optimizer may have different first keys, such as `params/...`. A leaf therefore
  takes the axes of the traced path of which its path is a tail, or vice versa. Raises `ValueError` if no traced path or
  several traced paths match, and if the traced axes are of another shape.
  """
  if axes is None:
    return conventional_axes(path, shape)
  names = tails(path, axes)
  if len(names) != 1:
    problem = f'fits {errors.some(names)}' if names else f'is none of {errors.some(axes)}'
    raise errors.at_leaf(function, path, shape, f'its axes are not in `axes`: the path {problem}. '
                         'Trace a program that uses it in one contraction, or leave it out of `where`.')
  traced = Axes(*axes[names[0]])
  if sorted(sum(traced[:4], ())) != list(range(len(shape))):
    raise errors.at_leaf(function, path, shape, f'the traced axes {traced} are of another shape; trace again.')
  return traced
