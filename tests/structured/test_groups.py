"""Tests groups: of programs whose groups are written down, what is pinned, the table, and what operations do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_programs import PROGRAMS, ints, params_of

import sparsejax as sj
from sparsejax.structured.rules import RULES

pytestmark = pytest.mark.usefixtures('standard_promotion')


def made(program):
  shapes, apply, inputs, groups = program()
  inputs = [jnp.asarray(x) if isinstance(x, np.ndarray) else ints(x, 99) for x in inputs]
  return apply, params_of(shapes), inputs, groups


def as_sets(groups):
  return sorted(repr([{name: sorted(unit[name]) for name in sorted(unit)} for unit in units]) for units in groups)


@pytest.mark.parametrize('program', PROGRAMS, ids=lambda program: program.__name__)
def test_the_groups_are_exactly_those_written_down_and_removal_is_exact(program):
  apply, params, inputs, expected = made(program)
  found = sj.structured.groups(apply, params, *inputs)
  assert as_sets(group.units for group in found.values()) == as_sets(
      [{name: at(i) for name, at in axes.items()} for i in range(n)] for n, axes in expected)
  if not found:
    assert found.pinned
    return
  every = [{name: np.arange(group.size) % 2 == 0} for name, group in found.items()]
  every.append({name: np.arange(group.size) % 2 == 1 for name, group in found.items()})
  cuts = [sj.structured.cut(found, params, keep) for keep in every]
  masks = [sj.structured.masks(found, keep) for keep in every]

  @jax.jit
  def results(params, smalls):
    masked = [jax.tree.map(lambda w, mask: jnp.where(mask, w, 0), params, mask) for mask in masks]
    return [(apply(w, *inputs), cut.apply(small, *inputs)) for w, cut, small in zip(masked, cuts, smalls)]

  for y, small in results(params, [cut.params for cut in cuts]):
    np.testing.assert_allclose(small, y, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(y))))


def test_the_table_has_groups_weights_members_and_reasons():
  apply, params, inputs, _ = made(PROGRAMS[0])
  found = sj.structured.groups(apply, params, *inputs)
  assert str(found).splitlines() == [
    'group  units  weights a unit  members', 'a:1        6               8  a:1 c:0 b:0',
    'pinned, it is an axis of input 0: a:0', 'pinned, it is an axis of the result: c:1']
  assert found['a:1'].units[2] == {'a:1': (2,), 'b:0': (2,), 'c:0': (2,)} and found['a:1'].weights == 4 + 1 + 3
  assert [member.side for member in found['a:1'].members] == ['produced', 'beside', 'contracted']
  with pytest.raises(ValueError, match="the units of 'a:0' may not go: it is an axis of input 0"):
    found['a:0']
  with pytest.raises(ValueError, match="unknown group 'a:2'.*Valid: a:1"):
    found['a:2']


def test_weights_of_a_unit_count_a_leaf_with_two_axes_once():
  apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p['i']) @ p['w']) @ p['w'] @ p['c']
  shapes = {'i': (3, 5), 'w': (5, 5), 'c': (5, 2)}
  group, = sj.structured.groups(apply, params_of(shapes), ints((2, 3), 1)).values()
  assert group.weights == 3 + 2 + 25 - 16


A, C = ints((4, 6), 0), ints((6, 3), 1)
REASONS = {
  'softmax': (jax.nn.softmax, 'reduce_max runs over it'),
  'sort': (lambda h: jnp.sort(h, -1), 'it is sorted'),
  'top_k': (lambda h: jax.lax.top_k(h, 6)[0], 'its largest entries are picked'),
  'cumsum': (lambda h: jnp.cumsum(h, -1), 'cumsum runs along it'),
  'reversed': (lambda h: h[:, ::-1], 'it is reversed'),
  'reciprocal': (lambda h: 1 / h, 'div of what is zero where a unit is removed is not finite'),
  'logarithm': (jnp.log, 'log of what is zero where a unit is removed is not finite'),
  'two passes': (lambda h: h - jnp.var(h, -1, keepdims=True), r'a sum runs over.*mean\(x\^2\) - mean\(x\)\^2'),
  'shift': (lambda h: h + jnp.sum(jnp.cos(h), -1, keepdims=True), 'a sum runs over what is not zero'),
  'mixed': (lambda h: h.reshape(3, 4).T.reshape(2, 6), 'it is reshaped across other factors'),
  'random': (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), 'random values depend on the shape'),
  'picked by data': (lambda h: h[:, jnp.array([1, 0, 3, 2, 5, 4])], 'its entries are looked up'),
  'unknown': (lambda h: jnp.fft.fft(h).real, 'the operation fft has no rule'),
  'written': (lambda h: h.at[:, 0].set(1.0), 'some of its entries are replaced')}


@pytest.mark.parametrize('name', REASONS)
def test_what_may_not_go_is_pinned_with_the_reason_and_the_place(name):
  between, why = REASONS[name]
  params = {'a': jax.ShapeDtypeStruct((4, 6), jnp.float32), 'c': jax.ShapeDtypeStruct((6, 3), jnp.float32)}
  found = sj.structured.groups(lambda p, x: between(x @ p['a']) @ p['c'], params, ints((2, 4), 1))
  assert not any(member.path == 'a' for group in found.values() for member in group.members)
  assert re.search(why, found.pinned['a:1'] + found.pinned.get('c:0', ''))
  assert [place.split()[0] for place in found.unread] == (['fft'] if name == 'unknown' else [])
  assert 'no rule: fft' in str(found) or name != 'unknown'


@pytest.mark.parametrize('within, layers', [
  (lambda h: h, 3), (lambda h: h + jnp.arange(6.0), None), (lambda h: h + np.arange(6, dtype=np.float32), None)])
def test_layers_of_a_stack_lose_units_of_their_own_unless_a_constant_tells_units_apart(within, layers):
  def apply(p, x):
    layer = lambda x, q: (x + jax.nn.relu(within(x @ q['a'])) @ q['c'], None)
    return jax.lax.scan(layer, x, p)[0]

  group, = sj.structured.groups(apply, params_of({'a': (3, 4, 6), 'c': (3, 6, 4)}), ints((5, 4), 1)).values()
  assert (group.size, group.layers) == (6, layers)


def test_a_rule_for_an_operation_is_one_line(monkeypatch):
  apply = lambda p, x: jax.lax.erf(x @ p['a']) @ p['c']
  params = {'a': A, 'c': C}
  monkeypatch.setitem(RULES, 'erf', None)
  assert not sj.structured.groups(apply, params, ints((2, 4), 1))
  monkeypatch.setitem(RULES, 'erf', RULES['tanh'])
  assert list(sj.structured.groups(apply, params, ints((2, 4), 1))) == ['a:1']


def test_a_parameter_that_nothing_uses_has_no_units():
  found = sj.structured.groups(lambda p, x: x @ p['a'], {'a': A, 'b': C}, ints((2, 4), 1))
  assert not found and found.pinned['b:0'] == 'the program does not use it'


def test_without_parameters_there_is_nothing_to_read():
  with pytest.raises(ValueError, match='structured.groups: `params` holds no array'):
    sj.structured.groups(lambda p, x: x, {}, A)
