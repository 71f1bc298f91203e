"""Tests that a damaged or forged checkpoint is refused by its name, at a cost like its size, or is read soundly.

The cases are numbered, and a fixed sample of them runs. `--cells all` runs `ALL` of them.
"""

import shutil
import time
import tracemalloc

import jax
import mutations
import numpy as np
import pytest
from raw import same

from sparsejax import io

FEW, ALL = 160, 4000
SECONDS = 2.0  # of the processor, for one call; most of them are a compilation of a check
BYTES = 64 << 20, 64  # beyond the program, and for each byte of the files


@pytest.fixture(scope='module')
def whole():
  return jax.tree.map(np.asarray, mutations.tree())


def tried(call, path, folder):
  """Returns what `call` returns, or `None` if it refuses `path`; tests the cost, and that the refusal has the name."""
  size = sum(part.stat().st_size for part in folder.iterdir())
  tracemalloc.reset_peak()
  before, start = tracemalloc.get_traced_memory()[0], time.process_time()
  try:
    return call(path)
  except (ValueError, OSError) as refusal:
    assert str(folder) in str(refusal) and len(str(refusal)) < 10_000
    return None
  finally:
    assert time.process_time() - start < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < BYTES[0] + BYTES[1] * size


def test_a_mutated_checkpoint_is_refused_by_name_or_read_soundly(tmp_path, whole, pytestconfig):
  """Tests that whatever is read can be written and read again, and that no damage is read as anything else."""
  tracemalloc.start()
  try:
    for seed in range(ALL if pytestconfig.getoption('--cells') == 'all' else FEW):
      folder = tmp_path / 'mutated'
      folder.mkdir()
      name, path = mutations.mutated(folder, seed)
      print(name)  # pytest shows the last name if the test fails
      back = tried(io.read, path, folder)
      tried(io.metadata, path, folder)
      if back is not None:
        assert 'damage' not in name or same(back, whole)
        io.save(tmp_path / 'again', back)
        assert same(io.load(tmp_path / 'again'), back)
      shutil.rmtree(folder)
  finally:
    tracemalloc.stop()
