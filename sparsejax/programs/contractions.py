"""Which parameter feeds which contraction, along which axes: read from the program, for any JAX function.

`contractions` traces a function abstractly and walks its jaxpr, through `jit`, `scan`, `while`, `cond`, `remat`,
`shard_map` and custom derivatives. `views` follows the parameters through everything elementwise and through reshapes,
transposes, slices and the like; at each contraction the axes and the number of multiply-adds are read off.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from sparsejax import errors, trees
from sparsejax.programs import views
from sparsejax.programs.views import CONSTANT, DATA, JOINED, PARAMETER, Factor, Value, View
from sparsejax.types import Axes, PyTree


class Use(NamedTuple):
  """A parameter in a contraction: its axes or why it has none, whether data are on the other side, and the place."""

  axes: Axes | None
  problem: str
  data: bool
  where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Contractions(Mapping[str, Axes]):
  """Path -> `Axes` of each parameter that a program contracts, in the order of first use.

  `contractions[path]` raises `ValueError` if the program contracts the parameter along different axes in different
  places, or contracts a part of an axis; `ambiguous` has those paths, with the reason. Other fields:

  `shapes`: of the parameters here. `macs`: multiply-adds of one call, batch and scan length included, in the
  contractions of each parameter; one that two parameters share (`W + A @ B`) counts for both. `other_macs`: in
  contractions of no parameter, such as attention scores. `total_macs`: each contraction once; padding counts like data.
  `elsewhere`: each parameter in no contraction, and the operation that took it in. `unbounded`: loops whose number of
  rounds the program does not tell; one round is counted. `unread`: operations that hide what they compute (a kernel, a
  callback); nothing of them is counted. If either is not empty, the counts are lower bounds.
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
    rows = [('parameter', 'shape', 'contracted', 'output', 'layer', 'spatial', 'multiply-adds')]
    for path, shape in self.shapes.items():
      a = self.axes.get(path)
      axes = ['?'] * 4 if a is None else [_listed(x) for x in (a.contracted, a.output, a.layer, a.spatial)]
      rows.append((path, _listed(shape), *axes, f'{self.macs[path]:,}'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(map(str.ljust, row[:-1], widths)) + '  ' + row[-1].rjust(widths[-1]) for row in rows]
    lines.append(f'multiply-adds of one call: {self.total_macs:,}, of which without a parameter: {self.other_macs:,}')
    lines += [f'? {path}: {problem}' for path, problem in self.ambiguous.items()]
    lines += [f'counted once, rounds unknown: {loop}' for loop in self.unbounded]
    return '\n'.join(lines + [f'not counted, cannot be read: {what}' for what in self.unread])


def _listed(numbers: Sequence[int]) -> str:
  return ' '.join(map(str, numbers)) or '-'


def contractions(apply: Callable[..., Any], params: PyTree, *inputs: Any, **kwargs: Any) -> Contractions:
  """Read the program `apply(params, *inputs, **kwargs)`, without running it.

  Leaves of `params` and of the inputs may be arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are looked at.
  Leaves that are neither (`train=False`, a string, an activation function) are handed to `apply` as they are; an array
  that must be concrete goes into a `lambda` or a `functools.partial`. Masks and noise scales that multiply a weight
  belong in `params`, or are closed over: a weight times an input is data. Typed PRNG keys are no data.

      contractions(model.apply, variables, x, train=False)                       # Linen
      contractions(lambda s, x: nnx.merge(graphdef, s)(x), state, x)             # NNX
      contractions(lambda m, x: eqx.combine(m, static)(x), arrays, x)            # Equinox

  Where a parameter meets data, those contractions decide its axes (so a spectral norm or a penalty on `W` does not
  count), otherwise those with other parameters (`A @ B`). An axis of independent copies is in `layer` when the program
  shows that it is: a scan, a batch dimension, a picked index. An ensemble of which every member reads the same input is
  one wide matrix; there the ensemble's axis is in `output`. Counts include code whose result is not used. `apply` is
  the forward pass: a gradient contracts each weight along its outputs too.
  """
  paths, leaves, treedef = trees.flatten(params)
  others, others_def = jax.tree.flatten((inputs, kwargs))
  abstract = [_is_array(leaf) for leaf in leaves + others]

  def program(*arrays: Any) -> list[Any]:
    rest = iter(arrays)
    values = [next(rest) if is_array else leaf for leaf, is_array in zip(leaves + others, abstract)]
    args, options = others_def.unflatten(values[len(leaves):])
    result = apply(treedef.unflatten(values[:len(leaves)]), *args, **options)
    return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]

  jaxpr = jax.make_jaxpr(program)(*[leaf for leaf, is_array in zip(leaves + others, abstract) if is_array]).jaxpr
  names = [name for name, is_array in zip(paths + [None] * len(others), abstract) if is_array]
  shapes = {name: var.aval.shape for name, var in zip(names, jaxpr.invars) if name is not None}
  found = Found()
  _walk(jaxpr, [_argument(name, var.aval) for name, var in zip(names, jaxpr.invars)], found)
  return found.result(shapes)


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def _argument(path: str | None, aval: Any) -> Value:
  if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
    return Value(CONSTANT)
  if path is None:
    return Value(DATA)
  return _typed(Value(PARAMETER, (views.whole(path, aval.shape),)), aval)


def _typed(value: Value, aval: Any) -> Value:
  """A mask is no weight: what is `bool` shows no parameter."""
  return Value(value.kind) if getattr(aval, 'dtype', None) == jnp.bool_ else value


@dataclasses.dataclass
class Found:
  """What a walk has met so far."""

  uses: dict[str, list[Use]] = dataclasses.field(default_factory=dict)
  macs: dict[str, int] = dataclasses.field(default_factory=dict)
  other: int = 0
  total: int = 0
  ended: dict[str, str] = dataclasses.field(default_factory=dict)
  unbounded: list[str] = dataclasses.field(default_factory=list)
  unread: list[str] = dataclasses.field(default_factory=list)

  def add(self, part: 'Found', times: int = 1) -> None:
    """Takes over what was met in a part of the program that runs `times` times."""
    for path, uses in part.uses.items():
      self.uses.setdefault(path, []).extend(uses)
    for path, macs in part.macs.items():
      self.macs[path] = self.macs.get(path, 0) + macs * times
    self.other += part.other * times
    self.total += part.total * times
    self.ended = {**part.ended, **self.ended}
    self.unbounded += part.unbounded
    self.unread += part.unread

  def result(self, shapes: Mapping[str, tuple[int, ...]]) -> Contractions:
    used = {path: shapes[path] for path in self.uses}
    settled = {path: _settled(uses, shapes[path]) for path, uses in self.uses.items()}
    return Contractions(
        shapes=used, axes={path: a for path, a in settled.items() if isinstance(a, Axes)},
        ambiguous={path: a for path, a in settled.items() if isinstance(a, str)},
        macs={path: self.macs.get(path, 0) for path in used}, other_macs=self.other, total_macs=self.total,
        elsewhere={path: self.ended.get(path, 'nothing uses it') for path in shapes if path not in used},
        unbounded=tuple(dict.fromkeys(self.unbounded)), unread=tuple(dict.fromkeys(self.unread)))


def _settled(uses: list[Use], shape: tuple[int, ...]) -> Axes | str:
  """The axes on which all uses agree, or why there are none."""
  uses = [use for use in uses if use.data] or uses
  for use in uses:
    if use.axes is None:
      return f'{use.where} {use.problem}.'
  wide = [tuple(tuple(i for i in field if shape[i] > 1) for field in use.axes[:4]) for use in uses]
  for use, axes in zip(uses, wide):
    if axes != wide[0]:
      both = ', but '.join(f'{u.where} contracts axes {u.axes.contracted} with output {u.axes.output} and layers '
                           f'{u.axes.layer}' for u in (uses[0], use))
      return f'{both}; one mask cannot follow both.'
  return uses[0].axes


def _walk(jaxpr: Any, arguments: Sequence[Value], found: Found) -> list[Value]:
  """Follows the values through one jaxpr; its constants stay constants."""
  env = dict(zip(jaxpr.invars, arguments))
  read = lambda v: Value() if isinstance(v, core.Literal) else env.get(v, Value())
  for eqn in jaxpr.eqns:
    values = [read(v) for v in eqn.invars]
    results = _results(eqn, values, found)
    env.update((v, _typed(value, v.aval)) for v, value in zip(eqn.outvars, results))
    _note_ends(eqn, values, [env[v] for v in eqn.outvars], found)
  return [read(v) for v in jaxpr.outvars]


def _results(eqn: Any, values: list[Value], found: Found) -> list[Value]:
  name = eqn.primitive.name
  if name in CONTRACTIONS:
    return _contract(eqn, values, found)
  if name in STRUCTURES:
    return STRUCTURES[name](eqn, values, found)
  for body in core.jaxprs_in_params({key: p for key, p in eqn.params.items() if not isinstance(p, tuple)}):
    if _shapes(body.invars) == _shapes(eqn.invars) and _shapes(body.outvars) == _shapes(eqn.outvars):
      return _walk(body, values, found)
  if _hides_a_contraction(eqn):
    weights = dict.fromkeys(view.path for value in values for view in value.views)
    found.unread.append(_where(eqn) + (f' with {errors.some(weights)}' if weights else ''))
    return [Value(max((value.kind for value in values), default=CONSTANT)) for _ in eqn.outvars]
  return views.follow(eqn, values)


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...] | None]:
  return [getattr(v.aval, 'shape', None) for v in variables]


def _hides_a_contraction(eqn: Any) -> bool:
  """Could there be one inside? Not in JAX's own operations, nor where there is at most one array to multiply."""
  if any(_contracts(body) for body in core.jaxprs_in_params(eqn.params)):
    return True
  arrays = sum(math.prod(v.aval.shape) > 1 for v in eqn.invars if hasattr(v.aval, 'shape'))
  return eqn.primitive.name not in views.KNOWN and arrays > 1 and bool(eqn.outvars)


def _contracts(jaxpr: Any) -> bool:
  return any(eqn.primitive.name in CONTRACTIONS or any(map(_contracts, core.jaxprs_in_params(eqn.params)))
             for eqn in jaxpr.eqns)


def _where(eqn: Any) -> str:
  scope, line = str(eqn.source_info.name_stack), source_info_util.summarize(eqn.source_info)
  return eqn.primitive.name + (f' in {scope}' if scope else '') + (f' at {line}' if line else '')


def _note_ends(eqn: Any, values: list[Value], results: list[Value], found: Found) -> None:
  """Remembers the first operation that took a parameter in and gave nothing out that shows it."""
  alive = {view.path for value in results for view in value.views}
  for value in values:
    for view in value.views:
      if view.path not in alive:
        found.ended.setdefault(view.path, _where(eqn))


# Contractions.


def _contract(eqn: Any, values: list[Value], found: Found) -> list[Value]:
  """Records the parameters among the two operands. Parameters times parameters are a parameter (`A @ B`)."""
  roles, macs = CONTRACTIONS[eqn.primitive.name](eqn)
  kinds = {value.kind for value in values[:2]}
  shares: dict[str, Fraction] = {}
  for value, operand_roles in zip(values, roles):
    for view in value.views:
      if operand_roles is not None and _covers(view, operand_roles):
        axes, problem = _axes(_without_groups(view, operand_roles, eqn), operand_roles)
        found.uses.setdefault(view.path, []).append(Use(axes, problem, DATA in kinds, _where(eqn)))
        shares[view.path] = max(shares.get(view.path, Fraction(0)), view.share)
  for path, share in shares.items():
    found.macs[path] = found.macs.get(path, 0) + int(macs * share)
  found.total += macs
  found.other += 0 if shares else macs
  kind = kinds.pop() if len(kinds) == 1 else DATA  # a parameter times a constant is already an activation
  return [Value(kind) for _ in eqn.outvars]


def _covers(view: View, roles: Sequence[str]) -> bool:
  """Is the operand this parameter? Not a scale broadcast along a contracted or output dimension, nor a bias row."""
  known = all(role in ('layer', 'spatial') or n == 1 or views.over(dim)
              for dim, n, role in zip(view.dims, views.shape_of(view), roles))
  return known and any(role == 'contracted' and set(views.over(dim)) - {JOINED} for dim, role in zip(view.dims, roles))


def _axes(view: View, roles: Sequence[str]) -> tuple[Axes | None, str]:
  """The role of each leaf axis; those of its parts must agree, except that rows and taps may also be picked from."""
  parts: dict[int, dict[str, None]] = {axis: {'layer': None} for axis in view.gone}
  for dim, role in zip(view.dims, roles):
    for axis in views.over(dim):
      parts.setdefault(axis, {})[role] = None
  parts.pop(JOINED, None)
  fields: dict[str, list[int]] = {role: [] for role in ('contracted', 'output', 'spatial', 'layer')}
  for axis, met in parts.items():
    clear = [role for role in met if role != 'layer' or len(met) == 1]
    if len(clear) > 1 or (len(met) > 1 and 'contracted' in met):
      return None, f'uses one part of axis {axis} as {" and another as ".join(met)}'
    fields[clear[0]].append(axis)
  order = fields.pop('contracted')  # as the program flattens them
  return Axes(tuple(order), **{role: tuple(sorted(axes)) for role, axes in fields.items()}, source='traced'), ''


def _without_groups(view: View, roles: Sequence[str], eqn: Any) -> View:
  """A `vmap` over kernels becomes feature groups: copies that were merged into the output dimension are layers."""
  groups = eqn.params.get('feature_group_count', 1)
  dims, gone, i = list(view.dims), set(view.gone), roles.index('output') if 'output' in roles else 0
  while groups > 1 and len(dims[i]) > 1 and groups % dims[i][0].size == 0:
    groups //= dims[i][0].size
    gone |= set(dims[i][0].axes)
    dims[i] = dims[i][1:]
  return view._replace(dims=tuple(dims), gone=frozenset(gone))


def _dot_roles(rank: int, contracted: Sequence[int], layer: Sequence[int]) -> list[str]:
  return ['contracted' if i in contracted else 'layer' if i in layer else 'output' for i in range(rank)]


def _dot_general(eqn: Any) -> tuple[list[Any], int]:
  contracted, batch = eqn.params['dimension_numbers']
  shapes = [v.aval.shape for v in eqn.invars]
  roles = [_dot_roles(len(shape), c, b) for shape, c, b in zip(shapes, contracted, batch)]
  return roles, math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][i] for i in contracted[0])


def _ragged_dot_general(eqn: Any) -> tuple[list[Any], int]:
  """Every row of the left operand meets the matrix of its own group."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  groups = ((), numbers.rhs_group_dimensions)
  shapes = [v.aval.shape for v in eqn.invars[:2]]
  roles = [_dot_roles(len(s), c, (*b, *g)) for s, c, b, g in zip(shapes, contracted, batch, groups)]
  return roles, math.prod(shapes[0]) * math.prod(n for n, role in zip(shapes[1], roles[1]) if role == 'output')


def _conv_general_dilated(eqn: Any) -> tuple[list[Any], int]:
  """The kernel only: a parameter that is convolved is read as data. Each input of a transposed one meets each tap."""
  numbers, dilation = eqn.params['dimension_numbers'], eqn.params['lhs_dilation']
  lhs, rhs, out = (v.aval.shape for v in (*eqn.invars[:2], *eqn.outvars))
  output, contracted = numbers.rhs_spec[:2]
  positions = [lhs[i] if d > 1 else out[o] for i, o, d in zip(numbers.lhs_spec[2:], numbers.out_spec[2:], dilation)]
  taps = math.prod(rhs[i] for i in numbers.rhs_spec[2:])
  macs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * math.prod(positions) * taps * rhs[contracted]
  roles = ['output' if i == output else 'contracted' if i == contracted else 'spatial' for i in range(len(rhs))]
  return [None, roles], macs


CONTRACTIONS = {
  'dot_general': _dot_general, 'ragged_dot_general': _ragged_dot_general, 'conv_general_dilated': _conv_general_dilated}


# Programs inside of the program.


def _steady(body: Any, consts: list[Value], carry: list[Value], xs: list[Value]
            ) -> tuple[list[Value], list[Value], Found]:
  """Walks the body of a loop until what is known of the carry holds for every round."""
  while True:
    found = Found()
    results = _walk(body, consts + carry + xs, found)
    after = [Value(max(a.kind, b.kind), tuple(view for view in a.views if view in b.views))
             for a, b in zip(carry, results)]
    if after == carry:
      return carry, results[len(carry):], found
    carry = after


def _scan(eqn: Any, values: list[Value], found: Found) -> list[Value]:
  body, length, (first, last) = _open(eqn.params['jaxpr']), eqn.params['length'], scanned(eqn)
  xs = values[last:]
  sliced = [value._replace(views=tuple(views.dropped(view, (0,)) for view in value.views)) for value in xs]
  carry, ys, part = _steady(body, values[:first], values[first:last], sliced)
  found.add(part, times=length)
  stacked = lambda view: _restacked(view, [v for value in xs for v in value.views], length)
  return carry + [value._replace(views=tuple(map(stacked, value.views))) for value in ys]


def scanned(eqn: Any) -> tuple[int, int]:
  """Where among the operands of a `scan` the carry begins, and what its steps take one by one."""
  # They have another name in each JAX; what the steps take or give one by one has one axis more.
  body = _open(eqn.params['jaxpr'])
  whole = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside))
  last = whole(eqn.invars, body.invars)
  return last - whole(eqn.outvars, body.outvars), last


def _restacked(view: View, xs: list[View], length: int) -> View:
  """A step's result stacked over the steps again: along the axis that the scan took apart, or a new one."""
  for x in xs:
    axes = views.over(x.dims[0])
    if x.path == view.path and axes and view.gone.issuperset(axes):
      return view._replace(dims=(x.dims[0], *view.dims), gone=view.gone.difference(axes) | x.gone)
  return view._replace(dims=((Factor((), length),), *view.dims))


def _while(eqn: Any, values: list[Value], found: Found) -> list[Value]:
  a, b = eqn.params['cond_nconsts'], eqn.params['cond_nconsts'] + eqn.params['body_nconsts']
  carry, _, part = _steady(_open(eqn.params['body_jaxpr']), values[a:b], values[b:], [])
  _walk(_open(eqn.params['cond_jaxpr']), values[:a] + carry, part)
  found.add(part)
  if part.total:
    found.unbounded.append(_where(eqn))
  return carry


def _cond(eqn: Any, values: list[Value], found: Found) -> list[Value]:
  """All branches are read; the multiply-adds are those of the branch with most of them."""
  parts = [Found() for _ in eqn.params['branches']]
  results = [_walk(_open(branch), values[1:], part) for branch, part in zip(eqn.params['branches'], parts)]
  most = max(parts, key=lambda part: part.total)
  for part in parts:
    found.add(part if part is most else dataclasses.replace(part, macs={}, other=0, total=0))
  return [Value(max(value.kind for value in column), views.distinct(view for value in column for view in value.views))
          for column in zip(*results)]


def _shard_map(eqn: Any, values: list[Value], found: Found) -> list[Value]:
  """The body sees one shard of everything and runs on every device."""
  params, body, part = eqn.params, _open(eqn.params['jaxpr']), Found()
  fitted = lambda value, var: value._replace(
      views=views.distinct(views.resized(view, var.aval.shape) for view in value.views))
  results = _walk(body, list(map(fitted, values, body.invars)), part)
  manual = params.get('newly_manual_axes', params.get('manual_axes', params['mesh'].axis_names))
  found.add(part, times=math.prod(params['mesh'].shape[name] for name in manual))
  return list(map(fitted, results, eqn.outvars))


def _open(jaxpr: Any) -> Any:
  return getattr(jaxpr, 'jaxpr', jaxpr)


STRUCTURES = {'scan': _scan, 'while': _while, 'cond': _cond, 'shard_map': _shard_map}
