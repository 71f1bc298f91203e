"""Tests `prune`: its masks equal those of an oracle in NumPy, however the program is written."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import calibration, scores
from sparsejax.post_training import Recipe

RNG = np.random.default_rng(0)
HALF = sj.NM(2, 4)


def normal(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def by_inputs(pattern=HALF, statistic=calibration.moments, **words):
  """Returns the recipe of this file: Wanda."""
  return Recipe(pattern, score=scores.wanda, statistic=statistic, **words)


# A chain of three layers is written in many ways, all with the same answer.

STACK = {'w': normal(3, 8, 8), 'head': normal(8, 2)}
BATCHES = [normal(5, 8), normal(7, 8) * 3]


def tanh(x, w):
  return jnp.tanh(x @ w)


@jax.custom_vjp
def own_gradient(x, w):
  return tanh(x, w)


own_gradient.defvjp(lambda x, w: (tanh(x, w), (x, w)), lambda held, dy: held)


@jax.custom_jvp
def own_tangent(x, w):
  return tanh(x, w)


own_tangent.defjvp(lambda primals, tangents: (tanh(*primals), tangents[0]))


def scanned(step, **options):
  return lambda p, x: lax.scan(lambda x, w: (step(x, w), None), x, p['w'], **options)[0] @ p['head']


def looped(step):
  return lambda p, x: functools.reduce(step, [p['w'][i] for i in range(3)], x) @ p['head']


def by_round(p, x):
  return lax.fori_loop(0, 3, lambda i, x: tanh(x, p['w'][i]), x) @ p['head']


def while_counted(p, x):
  step = lambda held: (held[0] + 1, tanh(held[1], lax.dynamic_index_in_dim(p['w'], held[0], keepdims=False)))
  return lax.while_loop(lambda held: held[0] < 3, step, (0, x))[1] @ p['head']


def chosen(x, w):
  return lax.cond(x.sum() < 1e9, tanh, lambda x, w: x, x, w)


WAYS = {
  'python': looped(tanh), 'jit': jax.jit(looped(jax.jit(tanh))), 'scan': scanned(tanh),
  'remat': scanned(jax.checkpoint(tanh)), 'unrolled': scanned(tanh, unroll=3), 'rounds': by_round,
  'while': while_counted, 'cond': scanned(chosen), 'custom_vjp': scanned(own_gradient),
  'custom_jvp': looped(own_tangent),
  'transposed': looped(lambda x, w: jnp.tanh((w.T @ x.T).T)),
  'tokens in front': lambda p, x: looped(tanh)(p, x[None])[0],
}


def two_of_four(values):
  """Returns the 2:4 mask along the first axis, written out: fewer than two of a group are larger."""
  groups = values.reshape(-1, 4, values.shape[1])
  ahead = (groups[:, None] > groups[:, :, None]).sum(2)
  return (ahead < 2).reshape(values.shape)


def chain_masks(sequential):
  """The masks of `STACK`, in NumPy and float64: each matrix by the norms of its inputs."""
  dense = [np.asarray(w, np.float64) for w in STACK['w']]
  data, masks = [np.concatenate(BATCHES).astype(np.float64)] * 2, []
  for w in dense:
    x = data[1] if sequential == 'weight' else data[0]
    masks.append(two_of_four(np.abs(w) * np.sqrt((x**2).sum(0))[:, None]))
    data = [np.tanh(data[0] @ w), np.tanh(data[1] @ (w * masks[-1]))]
  return np.stack(masks)


@pytest.mark.parametrize('way', WAYS)
def test_however_a_program_is_written_its_matrices_are_pruned_one_after_the_other(way):
  result = sj.prune(WAYS[way], STACK, BATCHES, by_inputs())
  np.testing.assert_array_equal(result.masks['w'], chain_masks('weight'))
  np.testing.assert_array_equal(result.params['w'], jnp.where(result.masks['w'], STACK['w'], 0))
  assert result.params['head'] is STACK['head'] and result.masks['head'] is True
  assert [row.rows for row in result.report.rows] == [12] * 3
  assert 'left dense: head (the last product of the program)' in str(result.report)


@pytest.mark.parametrize('sequential, same', [('dense', 'dense'), (lambda path: 'all', 'weight')])
def test_everything_dense_or_by_blocks(sequential, same):
  """In a scan, one key is one block of each round: blocks of one matrix are measured like matrices."""
  result = sj.prune(WAYS['scan'], STACK, BATCHES, by_inputs(), sequential=sequential)
  np.testing.assert_array_equal(result.masks['w'], chain_masks(same))
  assert (chain_masks('dense') != chain_masks('weight')).any()


def test_a_gram_matrix_and_its_diagonal_choose_alike_and_measure_the_same_error():
  by_diagonal, by_gram = (sj.prune(WAYS['scan'], STACK, BATCHES, by_inputs(statistic=statistic))
                          for statistic in (calibration.moments, calibration.gram))
  np.testing.assert_array_equal(by_diagonal.masks['w'], by_gram.masks['w'])
  x = np.concatenate(BATCHES)
  for a, b, w, kept in zip(by_diagonal.report.rows, by_gram.report.rows, STACK['w'], by_gram.masks['w']):
    w, kept = np.asarray(w), np.asarray(kept)
    error = np.square(x @ (w * ~kept)).sum() / np.square(x @ w).sum()
    np.testing.assert_allclose([a.before, a.after, b.before, b.after], error, rtol=1e-4)
    x = np.tanh(x @ (w * kept))


# Products of other kinds. A case has the function, the parameters, and the inputs of each matrix `[L, R, K]` of 'w'.


def rows_of(x, *axes):
  return np.moveaxis(np.asarray(x), axes, range(-len(axes), 0)).reshape(-1, int(np.prod([x.shape[a] for a in axes])))


X = normal(6, 4, 8)
SIZES = jnp.asarray([3, 0, 5], jnp.int32)


def windows(x, taps):
  """Returns the windows of `x`, `[batch, length, in]`, padded as by 'SAME', as rows `[batch * length, taps * in]`."""
  padded = np.pad(np.asarray(x), ((0, 0), (taps // 2, taps // 2), (0, 0)))
  return np.stack([padded[:, i:i + x.shape[1]] for i in range(taps)], 2).reshape(-1, taps * x.shape[2])


def convolved(groups):
  return lambda p, x: lax.conv_general_dilated(x, p['w'], (1,), 'SAME', feature_group_count=groups,
                                               dimension_numbers=('NWC', 'WIO', 'NWC'))


def merged(w):  # a kernel `[taps, in, out]` as a matrix
  return np.asarray(w).reshape(-1, w.shape[-1])


PRODUCTS = {
  'three projections': (lambda p, x: jnp.einsum('btk,kshd->bshtd', x, p['w']), (8, 3, 2, 4),
                        lambda w: [(rows_of(X, 2), w.reshape(8, -1))]),
  'attention out': (lambda p, x: jnp.einsum('bthd,hdo->bto', x.reshape(-1, 4, 2, 4), p['w']), (2, 4, 5),
                    lambda w: [(rows_of(X, 2), w.reshape(8, 5))]),
  'from the left': (lambda p, x: jnp.einsum('ok,btk->obt', p['w'], x), (5, 8), lambda w: [(rows_of(X, 2), w.T)]),
  'experts': (lambda p, x: jnp.einsum('ebk,eko->ebo', x.transpose(1, 0, 2), p['w']), (4, 8, 5),
              lambda w: [(X[:, i], w[i]) for i in range(4)]),
  'ensemble': (jax.vmap(lambda p, x: x @ p, (0, None)), (3, 8, 5), lambda w: [(rows_of(X, 2), each) for each in w]),
  'convolution': (convolved(1), (3, 8, 5), lambda w: [(windows(X, 3), merged(w))]),
  'grouped': (convolved(2), (3, 4, 6), lambda w: [
      (windows(X[..., 4 * g:4 * g + 4], 3), merged(w[..., 3 * g:3 * g + 3])) for g in range(2)]),
}


@pytest.mark.parametrize('name', PRODUCTS)
def test_every_kind_of_product_is_a_stack_of_matrices(name):
  apply, shape, expected = PRODUCTS[name]
  w = normal(*shape)
  if name == 'ensemble':
    apply = lambda p, x, apply=apply: apply(p['w'], x)
  result = sj.prune(apply, {'w': w}, [X[:2], X[2:]], by_inputs(), where=sj.trees.named('w'))
  x, weights = zip(*expected(np.asarray(w)))
  masks = zip(*expected(np.asarray(result.masks['w'])))
  for inputs, matrix, mask in zip(x, weights, list(masks)[1]):
    np.testing.assert_array_equal(mask, two_of_four(np.abs(matrix) * np.sqrt(np.square(inputs).sum(0))[:, None]))
  (row,) = result.report.rows
  assert row.rows == len(x[0]) and row.achieved == 0.5 and row.shape[0] in (1, len(x))
  total = lambda error: sum(np.square(a @ b).sum() for a, b in zip(x, error))
  pruned = total([m * ~k for m, k in zip(weights, list(zip(*expected(np.asarray(result.masks['w']))))[1])])
  np.testing.assert_allclose(row.after, pruned / total(weights), rtol=1e-4)


def ragged(p, x):
  return lax.ragged_dot(x.reshape(-1, 8)[:8], p['w'], SIZES)


def slots(p, x):
  """Runs experts with five slots each, of which `SIZES` are filled."""
  filled = jnp.arange(5)[None] < SIZES[:, None]
  return jnp.einsum('esk,eko->eso', jnp.where(filled[..., None], x.reshape(-1, 8)[:15].reshape(3, 5, 8), 0), p['w'])


@pytest.mark.parametrize('apply', [ragged, slots])
def test_an_expert_without_tokens_is_refused_or_pruned_by_magnitude_or_left(apply):
  params = {'w': normal(3, 8, 4)}
  prune = functools.partial(sj.prune, apply, params, [X], recipe=by_inputs(), where=sj.trees.named('w'))
  with pytest.raises(ValueError, match=r"prune: parameter 'w\[matrix 1\]'.*0 rows.*unseen='magnitude'"):
    prune()
  masks = {unseen: prune(unseen=unseen).masks['w'] for unseen in ('magnitude', 'dense')}
  np.testing.assert_array_equal(masks['magnitude'][1], two_of_four(np.abs(np.asarray(params['w'][1]))))
  assert masks['dense'][1].all()
  for i in (0, 2):
    first = 0 if i == 0 else 3 if apply is ragged else 10
    x = np.asarray(X.reshape(-1, 8))[first:first + int(SIZES[i])]
    mask = two_of_four(np.abs(np.asarray(params['w'][i])) * np.sqrt(np.square(x).sum(0))[:, None])
    np.testing.assert_array_equal(masks['magnitude'][i], mask)
    np.testing.assert_array_equal(masks['dense'][i], mask)
  result = prune(recipe=by_inputs(statistic=calibration.gram), unseen='dense')
  (row,) = result.report.rows
  assert 'matrices 1: left dense' in row.note and row.each == (3, 0, 5) and '0-5' in str(result.report)
  np.testing.assert_array_equal(result.masks['w'], masks['dense'])  # the Gram matrix of an expert is that of its tokens


def test_a_weight_that_is_used_several_times_is_pruned_once_by_the_rows_of_all_its_uses():
  w = normal(8, 8)
  twice = lambda p, x: jnp.tanh(jnp.tanh(x @ p['w']) @ p['w'])
  recurrent = lambda p, x: lax.scan(lambda x, _: (jnp.tanh(x @ p['w']), None), x, length=2)[0]
  x = np.asarray(X[:, 0])
  both = np.concatenate([x, np.tanh(x @ np.asarray(w))])
  expected = two_of_four(np.abs(np.asarray(w)) * np.sqrt(np.square(both).sum(0))[:, None])
  for apply in (twice, recurrent):
    result = sj.prune(apply, {'w': w}, [X[:2, 0], X[2:, 0]], by_inputs(), where=sj.trees.named('w'))
    np.testing.assert_array_equal(result.masks['w'], expected)
    assert [row.rows for row in result.report.rows] == [12]


def routed(p, x):
  return lax.switch((x.sum() > 0).astype(jnp.int32), [lambda x: x @ p['w'][0], lambda x: tanh(x, p['w'][1])], x)


def picked(p, x):
  i = (x.sum() > 0).astype(jnp.int32)
  return tanh(tanh(x, p['w'][i]), p['w'][1 - i])


def rounds(p, x):
  return lax.while_loop(lambda x: jnp.abs(x).sum() < 100, lambda x: x @ p['w'][0] * 4, x) @ p['w'][1]


@pytest.mark.parametrize('apply', [routed, picked, rounds])
def test_each_batch_goes_its_own_way(apply):
  """Compares with one product of all rows that meet each matrix, collected from the batches one by one."""
  params, batches = {'w': normal(2, 8, 8)}, [jnp.abs(X[:2, 0]), -jnp.abs(X[2:, 0]), jnp.abs(X[:4, 1])]
  seen = ([], [])
  for x in batches:
    run = sj.programs.operands(apply, lambda site: seen[int((site.weight == params['w'][1]).all())].append(site.x))
    run(params, x)
  result = sj.prune(apply, params, batches, by_inputs(), where=sj.trees.named('w'), sequential='dense')
  for rows, w, mask, row in zip(seen, params['w'], result.masks['w'], sorted(result.report.rows, key=lambda r: r.unit)):
    x = np.concatenate(rows)
    expected = two_of_four(np.abs(np.asarray(w)) * np.sqrt(np.square(x).sum(0))[:, None])
    np.testing.assert_array_equal(mask, expected)
    assert row.rows == len(x)
  sj.prune(apply, params, batches, by_inputs(), where=sj.trees.named('w'))
  with pytest.raises(ValueError, match=r"parameter 'w\[0\]'.*0 rows") if apply is routed else contextlib.nullcontext():
    sj.prune(apply, params, batches[::2], by_inputs(), where=sj.trees.named('w'))


def tied(p, ids):
  return jnp.tanh(p['embed'][ids] @ p['mid']) @ p['embed'].T


def test_a_tied_embedding_stays_dense_unless_it_is_picked_and_then_changes_in_both_uses():
  params, batch = {'embed': normal(12, 8), 'mid': normal(8, 8)}, jnp.arange(12)
  result = sj.prune(tied, params, [batch], by_inputs(), where=None)
  assert result.report.dense == {'embed': 'looked up by data'} and result.params['embed'] is params['embed']
  picked = sj.prune(tied, params, [batch], by_inputs(), where=sj.trees.named('embed'))
  x = np.tanh(np.asarray(params['embed']) @ np.asarray(params['mid']))
  expected = two_of_four((np.abs(np.asarray(params['embed'])) * np.sqrt(np.square(x).sum(0))).T).T
  np.testing.assert_array_equal(picked.masks['embed'], expected)


def test_statistics_are_shared_by_products_of_one_operand_and_stay_as_they_are():
  """Query, key and value are pruned alike whether one of them is alone or comes after the others."""
  params = {name: normal(8, 8) for name in 'qkv'}
  apply = lambda p, x: sum((x @ p[name]) * 2.0 for name in 'qkv')
  dead = [X.at[..., 3].set(0).reshape(-1, 8)]
  together = sj.prune(apply, params, dead, by_inputs(statistic=calibration.gram), where=sj.trees.named('*'))
  for name in 'qkv':
    alone = sj.prune(apply, params, dead, by_inputs(statistic=calibration.gram), where=sj.trees.named(name))
    np.testing.assert_array_equal(alone.masks[name], together.masks[name])
  assert [row.dead for row in together.report.rows] == [1, 1, 1]


def test_arguments_of_all_kinds_and_batches_of_several_shapes():
  """Tuples are positional arguments, dicts are keyword arguments; `None` and static ones go through."""
  def apply(p, x, mask=None, *, scale=1.0, deep=True):
    return looped(tanh)(p, x * scale if mask is None else x * mask) if deep else x

  once = lambda batches: np.asarray(sj.prune(apply, STACK, batches, by_inputs()).masks['w'])
  expected = chain_masks('weight')
  for batches in ([(x, None) for x in BATCHES], [{'x': x, 'deep': True} for x in BATCHES], iter(BATCHES),
                  [BATCHES[0], (BATCHES[1], jnp.ones(()))]):
    np.testing.assert_array_equal(once(batches), expected)
  with pytest.raises(ValueError, match='batch 1 runs other operations than batch 0'):
    once([BATCHES[0], {'x': BATCHES[0], 'deep': False}])


def test_nothing_that_was_given_is_changed_and_other_data_give_another_mask():
  params, batches = jax.tree.map(np.array, STACK), [np.array(x) for x in BATCHES]
  before = jax.tree.map(np.copy, (params, batches))
  first = sj.prune(WAYS['python'], params, batches, by_inputs())
  jax.tree.map(np.testing.assert_array_equal, (params, batches), before)
  other = sj.prune(WAYS['python'], params, [x * np.linspace(1, 9, 8, dtype=np.float32) for x in batches], by_inputs())
  assert (first.masks['w'] != other.masks['w']).any()


def test_a_mesh_gives_the_masks_of_one_device():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'model'))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  batches = [jnp.round(x * 4) / 4 for x in (normal(8, 8), normal(4, 8))]
  params = {'w': put(STACK['w'], None, None, 'model'), 'head': put(STACK['head'], 'model')}
  sharded = sj.prune(WAYS['scan'], params, [put(x, 'data') for x in batches], by_inputs())
  alone = sj.prune(WAYS['scan'], STACK, batches, by_inputs())
  np.testing.assert_array_equal(sharded.masks['w'], alone.masks['w'])
  assert sharded.params['w'].sharding == params['w'].sharding == sharded.masks['w'].sharding


def test_the_global_allocation_ranks_all_matrices_before_the_program_runs():
  recipe = Recipe(sj.Unstructured(0.5), allocation=sj.allocation.global_())
  params = {'a': normal(8, 8), 'b': normal(8, 8) * 9}
  result = sj.prune(lambda p, x: x @ p['a'] @ p['b'], params, [X[0]], recipe, where=sj.trees.named('*'))
  kept = [int(result.masks[name].sum()) for name in 'ab']
  assert sum(kept) == 64 and kept[1] > kept[0] and result.report.achieved == 0.5


def test_without_data_weights_are_pruned_by_magnitude():
  params = {'mlp': {'kernel': normal(8, 8), 'bias': normal(8)}, 'out': {'kernel': normal(8, 4)}}
  result = sj.prune_weights(params, '2:4', where=sj.trees.named('mlp/kernel'))
  expected = two_of_four(np.abs(np.asarray(params['mlp']['kernel'])))
  np.testing.assert_array_equal(result.masks['mlp']['kernel'], expected)
  assert result.params['out']['kernel'] is params['out']['kernel']
  assert jax.tree.leaves(result.masks)[0] is True and result.report.rows[0].achieved == 0.5
  apply, where = lambda p, x: x @ p['mlp']['kernel'], sj.trees.named('mlp/kernel')
  by_recipe = sj.prune(apply, params, [X[0]], Recipe(HALF), where=where)
  np.testing.assert_array_equal(by_recipe.masks['mlp']['kernel'], expected)


class Unhashable:
  """An `Unhashable` is a pattern of a user's own type that compares by value and has no hash."""

  def __init__(self, like):
    self.like = like

  def __getattr__(self, name):
    return getattr(vars(self)['like'], name)

  def __call__(self, *args):
    return self.like(*args)

  def __eq__(self, other):
    return isinstance(other, Unhashable) and other.like == self.like


@pytest.mark.parametrize('recipe, pattern', [(sj.recipes.wanda, sj.Unstructured(0.5)), (sj.recipes.sparsegpt, HALF)])
def test_a_pattern_without_a_hash_prunes_like_the_pattern_that_it_is(recipe, pattern):
  with pytest.raises(TypeError, match='unhashable'):
    hash(Unhashable(pattern))
  params, batches = {'w': normal(8, 4), 'head': normal(4, 2)}, [normal(16, 8)]
  own, known = (sj.prune(lambda p, x: jnp.tanh(x @ p['w']) @ p['head'], params, batches, recipe(pattern=each),
                         where=sj.trees.named('w')).masks['w'] for each in (Unhashable(pattern), pattern))
  np.testing.assert_array_equal(own, known)
