"""Traces functions, and reads the operations of their programs: the only module that knows how JAX names its parameters.

`trace` gives a `Program`. Every other module of the package asks this one about an operation (`jax.extend.core.JaxprEqn`,
called `eqn`): which programs it runs, which dimensions it moves, and what each dimension of a product is.

    program = trace(model.apply, (variables, x))
    for address, eqn in equations(program.jaxpr):
      print(address, place(eqn))                       # (3, 0, 1) dot_general in mlp at model.py:12

An *address* names one operation of a program, the programs inside of it included. It is a tuple of integers: the number
of an operation, the number of the inner program that this operation runs, the number of an operation there, and so on.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core, source_info_util

from sparsejax import trees

Address = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A traced function: its closed jaxpr, the arrays that it takes, and the structure of its result.

  `arrays`, `arguments` and `paths` have one entry for each input of `jaxpr`: the array that was passed, the number of
  the argument that holds it (keyword arguments come last, as one dict), and its path in that argument.
  """

  jaxpr: Any
  arrays: tuple[Any, ...]
  arguments: tuple[int, ...]
  paths: tuple[str, ...]
  structure: Any
  others: dict[int, Any]

  def unflatten(self, results: Sequence[Any]) -> Any:
    """Returns the result of the function, given the results of its jaxpr; leaves that are no arrays are filled in."""
    rest = iter(results)
    count = len(results) + len(self.others)
    return self.structure.unflatten([self.others[i] if i in self.others else next(rest) for i in range(count)])


def trace(apply: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
          is_leaf: Callable[[Any], bool] | None = None) -> Program:
  """Returns the program of `apply(*args, **kwargs)`, without running it.

  Leaves with a shape and a dtype become inputs of the program; `jax.ShapeDtypeStruct`s will do. All other leaves (a
  flag, a string, a function) are passed to `apply` as they are. `is_leaf` marks nodes, such as packed arrays, that
  `apply` sees as one dense array of their shape and dtype.
  """
  both = (*args, kwargs or {})
  leaves, treedef = jax.tree.flatten(both, is_leaf=is_leaf)
  named = [(i, path) for i, part in enumerate(both) for path in trees.flatten(part, is_leaf=is_leaf)[0]]
  inputs = [i for i, leaf in enumerate(leaves) if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')]
  kept: list[Any] = []

  def flat(*values: Any) -> list[Any]:
    given = dict(zip(inputs, values))
    *positional, options = treedef.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
    results, structure = jax.tree.flatten(apply(*positional, **options))
    kept[:] = structure, {i: result for i, result in enumerate(results) if not isinstance(result, jax.Array)}
    return [result for result in results if isinstance(result, jax.Array)]

  seen = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_leaf is not None and is_leaf(leaf) else leaf
          for leaf in (leaves[i] for i in inputs)]
  jaxpr = jax.make_jaxpr(flat)(*seen)
  arguments, paths = zip(*(named[i] for i in inputs)) if inputs else ((), ())
  return Program(jaxpr, tuple(leaves[i] for i in inputs), arguments, paths, *kept)


def opened(program: Any) -> Any:
  """Returns the jaxpr of a `Program`, of a closed jaxpr, or of a jaxpr itself."""
  closed = program.jaxpr if isinstance(program, Program) else program
  return getattr(closed, 'jaxpr', closed)


def constants(program: Any) -> Sequence[Any]:
  """Returns the values of the constants of a program; an open jaxpr has none."""
  return getattr(program.jaxpr if isinstance(program, Program) else program, 'consts', ())


def place(eqn: Any) -> str:
  """Returns where an operation was written: `dot_general in mlp at model.py:12`."""
  scope, at = scope_of(eqn), line(eqn)
  return eqn.primitive.name + (f' in {scope}' if scope else '') + (f' at {at}' if at else '')


def scope_of(eqn: Any) -> str:
  """Returns the names of `jax.named_scope`, and of the modules, around an operation."""
  return str(eqn.source_info.name_stack)


def line(eqn: Any) -> str:
  """Returns the file and the line of the user's code that an operation comes from."""
  return source_info_util.summarize(eqn.source_info)


def shapes(variables: Sequence[Any]) -> list[tuple[int, ...] | None]:
  """Returns the shape of each variable, `None` for a token or another variable without a shape."""
  return [getattr(v.aval, 'shape', None) for v in variables]


# Programs inside of a program.


class Scan(NamedTuple):
  """The parts of a `scan`: its operands are `constants` constants, `carries` carries, and stacks that are sliced."""

  body: Any
  constants: int
  carries: int
  length: int
  reverse: bool
  unroll: int

  def split(self, operands: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the constants, the carries and the stacks among the operands."""
    last = self.constants + self.carries
    return operands[:self.constants], operands[self.constants:last], operands[last:]


def scan_parts(eqn: Any) -> Scan:
  """Returns the parts of a `scan`.

  Versions of JAX name the numbers of constants and carries differently. Their ranks tell them on every version: a
  stack, outside of the body, has one axis more than its slice inside.
  """
  params, body = eqn.params, eqn.params['jaxpr']
  same = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside))
  whole, carries = same(eqn.invars, opened(body).invars), same(eqn.outvars, opened(body).outvars)
  return Scan(body, whole - carries, carries, params['length'], params['reverse'], params['unroll'])


class While(NamedTuple):
  """The parts of a `while`: its operands are the constants of its condition, those of its body, and the carries."""

  condition: Any
  body: Any
  condition_constants: int
  body_constants: int

  def split(self, operands: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the constants of the condition, those of the body, and the carries among the operands."""
    last = self.condition_constants + self.body_constants
    return operands[:self.condition_constants], operands[self.condition_constants:last], operands[last:]


def while_parts(eqn: Any) -> While:
  """Returns the parts of a `while`."""
  params = eqn.params
  return While(params['cond_jaxpr'], params['body_jaxpr'], params['cond_nconsts'], params['body_nconsts'])


def branches(eqn: Any) -> Sequence[Any]:
  """Returns the programs of the branches of a `cond`, whose first operand is the number of the branch."""
  return eqn.params['branches']


def shards(eqn: Any) -> tuple[Any, int]:
  """Returns the program of a `shard_map`, which sees one shard of each operand, and how many devices run it."""
  mesh = eqn.params['mesh']
  manual = eqn.params.get('newly_manual_axes', eqn.params.get('manual_axes', mesh.axis_names))
  return eqn.params['jaxpr'], math.prod(mesh.shape[name] for name in manual)


def body(eqn: Any) -> Any | None:
  """Returns the program that an operation runs once on its operands as they are, or `None`.

  `jit`, `remat` and functions with derivatives of their own have one. Shapes tell, so that a new version's names do too.
  """
  for program in core.jaxprs_in_params({key: p for key, p in eqn.params.items() if not isinstance(p, tuple)}):
    inside = opened(program)
    if shapes(inside.invars) == shapes(eqn.invars) and shapes(inside.outvars) == shapes(eqn.outvars):
      return program
  return None


def remat_options(eqn: Any) -> dict[str, Any]:
  """Returns the arguments of `jax.checkpoint` that give an operation of `remat` again."""
  return {name: eqn.params[name] for name in ('prevent_cse', 'policy')}


STRUCTURES: dict[str, Callable[[Any], Sequence[Any]]] = {
  'scan': lambda eqn: [scan_parts(eqn).body], 'cond': branches, 'shard_map': lambda eqn: [shards(eqn)[0]],
  'while': lambda eqn: [while_parts(eqn).condition, while_parts(eqn).body]}


def inner(eqn: Any) -> Sequence[Any]:
  """Returns the programs that an operation runs, in the order in which addresses number them; most run none."""
  if eqn.primitive.name in STRUCTURES:
    return STRUCTURES[eqn.primitive.name](eqn)
  program = body(eqn)
  return [] if program is None else [program]


def equations(program: Any, address: Address = ()) -> Iterator[tuple[Address, Any]]:
  """Yields the address and the equation of each operation, those of inner programs after the operation itself."""
  for i, eqn in enumerate(opened(program).eqns):
    yield (*address, i), eqn
    for k, part in enumerate(inner(eqn)):
      yield from equations(part, (*address, i, k))


def hidden(eqn: Any) -> Sequence[Any]:
  """Returns every program among the parameters of an operation, those that `inner` cannot run included."""
  return list(core.jaxprs_in_params(eqn.params))


# Operations that move dimensions.

_DIMENSIONS = {
  'broadcast_in_dim': 'broadcast_dimensions', 'concatenate': 'dimension', 'reshape': 'dimensions',
  'squeeze': 'dimensions', 'stack': 'axis', 'transpose': 'permutation', 'unstack': 'axis'}


def dimensions(eqn: Any) -> Any:
  """Returns the dimensions that a moving operation names.

  `transpose`: the permutation. `squeeze`: the dimensions that go. `broadcast_in_dim`: where each dimension of the operand
  goes. `reshape`: the order in which the dimensions are read first, or `None`. `concatenate`, `stack`, `unstack`: the axis.
  """
  return eqn.params[_DIMENSIONS[eqn.primitive.name]]


def gather_numbers(eqn: Any) -> Any:
  """Returns the `jax.lax.GatherDimensionNumbers` of a `gather`."""
  return eqn.params['dimension_numbers']


def given_name(eqn: Any) -> str | None:
  """Returns the name that `jax.ad_checkpoint.checkpoint_name` gave to the result of an operation, or `None`."""
  return eqn.params['name'] if eqn.primitive.name == 'name' else None


# Products.


class Numbers(NamedTuple):
  """Which dimensions of an operand of a product are contracted and which are batch dimensions, in the paired order."""

  contracted: tuple[int, ...]
  batch: tuple[int, ...]


def dot_numbers(eqn: Any) -> tuple[Numbers, Numbers]:
  """Returns the `Numbers` of both operands of a `dot_general`."""
  contracted, batch = eqn.params['dimension_numbers']
  return tuple(Numbers(tuple(c), tuple(b)) for c, b in zip(contracted, batch))


def product_options(eqn: Any) -> tuple[Any, Any]:
  """Returns the precision and the sharding of the result that a product asks for, `None` where it asks for none."""
  return eqn.params.get('precision'), eqn.params.get('out_sharding')


class Convolution(NamedTuple):
  """What a convolution asks for; `lhs`, `rhs` and `out` are dimension numbers: batch (or output), feature, taps."""

  lhs: tuple[int, ...]
  rhs: tuple[int, ...]
  out: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  dilation: tuple[int, ...]
  groups: int
  batch_groups: int


def convolution(eqn: Any) -> Convolution:
  """Returns what a `conv_general_dilated` asks for."""
  p = eqn.params
  return Convolution(*p['dimension_numbers'], p['window_strides'], p['padding'], p['lhs_dilation'],
                     p['feature_group_count'], p['batch_group_count'])


class Product(NamedTuple):
  """What each dimension of each operand is to a product, and the number of multiply-adds.

  `roles` has one entry for each of the first two operands: 'contracted', 'output', 'layer' or 'spatial' for each
  dimension, or `None` for the input of a convolution, which is never a kernel. `groups` are feature groups.
  """

  roles: tuple[Sequence[str] | None, ...]
  macs: int
  groups: int = 1


def _roles(rank: int, contracted: Sequence[int], layer: Sequence[int]) -> list[str]:
  return ['contracted' if i in contracted else 'layer' if i in layer else 'output' for i in range(rank)]


def _dot_general(eqn: Any) -> Product:
  numbers, operands = dot_numbers(eqn), shapes(eqn.invars)
  roles = tuple(_roles(len(shape), *number) for shape, number in zip(operands, numbers))
  contracted = math.prod(operands[0][i] for i in numbers[0].contracted)
  return Product(roles, math.prod(eqn.outvars[0].aval.shape) * contracted)


def _ragged_dot_general(eqn: Any) -> Product:
  """Every row of the left operand meets the matrix of its own group, so a group is a layer."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  groups = ((), numbers.rhs_group_dimensions)
  operands = shapes(eqn.invars[:2])
  roles = tuple(_roles(len(s), c, (*b, *g)) for s, c, b, g in zip(operands, contracted, batch, groups))
  outputs = math.prod(n for n, role in zip(operands[1], roles[1]) if role == 'output')
  return Product(roles, math.prod(operands[0]) * outputs)


def _conv_general_dilated(eqn: Any) -> Product:
  """A parameter that is convolved counts as data. In a transposed convolution each input meets each tap."""
  asked, (lhs, rhs, out) = convolution(eqn), shapes((*eqn.invars[:2], *eqn.outvars))
  output, contracted = asked.rhs[:2]
  positions = [lhs[i] if d > 1 else out[o] for i, o, d in zip(asked.lhs[2:], asked.out[2:], asked.dilation)]
  taps = math.prod(rhs[i] for i in asked.rhs[2:])
  macs = out[asked.out[0]] * out[asked.out[1]] * math.prod(positions) * taps * rhs[contracted]
  roles = ['output' if i == output else 'contracted' if i == contracted else 'spatial' for i in range(len(rhs))]
  return Product((None, roles), macs, asked.groups)


PRODUCTS: dict[str, Callable[[Any], Product]] = {
  'dot_general': _dot_general, 'ragged_dot_general': _ragged_dot_general, 'conv_general_dilated': _conv_general_dilated}


def product(eqn: Any) -> Product | None:
  """Returns what a product is made of, or `None` for every other operation."""
  return PRODUCTS[eqn.primitive.name](eqn) if eqn.primitive.name in PRODUCTS else None
