"""Tests the parts of the experiment loop by themselves: checkpoints, records, pages, optimizers, progress."""

import io
import json
import os
import re
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from experiments.loop import checkpoints, optimizers, records, sharding
from experiments.loop.checkpoints import State
from experiments.loop.progress import Progress
from experiments.loop.stopping import StopRequest
from experiments.tables import pages
from experiments.tables import runs as tables
from sparsejax import plot

# Checkpoints.


def state(scale=1.0):
  """Returns a state with every kind of array that an optimizer's state may hold, large enough to fill files."""
  weights = {'w': scale * jax.random.normal(jax.random.key(0), (3, 200, 100)), 'b': jnp.arange(5, dtype=jnp.bfloat16)}
  return State(weights, (optax.MaskedNode(), jnp.int32(7), jax.random.key(3), weights['w'] > 0, [weights['w'] * 2]))


def saved(directory, *steps):
  with checkpoints.open_(directory) as manager:
    for step in steps:
      checkpoints.save(manager, step, state(float(step)), seeds=[step])


def restored(directory, like=None, said=None):
  with checkpoints.open_(directory) as manager:
    return checkpoints.restore(manager, like or jax.eval_shape(state), [].append if said is None else said.append)


def equal(one, two):
  as_bytes = lambda leaf: np.asarray(jax.random.key_data(leaf) if 'key' in str(leaf.dtype) else leaf).tobytes()
  return jax.tree.structure(one) == jax.tree.structure(two) and jax.tree.all(
      jax.tree.map(lambda a, b: as_bytes(a) == as_bytes(b), one, two))


def test_the_newest_two_checkpoints_are_kept_and_come_back_bit_for_bit(tmp_path):
  assert restored(tmp_path / 'run') is None
  saved(tmp_path / 'run', 1, 2, 3)
  assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['2', '3']
  step, found, meta = restored(tmp_path / 'run')
  assert step == 3 and meta['seeds'] == [3] and equal(found, state(3.0))


@pytest.mark.sampled(1)
@pytest.mark.parametrize('shard', sharding.SHARDS)
def test_a_checkpoint_of_four_devices_comes_back_on_any_number(tmp_path, shard):
  layout = lambda devices: sharding.layout(ConfigDict({'mesh': {'data': devices}, 'shard': shard, 'batch_size': 8}))
  like = {devices: sharding.with_shardings(jax.eval_shape(state), layout(devices)) for devices in (1, 2, 4, 8)}
  with checkpoints.open_(tmp_path / 'run') as manager:
    four = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), state(), like[4])
    checkpoints.save(manager, 1, four)
  assert (len({str(tile.index) for tile in four.params['w'].addressable_shards}) == 4) == (shard == 'fully')
  for devices, wanted in like.items():
    _, found, _ = restored(tmp_path / 'run', wanted)
    assert equal(found, state())
    for leaf, to in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
      assert leaf.sharding.is_equivalent_to(to.sharding, leaf.ndim)
    assert found.params['w'].sharding.spec == found.opt_state[-1][0].sharding.spec == found.opt_state[3].sharding.spec
    assert len(found.params['w'].sharding.device_set) == devices


def largest(place):
  return max((path for path in (place / 'params').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def cut(place):
  largest(place).write_bytes(largest(place).read_bytes()[:-1000])


def flipped(place):
  content = bytearray(largest(place).read_bytes())
  content[len(content) // 2] ^= 1
  largest(place).write_bytes(content)


def missing(place):
  largest(place).unlink()


def garbled(place):
  (place / 'opt_state' / '_METADATA').write_text('{')


def forged(place):
  meta = place / 'meta/metadata'
  meta.write_text(re.sub(r'("seeds": ?)\[2\]', r'\1[9]', re.sub(r'("seeds": ?)\[1\]', r'\1[9]', meta.read_text())))


@pytest.mark.parametrize('damage', [cut, flipped, missing, garbled, forged])
@pytest.mark.filterwarnings('error')  # Orbax must not fill the screen with warnings about unfinished reads.
def test_a_damaged_checkpoint_is_never_restored(tmp_path, damage):
  saved(tmp_path / 'run', 1, 2)
  damage(tmp_path / 'run/2')
  said = []
  step, found, _ = restored(tmp_path / 'run', said=said)
  assert step == 1 and equal(found, state(1.0))
  assert len(said) == 1 and 'step 2' in said[0] and 'damaged' in said[0]
  assert (tmp_path / 'damaged/2').is_dir() and not (tmp_path / 'run/2').exists()
  saved(tmp_path / 'run', 2)  # The damaged step can be saved again.
  assert restored(tmp_path / 'run')[0] == 2
  for step in (1, 2):
    damage(tmp_path / 'run' / str(step))
  with pytest.raises(ValueError, match='no whole checkpoint'):
    restored(tmp_path / 'run')


def test_the_late_end_of_a_read_given_up_is_not_printed(tmp_path, monkeypatch):
  """Plays a race in a thread of TensorStore, because waiting for the race would take too long."""
  said = []
  monkeypatch.setattr(sys, 'unraisablehook', said.append)
  saved(tmp_path / 'run', 1)
  restored(tmp_path / 'run')
  for error in ('Event loop is closed', 'anything else'):
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(error)))
  assert [str(one.exc_value) for one in said] == ['anything else']


def test_half_written_checkpoints_of_a_killed_process_are_gone_before_anything_is_saved(tmp_path):
  saved(tmp_path / 'run', 1)
  (tmp_path / 'run/2.orbax-checkpoint-tmp/params').mkdir(parents=True)
  assert restored(tmp_path / 'run')[0] == 1
  assert [path.name for path in (tmp_path / 'run').iterdir()] == ['1']


@pytest.mark.parametrize(('change', 'words'), [
    (lambda s: s._replace(params={**s.params, 'w': jnp.zeros((3, 9, 1))}), ['params/w', '[3, 200, 100]', '[3, 9, 1]']),
    (lambda s: s._replace(params={**s.params, 'b': jnp.zeros(5)}), ['params/b', 'bfloat16', 'float32']),
    (lambda s: s._replace(params={**s.params, 'new': jnp.zeros(2)}), ['params/new', '(2,)']),
    (lambda s: s._replace(params={'w': s.params['w']}), ['params/b']),
])
def test_a_checkpoint_of_other_arrays(tmp_path, change, words):
  saved(tmp_path / 'run', 1)
  like = jax.eval_shape(lambda: change(state()))
  for refuse in (lambda: restored(tmp_path / 'run', like), lambda: checkpoints.check(tmp_path / 'run', like)):
    with pytest.raises(ValueError, match='another --workdir') as error:
      refuse()
    assert all(word in str(error.value) for word in words), error.value
  checkpoints.check(tmp_path / 'run', jax.eval_shape(state))
  checkpoints.check(tmp_path / 'nothing', like)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([np.float32, np.uint16, np.int8, np.bool_, np.uint32]), st.integers(0, 11), st.integers(0, 63),
       st.data())
def test_a_fingerprint_changes_with_every_bit_and_every_swap(dtype, place, bit, data):
  bits = data.draw(st.binary(min_size=12 * np.dtype(dtype).itemsize, max_size=12 * np.dtype(dtype).itemsize))
  array = np.frombuffer(bits, np.uint8)
  array = (array & 1).view(np.bool_) if dtype == np.bool_ else array.view(dtype)
  array, other = array.reshape(3, 4), array.copy().reshape(3, 4)
  raw = other.reshape(-1).view(np.uint8)
  raw[place * array.itemsize + (bit // 8) % array.itemsize] ^= 1 if dtype == np.bool_ else 1 << bit % 8
  whole = checkpoints.fingerprint([array, array * 0])
  assert whole != checkpoints.fingerprint([other, array * 0])
  if array.any():
    assert whole != checkpoints.fingerprint([array * 0, array])
  if not np.array_equal(array.view(np.uint8), array[::-1].view(np.uint8)):
    assert whole != checkpoints.fingerprint([array[::-1], array * 0])


def test_a_fingerprint_is_the_same_under_any_sharding():
  mesh = jax.make_mesh((4, 2), ('a', 'b'))
  array = jax.random.normal(jax.random.key(1), (8, 6))
  sharded = jax.device_put(array, jax.NamedSharding(mesh, jax.P('a', 'b')))
  assert checkpoints.fingerprint([array]) == checkpoints.fingerprint([sharded])


# Records.


def test_records_beyond_the_restored_step_and_a_line_cut_by_a_kill_are_written_again(tmp_path):
  with records.Records(tmp_path, 0) as record:
    for step in (1, 2, 3):
      record.write(step, {'loss': np.array([step, np.nan]), 'rate': 0.5})
  path = tmp_path / records.FILE
  whole = path.read_bytes()
  path.write_bytes(whole[:-7])
  with records.Records(tmp_path, 2) as record:
    record.write(3, {'loss': np.array([3, np.nan]), 'rate': 0.5})
  assert path.read_bytes() == whole
  assert json.loads(whole.splitlines()[0]) == {'step': 1, 'loss': [1.0, None], 'rate': 0.5}


def test_json_has_no_nan(tmp_path):
  records.write_json(tmp_path / 'a.json', {'a': [float('nan'), (1.5, float('inf'))], 'b': {'c': 2}, 'd': 'x'})
  assert json.loads((tmp_path / 'a.json').read_text()) == {'a': [None, [1.5, None]], 'b': {'c': 2}, 'd': 'x'}
  assert not list(tmp_path.glob('*.part'))


# Pages.


def test_a_page_goes_to_the_terminal_and_to_files(tmp_path):
  def draw(path):
    assert not (tmp_path / 'results.json').exists()  # The JSON is last.
    with plot.saved(path, 1, 2, figsize=(4, 2)) as axes:
      assert axes.shape == (1, 2)

  lines = [{'run': 'a', 'loss': 0.25}, {'run': 'b', 'loss': float('nan')}]
  columns = {'run': lambda line: line['run'], 'test\nloss': lambda line: f'{line["loss"]:.4f}'}
  console = rich.console.Console(file=io.StringIO(), width=80)
  notes = ['[Note].', 'Another.']
  pages.show(pages.Page('results', [pages.table(columns, lines)], notes, {'rows': lines}, draw, rows=lines), tmp_path,
             console)
  read = lambda suffix: (tmp_path / f'results.{suffix}').read_text()
  out = console.file.getvalue()
  assert out.endswith('\n[Note].\nAnother.\n') and 'test' in out.splitlines()[1] and '0.2500' in out
  assert read('md') == '| run | test loss |\n| --- | --- |\n| a | 0.2500 |\n| b | nan |\n\n- [Note].\n- Another.\n'
  assert json.loads(read('json')) == {'rows': [{'run': 'a', 'loss': 0.25}, {'run': 'b', 'loss': None}]}
  assert read('csv').split() == ['run,loss', 'a,0.25', 'b,nan']
  assert (tmp_path / 'results.png').read_bytes()[:4] == b'\x89PNG'


def test_a_table_that_is_wider_than_the_terminal_is_shown_in_parts_and_not_cut(tmp_path):
  heads = ['run', *(f'a long head {i}' for i in range(9))]
  rows = [{head: f'{i} {head}' for head in heads} for i in range(2)]
  shown = pages.table({head: lambda row, head=head: row[head] for head in heads}, rows)
  for width in (24, 80, 200):
    console = rich.console.Console(file=io.StringIO(), width=width)
    pages.show(pages.Page('results', [shown], [], {}, lambda path: None), tmp_path, console)
    lines = console.file.getvalue().splitlines()
    assert all(any(head in line for line in lines) for head in [*heads, *rows[1].values()])
    assert max(map(len, lines)) <= width and not any('…' in line for line in lines)
    assert sum('0 run' in line for line in lines) == {24: 9, 80: 3, 200: 1}[width], width


def test_a_spread_has_no_interval_where_there_is_none():
  assert pages.spread(0.5, 0.125, 100) == '50.00 ± 12.50'
  assert pages.spread(0.5, float('nan'), sign='+') == '+0.50'


def test_intervals_are_students(tmp_path):
  values = [0.91, 0.94, 0.92, 0.95]
  mean, half = pages.interval(values)
  assert mean == pytest.approx(0.93)
  assert half == pytest.approx(3.182446 * np.std(values, ddof=1) / 2)  # t(0.975, 3 degrees of freedom), from a table
  assert np.isnan(pages.interval([0.5])[1])


def test_differences_are_paired_by_seed():
  outcome = lambda name, accuracy: {
      'name': name, 'test': {'accuracy': accuracy, 'loss': [1.0, 1.0, 1.0]}, 'asked': None, 'achieved': None,
      'training_flops': 1.0, 'inference_flops': 1.0, 'seconds': 1.0}
  base, other = tables.rows([outcome('a', [0.1, 0.5, 0.9]), outcome('b', [0.2, 0.6, 1.0])])
  assert base['difference'] == base['difference_ci95'] == 0
  # The seeds differ widely; the difference between the runs does not vary.
  assert other['difference'] == pytest.approx(0.1) and other['difference_ci95'] < 1e-6 < other['accuracy_ci95']


# Optimizers.


@pytest.mark.parametrize(('decay', 'last'), [('constant', 2.0), ('cosine', 0.0), ('linear', 0.0)])
def test_learning_rates(decay, last):
  rate = optimizers.learning_rates(2.0, decay, warmup=4, total_steps=10)
  np.testing.assert_allclose([rate(s) for s in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
  assert rate(10) == pytest.approx(last, abs=1e-6)
  assert optimizers.learning_rates(2.0, decay, warmup=0, total_steps=10)(0) == 2.0


@pytest.mark.parametrize(('value', 'steps'), [(0.1, 20), (7, 7), (1, 1), (1.0, 200), (0, 0), (30.0, 30)])
def test_steps_and_fractions_of_them(value, steps):
  assert optimizers.in_steps(value, 200) == steps
  with pytest.raises(ValueError, match='fraction'):
    optimizers.in_steps(value + 1.5 if isinstance(value, float) and value < 30 else -1, 200)


def test_weight_decay_is_for_matrices(standard_promotion):
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  for name in optimizers.TABLE:
    _, tx = optimizers.make(name, total_steps=10, learning_rate=0.1, warmup=0, decay='constant', weight_decay=0.5,
                            clip=None, options={})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (updates['kernel'] < 0).all() and (updates['bias'] == 0).all(), name


# Progress and signals.


def told(terminal, width=80):
  out = io.StringIO()
  console = rich.console.Console(file=out, force_terminal=terminal, width=width)
  with Progress(2, 100, console) as progress:
    progress.start('MdGf-Linear', 40)
    progress.advance(50, {'loss': [1.0, 2.0], 'sparsity': 0.875, 'flips': [0.001, 0.003], 'valid_accuracy': 0.5})
    progress.advance(100, {'loss': 0.25})
    progress.say('[kept]')
  return out.getvalue()


def test_progress_is_plain_lines_where_there_is_no_terminal():
  lines = told(terminal=False).splitlines()
  assert lines[0].startswith('MdGf-Linear 50/100  loss 1.500  valid 50.0%  sparse 87.5%  flips 0.20%  0:00:0')
  assert 'MdGf-Linear 100/100  loss 0.250  valid 50.0%' in lines[1] and 'left' in lines[1]
  assert lines[2] == '[kept]' and '\x1b' not in ''.join(lines)


def test_progress_is_a_bar_on_a_terminal_and_fits_80_columns():
  assert '\x1b' in told(terminal=True)


def test_a_signal_is_remembered_and_a_second_ctrl_c_interrupts():
  before = signal.getsignal(signal.SIGINT)  # A shell ignores the signal for tests in its background.
  with StopRequest() as signals:
    assert signals.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM and signals.name == 'SIGTERM'
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.name == 'Ctrl-C'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before
