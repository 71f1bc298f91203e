"""`packed(apply)` runs any JAX function of parameters on packed ones, without a change to the model.

The function is traced as for dense parameters, so that no layer sees anything new, and is then evaluated operation by
operation (`sparsejax.programs.evaluate`). A packed parameter stays packed through casts, reshapes and transposes until
a product contracts it over the axes that it is packed along: that product is one call of the format's op. Every other
operation gets the parameter unpacked, bit for bit.

    small = formats.pack(params, '128x128')
    logits = packed(model.apply)({'params': small}, x)
    print(packed(model.apply, explain=True)({'params': small}, x))     # which op each parameter calls, or why none
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import held
from kernels_pallas.around import OPS as OPS
from kernels_pallas.around import Op as Op
from kernels_pallas.deferred import Deferred, deferred
from kernels_pallas.held import Fitted, Held, Refusal
from sparsejax import formats, tables
from sparsejax.arguments import checked
from sparsejax.programs import Operation, Program, ValueRules, evaluate, jaxprs, trace
from sparsejax.programs.jaxprs import Numbers
from sparsejax.programs.sizes import last_parts
from sparsejax.types import Array


class PackedUse(NamedTuple):
  """A `PackedUse` says what happens to one packed parameter in one operation of the program.

  `op` is the name of the op that is called, 'unpacked', or 'unused'. `primitive` and `where` are the name and the place
  of the operation. `why` is the reason for 'unpacked'. For an op, `why` maps each platform to the implementation that
  would run, or is '' if the op does not tell.
  """

  path: str
  shape: tuple[int, ...]
  kind: str
  op: str
  primitive: str = ''
  where: str = ''
  why: Any = ''


class ProgramExplanation(tuple):
  """A `ProgramExplanation` holds the `PackedUse`s of a program, in the order of the program, and prints as a table."""

  def __str__(self) -> str:
    brief = lambda why: ', '.join(f'{p}: {c.implementation}' for p, c in why.items()) if isinstance(why, dict) else why
    rows = [(use.path, 'x'.join(map(str, use.shape)), use.kind, use.op, use.primitive, brief(use.why)) for use in self]
    return tables.aligned(('parameter', 'shape', 'format', 'op', 'by', 'why'), rows, rule=False)


@checked
def packed(apply: Callable[..., Any], *, implementation: str | None = None, explain: bool = False
           ) -> Callable[..., Any]:
  """Returns `apply` for arguments of which any leaves are packed arrays of `sparsejax.formats`.

      small = formats.pack(params, '128x128')
      logits = packed(model.apply)({'params': small}, x)                                  # Linen
      y = packed(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)                         # NNX
      y = packed(lambda m, x: jax.vmap(eqx.combine(m, static))(x))(arrays, x)              # Equinox

  A product, or a 1x1 convolution, with a packed weight calls the format's op (`block_sparse_matmul`, ...) with this
  `implementation`. Weights stay packed in `jit`, `remat`, `cond`, `while`, and in a `scan` over a stack of weights.
  Weights stay packed in a `shard_map` whose devices all have the whole weight. Weights stay packed in functions with
  derivative rules of their own too, but the rules take dense weights. All other operations unpack the weights. For
  `implementation=None`, a product that the op refuses unpacks the weight too. Unpacking costs what the dense model
  costs.

  With `explain=True` the function returns, instead of the result, the `ProgramExplanation`: each weight, the op that it
  calls, or why it is unpacked. Nothing is computed. A packed leaf that `apply` returns unchanged is returned packed.

  Results, and their derivatives of every order, in forward and reverse mode, are those of the dense model but for the
  order of sums. A NaN or an infinity that only zeros of a weight multiply may not reach the result: each op says in
  which implementation. A NaN or an infinity among the weights reaches what it reaches in the dense model.

  Arguments without shape and dtype (`train=False`, functions) and NumPy scalars are passed on, so that `apply` may
  branch on them. `jit`, `vmap` and `grad` go around the returned function; train `formats.values`:
  `jax.grad(lambda v: loss(packed(apply)(formats.with_values(params, v), x)))(formats.values(params))`. Every call
  traces `apply`, so put it under `jit`.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    program = trace(apply, args, kwargs, is_leaf=formats.is_packed)
    values = [held.whole(leaf, path) if formats.is_packed(leaf) else leaf
              for leaf, path in zip(program.arrays, program.paths)]
    if explain:
      return _explained(program, values, implementation)
    results = evaluate(program, values, PackedProducts(implementation, None).rules())
    return program.unflatten([_returned(result) for result in results])

  return call


def _explained(program: Program, values: list[Any], implementation: str | None) -> ProgramExplanation:
  uses: list[PackedUse] = []
  rules = PackedProducts(implementation, uses).rules()
  jax.eval_shape(lambda values: [_dense(result) for result in evaluate(program, values, rules)], values)
  used = {use.path for use in uses}
  uses += [PackedUse(value.path, value.packed.shape, value.packed.kind, 'unused')
           for value in values if _held(value) and value.path not in used]
  return ProgramExplanation(use for i, use in enumerate(uses) if use not in uses[:i])


def _held(value: Any) -> bool:
  return isinstance(value, Held)


def _stands_in(value: Any) -> bool:
  return isinstance(value, (Held, Deferred))


def _dense(value: Any) -> Any:
  return value.to_dense() if _stands_in(value) else value


def _returned(value: Any) -> Any:
  """Returns a result packed if it is a parameter as it came, dense otherwise."""
  return value.packed if _held(value) and value.dims == held.whole(value.packed, '').dims else _dense(value)


class Contracted(NamedTuple):
  """`Contracted` holds the dense operand `x` of a product, and the dimensions of the held operand and of `x`.

  `placed(y)` returns the result `y` of the product in the shape and the order of the program.
  """

  ours: Numbers
  x: Array
  theirs: Numbers
  placed: Callable[[Array], Array] = lambda y: y


@dataclasses.dataclass(frozen=True)
class PackedProducts:
  """`PackedProducts` holds the rules for held operands; `uses`, unless `None`, takes a `PackedUse` for each."""

  implementation: str | None
  uses: list[PackedUse] | None

  def rules(self) -> ValueRules:
    return ValueRules(self.operation, lambda eqn, values, address: any(map(_stands_in, values)), self.dense,
                      unstacked=_unstacked)

  def operation(self, eqn: Any, values: list[Any], here: Operation) -> list[Any] | None:
    name = eqn.primitive.name
    if any(isinstance(value, Deferred) for value in values):
      done = self._completed(eqn, values)
      if done is not None or jaxprs.inner(eqn):
        return done
      values = [self.dense(eqn, value, '') if isinstance(value, Deferred) else value for value in values]
      if not any(map(_held, values)):
        return here.dense(values)
    if name in POINTWISE:
      new, = here.dense([values[0].packed.values])
      return [dataclasses.replace(values[0], packed=dataclasses.replace(values[0].packed, values=new))]
    if name in PRODUCTS:
      return self._product(eqn, values, here)
    moved = held.moved(values[0], eqn) if _held(values[0]) else None
    return None if moved is None else [moved]

  def dense(self, eqn: Any, value: Any, why: str) -> Any:
    if _held(value):
      self._note(eqn, value, 'unpacked', why)
    elif isinstance(value, Deferred) and self.uses is not None:
      self.uses.append(PackedUse(value.path, value.sizes, 'active', value.op, eqn.primitive.name, jaxprs.line(eqn),
                                 'all outputs: they are no factor of an activation'))
    return _dense(value)

  def _completed(self, eqn: Any, values: list[Any]) -> list[Any] | None:
    """Returns an activation times a product that was put off, or parts of one; others get the whole product."""
    parts = last_parts(eqn)
    if parts is not None:
      return [values[0].part(part) for part in parts]
    if eqn.primitive.name != 'mul':
      return None
    side = 1 if isinstance(values[1], Deferred) else 0
    z, up = values[1 - side], values[side]
    if _stands_in(z) or jnp.shape(z) != tuple(eqn.outvars[0].aval.shape):
      return None
    if self.uses is not None:
      self.uses.append(PackedUse(up.path, up.sizes, 'active', 'active_outputs', 'mul', jaxprs.line(eqn), up.choices(z)))
    return [up.times(z)]

  def _note(self, eqn: Any, value: Held, op: str, why: Any) -> None:
    if self.uses is not None:
      self.uses.append(PackedUse(value.path, value.packed.shape, value.packed.kind, op, eqn.primitive.name,
                                 jaxprs.line(eqn), why))

  def _product(self, eqn: Any, values: list[Any], here: Operation) -> list[Any]:
    """Multiplies by the op of the second operand if both are packed, and by dense operands if the op refuses."""
    side = 1 if _held(values[1]) else 0
    w, x = values[side], self.dense(eqn, values[1 - side], 'the other operand is packed too')
    product = PRODUCTS[eqn.primitive.name](eqn, side, x)
    fit = product if isinstance(product, Refusal) else self._fitted(eqn, w, product)
    if isinstance(fit, Refusal):
      dense = self.dense(eqn, w, fit.why)
      return here.dense([x, dense] if side else [dense, x])
    return [self._multiplied(eqn, fit, product, held_first=side == 0)]

  def _fitted(self, eqn: Any, w: Held, product: Contracted) -> Fitted | Refusal:
    dtype, (precision, sharding) = _dtype(eqn), jaxprs.product_options(eqn)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
      return Refusal(f'no op for {dtype}')
    if sharding is not None:
      return Refusal('an out_sharding is asked for')
    if any(p not in (None, lax.Precision.DEFAULT) for p in precision or ()) and dtype.itemsize > 2:
      return Refusal(f'precision {precision} is asked for')
    fit = held.fitted(w, product.ours)
    if isinstance(fit, Fitted) and w.packed.kind not in OPS:
      return Refusal(f'no op for the format {w.packed.kind!r}')
    if isinstance(fit, Refusal) or self.implementation is not None:
      return fit
    rows = fit.rows(jax.ShapeDtypeStruct(product.x.shape, dtype), product.theirs)
    why = OPS[w.packed.kind].refusal(rows, fit.matrix)
    return fit if why is None else Refusal(why)

  def _multiplied(self, eqn: Any, fit: Fitted, product: Contracted, held_first: bool) -> Array:
    dtype, w = _dtype(eqn), fit.held
    multiply = OPS[w.packed.kind].multiply
    late = deferred(fit, product.x.astype(dtype), product.theirs, held_first, eqn.outvars[0].aval,
                    self.implementation)
    if late is not None and eqn.primitive.name == 'dot_general':
      return late  # type: ignore[return-value]
    cast = dataclasses.replace(w.packed, values=w.packed.values.astype(dtype))

    def op(x: Array, packed: Any) -> Array:
      if self.uses is not None:
        self._note(eqn, w, multiply.__name__, multiply(x, packed, explain=True))
      return multiply(x, packed, implementation=self.implementation)

    with jax.named_scope(jaxprs.scope_of(eqn) or multiply.__name__):
      fit = fit._replace(held=dataclasses.replace(w, packed=cast))
      y = held.product(op, fit, product.x.astype(dtype), product.theirs, held_first)
    return product.placed(y).astype(eqn.outvars[0].aval.dtype)


def _unstacked(value: Any) -> tuple[Any, Callable[[Any], Any]] | str:
  """Returns the packed stack and a function that makes a stand-in of one slice, or why a scan cannot slice it."""
  if not _held(value):
    return value, lambda array: array
  if not held.stacked(value):
    return 'its first axis is not of a stack'
  return value.packed, lambda packed: Held(packed, value.path, held.sliced(value))


# Operations that map zeros to zeros are applied to the stored values alone.
POINTWISE = {'convert_element_type', 'copy', 'name', 'pcast', 'pvary', 'reduce_precision', 'stop_gradient'}


# `PRODUCTS` maps (equation, number of the held operand, the other operand) to `Contracted`, or to a `Refusal`.


def _dtype(eqn: Any) -> jnp.dtype:
  """Returns the dtype that holds the values of all operands and results without loss."""
  return functools.reduce(jnp.promote_types, (v.aval.dtype for v in (*eqn.invars, *eqn.outvars)))


def _dot_general(eqn: Any, side: int, x: Array) -> Contracted:
  numbers = jaxprs.dot_numbers(eqn)
  return Contracted(numbers[side], x, numbers[1 - side])


def _conv_general_dilated(eqn: Any, side: int, x: Array) -> Contracted | Refusal:
  """Reads a 1x1 convolution as a product of matrices at every place, or at every `stride`th place."""
  conv, kernel = jaxprs.convolution(eqn), eqn.invars[1].aval.shape
  plain = conv.groups == conv.batch_groups == 1 and set(conv.dilation) <= {1}
  if side == 0 or not plain or any(kernel[i] != 1 for i in conv.rhs[2:]) or any(map(any, conv.padding)):
    return Refusal('only plain 1x1 convolutions are products of matrices')
  strides = dict(zip(conv.lhs[2:], conv.strides))
  left = [i for i in range(x.ndim) if i != conv.lhs[1]]

  def placed(y: Array) -> Array:
    y = y.reshape(*y.shape[:len(left)], math.prod(y.shape[len(left):]))  # without the taps
    sources = {place: left.index(i) for i, place in zip(conv.lhs, conv.out) if i in left}
    return y.transpose([sources.get(place, len(left)) for place in range(y.ndim)])

  x = lax.slice(x, [0] * x.ndim, x.shape, [strides.get(i, 1) for i in range(x.ndim)])
  return Contracted(Numbers((conv.rhs[1],), ()), x, Numbers((conv.lhs[1],), ()), placed)


PRODUCTS = {'dot_general': _dot_general, 'conv_general_dilated': _conv_general_dilated}
