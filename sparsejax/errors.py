"""Composes the texts of refusals, which name the function, the parameter's path and shape, the problem and the remedy.

    raise errors.unknown('recipes.from_config', 'recipe', 'sr_st', ['mdgf', 'sr_ste', 'ste'])
    # ValueError: recipes.from_config: unknown recipe 'sr_st'. Did you mean 'sr_ste' or 'ste'? Valid: mdgf, sr_ste, ste.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


def unknown(function: str, what: str, name: object, valid: Iterable[str]) -> ValueError:
  """Returns the error for a `name` that is not among the `valid` names.

  The message offers up to three similar names first, and then lists all valid names in alphabetical order. `what` says
  which kind of name was expected, for example 'recipe'.
  """
  valid = sorted(valid)
  hint = closest(str(name), valid)
  return ValueError(f'{function}: unknown {what} {name!r}.{hint} Valid: {", ".join(valid) or "none"}.')


def at_leaf(function: str, path: str, shape: tuple[int, ...], problem: str) -> ValueError:
  """Returns the error for a parameter that `function` cannot use; the text of `problem` must end in the remedy."""
  return ValueError(f'{function}: parameter {path!r} of shape {tuple(shape)}: {problem}')


class Problem(NamedTuple):
  """A `Problem` says why one parameter is refused: its path, its shape, and the reason, which ends in the remedy."""

  path: str
  shape: tuple[int, ...]
  reason: str


class AtLeaves(ValueError):
  """An `AtLeaves` is one refusal of several parameters, made by `at_leaves`. `trees.refused` adds the line to paste."""

  function: str
  problems: tuple[Problem, ...]


def at_leaves(function: str, problems: Sequence[Problem], line: str = '') -> AtLeaves:
  """Returns one error for all parameters that `function` cannot use, grouped by equal reason.

  `problems`: at least one `Problem`, in the order of the parameters. `line`: the argument that leaves them all dense,
  for example "where=sj.trees.all_but('stem/kernel')". The message ends in the line, alone on its own last line.
  """
  groups: dict[str, list[str]] = {}
  for path, shape, reason in problems:
    groups.setdefault(reason, []).append(f'{path!r} of shape {tuple(shape)}')
  several = len(problems) > 1
  parts = [f'parameter{"s" if len(where) > 1 else ""} {", ".join(where)}: {reason}' for reason, where in groups.items()]
  text = f'{function}: ' + (f'{len(problems)} parameters are refused.\n' if len(groups) > 1 else '') + '\n'.join(parts)
  text += f'\nTo leave {"them" if several else "it"} dense:\n{line}' if line else ''
  error = AtLeaves(text)
  error.function, error.problems = function, tuple(Problem(*problem) for problem in problems)
  return error


def closest(name: str, valid: Iterable[str], most: int = 3) -> str:
  """Returns ' Did you mean ...?' with up to `most` names like `name`, or an empty string if none is like it."""
  close = difflib.get_close_matches(name, sorted(valid), n=most, cutoff=0.5)
  return f' Did you mean {" or ".join(map(repr, close))}?' if close else ''


def some(names: Iterable[str], most: int = 12) -> str:
  """Returns the first `most` names, quoted and separated by commas, and says how many more names there are."""
  names = list(names)
  more = f', and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(map(repr, names[:most])) + more
