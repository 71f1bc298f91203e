"""Matches paths with globs, in time that grows with the length of the path times the length of the glob.

    globs.matches('mlp/*/kernel', 'blocks/3/mlp/Dense_0/kernel')   # True
    globs.matches('**/kernel', 'blocks/3/kernel')                  # True
    globs.renamed('blocks/3/rho', '*/rho', '*/mean')               # 'blocks/3/mean'

A regular expression would try every way to divide a path among several stars, and a command line may have twenty.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class _Program(NamedTuple):
  """A `_Program` is a glob as sets of its tokens: bit i of each field belongs to token i, bit `length` to the end.

  `letters` maps a letter to the tokens that it matches, `other` has the tokens `?`. A token of `keys` matches any
  letters of one key, a token of `paths` any letters. A token of `empty` may match nothing, and one of `skipped` may be
  left out together with the next token. A slash ends a token of `ended`.
  """

  length: int
  letters: dict[str, int]
  other: int
  keys: int
  paths: int
  empty: int
  skipped: int
  ended: int


@functools.lru_cache(maxsize=1 << 16)
def matches(glob: str, path: str) -> bool:
  """Returns whether `glob` matches `path` or a tail of `path` that begins at a key.

  `*` matches any characters of one key, `**` any number of keys, and `?` one character of a key. A glob that begins
  with `/` matches whole paths only.
  """
  program = _program(glob)
  at = _without_letters(program, 1)  # Bit i says that token i is next.
  for letter in path:
    on = at & program.letters.get(letter, 0)
    if letter == '/':
      at = (on | at & program.ended) << 1 | at & program.paths
    else:
      at = (on | at & program.other) << 1 | at & (program.paths | program.keys)
    if not at:
      return False
    at = _without_letters(program, at)
  return bool(at >> program.length & 1)


def tails(path: str, names: Iterable[str]) -> list[str]:
  """Returns the `names` that can mean the leaf at `path`.

  The result is `path` alone if `names` has it. Otherwise it is every name that is a tail of `path`, or of which `path`
  is a tail.
  """
  if isinstance(names, Mapping) and path in names:  # the usual case, without a look at all names
    return [path]
  matching = [name for name in names if name == path or name.endswith('/' + path) or path.endswith('/' + name)]
  return [path] if path in matching else matching


def renamed(path: str, glob: str, other: str) -> str | None:
  """Returns `path`, which `glob` matches, with the letters of `glob` replaced by those of `other`, or `None`.

  The result is `None` where `glob` does not match. Both globs have the same wildcards in the same order:
  `renamed('a/b/rho', '**/rho', '**/mean')` is `'a/b/mean'`.
  Raises `ValueError` for globs whose wildcards differ.
  """
  mine, theirs = (_WILD.split('/' + text.strip('/')) for text in (glob, other))
  if mine[1::2] != theirs[1::2] or glob.startswith('/') != other.startswith('/'):
    raise ValueError(f'sparsejax: the globs {glob!r} and {other!r} have different wildcards, so that a path that '
                     "matches one does not tell the other's; write both alike, as in {'**/rho': '**/mean'}.")
  before = '()' if glob.startswith('/') else '(.*?)'
  found = re.fullmatch(before + ''.join(_HELD.get(text, re.escape(text)) for text in mine), '/' + path, re.DOTALL)
  if found is None:
    return None
  first, *rest = found.groups()
  return (first + theirs[0] + ''.join(a + b for a, b in zip(rest, theirs[2::2]))).lstrip('/')


_WILD = re.compile(r'(\*\*/|\*\*|\*|\?)')
_HELD = {'**/': '((?:.*/)?)', '**': '(.*)', '*': '([^/]*)', '?': '([^/])'}


def _without_letters(program: _Program, at: int) -> int:
  """Returns `at` with the tokens that are next if tokens match nothing."""
  while True:
    further = at | (at & program.empty) << 1 | (at & program.skipped) << 2
    if further == at:
      return at
    at = further


@functools.lru_cache(maxsize=4096)
def _program(glob: str) -> _Program:
  tokens = [] if glob.startswith('/') else ['**/', '/']
  for part in re.findall(r'\*\*/|\*\*|\*|.', glob.strip('/'), re.DOTALL):
    tokens += ['**/', '/'] if part == '**/' else [part]
  letters: dict[str, int] = {}
  sets = dict.fromkeys(('?', '*', '**', '**/', 'ended'), 0)
  for i, token in enumerate(tokens):
    if token in sets:
      sets[token] |= 1 << i
    elif i and tokens[i - 1] == '**/':  # its second half, which ends at a slash
      sets['ended'] |= 1 << i
    else:
      letters[token] = letters.get(token, 0) | 1 << i
  deep = sets['**/']
  return _Program(len(tokens), letters, sets['?'], sets['*'], sets['**'] | sets['ended'],
                  sets['*'] | sets['**'] | deep, deep, sets['ended'])
