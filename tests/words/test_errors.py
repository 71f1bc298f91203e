"""Checks that each refusal names the function, the parameter, the problem, and the remedy or the valid names."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from kernels_pallas import prepared
from sparsejax import (
  NM,
  Unstructured,
  allocation,
  errors,
  flows,
  metrics,
  recipes,
  schedules,
  scores,
  selections,
  states,
  transforms,
  trees,
)
from sparsejax.patterns import parse
from sparsejax.types import Axes

PARAMS = {'fc': {'kernel': jnp.ones((16, 8)), 'bias': jnp.ones((8,))}, 'head': {'kernel': jnp.ones((24, 4))}}
SGD = optax.sgd(0.1)
SIGNALS = {'loss': lambda params: sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params)),
           'outputs': lambda params: params, 'key': jax.random.key(0)}
from_config = functools.partial(recipes.from_config, SGD, total_steps=10, signals=SIGNALS)


def start(tx, params=PARAMS):
  return tx.init(params)


def update(tx, state=None, grads=PARAMS, params=PARAMS, **extra):
  return tx.update(grads, start(tx) if state is None else state, params, **extra)


def doubled(params):
  return jax.tree.map(lambda w: jnp.concatenate([w, w], -1), params)


def without(params, *path):
  (key, *rest) = path
  return {k: v for k, v in params.items() if k != key} if not rest else params | {key: without(params[key], *rest)}


LOUD = jax.tree.map(lambda w: w, PARAMS) | {'head': {'kernel': jnp.full((24, 6), 2.0)}}  # more than half of it all
# A coefficient that cannot be compared, so not part of a state.
ARRAYS = transforms.sparsify(SGD, flows.decayed(jnp.float32(0.1), 'scaled'), selections.leafwise(NM(2, 4)))

APPLY = lambda p, x: jnp.tanh(x @ p['fc']['kernel'] + p['fc']['bias'][None]) @ p['head']['kernel'][:8]
PRUNED = APPLY, PARAMS, [jnp.ones((2, 16))], recipes.wanda(0.5)
UNITS = sparsejax.structured.groups(APPLY, PARAMS, jnp.ones((2, 16)))

# Each entry has the call that is refused, and the parts of the message in their order.
REFUSALS = {
    # Patterns and the shapes that carry them.
    'm does not divide': (
        lambda: start(recipes.ste(SGD), {'fc': {'kernel': jnp.ones((18, 8))}}),
        ["'fc/kernel' of shape (18, 8)", '2:4', '4 divides', 'axes (0,)', '18', 'Leave the leaf dense', 'all_but',
         'an m that divides it (say 3)', 'pad the axis to 20']),
    'm does not divide a prime': (
        lambda: start(recipes.ste(SGD), {'w': jnp.ones((7, 3))}),
        ["'w' of shape (7, 3)", 'Leave the leaf dense (trees.all_but), or pad the axis to 8.']),
    'm does not divide the channels of a first convolution': (
        lambda: start(recipes.ste(SGD, NM(1, 4)), {'conv': {'kernel': jnp.ones((3, 3, 3, 8))}}),
        ["'conv/kernel' of shape (3, 3, 3, 8)", 'axes (2,)', 'have 3', 'pad the axis to 4']),
    'm does not divide heads times head_dim': (
        lambda: start(recipes.ste(SGD, NM(1, 8), axes={'out/kernel': Axes((0, 1), (2,))}),
                      {'out': {'kernel': jnp.ones((3, 4, 8))}}),
        ["'out/kernel' of shape (3, 4, 8)", 'axes (0, 1)', 'have 12', 'pad the axis to 16']),
    'm does not divide at the first stage': (
        lambda: start(recipes.sdgf_geometric(SGD, total_steps=9)),
        ["'fc/kernel' of shape (16, 8)", '16:32', '32 divides', 'pad the axis to 32']),
    'm does not divide backwards': (
        lambda: states.bdwp_backward(PARAMS, start(recipes.bdwp(SGD))),
        ['bdwp_backward', "'head/kernel' of shape (24, 4)", '2:8', 'axes (1,)', 'have 4']),
    'n above m': (lambda: NM(5, 4), ['NM', '5:4 keeps 5 of 4', 'n must be from 0 to m']),
    'n above m in a config': (lambda: from_config({'name': 'ste', 'pattern': '9:8'}), ['NM', '9:8', 'from 0 to m']),
    'n is a fraction': (lambda: NM(0.5, 4), ['NM', 'whole number, not 0.5', 'Unstructured']),
    'm is too large': (lambda: NM(1, 2000), ['NM', 'from 1 to 1024, not 2000']),
    'm is zero': (lambda: NM(0, 0), ['NM', 'from 1 to 1024, not 0']),
    'sparsity above one': (lambda: Unstructured(1.5), ['Unstructured', 'fraction of zeros', 'from 0 to 1', '1.5']),
    'no sparsity': (lambda: start(recipes.ste(SGD, Unstructured())),
                    ["'fc/kernel' of shape (16, 8)", 'unstructured has no sparsity', '`sparsity=`']),
    'no pattern': (lambda: recipes.ste(SGD, (2, 4)), ['patterns.parse', "'(2, 4)'", '2:4', 'N:M', 'unstructured']),
    'unknown pattern': (
        lambda: parse('2-4'), ['patterns.parse', "'2-4'", "Did you mean '2:4'?", 'Valid: 128x128, 1:8']),
    'a rank without contraction': (
        lambda: start(recipes.ste(SGD, where=trees.named('fc/bias'))),
        ["'fc/bias' of shape (8,)", 'no axis is contracted', 'leave the leaf out of `where`']),
    # Where.
    'where picks nothing': (
        lambda: start(recipes.ste(SGD, where=trees.named('mlp/*/kernel'))),
        ['`where` picks no parameter', "'fc/bias', 'fc/kernel', 'head/kernel'", "trees.named('tail/of/path')"]),
    'no matrices': (lambda: start(recipes.ste(SGD), {'scale': jnp.ones(8)}), ['`where` picks no parameter', "'scale'"]),
    'where picks eight-bit floats': (
        lambda: start(recipes.ste(SGD), {'kernel': jnp.ones((4, 4), jnp.float8_e4m3fn)}),
        ["'kernel' of shape (4, 4)", 'dtype float8_e4m3fn', 'bfloat16', 'cast it', 'leave it out of `where`']),
    'unknown slots': (lambda: recipes.ste(SGD, slots='zero'), ["unknown slots 'zero'", 'Valid: fresh, kept']),
    'L-BFGS behind a master': (
        lambda: start(recipes.ste(optax.lbfgs())),
        ['ScaleByLBFGSState', 'line search', 'change of the mask', 'asp without dense_steps', 'first-order']),
    'L-BFGS across a change of the mask': (
        lambda: start(recipes.asp(optax.lbfgs(), dense_steps=3)), ['ScaleByLBFGSState', 'asp without dense_steps']),
    'a line search across a change of the mask': (
        lambda: start(recipes.asp(optax.chain(SGD, optax.scale_by_backtracking_linesearch(3)), dense_steps=3)),
        ['ScaleByBacktrackingLinesearchState', 'asp without dense_steps']),
    'a function of the parameters behind a master': (
        lambda: update(recipes.ste(optax.contrib.sophia(0.1)), obj_fn=lambda params: 0.0),
        ['obj_fn=', 'dense master', 'asp']),
    'where picks integers': (
        lambda: start(recipes.ste(SGD, where=lambda *_: True), {'codes': jnp.ones((4, 4), jnp.int8)}),
        ["'codes' of shape (4, 4)", 'int8 is not floating', 'leave it out of `where`']),
    'where is a glob': (lambda: start(recipes.ste(SGD, where='fc/*')), ["'fc/*'", "trees.named('fc/*')"]),
    'where is no prefix': (
        lambda: start(recipes.ste(SGD, where={'fc': True})), ['`where`', 'no prefix of the parameters']),
    'report picks nothing': (lambda: sparsejax.report(PARAMS, where=trees.named('x')), ['report', "'fc/kernel'"]),
    'a glob matches nothing': (
        lambda: start(recipes.ste(SGD, {'fd/*': NM(2, 4), '**': NM(1, 4)})),
        ["unknown path in `pattern` 'fd/*'", 'Valid: fc/kernel, head/kernel']),
    'a leaf that no glob covers': (
        lambda: start(recipes.ste(SGD, {'fc/*': NM(2, 4)})), ["`pattern` says nothing about 'head/kernel'", "'**'"]),
    'a share that nobody gives': (
        lambda: allocation.custom({'fc/*': 0.5})({'fc/kernel': None, 'head/kernel': None}, 0.5),
        ['allocation.custom', "'head/kernel'", "'**'"]),
    # Axes.
    'axes of another leaf': (
        lambda: start(recipes.ste(SGD, where=trees.matrices, axes={'fc/kernel': Axes((0,), (1,), source='traced')})),
        ["'head/kernel' of shape (24, 4)", "is none of 'fc/kernel'", 'Trace a program that uses it', '`where`']),
    'axes of another shape': (
        lambda: start(recipes.ste(SGD, axes={'fc/kernel': Axes((0,), (1, 2))})),
        ["'fc/kernel' of shape (16, 8)", 'of another shape', 'trace again']),
    'axes of no leaf': (lambda: start(recipes.ste(SGD, axes={'fd/kernel': Axes((0,), (1,))})),
                        ["unknown path in `axes` 'fd/kernel'", "Did you mean 'fc/kernel'"]),
    'axes that differ in two places': (
        lambda: start(recipes.ste(SGD, axes=sparsejax.contractions(
            lambda p, x: x @ p['tied'] @ p['tied'].T, {'tied': PARAMS['fc']['kernel']}, jnp.ones((2, 16)))),
            {'tied': PARAMS['fc']['kernel']}),
        ["'tied' of shape (16, 8)", 'one mask cannot follow both', 'Leave it dense', 'axes=']),
    # Phases and schedules.
    'fine-tuning without an end': (
        lambda: recipes.ste(SGD, fine_tune_steps=5), ['fine_tune_steps counts from the end', 'pass total_steps=']),
    'phases that overlap': (
        lambda: recipes.mdgf(SGD, dense_steps=5, fine_tune_steps=6, total_steps=10),
        ['dense_steps (5)', 'fine_tune_steps (6)', 'total_steps (10)']),
    'a phase below zero': (
        lambda: recipes.asp(SGD, dense_steps=-1),
        ['recipes.asp', '`dense_steps`', 'number of updates', 'at least 0', '-1']),
    'stages without an end': (lambda: recipes.sdgf_stepwise(SGD), ['sdgf', 'pass total_steps=']),
    'geometric stages without an end': (lambda: recipes.sdgf_geometric(SGD), ['sdgf', 'pass total_steps=']),
    'more stages than updates': (
        lambda: start(recipes.sdgf_stepwise(SGD, NM(1, 8), total_steps=5, fine_tune_steps=3)),
        ['sdgf', '4 stages (7:8, 4:8, 2:8, 1:8)', '2 updates', 'raise total_steps']),
    'k is no power of two': (lambda: start(recipes.sdgf_geometric(SGD, k=3, total_steps=9)),
                             ['sdgf_geometric', 'power of two, not 3']),
    'stages of no N:M': (lambda: start(recipes.sdgf_stepwise(SGD, Unstructured(0.5), total_steps=9)),
                         ['sdgf', 'N:M patterns, not unstructured 0.5']),
    'a ramp without an end': (lambda: recipes.st3(SGD), ['st3', 'total_steps= or ramp_steps=']),
    'a ramp of no updates': (
        lambda: recipes.st3(SGD, total_steps=5, dense_steps=2, fine_tune_steps=3),
        ['st3', 'over 0 updates', 'between the dense and the fine-tune phase', 'raise total_steps']),
    'a sparsity that is none': (
        lambda: recipes.st3(SGD, 90, total_steps=5),
        ['st3', '`sparsity`', 'from 0 to 1', '0.9 for 90 %', 'not 90']),
    'a decay that is a number': (
        lambda: recipes.mdgf(SGD, decay=0.5), ['mdgf', '`decay` must be a schedule', 'linear(', '0.5']),
    'a gradient that is not known': (
        lambda: recipes.mdgf(SGD, gradient='scale'), ["'scale'", "Did you mean 'scaled'?", 'Valid: scaled, straight']),
    'an end before the beginning': (
        lambda: schedules.linear(begin=5, end=5), ['schedules.linear', '`end` (5) must come after `begin` (5)']),
    'a rate and a half-life': (
        lambda: schedules.exponential(1.0, half_life=2),
        ['schedules.exponential', 'exactly one of `rate`', 'half_life']),
    'never': (lambda: schedules.every(0), ['schedules.every', 'at least 1', 'not 0']),
    # Signals that a score misses.
    'no gradient yet': (
        lambda: start(transforms.sparsify(SGD, flows.hard(), selections.leafwise('2:4', score=scores.gradient))),
        ['scores.gradient', 'gradient of this leaf', 'magnitude or random']),
    'no key': (lambda: start(transforms.sparsify(SGD, flows.hard(), selections.leafwise('2:4', score=scores.random))),
               ['scores.random', 'PRNG key', 'key=jax.random.key(seed)']),
    'no loss to take a Hessian of': (lambda: recipes.grasp(SGD), ['recipes.grasp', '`loss=`', 'params -> scalar']),
    'no loss on the edge': (
        lambda: recipes.robust_at_init(SGD), ['recipes.robust_at_init', '`loss=`', 'params -> scalar']),
    'no loss to search by': (
        lambda: recipes.random_search(SGD), ['recipes.random_search', '`loss=`', 'params -> scalar']),
    'no outputs': (lambda: recipes.synflow(SGD), ['recipes.synflow', '`outputs=`', 'params -> outputs', 'ones']),
    **{f'no key for {recipe.__name__}': (
        lambda recipe=recipe, options=options: start(recipe(SGD, 0.5, **options)),
        ['PRNG key', 'key=jax.random.key(seed)'])
       for recipe, options in ((recipes.random_pruning, {}), (recipes.static_sparse, {}), (recipes.set_, {'end': 9}),
                               (recipes.rigl, {'end': 9}), (recipes.snfs, {'end': 9}))},
    # Layers that would be empty.
    'a share that empties a layer': (
        lambda: start(recipes.static_sparse(SGD, 0.99, allocation=allocation.uniform, key=SIGNALS['key']),
                      {'fc': {'kernel': jnp.ones((16, 8))}, 'head': {'kernel': jnp.ones((5, 4))}}),
        ["'head/kernel' of shape (5, 4)", 'sparsity of 0.99 keeps nothing of 20 units', 'erk', 'allow_empty=True']),
    'channels that empty a layer': (
        lambda: start(recipes.magnitude_at_init(SGD, pattern=sparsejax.Channel(0.9), allocation=allocation.uniform)),
        ["'head/kernel' of shape (24, 4)", 'sparsity of 0.9 keeps nothing of 4 units', 'allow_empty=True']),
    'a rank that empties a layer': (
        lambda: start(recipes.magnitude_at_init(SGD, 0.5), LOUD),
        ["'fc/kernel' of shape (16, 8)", 'the first mask keeps nothing', 'erk', 'allow_empty=True']),
    # Ramps and ends.
    'a gradual ramp that nobody ends': (
        lambda: recipes.gradual_magnitude(SGD), ['recipes.gradual_magnitude', 'total_steps=', 'end=']),
    'a gradual ramp that ends after training': (
        lambda: recipes.gradual_magnitude(SGD, end=11, total_steps=10),
        ['recipes.gradual_magnitude', 'end=11', '10 updates', 'raise total_steps']),
    'a gradual ramp into the fine-tune phase': (
        lambda: recipes.movement_pruning(SGD, end=9, total_steps=10, fine_tune_steps=2),
        ['recipes.movement_pruning', 'end=9', '8 updates', 'fine-tune']),
    'a gradual ramp that ends before it begins': (
        lambda: recipes.soft_movement_pruning(SGD, begin=5, end=5), ['soft_movement_pruning', 'begin=5 to end=5']),
    'a mask that moves after training': (
        lambda: recipes.rigl(SGD, end=11, total_steps=10), ['recipes.rigl', 'end=11', '10 updates']),
    'a mask that moves without end': (lambda: recipes.snfs(SGD), ['recipes.snfs', 'total_steps=', 'end=']),
    **{f'nothing to grow into for {recipe.__name__}': (
        lambda recipe=recipe, asked=asked: recipe(SGD, end=9, key=SIGNALS['key'], **asked),
        [f'recipes.{recipe.__name__}', 'nothing is pruned', 'grow into', '`sparsity`'])
       for recipe, asked in ((recipes.set_, {'sparsity': 0.0}), (recipes.rigl, {'pattern': Unstructured(0.0)}),
                             (recipes.snfs, {'sparsity': 0}), (recipes.rigl, {'pattern': NM(4, 4)}))},
    'a dense phase before a mask at initialisation': (
        lambda: recipes.grasp(SGD, loss=SIGNALS['loss'], dense_steps=3), ['dense_steps=3', 'at initialisation']),
    # Tickets.
    'a restriction of groups': (
        lambda: recipes.lottery_jackpot(SGD, pattern=NM(2, 4), restriction=schedules.constant(0.5)),
        ['recipes.lottery_jackpot', '2:4', 'leave out restriction=', 'unstructured']),
    'a soup of other masks': (
        lambda: metrics.model_soup([PARAMS, PARAMS, without(PARAMS, 'head') | {'head': {
            'kernel': PARAMS['head']['kernel'].at[:2, 1].set(0)}}]),
        ['metrics.model_soup', "'head/kernel' of shape (24, 4)", 'members 0 and 2 differ in 2 zeros',
         'one pruned model']),
    'a soup of nothing': (lambda: metrics.model_soup([]), ['metrics.model_soup', 'no members']),
    'a soup of more than everything': (
        lambda: metrics.model_soup([PARAMS, PARAMS], [0.5, 0.6]),
        ['metrics.model_soup', '[0.5, 0.6]', 'each of 2 members', 'sum to 1']),
    'a soup with a weight too few': (
        lambda: metrics.model_soup([PARAMS, PARAMS], [1.0]), ['metrics.model_soup', 'each of 2 members']),
    # Configurations.
    'unknown allocation': (
        lambda: from_config({'name': 'snip', 'allocation': 'erx'}),
        ['allocation.named', "'erx'", "Did you mean 'erk'", 'erdos_renyi, erk, global, lamp, uniform']),
    'unknown recipe': (
        lambda: from_config({'name': 'mdfg'}),
        ['recipes.from_config', "unknown recipe 'mdfg'", "Did you mean 'mdgf'", *sorted(recipes.TABLE)]),
    'no recipe': (lambda: from_config({'pattern': '2:4'}), ['recipes.from_config', 'unknown recipe None', 'asp, bdwp']),
    'unknown key': (
        lambda: from_config({'name': 'sr_ste', 'dacay': 0.1}),
        ['from_config', "'sr_ste'", "'dacay'", "Did you mean 'decay'", *sorted(recipes.arguments(recipes.sr_ste))]),
    'a key of another recipe': (
        lambda: from_config({'name': 'ste', 'decay': 0.1}),
        ["'ste'", "'decay'", 'Valid: allow_empty, axes, dense_steps']),
    'unknown schedule': (lambda: from_config({'name': 'mdgf', 'decay': {'name': 'liner', 'end': 5}}),
                         ['schedules.named', "'liner'", "Did you mean 'linear'", 'constant, cosine']),
    'unknown argument of a schedule': (
        lambda: from_config({'name': 'mdgf', 'decay': {'name': 'linear', 'stop': 5}}),
        ['schedules.named', "'linear'", "'stop'", 'begin, end']),
    'a schedule without a name': (
        lambda: from_config({'name': 'mdgf', 'decay': {'end': 5}}), ['mdgf', "{'name': 'linear'"]),
    'half an update': (lambda: from_config({'name': 'ste', 'dense_steps': 2.5}), ['dense_steps=2.5', 'fraction']),
    'a number in words': (
        lambda: from_config({'name': 'ste', 'dense_steps': '10%'}), ["dense_steps='10%'", 'fraction']),
    'globs that match nothing': (lambda: start(from_config({'name': 'ste', 'where': ['mlp/*']})), ['`where` picks no']),
    # Parameters, gradients and states that do not belong together.
    'no parameters': (
        lambda: recipes.ste(SGD).update(PARAMS, start(recipes.ste(SGD))),
        ['update needs the parameters', '\nupdates, opt_state = tx.update(grads, opt_state, params)']),
    'parameters of another shape': (
        lambda: update(recipes.ste(SGD), start(recipes.ste(SGD)), doubled(PARAMS), doubled(PARAMS)),
        ["'fc/kernel' of shape (16, 16)", 'does not belong', '(16, 8)', 'tx.init(params)']),
    'parameters of another model': (
        lambda: update(recipes.ste(SGD), start(recipes.ste(SGD)), {'x': PARAMS['fc']}, {'x': PARAMS['fc']}),
        ["'x/kernel' of shape (16, 8)", 'does not belong', 'not sparse', 'tx.init(params)']),
    'another choice of leaves': (
        lambda: update(recipes.ste(SGD, where=trees.named('fc/kernel')), start(recipes.ste(SGD))),
        ["'head/kernel'", '(not sparse)', 'does not belong', '(24, 4)', 'tx.init(params)']),
    'a dense leaf that is gone': (
        lambda: update(recipes.ste(SGD), start(recipes.ste(SGD)), *[without(PARAMS, 'fc', 'bias')] * 2),
        ['not of one structure', "differ in 'fc/bias'", 'tx.init(params)']),
    'gradients of another structure': (
        lambda: update(recipes.ste(SGD), grads=without(PARAMS, 'head')),
        ['gradients', 'not of one structure', "differ in 'head/kernel'"]),
    'gradients of another shape': (
        lambda: update(recipes.ste(SGD), grads=jax.tree.map(lambda g: g[:1], PARAMS)),
        ["'fc/kernel' of shape (16, 8)", 'its gradient has shape (1, 8)']),
    'a gradient that is None': (
        lambda: update(recipes.ste(SGD), grads=PARAMS | {'head': {'kernel': None}}),
        ["'head/kernel' of shape (24, 4)", 'its gradient is None']),
    'a function among the parameters': (
        lambda: recipes.ste(optax.adam(0.1)).init(PARAMS | {'act': jnp.tanh}), ["at 'act'", 'eqx.filter(model']),
    'shapes for parameters': (
        lambda: recipes.ste(SGD).init(jax.eval_shape(lambda: PARAMS)), ['jax.eval_shape(tx.init, params)']),
    'a loss that is no number': (
        lambda: recipes.snip(SGD, 0.5, loss=lambda params: params['fc']['kernel']).init(PARAMS),
        ['`loss`', 'returned float32[16, 8]', 'one floating number']),
    'a decay that ends above zero': (
        lambda: recipes.mdgf(SGD, decay=schedules.linear(0.0, 1.0, end=9)), ['is still 1', 'no weight would be zero']),
    'an allocation without a leaf': (
        lambda: recipes.set_(SGD, 0.5, total_steps=9, every=2, key=jax.random.key(0),
                             allocation=lambda leaves, sparsity, axes: {'fc/kernel': 0.5}).init(PARAMS),
        ['`allocation`', "missing: 'head/kernel'"]),
    'an allocation beyond one': (
        lambda: recipes.set_(SGD, 0.5, total_steps=9, every=2, key=jax.random.key(0),
                             allocation=lambda leaves, sparsity, axes: dict.fromkeys(leaves, 2.0)).init(PARAMS),
        ["'fc/kernel' of shape (16, 8)", '`allocation` gave it the sparsity 2.0']),
    'several keys': (
        lambda: recipes.random_pruning(SGD, 0.5, key=jax.random.split(jax.random.key(0), 3)), ['one PRNG key']),
    **{f'a score that is {what}': (
        lambda score=score: update(recipes.gradual_magnitude(SGD, 0.5, end=9, every=1, score=score)),
        ['`score`', f'returned {said}', 'for each entry'])
       for what, score, said in (('complex', lambda w, signals: w.astype(jnp.complex64), 'complex64[16, 8]'),
                                 ('a number', lambda w, signals: 1.0, '1.0'),
                                 ('a column', lambda w, signals: w[:, :1], 'float32[16, 1]'))},
    'a state of the optimizer alone': (
        lambda: update(recipes.ste(SGD), SGD.init(PARAMS)), ['the state is a tuple', 'SparseState', 'tx.init(params)']),
    'a state of a recipe without a master': (
        lambda: update(recipes.ste(SGD), start(recipes.asp(SGD))),
        ['made by asp of 2:4', 'is ste of 2:4', 'tx.init(params)']),
    'a state of a recipe with a master': (
        lambda: update(recipes.asp(SGD), start(recipes.ste(SGD))),
        ['made by ste of 2:4', 'is asp of 2:4', 'tx.init(params)']),
    'a state of the baseline': (
        lambda: update(recipes.ste(SGD), start(recipes.dense(SGD))), ["'fc/kernel'", 'not sparse', 'tx.init(params)']),
    'the point of parameters of another shape': (
        lambda: sparsejax.project(doubled(PARAMS), start(recipes.ste(SGD))),
        ["'fc/kernel' of shape (16, 16)", 'mask of shape (16, 8)', 'tx.init(params)']),
    'the point of other parameters': (
        lambda: sparsejax.project(without(PARAMS, 'head'), start(recipes.ste(SGD))),
        ["mask of 'head/kernel'", 'not among the parameters', "'fc/bias', 'fc/kernel'"]),
    'the masks of other parameters': (
        lambda: sparsejax.masks(without(PARAMS, 'head'), start(recipes.ste(SGD))),
        ["mask of 'head/kernel'", 'not among the parameters', "'fc/bias', 'fc/kernel'", 'tx.init(params)']),
    'the report of other parameters': (
        lambda: sparsejax.check(doubled(PARAMS), start(recipes.ste(SGD))),
        ["'fc/kernel' of shape (16, 16)", '(16, 8)']),
    'the point of an ensemble': (
        lambda: sparsejax.project(*[jax.vmap(f)(jax.tree.map(lambda w: w[None], PARAMS))
                                    for f in (lambda p: p, recipes.ste(SGD).init)]), ['made under jax.vmap']),
    'the point of coefficients that are arrays': (
        lambda: sparsejax.project(PARAMS, start(ARRAYS)), ['sparsejax.project', 'arrays', 'give numbers to the rec']),
    'no recipe in the state': (
        lambda: sparsejax.masks(PARAMS, SGD.init(PARAMS)),
        ['no SparseState', 'Wrap the optimizer in a recipe', 'sr_ste']),
    'a first mask of another shape': (
        lambda: start(recipes.fixed(SGD, jax.tree.map(lambda w: jnp.ones(3, bool), PARAMS))),
        ["'fc/bias' of shape (8,)", 'the tree holds bool[3]', 'Give bools of its shape']),
    'a loss that cannot run on a part of the tree': (
        lambda: start(optax.masked(recipes.snip(SGD, 0.5, loss=lambda p: p['head']['kernel'].sum() + p['fc']['kernel']),
                                   {'fc': False, 'head': True})),
        ['failed in `init`', "optax.masked or multi_transform hides 'fc'", 'TypeError', 'where=']),
    # Trees and axes that say nothing.
    'an empty tree': (lambda: start(recipes.ste(SGD), {}), ['`where` picks no parameter', 'holds no array', 'Pass']),
    'no numbers': (lambda: sparsejax.report({'kernel': jnp.ones((4, 4), jnp.int8)}),
                   ['report', 'picks no parameter', "No array is floating, but 'int8'"]),
    'axes that are a plain tuple': (
        lambda: start(recipes.ste(SGD, axes={'fc/kernel': (0,)})),
        ["'fc/kernel' of shape (16, 8)", 'says (0,)', 'no Axes', 'sj.types.Axes(contracted=']),
    # Configurations.
    'a configuration that is a list': (
        lambda: from_config(['ste']), ['recipes.from_config: `config` must be a mapping', "not ['ste']"]),
    'a name that is a list': (
        lambda: from_config({'name': ['ste']}), ['recipes.from_config: unknown recipe', 'Valid: asp']),
    'steps that are told twice': (
        lambda: from_config({'name': 'mdgf', 'total_steps': 5}),
        ['recipes.from_config', 'total_steps=5', 'total_steps=10', 'Leave it out of the configuration']),
    'fewer than no steps': (lambda: recipes.from_config(SGD, {'name': 'dense'}, total_steps=-1),
                            ['recipes.from_config: `total_steps` must be a number of updates', 'not -1']),
    'where as a number': (lambda: from_config({'name': 'ste', 'where': 3}), ['recipes.ste: `where` must be', 'not 3']),
    'an unknown argument of Adam': (
        lambda: from_config({'name': 'movement_pruning', 'score_optimizer': {'lr': 1}}),
        ['recipes.from_config', '`score_optimizer`', "'lr'", 'learning_rate']),
    # Arguments of tools.
    **{f'prune with {name}={value}': (
        lambda name=name, value=value: sparsejax.prune(*PRUNED, **{name: value}), [f'prune: `{name}` must be', 'not'])
       for name, value in (('memory_limit', -1), ('progress', True), ('workdir', __file__))},
    'a program that is none': (
        lambda: sparsejax.contractions(5, PARAMS), ['contractions: `apply` must be a function, not 5']),
    **{f'{name} with tokens={value}': (
        lambda call=call, value=value: call(tokens=value),
        [f'{name}: `tokens` must be a whole number', f'not {value!r}'])
       for name, call in (('advise', functools.partial(sparsejax.advise, PARAMS, '2:4')),
                          ('prepared', functools.partial(prepared, PARAMS))) for value in (0, 1.5, '1')},
}

FUNCTIONS = {
    'report': sparsejax.report, 'report, of a pattern': lambda p: sparsejax.check(p, NM(2, 4)),
    'prune': lambda p: sparsejax.prune(APPLY, p, *PRUNED[2:]),
    'prune_weights': lambda p: sparsejax.prune_weights(p, NM(2, 4)),
    'structured.cut': lambda p: sparsejax.structured.cut(UNITS, p),
    'pack': lambda p: sparsejax.formats.pack(p, NM(2, 4)),
    'io.save': lambda p: sparsejax.io.save('never.safetensors', p)}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_what_needs_numbers_refuses_parameters_without_values(name):
  """Raises for a traced parameter and for a mere shape, naming the function, the path and the shape."""
  call, shapes = FUNCTIONS[name], jax.eval_shape(lambda: PARAMS)
  for do in (functools.partial(jax.eval_shape, call, PARAMS), functools.partial(call, shapes)):
    with pytest.raises(ValueError, match=rf"^{name.partition(',')[0]}: .*'fc/.*' of shape \((16, )?8,?\).*") as refusal:
      do()
    assert re.search('traced|mere shape|ShapeDtypeStruct', str(refusal.value))


@pytest.mark.parametrize('what', REFUSALS)
def test_a_refusal_names_the_place_and_the_remedy(what):
  do, says = REFUSALS[what]
  with pytest.raises(ValueError) as refusal:
    do()
  text, at = str(refusal.value), 0
  for part in says:
    assert part in text[at:], f'{part!r} is not in {text[at:]!r}'
    at = text.index(part, at) + len(part)
  assert text[0] not in ' \n' and '<function' not in text and len(text) < 700


@pytest.mark.parametrize('make, params', [
    (lambda **options: recipes.static_sparse(
        SGD, 0.999, allocation=allocation.uniform, key=SIGNALS['key'], **options), PARAMS),
    (lambda **options: recipes.magnitude_at_init(SGD, 0.5, **options), LOUD)], ids=['by its share', 'by its mask'])
def test_an_empty_layer_may_be_asked_for(make, params):
  with pytest.raises(ValueError, match="'fc/kernel' of shape .16, 8.: .* keeps nothing of .*allow_empty=True"):
    make().init(params)
  kept = sparsejax.metrics.kept(sparsejax.masks(params, make(allow_empty=True).init(params)))
  assert kept['fc/kernel'] == 0


def test_nothing_is_refused_later_than_at_trace_time():
  """Raises the same refusals while `jit` traces, before the program runs."""
  tx = recipes.ste(SGD)
  with pytest.raises(ValueError, match=r"'fc/kernel' of shape \(18, 8\): 2:4 needs"):
    jax.eval_shape(tx.init, {'fc': {'kernel': jnp.ones((18, 8))}})
  with pytest.raises(ValueError, match='does not belong'):
    jax.jit(tx.update).lower(doubled(PARAMS), start(tx), doubled(PARAMS))


@pytest.mark.parametrize('name', recipes.TABLE)
def test_every_recipe_answers_unknown_keys_and_leaves_it_cannot_carry(name):
  valid = recipes.arguments(recipes.TABLE[name])
  with pytest.raises(ValueError, match=f"recipes.from_config: unknown key of recipe '{name}': 'wehre'"):
    from_config({'name': name, 'wehre': 1})
  if 'where' in valid:
    with pytest.raises(ValueError, match='`where` picks no parameter'):
      start(from_config({'name': name, 'where': 'nowhere'}))
  if 'pattern' in valid:
    with pytest.raises(ValueError, match=r"'kernel' of shape \(7, 4\)"):
      start(from_config({'name': name, 'pattern': '2:4'}), {'kernel': jnp.ones((7, 4))})
  if 'total_steps' in valid:
    with pytest.raises(ValueError, match='total_steps'):
      from_config({'name': name, 'dense_steps': 6, 'fine_tune_steps': 6})


def test_names_are_offered_closest_first_and_long_lists_are_cut():
  text = str(errors.unknown('f', 'thing', 'mdfg', ['sr_ste', 'mdgf', 'ste']))
  assert text == "f: unknown thing 'mdfg'. Did you mean 'mdgf'? Valid: mdgf, sr_ste, ste."
  assert str(errors.unknown('f', 'thing', 'x', [])) == "f: unknown thing 'x'. Valid: none."
  assert errors.some(map(str, range(14))) == ', '.join(f"'{i}'" for i in range(12)) + ', and 2 more'
  assert str(errors.at_leaf('f', 'a/b', np.ones((2, 3)).shape, 'no.')) == "f: parameter 'a/b' of shape (2, 3): no."
