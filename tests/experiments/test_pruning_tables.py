"""Tests the tables of pruned models on a small model: cells, resuming, refused cells, and the numbers of the page."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from experiments import pruning
from experiments.loop.stopping import StopRequest
from experiments.loop.training import Stopped
from experiments.pruning import engine
from experiments.pruning.subjects import Subject
from experiments.sweep.ledger import locked
from experiments.tables import pruned

X, W, V = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(32, 8), (8, 8), (8, 3)]))


def apply(p, x):
  return jnp.tanh(x @ p['w']) @ p['v']


def subject(seed):
  params = {'w': W, 'v': V}
  off = lambda p: np.asarray(jnp.sum(jnp.square(apply(p, X) - apply(params, X)), 1), np.float64)
  return Subject(apply, params, [(X[:16] + seed,), (X[16:],)], None, sj.trees.named('*'),
                 lambda p, batch: jnp.mean(jnp.square(apply(p, *batch))), lambda path: path,
                 lambda p: {'nats': off(p)}, {'data': 'normal numbers', 'seed': seed})


def ran(workdir, todo, make=subject, request=None, facts=None, tell=lambda text: None):
  with locked(workdir) as ledger:
    bench = engine.Bench(make, request or StopRequest(), tell)
    return list(engine.cell_lines(bench, ledger, workdir, todo, facts or {'table': 'decoder'}))


def test_cells_run_once_and_a_stop_keeps_what_is_finished(tmp_path):
  todo = engine.cells(['wanda', 'ecoflap'], ['0.5', '2:4'], [0])
  assert [cell.place for cell in todo] == ['dense/seed 0', 'wanda/0.5/seed 0', 'ecoflap/0.5/seed 0', 'wanda/2:4/seed 0',
                                           'ecoflap/2:4/seed 0']
  request = StopRequest()

  def tell(text):
    if '1/2' in text:
      request.received = 15

  with pytest.raises(Stopped, match='wanda/0.5/seed 0 is saved'):
    ran(tmp_path, todo, request=request, tell=tell)
  assert list((tmp_path / 'matrices').rglob('*.npz'))  # the matrix that was finished before the stop
  lines = [line for line, new in ran(tmp_path, todo)]
  assert [line['status'] for line in lines] == ['done'] * 4 + ['refused'] and not list(tmp_path.rglob('*.npz'))
  assert lines[0]['scores']['nats'] == [0] * 32 and lines[1]['achieved'] == lines[3]['achieved'] == 0.5
  expected = sj.prune(apply, {'w': W, 'v': V}, [X[:16], X[16:]], sj.recipes.wanda(0.5), where=sj.trees.named('*'))
  np.testing.assert_allclose(lines[1]['scores']['nats'], subject(0).scored(expected.params)['nats'], atol=1e-5)
  fail = lambda seed: pytest.fail('made again')
  assert [new for _, new in ran(tmp_path, todo, fail)] == [False] * 5
  with pytest.raises(ValueError, match='was finished under another config'):
    ran(tmp_path, todo, fail, facts={'table': 'encoder'})
  page = pruned.page('decoder', lines, tmp_path)
  (table,) = page.tables
  assert len(table.cells) == 4 and any('ecoflap/2:4/seed 0: refused: ' in note for note in page.notes)
  row = dict(zip(table.head, table.cells[1]))
  mean = np.mean(lines[1]['scores']['nats'])
  assert row['recipe'] == 'wanda' and row['nats a byte'].startswith(f'{mean:.3f} ± ') and row['rows'] == '32'
  assert row['perplexity'] == f'{np.exp(mean):.3f}' and row['to dense'] == f'+{row["nats a byte"]}'
  page.draw(tmp_path / 'picture.png')


@pytest.mark.parametrize('table, options, why', [
    ('encodr', {}, "unknown table 'encodr'. Did you mean 'encoder'"),
    ('encoder', {'recipes': ['wnda']}, "unknown recipe 'wnda'. Did you mean 'wanda'")])
def test_unknown_names_are_refused(tmp_path, table, options, why):
  with pytest.raises(ValueError, match=why):
    pruning.run(table, str(tmp_path), **options)


def test_the_sweep_says_where_the_model_begins_to_get_worse(tmp_path):
  lines = [line for line, _ in ran(tmp_path, engine.cells([engine.ONE_SHOT], ['0.25', '0.5', '0.75'], [0]))]
  masks = sj.prune(apply, {'w': W, 'v': V}, [X[:16]], sj.recipes.magnitude(0.5, allocation=sj.allocation.global_()),
                   where=sj.trees.named('*')).masks
  assert lines[2]['achieved'] == 0.5 == 1 - np.mean(np.concatenate([np.ravel(mask) for mask in masks.values()]))
  for line, cosine in zip(lines, (1.0, 0.995, 0.98, 0.4)):
    line['scores'] = {'cosine': [cosine, cosine], 'accuracy': [1.0, 1.0]}
  notes = pruned.page('essential', lines, tmp_path).notes
  assert 'cosine, seed 0: within 1 % of the dense model up to sparsity 0.25, the drop at 0.75.' in notes
  assert 'probe, %, seed 0: within 1 % of the dense model up to sparsity 0.75, no drop.' in notes
