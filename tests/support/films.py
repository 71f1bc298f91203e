"""Writes a package of ratings of the form of the one that carries MovieLens-100K."""

import numpy as np

from experiments.data import movielens

STARS = [4.0, 5.0, 1.0, 4.0, 4.0, 5.0, 2.0, 4.0]
ROWS = [(9, 3, 30), (9, 5, 20), (9, 6, 5), (9, 8, 10), (2, 5, 7), (2, 6, 7), (2, 8, 8), (11, 8, 1)]  # user, item, time


def package(folder, monkeypatch, drawn=0):
  """Returns `folder` with ratings: eight, or `drawn` ones of 12 users and 16 items. The reader finds the folder."""
  rows = [(user, item, stars, time) for (user, item, time), stars in zip(ROWS, STARS)]
  if drawn:
    pairs = np.random.default_rng(0).permutation(12 * 16)[:drawn]
    rows = [(pair // 16, pair % 16, 1 + 4 * (pair % 3 > 0), i) for i, pair in enumerate(pairs.tolist())]
  file = folder / movielens.FILE
  file.parent.mkdir(parents=True)
  file.write_text('\n'.join([movielens.COLUMNS, *('\t'.join(map(str, row)) for row in rows)]) + '\n')
  monkeypatch.setattr(movielens, 'folder', lambda: folder)
  return folder
