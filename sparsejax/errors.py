"""How a refusal is worded: the function, the place, what was found, and the way out."""

import difflib
from collections.abc import Iterable


def unknown(function: str, what: str, name: object, valid: Iterable[str]) -> ValueError:
  """A name that is not in the list: the closest ones first, then all of them."""
  valid = sorted(valid)
  close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
  hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
  return ValueError(f'{function}: unknown {what} {name!r}.{hint} Valid: {", ".join(valid) or "none"}.')


def at_leaf(function: str, path: str, shape: tuple[int, ...], problem: str) -> ValueError:
  """A parameter that cannot do what was asked. `problem` ends in the remedy."""
  return ValueError(f'{function}: parameter {path!r} of shape {tuple(shape)}: {problem}')


def some(names: Iterable[str], most: int = 12) -> str:
  """At most `most` of the names, and how many more there are."""
  names = list(names)
  more = f', and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(map(repr, names[:most])) + more
