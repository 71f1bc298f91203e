"""Counts code lines: lines without docstrings, comments and blanks."""

import ast
import functools

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_TEXTS = (ast.Constant, ast.JoinedStr)


def numbers(source):
  """The numbers of the lines of `source` that hold code."""
  held = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and line.strip()[0] != '#'}
  nodes = [*ast.walk(ast.parse(source))]
  for text in (node for node in nodes if isinstance(node, _TEXTS) and node.end_lineno > node.lineno):
    held.update(range(text.lineno, text.end_lineno + 1))  # also lines of a text that are blank, or begin with #
  for node in nodes:
    if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and ast.get_docstring(node, clean=False) is not None:
      held.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  return held


@functools.cache  # Several laws read the same files.
def of_functions(source):
  """Returns name, first line and code lines of each function of `source`, functions inside of functions too."""
  held = numbers(source)
  # The signature counts for nothing: arguments one a line are easier to read.
  return [(node.name, node.lineno, len(held.intersection(range(node.body[0].lineno, node.end_lineno + 1))))
          for node in ast.walk(ast.parse(source)) if isinstance(node, _FUNCTIONS)]
