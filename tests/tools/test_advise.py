"""Tests that the sizes of `advise` are those of packed arrays, and its speeds those of the table and nothing else."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import advice, cli, formats, io
from sparsejax.advice import rows

HERE = {'hardware': 'a CPU, 2 cores', 'jax': '0.10.2', 'commit': 'abc'}


def measured(m, sparsity, forward, train=None, **changed):
  return {'op': 'block_sparse_matmul', 'implementation': 'xla', 'm': m, 'k': 64, 'n': 64, 'block': [4, 4],
          'sparsity': sparsity, 'ratio_forward': forward, 'ratio_train': train, **HERE, **changed}


# Packed products are faster from 75 % on at 64 tokens, and from 60 % on at 256 tokens.
TABLE = [measured(64, 0.5, 0.5, 0.4), measured(64, 0.75, 1.05, 1.0), measured(64, 0.9, 2.0, 1.5),
         measured(256, 0.5, 0.9), measured(256, 0.6, 1.05), measured(256, 0.9, 4.0),
         measured(256, 0.9, 3.0, implementation='dense'), measured(64, 0.9, 9.0, k=1024),
         measured(64, 0.5, 0.3, block=[4, 1], op='nm_matmul'), measured(64, 0.75, 0.6, block=[4, 1], op='nm_matmul'),
         measured(64, 0.9, 7.0, block=[8, 8])]


@pytest.fixture
def tables(tmp_path):
  (tmp_path / 'cpu.json').write_text(json.dumps(TABLE))
  return tmp_path


def abstract(*shape, dtype='float32'):
  return {'mlp': {'kernel': jax.ShapeDtypeStruct(shape, dtype)}}


def only(*args, **kwargs):
  row, = sj.advise(*args, **kwargs).rows
  return row


AXES = {'mlp/kernel': sj.types.Axes((0,), (1,)), 'out/kernel': sj.types.Axes((0, 1), (2,)),
        'stack/kernel': sj.types.Axes((1,), (2,), layer=(0,))}


@pytest.mark.sampled(9)
@pytest.mark.parametrize('pattern, kind', [
    ('2:4', '2:4'), ('1:8', '1:8'), ('2:4x4', '2:4x4'), ('4x8 0.5', '4x8'), ('4x8 1', '4x8'),
    ('unstructured 0.875', 'csc')])
@pytest.mark.parametrize('path, shape', [
    ('mlp/kernel', (16, 24)), ('out/kernel', (2, 8, 24)), ('stack/kernel', (3, 16, 24))])
def test_bytes_are_those_of_the_packed_array(pattern, kind, path, shape):
  """Compares the bytes from shapes, before pruning, from zeros, after pruning, and of the packed array."""
  one, two = path.split('/')
  w = np.random.default_rng(0).standard_normal(shape).astype('float32')
  at = AXES[path]
  along = lambda axes: np.ravel_multi_index([np.indices(shape)[a] for a in axes], [shape[a] for a in axes])
  chequered = (along(at.contracted) // 4 + along(at.output) // 8) % 2  # leaves no row or column of blocks empty
  scores = np.abs(w) + np.float32(10) * chequered.astype('float32') * ('x8' in pattern)
  pruned = np.where(rows._parsed(pattern)(jnp.asarray(scores), None, at), w, 0)
  row = only({one: {two: jax.ShapeDtypeStruct(shape, 'float32')}}, pattern, tokens=10, axes={path: at})
  packed = formats.pack({one: {two: pruned}}, kind, axes={path: at})
  assert (row.bytes_dense, row.bytes_packed) == (w.nbytes, formats.nbytes(packed))
  assert only({one: {two: pruned}}, pattern.split()[0], tokens=10, axes={path: at}) == row
  assert row.flops_dense == 2 * 10 * w.size and row.flops_packed == 2 * 10 * np.count_nonzero(pruned)
  k, n = np.prod([shape[a] for a in at.contracted]), np.prod([shape[a] for a in at.output])
  moved = w.size // (k * n) * 10 * (k + n) * 4
  assert row.traffic == pytest.approx((w.nbytes + moved) / (row.bytes_packed + moved))


def test_channels_are_a_smaller_dense_product(tables):
  row = only(abstract(16, 24), 'channel 0.25', tokens=10, tables=tables)
  assert (row.bytes_packed, row.flops_packed, row.forward) == (16 * 18 * 4, 2 * 10 * 16 * 18, None)
  assert row.traffic == pytest.approx((16 * 24 + 10 * (16 + 24)) / (16 * 18 + 10 * (16 + 18)))


@pytest.mark.parametrize('shape, pattern, tokens, forward, training, crossover, notes', [
    ((64, 64), '4x4 0.75', 64, 1.05, 1.0, 0.75, []),
    ((64, 64), '4x4 0.625', 64, 0.775, 0.7, 0.75, []),  # between two sparsities
    ((64, 64), '4x4 0.9', 256, 4.0, 1.5, 0.6, ['training of 64 tokens']),  # the fastest implementation
    ((64, 64), '4x4 0.9', 128, 3.0, 1.5, None, ['training of 64 tokens']),  # between two numbers of tokens
    ((64, 64), '4x4 0.95', 64, 2.0, 1.5, 0.75, ['of 90.0%, the highest measured', 'training of 90.0%']),
    ((64, 64), '4x4 0.25', 64, None, None, 0.75, ['not measured below 50.0%', 'training not measured below 50.0%']),
    ((64, 64), '4x4 0.75', 16, 1.05, 1.0, 0.75, ['of 64 tokens, the nearest measured', 'training of 64 tokens']),
    ((64, 64), '4x4 0.9', 1024, 4.0, 1.5, 0.6, ['of 256 tokens, the nearest measured', 'training of 64 tokens']),
    ((128, 64), '4x4 0.75', 64, 1.05, 1.0, 0.75, ['of 64 x 64, the nearest measured']),
    ((512, 64), '4x4 0.9', 64, 9.0, None, 0.9, ['of 1024 x 64, the nearest measured']),
    ((64, 256), '4x4 0.75', 64, 1.05, 1.0, 0.75, ['of 64 x 64, the nearest measured']),
    ((64, 12), '4x4 0.75', 64, None, None, None, ['not measured within 4 times of 64 x 12: the nearest is 64 x 64']),
    ((8192, 64), '4x4 0.75', 64, None, None, None, ['not measured within 4 times of 8192 x 64: the nearest is 1024']),
    ((64, 64), '2:4', 64, 0.3, None, None, []),
    ((64, 64), '2:8', 64, None, None, None, ['not measured for groups of 8x1, but for 4x1']),
    ((64, 64), '4x4 0.9', 64, 2.0, 1.5, 0.75, []),
    ((64, 64), 'unstructured 0.9', 64, None, None, None, ['not measured for groups of 1x1']),
])
def test_speeds_are_the_tables_and_what_is_beyond_it_is_said(tables, shape, pattern, tokens, forward, training,
                                                             crossover, notes):
  row = only(abstract(*shape), pattern, tokens=tokens, tables=tables)
  near = lambda value: value if value is None else pytest.approx(value, abs=1e-6)
  assert row.forward == near(forward)
  assert row.training == near(training)
  if tokens != 128:
    assert row.crossover == near(crossover)
  said = row.note.split('; ') if row.note else []
  assert len(said) == len(notes) and all(each.startswith(note) for each, note in zip(said, notes))


@pytest.mark.parametrize('pattern, device, tokens, sentence', [
    ('4x4 0.9', 'cpu', 64, '^It helps: 4x4 is expected to be 2.00 times as fast as dense on cpu, .* from 75% on'),
    ('4x4 0.6', 'cpu', 64, '^Prune to 75% or more in 4x4: below, dense is as fast; '),
    ('4x4 0.1', 'cpu', 64, '^Prune to 75% or more in 4x4: below, dense is as fast on cpu, or nothing was measured'),
    ('2:4', 'cpu', 64, '^It will not help: 2:4 is expected to be 0.30 times .* at no measured sparsity; .* 0.5312 of'),
    ('2:4', 'h200', 64, '^The speed of 2:4 was not measured on h200: .* where memory .* bounds .* 1.19'),
    ('5x5 0.9', 'cpu', 64, '^It will not help: none of the 1 parameters can carry the pattern'),
])
def test_it_ends_in_one_plain_sentence(tables, pattern, device, tokens, sentence):
  found = sj.advise(abstract(64, 64), pattern, device=device, tokens=tokens, tables=tables)
  assert re.search(sentence, found.sentence) and str(found).endswith(found.sentence)
  assert ('a CPU, 2 cores, jax 0.10.2, commit abc' in str(found)) == (device == 'cpu')


def test_some_parameters_may_gain_and_some_stay_dense(tables):
  tree = {'a': abstract(64, 64), 'b': abstract(1024, 64), 'odd': abstract(7, 9),
          'conv': {'kernel': jax.ShapeDtypeStruct((3, 3, 64, 64), 'float32')}}
  found = sj.advise(tree, {'b/**': '4x4 0.9', '**': '4x4 0.75'}, tokens=64, tables=tables)
  rows = {row.path: row for row in found.rows}
  assert found.sentence.startswith('It helps 2 of 2 parameters') or found.sentence.startswith('It helps: ')
  assert [rows[path].bytes_packed == rows[path].bytes_dense for path in rows] == [False, False, True, True]
  assert 'a convolution of 9 taps' in rows['conv/kernel'].note and '4 and 4 divide' in rows['odd/mlp/kernel'].note
  assert "'conv/kernel': stays dense" in str(found)


@pytest.mark.parametrize('call, message', [
    (lambda at: sj.advise(abstract(8, 8), '2:4', device='h20', tables=at), "'h20'. Did you mean 'h200'.*cpu, h200"),
    (lambda at: sj.advise(abstract(8, 8), '2x 0.5', tables=at), "unknown pattern '2x'.*unstructured"),
    (lambda at: sj.advise(abstract(8, 8), 'chanel 0.5', tables=at), "Did you mean 'channel'"),
    (lambda at: sj.advise(abstract(8, 8), '2:4 0.5', tables=at), 'leave 0.5 out'),
    (lambda at: sj.advise(abstract(8, 8), '4x4', tables=at), r"'mlp/kernel' of shape \(8, 8\).*has no values to count"),
    (lambda at: sj.advise(abstract(8, 8), '2:4', tokens=0, tables=at), 'tokens'),
    (lambda at: sj.advise(abstract(8, 8), sj.patterns.Switch((sj.NM(2, 4),), 0), tables=at), 'unknown pattern'),
    (lambda at: sj.advise({'b': abstract(8)}, '2:4', tables=at), '`where` picks no parameter'),
])
def test_what_cannot_be_is_refused(tables, call, message):
  with pytest.raises(ValueError, match=message):
    call(tables)


@pytest.mark.parametrize('content, message', [
    ('{', 'is no JSON'), ('{}', 'must be a list'), (json.dumps([{'op': 'x'}]), 'row 0 .*must have just op'),
    (json.dumps([TABLE[0], {**TABLE[0], 'more': 1}]), 'row 1 .*see more'),
    (json.dumps([{**TABLE[0], 'block': 4}]), 'row 0 .*: block'), (json.dumps([{**TABLE[0], 'm': '64'}]), ': m are'),
    (json.dumps([{**TABLE[0], 'ratio_train': 'x', 'jax': None}]), ': jax, ratio_train'),
])
def test_a_table_of_another_kind_is_refused_by_its_row(tmp_path, content, message):
  (tmp_path / 'cpu.json').write_text(content)
  with pytest.raises(ValueError, match=message):
    advice.read_table('cpu', tmp_path)


def test_every_table_that_comes_along_can_be_read():
  for path in advice.TABLES.glob('*.json'):
    assert advice.read_table(path.stem)


def test_the_command_prints_the_table_of_a_checkpoint(tmp_path, tables, capsys, monkeypatch):
  own = advice.advise.__wrapped__
  monkeypatch.setattr(own, '__kwdefaults__', {**own.__kwdefaults__, 'tables': tables})
  tree = {'mlp': {'kernel': np.eye(64, dtype='float32')}}
  io.save(tmp_path / 'ckpt.safetensors', tree)
  assert cli.main(['advise', str(tmp_path / 'ckpt.safetensors'), '--pattern', '4x4', '--tokens', '64']) == 0
  out, err = capsys.readouterr()
  assert (out, err) == (f'{sj.advise(tree, "4x4", tokens=64)}\n', '') and 'It helps' in out
  assert cli.main(['advise', str(tmp_path / 'ckpt.safetensors'), '--pattern', '4x4', '--device', 'h2000']) == 2
  assert "Did you mean 'h200'" in capsys.readouterr().err
