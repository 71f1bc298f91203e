"""Pictures show the numbers that they are given: bars, marks, lines and pixels are read back from the axes."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import sparsejax as sj


@pytest.fixture
def axis():
  return Figure().subplots()


def test_sparsity_shows_what_is_asked_and_achieved_and_what_breaks_the_pattern(axis):
  params = {'a': {'kernel': jnp.ones((4, 2)).at[:2].set(0)}, 'b': {'kernel': jnp.ones((4, 2))}}
  sj.plot.sparsity(sj.report(params, sj.NM(2, 4)), axis)
  assert [bar.get_width() for bar in axis.patches] == [0.5, 0.0]
  colours = [bar.get_facecolor() for bar in axis.patches]
  assert colours[0] != colours[1]
  assert list(axis.lines[0].get_xdata()) == [0.5, 0.5]
  assert [label.get_text() for label in axis.get_yticklabels()] == ['a/kernel', 'b/kernel']


@pytest.mark.parametrize('shape', [(6,), (3, 2), (2, 3, 2)])
def test_a_matrix_has_one_pixel_an_entry(axis, shape):
  mask = np.arange(np.prod(shape)).reshape(shape) % 2 == 0
  sj.plot.matrix(mask, axis)
  image = axis.images[0]
  assert image.get_array().shape == mask.reshape(-1, shape[-1]).shape
  assert np.array_equal(image.get_array().ravel(), mask.ravel())


def test_zeros_of_weights_are_left_out_and_the_colours_are_symmetric(axis):
  sj.plot.matrix(jnp.asarray([[0.0, -2.0], [1.0, 0.0]], jnp.bfloat16), axis)
  image = axis.images[0]
  assert np.array_equal(image.get_array().mask, [[True, False], [False, True]]) and image.get_clim() == (-2, 2)


def test_over_steps_draws_means_in_a_band_of_the_seeds_and_leaves_missing_numbers_out(axis):
  records = [{'step': 1, 'x': [1.0, 3.0]}, {'step': 2}, {'step': 3, 'x': [2.0, None]}, {'step': 4, 'x': [4.0, 8.0]}]
  sj.plot.over_steps(records, 'x', axis)
  assert np.array_equal(axis.lines[0].get_xydata(), [[1, 2], [4, 6]])
  band = axis.collections[0].get_paths()[0].vertices
  assert band[:, 1].min() == 1 and band[:, 1].max() == 8
  sj.plot.over_steps(records, 'y', axis)
  assert len(axis.lines) == 1


def test_a_running_average_covers_at_most_a_fifth(axis):
  records = [{'step': i, 'x': float(i)} for i in range(20)]
  sj.plot.over_steps(records, 'x', axis, window=100)
  assert np.allclose(axis.lines[0].get_xydata(), [[i, i - 1.5] for i in range(3, 20)])


def test_schedules_trade_offs_and_intervals_stand_at_their_numbers(axis):
  sj.plot.schedule(sj.schedules.linear(1.0, 0.0, begin=0, end=10), 10, axis)
  assert np.allclose(axis.lines[0].get_xydata(), [[i, 1 - i / 10] for i in range(11)])
  sj.plot.trade_off([0.5, 1.0], [90.0, 95.0], [1.0, float('nan')], axis)
  assert np.array_equal(axis.lines[1].get_xydata(), [[0.5, 90], [1, 95]])
  sj.plot.trade_off([0.5], [90.0], axis=axis, linestyle='-')
  assert axis.containers[-1].has_yerr is False and axis.containers[0].has_yerr
  rows = Figure().subplots()
  sj.plot.intervals(['a', 'b'], [1.0, 2.0], [(0.0, 2.0), (float('nan'), float('nan'))], rows, bars=[0.5, 0.5])
  assert [list(line.get_xdata()) for line in rows.lines] == [[0, 2], [1], [0.5] * 2, [2, 2], [2], [0.5] * 2]
  assert [label.get_text() for label in rows.get_yticklabels()] == ['a', 'b']


def test_a_picture_is_saved_without_pyplot_and_a_missing_matplotlib_is_named(tmp_path):
  code = ('import sys, numpy as np, sparsejax as sj\n'
          'with sj.plot.saved("a.png", 1, 2) as axes:\n  sj.plot.matrix(np.eye(2), axes[0, 1])\n'
          'assert "matplotlib.pyplot" not in sys.modules\n'
          'for name in [name for name in sys.modules if name.startswith("matplotlib")]:\n  del sys.modules[name]\n'
          'sys.modules["matplotlib"] = None\n'
          'sj.plot.matrix(np.eye(2))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, check=False)
  assert done.stderr.strip().endswith("Run: pip install 'sparsejax[plot]'")
  assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'
