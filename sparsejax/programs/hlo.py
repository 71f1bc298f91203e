"""Reads collectives, and which bytes of its inputs a compiled program reads, from the text of the program (HLO).

    for collective in hlo.collectives(jax.jit(step).lower(*arguments).compile().as_text()):
      print(collective.kind, collective.operands, collective.times, collective.sent)

    for read in hlo.reads(text, parameter=1):            # of the second input of the program
      print(read.bytes, read.times, read.by)             # each run, the runs, and the operation

The functions are pure functions of the text and assume nothing. `times` is `None` in a loop whose trip count the
compiler does not print. A collective in a branch is marked, because the text does not say which branch runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# The table maps a collective to the bytes that one device sends for an operand of b bytes in a group of g devices. On a
# ring, each device receives as many.
SENT = {
    'all-gather': lambda b, g: (g - 1) * b,  # (g - 1) / g of the result
    'reduce-scatter': lambda b, g: -(-(g - 1) * b // g),
    'all-reduce': lambda b, g: -(-2 * (g - 1) * b // g),  # a reduce-scatter, then an all-gather
    'all-to-all': lambda b, g: -(-(g - 1) * b // g),
    'ragged-all-to-all': lambda b, g: b,  # an upper bound: the number depends on the data
    'collective-permute': lambda b, g: b,
    'collective-broadcast': lambda b, g: b,
}
_VALUE_KEPT = ('bitcast', 'convert', 'copy', 'reshape', 'transpose')
_FLOATS = re.compile(r'(?:bf|f)\d+')
_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_CALLED = re.compile(r'\b(condition|body|calls|to_apply|true_computation|false_computation|branch_computations|'
                     r'called_computations)=(?:%([\w.\-]+)|\{([^}]*)\})')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A `Collective` is one communication operation of a program, as one device runs it.

  - `operands` holds the types of the operands, such as `f32[4,8]`.
  - `values` holds the same types with the narrowest float type from which each operand was widened. A CPU, which has no
    bfloat16, sends float32 in its place.
  - `group` is the number of devices that communicate with each other.
  - `times` is the number of runs per step, or `None` in a loop of unknown length.
  - `branch` says that a conditional may skip the collective, so that `times` is an upper bound.
  - `name` is the place in the user's program.
  """

  kind: str
  operands: tuple[str, ...]
  values: tuple[str, ...]
  group: int
  times: int | None
  branch: bool = False
  name: str = ''

  @property
  def sent(self) -> int:
    """Returns the bytes that one device sends at each run; the device receives as many."""
    return SENT[self.kind](sum(map(type_bytes, self.operands)), self.group)

  @property
  def sent_values(self) -> int:
    """Returns the bytes that one device sends at each run on a machine that sends `values` without widening them."""
    return SENT[self.kind](sum(map(type_bytes, self.values)), self.group)


class _Instruction(NamedTuple):
  type: str
  opcode: str
  operands: list[str]  # names, or the number of a parameter
  attributes: str


_Computation = dict[str, _Instruction]  # by name; the last is the root


def collectives(text: str) -> tuple[Collective, ...]:
  """Returns the collectives of `text`, which `compiled.as_text()` gives, in the order of the program.

  A collective in a loop is listed once, with its `times`. Raises `ValueError` if the text is incomplete, and for
  replica groups of unknown form.
  """
  computations, entry = _read(text)
  header = text[:text.index('\n') + 1]
  devices = math.prod(int(n) for n in re.findall(r'(?:num_partitions|replica_count)=(\d+)', header))

  @functools.cache
  def has_any(name: str) -> bool:
    if name not in computations:
      raise ValueError(f'hlo.collectives: the text calls {name!r}, which is not in it; pass all of compiled.as_text().')
    return any(_kind(instruction) or any(has_any(callee) for callee, _, _ in _runs(instruction))
               for instruction in computations[name].values())

  def walk(name: str, times: int | None, branch: bool) -> Iterator[Collective]:
    for instruction in computations[name].values():
      if _kind(instruction):
        yield _collective(instruction, name, computations, devices, times, branch)
      for callee, runs, in_branch in _runs(instruction):
        if has_any(callee):
          known = None if times is None or runs is None else times * runs
          yield from walk(callee, known, branch or in_branch)

  return tuple(walk(entry, 1, False)) if has_any(entry) else ()


class Read(NamedTuple):
  """A `Read` is one operation of a program that reads an input, or the same part of it in every run.

  `bytes`: of one run. `times`: the number of runs, or `None` in a loop of unknown length. `branch`: a conditional may
  skip the operation. `by`: the operation, such as 'dot' or 'gather'.
  """

  bytes: int
  times: int | None
  branch: bool
  by: str


_SLICES = ('dynamic-slice', 'gather', 'slice')
_SEEN_THROUGH = ('bitcast', 'get-tuple-element', 'optimization-barrier', 'tuple')


def reads(text: str, parameter: int) -> tuple[Read, ...]:
  """Returns the operations of `text`, of `compiled.as_text()`, that read the input of this number, in their order.

  Slices and gathers read the bytes of their result, and every other operation reads the whole input. Loops,
  conditionals, calls and fusions are entered. An input that goes into a loop as a carry and comes out is followed
  inside of the loop alone.
  """
  computations, entry = _read(text)

  def walk(name: str, given: list[Any], times: int | None, branch: bool) -> Iterator[Read]:
    own: dict[str, Any] = {}
    for label, each in computations[name].items():
      values = [own.get(operand) for operand in each.operands]
      if each.opcode == 'parameter':
        own[label] = given[int(each.operands[0])]
      elif each.opcode in _SEEN_THROUGH:
        own[label] = _through(each, values)
      elif any(_holds(value) for value in values):
        inner = list(_runs(each))
        for callee, runs, in_branch in inner:
          known = None if times is None or runs is None else times * runs
          yield from walk(callee, _handed(each, callee, values), known, branch or in_branch)
        if not inner:
          part = each.opcode in _SLICES
          whole = [operand for operand, value in zip(each.operands, values) if value is True]
          size = _plain(each.type) if part else _plain(computations[name][whole[0]].type) if whole else ''
          yield Read(type_bytes(size), times, branch, each.opcode)

  numbers = [int(each.operands[0]) for each in computations[entry].values() if each.opcode == 'parameter']
  if parameter not in numbers:
    raise ValueError(f'hlo.reads: the program has no input {parameter}, but {sorted(numbers)}; compile with '
                     'jax.jit(..., keep_unused=True).')
  return tuple(walk(entry, [i == parameter for i in range(max(numbers) + 1)], 1, False))


def _holds(value: Any) -> bool:
  return value is True or isinstance(value, list) and any(map(_holds, value))


def _through(each: _Instruction, values: list[Any]) -> Any:
  """Returns what a value holds of the input after an operation that reads nothing: `True`, or a list for a tuple."""
  if each.opcode == 'tuple':
    return values
  index = re.search(r'index=(\d+)', each.attributes) if each.opcode == 'get-tuple-element' else None
  return values[0][int(index[1])] if index and isinstance(values[0], list) else values[0] if not index else None


def _handed(each: _Instruction, callee: str, values: list[Any]) -> list[Any]:
  """Returns what the parameters of a computation hold that an operation runs."""
  if each.opcode != 'conditional':
    return values
  names = [name for single in _CALLED.findall(each.attributes)
           for name in ([single[1]] if single[1] else re.findall(r'[\w.\-]+', single[2]))]
  return [values[1 + names.index(callee)]]


def type_bytes(type_: str) -> int:
  """Returns the bytes of a type such as `f32[4,8]`, or of a tuple of types; types of up to 4 bits count as packed."""
  bits = 0
  for dtype, shape in re.findall(r'([a-z]\w*)\[([\d,<=]*)\]', type_):
    width = re.match(r'[a-z]+(\d+)', dtype)
    each = _BITS[dtype] if dtype in _BITS else int(width[1]) if width else None
    if each is None:
      raise ValueError(f'hlo.type_bytes: {dtype!r} in {type_!r} is a type of unknown width.')
    bits += each * math.prod(int(n.lstrip('<=')) for n in shape.split(',') if n)
  return -(-bits // 8)


def group_size(groups: str, devices: int) -> int:
  """Returns the number of devices in a replica group; `groups` begins with the HLO text of all groups.

  The forms are `{{0,1},{2,3}}`, `[4,2]<=[8]`, `mesh['a'=2,'b'=4] {'b'}`, and `{}` for one group of all `devices`. No
  text means the same as `{}`. Raises `ValueError` for other forms, and for groups of different sizes.
  """
  listed = re.match(r'\{(?:\{[\d,]*\},?)*\}', groups)
  if not groups or listed and listed[0] in ('{}', '{{}}'):
    return devices
  if iota := re.match(r'\[\d+,(\d+)\]<=', groups):
    return int(iota[1])
  if mesh := re.match(r"mesh\[(.*?)\].*?\{([^}]*)\}", groups):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])  # 'b':(1)2 is a part of an axis, of length 2
    if all(part or axis in sizes for axis, part in axes):
      return math.prod(int(part or sizes[axis]) for axis, part in axes)
  lengths = {group.count(',') + 1 for group in re.findall(r'\{([\d,]+)\}', listed[0] if listed else '')}
  if len(lengths) != 1:
    raise ValueError(f'hlo.collectives: cannot read the replica groups {groups[:80]!r}: known are {{{{0,1}},{{2,3}}}}, '
                     "[2,2]<=[4] and mesh['a'=2,'b'=2] {'a'}, all groups of one size.")
  return lengths.pop()


def _read(text: str) -> tuple[dict[str, _Computation], str]:
  """Returns the computations of the text by name, and the name of the entry computation."""
  computations: dict[str, _Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      current = computations[start[2]] = {}
      entry = start[2] if start[1] else entry
    elif current is not None and (start := _INSTRUCTION.match(line)):
      current[start[2]] = _instruction(line[start.end():])
  if not entry:
    raise ValueError('hlo.collectives: no ENTRY in this text; pass what compiled.as_text() returns.')
  return computations, entry


def _instruction(text: str) -> _Instruction:
  """Parses `TYPE opcode(operands), attributes`; the type may be a tuple, and a layout may contain parentheses."""
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  opening = text.index('(', end)
  closing = _closing(text, opening)
  inside = text[opening + 1:closing - 1]
  names = [inside] if inside.isdigit() else re.findall(r'%([\w.\-]+)', inside)
  return _Instruction(text[:end], text[end:opening].strip(), names, text[closing:])


def _closing(text: str, opening: int) -> int:
  """Returns the index behind the parenthesis that closes the parenthesis at index `opening`."""
  depth = 0
  for parenthesis in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if parenthesis[0] == '(' else -1
    if not depth:
      return parenthesis.end()
  return len(text)


def _kind(instruction: _Instruction) -> str | None:
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in SENT else None


def _runs(instruction: _Instruction) -> Iterator[tuple[str, int | None, bool]]:
  """Yields each computation that an instruction runs, its number of runs, and whether a conditional may skip it."""
  if instruction.opcode in ('async-update', 'async-done'):  # both name the computation of async-start again
    return
  count = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
  trips = int(count[1]) if count else None
  # Metadata is removed, because names of the user could look like attributes.
  attributes = re.sub(r'metadata=\{(?:"[^"]*"|[^}"])*\}', '', instruction.attributes)
  for role, single, several in _CALLED.findall(attributes):
    for callee in [single] if single else re.findall(r'[\w.\-]+', several):
      if instruction.opcode == 'while':
        yield callee, trips + (role == 'condition') if trips is not None else None, False
      else:
        yield callee, 1, instruction.opcode == 'conditional'


def _collective(instruction: _Instruction, inside: str, computations: dict[str, _Computation], devices: int,
                times: int | None, branch: bool) -> Collective:
  within = computations[inside]
  operands = tuple(_plain(within[name].type) for name in instruction.operands)
  values = tuple(_narrowest(name, inside, computations) for name in instruction.operands)
  group = group_size(instruction.attributes.partition('replica_groups=')[2], devices)
  name = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return Collective(_kind(instruction), operands, values, group, times, branch, name[1] if name else '')


def _plain(type_: str) -> str:
  """Returns the type without layouts and comments."""
  return re.sub(r'\{[^}]*\}|/\*.*?\*/', '', type_)


def _narrowest(name: str, inside: str, computations: dict[str, _Computation]) -> str:
  """Returns the type of an operand, with the narrowest float between the operand and the computation of its values."""
  own = narrowest = _plain(computations[inside][name].type)
  outer: list[tuple[str, _Instruction]] = []  # fusions that the search has entered
  while True:
    instruction = computations[inside][name]
    dtype = _plain(instruction.type).partition('[')[0]
    if _FLOATS.fullmatch(dtype) and type_bytes(f'{dtype}[]') < type_bytes(f'{narrowest.partition("[")[0]}[]'):
      narrowest = dtype + own[own.index('['):]
    if instruction.opcode in _VALUE_KEPT and _FLOATS.fullmatch(dtype):
      name = instruction.operands[0]
    elif instruction.opcode == 'fusion' and not instruction.type.startswith('('):
      outer.append((inside, instruction))
      inside, _, _ = next(_runs(instruction))
      name = next(reversed(computations[inside]))
    elif instruction.opcode == 'parameter' and outer:
      inside, fusion = outer.pop()
      name = fusion.operands[int(instruction.operands[0])]
    else:
      return narrowest
