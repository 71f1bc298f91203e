"""Shows what each parameter is multiplied by, and takes an answer in place of the product.

`operands` gives each `Site` to a callback. `walk` stops at each site, so that several batches can go in lock-step and
return. Loops are walked layer by layer: each layer is a site. Values are dropped after their last use.

    inputs = {}
    run = operands(model.apply, lambda site: inputs.update({(site.path, site.layer): site.x}))
    y = run(variables, x)                  # the result of `model.apply`; `inputs` has the input of each layer

    steps = walk(trace(model.apply, (variables, x)))
    while steps.stopped:
      steps.answer(steps.site.product(x=steps.site.x * 0.5))
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Container, Iterable
from typing import Any

from sparsejax import errors
from sparsejax.arguments import checked, shown
from sparsejax.programs.contractions import Use, read
from sparsejax.programs.evaluate import Operation, Walk, rules_at
from sparsejax.programs.jaxprs import Address
from sparsejax.programs.structures import Outcome, Stop
from sparsejax.programs.tracing import Program, trace
from sparsejax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """A `Site` is one product with the parameter at `path`, in one layer.

  `x` is the other operand of the product; for a convolution, its input. `weight` is the operand that is made of the
  parameter, as the product takes it.
  `number` is an index into `Contractions.uses[path]`. Every round of a loop has the same numbers.
  `layer` holds the index of each layer axis that a `scan` sliced, outermost first; it is `()` outside of such a scan.
  `steps` holds the round of each loop around the site, outermost first. If the program picks a layer by the number of a
  round (`w[i]`), `steps` tells the layer.
  `use` holds the axes of this use, its place in the code, and the view from `weight` to the parameter. `eqn` is the
  operation, which `programs.jaxprs` reads.

  The program may change a parameter before the product. After a transpose, a reshape or a slice, `use.view.dims` tells
  how the dimensions of `weight` run over the axes of the parameter. After a cast, a mask or a scale, `weight` has other
  values than the parameter; `product(weight=...)` takes values as the product does.
  """

  path: str
  number: int
  layer: tuple[int, ...]
  steps: tuple[int, ...]
  use: Use
  eqn: Any
  _operands: list[Any]
  _product: Callable[[list[Any]], list[Any]]

  @property
  def x(self) -> Array:
    return self._operands[1 - self.use.operand]

  @property
  def others(self) -> list[Array]:
    """The operands after the first two, such as the group sizes of a `ragged_dot`."""
    return self._operands[2:]

  @property
  def weight(self) -> Array:
    return self._operands[self.use.operand]

  def product(self, x: Array | None = None, weight: Array | None = None) -> Array:
    """Returns the result of the product, with another `x` or another `weight` if given."""
    pair = [self.x if x is None else x, self.weight if weight is None else weight]
    return self._product([*(pair if self.use.operand else pair[::-1]), *self._operands[2:]])[0]


@checked
def operands(apply: Callable[..., Any], callback: Callable[[Site], Array | None]) -> Callable[..., Any]:
  """Returns a function like `apply` that calls `callback(site)` at each product with a parameter.

  If `callback` returns an array, the array replaces the product, whose shape and dtype it must have. The first argument
  of `apply` holds the parameters. A product with several parameters has a site for each, until an answer is given.
  The function runs operation by operation, on concrete values. Raises `ValueError` for a site inside of `shard_map`
  and, under `jit`, for a site inside of a `cond` or a `while`.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    program = trace(apply, args, kwargs)
    steps = walk(program)
    while steps.stopped:
      steps.answer(callback(steps.site))
    return program.unflatten(steps.results)

  return call


def walk(program: Program, arrays: Iterable[Any] | None = None, *, function: str = 'operands',
         paths: Container[str] | None = None) -> Walk:
  """Returns a walk through a traced program that stops at each `Site`; an answer is `None` or the product's result.

  The first argument of the traced function holds the parameters. `arrays` are the inputs of the program, in the order
  of `program.arrays`; by default, the inputs that the function was traced with.
  `paths`: the parameters whose products are sites, by default all. `function` is the caller's name for messages.
  """
  uses = {address: [(name, use) for name, use in each.items() if paths is None or name[0] in paths]
          for address, each in uses_by_address(program).items()}
  stops = lambda eqn, values, here: _stops(eqn, values, here, uses[here.address])
  sites = {address: {path: use for (path, _), use in each} for address, each in uses.items() if each}
  rules = rules_at(function, program, sites, stops, keeps=lambda eqn: False)
  return Walk(program, program.arrays if arrays is None else arrays, rules)


Numbered = tuple[str, int]  # (path, number) stands for entry `number` of `Contractions.uses[path]`
_USES: weakref.WeakKeyDictionary[Program, dict[Address, dict[Numbered, Use]]] = weakref.WeakKeyDictionary()


def uses_by_address(program: Program) -> dict[Address, dict[Numbered, Use]]:
  """Maps the address of each product with parameters to its uses of parameters; read once for each program."""
  if program not in _USES:
    _USES[program] = {}
    for path, uses in read(program).uses.items():
      for number, use in enumerate(uses):
        _USES[program].setdefault(use.address, {})[path, number] = use
  return _USES[program]


def _stops(eqn: Any, values: list[Any], here: Operation, uses: list[tuple[Numbered, Use]]) -> Outcome:
  """Stops at the first of the uses; without an answer, at the next."""
  if not uses:
    return here.dense(values)
  (path, number), use = uses[0]
  layer = tuple(here.steps[loop] for loop in use.view.loops)
  site = Site(path, number, layer, here.steps, use, eqn, values, here.dense)
  return Stop(site, lambda answer: _stops(eqn, values, here, uses[1:]) if answer is None else [_checked(
      answer, site, eqn.outvars[0].aval)])


def _checked(answer: Array, site: Site, result: Any) -> Array:
  if not hasattr(answer, 'dtype'):
    raise errors.at_leaf('operands', site.path, site.weight.shape, f'the answer at {site.use.place} must be an array, '
                         f'not {shown(answer)}; Site.product(x, weight) computes one, and None leaves the product.')
  if (answer.shape, answer.dtype) == (result.shape, result.dtype):
    return answer
  raise errors.at_leaf('operands', site.path, site.weight.shape, f'the answer at {site.use.place} is {answer.dtype}'
                       f'{list(answer.shape)}, but the product is {result.dtype}{list(result.shape)}; '
                       'Site.product(x, weight) computes an answer.')
