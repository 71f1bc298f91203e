"""What a program costs each device, read from the program compiled and not run: state, memory and traffic.

State comes from shapes and shardings, exactly. Memory is XLA's own analysis and traffic the collectives of the compiled
text (`hlo`); both are those of the backend that compiled it. Compiled on many fake CPU devices they show what a mesh
that nobody has here would hold and send; `docs/scale.md` says what of that carries over to other hardware.

    python -m sparsejax.planning '{"path": "docs/llama_70b.py", "devices": 256}'   # what `sparsejax plan` starts
"""

import dataclasses
import inspect
import json
import math
import os
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import errors, trees
from sparsejax.programs import hlo
from sparsejax.states import SparseState
from sparsejax.types import PyTree

# On a CPU. XLA may drop a rounding to bfloat16 between two float32, the only sign of what was widened to be sent. And
# machine code that never runs need not be fast: without this, the same program text takes twice as long.
_FOR_READING = {'xla_allow_excess_precision': False, 'xla_backend_optimization_level': 0}


class Row(NamedTuple):
  """One part of the arguments: bytes on each device, and of the whole arrays."""

  part: str
  each: int
  whole: int


@dataclasses.dataclass(frozen=True)
class Budget:
  """What one step takes. `memory` is XLA's, in bytes a device, empty where the backend gives none. Prints as tables."""

  devices: int
  backend: str
  state: tuple[Row, ...]
  memory: Mapping[str, int]
  collectives: tuple[hlo.Collective, ...]

  @property
  def sent(self) -> int:
    """Bytes that one device sends a step, without loops of unknown length; conditional ones as if they always ran."""
    return sum(each.sent * (each.times or 0) for each in self.collectives)

  @property
  def sent_values(self) -> int:
    """The same on a machine that sends narrow floats as they are, where this backend widened them."""
    return sum(each.sent_values * (each.times or 0) for each in self.collectives)

  def __str__(self) -> str:
    total = Row('together', sum(row.each for row in self.state), sum(row.whole for row in self.state))
    state = [(row.part, f'{row.each:,}', f'{row.whole:,}') for row in (*self.state, total)]
    head = (f'arguments on {self.devices} devices', 'bytes each', 'bytes of the whole')
    blocks = [_table(head, state)]
    if self.memory:
      memory = [(part, f'{size:,}') for part, size in self.memory.items()]
      blocks.append(_table((f"XLA's memory analysis, {self.backend}", 'bytes each'), memory))
    return '\n\n'.join([*blocks, self._traffic()])

  def _traffic(self) -> str:
    if not self.collectives:
      return 'no collectives: no device sends anything'
    alike = Counter(dataclasses.replace(each, name='') for each in self.collectives)
    lines = [(each.kind, *_types(each), f'{each.group}', _times(each, count),
              *(_or_unknown(each, sent * count) for sent in (each.sent, each.sent_values)))
             for each, count in alike.items()]
    lines.append(('together', '', '', '', '', f'{self.sent:,}', f'{self.sent_values:,}'))
    head = ('collective', 'operand on each device', 'sent as', 'group', 'times', 'bytes each sends', 'unwidened')
    notes = []
    if any(each.times is None for each in alike):
      notes.append('?: in a loop whose length the compiler does not know, not in the sum.')
    if any(each.branch for each in alike):
      notes.append('at most: in a branch of a conditional, counted as if it always ran.')
    return '\n'.join([_table(head, lines, left=3), *notes])


def budget(step: Any, arguments: Sequence[PyTree], names: Sequence[str] = ()) -> Budget:
  """What `step(*arguments)` takes on each device; nothing is allocated and nothing runs.

  `step`: a jitted function, or what its `lower` or `lower(...).compile()` returned for these arguments.
  `arguments`: pytrees of arrays or `jax.ShapeDtypeStruct`s with shardings. `names`: of the arguments, for the table;
  default the function's own. Raises `ValueError` for a leaf without a sharding.
  """
  state = parts(arguments, names or _names(step, len(arguments)))
  meshes = {leaf.sharding.num_devices for leaf in jax.tree.leaves(tuple(arguments))}
  if len(meshes) > 1:
    raise ValueError(f'planning.budget: the arguments lie on meshes of {errors.some(sorted(meshes))} devices; place '
                     'them all on one mesh.')
  step = step.lower(*arguments) if not isinstance(step, (jax.stages.Lowered, jax.stages.Compiled)) else step
  backend = next(iter(jax.tree.leaves(tuple(arguments))[0].sharding.device_set)).platform
  if isinstance(step, jax.stages.Lowered):
    step = step.compile(_FOR_READING if backend == 'cpu' else None)
  return Budget(meshes.pop(), backend, state, _memory(step), hlo.collectives(step.as_text()))


def parts(arguments: Sequence[PyTree], names: Sequence[str]) -> tuple[Row, ...]:
  """One row for each argument, those that hold a `SparseState` by what it keeps; exact, from shapes and shardings.

  Raises `ValueError` for a leaf without a sharding and for one that does not divide its shape.
  """
  rows: dict[str, Row] = {}

  def add(part: str, tree: PyTree) -> None:
    is_state = lambda node: isinstance(node, SparseState)
    for path, leaf in zip(*trees.flatten(tree, is_leaf=is_state)[:2]):
      if is_state(leaf):
        for field in ('masks', 'master', 'stats', 'inner'):
          add(f'{part}: {"inner optimizer" if field == "inner" else field}', getattr(leaf, field))
        add(f'{part}: step and key', (leaf.step, leaf.key))
        continue
      each, whole = (math.prod(shape) * leaf.dtype.itemsize for shape in (
          _shard(leaf, '/'.join(filter(None, (part, path)))), leaf.shape))
      before = rows.get(part, Row(part, 0, 0))
      rows[part] = Row(part, before.each + each, before.whole + whole)

  for name, argument in zip(names, arguments):
    add(name, argument)
  return tuple(rows.values())


def _shard(leaf: Any, path: str) -> tuple[int, ...]:
  """The shape that lies on each device."""
  if getattr(leaf, 'sharding', None) is None:
    raise errors.at_leaf('planning', path, getattr(leaf, 'shape', ()), 'it has no sharding; give '
                         'jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)).')
  try:
    return leaf.sharding.shard_shape(leaf.shape)
  except ValueError as problem:
    raise errors.at_leaf('planning', path, leaf.shape, f'{leaf.sharding} does not divide it; pad it, or shard another '
                         'axis.') from problem


def abstract_state(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
  """`tx.init(params)` as `jax.ShapeDtypeStruct`s: what is like a parameter lies as it does, the rest on every device.

  `params`: `jax.ShapeDtypeStruct`s with shardings, on one mesh. A leaf of the state is like a parameter if it has its
  shape and its path ends in the parameter's.
  """
  paths, leaves, _ = trees.flatten(params)
  everywhere = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
  given = dict(zip(paths, leaves))

  def lies(path: str, leaf: Any) -> Any:
    ends = [end for end in given if (path == end or path.endswith(f'/{end}')) and given[end].shape == leaf.shape]
    return given[max(ends, key=len)].sharding if ends else everywhere

  names, state, treedef = trees.flatten(jax.eval_shape(tx.init, params))
  return treedef.unflatten([
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies(name, leaf)) for name, leaf in zip(names, state)])


def of_program(path: str, devices: int, mesh: Mapping[str, int] | None = None, **options: Any) -> Budget:
  """The budget of the step that the file at `path` defines, over this process's `devices` devices.

  The file has a function `program(mesh, **options)` that returns `step, arguments` as `budget` takes them. `mesh`:
  lengths by axis name, in order; default one axis `data`. Its axes are `Auto`; a program may make its own from
  `mesh.devices`. Raises `ValueError` if the file is not such a program, and if there are not so many devices.
  """
  mesh = {'data': devices} if mesh is None else dict(mesh)
  if math.prod(mesh.values()) != devices:
    shape = ' x '.join(f'{axis}={n}' for axis, n in mesh.items())
    raise ValueError(f'plan: the mesh {shape} has {math.prod(mesh.values())} devices, and {devices} were asked for; '
                     'make its axes multiply to that.')
  if devices > len(jax.devices()):
    raise ValueError(f'plan: {devices} devices were asked for and this process has {len(jax.devices())}.')
  program = _program(path, options)
  made = program(jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh)), **options)
  if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, list))):
    raise ValueError(f'plan: program(mesh) of {path} must return (step, arguments), a function and a tuple of pytrees '
                     'of jax.ShapeDtypeStruct(shape, dtype, sharding=...).')
  step, arguments = made
  return budget(step if hasattr(step, 'lower') else jax.jit(step), arguments)


def _program(path: str, options: Mapping[str, Any]) -> Callable[..., Any]:
  program = runpy.run_path(path).get('program')
  if not callable(program):
    raise ValueError(f'plan: {path} has no function program(mesh); define one that returns (step, arguments).')
  known = list(inspect.signature(program).parameters.values())[1:]
  valid = [each.name for each in known if each.kind is not each.VAR_KEYWORD]
  for name in options:
    if name not in valid and len(valid) == len(known):
      raise errors.unknown('plan', f'option of {path}:', name, valid)
  return program


def _names(step: Any, count: int) -> list[str]:
  """The function's own names for its arguments, where it still tells them."""
  try:
    own = list(inspect.signature(step).parameters)
  except (TypeError, ValueError):
    own = []
  return own[:count] + [f'argument {i}' for i in range(len(own), count)]


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  found = compiled.memory_analysis()
  parts = {'arguments': 'argument', 'outputs': 'output', 'outputs in place of arguments': 'alias',
           'temporaries': 'temp'}
  return {part: getattr(found, f'{name}_size_in_bytes') for part, name in parts.items()} if found else {}


def _types(collective: hlo.Collective) -> tuple[str, str]:
  """The operands, the largest one for many, and the dtype that they were widened to."""
  own = Counter(collective.values)
  text = ' '.join(f'{n} x {each}' if n > 1 else each for each, n in own.items())
  if len(own) > 2:
    text = f'{len(collective.values)} up to {max(own, key=hlo.nbytes)}'
  dtypes = lambda types: {each.partition('[')[0] for each in types}
  return text, '' if own == Counter(collective.operands) else ' '.join(sorted(dtypes(collective.operands)))


def _times(collective: hlo.Collective, count: int) -> str:
  runs = '?' if collective.times is None else f'{collective.times * count:,}'
  return f'at most {runs}' if collective.branch else runs


def _or_unknown(collective: hlo.Collective, sent: int) -> str:
  return f'{sent:,} x ?' if collective.times is None else f'{sent * collective.times:,}'


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
  """Columns under a head, the first `left` of them aligned left; a rule before the last line if it is a sum."""
  widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
  aligned = ['  '.join(cell.ljust(width) if i < left else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in (head, *lines)]
  return '\n'.join([aligned[0], '-' * max(map(len, aligned)), *aligned[1:]])


def _where(path: str, problem: BaseException) -> str:
  """The line of the program file that the error passed through last."""
  if isinstance(problem, SyntaxError):
    return f'{path}, line {problem.lineno}: '
  lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == path]
  return f'{path}, line {lines[-1]}: ' if lines else ''


def _main(asked: Mapping[str, Any]) -> int:
  """Print the budget, or one line that says why there is none: exit status 0 or 2."""
  sys.path.insert(0, os.path.dirname(os.path.abspath(asked['path'])))  # as `python PATH` has it
  try:
    print(of_program(asked['path'], asked['devices'], asked.get('mesh'), **asked.get('options', {})))
    return 0
  except Exception as problem:  # whatever the user's program raises is one line, with its place
    kind = '' if isinstance(problem, (ValueError, OSError)) else f'{type(problem).__name__}: '
    reason = str(problem) or type(problem).__name__
    if getattr(problem, 'strerror', None):
      reason = f'{problem.filename}: {problem.strerror}'
    print('sparsejax:', ' '.join(f'{_where(asked["path"], problem)}{kind}{reason}'.split()), file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(_main(json.loads(sys.argv[1])))
