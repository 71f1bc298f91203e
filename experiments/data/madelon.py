"""Draws a set like madelon by scikit-learn: 500 features, of which the first 20 carry the two classes.

    config.data.name = 'madelon'
"""

import numpy as np

INFORMATIVE, REDUNDANT, FEATURES, EXAMPLES = 5, 15, 500, 2600  # madelon has these for training and validation
CLUSTERS = 15  # of each class; with all 16, scikit-learn would hand out classes by one feature alone


def drawn() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns features `float64[N, 500]` and labels `int64[N]` of `train` and `test`, a random fifth, always the same."""
  from sklearn import datasets  # An import at the top would cost the load of each claim half a second.

  x, y = datasets.make_classification(
      EXAMPLES, FEATURES, n_informative=INFORMATIVE, n_redundant=REDUNDANT, n_clusters_per_class=CLUSTERS, flip_y=0.01,
      scale=None, shift=None, shuffle=False, random_state=0)
  order = np.random.default_rng(0).permutation(EXAMPLES)
  test, train = order[::5], np.delete(order, slice(None, None, 5))
  return {'train': (x[train], y[train]), 'test': (x[test], y[test])}
