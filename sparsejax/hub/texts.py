"""Reads a text as token ids through the `tokenizer.json` of a Hugging Face folder.

    tokens = texts.tokens('bert/', 'reviews.txt', length=128, padding=0)      # int32[lines, 128]
    tokens = texts.tokens('gpt2/', 'book.txt', length=128, padding=None)      # int32[windows, 128], without padding
"""

import os
import pathlib

import numpy as np

LENGTH = 128  # tokens of a row


def tokens(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, length: int = LENGTH,
           padding: int | None) -> np.ndarray:
  """Returns the token ids of a UTF-8 text, `int32[N, T]`, with the special tokens that the tokenizer adds.

  With the id `padding`, each line that is not blank is a row: cut to `length` tokens, or filled up by `padding` to the
  longest row. Without, the text is one sequence, cut into windows of `length` tokens. The last window then overlaps the
  window before, so that no token is left out, and a text of fewer tokens is one row.

  Needs the package `tokenizers`. Raises `ValueError` without the package, and for a file that cannot be read, that is
  not UTF-8, or that has no text.
  """
  encode = _tokenizer(pathlib.Path(folder) / 'tokenizer.json').encode
  lines = [line for line in _text(path).splitlines() if line.strip()]
  if not lines or length < 1:
    raise ValueError(f'hub.texts: {path} has no text, or length={length} is not positive.')
  if padding is None:
    return _windows(np.array(encode('\n'.join(lines)).ids, np.int32), length)
  rows = [encode(line).ids[:length] for line in lines]
  longest = max(map(len, rows))
  return np.array([row + [padding] * (longest - len(row)) for row in rows], np.int32)


def _windows(ids: np.ndarray, length: int) -> np.ndarray:
  width = min(length, len(ids))
  starts = [*range(0, len(ids) - width, width), len(ids) - width]
  return np.stack([ids[start:start + width] for start in starts])


def _text(path: str | os.PathLike[str]) -> str:
  try:
    return pathlib.Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'hub.texts: {path} is not UTF-8 text; convert it first, or give token ids as .npy.') from error


def _tokenizer(path: pathlib.Path):
  try:
    import tokenizers  # only texts need the package
  except ImportError as error:
    raise ValueError("hub.texts: a text needs the package 'tokenizers': pip install 'sparsejax[hub]'. Or give token "
                     'ids as .npy.') from error
  try:
    made = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
    made.no_truncation()  # the file may hold the lengths of its training, and a long text would lose its end
    made.no_padding()
    return made
  except Exception as error:  # the package raises nothing narrower
    raise ValueError(f'hub.texts: {path} cannot be read as a tokenizer ({error}). Give token ids as .npy.') from error
