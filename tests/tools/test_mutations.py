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
SECONDS = 4.0  # of the processor, for one call: ten times what a call takes on a busy machine
BYTES = 64 << 20, 64  # beyond the program, and for each byte of the files


@pytest.fixture(scope='module', autouse=True)
def whole(tmp_path_factory):
  """Returns the tree of all files. Reads it once, so that no measured call compiles the checks of its packed leaves."""
  path = tmp_path_factory.mktemp('whole') / 'f'
  path.write_bytes(mutations.saved())
  io.load(path)
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


def first(entries, path):
  return next(entry for entry in entries if entry['path'].endswith(path))


FORGED = {  # the claims that once took gigabytes or minutes, with correct digests
    'block rows far outside': lambda leaves, tensors: tensors['layers/0/blocks.rows'].fill(10**8),
    'a long list': lambda leaves, tensors: first(leaves, 'step').update(keys=[['list', 10**9]]),
    'a deep path': lambda leaves, tensors: first(leaves, 'step').update(keys=[['dict', 'a']] * 50_000),
    'gaps for many weights': lambda leaves, tensors: first(leaves, 'gaps').update(shape=[2**31, 2]),
    'columns without values': lambda leaves, tensors: first(leaves, 'csc').update(shape=[8, 2**26]),
    'blocks of a wide matrix': lambda leaves, tensors: first(leaves, 'blocks').update(shape=[8, 2**26]),
    'bits of many weights': lambda leaves, tensors: first(leaves, 'bits').update(shape=[2**40, 2**40]),
    'groups of a half': lambda leaves, tensors: first(leaves, 'nm').update(m=4.0),
}


@pytest.mark.parametrize('name', FORGED)
def test_a_forged_claim_costs_nothing(name, tmp_path):
  path = tmp_path / 'f'
  path.write_bytes(mutations.saved())
  about, tensors = mutations.contents(path)
  FORGED[name](about['leaves'], tensors)
  mutations.write_own(path, about['leaves'], tensors)
  tracemalloc.start()
  try:
    assert tried(io.load, path, tmp_path) is None
    assert tried(io.read, path, tmp_path) is None
  finally:
    tracemalloc.stop()
