"""Tests of a product run few cells, in which nothing of a table is missing."""

import types

import pytest
import sampling


class Cell:
  """A `Cell` stands for a collected test with parameters."""

  def __init__(self, test, marks, **params):
    name = '-'.join(map(str, params.values()))
    self.nodeid, self.marks = f'{test}[{name}]', marks
    self.callspec = types.SimpleNamespace(id=name, params=params)

  def get_closest_marker(self, name):
    return self.marks.get(name)


def product(test, *most):
  marks = {'sampled': pytest.mark.sampled(*most).mark}
  return [Cell(test, marks, name=i, dtype=dtype, way=way) for i in range(9) for dtype in 'abc' for way in (0, 1)]


def test_each_value_of_each_parameter_is_in_a_sample_of_the_length_of_the_longest_table():
  cells = product('test')
  chosen = sampling.covering(cells)
  for name in ('name', 'dtype', 'way'):
    assert {cell.callspec.params[name] for cell in chosen} == {cell.callspec.params[name] for cell in cells}
  assert len(chosen) == 9 and chosen == sampling.covering(cells[::-1])


def test_tests_of_one_table_run_the_same_rows_and_a_test_without_the_mark_runs_all():
  first, second, third, whole = product('a'), product('b'), product('c', 4), [Cell('d', {}, name=i) for i in range(9)]
  left = sampling.left_out([*first, *second, *third, *whole])
  kept = [{cell.callspec.id for cell in cells if cell not in left} for cells in (first, second, third, whole)]
  assert kept[0] == kept[1] > kept[2] and [len(names) for names in kept[1:]] == [9, 4, 9]
