"""Says how much of a hardware array each product of a model fills: the utilisation of DRACO (Jha et al. 2020).

    found = utilization(model.apply, params, x, array=(128, 128))
    found['Dense_0/kernel']          # 0.43: a product of 100 by 70 takes four tiles of 64 by 64
"""

from collections.abc import Callable, Mapping
from typing import Any

from sparsejax.arguments import checked
from sparsejax.programs import jaxprs
from sparsejax.programs.arrangements import arrangement_of
from sparsejax.programs.contractions import read
from sparsejax.programs.tracing import trace
from sparsejax.types import PyTree


@checked
def tile_share(inputs: int, outputs: int, array: tuple[int, int] = (128, 128)) -> float:
  """Returns the part of the array that a product of this size fills in its steps: m n over whole tiles."""
  high, wide = array
  return inputs * outputs / (-(-inputs // high) * high * -(-outputs // wide) * wide)


@checked
def utilization(apply: Callable[..., Any], params: PyTree, *inputs: Any, array: tuple[int, int] = (128, 128)
                ) -> Mapping[str, float]:
  """Returns the part of an array of multipliers that each parameter's product fills, the first use of each parameter.

  Groups of a convolution are products of their own, so that a depthwise convolution fills nearly nothing. Widths that
  are multiples of the array fill it: `multiple_of=` of the structured recipes. A parameter that is no plain matrix of
  its product is left out.
  """
  program = trace(apply, (params, *inputs))
  found, equations = read(program), dict(jaxprs.equations(program))
  made: dict[str, float] = {}
  for path, uses in found.uses.items():
    own = arrangement_of(uses[0], equations[uses[0].address], found.shapes[path])
    if not isinstance(own, str):
      _, outputs, width = own.shape
      made[path] = tile_share(width, outputs, array)
  return made
