"""Compares a cut model with the masked one on given inputs.

    print(prove(found, params, small, x))           # largest difference 1.2e-07, at most 3.1e-05
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.programs import jaxprs
from sparsejax.programs.tracing import trace
from sparsejax.structured.groups import Groups
from sparsejax.structured.removal import Cut
from sparsejax.structured.smaller import Kept
from sparsejax.types import PyTree


class Proof(NamedTuple):
  """A `Proof` holds the largest difference between the results of a masked and of a cut model, and the bound."""

  difference: float
  bound: float

  @property
  def holds(self) -> bool:
    """Whether the difference is within the bound; a NaN is not."""
    return self.difference <= self.bound

  def __str__(self) -> str:
    return f'largest difference {self.difference:.2g}, at most {self.bound:.2g}'


@checked
def prove(groups: Groups, params: PyTree, small: Cut, *inputs: Any, exact: bool = False) -> Proof:
  """Returns how far `small` is from `groups.apply` with zeros in the removed positions of `params`.

  The difference may be at most `32 eps sqrt(K) max|y|`: `K` is the longest sum in a product of the program, and `y`
  the masked model's result. `eps` is that of the coarsest dtype of parameters and results. Both models sum the same
  numbers in another order. `exact=True` asks for equal bits instead, which 16-bit floats never promise.

  Raises `ValueError` if the bound does not hold, which is a defect of this library. Raises `ValueError` for parameters
  of another structure than those of the cut, and for `exact=True` with 16-bit floats.
  """
  masked = _masked(params, small.kept)
  large, cut = jax.tree.leaves(groups.apply(masked, *inputs)), jax.tree.leaves(small.apply(small.params, *inputs))
  if len(large) != len(cut):
    raise ValueError(f'structured.prove: the models give {len(large)} and {len(cut)} arrays; `small` is the cut of '
                     'another model than `groups`.')
  eps = max((_eps(leaf) for leaf in (*large, *jax.tree.leaves(params))), default=0.0)
  if exact and eps > 1e-6:
    raise ValueError('structured.prove: `exact` asks for equal bits, but 16-bit floats round sums of another order '
                     'otherwise; leave `exact` out, or compare float32.')
  longest = max(_sums(trace(groups.apply, (params, *inputs))), default=1)
  tolerance = 0.0 if exact else 32 * eps * math.sqrt(longest)
  proofs = [_compared(a, b, tolerance) for a, b in zip(large, cut, strict=True)]
  worst = max(proofs, key=lambda proof: (not proof.holds, proof.difference), default=Proof(0.0, 0.0))
  if not worst.holds:
    raise ValueError(f'structured.prove: the smaller model computes something else: {worst}. Please report the model; '
                     'until then, do not use this cut.')
  return worst


def _masked(params: PyTree, kept: Kept) -> PyTree:
  """Returns the parameters with zeros at the positions that are not kept."""
  paths, leaves, treedef = trees.flatten(params)
  found = dict(zip(paths, leaves))
  for name, own in kept.items():
    path, _, axis = name.rpartition(':')
    if path not in found:
      raise errors.unknown('structured.prove', 'parameter of the cut', path, found)
    w = found[path]
    if (sizes := jnp.shape(w)[int(axis):int(axis) + 1]) != own.shape[-1:]:
      raise ValueError(f'structured.prove: the cut was made of {own.shape[-1]} positions along axis {axis} of '
                       f'{path!r}, and `params` has {sizes[0] if sizes else "none"}. Give what was cut.')
    shape = [n if a == int(axis) or a == 0 and own.ndim == 2 else 1 for a, n in enumerate(w.shape)]
    found[path] = jnp.where(own.reshape(shape), w, jnp.zeros((), w.dtype))
  return treedef.unflatten(list(found.values()))


def _eps(leaf: Any) -> float:
  dtype = getattr(leaf, 'dtype', np.dtype(bool))
  return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _compared(a: Any, b: Any, tolerance: float) -> Proof:
  if jnp.shape(a) != jnp.shape(b):
    raise ValueError(f'structured.prove: the results have the shapes {jnp.shape(a)} and {jnp.shape(b)}.')
  a, b = (np.asarray(x, np.float64 if not jnp.iscomplexobj(x) else np.complex128) for x in (a, b))
  same = np.array_equal(a, b, equal_nan=True)
  difference = 0.0 if same else float(np.max(np.abs(a - b), initial=0.0))
  return Proof(difference, tolerance * float(np.max(np.nan_to_num(np.abs(a), posinf=0.0), initial=0.0)))


def _sums(program: Any) -> Iterator[int]:
  """Yields the length of the sum of each product in a program."""
  for _, eqn in jaxprs.equations(program):
    if eqn.primitive.name in jaxprs.CONTRACTIONS:
      macs = jaxprs.CONTRACTIONS[eqn.primitive.name](eqn).macs
      yield max(1, macs // max(1, math.prod(eqn.outvars[0].aval.shape)))
