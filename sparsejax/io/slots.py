"""Tells the parameters in a checkpoint from the copies of them that an optimizer keeps: moments, masters, averages.

    slots.left_out({'params/w': (8, 8), 'opt_state/0/mu/w': (8, 8), 'step': ()})    # ['opt_state/0/mu/w']
"""

import re
from collections.abc import Mapping

_STATE = re.compile(r'opt(imi[sz]ers?)?(_?states?)?|optimi[sz]er_?state_?dict|slots?')
_COPY = re.compile(
  r'mu|nu|m|v|vr|vc|v_row|v_col|exp_avg(_sq)?|max_exp_avg_sq|moments?\d?|first_moment|second_moment|momentum(_buffer)?'
  r'|velocity|trace|sum_of_squares|masters?(_weights|_params|_copy)?|fp32(_\w+)?|masks?|grads?|gradients?|acc(um\w*)?'
  r'|(\w+_)?(ema|averaged?|swa|polyak|shadow)(_\w+)?|teacher|target(_params)?')


def left_out(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Returns the paths of the leaves that an optimizer keeps beside the parameters, in the order of `shapes`.

  `shapes` maps paths to shapes; dots separate keys like slashes. A leaf below a key such as `opt_state` is left out if
  a leaf is not below such a key. A leaf below a key such as `mu`, `master` or `ema` is left out only if it is the copy
  of another leaf: of the same shape, and with the same keys behind `mu` as the other leaf has at the end of its path.
  """
  keys = {path: re.split(r'[/.]', path) for path in shapes}
  state = [path for path in shapes if any(map(_STATE.fullmatch, map(str.lower, keys[path][:-1])))]
  others = [path for path in shapes if path not in set(state)]
  if not others:
    return []
  originals = [path for path in others if not _copies(keys[path])]
  tails = {(tuple(keys[path][i:]), tuple(shapes[path])) for path in originals for i in range(len(keys[path]))}
  copies = {path for path in others if any((tuple(tail), tuple(shapes[path])) in tails for tail in _copies(keys[path]))}
  return [path for path in shapes if path in copies or path in set(state)]


def _copies(keys: list[str]) -> list[list[str]]:
  """Returns the keys behind each key that names a copy; of a path that ends in such a key, the keys before it."""
  named = [i for i, key in enumerate(keys) if _COPY.fullmatch(key.lower())]
  return [keys[i + 1:] if i + 1 < len(keys) else keys[:-1] for i in named if len(keys) > 1]
