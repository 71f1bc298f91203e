"""Tests what `prune` refuses, and what it does about padding, memory, old zeros and calls that were killed."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sparsejax as sj
from sparsejax import calibration, scores
from sparsejax.post_training import Recipe, memory

RNG = np.random.default_rng(1)


def normal(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


WANDA = Recipe(sj.NM(2, 4), score=scores.wanda, statistic=calibration.moments)
GRAM = Recipe(sj.NM(2, 4), score=scores.wanda, statistic=calibration.gram)
PARAMS = {'embed': normal(11, 8), 'layers': normal(2, 8, 8), 'query': normal(8, 2, 4), 'head': normal(8, 3)}


def attended(p, ids, mask=None):
  """Runs a small encoder: look-ups, a scan, attention that padding does not enter, and a mean over valid positions."""
  mask = jnp.ones(ids.shape, bool) if mask is None else mask
  x = p['embed'][ids]
  x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p['layers'])[0]
  q = jnp.einsum('bsd,dhe->bhse', x, p['query'])
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], q @ q.swapaxes(2, 3), -1e9))
  x = (weights @ q).swapaxes(1, 2).reshape(x.shape)
  return jnp.where(mask[..., None], x, 0).sum(1) @ p['head']


IDS, VALID = jnp.asarray(RNG.integers(0, 11, (3, 5))), jnp.arange(5)[None] < jnp.asarray([[5], [2], [3]])
EVERYTHING = sj.trees.named('layers', 'query', 'head')


def pruned(apply=attended, params=PARAMS, batches=((IDS, VALID),), recipe=WANDA, **options):
  return sj.prune(apply, params, batches, recipe, **{'where': EVERYTHING, **options})


@functools.cache
def usual():
  return pruned(valid=[VALID])


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Padding.


def test_garbage_in_the_padding_changes_nothing():
  """Counts the rows of the mean, one for each sentence, whatever the padding."""
  garbage = jnp.where(VALID, IDS, 10)
  assert same(pruned(batches=[(garbage, VALID)], valid=[VALID]).masks, usual().masks)
  assert not same(pruned(batches=[(garbage, VALID)]).masks, usual().masks)
  assert [row.rows for row in usual().report.rows] == [10, 10, 10, 3]
  wide = [jnp.pad(x, ((0, 0), (0, 2)), constant_values=c) for x, c in ((IDS, 9), (VALID, False))]
  assert same(pruned(batches=[tuple(wide)], valid=[wide[1]]).masks, usual().masks)
  errors = lambda result: [row.after for row in result.report.rows]
  np.testing.assert_allclose(errors(pruned(batches=[tuple(wide)], valid=[wide[1]])), errors(usual()), rtol=1e-5)


@pytest.mark.parametrize('apply, why', [
  (lambda p, x: jnp.roll(x, 1, 1) @ p['w'], 'slice.* mixes or moves positions'),
  (lambda p, x: x.reshape(5, 3, 8) @ p['w'], 'reshape at .* mixes or moves positions'),
  (lambda p, x: lax.scan(lambda h, x: (jnp.tanh(h + x @ p['w']), None), x[:, 0, :4],
                          x.swapaxes(0, 1))[0], 'a loop runs over'),
  (lambda p, x: jnp.einsum('bsd,se->bed', x[:, :, :4], p['w'][:5]), 'takes a part|sums over positions'),
  (lambda p, x: lax.sort(x, dimension=1) @ p['w'], 'sort at .* mixes or moves positions'),
])
def test_where_positions_are_lost_the_parameter_is_refused(apply, why):
  x = normal(3, 5, 8)
  with pytest.raises(ValueError, match=rf"prune: parameter 'w'.*({why})"):
    pruned(apply, {'w': normal(8, 4)}, [x], valid=[VALID], where=sj.trees.named('w'))


def test_positions_are_followed_through_reshapes_slices_and_branches():
  def apply(p, x):
    x = x.transpose(1, 0, 2).reshape(15, 8)  # position major
    x = lax.cond(x.sum() < 1e9, lambda x: x * 2.0, lambda x: x, x)
    return jnp.concatenate([x[:, :4], x[:, 4:]], 1) @ p['w']

  x, params = normal(3, 5, 8), {'w': normal(8, 4)}
  result = pruned(apply, params, [x], valid=[VALID], where=sj.trees.named('w'))
  alone = pruned(lambda p, x: x @ p['w'], params, [x[np.asarray(VALID)]], where=sj.trees.named('w'))
  assert result.report.rows[0].rows == 10 and same(result.masks, alone.masks)


# Bad input, each with its message.

NAN = jnp.full((3, 5), np.nan, jnp.float32)
FLOATS = lambda p, x: jnp.tanh(x @ p['w']) @ p['v']
TWO = {'w': normal(8, 8), 'v': normal(8, 4)}
ROWS = normal(6, 8)


ALL = sj.trees.named('*')


def two(params=TWO, batches=(ROWS,), recipe=WANDA, apply=FLOATS, where=ALL, **options):
  return lambda: sj.prune(apply, params, batches, recipe, where=where, **options)


def sharded(p, x):
  product = jax.shard_map(lambda x, w: x @ w, mesh=jax.make_mesh((1,), ('d',)), in_specs=(jax.P(), jax.P()),
                          out_specs=jax.P(), check_vma=False)
  return product(jnp.tanh(x @ p['w']), p['v'])


def failing(stack, choose, statistic):
  return stack._replace(damping=stack.damping * np.nan)


REFUSED = {
  'no data': (two(batches=[]), 'there are no batches.*prune_weights'),
  'rows of padding only': (two(valid=[jnp.zeros(6, bool)]), '`valid` leaves no row of any batch'),
  'a batch of another shape': (two(batches=[ROWS, ROWS[:, :7]]),
                               r'batch 1, of the shapes .\(6, 7\).*, does not run, and batch 0 does.*\(7,\) and'),
  'no function': (lambda: sj.prune(TWO, sj.NM(2, 4)), r'without data, sj.prune_weights\(params, pattern\)'),
  'valid of other batches': (two(valid=[]), '`valid` has 0 arrays and there are 1 batches'),
  'valid that is no mask': (two(valid=[jnp.ones(6)]), 'entry 0 of `valid` must be a bool array'),
  'valid of no input': (two(valid=[jnp.ones(7, bool)]), r'no input of the program has a shape that begins with \(7,\)'),
  'NaN': (two(batches=[ROWS, ROWS.at[2, 3].set(np.nan)]), 'the input of w holds NaN.* in batch 1'),
  'infinities': (two(batches=[ROWS * np.inf], recipe=GRAM), 'the input of w holds NaN.* in batch 0'),
  'NaN inside': (two(apply=lambda p, x: jnp.log(-jnp.abs(x @ p['w'])) @ p['v']),
                 'the input of v holds NaN.* in batch 0'),
  'NaN in a parameter': (two(params={**TWO, 'v': TWO['v'].at[0].set(np.nan)}), "parameter 'v'.*it holds NaN"),
  'a parameter without a product': (two(apply=lambda p, x: x @ p['w'] + p['v'].sum()),
                                    r"parameter 'v' of shape \(8, 4\): the program contracts it nowhere"),
  'other values': (two(apply=lambda p, x: x @ (p['w'] * 2) @ p['v']), "parameter 'w'.*takes other values than those"),
  'a part': (two(apply=lambda p, x: x[:, :4] @ p['w'][:4] @ p['v']), "parameter 'w'.*takes a part of the parameter"),
  'two ways': (two(apply=lambda p, x: x @ p['w'] + x @ p['w'].T + (x @ p['v']).sum()),
               "parameter 'w'.*cannot follow both"),
  'no axis that fits': (two(recipe=Recipe(sj.NM(3, 5), score=scores.wanda, statistic=calibration.moments)),
                        '3:5 needs a contraction axis that 5 divides'),
  'no recipe': (two(recipe=sj.NM(2, 4)), 'the fourth argument is a recipe.*not a NM'),
  'an unknown order': (two(sequential='wieght'), "unknown `sequential` 'wieght'. Did you mean 'weight'"),
  'an unknown unseen': (two(unseen='drop'), "unknown `unseen` 'drop'"),
  'an unknown keep': (two(keep='ones'), "unknown `keep` 'ones'"),
  'masks of another shape': (two(keep={'w': jnp.ones(8, bool), 'v': True}), r"its mask in `keep` has the shape \(8,\)"),
  'masks of another tree': (two(keep={'w': True}), 'another structure than the parameters'),
  'other axes': (two(axes={'w': sj.types.Axes((1,), (0,), source='given')}), "parameter 'w'.*the program decides"),
  'only a head': (two(apply=lambda p, x: x @ p['w'], params={'w': TWO['w']}, where=None), "one product.*'w'.*the head"),
  'a factor that fails': (two(recipe=GRAM.then(failing)), "parameter 'w'.*no Cholesky factor, at any damping up to 1"),
  'weights outside of the mask': (two(recipe=GRAM.then(lambda stack, choose, stat: stack._replace(w=stack.dense))),
                                  "parameter 'w'.*weights outside of its mask"),
  'a statistic for all at once': (
      two(recipe=Recipe(sj.Unstructured(0.5), score=scores.wanda, statistic=calibration.gram,
                        allocation=sj.allocation.global_())), 'needs all scores at once'),
  'weights that the dtype cannot hold': (
      two(params={'w': jnp.clip(TWO['w'] * 4e4, -65504, 65504).astype(jnp.float16), 'v': TWO['v']},
          batches=[ROWS + 9 * ROWS[:, :1]], recipe=sj.recipes.exact_obs(0.75), where=sj.trees.named('w'),
          apply=lambda p, x: x @ p['w'].astype(jnp.float32) @ p['v']), 'a repaired weight is too large for float16'),
  'a product in a shard': (two(apply=sharded), "prune: the program uses 'v' inside of a shard_map.*out of `where`"),
  'memory': (two(memory_limit=1000), r'about [\d,]+ bytes are needed and 1,000 bytes are allowed'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_is_refused(case):
  call, why = REFUSED[case]
  with pytest.raises(ValueError, match=f'(?s){why}'):
    call()


# Zeros that are there, counts, masks, files.


def test_weights_that_are_pruned_already_stay_so_and_masks_are_not_guessed_from_zeros():
  first = two()()
  for again in (two(first.params)(), two(first.params, keep='zeros')(), two(TWO, keep=first.masks)(),
                sj.prune_weights(first.params, sj.Unstructured(0.25))):
    for name in 'wv':
      assert not np.any(np.asarray(again.masks[name]) & ~np.asarray(first.masks[name]))
      assert np.all(np.asarray(again.params[name])[~np.asarray(again.masks[name])] == 0)
  zeros = {**TWO, 'w': TWO['w'].at[:, 0].set(0)}
  assert two(zeros, keep=False)().masks['w'][:, 0].sum() == 4 and not two(zeros)().masks['w'][:, 0].any()


def test_what_is_not_picked_is_the_same_object_and_a_pruned_model_comes_back_from_a_file(tmp_path):
  result = two(where=sj.trees.named('w'))()
  assert result.params['v'] is TWO['v'] and result.masks['v'] is True
  assert result.report.dense == {'v': 'left out by `where`'}
  packed = sj.formats.pack(result.params, sj.NM(2, 4), where=sj.trees.named('w'))
  sj.io.save(tmp_path / 'model.safetensors', packed)
  again = sj.formats.unpack(sj.io.load(tmp_path / 'model.safetensors'))
  assert two(apply=sharded, where=sj.trees.named('w'))().report.achieved == 0.5  # a shard that is not picked
  assert same(again, result.params) and not jax.tree.leaves(again)[1][~np.asarray(result.masks['w'])].any()


def test_the_report_says_why_a_parameter_stays_dense_and_measures_weights_as_they_are_stored():
  params = {**TWO, 'w': TWO['w'].astype(jnp.float8_e4m3fn), 's': jnp.ones(8),
            'q': jnp.asarray(RNG.integers(-3, 4, (8, 8)), jnp.int8)}
  apply = lambda p, x: (x @ p['q'].astype(x.dtype)) * (x @ p['s'])[:, None] @ p['w'].astype(x.dtype) @ p['v']
  rows = jnp.tile(ROWS, (3, 1)) + normal(18, 8)
  result = two(params, [rows], sj.recipes.sparsegpt(0.5), apply, None)()
  assert result.report.dense == {'q': 'of dtype int8', 's': 'a vector', 'v': 'the last product of the program'}
  x = np.float64(rows) @ np.float64(params['q']) * np.float64(rows).sum(1, keepdims=True)
  w, new = (np.float64(np.asarray(each['w'], np.float32)) for each in (params, result.params))
  error = np.square(x @ (new - w)).sum() / np.square(x @ w).sum()
  np.testing.assert_allclose(result.report.rows[0].after, error, rtol=1e-3)


def test_few_rows_are_in_the_notes_and_a_query_of_several_heads_is_one_matrix():
  assert 'fewer rows than inputs: head' in str(usual().report)
  assert {row.name: row.shape for row in usual().report.rows} == {
      'layers[0]': (1, 8, 8), 'layers[1]': (1, 8, 8), 'query': (1, 8, 8), 'head': (1, 3, 8)}


def test_memory_is_told_first_and_grows_with_batches_but_not_with_the_number_of_layers():
  told = []
  pruned(progress=told.append)
  assert re.fullmatch(r'4 matrices, 1 batches, about [\d,]+ bytes', told[0]) and len(told) == 5
  assert re.fullmatch(r'4/4 head: 0.5000 zero, 3 rows, [\d.]+ s', told[-1])
  chain = lambda p, x: functools.reduce(lambda x, name: x @ p[name], sorted(p), x)
  need = lambda layers, batches: sj.prune(chain, {f'{i}': jnp.ones((8, 8)) for i in range(layers)}, [ROWS] * batches,
                                          GRAM, where=sj.trees.named('*')).report.memory
  assert need(3, 1) - need(2, 1) == 64 * 5  # weights and masks of the result
  assert need(2, 2) > need(2, 1)
  assert memory.free() > 0


class Killed(BaseException):
  """Stands for a signal."""


def killed_after(matrices):
  def progress(text):
    if text.startswith(f'{matrices}/'):
      raise Killed

  return progress


def test_a_call_that_was_killed_goes_on_with_the_matrices_that_are_left(tmp_path, monkeypatch):
  def torn(*paths):
    raise Killed

  with pytest.raises(Killed), monkeypatch.context() as patched:
    patched.setattr(os, 'replace', torn)
    pruned(valid=[VALID], workdir=tmp_path)
  assert not list(tmp_path.glob('*.npz'))
  with pytest.raises(Killed):
    pruned(valid=[VALID], workdir=tmp_path, progress=killed_after(2))
  assert len(list(tmp_path.glob('*.npz'))) == 2
  told = []
  result = pruned(valid=[VALID], workdir=str(tmp_path), progress=told.append)
  assert len(told) == 3 and told[1].startswith('3/4 ') and same(result[:2], usual()[:2])
  assert [row[:9] for row in result.report.rows] == [row[:9] for row in usual().report.rows]
  with pytest.raises(ValueError, match='belongs to another call: other parameters, batches, recipe or options'):
    pruned(workdir=tmp_path)
  next(tmp_path.glob('*.npz')).write_bytes(b'PK torn')
  with pytest.raises(ValueError, match='cannot be read.*Remove the file'):
    pruned(valid=[VALID], workdir=tmp_path)
