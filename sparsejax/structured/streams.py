"""Tells what a program does with its residual stream: whether the stream may be turned, and what its norms look like.

If each product that reads the stream takes a rotation in, and each sum on the stream is rotated, the function stays the
same. `turning` follows this through a program: a value turns with the stream, or does not depend on its orientation.
Anything else is refused with the operation and its place.

    seen = turning(trace(apply, (params, x)), 'embed/embedding:1')
    seen.norms['up/kernel']           # Norm(scale='norm/scale', shift='norm/bias', centred=True): what stands before it
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from jax.extend import core

from sparsejax import errors
from sparsejax.programs import jaxprs
from sparsejax.programs.contractions import read
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.tracing import Program
from sparsejax.structured.erasing import KEEP_ZERO
from sparsejax.structured.reading import Reading
from sparsejax.structured.rules import RULES

# Operations that hand a value on as it is.
MOVES = {'broadcast_in_dim', 'reshape', 'convert_element_type', 'transpose', 'squeeze', 'copy', 'slice', 'name',
         'gather', 'dynamic_slice', 'optimization_barrier', 'reduce_precision', 'stop_gradient'}
ZERO, SQUARE, NORM, OTHER = 'zero', 'square', 'norm', 'other'


class Norm(NamedTuple):
  """A `Norm` is what stands between the stream and a product: the paths of its scale and shift, and `centred`.

  `centred`: whether the mean of the stream is subtracted, as a LayerNorm does and an RMS norm does not.
  """

  scale: str | None = None
  shift: str | None = None
  centred: bool = False


class _Turns(NamedTuple):
  """A `_Turns` is the fact of a value that turns with the stream.

  `whole`: the path, if the value is a parameter. `normed`: whether the value was divided by the length of the stream.
  """

  whole: str | None = None
  normed: bool = False
  norm: Norm = Norm()


class Turning(NamedTuple):
  """A `Turning` is what a program does with a stream.

  `norms`: the norm before each weight that contracts the stream, by the path of the weight; '' stands for a product
  without a weight. `means`: the addresses of
  the sums that give means of the stream. `multiplied`: the paths of the vectors that multiply it.
  """

  norms: dict[str, Norm]
  means: set[jaxprs.Address]
  multiplied: set[str]


def turning(program: Program, member: str) -> Turning:
  """Returns what a program does with the stream along `member`, the 'path:axis' of a parameter.

  A mean of the stream counts as zero, as that of a centred stream is. Raises `ValueError` for a member that the program
  does not have, and with the operation for a stream that cannot be turned.
  """
  return _Following(program, member).followed()


@dataclasses.dataclass(eq=False)
class _Following:
  """A `_Following` follows the stream along `member` through one program."""

  program: Program
  member: str

  def __post_init__(self) -> None:
    self.reading = Reading(self.program, RULES)
    self.reading.run()
    parameters = self.reading.parameters()
    path, _, axis = self.member.rpartition(':')
    if path not in parameters or not axis.isdigit() or int(axis) >= len(parameters[path]):
      raise errors.unknown('structured.rotate', 'axis of a parameter', self.member, [
        f'{path}:{axis}' for path, dims in parameters.items() for axis in range(len(dims))])
    own = list(self.reading.variables.leaves(parameters[path][int(axis)]))
    if len(own) != 1:
      raise ValueError(f'structured.rotate: the axis {self.member!r} is made of {len(own)} parts, so that nothing can '
                       'be rotated along it.')
    self.v, uses = own[0], read(self.program)
    self.vectors = {path for path, dims in parameters.items() if path not in uses and path not in uses.lookups
                    and any(map(self._along, dims))}
    self.seen = Turning({}, set(), set())

  def followed(self) -> Turning:
    """Returns what the program does with the stream."""
    rules = FactRules(self._operation, joined=self._joined, constant_of=self._constant)
    inputs = [_Turns(path) if path is not None and any(map(self._along, self.reading.dims_of(path, v.aval.shape)))
              else None for path, v in self.reading.inputs()]
    follow(self.program, inputs, rules)
    return self.seen

  def _along(self, dim: Any) -> bool:
    return self.v in self.reading.variables.leaves(dim)

  def _constant(self, v: Any, here: Position) -> str | None:
    shape = jaxprs.shapes([v])[0] or ()
    if isinstance(v, core.Literal) and not shape:
      return ZERO if v.val == 0 else None
    dims = self.reading.fresh(('constant', here.address, id(v)), shape).dims
    return OTHER if any(map(self._along, dims)) else None

  def _joined(self, facts: list[Any]) -> Any:
    if len(set(facts)) == 1:
      return facts[0]
    plain = {fact._replace(whole=None) if isinstance(fact, _Turns) else fact for fact in facts}
    return plain.pop() if len(plain) == 1 else OTHER

  def _refuse(self, eqn: Any, why: str = '') -> NoReturn:
    raise ValueError(f'structured.rotate: {why or "the stream cannot be turned through this operation"}: '
                     f'{jaxprs.place(eqn)}. The stream is {self.member!r}; a rotation needs sums, products with '
                     'weights, and norms.')

  def _operation(self, eqn: Any, facts: Sequence[Any], here: Position) -> list[Any]:
    name, count = eqn.primitive.name, len(eqn.outvars)
    _, operands, results = self.reading.seen[here.address]
    along = [any(map(self._along, result.dims)) for result in results]
    known = {fact for fact in facts if fact is not None}
    if not known:
      return [OTHER if new and not facts else None for new in along]  # an `iota`
    if OTHER in known:
      self._refuse(eqn)
    if name in MOVES:
      return [facts[0] if name != 'gather' else _part(facts[0])] * count
    if name in RULED:
      return [RULED[name](self, eqn, facts, operands, along[0], here)]
    if known <= {ZERO, NORM}:
      return [NORM if NORM in known else ZERO if set(facts) == {ZERO} and name in KEEP_ZERO else None] * count
    return self._refuse(eqn)

  # Rules of single operations.

  def _sum(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    (fact,), axes = facts, dict(jaxprs.options(eqn))['axes']
    if not any(self._along(operands[0].dims[axis]) for axis in axes):
      return _part(fact)
    if isinstance(fact, _Turns):
      if fact.norm != Norm(centred=fact.norm.centred) or fact.whole:
        self._refuse(eqn, 'a sum over the stream behind the scale of a norm')
      self.seen.means.add(here.address)
      return ZERO
    return NORM if fact == SQUARE else fact

  def _add(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    parts = [fact for fact in facts if fact != ZERO]
    turns = [fact for fact in parts if isinstance(fact, _Turns)]
    if SQUARE in parts:
      self._refuse(eqn)
    if not turns:
      return NORM if NORM in parts else None if parts else ZERO
    if len(parts) == 1:
      (fact,) = turns
      return fact._replace(norm=fact.norm._replace(centred=True)) if eqn.primitive.name == 'sub' else fact
    if len(turns) < len(parts):
      self._refuse(eqn, 'a number is added along the stream')
    for one, other in (turns, turns[::-1]):
      if other.whole in self.vectors and (one.normed or one.norm.scale) and one.norm.shift is None and not one.whole:
        return one._replace(norm=one.norm._replace(shift=other.whole))
    if any(fact.norm.scale or fact.norm.shift for fact in turns):
      self._refuse(eqn, 'what a norm has scaled goes back to the stream, as in a post-norm')
    return _Turns()

  def _product(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    if ZERO in facts:
      return ZERO
    turns = [fact for fact in facts if isinstance(fact, _Turns)]
    if len(turns) == 2:
      if eqn.invars[0] is eqn.invars[1]:
        return self._square(eqn, facts, operands, along, here)
      for one, other in (turns, turns[::-1]):
        if other.whole in self.vectors and not one.whole and one.norm.scale is None and one.norm.shift is None:
          self.seen.multiplied.add(other.whole)
          return _Turns(None, True, one.norm._replace(scale=other.whole))
      self._refuse(eqn)
    if not turns:
      return SQUARE if SQUARE in facts else NORM
    if eqn.primitive.name == 'div' and not isinstance(facts[0], _Turns) or SQUARE in facts:
      self._refuse(eqn)
    (fact,) = turns
    return fact._replace(normed=fact.normed or NORM in facts)

  def _square(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    fact = facts[0]
    if not isinstance(fact, _Turns):
      return fact if fact in (NORM, ZERO) else self._refuse(eqn)
    if dict(jaxprs.options(eqn)).get('y', 2) != 2 or fact.norm.scale or fact.norm.shift:
      self._refuse(eqn)
    return SQUARE

  def _dot(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    summed, beside = ([any(self._along(operand.dims[axis]) for axis in axes) for operand, axes in zip(operands, pair)]
                      for pair in zip(*jaxprs.dot_numbers(eqn)))
    turns = [isinstance(fact, _Turns) for fact in facts]
    if any(beside) or SQUARE in facts or any(summed) and not all(turns):
      self._refuse(eqn)
    if any(summed):
      weights = [(fact.whole, other) for fact, other in zip(facts, facts[::-1]) if fact.whole and not other.whole]
      for path, other in weights:
        if self.seen.norms.setdefault(path, other.norm) != other.norm:
          raise errors.at_leaf('structured.rotate', path, (), 'it contracts the stream behind several norms; give each '
                               'use a weight of its own.')
      if not weights and any(fact.norm.scale or fact.norm.shift for fact in facts):
        self._refuse(eqn)
      if not weights and not all(fact.norm.centred for fact in facts):
        self.seen.norms[''] = Norm()
      return _Turns() if along else None
    if all(turns):
      self._refuse(eqn)
    (fact,) = (fact for fact, turn in zip(facts, turns) if turn) if any(turns) else (None,)
    return _part(fact) if along else NORM

  def _chosen(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    cases = set(facts[1:])
    if cases <= {None, ZERO, NORM}:
      return NORM if NORM in cases else ZERO if cases == {ZERO} else None
    return self._either(eqn, facts[1:])

  def _concatenated(self, eqn: Any, facts: Sequence[Any], operands: Any, along: bool, here: Position) -> Any:
    if any(self._along(operand.dims[jaxprs.dimensions(eqn)]) for operand in operands):
      self._refuse(eqn)
    return self._either(eqn, facts)

  def _either(self, eqn: Any, facts: Sequence[Any]) -> Any:
    """Returns the fact of a value whose entries are those of several values; zeros turn with everything."""
    found = self._joined([_part(fact) for fact in facts if fact != ZERO] or [ZERO])
    return self._refuse(eqn) if found == OTHER else found


def _part(fact: Any) -> Any:
  """Returns the fact of a value that is made of some entries of a parameter, and is none itself."""
  return fact._replace(whole=None) if isinstance(fact, _Turns) else fact


RULED: dict[str, Callable[..., Any]] = {
  'reduce_sum': _Following._sum, **dict.fromkeys(('add', 'add_any', 'sub'), _Following._add),
  **dict.fromkeys(('mul', 'div'), _Following._product), 'dot_general': _Following._dot,
  **dict.fromkeys(('square', 'integer_pow'), _Following._square), 'select_n': _Following._chosen,
  'concatenate': _Following._concatenated}
