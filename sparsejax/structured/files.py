"""Writes a cut model to a file, and makes a model of the file again, without the large parameters.

    save('small.safetensors', small)
    small = load('small.safetensors', model.apply)        # parameters, and the function that runs on them
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsejax import io
from sparsejax.arguments import checked
from sparsejax.structured.removal import Cut
from sparsejax.structured.smaller import large, smaller
from sparsejax.types import PyTree

_KEPT = 'kept_units'


@checked
def save(path: str | os.PathLike[str], small: Cut) -> None:
  """Writes the parameters of a `Cut`, and which positions of each axis are kept, to one safetensors file.

  The file holds no program. `io.load` reads the parameters alone.
  """
  kept = {name: [mask.shape, np.packbits(mask).tobytes().hex()] for name, mask in small.kept.items()}
  io.save(path, small.params, metadata={_KEPT: json.dumps(kept)})


@checked
def load(path: str | os.PathLike[str], apply: Callable[..., Any], like: PyTree | None = None) -> Cut:
  """Returns the `Cut` in a file that `save` wrote; `apply` is the function of the large model.

  Parameters are nested dicts and lists or, with `like`, have the structure of `like`: a tree of the small shapes. The
  function traces `apply` with the large shapes, and allocates nothing of them. Raises `ValueError` for another file.
  """
  text = io.metadata(path).get(_KEPT)
  if text is None:
    raise ValueError(f'structured.load: {os.fspath(path)!r} does not say what was kept of a larger model; '
                     'structured.save writes such files, and io.load reads this one.')
  kept = {name: _unpacked(shape, bits) for name, (shape, bits) in json.loads(text).items()}
  params = io.load(path, like)
  large(params, kept)
  return Cut(params, smaller(apply, kept), kept)


def _unpacked(shape: Sequence[int], bits: str) -> np.ndarray:
  flat = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=math.prod(shape))
  return flat.astype(bool).reshape(shape)
