"""Reads the operations of programs: this module, and `sizes` for sizes, know how JAX names parameters.

An operation is a `jax.extend.core.JaxprEqn`, called `eqn`. The functions of this module tell which programs an
operation runs, which dimensions the operation moves, and what each dimension is to a product.

    for address, eqn in equations(trace(model.apply, (variables, x))):
      print(address, place(eqn))                       # (3, 0, 1) dot_general in mlp at model.py:12

An *address* names one operation of a program and of its inner programs. An address is a tuple: the number of an
operation, the number of an inner program that this operation runs, the number of an operation there, and so on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core, source_info_util

Address = tuple[int, ...]


def opened(program: Any) -> Any:
  """Returns the open jaxpr of a `Program` or of a closed jaxpr; an open jaxpr is returned as it is."""
  return getattr(program, 'jaxpr', program)


def constants(program: Any) -> Sequence[Any]:
  """Returns the values of the constants of a program; an open jaxpr has none."""
  return getattr(program, 'consts', ())


def place(eqn: Any) -> str:
  """Returns the name of an operation and where the user wrote it: `dot_general in mlp at model.py:12`."""
  scope, at = scope_of(eqn), line(eqn)
  return eqn.primitive.name + (f' in {scope}' if scope else '') + (f' at {at}' if at else '')


def scope_of(eqn: Any) -> str:
  """Returns the scopes around an operation, as `jax.named_scope` and modules name them: `mlp/Dense_0`."""
  return str(eqn.source_info.name_stack)


def line(eqn: Any) -> str:
  """Returns the file and the line of the user's code that an operation comes from."""
  return source_info_util.summarize(eqn.source_info)


def shapes(variables: Sequence[Any]) -> list[tuple[int, ...] | None]:
  """Returns the shape of each variable, `None` for a token or another variable without a shape."""
  return [getattr(v.aval, 'shape', None) for v in variables]


# Programs inside of a program.


class Scan(NamedTuple):
  """A `Scan` holds the body of a `scan`, and how the `scan` runs it."""

  body: Any
  length: int
  reverse: bool
  unroll: int


def scan_parts(eqn: Any, operands: list[Any]) -> tuple[Scan, list[Any], list[Any], list[Any]]:
  """Returns a `scan`, and the constants, the carries and the stacks among its operands.

  A step gets one slice of each stack. Versions of JAX name the numbers of constants and carries differently. On every
  version the ranks tell these numbers: a stack has one axis more than its slice, which is the input of the body.
  """
  params, body = eqn.params, eqn.params['jaxpr']
  same = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside))
  whole, carries = same(eqn.invars, opened(body).invars), same(eqn.outvars, opened(body).outvars)
  scan = Scan(body, params['length'], params['reverse'], params['unroll'])
  return scan, operands[:whole - carries], operands[whole - carries:whole], operands[whole:]


def while_parts(eqn: Any, operands: list[Any]) -> tuple[tuple[Any, list[Any]], tuple[Any, list[Any]], list[Any]]:
  """Returns the condition and the body of a `while`, each with its constants, and the carries among the operands."""
  params, first = eqn.params, eqn.params['cond_nconsts']
  last = first + params['body_nconsts']
  return (params['cond_jaxpr'], operands[:first]), (params['body_jaxpr'], operands[first:last]), operands[last:]


def branches(eqn: Any) -> Sequence[Any]:
  """Returns the programs of the branches of a `cond`; the first operand of a `cond` is the number of a branch."""
  return eqn.params['branches']


def shards(eqn: Any) -> tuple[Any, int]:
  """Returns the program of a `shard_map`, which takes one shard of each operand, and how many devices run it."""
  mesh = eqn.params['mesh']
  manual = eqn.params.get('newly_manual_axes', eqn.params.get('manual_axes', mesh.axis_names))
  return eqn.params['jaxpr'], math.prod(mesh.shape[name] for name in manual)


def options(eqn: Any) -> tuple[tuple[str, Any], ...]:
  """Returns the parameters of an operation, in the order of their names, as `eqn.primitive.bind` takes them."""
  return tuple(sorted(eqn.params.items()))


def setting(eqn: Any) -> str:
  """Returns the name and the parameters of an operation as a text, which is equal for equal operations.

  The text is without inner programs, functions and the names of functions, which have to be compared by themselves.
  """
  plain = {key: value for key, value in options(eqn)
           if key != 'name' and not callable(value) and not list(core.jaxprs_in_params({key: value}))}
  return f'{eqn.primitive.name} {plain}'


def shard_map_parts(eqn: Any) -> tuple[Any, dict[str, Any]]:
  """Returns the program of a `shard_map`, and the arguments of `jax.shard_map` that reproduce the operation."""
  options = {name: eqn.params[name] for name in ('mesh', 'in_specs', 'out_specs', 'check_vma')}
  return eqn.params['jaxpr'], {**options, 'in_specs': tuple(options['in_specs']), 'out_specs': [*options['out_specs']],
                               'axis_names': set(eqn.params['newly_manual_axes'])}


def body(eqn: Any) -> Any | None:
  """Returns the program that an operation runs once on its operands as they are, or `None`.

  `jit`, `remat` and functions with derivatives of their own run such a program. The shapes of its inputs and outputs
  tell, so that the names of a new version of JAX do not matter.
  """
  for program in eqn.params.values():  # `core.jaxprs_in_params` would open a closed jaxpr, and lose its constants
    if not isinstance(program, (core.Jaxpr, core.ClosedJaxpr)):
      continue
    inside = opened(program)
    if shapes(inside.invars) == shapes(eqn.invars) and shapes(inside.outvars) == shapes(eqn.outvars):
      return program
  return None


def remat_options(eqn: Any) -> dict[str, Any]:
  """Returns the arguments of `jax.checkpoint` that reproduce an operation of `remat`."""
  return {name: eqn.params[name] for name in ('prevent_cse', 'policy')}


def captured(eqn: Any, operands: list[Any]) -> tuple[list[Any], list[Any]]:
  """Returns the values that a function with derivatives of its own closes over, and its arguments."""
  number = eqn.params.get('num_consts', 0)
  return operands[:number], operands[number:]


STRUCTURES: dict[str, Callable[[Any], Sequence[Any]]] = {
  'scan': lambda eqn: [eqn.params['jaxpr']], 'cond': branches, 'shard_map': lambda eqn: [shards(eqn)[0]],
  'while': lambda eqn: [eqn.params['cond_jaxpr'], eqn.params['body_jaxpr']]}


def inner(eqn: Any) -> Sequence[Any]:
  """Returns the programs that an operation runs, in the order in which addresses number them; most run none."""
  if eqn.primitive.name in STRUCTURES:
    return STRUCTURES[eqn.primitive.name](eqn)
  program = body(eqn)
  return [] if program is None else [program]


def equations(program: Any, address: Address = (), entered: Callable[[Any], bool] = lambda eqn: True
              ) -> Iterator[tuple[Address, Any]]:
  """Yields the address and the equation of each operation; an operation comes before those of its inner programs.

  `entered(eqn)` tells whether the inner programs of an operation are included.
  """
  for i, eqn in enumerate(opened(program).eqns):
    yield (*address, i), eqn
    for k, part in enumerate(inner(eqn) if entered(eqn) else ()):
      yield from equations(part, (*address, i, k), entered)


def hidden(eqn: Any) -> Sequence[Any]:
  """Returns every program among the parameters of an operation, whether `inner` returns the program or not."""
  return list(core.jaxprs_in_params(eqn.params))


# Operations that move dimensions.

_DIMENSIONS = {
  'broadcast_in_dim': 'broadcast_dimensions', 'concatenate': 'dimension', 'reshape': 'dimensions',
  'squeeze': 'dimensions', 'stack': 'axis', 'transpose': 'permutation', 'unstack': 'axis'}


def dimensions(eqn: Any) -> Any:
  """Returns the dimensions that are a parameter of an operation that moves dimensions.

  `transpose`: the permutation. `squeeze`: the dimensions to remove. `broadcast_in_dim`: the place of each dimension of
  the operand in the result. `reshape`: the order in which the dimensions are read before, or `None`. `concatenate`,
  `stack`, `unstack`: the axis.
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
  """A `Numbers` holds the contracted and the batch dimensions of one operand of a product.

  The numbers of both operands are in the same order: entry `i` of one operand is paired with entry `i` of the other.
  """

  contracted: tuple[int, ...]
  batch: tuple[int, ...]


def dot_numbers(eqn: Any) -> tuple[Numbers, Numbers]:
  """Returns the `Numbers` of both operands of a `dot_general`."""
  contracted, batch = eqn.params['dimension_numbers']
  return tuple(Numbers(tuple(c), tuple(b)) for c, b in zip(contracted, batch))


def product_options(eqn: Any) -> tuple[Any, Any]:
  """Returns the precision and the `out_sharding` that a product asks for; each is `None` if the product asks for none.
  """
  return eqn.params.get('precision'), eqn.params.get('out_sharding')


class Convolution(NamedTuple):
  """A `Convolution` holds the parameters of a convolution.

  `lhs`, `rhs` and `out` are the dimension numbers of the input, the kernel and the result. `lhs` and `out` begin with
  batch and feature, `rhs` with output and input feature; the spatial dimensions follow. `dilation` is that of the
  input, and `apart` that of the kernel.
  """

  lhs: tuple[int, ...]
  rhs: tuple[int, ...]
  out: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  dilation: tuple[int, ...]
  groups: int
  batch_groups: int
  apart: tuple[int, ...]


def convolution(eqn: Any) -> Convolution:
  """Returns the parameters of a `conv_general_dilated`."""
  p = eqn.params
  return Convolution(*p['dimension_numbers'], p['window_strides'], p['padding'], p['lhs_dilation'],
                     p['feature_group_count'], p['batch_group_count'], p['rhs_dilation'])


def rows_in_groups(eqn: Any) -> bool:
  """Returns whether a `ragged_dot_general` gives each row of a matrix the matrix of its own group, and no more.

  The other forms of the operation have batch dimensions, or groups of contracted indices.
  """
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (left, right), batch = numbers.dot_dimension_numbers
  groups, rows = tuple(numbers.rhs_group_dimensions), tuple(numbers.lhs_ragged_dimensions)
  return (tuple(left), tuple(right), batch, groups, rows) == ((1,), (1,), ((), ()), (0,), (0,))


class Contraction(NamedTuple):
  """A `Contraction` says what each dimension of the operands is to a product.

  `roles` has one entry for each of the first two operands: 'contracted', 'output', 'layer' or 'spatial' for each
  dimension. The entry is `None` for the input of a convolution, which is never a kernel. `macs` is the number of
  multiply-adds, and `groups` the number of feature groups.
  """

  roles: tuple[Sequence[str] | None, ...]
  macs: int
  groups: int = 1


def _roles(rank: int, contracted: Sequence[int], layer: Sequence[int]) -> list[str]:
  return ['contracted' if i in contracted else 'layer' if i in layer else 'output' for i in range(rank)]


def _dot_general(eqn: Any) -> Contraction:
  numbers, operands = dot_numbers(eqn), shapes(eqn.invars)
  roles = tuple(_roles(len(shape), *number) for shape, number in zip(operands, numbers))
  contracted = math.prod(operands[0][i] for i in numbers[0].contracted)
  return Contraction(roles, math.prod(eqn.outvars[0].aval.shape) * contracted)


def _ragged_dot_general(eqn: Any) -> Contraction:
  """Every row of the left operand meets the matrix of its own group, so a group is a layer."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  groups = ((), numbers.rhs_group_dimensions)
  operands = shapes(eqn.invars[:2])
  roles = tuple(_roles(len(s), c, (*b, *g)) for s, c, b, g in zip(operands, contracted, batch, groups))
  outputs = math.prod(n for n, role in zip(operands[1], roles[1]) if role == 'output')
  return Contraction(roles, math.prod(operands[0]) * outputs)


def _conv_general_dilated(eqn: Any) -> Contraction:
  """A parameter that is convolved counts as data. In a transposed convolution each input meets each tap."""
  asked, (lhs, rhs, out) = convolution(eqn), shapes((*eqn.invars[:2], *eqn.outvars))
  output, contracted = asked.rhs[:2]
  positions = [lhs[i] if d > 1 else out[o] for i, o, d in zip(asked.lhs[2:], asked.out[2:], asked.dilation)]
  taps = math.prod(rhs[i] for i in asked.rhs[2:])
  macs = out[asked.out[0]] * out[asked.out[1]] * math.prod(positions) * taps * rhs[contracted]
  roles = ['output' if i == output else 'contracted' if i == contracted else 'spatial' for i in range(len(rhs))]
  return Contraction((None, roles), macs, asked.groups)


# Maps each product to the function that reads it.
CONTRACTIONS: dict[str, Callable[[Any], Contraction]] = {
  'dot_general': _dot_general, 'ragged_dot_general': _ragged_dot_general, 'conv_general_dilated': _conv_general_dilated}
