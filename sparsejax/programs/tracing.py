"""Traces functions into programs, without running them.

    program = trace(model.apply, (variables, x), {'train': False})
    program.paths[0]                                     # 'params/Dense_0/kernel'
    program.unflatten(evaluate(program, program.arrays, rules))     # a result like that of `model.apply`
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sparsejax import trees
from sparsejax.arguments import shown


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A `Program` holds a traced function: its jaxpr with constants, its inputs, and the structure of its result.

  `arrays`, `arguments` and `paths` have one entry for each input of `jaxpr`. `arrays` holds the array that was passed.
  `arguments` holds the number of the argument that contains the input; the dict of keyword arguments counts as the
  last. `paths` holds the path of the input in this argument. `structure` is the tree structure of the result. `others`
  maps the number of each leaf of the result that is no array to the leaf.
  """

  jaxpr: Any
  consts: Sequence[Any]
  arrays: tuple[Any, ...]
  arguments: tuple[int, ...]
  paths: tuple[str, ...]
  structure: Any
  others: dict[int, Any]

  def unflatten(self, results: Sequence[Any]) -> Any:
    """Returns the result of the function from the results of its jaxpr, with the leaves that are no arrays."""
    rest, every = iter(results), range(self.structure.num_leaves)
    return self.structure.unflatten([self.others[i] if i in self.others else next(rest) for i in every])


def trace(apply: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
          is_leaf: Callable[[Any], bool] | None = None) -> Program:
  """Returns the program of `apply(*args, **kwargs)`, without running it.

  Leaves with a shape and a dtype become inputs of the program; a `jax.ShapeDtypeStruct` suffices. All other leaves (a
  flag, a string, a function) and NumPy scalars are passed to `apply` as they are. `is_leaf(node)` marks nodes such as
  packed arrays: `apply` gets a dense array of the node's shape and dtype.
  """
  if not callable(apply):
    raise ValueError(f'programs.trace: the function of the program must be a function, not {shown(apply)}; pass '
                     'model.apply, or the call of a module.')
  both = (*args, kwargs or {})
  leaves, treedef = jax.tree.flatten(both, is_leaf=is_leaf)
  named = [(i, path) for i, part in enumerate(both) for path in trees.flatten(part, is_leaf=is_leaf)[0]]
  array = lambda leaf: hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') and not isinstance(leaf, np.generic)
  inputs = [i for i, leaf in enumerate(leaves) if array(leaf)]
  kept: list[Any] = []

  def flat(*values: Any) -> list[Any]:
    given = dict(zip(inputs, values))
    *positional, options = jax.tree.unflatten(treedef, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
    results, structure = jax.tree.flatten(apply(*positional, **options))
    kept[:] = structure, {i: result for i, result in enumerate(results) if not isinstance(result, jax.Array)}
    return [result for result in results if isinstance(result, jax.Array)]

  seen = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_leaf is not None and is_leaf(leaf) else leaf
          for leaf in (leaves[i] for i in inputs)]
  closed = jax.make_jaxpr(flat)(*seen)
  arguments, paths = zip(*(named[i] for i in inputs)) if inputs else ((), ())
  return Program(closed.jaxpr, closed.consts, tuple(leaves[i] for i in inputs), arguments, paths, *kept)
