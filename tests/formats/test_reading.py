"""Tests that files and checkpoints of other programs are read whatever their structure, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec
from raw import refused, same, sparse

from sparsejax import io


def test_anybodys_safetensors_file_is_read(tmp_path):
  """Tests that names are split at slashes, or else at dots, and that bfloat16 and float8 are read."""
  for mark in '/.':
    weight, bias = sparse(4, 4, dtype='bfloat16'), np.ones(2, 'float32')
    tensors = {f'model{mark}0{mark}weight': weight, f'head{mark}bias': bias}
    safetensors.numpy.save_file(tensors, tmp_path / 'f', {'format': 'pt'})
    expected = {'model': {'0': {'weight': weight}}, 'head': {'bias': bias}}
    assert same(io.read(tmp_path / 'f'), expected) and io.metadata(tmp_path / 'f') == {'format': 'pt'}
    assert same(io.read(tmp_path / 'f', item='head'), expected['head'])
    refused(tmp_path / 'f', 'not written by sparsejax')
  both = {'a': np.ones(1, 'float32'), 'a.b': np.ones(2, 'float32')}
  safetensors.numpy.save_file(both, tmp_path / 'f')
  assert same(io.read(tmp_path / 'f'), both)
  refused(tmp_path / 'f', "unknown item.*'c'.*Valid: a, a.b", call=lambda path: io.read(path, item='c'))
  refused(tmp_path / 'nowhere', 'does not exist', call=io.read)


def weights():
  sharding = NamedSharding(jax.make_mesh((8,), ('x',)), PartitionSpec('x'))
  return {'a': {'kernel': jax.device_put(sparse(16, 4, dtype='bfloat16'), sharding)}, 'b': [jnp.ones(3), jnp.zeros(2)]}


def train_state():
  return {'params': weights(), 'opt_state': (jnp.zeros(3), {'mu': jnp.ones(2)}), 'step': jnp.int32(7)}


def standard(folder, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, tree)


def managed(folder, steps, **items):
  with ocp.CheckpointManager(folder) as manager:
    for step in steps:
      save = {name: ocp.args.StandardSave(jax.tree.map(lambda leaf, step=step: leaf * leaf.dtype.type(step), tree))
              for name, tree in items.items()}
      manager.save(step, args=save['default'] if list(save) == ['default'] else ocp.args.Composite(**save))
    manager.wait_until_finished()


def interrupted(folder, **items):
  """Writes two complete steps, and the folders that a killed third step leaves behind."""
  managed(folder, (2, 10), **items)
  (folder / '11.orbax-checkpoint-tmp-1' / 'default').mkdir(parents=True)
  (folder / '12' / 'default').mkdir(parents=True)


ten = lambda tree: jax.tree.map(lambda leaf: leaf * leaf.dtype.type(10), tree)
CHECKPOINTS = {
    'parameters': (lambda f: standard(f, weights()), None, weights),
    'beside an optimizer': (lambda f: standard(f, train_state()), None, weights),
    'another part': (lambda f: standard(f, train_state()), 'opt_state', lambda: [jnp.zeros(3), {'mu': jnp.ones(2)}]),
    'Linen variables': (lambda f: standard(f, {'params': weights(), 'stats': {'m': jnp.ones(2)}}), None,
                        lambda: {'params': weights(), 'stats': {'m': jnp.ones(2)}}),
    'PyTreeCheckpointer': (lambda f: ocp.PyTreeCheckpointer().save(f, train_state()), None, weights),
    'the newest step': (lambda f: managed(f, (2, 10, 3), default=train_state()), None, lambda: ten(weights())),
    'the newest whole step': (lambda f: interrupted(f, default=weights()), None, lambda: ten(weights())),
    'one step of several': (lambda f: managed(f.parent, (10,), default=weights()), None, lambda: ten(weights())),
    'items': (lambda f: managed(f, (10,), params=weights(), state=train_state()), None, lambda: ten(weights())),
    'another item': (lambda f: managed(f, (10,), params={'w': jnp.ones(2)}, state=train_state()), 'state',
                     lambda: ten(weights())),
    'an item of another name': (lambda f: managed(f, (10,), state=train_state()), None, lambda: ten(weights())),
    'boxes of NNX': (lambda f: standard(f, {'a': {'kernel': {'value': jnp.ones((2, 2))}}}), None,
                     lambda: {'a': {'kernel': jnp.ones((2, 2))}}),
}


@pytest.mark.parametrize('save, item, expected', CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_orbax_checkpoints_are_read_without_their_structure(save, item, expected, tmp_path):
  folder = tmp_path / '10'
  save(folder)
  tree = io.read(folder, item)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
  assert same(tree, expected())


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # TensorStore gives up its reads.
@pytest.mark.parametrize('save, item, message', [
    (lambda f: managed(f, (10,), ema=weights(), state=weights()), None, "several items.*'ema', 'state'"),
    (lambda f: managed(f, (10,), params=weights()), 'ema', "unknown item.*'ema'.*Valid: a, b, params"),
    (lambda f: standard(f, train_state()), 'param', "'param'. Did you mean 'params'"),
    (lambda f: f.mkdir(), None, 'no complete Orbax checkpoint.*nothing'),
    (lambda f: (f / 'events').mkdir(parents=True), None, "no complete Orbax checkpoint.*'events'"),
    (lambda f: (standard(f, weights()), (f / '_METADATA').write_text('{')), None, 'may be damaged'),
    (lambda f: (standard(f, weights()), (f / 'manifest.ocdbt').unlink()), None, 'may be damaged'),
    (lambda f: (standard(f, weights()), [data.write_bytes(b'?') for data in f.glob('d/*')]), None, 'may be damaged'),
])
def test_an_ambiguous_or_damaged_checkpoint_is_refused(save, item, message, tmp_path):
  save(tmp_path / 'run')
  with pytest.raises(ValueError, match=f'(?s){message}') as refusal:
    io.read(tmp_path / 'run', item)
  assert str(tmp_path / 'run') in str(refusal.value)
