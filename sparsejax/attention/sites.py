"""Finds attention in the program of any function, and gives it another answer: `attended`.

    def dense(site):
      return None                                     # the program's own result

    run = attended(model.apply, lambda site: print(site) or dense(site))
    y = run(variables, x)                             # the result of `model.apply`, after one line for each attention
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.arguments import checked
from sparsejax.attention.edits import HIDDEN, ScoreEdit, edited, weighed
from sparsejax.attention.layout import AttentionLayout, keys_of, layout, value_dims
from sparsejax.attention.looking import Looks, looks
from sparsejax.attention.pending import STAND_INS, Edited, Known, Masks, Pair, Pending, as_array, own_axes
from sparsejax.attention.steps import STEPS, known, mask
from sparsejax.programs import Enter, Operation, ValueRules, evaluate, jaxprs, trace
from sparsejax.programs.evaluate import inside
from sparsejax.programs.structures import KEPT
from sparsejax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSite:
  """An `AttentionSite` is one attention of a program, with its operands as the program multiplies them.

  `q` is `[batch, Tq, heads, d]`, `k` and `v` are `[batch, Tk, kv_heads, d]`; neighbouring heads of `q` share a head of
  `k`. Scores are `scale` times the products, then changed by `edits`. `causal`: query i sees keys from 0 to i, and no
  edit says so. `masks` are the masks that are known at trace time, `bool[1, 1 or heads, 1 or Tq, 1 or Tk]`; `edits`
  has them too. `scope` and `place` tell where the program has it, and `address` names the product with the values.
  `enclosed`: a loop or another structure is around it, and its arrays may not leave the structure.
  """

  q: Array
  k: Array
  v: Array
  scale: float
  causal: bool
  edits: tuple[ScoreEdit, ...]
  masks: tuple[np.ndarray, ...]
  scope: str
  place: str
  address: jaxprs.Address
  enclosed: bool = False

  @property
  def heads(self) -> int:
    return self.q.shape[2]

  @property
  def traced_masks(self) -> bool:
    """Whether a mask or a bias may hide keys, and is not known at trace time."""
    return sum(edit.kind in ('mask', 'add') for edit in self.edits) > len(self.masks)

  def blocks(self, block_q: int, block_k: int) -> np.ndarray:
    """Returns which blocks have a key that a query may see, by `causal` and `masks`: `bool[1 or heads, nq, nk]`."""
    return np.any(self.blocks_of_queries(block_q, block_k), 2)

  def blocks_of_queries(self, block_q: int, block_k: int) -> np.ndarray:
    """Returns which blocks have a key that each query may see: `bool[1 or heads, nq, block_q, nk]`."""
    seen: Any = np.ones((1, 1, self.q.shape[1], self.k.shape[1]), bool)
    for part in self.masks:
      seen = seen & part
    seen = np.tril(seen[0]) if self.causal else seen[0]
    tall, wide = (-seen.shape[i] % block for i, block in ((1, block_q), (2, block_k)))
    seen = np.pad(seen, ((0, 0), (0, tall), (0, wide)))
    return np.asarray(seen.reshape(len(seen), seen.shape[1] // block_q, block_q, -1, block_k).any(4))

  @property
  def offset(self) -> int | None:
    """The key at which query 0 stands: 0 if causal or of equal lengths, otherwise read from a known mask, or `None`.

    The last key that a query may see is then its own.
    """
    if self.causal or self.q.shape[1] == self.k.shape[1]:
      return 0
    for hidden in self.masks:
      if hidden.shape[1:3] == (1, self.q.shape[1]) and hidden.shape[3] == self.k.shape[1] and hidden.any(-1).all():
        begins = hidden.shape[3] - 1 - hidden[0, 0, :, ::-1].argmax(-1) - np.arange(self.q.shape[1])
        if (begins == begins[0]).all():
          return int(begins[0])
    return None

  @property
  def name(self) -> str:
    """A name by which gates, choices and masks of this attention are kept: the address as a text."""
    return '.'.join(map(str, self.address))

  def own(self, function: str, what: str, by_name: Mapping[str, Any]) -> Any:
    """Returns the entry of this attention in `by_name`; `what` says in a refusal what the entries are."""
    if self.name not in by_name:
      raise ValueError(f'{function}: {self.place} has no {what} {self.name!r}; those that are given are for '
                       f'{sorted(by_name)}. Names are those of one program: find them anew for another one.')
    return by_name[self.name]

  def refused(self, function: str, problem: str) -> ValueError:
    """Returns the error of a number or an array that does not fit this attention, with its place and lengths."""
    return ValueError(f'{function}: {self.place}, with queries {self.q.shape} and keys {self.k.shape}: {problem}')

  def stopped(self) -> 'AttentionSite':
    """Returns the site without gradients to queries, keys and values."""
    return dataclasses.replace(self, **{name: jax.lax.stop_gradient(getattr(self, name)) for name in 'qkv'})

  def scores(self) -> Array:
    """Returns the scores of all queries and keys after `scale`, before masks and edits: `[batch, heads, Tq, Tk]`."""
    k = jnp.repeat(self.k, self.q.shape[2] // self.k.shape[2], 2)
    return jnp.einsum('bqhd,bkhd->bhqk', self.q, k, preferred_element_type='float32') * self.scale

  def weights(self, seen: Array | None = None) -> Array:
    """Returns the weights of the whole attention, `float32[batch, heads, Tq, Tk]`, or of the keys of `seen` alone.

    A query that sees no key has its own key.
    """
    scores = self.scores()
    allowed = jnp.ones(scores.shape, bool) if seen is None else jnp.broadcast_to(seen, scores.shape)
    allowed = jnp.tril(allowed) if self.causal else allowed
    scores, left = edited(scores, allowed, self.edits)
    own = np.arange(scores.shape[3])[None] == np.minimum(np.arange(scores.shape[2]), scores.shape[3] - 1)[:, None]
    left = left | (~left.any(-1, keepdims=True) & own[None, None])
    return weighed(jax.nn.softmax(jnp.where(left, scores, -jnp.inf)), self.edits)

  def attend(self, seen: Array | None = None) -> Array:
    """Returns the attention of the site in plain JAX, `[batch, Tq, heads, dv]`, or to the keys of `seen` alone.

    `seen` broadcasts to `bool[batch, heads, Tq, Tk]`. All scores are computed.
    """
    v = jnp.repeat(self.v, self.q.shape[2] // self.v.shape[2], 2)
    return jnp.einsum('bhqk,bkhd->bqhd', self.weights(seen).astype(v.dtype), v)


@dataclasses.dataclass(frozen=True)
class UnreadAttention:
  """An `UnreadAttention` is a product that looks like attention and stays dense: where, its shape, and why."""

  scope: str
  place: str
  shape: tuple[int, ...]
  why: str

WORDS = {'largest': 'largest scores', 'shifted': 'scores', 'exps': 'exponentials', 'total': 'sums', 'inverse': 'sums',
         'scores': 'scores', 'weights': 'weights'}  # stages, for reports
Answer = Callable[[AttentionSite], Array | None]

@checked
def attended(apply: Callable[..., Any], answer: Answer, unread: Callable[[UnreadAttention], Any] = lambda row: None
             ) -> Callable[..., Any]:
  """Returns a function like `apply` that calls `answer(site)` at each softmax attention of its program.

  If `answer` returns `[batch, Tq, heads, dv]`, it replaces the attention; `None` leaves the attention dense. All that
  looks like attention and cannot be read stays dense too: `unread` is called with an `UnreadAttention` for each, with
  the reason. The attention may be inside of `jit`, `vmap`, `scan`, `while`, `cond` and `remat`. Every call traces
  `apply`, so put it under `jit`. In a loop, one site stands for all rounds.

  A softmax is read if it divides exponentials by their sum over the keys. The scores may be scaled, and changed
  elementwise by bias, masks and `tanh`, in any order. The weights may be multiplied, as dropout does.
  """
  @functools.wraps(apply)
  def call(*args: Any, **kwargs: Any) -> Any:
    program = trace(apply, args, kwargs)
    reader = AttentionReader(looks(program), answer)
    results = evaluate(program, program.arrays, reader.rules())
    results = [reader.result(result) for result in results]
    for row in reader.unread():
      unread(row)
    return program.unflatten(results)

  return call

@dataclasses.dataclass
class AttentionReader:
  """An `AttentionReader` holds the rules that read attention in one program.

  `replaced` holds the addresses of second products with an answer. `broken` maps the address of a first product to the
  operation that made its scores dense.
  """

  looks: Looks
  answer: Answer
  replaced: set[jaxprs.Address] = dataclasses.field(default_factory=set)
  broken: dict[jaxprs.Address, str] = dataclasses.field(default_factory=dict)

  def rules(self) -> ValueRules:
    return ValueRules(self.operation, dense=lambda eqn, value, why: self._dense(eqn, value), unstacked=_unstacked)

  def operation(self, eqn: Any, values: list[Any], here: Operation) -> Any:
    """Returns the outcome of an operation, `None` for those that have nothing to do with attention."""
    name, compute = eqn.primitive.name, lambda: here.dense([as_array(v) for v in values])[0]
    if name == 'dot_general':
      return self._product(eqn, values, here, compute)
    if name in KEPT:
      return self._structure(eqn, values, here)
    pending = [i for i, value in enumerate(values) if isinstance(value, Pending)]
    if pending:
      step = STEPS.get(name)
      new = step(eqn, values, pending[0], compute) if step else None
      return None if new is None else [new]
    constant = mask(eqn, values) or known(eqn, values, here.dense)
    return None if constant is None else [constant]

  def result(self, value: Any) -> Any:
    """Returns the array of a result of the program; scores among the results are noted."""
    if isinstance(value, Pending):
      self.broken.setdefault(value.pair.address, f'its {WORDS[value.stage]} are a result of the program')
    return as_array(value)

  def _dense(self, eqn: Any, value: Any) -> Any:
    """Returns the array of a value; scores that an operation makes dense are noted with the operation."""
    if isinstance(value, Pending):
      self.broken.setdefault(value.pair.address, f'its {WORDS[value.stage]} go through {jaxprs.place(eqn)}')
    return as_array(value)

  def _structure(self, eqn: Any, values: list[Any], here: Operation) -> Any:
    """Enters a softmax that has a derivative rule of its own, and hands all other structures arrays."""
    if eqn.primitive.name == 'custom_jvp_call' and any(isinstance(v, Pending) for v in values):
      names = {inner.primitive.name for _, inner in jaxprs.equations(jaxprs.body(eqn))}
      if {'exp', 'reduce_sum', 'div'} <= names:
        return Enter(jaxprs.body(eqn), values, lambda results: results)
    closed = eqn.primitive.name in ('custom_vjp_call', 'custom_jvp_call', 'shard_map')
    given = [v if isinstance(v, Known) and not closed else self._dense(eqn, v) for v in values]
    return here.dense(given) if closed else inside(eqn, given, self.rules(), here)

  def _product(self, eqn: Any, values: list[Any], here: Operation, compute: Callable[[], Array]) -> list[Any]:
    side = next((i for i, v in enumerate(values[:2]) if isinstance(v, Pending)), None)
    if side is not None:
      return self._second(eqn, values, here, side)
    values = [as_array(v) for v in values]
    if here.address not in self.looks.firsts:
      return here.dense(values)
    pair = Pair(here.address, eqn, tuple(values))
    return [Pending('scores', pair, own_axes(pair.shape), lambda: here.dense(values)[0])]

  def _second(self, eqn: Any, values: list[Any], here: Operation, side: int) -> list[Any]:
    """Returns the answer in place of the product of weights and values, or the product itself, with the reason."""
    weights, other = values[side], values[1 - side]
    result = self._answered(eqn, weights, self._dense(eqn, other), side, here.address)
    if isinstance(result, str):
      self.broken.setdefault(weights.pair.address, result)
      return here.dense([as_array(v) for v in values])
    self.replaced.add(here.address)
    return [result] if result is not None else here.dense([as_array(v) for v in values])

  def _answered(self, eqn: Any, weights: Pending, v: Array, side: int, address: jaxprs.Address) -> Array | str | None:
    if weights.stage != 'weights':
      return f'its {WORDS[weights.stage]} meet the values before they are divided by their sum'
    keys = self.looks.parameters(weights.pair.address)[keys_of(weights)]
    if keys and self.looks.parameters(address)[1 - side]:
      return 'its keys and values are parameters'
    found = layout(weights)
    if isinstance(found, str):
      return found
    if any(jaxprs.product_options(each)[1] is not None for each in (eqn, weights.pair.eqn)):
      return 'a product asks for an out_sharding'
    dims = value_dims(weights, eqn, side, found)
    if isinstance(dims, str):
      return dims
    site = _site(found, weights, found.values(v, dims[0]), eqn, address)
    y = self.answer(dataclasses.replace(site, enclosed=self.looks.inside(address)))
    if y is None:
      return None
    wanted = (*site.q.shape[:3], site.v.shape[3])
    if getattr(y, 'shape', None) != wanted:
      raise site.refused('attention.attended', f'the answer is no array {wanted}, but a {type(y).__name__} '
                         f'{getattr(y, "shape", "")}.')
    free = [n for dim in dims[0] for n in [f.size for f in dim if f.axes[0] >= len(found.pair.shape)]]
    return found.result(y, dims[1], tuple(free)).astype(eqn.outvars[0].aval.dtype).reshape(eqn.outvars[0].aval.shape)

  def unread(self) -> list[UnreadAttention]:
    """Returns a row for all that looks like attention and got no answer."""
    rows = []
    for address, why in self.looks.opaque.items():
      rows.append(self._row(address, why))
    for address, firsts in self.looks.seconds.items():
      broken = next((self.broken[a] for a in sorted(firsts) if a in self.broken), '')
      if address not in self.replaced:
        rows.append(self._row(address, self.looks.enclosing(address) or broken or 'its scores are another product\'s'))
      elif broken:
        rows.append(self._row(address, f'it is replaced, and computed densely too, because {broken}'))
    return rows

  def _row(self, address: jaxprs.Address, why: str) -> UnreadAttention:
    eqn = self.looks.eqns[address]
    return UnreadAttention(jaxprs.scope_of(eqn), jaxprs.place(eqn), eqn.outvars[0].aval.shape, why)

def _unstacked(value: Any) -> Any:
  """Returns a stack that a scan slices as it is; a stand-in is no array."""
  return 'a scan slices it' if isinstance(value, STAND_INS) else (value, lambda slices: slices)


def _site(found: AttentionLayout, weights: Pending, v: Array, eqn: Any, address: jaxprs.Address) -> AttentionSite:
  """Returns the site, with masks that are a causal mask taken out of the edits."""
  edits: list[ScoreEdit] = []
  masks: list[np.ndarray] = []
  causal = False
  for edit in weights.edits:
    for part in _parts(edit):
      constant = _known_mask(found, edit, part)
      if constant is not None and _is_causal(constant):
        causal = True
      elif constant is None or not constant.all():
        array: Any = None if part is None else found.edit(as_array(part), edit.dims)
        array = array if constant is None else array[tuple(slice(n) for n in constant.shape)]
        edits.append(ScoreEdit(edit.kind, array))
        masks += [constant] if constant is not None and constant.shape[0] == 1 else []
  q, k = found.operand(1 - found.side), found.operand(found.side)
  return AttentionSite(q, k, v, weights.scale, causal, tuple(edits), tuple(masks), jaxprs.scope_of(eqn),
                       jaxprs.place(eqn), address)

def _parts(edit: Edited) -> tuple[Any, ...]:
  return edit.array.parts if isinstance(edit.array, Masks) else (edit.array,)

def _known_mask(found: AttentionLayout, edit: Edited, part: Any) -> np.ndarray | None:
  """Returns a mask or an added mask that is known at trace time, as `bool[examples, heads, Tq, Tk]`, or `None`."""
  if not isinstance(part, Known) or edit.kind not in ('mask', 'add'):
    return None
  array = part.concrete()
  array = array if edit.kind == 'mask' else array > HIDDEN
  if edit.kind == 'add' and (part.concrete()[array] != 0).any():
    return None
  whole = found.edit(array, edit.dims) if array.ndim else np.ones((1, 1, 1, 1), bool)
  for axis in range(4):
    first = whole.take([0], axis)
    whole = first if (whole == first).all() else whole
  return whole

def _is_causal(constant: np.ndarray) -> bool:
  """Returns whether a mask lets each query see the keys from 0 to its own place, in all examples and heads."""
  plain = constant.shape[:2] == (1, 1) and constant.shape[2] > 1 and constant.shape[3] > 1
  return plain and bool((constant == np.tril(np.ones(constant.shape, bool))).all())
