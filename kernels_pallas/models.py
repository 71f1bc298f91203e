"""`packed(apply)`: any JAX function of parameters runs on packed ones, without a change to the model.

The function is traced as for dense parameters, so that no layer sees anything new, and then evaluated operation by
operation. A packed parameter stays packed through casts, reshapes and transposes, and through the programs inside of
the program, until a product contracts it over the axes that it is packed along: that is one call of the format's op.
Whatever else touches it gets it unpacked, bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util

from kernels_pallas import held
from kernels_pallas.block_sparse import block_sparse_matmul
from kernels_pallas.held import Held, Numbers
from kernels_pallas.n_m import nm_matmul
from kernels_pallas.sparse24 import sparse24_matmul
from kernels_pallas.unstructured import unstructured_matmul
from sparsejax import formats, trees
from sparsejax.programs.contractions import scanned
from sparsejax.types import Array

Bind = Callable[[list[Any]], list[Any]]  # the dense results of one operation
OPS = {  # by kind of format; for others that say which axes are contracted, formats.matmul
  'block_sparse': block_sparse_matmul, 'csc': unstructured_matmul, 'nm': nm_matmul, 'sparse24': sparse24_matmul}


class Row(NamedTuple):
  """What became of one packed parameter in one place of the program.

  `op`: the op that was called, 'unpacked', or 'unused'. `primitive` and `where`: what met it. `why`: of 'unpacked' the
  reason, of an op what it would run on each platform (a `dispatch.Explanation`, or '').
  """

  path: str
  shape: tuple[int, ...]
  kind: str
  op: str
  primitive: str = ''
  where: str = ''
  why: Any = ''


class Explanation(tuple):
  """`Row`s in the order of the program; prints as a table."""

  def __str__(self) -> str:
    head = ('parameter', 'shape', 'format', 'op', 'by', 'why')
    brief = lambda why: ', '.join(f'{p}: {c.implementation}' for p, c in why.items()) if isinstance(why, dict) else why
    lines = [head] + [(row.path, 'x'.join(map(str, row.shape)), row.kind, row.op, row.primitive, brief(row.why))
                      for row in self]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in lines)


def packed(apply: Callable[..., Any], *, implementation: str | None = None, explain: bool = False
           ) -> Callable[..., Any]:
  """`apply` for arguments of which any leaves are packed arrays of `sparsejax.formats`; otherwise the same function.

      small = formats.pack(params, '128x128')
      logits = packed(model.apply)({'params': small}, x)                                  # Linen
      y = packed(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)                         # NNX
      y = packed(lambda m, x: jax.vmap(eqx.combine(m, static))(x))(arrays, x)              # Equinox

  A product, or a 1x1 convolution, with a packed weight calls the format's op (`block_sparse_matmul`, ...) with this
  `implementation`. Weights stay packed in `jit`, `remat`, `cond`, `while`, and in a `scan` over a stack of them; in
  functions with derivatives of their own too, but the rules of those are for dense weights and get them. All else
  unpacks them, and so does, for `implementation=None`, a product that the op refuses; that costs what the dense model
  costs. `explain=True` returns, instead of the result and without computing it, the `Explanation` that says what
  happens to each weight, and why. A packed leaf that `apply` returns as it came is returned packed.

  Results are the dense model's but for the order of sums. Arguments without shape and dtype (`train=False`, functions)
  are handed on. `jit`, `vmap` and `grad` go around it; what is trained is `formats.values`:
  `jax.grad(lambda v: loss(packed(apply)(formats.with_values(params, v), x)))(formats.values(params))`. Every call
  traces `apply`, so put it under `jit`.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    run, leaves, structure = _program(apply, args, kwargs, implementation)
    if not explain:
      return structure().unflatten([_returned(leaf) for leaf in run(leaves, None)])
    rows: list[Row] = []
    jax.eval_shape(lambda leaves: [_dense(leaf) for leaf in run(leaves, rows)], leaves)
    seen = {row.path for row in rows}
    unused = [Row(h.path, h.packed.shape, h.packed.kind, 'unused') for h in leaves if _held(h) and h.path not in seen]
    every = [*rows, *unused]
    return Explanation(row for i, row in enumerate(every) if row not in every[:i])

  return call


def _program(apply: Callable[..., Any], args: Any, kwargs: Any, implementation: str | None
             ) -> tuple[Callable[..., list[Any]], list[Any], Callable[[], Any]]:
  """The traced program, the leaves it takes, and the structure of its result."""
  leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=formats.is_packed)
  paths = [path for part in (*args, kwargs) for path in trees.flatten(part, is_leaf=formats.is_packed)[0]]
  arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')]
  result: list[Any] = []

  def flat(*values: Any) -> list[Any]:
    out = apply_to(treedef.unflatten([dict(zip(arrays, values)).get(i, leaf) for i, leaf in enumerate(leaves)]))
    out, structure = jax.tree.flatten(out)
    result[:] = [structure]
    return out

  apply_to = lambda both: apply(*both[0], **both[1])
  given = [held.whole(leaves[i], paths[i]) if formats.is_packed(leaves[i]) else leaves[i] for i in arrays]
  shapes = [jax.ShapeDtypeStruct(h.packed.shape, h.packed.dtype) if _held(h) else h for h in given]
  jaxpr = jax.make_jaxpr(flat)(*shapes)
  return (lambda values, rows: Evaluation(implementation, rows)(jaxpr, values)), given, lambda: result[0]


def _held(value: Any) -> bool:
  return isinstance(value, Held)


def _dense(value: Any) -> Any:
  return value.to_dense() if _held(value) else value


def _returned(value: Any) -> Any:
  """Packed if it is as it came."""
  return value.packed if _held(value) and value.dims == held.whole(value.packed, '').dims else _dense(value)


class Product(NamedTuple):
  """A product of a held operand and `x`: their dimensions, and how the result is put where the program has it."""

  ours: Numbers
  x: Array
  theirs: Numbers
  placed: Callable[[Array], Array] = lambda y: y


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluates programs on values of which some are `Held`; `rows`, if any, takes what happened to these."""

  implementation: str | None
  rows: list[Row] | None

  def __call__(self, program: Any, arguments: Sequence[Any]) -> list[Any]:
    """The results of one jaxpr, closed or without constants."""
    jaxpr = getattr(program, 'jaxpr', program)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*getattr(program, 'consts', ()), *arguments)))
    read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    for eqn in jaxpr.eqns:
      values = [read(v) for v in eqn.invars]
      bind = functools.partial(_bind, jaxpr, eqn)
      env.update(zip(eqn.outvars, self._results(eqn, values, bind) if any(map(_held, values)) else bind(values)))
    return [read(v) for v in jaxpr.outvars]

  def _results(self, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
    name = eqn.primitive.name
    if name in POINTWISE:
      new, = bind([values[0].packed.values])
      return [dataclasses.replace(values[0], packed=dataclasses.replace(values[0].packed, values=new))]
    if name in held.MOVES and (found := held.moved(values[0], eqn)) is not None:
      return [found]
    if name in PRODUCTS:
      return [self._product(eqn, values, bind)]
    if name in STRUCTURES:
      return STRUCTURES[name](self, eqn, values, bind)
    return bind(self.unpacked(eqn, values, 'no product'))

  def unpacked(self, eqn: Any, values: Sequence[Any], why: str) -> list[Any]:
    """All of them dense, and a row for each that was not."""
    for value in filter(_held, values):
      self._note(eqn, value, 'unpacked', why)
    return [_dense(value) for value in values]

  def inside(self, program: Any, eqn: Any, arguments: Sequence[Any]) -> list[Array]:
    """The results of a program inside of a program, all dense."""
    return self.unpacked(eqn, self(program, arguments), 'it is one of its results')

  def _note(self, eqn: Any, held: Held, op: str, why: Any) -> None:
    if self.rows is not None:
      where = source_info_util.summarize(eqn.source_info)
      self.rows.append(Row(held.path, held.packed.shape, held.packed.kind, op, eqn.primitive.name, where, why))

  def _product(self, eqn: Any, values: list[Any], bind: Bind) -> Array:
    """By the format's op, for the second operand if both are packed; or of dense operands, if there is a reason."""
    for side in (1, 0):
      if _held(values[side]):
        values[1 - side], = self.unpacked(eqn, values[1 - side:2 - side], 'the other operand is packed too')
        found = PRODUCTS[eqn.primitive.name](eqn, side, values[1 - side])
        why = found if isinstance(found, str) else self._unable(eqn, values[side], found)
        if why is None:
          try:
            return self._multiplied(eqn, side, values[side], found)
          except ValueError as refusal:
            if self.implementation is not None:
              raise
            why = str(refusal)
        values[side], = self.unpacked(eqn, values[side:side + 1], why)
    return bind(values)[0]

  def _unable(self, eqn: Any, w: Held, found: Product) -> str | None:
    """Why no op can do this product, or `None`."""
    dtype, precision = _dtype(eqn), eqn.params['precision']
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
      return f'no op for {dtype}'
    if eqn.params.get('out_sharding') is not None:
      return 'an out_sharding is asked for'
    if any(p not in (None, lax.Precision.DEFAULT) for p in precision or ()) and dtype.itemsize > 2:
      return f'precision {precision} is asked for'
    return held.misfit(w, found.ours)

  def _multiplied(self, eqn: Any, side: int, w: Held, found: Product) -> Array:
    dtype, notes = _dtype(eqn), []
    w = dataclasses.replace(w, packed=dataclasses.replace(w.packed, values=w.packed.values.astype(dtype)))

    def op(x: Array, packed: Any) -> Array:
      if packed.kind not in OPS:
        return formats.matmul(x, packed)
      if self.rows is not None:
        notes.append(OPS[packed.kind](x, packed, explain=True))
      return OPS[packed.kind](x, packed, implementation=self.implementation)

    name = OPS[w.packed.kind].__name__ if w.packed.kind in OPS else 'formats.matmul'
    with jax.named_scope(str(eqn.source_info.name_stack) or name):
      y = held.product(op, w, found.ours, found.x.astype(dtype), found.theirs, ours_first=side == 0)
    self._note(eqn, w, name, notes[0] if notes else '')
    return found.placed(y).astype(eqn.outvars[0].aval.dtype)


def _bind(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
  """The results of one operation of `jaxpr` of dense values."""
  inputs = {v: value for v, value in zip(eqn.invars, values) if not isinstance(v, core.Literal)}
  one = jaxpr.replace(constvars=(), invars=list(inputs), outvars=eqn.outvars, eqns=[eqn])
  return core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))(*inputs.values())


# Operations that keep zeros as they are, so that they act on the values alone.
POINTWISE = {'convert_element_type', 'copy', 'name', 'reduce_precision', 'stop_gradient'}


# Products: (equation, which operand is held, the other one) -> a `Product`, or why it is none.


def _dtype(eqn: Any) -> jnp.dtype:
  """In which no operand and no result loses anything."""
  return functools.reduce(jnp.promote_types, (v.aval.dtype for v in (*eqn.invars, *eqn.outvars)))


def _dot_general(eqn: Any, side: int, x: Array) -> Product:
  contracted, batch = eqn.params['dimension_numbers']
  ours, theirs = (Numbers(tuple(contracted[i]), tuple(batch[i])) for i in (side, 1 - side))
  return Product(ours, x, theirs)


def _conv_general_dilated(eqn: Any, side: int, x: Array) -> Product | str:
  """A 1x1 convolution is a product of matrices at every place, or, with strides, at every few."""
  params, numbers, kernel = eqn.params, eqn.params['dimension_numbers'], eqn.invars[1].aval.shape
  plain = params['feature_group_count'] == params['batch_group_count'] == 1 and set(params['lhs_dilation']) <= {1}
  if side == 0 or not plain or any(kernel[i] != 1 for i in numbers.rhs_spec[2:]) or any(map(any, params['padding'])):
    return 'only plain 1x1 convolutions are products of matrices'
  strides = [1] * x.ndim
  for i, stride in zip(numbers.lhs_spec[2:], params['window_strides']):
    strides[i] = stride
  left = [i for i in range(x.ndim) if i != numbers.lhs_spec[1]]

  def placed(y: Array) -> Array:
    y = y.reshape(*y.shape[:len(left)], -1)  # without the taps
    at = {place: left.index(i) for i, place in zip(numbers.lhs_spec, numbers.out_spec) if i in left}
    return y.transpose([at.get(place, len(left)) for place in range(y.ndim)])

  x = lax.slice(x, [0] * x.ndim, x.shape, strides)
  return Product(Numbers((numbers.rhs_spec[1],), ()), x, Numbers((numbers.lhs_spec[1],), ()), placed)


PRODUCTS = {'dot_general': _dot_general, 'conv_general_dilated': _conv_general_dilated}


# Programs inside of the program.


def _entered(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  return ev(next(iter(core.jaxprs_in_params(eqn.params))), values)


def _remat(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  body = functools.partial(ev.inside, eqn.params['jaxpr'], eqn)
  return jax.checkpoint(body, prevent_cse=eqn.params['prevent_cse'], policy=eqn.params['policy'])(values)


def _custom_jvp(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  """Its rule is about dense weights, so for derivatives it gets those."""
  call = jax.custom_jvp(functools.partial(ev.inside, eqn.params['call_jaxpr'], eqn))
  call.defjvp(lambda primals, tangents: jax.jvp(lambda values: bind(list(map(_dense, values))), primals, tangents))
  return call(values)


def _custom_vjp(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  body = functools.partial(ev.inside, eqn.params['call_jaxpr'], eqn)
  call = jax.custom_vjp(body)
  call.defvjp(lambda values: (body(values), values),
              lambda values, dy: jax.vjp(lambda values: bind(list(map(_dense, values))), values)[1](dy))
  return call(values)


def _cond(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  branches = [functools.partial(ev.inside, branch, eqn) for branch in eqn.params['branches']]
  return lax.switch(values[0], branches, values[1:])


def _while(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  a, b = eqn.params['cond_nconsts'], eqn.params['cond_nconsts'] + eqn.params['body_nconsts']
  proceed = lambda carry: ev.inside(eqn.params['cond_jaxpr'], eqn, [*values[:a], *carry])[0]
  body = lambda carry: ev.inside(eqn.params['body_jaxpr'], eqn, [*values[a:b], *carry])
  return lax.while_loop(proceed, body, ev.unpacked(eqn, values[b:], 'it changes from round to round'))


def _scan(ev: Evaluation, eqn: Any, values: list[Any], bind: Bind) -> list[Any]:
  """A stack that is taken apart stays packed, step by step."""
  params, (first, last) = eqn.params, scanned(eqn)
  carry = ev.unpacked(eqn, values[first:last], 'it changes from round to round')
  split = [_held(value) and held.stacked(value) for value in values[last:]]
  xs = [value.packed if whole else ev.unpacked(eqn, [value], 'its first axis is not of a stack')[0]
        for value, whole in zip(values[last:], split)]

  def step(carry: list[Array], xs: list[Any]) -> tuple[list[Array], list[Array]]:
    slices = [Held(x, value.path, held.sliced(value)) if whole else x
              for x, value, whole in zip(xs, values[last:], split)]
    results = ev.inside(params['jaxpr'], eqn, [*values[:first], *carry, *slices])
    return results[:len(carry)], results[len(carry):]

  carry, ys = lax.scan(step, carry, xs, params['length'], params['reverse'], params['unroll'])
  return [*carry, *ys]


STRUCTURES: dict[str, Callable[[Evaluation, Any, list[Any], Bind], list[Any]]] = {
  **dict.fromkeys(('jit', 'pjit', 'closed_call', 'core_call'), _entered),
  **dict.fromkeys(('checkpoint', 'remat', 'remat2'), _remat), 'custom_jvp_call': _custom_jvp,
  'custom_vjp_call': _custom_vjp, 'cond': _cond, 'while': _while, 'scan': _scan}
