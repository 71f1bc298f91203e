"""Composes the texts of refusals, which name the function, the parameter's path and shape, the problem and the remedy.

    raise errors.unknown('recipes.from_config', 'recipe', 'sr_st', ['mdgf', 'sr_ste', 'ste'])
    # ValueError: recipes.from_config: unknown recipe 'sr_st'. Did you mean 'sr_ste' or 'ste'? Valid: mdgf, sr_ste, ste.
"""

import difflib
from collections.abc import Iterable


def unknown(function: str, what: str, name: object, valid: Iterable[str]) -> ValueError:
  """Returns the error for a `name` that is not among the `valid` names.

  The message offers up to three similar names first, and then lists all valid names in alphabetical order. `what` says
  which kind of name was expected, for example 'recipe'.
  """
  valid = sorted(valid)
  close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
  hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
  return ValueError(f'{function}: unknown {what} {name!r}.{hint} Valid: {", ".join(valid) or "none"}.')


def at_leaf(function: str, path: str, shape: tuple[int, ...], problem: str) -> ValueError:
  """Returns the error for a parameter that `function` cannot use; the text of `problem` must end in the remedy."""
  return ValueError(f'{function}: parameter {path!r} of shape {tuple(shape)}: {problem}')


def some(names: Iterable[str], most: int = 12) -> str:
  """Returns the first `most` names, quoted and separated by commas, and says how many more names there are."""
  names = list(names)
  more = f', and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(map(repr, names[:most])) + more
