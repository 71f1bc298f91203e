"""Chooses few cells of a test over a product of tables, the same cells in each run.

    @pytest.mark.sampled  # `sampled(12)` runs at most twelve cells
    @pytest.mark.parametrize('dtype', DTYPES)
    @pytest.mark.parametrize('name', WEIGHTS)
    def test_products(name, dtype): ...
"""

import collections
import zlib


def left_out(items):
  """Returns the set of the collected `items` that have the mark `sampled` and that `covering` does not choose."""
  tests = collections.defaultdict(list)
  for item in items:
    if mark := item.get_closest_marker('sampled'):
      tests[item.nodeid.split('[')[0], mark.args].append(item)
  return {cell for (_, most), cells in tests.items() for cell in {*cells} - {*covering(cells, *most)}}


def covering(cells, most=None):
  """Returns few of `cells`, at most `most`, in which each value of each parameter occurs.

  Each step chooses the cell with the most values that are still missing. A hash of the cell's name breaks ties, so that
  tests of one table run the same rows and share compiled programs.
  """
  values = {cell: {(name, repr(value)) for name, value in cell.callspec.params.items()} for cell in cells}
  order, chosen = sorted(cells, key=lambda cell: zlib.crc32(cell.callspec.id.encode())), []
  missing = set().union(*values.values())
  while missing and len(chosen) != most:
    chosen.append(max(order, key=lambda cell: len(values[cell] & missing)))
    missing -= values[chosen[-1]]
  return chosen
