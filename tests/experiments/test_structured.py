"""Tests the command that cuts trained models on a tiny model: cells, resuming, the table, and boxes of the detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import structured
from experiments.structured import detection, replacing
from experiments.structured.replacing import Replacements
from experiments.structured.subjects import SUBJECTS, Cuttable, RunSizes
from experiments.tables import cuts

pytestmark = pytest.mark.usefixtures('standard_promotion')
SIZES = RunSizes(batch=8, steps=4, tuned=4, tests=16)
LINE = {'method': 'oto', 'left': 0.5, 'seed': 0, 'accuracy': 0.9, 'parameters': 1000, 'flops': 2000, 'bytes': 4000,
        'speed-up': 1.5, 'rounds': 15, 'config': {'table': 'vit', 'seed': 0},
        'environment': {'platform': 'cpu', 'device': 'cpu', 'cpus': 2, 'jax': '0.10', 'commit': 'abc'}}


def tiny(sizes, data_dir, seed):
  """A perceptron that tells the sign of the first input."""
  x = np.random.default_rng(seed).normal(size=(8, sizes.batch, 4)).astype('f')
  params = {'up': jax.random.normal(jax.random.key(seed), (4, 8)), 'down': jnp.ones((8, 2))}
  apply = lambda variables, x: jax.nn.relu(x @ variables['params']['up']) @ variables['params']['down']
  labels = (x[..., 0] > 0).astype(np.int32)
  return Cuttable(apply, apply, {'params': params}, (x, labels), (x[0], labels[0]), lambda variables: variables, {})


def test_cells_run_once_and_the_table_has_a_row_for_each_method(tmp_path, monkeypatch):
  monkeypatch.setitem(SUBJECTS, 'vit', tiny)
  options = {'sizes': SIZES, 'methods': ['group_taylor'], 'left': [0.5], 'seeds': [0]}
  lines = structured.run('vit', str(tmp_path), **options)
  dense, small = sorted(lines, key=lambda line: -line['left'])
  assert small['flops'] <= dense['flops'] / 2 and small['parameters'] < dense['parameters']
  assert small['bytes'] > 0 and small['rounds'] == 15 and 0 <= small['accuracy'] <= 1
  monkeypatch.setitem(SUBJECTS, 'vit', lambda *given: pytest.fail('made again'))
  assert structured.run('vit', str(tmp_path), **options) == lines
  assert '| group_taylor | 50 |' in (tmp_path / 'cuts.md').read_text()


@pytest.mark.parametrize('table, width', [('wide', 4), ('gated', 1)])
def test_replacements_cost_what_the_dense_network_costs_or_less(table, width, tmp_path, monkeypatch):
  monkeypatch.setattr(replacing, 'SPARSITIES', (0.5,))
  sizes = Replacements(batch=4, steps=2, width=width)
  (line,) = structured.run(table, str(tmp_path), sizes=sizes, seeds=[0])
  dense, *others = (own for own in line.values() if 'multiply-adds' in own)
  of_gates = {'wide': 0, 'gated': 1 * 2 + 2 * 4}[table]
  for own in others:
    assert 0 <= own['accuracy'] <= 1 and 0 < own['multiply-adds'] <= 1.02 * dense['multiply-adds'] + of_gates
    assert table == 'gated' or own['multiply-adds'] >= 0.98 * dense['multiply-adds']
  assert '| dense |' in (tmp_path / 'cuts.md').read_text()


def test_the_table_has_intervals_over_seeds():
  (table,) = cuts.page('vit', [LINE, {**LINE, 'seed': 1, 'accuracy': 0.8}]).tables
  row = dict(zip(table.head, table.cells[0]))
  assert row['accuracy, %'] == '85.0 ± 63.5' and row['seeds'] == '2' and row['parameters'] == '1,000'


@pytest.mark.parametrize('table, options, why', [
  ('vit2', {}, "unknown table 'vit2'"), ('vit', {'methods': ['happ']}, "unknown method 'happ'")])
def test_unknown_names_are_refused(tmp_path, table, options, why):
  with pytest.raises(ValueError, match=why):
    structured.run(table, str(tmp_path), **options)


def test_average_precision_is_one_for_the_truth_and_falls_with_wrong_classes():
  rng = np.random.default_rng(0)
  asked = detection.canvases(rng, rng.random((5, 8, 8)), np.arange(5), 6)
  found = np.full((6, 8, 8, 15), -9.0)
  found[..., 0] = np.where(asked.there > 0, 9, -9)
  found[..., 1:5] = asked.box
  found[..., 5:] = np.eye(10)[np.asarray(asked.label)]
  assert detection.average_precision(found, asked) == pytest.approx(1)
  assert detection.average_precision(np.roll(found, 1, -1) * 0 - 9, asked) == 0
  wrong = found.copy()
  wrong[:3, ..., 5:] = np.eye(10)[(np.asarray(asked.label[:3]) + 1) % 10]
  assert 0.1 < detection.average_precision(wrong, asked) < 0.9
  assert float(detection.loss_of(jnp.asarray(found), asked)) < float(detection.loss_of(jnp.asarray(wrong), asked))
