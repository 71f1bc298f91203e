"""Finds gated feed-forward layers in a program: products whose units an activation function may switch off.

A layer is `down(act(gate(x)) * up(x))`, or `down(act(gate(x)))` without a gate of its own. A unit whose activation is
zero needs no column of `up` and no row of `down`. Gate and up may be two parts of one parameter.

    for layer in layers_of(trace(model.apply, (variables, x))):
      print(layer.gate, layer.up, layer.down, layer.at_zero)        # act(0) is 0.0 for ReLU, SiLU and GELU
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparsejax.programs import factors, jaxprs
from sparsejax.programs.contractions import Use
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.operands import uses_by_address
from sparsejax.programs.sizes import last_parts
from sparsejax.programs.tracing import Program


class GatedLayer(NamedTuple):
  """A `GatedLayer` names the parameters of the products `gate`, `up` and `down`; `up` is `None` in a plain layer.

  `up` is `gate` where one product makes both, of which the program takes parts.

  `address` is the operation that takes the activation as its operand number `operand`: the product of activation and
  `up`, or `down` itself. `at_zero` is act(0), `None` if it is not known. `place` is the place in the code. `down_use`
  and `up_use` are the uses of the parameters.
  """

  gate: str
  up: str | None
  down: str
  address: jaxprs.Address
  operand: int
  at_zero: float | None
  place: str
  down_use: Use
  up_use: Use | None

  @property
  def name(self) -> str:
    return f'{self.gate} -> {self.down}'


class Trail(NamedTuple):
  """A `Trail` says what a value is since the last product: a constant, a parameter, data, a product or a gated one.

  `path` and `use` are those of the product, and `first` is the first of its outputs that the value has. `bent` says
  whether a function that is not linear lies between, and `zero` is the value where the product is zero. `gated` is a
  `GatedLayer` without `down`, after the two products were multiplied.
  """

  kind: str
  path: str = ''
  use: Use | None = None
  bent: bool = False
  zero: float | None = None
  gated: GatedLayer | None = None
  first: int = 0


DATA, PARAMETER, CONSTANT = Trail('data'), Trail('parameter'), Trail('constant')
_MOVES = {*factors.MOVES, 'convert_element_type', 'copy', 'name', 'reduce_precision', 'optimization_barrier',
          'stop_gradient', 'pvary', 'pcast', 'sharding_constraint'}
_LINEAR = {'add', 'sub', 'neg', 'mul', 'div', 'add_any'}
_ENTRYWISE = _LINEAR | {
    'abs', 'clamp', 'cos', 'erf', 'erfc', 'exp', 'exp2', 'expm1', 'ge', 'gt', 'integer_pow', 'le', 'log', 'log1p',
    'logistic', 'lt', 'max', 'min', 'pow', 'rsqrt', 'select_n', 'sign', 'sin', 'sqrt', 'square', 'tanh', 'and', 'or',
    'eq', 'ne', 'not'}


def layers_of(program: Program) -> tuple[GatedLayer, ...]:
  """Returns the gated layers of a program whose first argument holds the parameters, in the order of the program.

  Products are `dot_general`s with one parameter each. Up to the activation the program may add biases, scale by
  constants and move dimensions, and dropout may follow the activation. Branches of `jit`, loops, `remat` and custom
  derivatives are followed. Of a joined projection of gate and up, a `slice` or `split` of the last dimension must take
  the two parts.
  """
  found = _Layers(uses_by_address(program))
  facts = [PARAMETER if argument == 0 else DATA for argument in program.arguments]
  rules = FactRules(found.operation, _joined, CONSTANT, constant_of=_constant, stacked=_stacked)
  with jax.ensure_compile_time_eval():
    follow(program, facts, rules)
  return tuple(found.layers.values())


def _joined(facts: list[Trail]) -> Trail:
  return facts[0] if all(fact == facts[0] for fact in facts) else DATA


def _stacked(fact: Trail, stacks: list[Trail], length: int) -> Trail:
  return fact if fact.kind in ('constant', 'parameter') else DATA


def _constant(variable: Any, here: Position) -> Trail:
  value = variable.val if isinstance(variable, core.Literal) else None
  return CONSTANT._replace(zero=float(value)) if value is not None and np.ndim(value) == 0 else CONSTANT


class _Layers:
  """A `_Layers` collects the layers that are seen; a loop is read several times, and its last reading counts."""

  def __init__(self, uses: dict[jaxprs.Address, dict[Any, Use]]):
    self.uses = uses
    self.layers: dict[jaxprs.Address, GatedLayer] = {}

  def operation(self, eqn: Any, facts: list[Trail], here: Position) -> list[Trail]:
    """Returns the trails of the results of an operation."""
    name, results = eqn.primitive.name, len(eqn.outvars)
    if name in jaxprs.CONTRACTIONS:
      return [self._product(eqn, facts, here)] * results
    if name in _MOVES:
      return [facts[0]] * results
    if (parts := last_parts(eqn)) is not None and facts[0].kind != 'gated':
      return [facts[0]._replace(first=facts[0].first + part.start) for part in parts]
    return [_entrywise(eqn, facts, here) if name in _ENTRYWISE else DATA] * results

  def _product(self, eqn: Any, facts: list[Trail], here: Position) -> Trail:
    uses = self.uses.get(here.address, {})
    self.layers.pop(here.address, None)
    if len(uses) != 1 or eqn.primitive.name != 'dot_general':
      return DATA
    ((path, _), use), = uses.items()
    if not use.data:
      return DATA
    own = facts[1 - use.operand]
    if own.gated is not None:
      self.layers[here.address] = own.gated._replace(down=path, down_use=use)
    elif own.kind == 'product' and own.bent:
      self.layers[here.address] = GatedLayer(own.path, None, path, here.address, 1 - use.operand, own.zero, use.place,
                                             use, None)
    return Trail('product', path, use, False, 0.0)


def _entrywise(eqn: Any, facts: list[Trail], here: Position) -> Trail:
  """Returns the trail of a result whose entries depend on the same entries of the operands."""
  kinds, name = {fact.kind for fact in facts}, eqn.primitive.name
  if 'data' in kinds:
    return _scaled(name, facts)
  if 'gated' in kinds:
    gated = [fact for fact in facts if fact.kind == 'gated']
    scaled = name in ('mul', 'div', 'neg') and len(gated) == 1 and 'product' not in kinds
    return gated[0] if scaled else DATA
  products = {(fact.use.address, fact.first): fact for fact in facts if fact.use is not None}
  if not products:
    return Trail('parameter' if 'parameter' in kinds else 'constant', zero=_at_zero(eqn, facts))
  if len(products) == 2:
    return _multiplied(eqn, facts, here) if name == 'mul' else DATA
  product, = products.values()
  alone = sum(fact.use is not None for fact in facts) == 1
  bent = any(fact.bent for fact in facts) or name not in _LINEAR or not alone or name == 'div' and facts[0].use is None
  return product._replace(bent=bent, zero=_at_zero(eqn, facts))


def _scaled(name: str, facts: list[Trail]) -> Trail:
  """Returns the trail of an activation times data, or where data set it to zero, as dropout does: zero stays zero."""
  own = [i for i, fact in enumerate(facts) if fact.bent or fact.kind == 'gated']
  others = [fact for i, fact in enumerate(facts) if i not in own]
  if name == 'select_n':
    fits = facts[0] is others[0] and all(fact.kind == 'constant' and fact.zero == 0 for fact in others[1:])
  else:
    fits = name == 'mul' or name == 'div' and own == [0]
  if len(own) != 1 or not fits:
    return DATA
  found = facts[own[0]]
  return found if found.kind == 'gated' else found._replace(zero=0.0 if found.zero == 0 else None)


def _multiplied(eqn: Any, facts: list[Trail], here: Position) -> Trail:
  """Returns the trail of the product of an activation and of another product, entry by entry."""
  if sum(fact.bent for fact in facts) != 1:
    return DATA
  operand = 0 if facts[0].bent else 1
  gate, up = facts[operand], facts[1 - operand]
  assert gate.use is not None and up.use is not None
  layer = GatedLayer(gate.path, up.path, '', here.address, operand, gate.zero, jaxprs.place(eqn), up.use, up.use)
  return Trail('gated', gated=layer)


def _at_zero(eqn: Any, facts: list[Trail]) -> float | None:
  """Returns the value of an operation where products and biases are zero, or `None` if it is not known."""
  values = [0.0 if fact.kind == 'parameter' and eqn.primitive.name in ('add', 'sub') else fact.zero for fact in facts]
  if eqn.primitive.name == 'mul' and 0.0 in values:
    return 0.0
  if None in values:
    return None
  given = [jnp.asarray(value, v.aval.dtype) for value, v in zip(values, eqn.invars)]
  result = eqn.primitive.bind(*given, **dict(jaxprs.options(eqn)))
  value = float(np.asarray(result[0] if eqn.primitive.multiple_results else result, np.float32))
  return value if np.isfinite(value) else None
