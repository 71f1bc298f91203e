"""Puts packed parameters into the form in which their products run fastest here, for a number of tokens: `prepared`.

    params = prepared(io.load('model.safetensors'), tokens=1)        # before a loop that decodes token by token
    logits = packed(model.apply)({'params': params}, x)
    print(prepared(packed_params, tokens=1, explain=True))           # the form of each leaf, and why
    params = prepared(packed_params, tokens=1, measure=True)         # by measurements on this machine, not by a table

Without `measure` the choice is that of `sparsejax.advise`: both read the tables of measured products
(`sparsejax.advice`).
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kernels_pallas import measuring
from kernels_pallas.around import OPS
from sparsejax import advice, arguments, formats, tables, trees
from sparsejax.advice import measured
from sparsejax.arguments import checked
from sparsejax.formats import PackedArray
from sparsejax.formats.arrays import matrix_sizes
from sparsejax.types import Axes, PyTree

# Times dense. Two measurements of one product in one run were 1.10 and 0.84 (`benchmarks/results.md`, few_tokens), and
# an unpacked leaf costs no more than a dense one.
TAKEN = 1.2

# A `Known` gives the speed of a form of a leaf, or says why no speed is known.
Known = Callable[[PackedArray, PackedArray], measured.Speed] | str


class PreparedLeaf(NamedTuple):
  """A `PreparedLeaf` says of one packed leaf which form it takes, 'dense' or the name of a format, and why.

  `speed` is how many times as fast as dense the product in this form is expected to be; 1 for 'dense'.
  """

  path: str
  shape: tuple[int, ...]
  kind: str
  form: str
  speed: float
  why: str


class Preparation(tuple):
  """A `Preparation` holds the `PreparedLeaf`s of a tree, in the order of its leaves, and prints as a table."""

  def __str__(self) -> str:
    rows = [(leaf.path, 'x'.join(map(str, leaf.shape)), leaf.kind, leaf.form, f'{leaf.speed:.2f}', leaf.why)
            for leaf in self]
    return tables.aligned(('parameter', 'shape', 'format', 'prepared as', 'times as fast as dense', 'why'), rows,
                          rule=False)


@checked
def prepared(params: PyTree, *, tokens: int, device: str | None = None, measure: bool = False, explain: bool = False,
             folder: str | pathlib.Path = advice.TABLES) -> PyTree:
  """Returns `params` with each packed leaf in the form whose product with `tokens` rows runs fastest on `device`.

  A form is a format that stores the zeros of the leaf, or a dense array. A leaf is unpacked, once, where no format is
  measured to be a fifth faster. `tokens` is the number of rows that a weight multiplies in one call, at least 1.
  `device` names a table of measurements in `folder`, as for `sparsejax.advise`; `None` means the default device of
  JAX. Speeds are interpolated between measured shapes. Without a measurement near its shape, tokens and sparsity, a
  leaf becomes dense. Without a table of the device, every leaf stays as it is. Leaves that are not packed stay as
  they are.

  A table is of one machine, and another one may be faster by another form. With `measure=True` each form takes turns
  with the dense product on the default device of JAX, and no table is read. Leaves of one form and shape are measured
  once, one layer of a stack. A measurement takes as long as 75 calls of both products, and their compilation.

  With `explain=True` the function returns, instead of the tree, the `Preparation`: the form of each packed leaf, and
  why. A `formats.ActiveArray` stays as it is. Every form has the same values and the same products, up to the order of
  sums. A stored zero may be dropped, so train before leaves are prepared. Raises `ValueError` if `tokens` is below 1,
  for a leaf that is traced, or for `measure` together with a `device` or a `folder`.
  """
  tokens = arguments.verified('prepared', 'tokens', tokens)
  if measure and (device is not None or folder != advice.TABLES):
    raise ValueError('prepared: measure=True measures on the default device of JAX and reads no table. Leave `device` '
                     'and `folder` out, or `measure`.')
  known = _measurements(tokens) if measure else _table(tokens, device or _default_device(folder), folder)
  names, leaves, treedef = trees.flatten(params, is_leaf=formats.is_packed)
  once: dict[int, tuple[Any, PreparedLeaf]] = {}  # A leaf in several places is prepared once.
  found = []
  for name, leaf in zip(names, leaves):
    if formats.is_packed(leaf) and id(leaf) not in once:
      once[id(leaf)] = _prepared(name, leaf, known)
    form, row = once.get(id(leaf), (leaf, None))
    found.append((form, row and row._replace(path=name)))
  if explain:
    return Preparation(row for _, row in found if row)
  return treedef.unflatten([form for form, _ in found])


def _default_device(folder: str | pathlib.Path) -> str:
  """Returns the name of the table for the default device, or the name of its platform if there is no such table."""
  device = jax.devices()[0]
  known = [path.stem for path in pathlib.Path(folder).glob('*.json')]
  return next((name for name in known if name in device.device_kind.lower()), device.platform)


def _prepared(name: str, leaf: PackedArray, known: Known) -> tuple[Any, PreparedLeaf]:
  """Returns the leaf in its fastest form, and why."""
  if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(leaf)):
    raise ValueError(f'prepared: {name!r} of shape {leaf.shape} is traced; prepare parameters outside of jit, vmap and '
                     'grad.')
  row = PreparedLeaf(name, leaf.shape, leaf.kind, leaf.kind, 1.0, '')
  if isinstance(leaf, formats.ActiveArray):
    return leaf, row._replace(why='it has thresholds, which no other form keeps')
  if isinstance(known, str):
    return leaf, row._replace(why=known)
  best, slower = (None, row), []
  for form in _forms(leaf):
    speed = known(form, leaf)
    if speed.forward is None or speed.forward < TAKEN:
      slower.append(f'{form.kind}: {speed.note}' if speed.forward is None else f'{form.kind}: {speed.forward:.2f}')
    elif best[0] is None or speed.forward > best[1].speed:
      best = form, row._replace(form=form.kind, speed=speed.forward, why=speed.note)
  if best[0] is None:
    return leaf.to_dense(), row._replace(form='dense', why='; '.join(slower) or 'no format has a product')
  return best


def _forms(leaf: PackedArray) -> list[PackedArray]:
  """Returns the leaf in each format that stores its zeros and has a product, if the leaf is a matrix or a stack."""
  axes = _roles(leaf)
  if axes is None or axes.source == 'unknown' or any(leaf.shape[a] > 1 for a in axes.spatial):
    return []
  others = [each for each in formats.fitting(leaf.pattern) if each is not type(leaf)] if leaf.pattern else []
  forms = []
  for each in (type(leaf), *others):
    try:
      if each.kind in OPS:
        forms.append(leaf if each is type(leaf) else formats.with_axes(
            each.from_pattern(leaf.to_dense(), leaf.pattern, axes), formats.axes_of(leaf)))
    except formats.Misfit:  # The leaf cannot be stored in this format.
      continue
  return forms


def _roles(leaf: PackedArray) -> Axes | None:
  """Returns the axes of a leaf; those of a leaf without roles, as far as its format knows them."""
  if axes := formats.axes_of(leaf):
    return axes
  contracted = tuple(a + leaf.ndim for a in leaf.axes)
  layer = tuple(range(leaf.leading))
  outputs = tuple(a for a in range(leaf.ndim) if a not in (*contracted, *layer))
  return Axes(contracted, outputs, layer=layer) if contracted else None


def _table(tokens: int, device: str, folder: str | pathlib.Path) -> Known:
  """Returns what the table of `device` says of the product with a form, whose stored weights count, fillers too."""
  table = measured.read_table(device, folder)
  near = measured.near_tokens(table, tokens)

  def speed(form: PackedArray, leaf: PackedArray) -> measured.Speed:
    sparsity = max(0.0, 1 - form.values.size / max(math.prod(form.shape), 1))
    group = leaf.pattern.group if leaf.pattern else (1, 1)
    if not near:
      return measured.Speed(note=f'not measured near {tokens} tokens')
    shape = matrix_sizes(form.shape, _roles(leaf))[1:]
    return measured.speed(near, (form.product,), group, shape, tokens, sparsity)

  return speed if table else f'nothing was measured on {device}'


def _measurements(tokens: int) -> Known:
  """Returns what is measured now of the product with a form; forms that differ in their numbers alone share it."""
  once: dict[Any, measured.Speed] = {}

  def speed(form: PackedArray, leaf: PackedArray) -> measured.Speed:
    leaves, structure = jax.tree.flatten(form)
    kind = structure, *((a.shape, a.dtype) for a in leaves)
    if kind not in once:
      once[kind] = measuring.speed(form, tokens)
    return once[kind]

  return speed
