"""Compares the removal of weights in blocks of steps, and in rows that are cut, with one outer product a step."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.post_training import one_by_one, repairs

ROWS, INPUTS = 3, 24  # two rows at a time, so that the last part is filled up


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
  """Lets a block end in the middle of a stage, and cuts the rows although they are short."""
  monkeypatch.setattr(one_by_one, '_BLOCK', 4)
  monkeypatch.setattr(one_by_one, '_SMALL', 6)
  monkeypatch.setattr(one_by_one, '_STAGES', 2)


def drawn():
  """Returns weights, which of them are kept, and a Hessian."""
  rng = np.random.default_rng(7)
  x = rng.normal(size=(3 * INPUTS, INPUTS)) @ (np.eye(INPUTS) + 0.3 * rng.normal(size=(INPUTS, INPUTS)))
  return rng.normal(size=(ROWS, INPUTS)), rng.random((ROWS, INPUTS)) < 0.8, x.T @ x / len(x)


def settled(w, inverse, part, target):
  """Returns weights and inverse after `part` of them is set, and all others compensate: the formulas of OBC."""
  across = inverse[:, part] @ np.linalg.inv(inverse[part, part])
  w = w - across @ (w[part] - target)
  w[part] = target
  return w, inverse - across @ inverse[part]


@pytest.mark.parametrize('width, group', [(1, None), (2, None), (1, (2, 4))])
def test_units_are_removed_in_the_order_of_the_formulas(width, group):
  dense, kept, hessian = drawn()
  kept = np.repeat(kept[:, ::width], width, 1)
  inverse = np.linalg.inv(hessian)
  found = one_by_one.removals(*map(jnp.asarray, (np.float32(dense), kept, np.float32(inverse))), width=width,
                              group=group, rows=2)
  for row in range(ROWS):
    w, own, left = dense[row] * kept[row], inverse, list(range(INPUTS // width))
    for step, loss in enumerate(found.losses[row]):
      part = lambda unit: slice(unit * width, (unit + 1) * width)
      losses = {unit: w[part(unit)] @ np.linalg.inv(own[part(unit), part(unit)]) @ w[part(unit)] for unit in left
                if group is None or sum(other // group[1] == unit // group[1] for other in left) > group[0]}
      unit = min(losses, key=lambda unit: losses[unit] if kept[row, unit * width] else -np.inf)
      assert found.step[row, unit] == step
      np.testing.assert_allclose(loss, losses[unit] / 2 if kept[row, unit * width] else -np.inf, rtol=1e-3)
      w, own = settled(w, own, part(unit), 0)
      left.remove(unit)
    assert all(found.step[row, unit] == len(found.losses[row]) for unit in left)


@pytest.mark.parametrize('most', [None, 22])
def test_rounding_and_least_squares_are_those_of_the_formulas_with_and_without_the_pruned_inputs(most):
  dense, kept, hessian = drawn()
  grid = repairs.Grid(3)
  w, mask, h = map(jnp.asarray, (np.float32(dense * kept), kept, np.float32(hessian)))
  step, below = grid.fitted(w)
  found = one_by_one.roundings(w, mask, h, (step, below), grid.rounded, most=most, rows=2)
  best = one_by_one.best_weights(jnp.asarray(np.float32(dense)), mask, h, most=most, rows=2)
  for row in range(ROWS):
    own = np.flatnonzero(kept[row])
    solved = np.linalg.solve(hessian[np.ix_(own, own)], (hessian @ dense[row])[own])
    np.testing.assert_allclose(best[row, own], solved, atol=1e-3)
    weights, inverse, left = dense[row, own], np.linalg.inv(hessian[np.ix_(own, own)]), set(range(len(own)))
    s, z = float(step[row]), float(below[row])
    for _ in own:
      closest = s * (np.clip(np.round(weights / s) + z, 0, 7) - z)
      errors = {j: weights[j] - closest[j] for j in left}
      outside = max(map(abs, errors.values())) > s / 2 * (1 + 1e-5)
      cost = lambda j, e=errors, i=inverse: e[j]**2 / i[j, j]
      j = max(left, key=lambda j: abs(errors[j])) if outside else min(left, key=cost)
      weights, inverse = settled(weights, inverse, slice(j, j + 1), closest[j:j + 1])
      left.remove(j)
    np.testing.assert_allclose(found[row, own], weights, atol=1e-4)
  assert not np.any(np.asarray(found)[~kept]) and not np.any(np.asarray(best)[~kept])
