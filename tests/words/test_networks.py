"""Tests of masks in groups of some dozens: the network gives the bits of counting, and its comparators sort."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import networks, ranking
from tests.words.test_ranking import awkward


@pytest.mark.parametrize('size', range(1, 11))
def test_the_comparators_sort_every_row_of_zeros_and_ones(size):
  """A network that sorts all rows of zeros and ones sorts all rows (Knuth, 5.3.4 Z)."""
  rows = np.array(list(itertools.product((0, 1), repeat=size)))
  for i, j in networks.comparators(size):
    rows[:, i], rows[:, j] = np.maximum(rows[:, i], rows[:, j]), np.minimum(rows[:, i], rows[:, j])
  assert (np.diff(rows, axis=1) <= 0).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize('m, n, dtype', [(17, 8, jnp.float32), (32, 1, jnp.bfloat16), (32, 31, jnp.float32)])
def test_a_network_keeps_the_entries_that_counting_keeps(m, n, dtype, monkeypatch):
  """With a traced `n`, entries are counted. Scores have ties, NaN, infinities and both zeros."""
  monkeypatch.setattr('sparsejax.wholes.one_cpu', lambda: True)  # tests have eight devices, and an array has one
  scores = awkward((2 * m, 6), seed=m).astype(dtype)
  found = ranking.top_n_in_groups(scores, n, m, 0)
  np.testing.assert_array_equal(found, ranking.top_n_in_groups(scores, jnp.int32(n), m, 0))
  np.testing.assert_array_equal(found.reshape(2, m, 6).sum(1), n)
