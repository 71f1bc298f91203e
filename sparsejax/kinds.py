"""Computes the same of many leaves by one program for each kind: leaves of one kind have equal types and shardings.

    masks = kinds.each(function, facts, rows)     # `function(facts[i], rows[i])` of each leaf
    for members in kinds.of(leaves):           # [[0, 2], [1]]
      stack = kinds.together([leaves[i] for i in members])
      leaves = kinds.apart(stack)

The time to compile and the size of a program then grow with the number of kinds, and not with the number of leaves. A
loop computes the leaves of a kind one by one, so that every bit of a result is that of the leaf by itself.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from sparsejax.types import Array, PyTree


def of(rows: Sequence[PyTree], facts: Sequence[Hashable] | None = None) -> list[list[int]]:
  """Returns the places of the rows of each kind, kinds in the order of their first rows.

  Rows of one kind have equal structures, equal shapes, dtypes and shardings of their arrays, and equal `facts`.
  """
  kinds: dict[Any, list[int]] = {}
  for i, row in enumerate(rows):
    arrays, structure = jax.tree.flatten(row)
    kind = (_key(facts[i]) if facts else None, structure, *map(_type, arrays))
    kinds.setdefault(kind, []).append(i)
  return list(kinds.values())


def _key(fact: Any) -> Any:
  """Returns what stands for a fact; a fact that does not hash, such as one with a traced number, equals itself only."""
  try:
    hash(fact)
  except TypeError:
    return tuple(map(_key, fact)) if isinstance(fact, tuple) else id(fact)
  return fact


def _type(x: Array) -> Any:
  """Returns what has to be equal for two arrays to be computed by one program: outside of `jit`, also the devices."""
  return jax.typeof(x), None if isinstance(x, jax.core.Tracer) else getattr(x, 'sharding', None)


def stackable(row: PyTree) -> bool:
  """Returns whether rows of this kind can be stacked without communication.

  On a mesh with Auto axes the compiler chooses shardings that are not known here, and may have chosen different ones.
  """
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(row)]
  return not any(AxisType.Auto in mesh.axis_types and mesh.size > 1 for mesh in meshes)


def together(leaves: Sequence[Array]) -> Array:
  """Returns the leaves of one kind as one array, `[leaves, ...]`."""
  if all(isinstance(x, np.generic) for x in leaves):  # numbers that are known while JAX traces
    return jnp.asarray(np.stack(leaves))
  rows = [lax.expand_dims(x, (0,)) for x in leaves]
  return lax.concatenate(rows, 0) if len(rows) > 1 else rows[0]


def apart(stack: PyTree) -> list[PyTree]:
  """Returns the rows of a pytree of arrays `[leaves, ...]`: the inverse of `together`."""
  arrays, structure = jax.tree.flatten(stack)
  size = arrays[0].shape[0]
  if size == 1:
    return [jax.tree.unflatten(structure, [lax.squeeze(x, (0,)) for x in arrays])]
  places = opaque(range(size), arrays[0])
  row = lambda i: [lax.dynamic_index_in_dim(x, i, 0, keepdims=False, allow_negative_indices=False) for x in arrays]
  return [jax.tree.unflatten(structure, row(i)) for i in places]


def opaque(places: Iterable[int], like: Array) -> list[Any]:
  """Returns the places, `int32[]` each, at which slices are taken out of an array such as `like`."""
  numbers = [np.int32(i) for i in places]
  if jax.default_backend() != 'cpu' or not like.size:
    return numbers
  # XLA:CPU compiles equal kernels once. A slice at a constant place is a kernel of its own, which compiles longer than
  # the rest of a leaf. To XLA the results of a branch are not constants, whichever branch is taken.
  first = lax.squeeze(lax.slice(like, (0,) * like.ndim, (1,) * like.ndim), range(like.ndim))
  return lax.cond(first == jnp.zeros((), like.dtype), lambda: numbers, lambda: numbers)


def each(function: Callable[[Any, Any], PyTree], facts: Sequence[Hashable], rows: Sequence[tuple[Any, ...]],
         shared: tuple[Any, ...] = (), loop: Callable[[Any], bool] = lambda fact: False, inline: bool = False
         ) -> list[PyTree]:
  """Returns `function(facts[i], (*rows[i], *shared))` for each `i`; the rows of a kind are computed by one program.

  Where `loop(fact)`, the rows of a kind are stacked, and a loop computes one after the other. The stack is a copy of
  the rows. Elsewhere, and where rows cannot be stacked, the function is traced once for each kind, and nothing is
  copied. `inline`: whether the program has the operations of a function of few, and no call, which XLA has to inline.
  """
  results: dict[int, Any] = {}
  for members in of(rows, facts):
    fact, mine = facts[members[0]], [rows[i] for i in members]
    one = lambda row, shared, fact=fact: function(fact, (*row, *shared))
    if _loops(fact, mine, loop):
      stack = jax.tree.map(lambda *leaves: together(leaves), *mine)
      found = apart(lax.map(lambda row, one=one: one(row, shared), stack))
    else:
      one = jax.jit(one, inline=inline) if len(mine) > 1 else one
      found = [one(row, shared) for row in mine]
    results |= zip(members, found)
  return [results[i] for i in range(len(rows))]


def all_loop(facts: Sequence[Hashable], rows: Sequence[tuple[Any, ...]], loop: Callable[[Any], bool]) -> bool:
  """Returns whether `each` stacks the rows of every kind for a loop."""
  return all(_loops(facts[members[0]], [rows[i] for i in members], loop) for members in of(rows, facts))


def _loops(fact: Any, rows: Sequence[PyTree], loop: Callable[[Any], bool]) -> bool:
  return len(rows) > 1 and loop(fact) and stackable(rows[0])
