"""Checks that a user's own word behaves as the built-in word that it equals: same masks, weights and reports."""

import dataclasses
import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import NM, Block, Unstructured, allocation, flows, schedules, scores, selections, starts, updates
from sparsejax.types import Axes, Flow

LIKE = {'a': {'kernel': cases.F32((8, 6))}, 'b': {'kernel': cases.F32((2, 12, 6))}}
STEPS = 8
sparsify = functools.partial(sj.transforms.sparsify, axes={'b/kernel': Axes((1,), (2,), layer=(0,))})


def loss(params):
  return sum(jnp.sum(jnp.cos(3 * w)) for w in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class OwnPattern:
  """An `OwnPattern` is a pattern of a user's own type: it has the methods of `types.Pattern` and no more."""

  like: Any
  static = True

  def __str__(self):
    return str(self.like)

  def __call__(self, scores, count=None, axes=None):
    return self.like(scores, count, axes)

  @property
  def sparsity(self):
    return self.like.sparsity

  @property
  def group(self):
    return self.like.group

  @property
  def fixed(self):
    return getattr(self.like, 'fixed', False)

  def validate(self, shape, axes):
    return self.like.validate(shape, axes)

  def violation(self, w, axes, sparsity=None):
    return self.like.violation(w, axes, sparsity)

  def pooled(self, scores, axes):
    return self.like.pooled(scores, axes)


def plain(word):
  """Returns a plain function that does what `word` does, and carries none of its facts."""
  return None if word is None else lambda *args, **options: word(*args, **options)


def own_flow(flow):
  return Flow(*(plain(flow[i]) for i in range(3)), flow.dense, plain(flow.begin), flow.frozen)


# Each sentence gets `function`, `pattern` and `flow`, which return a word as it is or wrapped.
SENTENCES = {
    'ranked together, what is pruned stays so': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3), flow(flows.hard()), selections.leafwise(
            pattern(Unstructured(0.8)), score=function(scores.magnitude), update=function(updates.prune_to),
            ramp=function(schedules.cubic(0.0, 1.0, end=5)), allocation=allocation.global_()),
        refresh=function(schedules.every(2))),
    'ranked together, swapped': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3), flow(flows.straight_through()), selections.leafwise(
            pattern(Unstructured(0.5)), update=function(updates.swap(function(schedules.constant(0.5)))),
            allocation=allocation.lamp()), refresh=function(schedules.every(1)),
        first=selections.leafwise(pattern(Unstructured(0.5)), allocation=allocation.lamp())),
    'N:M with a decay of its own and a fine-tune phase': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3, momentum=0.9), flow(flows.sr_ste(0.1, decoupled=True)), selections.leafwise(pattern(NM(2, 4))),
        refresh=function(schedules.every(1)), total_steps=STEPS, fine_tune_steps=3),
    'random once, and a fine-tune phase': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3), flow(flows.remembered()), selections.leafwise(
            pattern(Unstructured(0.5)), score=function(scores.random)), key=jax.random.key(1),
        refresh=function(schedules.once(0)), total_steps=STEPS, fine_tune_steps=3),
    'frozen by a probe': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3), flow(flows.frozen()), selections.leafwise(
            pattern(Unstructured(0.7)), score=function(scores.snip), allocation=allocation.global_()),
        start=function(starts.probed(function(starts.gradient(loss)))), refresh=function(schedules.once(0))),
    'dropped and grown': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3, momentum=0.9), flow(flows.hard()), selections.leafwise(
            pattern(Block((4, 3), 0.5)), update=function(updates.drop_and_grow(
                function(scores.gradient), function(schedules.constant(0.5))))),
        first=selections.leafwise(pattern(Block((4, 3), 0.5)), score=function(scores.random)), pause=True,
        key=jax.random.key(0), slots='fresh', refresh=function(schedules.every(2))),
    'a soft threshold': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3), flow(flows.soft_threshold()), selections.global_threshold(
            function(schedules.cubic(0.0, 0.8, begin=2, end=6)), 0.8), dense_steps=2,
        refresh=function(schedules.every(1))),
    'the edge of chaos': lambda function, pattern, flow: sparsify(
        optax.sgd(0.3), flow(flows.on_the_edge(2.0)), selections.leafwise(pattern(Unstructured(0.5))),
        refresh=function(schedules.once(0))),
}


def trained(tx):
  """Returns the parameters and masks after each update, the last state without its plan, and the report of it."""
  params, grads = cases.random(0, like=LIKE), cases.random(1, (STEPS,), LIKE)
  (params, state), seen = jax.jit(lambda params, grads: cases.scanned(lambda: tx, params, grads))(params, grads)
  return seen, state[:-1], str(sj.report(params, state))


@pytest.mark.sampled(5)
@pytest.mark.parametrize('name', SENTENCES)
def test_a_word_of_ones_own_is_the_built_in_word_that_it_equals(name):
  same = lambda word: word
  built_in, own = (trained(SENTENCES[name](*words)) for words in ((same, same, same), (plain, OwnPattern, own_flow)))
  cases.assert_same(own[:2], built_in[:2])
  assert own[2] == built_in[2]
  assert any(not np.all(mask) for mask in jax.tree.leaves(built_in[1][2])), 'nothing is pruned'


def test_an_update_whose_scores_stay_in_a_branch_is_refused_where_leaves_are_ranked_together():
  def update(mask, scores, select, w, signals):
    return jax.lax.cond(signals.step > 3, lambda: select(updates.kept_first(mask, scores)), lambda: select(scores))

  options = {'pattern': Unstructured(0.5), 'update': update}
  params, grads = cases.random(0, like=LIKE), cases.random(1, like=LIKE)
  alone = sparsify(optax.sgd(0.1), flows.hard(), selections.leafwise(**options))
  cases.step(alone, params, alone.init(params), grads)  # each leaf by itself has its own count
  together = sparsify(optax.sgd(0.1), flows.hard(), selections.leafwise(**options, allocation=allocation.global_()))
  with pytest.raises(ValueError, match='inside of lax.cond or a loop. Call it outside.*allocation.uniform'):
    together.init(params)


def test_a_schedule_that_carries_its_fact_may_go_with_a_line_search():
  params, once = cases.random(0, like=LIKE), plain(schedules.once(0))
  make = lambda: sparsify(optax.lbfgs(), flows.hard(), selections.leafwise(NM(2, 4)), refresh=once)
  with pytest.raises(ValueError, match='line search'):
    make().init(params)
  once.facts = (sj.types.AT_ZERO,)
  make().init(params)


def test_stages_have_counts_of_their_own():
  staged = sj.patterns.Staged(NM(1, 4), lambda step: NM(2, 4))
  with pytest.raises(ValueError, match="'a/kernel' of shape .8, 6., .*: the stages on the way to 1:4 have counts"):
    sparsify(optax.sgd(0.1), flows.hard(), selections.leafwise(staged, sparsity=0.5)).init(cases.random(0, like=LIKE))


def test_thresholds_and_a_memory_do_not_share_the_place_that_flows_read():
  selection = selections.global_threshold(schedules.constant(0.5), 0.5)
  with pytest.raises(ValueError, match='leave out memory='):
    sparsify(optax.sgd(0.1), flows.soft_threshold(), selection, memory=scores.gradient_average())
