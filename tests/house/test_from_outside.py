"""Tests that a pattern and a recipe from outside are one new file and one line of a table, through public names only.

A format from outside is in `tests/formats/test_table.py`; clients of programs are in `tests/programs/test_client.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj

UNIFORM = sj.allocation.uniform

# What a user's own file would hold.


@dataclasses.dataclass(frozen=True)
class Rows:
  """A `Rows` keeps or prunes all weights of one input together."""

  sparsity: float | None = 0.5
  static = True
  group = (1, 1)

  def __str__(self):
    return 'rows'

  def validate(self, shape, axes):
    return None if len(axes.contracted) == 1 else 'rows need one contracted axis'

  def pooled(self, scores, axes):
    along = tuple(a for a in range(scores.ndim) if a not in axes.contracted)
    whole = lambda kept: jnp.broadcast_to(jnp.expand_dims(kept, along), scores.shape)
    return sj.types.Pooled(jnp.sum(scores, along), (), whole)

  def __call__(self, scores, count=None, axes=sj.types.Axes((0,), (1,))):
    units = self.pooled(scores, axes)
    count = sj.counts.kept_of(self.sparsity, units.scores.size) if count is None else count
    return units.whole(sj.ranking.top_n(units.scores, count))

  def violation(self, w, axes, sparsity=None):
    kept = int(jnp.sum(self.pooled(jnp.abs(w), axes).scores > 0))
    allowed = sj.counts.kept_of(self.sparsity if sparsity is None else sparsity, w.shape[axes.contracted[0]])
    return '' if kept <= allowed else f'{kept} rows are kept, {allowed} asked'


def input_pruning(inner, pattern=Rows(), **options):  # noqa: B008
  """Returns `inner` with whole inputs pruned by magnitude, once."""
  selection = sj.selections.leafwise(pattern, update=sj.updates.prune_to)
  return sj.transforms.sparsify(inner, sj.flows.hard(), selection, refresh=sj.schedules.once(0), **options)


@pytest.fixture
def added(monkeypatch):
  """Adds the one line of each table."""
  monkeypatch.setitem(sj.patterns.TABLE, 'rows', sj.patterns.Spelling('rows', Rows, ('rows',)))
  monkeypatch.setitem(sj.recipes.TABLE, 'input_pruning', input_pruning)


def params():
  return {'a': {'kernel': jax.random.normal(jax.random.key(0), (8, 6))},
          'b': {'kernel': jax.random.normal(jax.random.key(1), (6, 4)), 'bias': jnp.ones(4)}}


def trained(tx, steps=3):
  weights = params()
  state = tx.init(weights)
  for _ in range(steps):
    grads = jax.tree.map(jnp.ones_like, weights)
    updates, state = tx.update(grads, state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights, state


@pytest.mark.parametrize('pattern', ['rows', None])
def test_a_recipe_and_a_pattern_from_outside_are_trained_from_a_configuration(added, pattern):
  config = {'name': 'input_pruning', **({'pattern': pattern} if pattern else {})}
  weights, state = trained(sj.recipes.from_config(optax.sgd(0.1, momentum=0.9), config, total_steps=3))
  for layer in ('a', 'b'):
    zero = np.asarray(weights[layer]['kernel'] == 0)
    assert set(zero.mean(1)) == {0.0, 1.0} and zero.mean() == 0.5
  found = sj.check(weights, state)
  assert 'rows' in str(found) and found.achieved == 0.5
  weights['a']['kernel'] = weights['a']['kernel'].at[:].set(1.0)
  with pytest.raises(ValueError, match='a/kernel'):
    sj.check(weights, state)


@pytest.mark.parametrize('name, options', [
    ('gradual_magnitude', {'end': 3}), ('static_sparse', {'key': jax.random.key(0), 'allocation': UNIFORM}),
    ('magnitude_at_init', {'allocation': UNIFORM}), ('sr_ste', {}), ('mdgf', {'decay': sj.schedules.linear(end=2)})])
def test_recipes_take_a_pattern_from_outside(name, options):
  weights, state = trained(sj.recipes.TABLE[name](optax.sgd(0.1), pattern=Rows(0.5), **options), steps=4)
  kernels = [weights[layer]['kernel'] for layer in ('a', 'b')]
  rows = np.concatenate([np.asarray(jnp.all(w == 0, 1)) for w in kernels])
  assert rows.mean() == 0.5 and all(set(np.asarray(w == 0).mean(1)) == {0.0, 1.0} for w in kernels)
  assert sj.check(weights, state).achieved == pytest.approx(sum((w == 0).sum() for w in kernels) / 72)


def test_without_its_line_a_name_is_unknown():
  with pytest.raises(ValueError, match="unknown recipe 'input_pruning'.*Valid: "):
    sj.recipes.from_config(optax.sgd(0.1), {'name': 'input_pruning'}, total_steps=3)
  with pytest.raises(ValueError, match="unknown pattern 'rows'.*Valid: "):
    sj.patterns.parse('rows')
