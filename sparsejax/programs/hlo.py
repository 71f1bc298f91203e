"""Reads the text of a compiled program (HLO): which collectives it runs, how often, and what they move.

A pure function of text, with nothing assumed: a loop whose trip count the compiler does not print makes `times` `None`,
and what stands in a branch is marked, because which branch runs is known only when it does.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes that one device sends (and, around a ring, receives) for an operand of b bytes in a group of g.
SENT = {
    'all-gather': lambda b, g: (g - 1) * b,  # (g - 1) / g of the result
    'reduce-scatter': lambda b, g: -(-(g - 1) * b // g),
    'all-reduce': lambda b, g: -(-2 * (g - 1) * b // g),  # a reduce-scatter, then an all-gather
    'all-to-all': lambda b, g: -(-(g - 1) * b // g),
    'ragged-all-to-all': lambda b, g: b,  # at most: how much stays is in the data
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
  """One collective of the program, as one device sees it.

  `operands` and `values`: types such as `f32[4,8]`; `values` has the narrowest float type that the operand was widened
  from, as where a CPU, which has no bfloat16, sends float32. `group`: devices in it. `times`: runs a step, `None` if
  in a loop of unknown length. `branch`: in a branch of a conditional, so that `times` is the most. `name`: where in the
  user's program.
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
    """Bytes that one device sends each time; it receives as many."""
    return SENT[self.kind](sum(map(nbytes, self.operands)), self.group)

  @property
  def sent_values(self) -> int:
    """The same for a machine that sends `values` as they are."""
    return SENT[self.kind](sum(map(nbytes, self.values)), self.group)


class _Instruction(NamedTuple):
  type: str
  opcode: str
  operands: list[str]  # names; of a parameter, its number
  attributes: str


_Computation = dict[str, _Instruction]  # by name; the root is last


def collectives(text: str) -> tuple[Collective, ...]:
  """The collectives of `compiled.as_text()`, in the program's order, those in loops once each with their `times`.

  Raises `ValueError` for a text that is not whole and for replica groups in a form that is not known here.
  """
  computations, entry = _read(text)
  header = text[:text.index('\n') + 1]
  devices = math.prod(int(n) for n in re.findall(r'(?:num_partitions|replica_count)=(\d+)', header))
  busy: dict[str, bool] = {}

  def has_any(name: str) -> bool:
    if name not in computations:
      raise ValueError(f'hlo.collectives: the text calls {name!r}, which is not in it; pass all of compiled.as_text().')
    if name not in busy:
      busy[name] = False
      busy[name] = any(_kind(i) or any(map(has_any, _called(i))) for i in computations[name].values())
    return busy[name]

  def walk(name: str, times: int | None, branch: bool) -> Iterator[Collective]:
    for instruction in computations[name].values():
      if kind := _kind(instruction):
        yield _collective(kind, instruction, name, computations, devices, times, branch)
      for callee, runs, in_branch in _runs(instruction):
        if has_any(callee):
          known = None if times is None or runs is None else times * runs
          yield from walk(callee, known, branch or in_branch)

  return tuple(walk(entry, 1, False)) if has_any(entry) else ()


def nbytes(type_: str) -> int:
  """Bytes of `f32[4,8]`; of a tuple of them, all together. Four bits and less are counted packed."""
  bits = 0
  for dtype, shape in re.findall(r'([a-z]\w*)\[([\d,<=]*)\]', type_):
    width = re.match(r'[a-z]+(\d+)', dtype)
    each = _BITS[dtype] if dtype in _BITS else int(width[1]) if width else None
    if each is None:
      raise ValueError(f'hlo.nbytes: {dtype!r} in {type_!r} is a type of unknown width.')
    bits += each * math.prod(int(n.lstrip('<=')) for n in shape.split(',') if n)
  return -(-bits // 8)


def group_size(groups: str, devices: int) -> int:
  """How many devices are in a group: of `{{0,1},{2,3}}`, `[4,2]<=[8]`, `mesh['a'=2,'b'=4] {'b'}`, or `{}` for all.

  Raises `ValueError` for another form, and for groups of several sizes.
  """
  if groups in ('', '{}', '{{}}'):
    return devices
  if iota := re.match(r'\[\d+,(\d+)\]<=', groups):
    return int(iota[1])
  if mesh := re.match(r"mesh\[(.*?)\].*?\{([^}]*)\}", groups):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])  # 'b':(1)2 is a part of an axis, of size 2
    if all(part or axis in sizes for axis, part in axes):
      return math.prod(int(part or sizes[axis]) for axis, part in axes)
  listed = re.findall(r'\{([\d,]+)\}', groups) if re.fullmatch(r'\{[\d,{}]*\}', groups) else []
  sizes = {group.count(',') + 1 for group in listed}
  if len(sizes) != 1:
    raise ValueError(f'hlo.collectives: cannot read the replica groups {groups[:80]!r}: known are {{{{0,1}},{{2,3}}}}, '
                     "[2,2]<=[4] and mesh['a'=2,'b'=2] {'a'}, all groups of one size.")
  return sizes.pop()


def _read(text: str) -> tuple[dict[str, _Computation], str]:
  """The computations by name, and the entry's name."""
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
  """`TYPE opcode(operands), attributes`; the type may be a tuple, and a layout may have parentheses."""
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  opening = text.index('(', end)
  closing = _closing(text, opening)
  inside = text[opening + 1:closing - 1]
  names = [inside] if inside.isdigit() else re.findall(r'%([\w.\-]+)', inside)
  return _Instruction(text[:end], text[end:opening].strip(), names, text[closing:])


def _closing(text: str, opening: int) -> int:
  """The place after the parenthesis that closes the one at `opening`."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  return len(text)


def _kind(instruction: _Instruction) -> str | None:
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in SENT else None


def _called(instruction: _Instruction) -> list[str]:
  return [callee for callee, _, _ in _runs(instruction)]


def _runs(instruction: _Instruction) -> Iterator[tuple[str, int | None, bool]]:
  """The computations that an instruction runs: how often each, and whether it is one branch of several."""
  if instruction.opcode in ('async-update', 'async-done'):  # these name again what async-start runs
    return
  count = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
  trips = int(count[1]) if count else None
  # Without metadata, where a user's own names could look like attributes.
  attributes = re.sub(r'metadata=\{(?:"[^"]*"|[^}"])*\}', '', instruction.attributes)
  for role, one, several in _CALLED.findall(attributes):
    for callee in [one] if one else re.findall(r'[\w.\-]+', several):
      if instruction.opcode == 'while':
        yield callee, trips + (role == 'condition') if trips is not None else None, False
      else:
        yield callee, 1, instruction.opcode == 'conditional'


def _collective(kind, instruction, inside, computations, devices, times, branch) -> Collective:
  within = computations[inside]
  operands = tuple(_plain(within[name].type) for name in instruction.operands)
  values = tuple(_narrowest(name, inside, computations) for name in instruction.operands)
  groups = re.search(r"replica_groups=(mesh\[.*?\].*?\{[^}]*\}|\[[\d,]+\]<=|\{(?:\{[\d,]*\},?)*\})",
                     instruction.attributes)
  if not groups and 'replica_groups=' in instruction.attributes:
    group_size(instruction.attributes.partition('replica_groups=')[2], devices)
  name = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return Collective(kind, operands, values, group_size(groups[1] if groups else '', devices), times, branch,
                    name[1] if name else '')


def _plain(type_: str) -> str:
  """The type without layouts."""
  return re.sub(r'\{[^}]*\}|/\*.*?\*/', '', type_)


def _narrowest(name: str, inside: str, computations: dict[str, _Computation]) -> str:
  """The operand's type, with the narrowest float on the way back to where its values were computed."""
  own = narrowest = _plain(computations[inside][name].type)
  outer: list[tuple[str, _Instruction]] = []  # the fusions that the way leads into
  while True:
    instruction = computations[inside][name]
    dtype = _plain(instruction.type).partition('[')[0]
    if _FLOATS.fullmatch(dtype) and nbytes(f'{dtype}[]') < nbytes(f'{narrowest.partition("[")[0]}[]'):
      narrowest = dtype + own[own.index('['):]
    if instruction.opcode in _VALUE_KEPT and _FLOATS.fullmatch(dtype):
      name = instruction.operands[0]
    elif instruction.opcode == 'fusion' and not instruction.type.startswith('('):
      outer.append((inside, instruction))
      inside = next(iter(_called(instruction)))
      name = next(reversed(computations[inside]))
    elif instruction.opcode == 'parameter' and outer:
      inside, fusion = outer.pop()
      name = fusion.operands[int(instruction.operands[0])]
    else:
      return narrowest
