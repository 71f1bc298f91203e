"""Reads SST-2 by sentences: the labelled lines of three files, tokenised for the pretrained encoder.

    splits = sst2.load(root, length=32)
    splits['train']['inputs']  # int32[N, 32]
    splits['train']['labels']  # int32[N], 0 negative, 1 positive
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.data.batches import Batch, Data, from_datasets, ordered
from experiments.data.order import BatchPart
from experiments.data.text import utf8
from experiments.models import encoders

NAME = 'sst2_sentences'
CLASSES = 2  # 0 negative, 1 positive
LENGTH = 32  # tokens; a fifth of the sentences have more
FILES = {'train': 'train.tsv', 'valid': 'dev.tsv', 'test': 'test.tsv'}


def sentence_batches(splits: Mapping[str, Batch], part: BatchPart, seed: int) -> Data:
  """Returns the batches of sentences from the splits that `load` returns."""
  def read(split: str, rows: np.ndarray) -> Batch:
    return {key: value[rows] for key, value in splits[split].items()}

  readers = [(functools.partial(read, split), np.arange(len(splits[split]['labels']))) for split in FILES]
  return from_datasets(*ordered(readers, part, seed), CLASSES, part.batch_size)


def load(root: pathlib.Path, length: int) -> Mapping[str, Batch]:
  """Returns `inputs` `int32[N, length]` and `labels` `int32[N]` of `train`, `valid` and `test`, in the files' order.

  The files are `train.tsv`, `dev.tsv` and `test.tsv` in `root / NAME`; each line is `sentence<TAB>label`. The tokenizer
  of the pretrained encoder tokenises each sentence and adds `[CLS]` and `[SEP]`. Sentences of more than `length` tokens
  are cut, and shorter sentences are filled up with `encoders.PADDING`.

  Raises `ValueError` for a missing file, for a line of another form, for a missing package and for `length < 3`.
  """
  if length < 3:
    raise ValueError(f'data.load: sequence_length={length} has no room for [CLS], a token and [SEP]; take 3 or more.')
  remedy = (f'{NAME!r} is not downloaded: put the sentence-level SST-2 as {", ".join(FILES.values())}, lines of '
            f'sentence<TAB>label with labels 0 and 1, into the folder {NAME!r} of data.data_dir, {str(root)!r}.')
  texts = {split: utf8(root / NAME / file, remedy).decode() for split, file in FILES.items()}
  return {split: _tokenised(text, str(root / NAME / FILES[split]), length) for split, text in texts.items()}


@functools.lru_cache(maxsize=8)  # The sets of several seeds share the arrays.
def _tokenised(text: str, path: str, length: int) -> Batch:
  """Returns the read-only arrays `inputs` and `labels` of the lines of `text`, which comes from the file `path`."""
  examples = []
  for number, line in enumerate(text.removesuffix('\n').split('\n'), 1):
    sentence, _, label = line.removesuffix('\r').rpartition('\t')
    if not sentence.strip() or label not in ('0', '1'):
      raise ValueError(f'data.load: line {number} of {path!r} is {line[:80]!r}; it must be sentence<TAB>label with a '
                       'label of 0 or 1.')
    examples.append((sentence, int(label)))
  arrays = {'inputs': tokens([sentence for sentence, _ in examples], length),
            'labels': np.array([label for _, label in examples], np.int32)}
  for array in arrays.values():
    array.setflags(write=False)
  return arrays


def tokens(sentences: Sequence[str], length: int) -> np.ndarray:
  """Returns the tokens of sentences, `int32[N, length]`, cut or filled up with `encoders.PADDING`."""
  tokenizer = _tokenizer(length)
  return np.array([tokenizer.encode(sentence).ids for sentence in sentences], np.int32)


def _tokenizer(length: int):
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise ValueError("data.load: there is no package 'tokenizers'; pip install 'sparsejax[pretrained]'.") from error
  tokenizer = tokenizers.Tokenizer.from_file(str(encoders.folder() / 'tokenizer.json'))
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=encoders.PADDING)
  return tokenizer
