"""Arrays that are packed on the host by pieces, on several threads, are the arrays that one piece gives."""

import jax
import numpy as np
import pytest
from raw import anything, bits

from sparsejax.formats import BitmaskArray, arrays, pieces


@pytest.fixture
def small(monkeypatch):
  """Divides a hundred entries: into pieces of eight, and among three threads."""
  monkeypatch.setattr(pieces, '_PIECE', 8)
  monkeypatch.setattr(pieces, '_ALONE', 16)
  monkeypatch.setattr(pieces.os, 'cpu_count', lambda: 3)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool'])
@pytest.mark.parametrize('signed_zeros', [False, True])
@pytest.mark.parametrize('size', [0, 1, 7, 8, 16, 17, 49, 100])
def test_pieces_make_the_whole(small, size, dtype, signed_zeros):
  flat = np.asarray(anything((size,), dtype))
  kept = arrays.stored_entries(flat, None, signed_zeros)
  values, mask = pieces.compacted(flat, signed_zeros)
  np.testing.assert_array_equal(bits(values), bits(flat[kept]))
  np.testing.assert_array_equal(mask, np.packbits(kept, bitorder='little'))
  expected = np.where(kept, bits(flat), bits(np.zeros_like(flat)))
  np.testing.assert_array_equal(bits(pieces.spread(values, mask, size)), expected)


@pytest.mark.parametrize('share', [0.0, 0.05, 0.08, 0.1, 0.5, 1.0])
def test_places_are_those_of_the_kept_entries(share):
  kept = np.random.default_rng(0).permutation(1000) < 1000 * share
  np.testing.assert_array_equal(pieces._places(kept), [i for i, each in enumerate(kept) if each])


def test_shares_are_whole_pieces_and_cover_every_entry_once(small):
  for size in (0, 5, 16, 24, 25, 1000):
    shares = pieces._shares(size)
    assert [i for share in shares for i in share] == list(range(size)) and len(shares) <= 3
    assert all(share.start % 8 == 0 for share in shares)


def test_the_host_unpacks_what_a_program_unpacks_and_where_the_values_are(small):
  w = np.where(np.arange(96).reshape(8, 12) % 5, 0, np.arange(96, dtype=np.float32).reshape(8, 12))
  for device in jax.devices()[:2]:
    packed = jax.device_put(BitmaskArray.from_dense(w), device)
    assert pieces.on_host(packed.values, packed.mask)
    dense = packed.to_dense()
    assert dense.devices() == {device} and dense.committed
    np.testing.assert_array_equal(dense, w)
    np.testing.assert_array_equal(jax.jit(BitmaskArray.to_dense)(packed), w)
  traced = []
  jax.eval_shape(lambda packed: traced.append(pieces.on_host(packed.values, packed.mask)), packed)
  assert traced == [False]


def test_memory_is_taken_over_by_jax_without_a_copy():
  memory = pieces.empty(1000, np.float32)
  assert pieces.as_array(memory, memory).unsafe_buffer_pointer() == memory.ctypes.data
