"""Compares budgets of compiled programs with numbers computed by hand, and with the page `docs/scale.md`."""

import collections
import functools
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import patterns, planning, types
from sparsejax.programs import hlo

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
PAGE = (DOCS / 'scale.md').read_text()
TOY = {'layers': 3, 'width': 128, 'hidden': 256, 'heads': 2, 'kv_heads': 1, 'vocabulary': 64, 'sequences': 8,
       'length': 16}
pytestmark = pytest.mark.usefixtures('standard_promotion')  # optax's AdamW and the model need it


def mesh(**axes):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def abstract(shape, dtype, at, *spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(at, P(*spec)))


def test_traffic_of_every_collective_by_hand():
  """Tests groups of 4 and of 2 devices, and a scan of 5 steps that each sum 8 numbers."""
  at = mesh(a=2, b=4)

  def f(x):  # float32[8, 2] on each device, 64 bytes
    x = lax.psum_scatter(lax.all_gather(x, 'b', tiled=True), 'b', tiled=True)
    x = lax.all_to_all(lax.ppermute(x, 'b', [(0, 1), (1, 2), (2, 3), (3, 0)]), 'a', 0, 0, tiled=True)
    return lax.scan(lambda x, _: (jnp.tanh(lax.psum(x, 'a')) @ jnp.ones((2, 2)), None), x, None, length=5)[0]

  step = jax.jit(jax.shard_map(f, mesh=at, in_specs=P(('a', 'b')), out_specs=P(('a', 'b')), check_vma=False))
  found = planning.budget(step, [abstract((64, 2), jnp.float32, at, ('a', 'b'))])
  assert {each.kind: (each.group, each.times, each.sent) for each in found.collectives} == {
      'all-gather': (4, 1, 3 * 64), 'reduce-scatter': (4, 1, 3 * 64), 'collective-permute': (8, 1, 64),
      'all-to-all': (2, 1, 32), 'all-reduce': (2, 5, 64)}
  assert found.sent == found.sent_values == 192 + 192 + 64 + 32 + 5 * 64
  assert (found.devices, found.backend) == (8, 'cpu')
  assert re.search(r'^all-reduce +f32\[8,2\] +2 +5 +320 +320$', str(found), re.MULTILINE)
  assert re.search(r'^together +800 +800$', str(found), re.MULTILINE)


def test_a_loop_of_unknown_length_is_said_to_be_one_and_left_out_of_the_sum():
  at = mesh(a=8)

  def f(x):
    return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: lax.psum(x, 'a'), lax.psum(x, 'a'))

  step = jax.jit(jax.shard_map(f, mesh=at, in_specs=P('a'), out_specs=P(), check_vma=False))
  found = planning.budget(step, [abstract((8,), jnp.float32, at, 'a')])
  assert sorted((each.times or 0, each.sent) for each in found.collectives) == [(0, 7), (1, 7)] and found.sent == 7
  assert re.search(r'all-reduce .* \? +7 x \?', str(found)) and 'not in the sum' in str(found)


def test_a_branch_is_counted_as_the_most():
  at = mesh(a=8)

  def f(x):
    return lax.cond(x[0] > 0, lambda x: lax.psum(x, 'a'), lambda x: x * 2, x)

  step = jax.jit(jax.shard_map(f, mesh=at, in_specs=P(), out_specs=P(), check_vma=False))
  found = planning.budget(step, [abstract((8,), jnp.float32, at)])
  assert found.sent == 56 and 'at most 1' in str(found) and 'as if it always ran' in str(found)


PARAMS = {'mlp': {'kernel': ((64, 16), ('a',)), 'bias': ((16,), ())}}


def sparse_step(recipe, at, dtype=jnp.bfloat16):
  tx = recipe(optax.adamw(1e-3))
  is_pair = lambda node: isinstance(node, tuple)
  params = jax.tree.map(lambda each: abstract(each[0], dtype, at, *each[1]), PARAMS, is_leaf=is_pair)
  state = planning.abstract_state(tx, params)

  def step(params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return step, (params, state, params)


@pytest.mark.parametrize('recipe, extra, width', [
    (sj.recipes.dense, {}, 2), (sj.recipes.asp, {'masks': 128}, 2),
    (sj.recipes.sr_ste, {'masks': 128, 'master': 512}, 4)])
def test_state_by_hand_and_no_collective(recipe, extra, width):
  """Tests `[64, 16]` in 8 shards of 8 rows, 128 weights each, and a bias of 16 that is replicated on every device."""
  step, arguments = sparse_step(recipe, mesh(a=8))
  found = planning.budget(jax.jit(step), arguments)
  rows = {row.part: row.each for row in found.state}
  assert rows == {
      'params': 128 * 2 + 16 * 2, **{f'opt_state: {part}': size for part, size in extra.items()},
      'opt_state: inner optimizer': 2 * (128 * width + 16 * 2) + 4, 'opt_state: step, key, plan': 4 + 256,
      'grads': 128 * 2 + 16 * 2}
  assert {row.part: row.whole for row in found.state}['params'] == (64 * 16 + 16) * 2
  assert found.memory['arguments'] == sum(rows.values()), 'XLA counts as we do'
  assert found.collectives == () and found.sent == 0 and 'no collectives' in str(found)


def test_donated_state_is_not_held_twice():
  step, arguments = sparse_step(sj.recipes.sr_ste, mesh(a=8))
  kept = planning.budget(jax.jit(step), arguments)
  donated = planning.budget(jax.jit(step, donate_argnums=(0, 1)), arguments)
  assert kept.memory['outputs in place of arguments'] == 0
  held = sum(row.each for row in donated.state if row.part != 'grads')
  assert donated.memory['outputs in place of arguments'] == held


def test_a_jitted_a_lowered_and_a_compiled_step_are_one():
  step, arguments = sparse_step(sj.recipes.asp, mesh(a=8), jnp.float32)
  lowered = jax.jit(step).lower(*arguments)
  names = ('params', 'opt_state', 'grads')
  first, *others = (planning.budget(each, arguments, names) for each in (jax.jit(step), lowered, lowered.compile()))
  assert all(each == first for each in others)
  assert [row.part for row in planning.budget(lowered, arguments).state][0] == 'argument 0'


@pytest.mark.parametrize('recipe', [sj.recipes.asp, sj.recipes.sr_ste])
def test_the_abstract_state_is_what_init_makes(recipe):
  """Compares shapes and dtypes, and the shardings of an Explicit mesh, which JAX itself propagates."""
  at = jax.make_mesh((8,), ('a',), axis_types=(AxisType.Explicit,))
  _, (params, state, _) = sparse_step(recipe, at)
  with jax.set_mesh(at):
    held = jax.tree.map(lambda w: jax.device_put(jnp.zeros(w.shape, w.dtype), w.sharding), params)
    made = jax.jit(recipe(optax.adamw(1e-3)).init)(held)
  assert jax.tree.structure(made) == jax.tree.structure(state)
  for x, planned in zip(jax.tree.leaves(made), jax.tree.leaves(state)):
    assert (x.shape, x.dtype) == (planned.shape, planned.dtype)
    assert x.sharding.is_equivalent_to(planned.sharding, x.ndim)


def test_arguments_that_cannot_be_planned_are_named():
  at = mesh(a=8)
  with pytest.raises(ValueError, match=r"'x/w' of shape \(8,\).*no sharding.*ShapeDtypeStruct"):
    planning.budget(lambda x: x, [{'w': jax.ShapeDtypeStruct((8,), jnp.float32)}])
  two = [abstract((8,), jnp.float32, at), abstract((8,), jnp.float32, jax.make_mesh((1,), ('b',)))]
  with pytest.raises(ValueError, match='1, 8 devices'):
    planning.budget(lambda x, y: x, two)


# The page of the docs.


MATRICES = 3 * (128 * (256 + 128 * 2 + 256) + 3 * 128 * 256)  # weights of the three blocks


@functools.cache
def llama(recipe):
  return planning.of_program(str(DOCS / 'llama_70b.py'), 8, {'data': 2, 'fsdp': 4}, recipe=recipe, **TOY)


def times_by_kind(found):
  # The compiler combines operands in an order that other operations of the program decide.
  return sorted((each.kind, sorted(each.values), each.group, each.times) for each in found.collectives)


def test_n_m_sends_what_dense_sends_and_no_byte_more():
  """Tests the complete step, with a new mask, and parameters in four shards on two replicas."""
  dense, sparse = llama('dense'), llama('sr_ste')
  assert times_by_kind(dense) == times_by_kind(sparse) and dense.sent == sparse.sent > 0
  rows = {row.part: row for row in sparse.state}
  for part, width in (('masks', 1), ('master', 4)):
    row = rows[f'opt_state: {part}']
    assert row.each * 4 == row.whole == width * MATRICES


def test_a_global_threshold_sends_counts_and_channel_sums_only():
  added = _operands(llama('st3')) - _operands(llama('dense'))
  assert not _operands(llama('dense')) - _operands(llama('st3'))
  assert added and {kind for kind, _ in added} == {'all-reduce'}
  # A threshold sums one number a layer and output channel, and some counters for each bit of a score and each leaf.
  channels, counters = 3 * (4 * 128 + 3 * 256), 32 * 7
  assert sum(hlo.type_bytes(type_) * times for (_, type_), times in added.items()) <= 4 * (3 * channels + 4 * counters)


def _operands(found):
  """Returns how often each operand is sent, however the compiler combined the operands."""
  counts = collections.Counter()
  for each in found.collectives:
    for value in each.values:
      counts[each.kind, value] += each.times
  return counts


def test_the_model_gathers_each_weight_twice_and_scatters_its_gradient_once():
  """Counts bfloat16 values, which a CPU widens: gathers of the forward and of the checkpointed backward, and gradients.
  """
  found = llama('dense')
  stack, ends = MATRICES + 3 * 2 * 128, 2 * 64 * 128 + 128
  sent = {kind: sum(each.sent_values * each.times for each in found.collectives if (each.kind, each.group) == kind)
          for kind in (('all-gather', 4), ('reduce-scatter', 4), ('all-reduce', 2))}
  assert sent == {('all-gather', 4): 2 * (2 * stack + ends) * 3 // 4,
                  ('reduce-scatter', 4): 2 * (stack + ends) * 3 // 4, ('all-reduce', 2): 2 * (stack + ends) // 4}
  assert found.sent_values < 0.6 * found.sent


COMMANDS = re.findall(r'^sparsejax plan docs/llama_70b.py (.*)$', PAGE, re.MULTILINE)


def test_the_page_has_its_commands():
  assert len(COMMANDS) >= 4


@pytest.mark.parametrize('command', COMMANDS)
def test_state_on_the_page_is_that_of_its_command(command):
  """Tests the program of 70B parameters on a mesh without devices: shapes and shardings need none."""
  axes = {axis: int(n) for axis, n in re.findall(r'(\w+)=(\d+)', re.search(r'--mesh (\S+)', command)[1])}
  options = dict(re.findall(r'--set (\w+)=(\S+)', command))
  program = runpy.run_path(str(DOCS / 'llama_70b.py'))['program']
  _, arguments = program(AbstractMesh(tuple(axes.values()), tuple(axes)), **options)
  rows = planning.parts(arguments, ('params', 'opt_state', 'tokens'))
  assert f'{sum(row.each for row in rows):,}' in PAGE, 'together'
  for row in rows:
    if row.each > 2**20:
      assert f'{row.each:,}' in PAGE, row.part


def test_the_page_s_own_step_is_planned():
  (code,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
  namespace = {}
  exec(compile(code, 'scale.md', 'exec'), namespace)
  found = planning.budget(*namespace['program'](mesh(data=8), width=64))
  assert {row.part: row.each for row in found.state}['opt_state: masks'] == 64 * 64 // 8
  assert found.memory['outputs in place of arguments'] and found.collectives


ZERO = {'layers': 2, 'width': 128, 'rows': 64}


def test_zero_gathers_packed_weights_in_the_program_of_the_page():
  """Compares bytes with those by hand. Of three dense passes 2:4 in bfloat16 sends (2 * 0.5625 + 1) / 3, and
  (2 * 0.5625 + 0.5) / 3 with a fixed mask. Stage 3 holds an eighth of the parameters and of Adam's moments.
  """
  options = {'dense': {}, 'packed': {'gather': 'packed'}, 'kept': {'gather': 'packed', 'backward': 'kept'}}
  found = {name: planning.of_program(str(DOCS / 'zero.py'), 8, **ZERO, **each) for name, each in options.items()}
  dense = found['dense'].sent_values
  assert found['packed'].sent_values / dense == pytest.approx((2 * 0.5625 + 1) / 3)
  assert found['kept'].sent_values / dense == pytest.approx((2 * 0.5625 + 0.5) / 3)
  assert [row.whole // row.each for row in found['dense'].state] == [8, 7, 8]  # the count of Adam is on every device
  assert '| 0.708 |' in PAGE and '| 0.542 |' in PAGE


def zero_step(**options):
  """Returns the first moment of Adam after a step on two nodes of four devices, and the bytes sent by group size."""
  program = runpy.run_path(str(DOCS / 'zero.py'))['program']
  step, (params, state, x) = program(mesh(node=2, data=4), **ZERO, **options)
  compiled = step.lower(params, state, x).compile()
  sent = collections.Counter()
  for each in hlo.collectives(compiled.as_text()):
    sent[each.group] += each.sent_values * each.times
  rng, place = np.random.default_rng(0), lambda value, like: jax.device_put(value, like.sharding)
  w = jnp.asarray(rng.normal(size=params['w'].shape) / 8, jnp.bfloat16)
  w = jnp.where(patterns.NM(2, 4)(jnp.abs(w.astype(jnp.float32)), None, types.Axes((1,), (2,))), w, 0)
  zeros = jax.tree.map(lambda leaf: place(jnp.zeros(leaf.shape, leaf.dtype), leaf), state)
  x = place(jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16), x)
  _, state = compiled({'w': place(w, params['w'])}, zeros, x)
  return np.asarray(state[0].mu['w'].astype(jnp.float32)), sent


def test_copies_within_a_node_are_exact_and_quantized_gradients_nearly():
  """Compares bytes with those by hand: with a copy one of three passes is within the node. Codes have 8 or 4 bits."""
  (wanted, dense), (copied, packed), (rounded, plus) = (zero_step(**options) for options in (
      {}, {'gather': 'packed', 'copies': True}, {'backward': 'quantized', 'copies': True, 'gather': 'quantized'}))
  np.testing.assert_array_equal(copied, wanted)
  assert 0 < np.linalg.norm(rounded - wanted) < 0.2 * np.linalg.norm(wanted)
  one = dense[8] / 3  # of three passes of the dense stage; within a node 6 of 7 parts of a pass
  assert packed == {8: 1.5625 * one, 4: 0.5625 * one * 6 / 7}
  scales = 2 / ZERO['width'] * 8  # two bytes for each column of a shard of an eighth of the rows, per byte of a code
  assert plus[8] == one * 0.5 * (1 + scales)
  codes = 0.25 * one * (1 + 2 * scales) * 8 / 7  # of all gradients: 3 / 4 are sent within a node, then 1 / 2 of 1 / 4
  assert plus[2] == codes / 8 and plus[4] == 0.75 * codes + 0.5 * one * 6 / 7 * (1 + scales / 2)
  for number in ('8,257,536', '3,997,696', '| 0.399 |'):
    assert number in PAGE


def test_a_pipeline_is_planned_from_the_stage_of_a_file(capsys, tmp_path):
  asked = {'path': str(DOCS / 'zero.py'), 'devices': 1, 'options': {'width': 64, 'rows': 32}}
  assert planning._main({**asked, 'pipeline': {'stages': 4, 'microbatches': 8}}) == 0
  out = capsys.readouterr().out
  assert re.search(r'1F1B +[\d.e+]+ +27\.\d %', out) and 'ZB-H2' in out
  (tmp_path / 'none.py').write_text('')
  for wrong, why in (({'stages': 4}, 'says no microbatches'), ({'stages': 4, 'microbatches': 8, 'x': 1},
                     "unknown part of --pipeline 'x'")):
    assert planning._main({**asked, 'pipeline': wrong}) == 2 and why in capsys.readouterr().err
  none = {**asked, 'path': str(tmp_path / 'none.py'), 'pipeline': {'stages': 4, 'microbatches': 8}}
  assert planning._main(none) == 2 and 'has no function stage' in capsys.readouterr().err
