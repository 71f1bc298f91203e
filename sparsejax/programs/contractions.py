"""Tells which parameter feeds which contraction, along which axes, for any JAX function.

`contractions` traces a function and lets `views` flow through its program, through `jit`, `scan`, `while`, `cond`,
`remat`, `shard_map` and custom derivatives. Each contraction gives the axes and the number of multiply-adds.

    axes = contractions(model.apply, variables, x)
    axes['params/Dense_0/kernel']          # Axes(contracted=(0,), output=(1,), ..., source='traced')
    print(axes)                            # one line for each parameter, with its multiply-adds
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, tables
from sparsejax.arguments import checked
from sparsejax.programs import factors, jaxprs, views
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.tracing import Program, trace
from sparsejax.programs.views import CONSTANT, DATA, JOINED, PARAMETER, Value, View
from sparsejax.types import Axes, PyTree


class Use(NamedTuple):
  """A `Use` is one parameter in one contraction.

  `axes` are those of the parameter, or `None` if the contraction gives it none; then `problem` says why. `data` tells
  whether the other operand depends on the inputs. `place` is the place in the code, and `address` that in the program.
  `operand` is the number of the operand that shows the parameter, and `view` says how.
  """

  axes: Axes | None
  problem: str
  data: bool
  place: str
  address: jaxprs.Address
  operand: int
  view: View


@dataclasses.dataclass(frozen=True, eq=False)
class Contractions(Mapping[str, Axes]):
  """Maps the path of each parameter that a program contracts to its `Axes`, in the order of first use.

  `contractions[path]` raises `ValueError` if the program contracts the parameter along different axes in different
  places, or contracts a part of an axis. `ambiguous` maps the paths of these parameters to the reason.

  `shapes`: the shapes of the parameters in the mapping.
  `uses`: the contractions of each parameter, in the order of the program, in all branches of a `cond`.
  `macs`: multiply-adds of one call, batch and scan length included, in the contractions of each parameter. A
  contraction that two parameters share (`W + A @ B`) counts for both.
  `other_macs`: multiply-adds in contractions of no parameter, such as attention scores.
  `total_macs`: each contraction counts once; padding counts like data.
  `elsewhere`: each parameter in no contraction, with the operation that took it in.
  `lookups`: each parameter of which rows are looked up by data (an embedding), with the place. A tied embedding is in
  this mapping too.
  `unbounded`: loops whose number of rounds the program does not tell; one round is counted.
  `unread`: operations that hide what they compute (a kernel, a callback); their multiply-adds are not counted. If
  `unbounded` or `unread` is not empty, the counts are lower bounds.
  """

  shapes: Mapping[str, tuple[int, ...]]
  axes: Mapping[str, Axes]
  ambiguous: Mapping[str, str]
  macs: Mapping[str, int]
  other_macs: int
  total_macs: int
  elsewhere: Mapping[str, str]
  unbounded: tuple[str, ...] = ()
  unread: tuple[str, ...] = ()
  uses: Mapping[str, tuple[Use, ...]] = dataclasses.field(default_factory=dict)
  lookups: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __getitem__(self, path: str) -> Axes:
    if path in self.ambiguous:
      raise errors.at_leaf('contractions', path, self.shapes[path], self.ambiguous[path] +
                           f' Leave it dense, or pass its axes yourself: axes={{{path!r}: Axes(...)}}.')
    if path in self.elsewhere:
      raise KeyError(f'{path!r} is in no contraction of the program: {self.elsewhere[path]}')
    return self.axes[path]

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)

  def __contains__(self, path: object) -> bool:
    return path in self.shapes

  def __str__(self) -> str:
    head = ('parameter', 'shape', 'contracted', 'output', 'layer', 'spatial', 'multiply-adds')
    lines = [tables.aligned(head, [self._row(path) for path in self.shapes], right=(6,), rule=False)]
    lines.append(f'multiply-adds of one call: {self.total_macs:,}, of which without a parameter: {self.other_macs:,}')
    lines += [f'? {path}: {problem}' for path, problem in self.ambiguous.items()]
    lines += [f'looked up by data, {"contracted too" if path in self else "not contracted"}: {path}: {place}'
              for path, place in self.lookups.items()]
    lines += [f'counted once, rounds unknown: {loop}' for loop in self.unbounded]
    return '\n'.join(lines + [f'not counted, cannot be read: {place}' for place in self.unread])

  def _row(self, path: str) -> tuple[str, ...]:
    axes, numbers = self.axes.get(path), lambda field: ' '.join(map(str, field)) or '-'
    fields = ['?'] * 4 if axes is None else map(numbers, (axes.contracted, axes.output, axes.layer, axes.spatial))
    return path, numbers(self.shapes[path]), *fields, f'{self.macs[path]:,}'


@checked
def contractions(apply: Callable[..., Any], params: PyTree, *inputs: Any, **kwargs: Any) -> Contractions:
  """Returns the contractions of the program `apply(params, *inputs, **kwargs)`, without running it.

  Leaves of `params` and of the inputs may be arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
  All other leaves (`train=False`, a string, an activation function) are passed to `apply` as they are. Close over an
  array that must be concrete, with a `lambda` or a `functools.partial`. Masks and noise scales that multiply a weight
  belong in `params`, or are closed over: a weight times an input is data. Typed PRNG keys are no data.

      contractions(model.apply, variables, x, train=False)                       # Linen
      contractions(lambda s, x: nnx.merge(graphdef, s)(x), state, x)             # NNX
      contractions(lambda m, x: eqx.combine(m, static)(x), arrays, x)            # Equinox

  If a parameter is contracted with data, these contractions decide its axes; a spectral norm or a penalty on `W` does
  not count. Otherwise its contractions with other parameters decide (`A @ B`). An axis of independent copies is in
  `layer` when the program shows that the copies are independent: a scan, a batch dimension, a picked index. An ensemble
  whose members all read the same input is one wide matrix; the ensemble's axis is then in `output`. Counts include code
  whose result is not used. `apply` is the forward pass: a gradient contracts each weight along its outputs too.
  """
  return read(trace(apply, (params, *inputs), kwargs))


def read(program: Program) -> Contractions:
  """Returns the contractions of a traced program, whose first argument holds the parameters."""
  names = [path if argument == 0 else None for argument, path in zip(program.arguments, program.paths)]
  inputs = jaxprs.opened(program).invars
  notes = ContractionNotes()
  follow(program, [_argument(name, v.aval) for name, v in zip(names, inputs)], RULES, notes)
  return notes.result({name: v.aval.shape for name, v in zip(names, inputs) if name is not None})


def _argument(path: str | None, aval: Any) -> Value:
  if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
    return Value(CONSTANT)
  return Value(DATA) if path is None else _typed(Value(PARAMETER, (View(path, factors.whole(aval.shape)),)), aval)


def _typed(value: Value, aval: Any) -> Value:
  """Returns the value without views if its dtype is `bool`: a mask is no weight."""
  return Value(value.kind) if getattr(aval, 'dtype', None) == jnp.bool_ else value


@dataclasses.dataclass
class ContractionNotes:
  """`ContractionNotes` hold what was read in one part of a program, in fields like those of `Contractions`."""

  uses: list[Use] = dataclasses.field(default_factory=list)
  macs: Counter[str] = dataclasses.field(default_factory=Counter)
  other: int = 0
  total: int = 0
  elsewhere: dict[str, str] = dataclasses.field(default_factory=dict)
  lookups: dict[str, str] = dataclasses.field(default_factory=dict)
  unbounded: list[str] = dataclasses.field(default_factory=list)
  unread: list[str] = dataclasses.field(default_factory=list)

  def add(self, part: 'ContractionNotes', times: int) -> None:
    """Adds the notes of a part of the program whose multiply-adds count `times` times."""
    self.uses += part.uses
    self.macs.update({path: macs * times for path, macs in part.macs.items()})
    self.other += part.other * times
    self.total += part.total * times
    self.elsewhere = {**part.elsewhere, **self.elsewhere}
    self.lookups = {**part.lookups, **self.lookups}
    self.unbounded += part.unbounded
    self.unread += part.unread

  def result(self, shapes: Mapping[str, tuple[int, ...]]) -> Contractions:
    """Returns the contractions of a program with parameters of these shapes."""
    used: dict[str, list[Use]] = {}
    for use in self.uses:
      used.setdefault(use.view.path, []).append(use)
    settled = {path: _settled(uses, shapes[path]) for path, uses in used.items()}
    return Contractions(
        shapes={path: shapes[path] for path in used},
        axes={path: a for path, a in settled.items() if isinstance(a, Axes)},
        ambiguous={path: a for path, a in settled.items() if isinstance(a, str)},
        macs={path: self.macs[path] for path in used}, other_macs=self.other, total_macs=self.total,
        elsewhere={path: self.elsewhere.get(path, 'nothing uses it') for path in shapes if path not in used},
        unbounded=tuple(dict.fromkeys(self.unbounded)), unread=tuple(dict.fromkeys(self.unread)),
        uses={path: tuple(uses) for path, uses in used.items()}, lookups=self.lookups)


def _settled(uses: list[Use], shape: tuple[int, ...]) -> Axes | str:
  """Returns the axes on which all uses agree, or why there are none."""
  uses = [use for use in uses if use.data] or uses
  for use in uses:
    if use.axes is None:
      return f'{use.place} {use.problem}.'
  wide = [tuple(tuple(i for i in field if shape[i] > 1) for field in use.axes[:4]) for use in uses]
  for use, axes in zip(uses, wide):
    if axes != wide[0]:
      both = ', but '.join(f'{u.place} contracts axes {u.axes.contracted} with output {u.axes.output} and layers '
                           f'{u.axes.layer}' for u in (uses[0], use))
      return f'{both}; one mask cannot follow both.'
  return uses[0].axes


def _operation(eqn: Any, values: list[Value], here: Position) -> list[Value]:
  if eqn.primitive.name in jaxprs.CONTRACTIONS:
    return _contracted(eqn, values, here)
  if _hides_a_contraction(eqn):
    weights = dict.fromkeys(view.path for value in values for view in value.views)
    here.notes.unread.append(jaxprs.place(eqn) + (f' with {errors.some(weights)}' if weights else ''))
    return [Value(max((value.kind for value in values), default=CONSTANT)) for _ in eqn.outvars]
  return [_typed(value, v.aval) for value, v in zip(views.shown(eqn, values), eqn.outvars)]


def _hides_a_contraction(eqn: Any) -> bool:
  """Returns whether an operation that cannot be read could contract.

  JAX's own operations do not contract inside, unless they contain a program that does. An operation on at most one
  array cannot contract.
  """
  if any(map(_contracts, jaxprs.hidden(eqn))):
    return True
  arrays = sum(math.prod(shape) > 1 for shape in jaxprs.shapes(eqn.invars) if shape is not None)
  return eqn.primitive.name not in views.KNOWN and arrays > 1 and bool(eqn.outvars)


def _contracts(program: Any) -> bool:
  return any(eqn.primitive.name in jaxprs.CONTRACTIONS or any(map(_contracts, jaxprs.hidden(eqn)))
             for eqn in jaxprs.opened(program).eqns)


def _ended(eqn: Any, values: list[Value], results: list[Value], here: Position) -> None:
  """Notes the first operation that took a parameter in and whose results do not show the parameter.

  If a look-up ends a view of the array that it looks up in, data are the index, and a row is picked.
  """
  alive = {view.path for value in results for view in value.views}
  for i, value in enumerate(values):
    for view in value.views:
      if view.path not in alive:
        here.notes.elsewhere.setdefault(view.path, jaxprs.place(eqn))
        if i == 0 and eqn.primitive.name in LOOKUPS:
          here.notes.lookups.setdefault(view.path, jaxprs.place(eqn))


def _merged(notes: ContractionNotes, parts: list[ContractionNotes], eqn: Any, times: int | None) -> None:
  """Adds the uses of all branches, and the multiply-adds of the branch that has the most."""
  most, rounds = max(parts, key=lambda part: part.total), 1 if times is None else times
  for part in parts:
    notes.add(part, rounds if part is most else 0)
  if times is None and most.total:
    notes.unbounded.append(jaxprs.place(eqn))


LOOKUPS = {'gather', 'dynamic_slice'}
RULES = FactRules(_operation, views.joined, Value(), views.repeated, views.sliced, views.stacked, views.resized,
                  ContractionNotes, _merged, _ended)


# Contractions.


def _contracted(eqn: Any, values: list[Value], here: Position) -> list[Value]:
  """Notes the parameters among both operands. The product of two parameters is a parameter (`A @ B`)."""
  contraction, kinds = jaxprs.CONTRACTIONS[eqn.primitive.name](eqn), {value.kind for value in values[:2]}
  shares: dict[str, Fraction] = {}
  for operand, (value, roles) in enumerate(zip(values, contraction.roles)):
    for view in value.views:
      if roles is not None and _covers(view, roles):
        use = Use(*_axes(_without_groups(view, roles, contraction.groups), roles), DATA in kinds, jaxprs.place(eqn),
                  here.address, operand, view)
        here.notes.uses.append(use)
        shares[view.path] = max(shares.get(view.path, Fraction(0)), view.share)
  for path, share in shares.items():
    here.notes.macs[path] += int(contraction.macs * share)
  here.notes.total += contraction.macs
  here.notes.other += 0 if shares else contraction.macs
  kind = kinds.pop() if len(kinds) == 1 else DATA  # A parameter times a constant is already an activation.
  return [Value(kind) for _ in eqn.outvars]


def _covers(view: View, roles: Sequence[str]) -> bool:
  """Returns whether the operand is the parameter, rather than a broadcast scale or a bias row made of it."""
  known = all(role in ('layer', 'spatial') or n == 1 or factors.over(dim)
              for dim, n, role in zip(view.dims, factors.shape_of(view.dims), roles))
  return known and any(role == 'contracted' and set(factors.over(dim)) - {JOINED}
                       for dim, role in zip(view.dims, roles))


def _axes(view: View, roles: Sequence[str]) -> tuple[Axes | None, str]:
  """Returns the axes of a parameter in one contraction and '', or `None` and the reason.

  All parts of an axis must have the same role. An output or spatial axis may also have a part that was picked.
  """
  parts: dict[int, dict[str, None]] = {axis: {'layer': None} for axis in view.gone}
  for dim, role in zip(view.dims, roles):
    for axis in factors.over(dim):
      parts.setdefault(axis, {})[role] = None
  parts.pop(JOINED, None)
  fields: dict[str, list[int]] = {role: [] for role in ('contracted', 'output', 'spatial', 'layer')}
  for axis, met in parts.items():
    clear = [role for role in met if role != 'layer' or len(met) == 1]
    if len(clear) > 1 or (len(met) > 1 and 'contracted' in met):
      return None, f'uses one part of axis {axis} as {" and another as ".join(met)}'
    fields[clear[0]].append(axis)
  order = fields.pop('contracted')  # in the order in which the program flattens the axes
  return Axes(tuple(order), **{role: tuple(sorted(axes)) for role, axes in fields.items()}, source='traced'), ''


def _without_groups(view: View, roles: Sequence[str], groups: int) -> View:
  """Returns the view without the copies in its output dimension: a `vmap` over kernels becomes feature groups."""
  dims, gone, i = list(view.dims), set(view.gone), roles.index('output') if 'output' in roles else 0
  while groups > 1 and len(dims[i]) > 1 and groups % dims[i][0].size == 0:
    groups //= dims[i][0].size
    gone |= set(dims[i][0].axes)
    dims[i] = dims[i][1:]
  return view._replace(dims=tuple(dims), gone=frozenset(gone))
