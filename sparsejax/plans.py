"""A plan says what is asked of the sparse leaves of one optimizer state, and who made the state: its identity.

Recipe, pattern, flow and the set of sparse leaves are the identity of a state; numbers and schedules are configuration.
The plan is part of the treedef, which `jit` sees. Files hold arrays only, so a plan in a state carries its identity as
an array as well: `fingerprint`, `uint8[256]`, 8 bytes of a hash and then the words, zero-padded.

    plan = Plan((SparseLeaf('a/kernel', (8, 4), axes, NM(2, 4)),), flows.hard(), 'asp')
    plan.text                                    # "asp of 2:4 by nothing on 1 leaf, 'a/kernel'"
    refuse_unless_of(plan, state.plan.identity)  # raises `ValueError` with both identities if they differ
"""

import copy
import dataclasses
import functools
import hashlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, flows
from sparsejax.types import Asked, Axes, Bound, Flow, Pattern

BYTES, HASHED = 256, 8  # of a fingerprint: all, and those of the hash


@dataclasses.dataclass(frozen=True)
class SparseLeaf:
  """A `SparseLeaf` says what is asked of one sparse parameter: static, compared by value.

  `pattern` is `None` where none is on record: a score's threshold decides, or the pattern has a traced number.
  """

  path: str
  shape: tuple[int, ...]
  axes: Axes
  pattern: Pattern | None
  asked: Asked = Asked()

  @property
  def sparsity(self) -> float | None:
    """The sparsity that is asked of the leaf by itself, or `None`."""
    return None if self.asked.together else self.asked.sparsity

  @property
  def layer_shape(self) -> tuple[int, ...]:
    """The shape of one layer of the leaf."""
    return tuple(n for a, n in enumerate(self.shape) if a not in self.axes.layer)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A `Plan` says what is asked of all sparse leaves. A plan is part of the state's treedef, except for one array.

  `recipe`: the name of the recipe, empty for a call of `sparsify` without a name. `words`: the names of the flow's
  functions and of the selection's words, without their numbers. `once`: whether masks are chosen only once, so that the
  sparsity that is asked belongs to the identity, too. `identity`: in a state, the `fingerprint` of the plan with which
  the state was made, `uint8[256]`, the only part that is saved or traced.

  Plans compare by value, without the array. Pickle drops a flow that it cannot take (a schedule that is a lambda); such
  a plan equals every plan that differs only in the flow.
  """

  leaves: tuple[SparseLeaf, ...] = ()
  flow: Flow | None = None
  recipe: str = ''
  words: tuple[str, ...] = ()
  once: bool = False
  identity: Any = None

  @property
  def sparsity(self) -> float | None:
    """The sparsity that is asked of all leaves together, or `None` if each leaf is asked by itself."""
    return next((leaf.asked.sparsity for leaf in self.leaves if leaf.asked.together), None)

  @functools.cached_property
  def text(self) -> str:
    """The identity in words, for messages."""
    kinds = ', '.join(dict.fromkeys(kind_of(leaf.pattern) for leaf in self.leaves))
    asked = sorted({f'{leaf.asked.sparsity:g}' for leaf in self.leaves
                    if leaf.asked.sparsity is not None and not getattr(leaf.pattern, 'fixed', False)})
    of = f' of {kinds}' * bool(kinds) + f' at {", ".join(asked)}' * bool(self.once and asked)
    count, paths = len(self.leaves), errors.some((leaf.path for leaf in self.leaves), 3)
    where = f' on {count} lea{"f" if count == 1 else "ves"}, {paths}' if count else ' on no leaf'
    return f'{self.recipe or "sparsify"}{of} by {", ".join(self.words) or "nothing"}{where}'

  @functools.cached_property
  def fingerprint(self) -> np.ndarray:
    """The identity as an array, `uint8[256]`: a hash of everything that belongs to it, then the words, zero-padded."""
    asked = lambda leaf: (leaf.asked.sparsity and float(leaf.asked.sparsity), leaf.asked.together)
    different = {id(leaf.pattern): leaf.pattern for leaf in self.leaves}
    kinds = {key: kind_of(pattern) for key, pattern in different.items()}
    leaves = [(leaf.path, tuple(map(int, leaf.shape)), kinds[id(leaf.pattern)], _bound(leaf), self.once and asked(leaf))
              for leaf in self.leaves]
    whole = hashlib.blake2b(repr((self.recipe, self.words, leaves)).encode(), digest_size=HASHED).digest()
    whole += self.text.encode()[:BYTES - HASHED]
    return np.frombuffer(whole.ljust(BYTES, b'\0'), np.uint8)

  def carrying(self, identity: Any) -> 'Plan':
    """Returns the plan with an array in the field `identity`."""
    plan = object.__new__(Plan)
    plan.__dict__.update(self.__dict__, identity=identity, _static=self._static)
    return plan

  @functools.cached_property
  def _static(self) -> 'Plan':
    return self if self.identity is None else dataclasses.replace(self, identity=None)

  def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], 'Plan']:
    return ((jax.tree_util.GetAttrKey('identity'), self.identity),), self._static

  def tree_flatten(self) -> tuple[tuple[Any, ...], 'Plan']:
    return (self.identity,), self._static

  @classmethod
  def tree_unflatten(cls, static: 'Plan', children: tuple[Any, ...]) -> 'Plan':
    return static.carrying(*children)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Plan):
      return NotImplemented
    if self is other:
      return True
    same = self._key == other._key and self.leaves == other.leaves
    if same:  # `jit` compares the plans at each call; equal leaves that are one object compare at once
      other.__dict__['leaves'] = self.leaves
    known = not flows.is_forgotten(self.flow) and not flows.is_forgotten(other.flow)
    return same and (self.flow == other.flow or not known)

  def __hash__(self) -> int:
    return hash(self._key)

  @property
  def _key(self) -> tuple[Any, ...]:
    return self.recipe, self.words, self.once, len(self.leaves)

  def __getstate__(self) -> dict[str, Any]:
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    try:
      pickle.dumps(self.flow)
    except Exception:  # pickle raises many types
      fields['flow'] = flows.forgotten(self.flow)
    return fields

  def __deepcopy__(self, memo: dict[int, Any]) -> 'Plan':
    return self.carrying(copy.deepcopy(self.identity, memo))


def fresh(plan: Plan) -> Plan:
  """Returns the plan as a new state carries it, with its own fingerprint as the array."""
  return plan.carrying(jnp.asarray(plan.fingerprint))


def kind_of(pattern: Pattern | None) -> str:
  """Returns the pattern in words without its sparsity, which is a number and no part of the identity."""
  fields = [field.name for field in dataclasses.fields(pattern)] if dataclasses.is_dataclass(pattern) else []
  text = str(dataclasses.replace(pattern, sparsity=None) if 'sparsity' in fields else pattern or '-')
  return re.sub(r' at 0x[0-9a-f]+', '', text)  # of a pattern from outside that does not print by value


def _bound(leaf: SparseLeaf) -> tuple[tuple[int, ...], ...] | None:
  """Returns the axes of a leaf whose pattern lies along them; `None` for a pattern that needs no axes."""
  unknown = Axes((), tuple(range(len(leaf.shape))))
  bound = leaf.pattern is not None and leaf.pattern.validate(leaf.shape, unknown)
  return leaf.axes[:4] if bound else None


def spelled(word: Any) -> str:
  """Returns the name of a word of the grammar, without its numbers."""
  while isinstance(word, (Bound, functools.partial)):
    word = word.function if isinstance(word, Bound) else word.func
  name = getattr(word, '__qualname__', type(word).__qualname__).replace('<lambda>', 'lambda')
  return name.split('.<locals>')[0].strip('_')


def words_of(flow: Flow, select: Callable[..., Any]) -> tuple[str, ...]:
  """Returns the names of the functions of a flow, and of the words that a selection's `select` is made of."""
  flowing = [spelled(each) for each in (flow.project, flow.pull_back, flow.settle, flow.begin) if each is not None]
  owner = getattr(select, '__self__', select)
  chosen = [spelled(getattr(owner, name)) for name in ('score', 'update') if hasattr(owner, name)]
  return (*flowing, *(chosen or [spelled(select)]))


def text_of(fingerprint: np.ndarray) -> str:
  """Returns the words in a fingerprint, '...' at the end if they were cut."""
  held = bytes(fingerprint)[HASHED:]
  text = held.rstrip(b'\0').decode(errors='ignore')
  return text + '...' if held[-1:] != b'\0' else text


def values_of(array: Any) -> np.ndarray | None:
  """Returns the bytes of a state's identity, `uint8[256]`, or `None` while they are not known: traced or abstract.

  Of a state that was made under `jax.vmap`, the bytes of its first member are returned.
  """
  if isinstance(array, jax.Array):
    traced = isinstance(array, jax.core.Tracer)
    if traced or array.is_deleted() or not (array.is_fully_addressable or array.is_fully_replicated):
      return None
  elif not isinstance(array, np.ndarray):
    return None
  held = np.asarray(array).astype(np.uint8).reshape(-1)[:BYTES]
  return np.pad(held, (0, BYTES - held.size))


def owned(identity: Any) -> Any:
  """Returns the identity of a state for the next state: a copy outside of `jit`, where the state before may be donated.
  """
  known = isinstance(identity, jax.Array) and not isinstance(identity, jax.core.Tracer)
  return identity.copy() if known else identity


def refuse_unless_of(plan: Plan, identity: Any) -> None:
  """Raises `ValueError` naming both identities if the identity of a state, where it is known, is not that of `plan`."""
  held = values_of(identity)
  if held is not None and not np.array_equal(held[:HASHED], plan.fingerprint[:HASHED]):
    raise refusal(text_of(held) or 'something that cannot be read', plan)


def refusal(made_by: str, plan: Plan, also: str = '') -> ValueError:
  """Returns the error for a state `made_by` one identity and the optimizer of another. `also` says more about it."""
  hidden = ' (They differ in a shape, an axis or a path that these words do not show.)' * (made_by == plan.text)
  return ValueError(
      f'sparsejax: the state was made by {made_by[:BYTES]}. This optimizer is {plan.text[:BYTES]}.{hidden} {also}'
      'Make the state by tx.init(params), or go on with the optimizer that made it.')
