"""Counts code lines: lines without docstrings, comments and blanks."""

import ast
import functools
import io
import tokenize

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_IDLE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def numbers(source):
  """The numbers of the lines of `source` that hold code."""
  held = set()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type not in _IDLE:
      held.update(range(token.start[0], token.end[0] + 1))
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and ast.get_docstring(node) is not None:
      held.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  return held


@functools.cache  # Several laws read the same files.
def of_functions(source):
  """Returns name, first line and code lines of each function of `source`, functions inside of functions too."""
  held = numbers(source)
  # The signature counts for nothing: arguments one a line are easier to read.
  return [(node.name, node.lineno, len(held.intersection(range(node.body[0].lineno, node.end_lineno + 1))))
          for node in ast.walk(ast.parse(source)) if isinstance(node, _FUNCTIONS)]
