"""Checks the essential sparsity of curves that are known."""

import pytest

from sparsejax.post_training import essential_sparsity

POINTS = [0.1, 0.2, 0.3, 0.4, 0.5]


def found(curve, points=POINTS, **options):
  return essential_sparsity(lambda sparsity: {'s': sparsity}, lambda params: curve[params['s']], points, **options)


@pytest.mark.parametrize('values, essential, drop', [
    ((0.9, 0.9, 0.895, 0.9, 0.8, 0.3), 0.3, 0.5),  # falls by 0.1, then by 0.5
    ((0.9, 0.8, 0.9, 0.9, 0.9, 0.9), 0.0, 0.1),  # a gap ends it, whatever follows
    ((0.9, 0.9, 0.9, 0.9, 0.9, 0.9), 0.5, None),
    ((-1.0, -1.0, -1.005, -1.2, -1.9, -2.0), 0.2, 0.4),  # a loss with its sign changed
])
def test_essential_sparsity_is_where_the_metric_begins_to_fall(values, essential, drop):
  result = found(dict(zip([0.0, *POINTS], values)))
  assert (result.sparsity, result.drop) == (essential, drop) and result.values == values[1:]


@pytest.mark.parametrize('points, values, message', [
    ([0.2, 0.1], (1.0, 1.0), 'must increase'), ([], (), 'must increase'), ([0.0], (), 'must increase'),
    ([0.1], (float('nan'), 1.0), 'at sparsity 0.0 is nan'), ([1.5], (1.0, 1.0), 'fraction of zeros')])
def test_bad_sweeps_are_refused(points, values, message):
  with pytest.raises(ValueError, match=message):
    found(dict(zip([0.0, *points], values)), points)
