"""Compares packing and unpacking of 4096 x 4096 float32 weights with a copy of the dense weight on this CPU."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks import bandwidth, timing
from benchmarks.timing import Measurement
from sparsejax import formats
from sparsejax.types import Axes

SHAPE, AXES = (4096, 4096), Axes((0,), (1,))
# By format and pattern: at most so many times the copy. A copy of 9.6 GB/s and 2 GB/s are 4.8.
BARS = {('nm', 'pack'): 4.8, ('nm', 'unpack'): 4.8, ('bitmask', 'pack'): 4.8, ('bitmask', 'unpack'): 4.8}
PATTERNS = {'nm': sj.NM(2, 4), 'bitmask': sj.Unstructured()}


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields the claims; every packed array has to unpack to the weight bit for bit."""
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.standard_normal(SHAPE, np.float32))
  given = {'nm': jnp.where(sj.NM(2, 4)(jnp.abs(w)), w, 0),
           'bitmask': jnp.where(jnp.asarray(rng.random(SHAPE, np.float32)) < 0.9, 0, w)}
  contestants = {'copy': bandwidth.copying(w)}
  for kind, dense in given.items():
    pack = lambda dense=dense, kind=kind: formats.TABLE[kind].from_pattern(dense, PATTERNS[kind], AXES)
    packed = pack()
    if not np.array_equal(packed.to_dense(), dense):
      raise AssertionError(f'packing: {kind} does not unpack to what was packed.')
    contestants |= {f'{kind}, pack': pack, f'{kind}, unpack': packed.to_dense}
  seconds = list(timing.take_turns(contestants, rounds))
  for (kind, way), bar in BARS.items():
    yield timing.claim(f'{kind}, {way}: times as long as a copy', seconds, f'{kind}, {way}', 'copy', bar, False)
