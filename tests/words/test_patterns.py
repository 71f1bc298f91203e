"""Checks patterns as words: stages, values, texts, violations, refusals that name the remedy, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparsejax
from sparsejax import counts, patterns
from sparsejax.patterns import NM, Block, Channel, Staged, Switch, Unstructured
from sparsejax.types import Axes


def test_a_recipe_trains_blocks_and_the_report_counts_them():
  """Checks two of five blocks, of which no whole number would be half."""
  params = {'kernel': jax.random.normal(jax.random.key(0), (10, 4))}
  tx = sparsejax.recipes.ste(optax.sgd(0.1), Block((2, 4), 0.5))
  state = tx.init(params)
  for seed in (1, 2):
    updates, state = jax.jit(tx.update)({'kernel': jax.random.normal(jax.random.key(seed), (10, 4))}, state, params)
    params = optax.apply_updates(params, updates)
  assert sparsejax.check(params, state).achieved == pytest.approx(0.4)
  sparsejax.check(params, pattern=Block((2, 4), 0.5))
  with pytest.raises(ValueError, match='3 blocks are kept, 2 asked'):
    sparsejax.check(params, pattern=Block((2, 4), 0.6))
  with pytest.raises(ValueError, match="'kernel' of shape .10, 4.: 2x4 has no sparsity; pass `sparsity=`"):
    sparsejax.recipes.ste(optax.sgd(0.1), '2x4').init(params)


def test_a_recipe_trains_vectors_through_its_stages_and_the_report_counts_them():
  params = {'kernel': jax.random.normal(jax.random.key(0), (8, 6))}
  tx = sparsejax.recipes.sdgf_stepwise(optax.sgd(0.1), NM(1, 4, 3), total_steps=8, fine_tune_steps=2)
  state, nonzero = tx.init(params), []
  for seed in range(1, 9):
    updates, state = jax.jit(tx.update)({'kernel': jax.random.normal(jax.random.key(seed), (8, 6))}, state, params)
    params = optax.apply_updates(params, updates)
    vectors = np.asarray(params['kernel'] != 0).reshape(8, 2, 3)
    assert np.all(vectors.all(-1) == vectors.any(-1))
    nonzero.append(int(vectors.any(-1).sum()))
  assert set(nonzero) == {4, 8, 12} and nonzero[-1] == 4
  sparsejax.check(params, state)
  sparsejax.check(params, pattern=NM(1, 4, 3))
  with pytest.raises(ValueError, match='4 of 4 groups keep more than 1 of 4'):
    sparsejax.check({'kernel': jnp.ones((8, 6))}, pattern=NM(1, 4, 3))
  with pytest.raises(ValueError, match='2 of 4 groups keep more than 1 of 4'):  # 1:4 each column, but not the same
    sparsejax.check({'kernel': jnp.eye(8, 6)}, pattern=NM(1, 4, 3))


def test_a_stage_is_its_pattern_and_only_one_runs():
  scores, axes = jax.random.normal(jax.random.key(0), (32, 3)), Axes((0,), (1,))
  stages = (NM(8, 32), NM(4, 16), NM(2, 8), NM(1, 4))
  staged = jax.jit(lambda s, i: Switch(stages, i)(s, None, axes))
  for i, stage in enumerate(stages):
    np.testing.assert_array_equal(staged(scores, i), oracle.n_of_m(scores, stage.n, stage.m, (0,)))
  assert 'cond[' in str(jax.make_jaxpr(lambda i: Switch(stages, i)(scores, None, axes))(1))
  assert str(Switch(stages, 0)) == '8:32 -> 4:16 -> 2:8 -> 1:4'
  assert Switch(stages, 0).validate((16, 3), axes) == NM(8, 32).validate((16, 3), axes) is not None
  assert Switch(stages, 0).validate((32, 3), axes) is None
  survivors = jax.jit(lambda s, i: counts.Selector(Switch(stages, i), None, axes)(s, 0.5))
  assert [int(survivors(scores, i).sum()) for i in range(4)] == [12] * 4


def test_a_staged_pattern_is_its_target_but_for_the_pattern_at_a_step():
  stages, axes = (NM(2, 4), NM(1, 4)), Axes((0,), (1,))
  staged = Staged(NM(1, 4), lambda step: stages[int(step >= 5)])
  assert [staged.at(step) for step in (0, 4, 5)] == [NM(2, 4), NM(2, 4), NM(1, 4)]
  assert (str(staged), staged.sparsity, staged.static, staged.group) == ('1:4', 0.75, True, (4, 1))
  w = jnp.arange(16.0).reshape(8, 2) + 1
  np.testing.assert_array_equal(staged(w, None, axes), NM(1, 4)(w, None, axes))
  assert staged.violation(w, axes) == NM(1, 4).violation(w, axes) != ''
  assert counts.units(staged, (8, 2), axes) == (4, 1)
  wide = Staged(NM(1, 4), lambda step: NM(4, 16))
  assert wide.validate((8, 2), axes) == NM(4, 16).validate((8, 2), axes) is not None


@pytest.mark.parametrize('pattern, sparsity, problem', [
    (NM(2, 4), None, ''), (NM(2, 4), 0.75, '4 of 4 groups keep more than 1 of 4, the first, (0, 0), keeps 2'),
    (Unstructured(0.5), None, ''), (Unstructured(0.5), 0.75, '8 weights are kept, 4 asked'),
    (Unstructured(), None, '')], ids=str)
def test_a_violation_is_of_the_sparsity_that_is_asked_or_of_the_patterns_own(pattern, sparsity, problem):
  w = jnp.where(NM(2, 4)(jax.random.normal(jax.random.key(0), (8, 2))), 1.0, 0.0)
  assert pattern.violation(w, Axes((0,), (1,)), sparsity) == problem


def test_patterns_are_values():
  assert NM(2, 4) == NM(2, 4) != NM(1, 4) and hash(NM(2, 4)) == hash(NM(2, 4))
  assert Unstructured(0.5) == Unstructured(0.5) != Unstructured() and len({Unstructured(), Unstructured()}) == 1
  assert [str(p) for p in (NM(2, 4), Unstructured(), Unstructured(0.9))] == ['2:4', 'unstructured', 'unstructured 0.9']
  assert NM(2, 8).sparsity == 0.75 and NM(2, 8).static
  traced = NM(jnp.int32(2), 8)
  assert traced.sparsity is None and not traced.static and str(traced) == 'n:8'
  assert NM(np.int64(2), 4).sparsity == 0.5
  assert NM(2, 4) == NM(2, 4, 1) != NM(2, 4, 2) == NM(2, 4, width=2) and str(NM(2, 4, 128)) == '2:4x128'
  assert Block([4, 8], 0.5) == Block((4, 8), 0.5) != Block((4, 8)) and len({Block((4, 8)), Block([4, 8])}) == 1
  assert Channel(0.5) == Channel(0.5) != Channel() and len({Channel(), Channel()}) == 1 and Channel().static
  assert [str(p) for p in (Channel(), Channel(0.5))] == ['channel', 'channel 0.5']
  assert [str(p) for p in (Block((4, 8)), Block((4, 8), 0.9))] == ['4x8', '4x8 0.9'] and Block((1, 1)).static


@pytest.mark.parametrize('text, pattern', [
    ('2:4', NM(2, 4)), (' 1 : 8 ', NM(1, 8)), ('unstructured', Unstructured()), ('Unstructured', Unstructured()),
    (NM(1, 2), NM(1, 2)), ('128x128', Block((128, 128))), (' 32 x 8 ', Block((32, 8))),
    ('2:4x128', NM(2, 4, 128)), (' 1 : 8 x 32 ', NM(1, 8, 32)), ('2:4x1', NM(2, 4)),
    ('channel', Channel()), ({'a': 'Channel', '**': '2:4'}, {'a': Channel(), '**': NM(2, 4)})])
def test_patterns_are_read_from_text(text, pattern):
  assert patterns.parse(text) == pattern


REFUSED = [
    (lambda: NM(3, 2), 'NM: 3:2 keeps 3 of 2; n must be from 0 to m'),
    (lambda: NM(-1, 2), 'n must be from 0 to m'),
    (lambda: NM(1, 0), 'NM: m must be a whole number from 1 to 1024, not 0'),
    (lambda: NM(1, 1025), 'not 1025'),
    (lambda: NM(1, 4.0), 'not 4.0'),
    (lambda: NM(0.5, 4), 'n must be a whole number, not 0.5; give sparsity to Unstructured'),
    (lambda: NM(None, 4), 'n must be a whole number, not None'),
    (lambda: NM('2', 4), "n must be a whole number, not '2'"),
    (lambda: NM(2, 4, 0), 'NM: width must be a whole number, at least 1, not 0'),
    (lambda: NM(2, 4, 1.5), 'not 1.5'),
    (lambda: patterns.parse('2:4x'), "unknown pattern '2:4x'"),
    (lambda: Unstructured(1.5), '`sparsity` must be the fraction of zeros, a number from 0 to 1, .*not 1.5'),
    (lambda: Unstructured(-0.1), 'not -0.1'),
    (lambda: Unstructured(90), 'not 90'),
    (lambda: patterns.parse('2:'),
     r"unknown pattern '2:'.* Did you mean '2:4'.* Valid: 128x128, 1:8, 2:4, 2:4x128, N:M, channel, unstr"),
    (lambda: patterns.parse('bitmask'), "unknown pattern 'bitmask'"),
    (lambda: patterns.parse('128*128'), "Did you mean '128x128'"),
    (lambda: patterns.parse('0x4'), r'Block: shape is two whole numbers.* as in \(128, 128\), not \(0, 4\)'),
    (lambda: Block((4, 4, 4)), r'not \(4, 4, 4\)'),
    (lambda: Block((4, 4.0)), r'not \(4, 4.0\)'),
    (lambda: Block((4, 4), 4), 'Block: `sparsity` must be the fraction of zeros, .*not 4'),
    (lambda: Block((4, 4))(jnp.ones((4, 4))), 'how many weights are kept. Give a sparsity'),
    (lambda: Channel(-0.5), 'Channel: `sparsity` must be the fraction of zeros, .*not -0.5'),
    (lambda: Channel()(jnp.ones((4, 4))), 'how many weights are kept. Give a sparsity'),
    (lambda: patterns.parse('channels'), "Did you mean 'channel'"),
    (lambda: patterns.parse('unstructed'), "Did you mean 'unstructured'"),
    (lambda: patterns.parse('5:4'), 'NM: 5:4 keeps 5 of 4'),
]


@pytest.mark.parametrize('make, message', REFUSED)
def test_refusals_say_what_is_wrong_and_what_is_right(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('pattern', [Unstructured(0.5), Block((2, 2), 0.5), Channel(0.5), NM(2, 4)])
def test_a_stack_of_no_layers_keeps_every_pattern(pattern):
  assert pattern.violation(jnp.zeros((0, 4, 4)), Axes((1,), (2,), layer=(0,))) == ''


@pytest.mark.parametrize('pattern, shape, axes, words', [
    (NM(2, 4), (6, 8), Axes((0,), (1,)), ['2:4', 'axes (0,) (convention) have 6', 'all_but', 'to 8', '(say 3)']),
    (NM(1, 8), (3, 4, 8), Axes((0, 1), (2,), source='traced'), ['axes (0, 1) (traced) have 12', 'to 16', '(say 6)']),
    (NM(2, 4), (7, 8), Axes((0,), (1,)), ['have 7', 'pad the axis to 8.']),  # nothing but 1 divides 7: none is proposed
    (NM(2, 4), (8,), Axes((), (0,)), ['no axis is contracted', '2:4', 'leave the leaf out of `where`']),
    (NM(2, 4, 8), (8, 20), Axes((0,), (1,)), [
        '2:4x8', 'axes (1,) (convention) have 20', 'all_but', '(say 5)', 'pad the axis to 24.']),
    (NM(2, 4, 8), (8, 2, 10), Axes((0,), (1, 2), source='traced'), ['axes (1, 2) (traced) have 20']),
    (NM(2, 4, 8), (6, 8), Axes((0,), (1,)), ['axes (0,) (convention) have 6']),
    (NM(2, 4, 8), (8,), Axes((0,), ()), ['2:4x8 lies along output axes', 'use 2:4.']),
    (Block((8, 8)), (12, 20), Axes((0,), (1,)), [
        '8x8', 'contracted (0,) and output (1,) (convention) have 12 and 20', 'all_but', '(say 6x5)', 'to 16 and 24']),
    (Block((4, 8), 0.5), (3, 4, 20), Axes((0, 1), (2,)), ['4x8 0.5', 'have 12 and 20', '(say 4x5)', 'to 12 and 24']),
    (Channel(0.5), (8,), Axes((0,), ()), ['channel 0.5', 'are (0,) and () (convention)', 'of `where`']),
    (Channel(), (8,), Axes((), (0,)), ['channel', 'are () and (0,)', 'leave the leaf out of `where`']),
    (Block((2, 2)), (8,), Axes((0,), ()), ['2x2', 'those are (0,) and ()', 'leave the leaf out of `where`']),
])
def test_validate_says_why_and_the_way_out(pattern, shape, axes, words):
  why = pattern.validate(shape, axes)
  assert all(word in why for word in words), why


def test_a_proposed_group_size_is_one_that_fits():
  for length in range(1, 60):
    why = NM(1, 16).validate((length, 2), Axes((0,), (1,)))
    assert (why is None) == (length % 16 == 0)
    if why and 'say' in why:
      proposed = int(why.split('(say ')[1].split(')')[0])
      assert NM(1, proposed).validate((length, 2), Axes((0,), (1,))) is None
