"""Tests that files are read leaf by leaf: sharded folders, tied arrays, and no more memory than one leaf takes."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from raw import refused, same, sparse

import sparsejax as sj
from sparsejax import formats, io
from sparsejax.io import headers, slots
from sparsejax.types import Axes

# Sharded folders.


PARTS = {'model-1-of-2.safetensors': {'a.weight': sparse(8, 8), 'a.bias': np.ones(8, 'float16')},
         'model-2-of-2.safetensors': {'b.weight': sparse(4, 8, dtype='bfloat16')}}
INDEX = 'model.safetensors.index.json'


def sharded(folder, index=None, parts=PARTS):
  """Writes the parts and their index, which `index` changes."""
  folder.mkdir()
  where = {name: part for part, tensors in PARTS.items() for name in tensors}
  for part, tensors in parts.items():
    safetensors.numpy.save_file(tensors, folder / part)
  text = json.dumps({'metadata': {'total_size': 1}, 'weight_map': where})
  (folder / INDEX).write_text(index(where, text) if index else text)
  return folder


def test_the_folder_of_a_sharded_checkpoint_is_one_tree(tmp_path):
  folder = sharded(tmp_path / 'model')
  expected = {'a': {'weight': sparse(8, 8), 'bias': np.ones(8, 'float16')},
              'b': {'weight': sparse(4, 8, dtype='bfloat16')}}
  assert same(io.read(folder), expected) and same(io.read(folder / INDEX), expected)
  assert same(io.read(folder, item='b'), expected['b'])
  leaf = io.stored(folder)['a']['weight']
  assert (leaf.shape, leaf.dtype, leaf.ndim, leaf.size) == ((8, 8), np.float32, 2, 64)
  assert [block.shape for block in leaf.blocks(3)] == [(3, 8), (3, 8), (2, 8)]
  assert np.array_equal(np.concatenate(list(leaf.blocks(3))), np.asarray(leaf))


def without(part):
  return {name: tensors for name, tensors in PARTS.items() if name != part}


def changed(**tensors):
  return PARTS | {'model-2-of-2.safetensors': PARTS['model-2-of-2.safetensors'] | tensors}


@pytest.mark.parametrize('parts, index, message', [
    (without('model-2-of-2.safetensors'), None, "'model-2-of-2.safetensors'.*missing, with the tensors 'b.weight'"),
    (changed(**{'a.bias': np.ones(2)}), None, "'a.bias' is in two parts, model-1-of-2.* and model-2-of-2"),
    (changed(more=np.ones(2)), None, 'missing in the index: .more .model-2-of-2'),
    (PARTS, lambda where, text: json.dumps({'weight_map': where | {'c': 'model-1-of-2.safetensors'}}),
     'Missing in the parts: .c .model-1-of-2'),
    (PARTS, lambda where, text: json.dumps({'weight_map': where | {'a.bias': 'model-2-of-2.safetensors'}}),
     'in another part: .a.bias .model-1-of-2.safetensors, not model-2'),
    (PARTS, lambda where, text: text.replace('"a.bias"', '"a.weight"'), "no index .*'a.weight' is there twice"),
    (PARTS, lambda where, text: text[:-9], 'no index'), (PARTS, lambda where, text: '{}', 'no index'),
    (PARTS, lambda where, text: '{"weight_map": {}}', 'must map'),
    (PARTS, lambda where, text: '{"weight_map": {"a.weight": "../a"}}', 'must map'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_folder_whose_parts_are_not_those_of_its_index_is_refused(parts, index, message, tmp_path):
  refused(sharded(tmp_path / 'model', index, parts), message, call=io.read)


def test_a_folder_without_an_index_holds_one_file(tmp_path):
  safetensors.numpy.save_file({'w': np.ones(2)}, tmp_path / 'model.safetensors')
  assert same(io.read(tmp_path), {'w': np.ones(2)})
  safetensors.numpy.save_file({'w': np.ones(2)}, tmp_path / 'other.safetensors')
  refused(tmp_path, "'model.safetensors', 'other.safetensors', and no index", call=io.read)
  for name in 'ab':
    (tmp_path / f'{name}.safetensors.index.json').write_text('{}')
  refused(tmp_path, "several indices.*'a.safetensors.index.json', 'b", call=io.read)


# Tied arrays and names.


def test_an_array_in_two_places_is_stored_once_and_comes_back_as_one(tmp_path):
  w, small = np.ones((64, 64), 'float32'), formats.pack({'kernel': sparse(64, 8)}, '2:4')['kernel']
  io.save(tmp_path / 'f', {'embed': w, 'head': [w], 'a': small, 'b': small, 'copy': w.copy()})
  with safetensors.safe_open(tmp_path / 'f', framework='numpy') as opened:
    assert set(opened.keys()) == {'embed', 'a.values', 'a.indices', 'copy'}
  for tree in (io.load(tmp_path / 'f'), io.load(tmp_path / 'f', like={
      'embed': w, 'head': [w], 'a': small, 'b': small, 'copy': w})):
    assert tree['embed'] is tree['head'][0] and tree['a'] is tree['b'] and tree['copy'] is not tree['embed']
  stored = io.stored(tmp_path / 'f')
  io.save(tmp_path / 'again', stored)
  assert (tmp_path / 'again').read_bytes() == (tmp_path / 'f').read_bytes()


def test_arrays_that_are_one_are_packed_once():
  w = sparse(64, 8)
  packed = formats.pack({'a': {'kernel': w}, 'b': {'kernel': w}}, '2:4')
  assert packed['a']['kernel'] is packed['b']['kernel']
  packed = formats.pack({'a': {'kernel': w}, 'b': {'kernel': w}}, {'a/*': '2:4', 'b/*': 'bitmask'})
  assert packed['a']['kernel'].kind != packed['b']['kernel'].kind


def test_two_tensors_of_one_name_are_refused(tmp_path):
  safetensors.numpy.save_file({'a': np.ones(2), 'b': np.zeros(2)}, tmp_path / 'f')
  data = (tmp_path / 'f').read_bytes()
  (tmp_path / 'f').write_bytes(data.replace(b'"b"', b'"a"'))
  for call in (io.read, io.load, io.metadata):
    refused(tmp_path / 'f', "'a' is there twice|not written", call=call)


# Files say what the axes of a packed leaf are.


AXES = {'given': Axes((1,), (2,), layer=(0,), source='given'), 'traced': Axes((1,), (2,), layer=(0,), source='traced')}
TREES = {'dict': lambda w: {'layers': {'kernel': w}}, 'list': lambda w: {'layers': [w]}, 'bare': lambda w: w,
         'tied': lambda w: {'a': {'kernel': w}, 'b': {'kernel': w}}}


def stack():
  """Returns a stack of matrices that are 1:4 along the rows, with equally many nonzeros in each."""
  w = np.zeros((2, 16, 8), 'float32')
  w[:, ::4] = np.random.default_rng(0).standard_normal((2, 4, 8))
  return w


@pytest.mark.sampled
@pytest.mark.parametrize('kind', formats.TABLE)
@pytest.mark.parametrize('tree', TREES)
@pytest.mark.parametrize('source', AXES)
def test_every_format_keeps_axes_and_their_source_in_every_container(kind, tree, source, tmp_path):
  pattern = {'nm': '1:4', 'block_sparse': sj.Block((4, 4))}.get(kind, kind)
  dense = TREES[tree](stack())
  axes = {name: AXES[source] for name in sj.trees.flatten(dense)[0]}
  packed = formats.pack(dense, pattern, where=lambda path, leaf: True, axes=axes)
  io.save(tmp_path / 'f', packed)
  back = io.load(tmp_path / 'f')
  assert same(back, packed) and same(formats.unpack(back), dense)
  for leaf in jax.tree.leaves(back, is_leaf=formats.is_packed):
    assert leaf.kind == kind and formats.axes_of(leaf) == AXES[source]
  leaves = jax.tree.leaves(io.stored(tmp_path / 'f'))
  assert all((leaf.shape, leaf.axes) == ((2, 16, 8), AXES[source]) for leaf in leaves)


def test_axes_follow_the_axes_in_front_that_come_and_go():
  packed = formats.pack({'kernel': stack()}, '1:4', axes={'kernel': AXES['given']})['kernel']
  assert formats.axes_of(jax.tree.map(lambda a: a[0], packed)) == Axes((0,), (1,), source='given')
  assert formats.axes_of(jax.tree.map(lambda a: a[None], packed)) == Axes((2,), (3,), layer=(0, 1), source='given')
  assert formats.axes_of(formats.NMArray.from_dense(stack(), 1, 4, 1)) is None


def test_files_of_version_1_are_read(tmp_path, monkeypatch):
  """Writes the file as version 1 did: no axes, no list of parts, and all index arrays of a `CSCArray`."""
  packed = {'a': formats.CSCArray.from_dense(stack(), axes=AXES['given']), 'b': formats.NMArray.from_dense(
      stack(), 1, 4, 1), 'c': np.ones(3)}
  monkeypatch.setattr(headers, 'VERSION', 1)
  monkeypatch.setattr(formats.CSCArray, 'in_files', formats.PackedArray.in_files)
  monkeypatch.setattr(json, 'dumps', lambda value, real=json.dumps, **kwargs: real(
      value | {'leaves': [{k: v for k, v in leaf.items() if k != 'parts'} for leaf in value['leaves']]}
      if 'leaves' in value else value, **kwargs))
  io.save(tmp_path / 'f', packed)
  monkeypatch.undo()
  text = headers.read(tmp_path / 'f').text
  assert b'parts' not in text and b'a.row_starts' in text and rb'version\": 1' in text
  assert same(io.load(tmp_path / 'f'), packed)


# Memory.


def peak(code, folder):
  """Returns the megabytes by which `code`, a Python program, raises its peak after it sets `before = peak()`."""
  program = ('import resource, sys\nfrom sparsejax import cli, io\n'
             'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n'
             f'{code}\nprint(peak() - before)')
  root = os.path.dirname(os.path.dirname(sj.__file__))
  done = subprocess.run([sys.executable, '-c', program], cwd=folder, capture_output=True, text=True, check=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root, 'MALLOC_ARENA_MAX': '2'})
  return float(done.stdout.split()[-1])


def test_commands_take_the_memory_of_one_leaf(tmp_path):
  """Runs each command on one tensor first, whose memory counts as that of the program, and then on thirty-two."""
  tensors = {f'layers.{i}.weight': np.ascontiguousarray(sparse(1024, 1024, seed=i).T) for i in range(32)}
  safetensors.numpy.save_file({'layers.0.weight': tensors['layers.0.weight']}, tmp_path / 'one')
  safetensors.numpy.save_file(tensors, tmp_path / 'all')
  largest = 4 * 1024**2 / 1e6
  grown = peak('run = lambda name: [cli.main([*command.split(), "--pattern", pattern]) for command, pattern in ('
               '(f"pack {name} out --force", "2:4"), (f"pack {name} out --force", "bitmask"), '
               '(f"check {name}", "2:4"))]\n'
               'assert not any(run("one"))\nbefore = peak()\nassert not any(run("all"))', tmp_path)
  assert grown < 1.3 * largest, f'{grown:.1f} MB more for 32 tensors of {largest:.1f} MB than for one'


# Checkpoints with an optimizer's state.


@pytest.mark.parametrize('others', [
    ['opt_state/0/mu/a/kernel', 'opt_state/0/nu/a/kernel', 'opt_state/0/v_row/a'], ['ema/a/kernel'],
    ['ema_params/a/kernel'], ['master/a/kernel'], ['a/kernel/exp_avg'], ['optimizer/state/3/exp_avg'],
    ['OptState/trace/a/kernel'], ['teacher/a/kernel']])
@pytest.mark.parametrize('root', ['', 'params/', 'model/'])
def test_what_an_optimizer_keeps_is_known_by_the_parameters_it_copies(others, root):
  shapes = {f'{root}a/kernel': (8, 8), f'{root}m/kernel': (4, 4), 'step': ()}
  others = [root + name if name.startswith('a/') else name for name in others]
  assert slots.left_out(shapes | dict.fromkeys(others, (8, 8))) == others
  dots = {name.replace('/', '.'): shape for name, shape in (shapes | dict.fromkeys(others, (8, 8))).items()}
  assert slots.left_out(dots) == [name.replace('/', '.') for name in others]


@pytest.mark.parametrize('shapes', [
    {'m/kernel': (8, 8), 'v/kernel': (8, 4)}, {'mask/kernel': (8, 8)}, {'opt_state/mu/kernel': (8, 8)}, {'ema': ()},
    {'encoder/ema/proj/kernel': (8, 8), 'decoder/kernel': (8, 8)}, {}])
def test_parameters_that_no_other_leaf_copies_are_parameters(shapes):
  assert slots.left_out(shapes) == []


# An optimizer's state says how its parameters are packed.


def trained(recipe, *arguments, **kwargs):
  params = {'mlp': {'kernel': jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32),
                    'bias': jnp.ones(8)}, 'head': {'kernel': jnp.ones((8, 4))}}
  state = recipe(optax.sgd(0.1), *arguments, where=sj.trees.named('mlp/kernel'), **kwargs).init(params)
  return sj.project(params, state), state


STATES = {'sr_ste': ({'pattern': sj.NM(1, 8)}, 'nm'), 'asp': ({'pattern': sj.NM(2, 4)}, 'nm'),
          'static_sparse': ({'sparsity': 0.9, 'key': jax.random.key(0)}, 'csc')}


@pytest.mark.parametrize('recipe', STATES)
def test_pack_reads_pattern_where_and_axes_from_the_state(recipe):
  arguments, kind = STATES[recipe]
  params, state = trained(getattr(sj.recipes, recipe), **arguments)
  packed = formats.pack(params, state=(state, ()))
  assert packed['mlp']['kernel'].kind == kind and packed['head']['kernel'] is params['head']['kernel']
  assert formats.axes_of(packed['mlp']['kernel']) == Axes((0,), (1,), source='convention')
  assert same(formats.unpack(packed), params)


def test_a_state_of_an_ensemble_packs_a_stack():
  params, _ = trained(sj.recipes.asp, sj.NM(2, 4))
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
  tx = sj.recipes.asp(optax.sgd(0.1), sj.NM(2, 4), where=sj.trees.named('mlp/kernel'))
  packed = formats.pack(stacked, state=jax.vmap(tx.init)(stacked))
  assert formats.axes_of(packed['mlp']['kernel']) == Axes((1,), (2,), layer=(0,), source='convention')
  assert same(formats.unpack(packed), stacked)


@pytest.mark.parametrize('call, message', [
    (lambda params, state: formats.pack(params, '2:4', state=state), 'either it or pattern'),
    (lambda params, state: formats.pack(params, state=state, axes={}), 'either it or pattern'),
    (lambda params, state: formats.pack(params, state=state, where=sj.trees.named('mlp/kernel')), 'either it'),
    (lambda params, state: formats.pack(params), 'give a pattern.*or an optimizer state'),
    (lambda params, state: formats.pack(params, state=optax.sgd(0.1).init(params)), 'no SparseState'),
    (lambda params, state: formats.pack({'other': params}, state=state), "'mlp/kernel' of shape .16, 8.*this path"),
    (lambda params, state: formats.pack(jax.tree.map(lambda w: w + 1, params), state=state), 'more than 2 nonzeros'),
    (lambda params, state: formats.pack(params, 'channel 0.5'), 'no format stores channel 0.5.*cut'),
    (lambda params, state: formats.pack(*trained(sj.recipes.freeze_net, 0.9)[:1], state=trained(
        sj.recipes.freeze_net, 0.9)[1]), 'frozen at their first values.*formats.freeze_net_trained'),
])
def test_a_state_and_a_pattern_that_do_not_pack_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(*trained(sj.recipes.asp, sj.NM(2, 4)))


def test_a_whole_model_is_packed_with_its_functions():
  model = {'kernel': sparse(8, 4), 'activation': jax.nn.relu, 'name': None}
  packed = formats.pack(model, '2:4')
  assert packed['activation'] is jax.nn.relu and packed['kernel'].kind == 'nm'
  assert formats.unpack(packed)['activation'] is jax.nn.relu


# Zeros anywhere are packed for products where that is smaller than dense.


@pytest.mark.parametrize('dtype, zeros, kind', [
    ('float32', 0.9, 'csc'), ('float32', 0.74, 'bitmask'), ('bfloat16', 0.9, 'csc'), ('bfloat16', 0.85, 'bitmask')])
def test_zeros_anywhere_take_the_format_of_a_product_if_it_is_smaller_than_dense(dtype, zeros, kind, tmp_path):
  w = np.random.default_rng(0).random((256, 128))
  w = np.where(w < zeros, 0, w).astype(dtype)
  for pattern in ('unstructured', f'unstructured {zeros}', sj.Unstructured()):
    packed = formats.pack({'kernel': w}, pattern)
    assert packed['kernel'].kind == kind and formats.nbytes(packed) < w.nbytes
  io.save(tmp_path / 'f', packed)
  stored = safetensors.numpy.load_file(tmp_path / 'f')
  smallest = min(formats.nbytes(formats.pack({'kernel': w}, each)) for each in ('bitmask', 'relative_index'))
  assert sum(tensor.nbytes for tensor in stored.values()) <= 1.2 * smallest
  assert formats.pack({'other': np.stack([w, w])}, 'unstructured')['other'].kind == 'bitmask'  # of unknown axes


# Orbax.


@pytest.fixture(scope='module')
def items(tmp_path_factory):
  """Returns the folder of a `CheckpointManager` with two steps of the items `params`, `averages` and a JSON."""
  ocp = pytest.importorskip('orbax.checkpoint')
  folder = tmp_path_factory.mktemp('items') / 'checkpoints'
  tree = {'a': {'kernel': sparse(4, 4)}}
  with ocp.CheckpointManager(folder) as manager:
    for step in (1, 2):
      manager.save(step, args=ocp.args.Composite(
          params=ocp.args.StandardSave(tree), averages=ocp.args.StandardSave({'a': {'kernel': np.ones((4, 4), 'f4')}}),
          epoch=ocp.args.JsonSave({'epoch': 1})))
    manager.wait_until_finished()
  return folder


@pytest.mark.parametrize('part', [
    'params', 'params/_METADATA', 'params/manifest.ocdbt', 'params/d', 'epoch', '_CHECKPOINT_METADATA',
    'averages/_METADATA'])
def test_without_a_part_an_orbax_checkpoint_is_refused_or_the_same(items, part, tmp_path):
  """Tests that no other item and no older step is read in the place of one that lost a part."""
  folder = tmp_path / 'checkpoints'
  shutil.copytree(items, folder)
  lost = folder / '2' / part
  shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
  if part.startswith('params'):
    refused(folder, "'params', which are incomplete" if part in ('params', 'params/_METADATA') else None, call=io.read)
    assert same(io.read(folder, 'averages'), {'a': {'kernel': np.ones((4, 4), 'f4')}})
  else:
    assert same(io.read(folder), {'a': {'kernel': sparse(4, 4)}})


@pytest.mark.parametrize('text', ['', '[' * 10**5, '{"tree_metadata": 3}', '{"tree_metadata": {"a": NaN}}'])
def test_orbax_metadata_that_is_none_is_refused(items, text, tmp_path):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(items, folder)
  (folder / '2/params/_METADATA').write_text(text)
  refused(folder, call=io.read)
