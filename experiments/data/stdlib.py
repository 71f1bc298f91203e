"""Reads the standard library of the running Python as text: sources for a language model, docstrings as sentences.

    sources()                    # [('abc.py', b'...'), ...], sorted by name
    docstrings()                 # [('Return the absolute value.', 0), ...]: 0 of a function, 1 of a class
"""

import ast
import functools
import pathlib
import sysconfig
import warnings

FUNCTION, CLASS = 0, 1  # labels of docstrings


@functools.cache
def sources() -> tuple[tuple[str, bytes], ...]:
  """Returns name and content of each module of the standard library that is one UTF-8 file, without packages."""
  files = sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py'))
  return tuple((file.name, content) for file in files if _is_utf8(content := file.read_bytes()))


@functools.cache
def docstrings() -> tuple[tuple[str, int], ...]:
  """Returns the first line of each docstring in `sources()` and the label of what has the docstring; no line twice.

  Lines of fewer than four words are left out.
  """
  found: dict[str, int] = {}
  for _, content in sources():
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of escapes in strings
      nodes = list(ast.walk(ast.parse(content)))
    for node in nodes:
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
        found.setdefault(text.split('\n')[0], CLASS if isinstance(node, ast.ClassDef) else FUNCTION)
  return tuple((line, label) for line, label in found.items() if len(line.split()) >= 4)


def _is_utf8(content: bytes) -> bool:
  try:
    content.decode('utf-8')
  except UnicodeDecodeError:
    return False
  return True
