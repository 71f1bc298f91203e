"""Plans a training step without running it: state, memory and communication of each device.

    plan = planning.budget(jax.jit(step), (params, opt_state, batch))   # `jax.ShapeDtypeStruct`s with shardings
    print(plan)                                                         # tables
    plan.sent                                                           # bytes that one device sends in a step

State is exact, from shapes and shardings. Memory is XLA's own analysis, and communication is read from the
collectives of the compiled program (`programs.hlo`). Both belong to the backend that compiled the program.

Compiled for many fake CPU devices, the numbers show what a mesh that is not here would hold and send. `docs/scale.md`
says which numbers carry over to other hardware. The command `sparsejax plan` starts this module in a new process:

    python -m sparsejax.planning '{"path": "docs/llama_70b.py", "devices": 256}'

The process prints the tables and exits with status 0, or prints one line and exits with status 2.
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

from sparsejax import errors, pipelines, trees
from sparsejax.programs import hlo
from sparsejax.states import SparseState
from sparsejax.tables import aligned
from sparsejax.types import PyTree, moved

__all__ = ['ArgumentBytes', 'Budget', 'abstract_state', 'budget', 'of_program', 'parts']

# These options of XLA are for programs on a CPU that are only read. A CPU widens bfloat16 to float32 to send it. Only a
# rounding to bfloat16 between two float32 values shows this, and the first option keeps XLA from dropping the rounding.
# The second option leaves machine code unoptimized, because it never runs: optimizing doubles the time for one text.
_FOR_READING = {'xla_allow_excess_precision': False, 'xla_backend_optimization_level': 0}


class ArgumentBytes(NamedTuple):
  """An `ArgumentBytes` says how many bytes one part of the arguments takes: `each` device, and the `whole` arrays."""

  part: str
  each: int
  whole: int


@dataclasses.dataclass(frozen=True)
class Budget:
  """A `Budget` says what one step takes. Prints as tables.

  `state` has one row for each part of the arguments. `memory` is XLA's analysis in bytes a device; it is empty where
  the backend gives none. `collectives` is all communication of the step.
  """

  devices: int
  backend: str
  state: tuple[ArgumentBytes, ...]
  memory: Mapping[str, int]
  collectives: tuple[hlo.Collective, ...]

  @property
  def sent(self) -> int:
    """Bytes that one device sends in a step, without loops of unknown length, and as if every branch always ran."""
    return sum(each.sent * (each.times or 0) for each in self.collectives)

  @property
  def sent_values(self) -> int:
    """Bytes as in `sent`, on hardware that sends narrow floats without widening them as this backend does."""
    return sum(each.sent_values * (each.times or 0) for each in self.collectives)

  def __str__(self) -> str:
    total = ArgumentBytes('together', sum(row.each for row in self.state), sum(row.whole for row in self.state))
    state = [(row.part, f'{row.each:,}', f'{row.whole:,}') for row in (*self.state, total)]
    head = (f'arguments on {self.devices} devices', 'bytes each', 'bytes of the whole')
    blocks = [aligned(head, state, right=(1, 2))]
    if self.memory:
      memory = [(part, f'{size:,}') for part, size in self.memory.items()]
      blocks.append(aligned((f"XLA's memory analysis, {self.backend}", 'bytes each'), memory, right=(1,)))
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
    return '\n'.join([aligned(head, lines, right=(3, 4, 5, 6)), *notes])


def budget(step: Any, arguments: Sequence[PyTree], names: Sequence[str] = ()) -> Budget:
  """Returns what `step(*arguments)` takes on each device. Nothing is allocated and nothing runs.

  `step`: a jitted function, or the result of its `lower(...)` or `lower(...).compile()` for these arguments.
  `arguments`: pytrees of arrays or `jax.ShapeDtypeStruct`s with shardings.
  `names`: the names of the arguments in the table, by default those in the function's signature.
  Raises `ValueError` for a leaf without a sharding, and for arguments on meshes of different sizes.
  """
  state = parts(arguments, names or _names(step, len(arguments)))
  meshes = {leaf.sharding.num_devices for leaf in jax.tree.leaves(tuple(arguments))}
  if len(meshes) > 1:
    raise ValueError(f'planning.budget: the arguments are on meshes of {errors.some(sorted(meshes))} devices; place '
                     'them all on one mesh.')
  step = step.lower(*arguments) if not isinstance(step, (jax.stages.Lowered, jax.stages.Compiled)) else step
  backend = next(iter(jax.tree.leaves(tuple(arguments))[0].sharding.device_set)).platform
  if isinstance(step, jax.stages.Lowered):
    step = step.compile(_FOR_READING if backend == 'cpu' else None)
  return Budget(meshes.pop(), backend, state, _memory(step), hlo.collectives(step.as_text()))


def parts(arguments: Sequence[PyTree], names: Sequence[str]) -> tuple[ArgumentBytes, ...]:
  """Returns one row for each argument, and one for each field of a `SparseState` in it.

  The bytes are exact, from shapes and shardings. Raises `ValueError` for a leaf without a sharding, and for a sharding
  that does not divide the leaf's shape.
  """
  rows: dict[str, ArgumentBytes] = {}

  def add(part: str, tree: PyTree) -> None:
    is_state = lambda node: isinstance(node, SparseState)
    for path, leaf in zip(*trees.flatten(tree, is_leaf=is_state)[:2]):
      if is_state(leaf):
        for field in ('masks', 'master', 'stats', 'inner'):
          add(f'{part}: {"inner optimizer" if field == "inner" else field}', getattr(leaf, field))
        add(f'{part}: step, key, plan', (leaf.step, leaf.key, leaf.plan))
        continue
      each, whole = (math.prod(shape) * leaf.dtype.itemsize for shape in (
          _shard(leaf, '/'.join(filter(None, (part, path)))), leaf.shape))
      before = rows.get(part, ArgumentBytes(part, 0, 0))
      rows[part] = ArgumentBytes(part, before.each + each, before.whole + whole)

  for name, argument in zip(names, arguments):
    add(name, argument)
  return tuple(rows.values())


def _shard(leaf: Any, path: str) -> tuple[int, ...]:
  """Returns the shape of the shard on each device."""
  if getattr(leaf, 'sharding', None) is None:
    raise errors.at_leaf('planning', path, getattr(leaf, 'shape', ()), 'it has no sharding; give '
                         'jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)).')
  try:
    return leaf.sharding.shard_shape(leaf.shape)
  except ValueError as problem:
    raise errors.at_leaf('planning', path, leaf.shape, f'{leaf.sharding} does not divide it; pad it, or shard another '
                         'axis.') from problem


def abstract_state(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
  """Returns `tx.init(params)` as `jax.ShapeDtypeStruct`s with shardings.

  `params` are `jax.ShapeDtypeStruct`s with shardings on one mesh. A leaf of the state is sharded like the parameter
  that has its shape and whose path ends its path. All other leaves are replicated on every device.
  """
  paths, leaves, _ = trees.flatten(params)
  replicated = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
  by_path = dict(zip(paths, leaves))

  def sharding(path: str, leaf: Any) -> Any:
    ends = [end for end in by_path if (path == end or path.endswith(f'/{end}')) and by_path[end].shape == leaf.shape]
    return by_path[max(ends, key=len)].sharding if ends else replicated

  names, state, treedef = trees.flatten(jax.eval_shape(tx.init, params))
  return treedef.unflatten([
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(name, leaf)) for name, leaf in zip(names, state)])


def of_program(path: str, devices: int, mesh: Mapping[str, int] | None = None, **options: Any) -> Budget:
  """Returns the budget of the step that the file at `path` defines, over `devices` devices of this process.

  The file has a function `program(mesh, **options)` that returns `(step, arguments)`, the first two arguments of
  `budget`. `mesh` holds the lengths of the mesh axes by name, in order; the default is one axis `data`. The mesh axes
  are `Auto`; a program may make another mesh from `mesh.devices`. Raises `ValueError` if the file has no such function,
  and if the process has fewer devices.
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


def _schedules(path: str, pipeline: Mapping[str, int], options: Mapping[str, Any]) -> pipelines.Bubbles:
  """Returns the idle times of a pipeline whose stage the file defines, in FLOPs of its compiled parts."""
  for name in ('stages', 'microbatches'):
    if name not in pipeline:
      raise ValueError(f'plan: --pipeline says no {name}; write stages=4,microbatches=8.')
  for name in pipeline:
    if name not in ('stages', 'microbatches'):
      raise errors.unknown('plan', 'part of --pipeline', name, ('stages', 'microbatches'))
  return pipelines.bubbles(**pipeline, **pipelines.work(*_program(path, options, 'stage')(**options)))


def _program(path: str, options: Mapping[str, Any], name: str = 'program') -> Callable[..., Any]:
  program, first = runpy.run_path(path).get(name), int(name == 'program')
  if not callable(program):
    returns = '(mesh); define one that returns (step, arguments)' if first else (
        '(); define one that returns (f, params, x)')
    raise ValueError(f'plan: {path} has no function {name}{returns}.')
  known = list(inspect.signature(program).parameters.values())[first:]
  valid = [each.name for each in known if each.kind is not each.VAR_KEYWORD]
  for name in options:
    if name not in valid and len(valid) == len(known):
      raise errors.unknown('plan', f'option of {path}:', name, valid)
  return program


def _names(step: Any, count: int) -> list[str]:
  """Returns the names of the arguments in the function's signature, or `argument i` where there is no signature."""
  try:
    own = list(inspect.signature(step).parameters)
  except (TypeError, ValueError):
    own = []
  return own[:count] + [f'argument {i}' for i in range(len(own), count)]


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns XLA's memory analysis in bytes a device, or nothing if the backend has none."""
  analysis = compiled.memory_analysis()
  parts = {'arguments': 'argument', 'outputs': 'output', 'outputs in place of arguments': 'alias',
           'temporaries': 'temp'}
  return {part: getattr(analysis, f'{name}_size_in_bytes') for part, name in parts.items()} if analysis else {}


def _types(collective: hlo.Collective) -> tuple[str, str]:
  """Returns the operands as text, of more than two kinds only the largest, and the dtype to which they were widened."""
  own = Counter(collective.values)
  text = ' '.join(f'{n} x {each}' if n > 1 else each for each, n in own.items())
  if len(own) > 2:
    text = f'{len(collective.values)} up to {max(own, key=hlo.type_bytes)}'
  dtypes = lambda types: {each.partition('[')[0] for each in types}
  return text, '' if own == Counter(collective.operands) else ' '.join(sorted(dtypes(collective.operands)))


def _times(collective: hlo.Collective, count: int) -> str:
  runs = '?' if collective.times is None else f'{collective.times * count:,}'
  return f'at most {runs}' if collective.branch else runs


def _or_unknown(collective: hlo.Collective, sent: int) -> str:
  return f'{sent:,} x ?' if collective.times is None else f'{sent * collective.times:,}'


moved(__name__, {'Row': (ArgumentBytes, 'planning.ArgumentBytes')})


def _where(path: str, problem: BaseException) -> str:
  """Returns the last line of the program file that the error passed through, as text."""
  if isinstance(problem, SyntaxError):
    return f'{path}, line {problem.lineno}: '
  lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == path]
  return f'{path}, line {lines[-1]}: ' if lines else ''


def _main(asked: Mapping[str, Any]) -> int:
  """Prints the budget and returns 0, or prints one line that says why there is none and returns 2.

  `asked` holds the arguments of `of_program`; its `options` are keyword arguments of the program.
  """
  sys.path.insert(0, os.path.dirname(os.path.abspath(asked['path'])))  # as `python PATH` does
  try:
    options = asked.get('options', {})
    print(_schedules(asked['path'], asked['pipeline'], options) if 'pipeline' in asked else
          of_program(asked['path'], asked['devices'], asked.get('mesh'), **options))
    return 0
  except Exception as problem:  # An error of the user's program becomes one line with its place.
    kind = '' if isinstance(problem, (ValueError, OSError)) else f'{type(problem).__name__}: '
    reason = str(problem) or type(problem).__name__
    if getattr(problem, 'strerror', None):
      reason = f'{problem.filename}: {problem.strerror}'
    print('sparsejax:', ' '.join(f'{_where(asked["path"], problem)}{kind}{reason}'.split()), file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(_main(json.loads(sys.argv[1])))
