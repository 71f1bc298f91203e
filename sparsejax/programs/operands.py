"""Shows the other operand of each product with a parameter, and takes an answer in place of the product.

`operands` gives each `Site` to a callback; `walk` stops at each site, so that several batches can go in lock-step and
return. Loops are walked layer by layer, each layer a site of its own; only what is still needed is kept in memory.

    inputs = {}
    run = operands(model.apply, lambda site: inputs.setdefault((site.path, site.layer), site.x) and None)
    y = run(variables, x)                  # what `model.apply` returns, and the inputs of each layer in `inputs`

    steps = walk(trace(model.apply, (variables, x)))
    while steps.stopped:
      steps.answer(steps.site.product(x=steps.site.x * 0.5))
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from sparsejax import errors
from sparsejax.programs import jaxprs
from sparsejax.programs.contractions import Use, read
from sparsejax.programs.evaluate import Here, Rules, Walk, check_reached
from sparsejax.programs.jaxprs import Address, Program
from sparsejax.programs.structures import Outcome, Stop
from sparsejax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """One use of the parameter at `path` by a product, in one layer.

  `x`: the other operand. For a convolution, its input; the kernel is the parameter.
  `weight`: the operand that shows the parameter, as the product sees it.
  `number`: the number of the use, an index into `Contractions.uses[path]`. A loop's body has the same uses each round.
  `layer`: the index of each layer axis that a `scan` took apart, outermost first; `()` outside of such a scan.
  `steps`: the round of each loop around the site, outermost first. It tells the layer where an index picks it.
  `use`: what `contractions` says of this use: its axes, its place, and how `weight` shows the parameter.

  A parameter may reach the product by a detour. After a transpose, a reshape or a slice, `use.view.dims` tells how the
  dimensions of `weight` run over the parameter's axes. After a cast, a mask or a scale, the numbers in `weight` are not
  those of the parameter: `product(weight=...)` takes the numbers that the product sees.
  """

  path: str
  number: int
  layer: tuple[int, ...]
  steps: tuple[int, ...]
  use: Use
  _operands: list[Any]
  _product: Callable[[list[Any]], list[Any]]

  @property
  def x(self) -> Array:
    return self._operands[1 - self.use.operand]

  @property
  def weight(self) -> Array:
    return self._operands[self.use.operand]

  def product(self, x: Array | None = None, weight: Array | None = None) -> Array:
    """Returns the result of the product, with another `x` or another `weight` if given: an answer to the site."""
    pair = [self.x if x is None else x, self.weight if weight is None else weight]
    return self._product([*(pair if self.use.operand else pair[::-1]), *self._operands[2:]])[0]


def operands(apply: Callable[..., Any], callback: Callable[[Site], Array | None]) -> Callable[..., Any]:
  """Returns a function like `apply` that calls `callback(site)` at each use of a parameter by a product.

  If `callback` returns an array, the array takes the place of the product; its shape and dtype must be the product's.
  The first argument holds the parameters. The function runs operation by operation, on concrete values: under `jit` a
  `cond` or a `while` that leads to a site is refused. Sites inside of `shard_map` are refused. A product of several
  parameters has a site for each, until one is answered.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    program = jaxprs.trace(apply, args, kwargs)
    steps = walk(program)
    while steps.stopped:
      steps.answer(callback(steps.site))
    return program.unflatten(steps.results)

  return call


def walk(program: Program, arrays: Iterable[Any] | None = None) -> Walk:
  """Returns a walk through a traced program that stops at each `Site`; its answers are `None` or the product.

  The first argument of the program holds the parameters. `arrays` are the program's inputs, in the order of
  `program.arrays`, for a batch other than the one it was traced with.
  """
  uses = uses_by_address(program)
  rules = Rules(lambda eqn, values, here: _stops(eqn, values, here, uses.get(here.address)), keeps=lambda eqn: False,
                concerns=functools.partial(concerned, prefixes(uses)))
  names = {address: path for address, ((path, _, _), *_) in uses.items()}
  check_reached('operands', program, names, rules)
  return Walk(program, program.arrays if arrays is None else arrays, rules)


Named = tuple[str, int, Use]  # the path of a parameter, the number of its use, and the use


@functools.lru_cache(maxsize=16)
def uses_by_address(program: Program) -> dict[Address, list[Named]]:
  """Returns the uses of parameters in each product of a program."""
  found: dict[Address, list[Named]] = {}
  for path, uses in read(program).uses.items():
    for number, use in enumerate(uses):
      found.setdefault(use.address, []).append((path, number, use))
  return found


def prefixes(addresses: Iterable[Address]) -> frozenset[Address]:
  """Returns the addresses of operations, and of all operations around them."""
  return frozenset(address[:n] for address in addresses for n in range(1, len(address) + 1, 2))


def concerned(addresses: frozenset[Address], eqn: Any, values: list[Any], address: Address) -> bool:
  """Returns whether an operation, or one inside of it, is at one of the addresses; a rule `concerns`."""
  return address in addresses


def _stops(eqn: Any, values: list[Any], here: Here, uses: list[Named] | None) -> Outcome | None:
  """Stops at the first of the uses; without an answer, at the next."""
  if uses is None:
    return None
  if not uses:
    return here.dense(values)
  (path, number, use), rest = uses[0], uses[1:]
  layer = tuple(here.steps[loop] for loop in use.view.loops)
  site = Site(path, number, layer, here.steps, use, values, here.dense)

  def resume(answer: Array | None) -> Outcome:
    if answer is None:
      return _stops(eqn, values, here, rest)
    result = eqn.outvars[0].aval
    if (answer.shape, answer.dtype) != (result.shape, result.dtype):
      raise errors.at_leaf('operands', path, site.weight.shape, f'the answer at {use.place} is {answer.dtype}'
                           f'{list(answer.shape)}, but the product is {result.dtype}{list(result.shape)}; '
                           'Site.product(x, weight) computes one.')
    return [answer]

  return Stop(site, resume)
