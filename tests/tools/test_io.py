"""Tests that saved files are read bit for bit, altered files are refused, and nothing is written or read by halves."""

import errno
import hashlib
import itertools
import json
import os
import types
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from raw import ANYWHERE, refused, same, sparse

import sparsejax as sj
from sparsejax import formats, io
from sparsejax.io import bodies, folders, headers, saving


def params():
  return {
      'layers': [{'kernel': sparse(16, 4, dtype='bfloat16'), 'bias': np.ones(4, 'float32')},
                 {'kernel': sparse(2, 8, 3), 'bias': np.arange(3, dtype='float8_e4m3fn')}],
      'step': np.asarray(3, 'int32'), 'by_number': {7: np.asarray([True, False])}, 'none': np.zeros((0, 3), 'float16'),
      'free': {'kernel': sparse(8, 3, seed=1)}, 'rare': {'kernel': np.eye(24, dtype='float32')[:, ::-1][[0, 2, 23]]}}


def packed():
  patterns = {'free/*': 'bitmask', 'rare/*': 'relative_index', '**': '2:4'}
  stack = {'layers/1/kernel': sj.types.Axes((1,), (2,), layer=(0,))}
  return formats.pack(params(), patterns, where=sj.trees.matrices, axes=stack)


def contents(path):
  """Returns the metadata and the tensors of a safetensors file."""
  return headers.read(path).metadata, {name: tensor.read() for name, tensor in folders.of_part(path).items()}


@pytest.fixture
def path(tmp_path):
  """Returns the path of a file with every kind of leaf in it."""
  io.save(tmp_path / 'model.safetensors', packed(), metadata={'run': 'a "quoted" name'})
  return tmp_path / 'model.safetensors'


# Round trips.


class Pair(NamedTuple):
  w: object
  b: object


class Layer(eqx.Module):
  weight: jax.Array
  activation: str = eqx.field(static=True, default='relu')


@pytest.mark.parametrize('tree', [
    packed(), params(), {}, [], np.arange(3.0), {'a': [{'b': [np.ones(2)]}, np.zeros(1)]}, {'a/b': {'c': np.ones(2)}},
    {'w': jnp.asarray(sparse(4, 4))}, {'transposed': sparse(4, 8).T, 'big_endian': np.arange(3, dtype='>f4')},
], ids=['packed', 'dense', 'empty', 'empty list', 'one leaf', 'nested', 'slash in a key', 'jax', 'not contiguous'])
def test_a_tree_comes_back_as_it_was(tree, tmp_path):
  io.save(tmp_path / 'f', tree)
  back = io.load(tmp_path / 'f')
  assert same(back, tree) or not jax.tree.leaves(tree) and not jax.tree.leaves(back)
  assert same(io.load(tmp_path / 'f', like=tree), tree)
  assert os.listdir(tmp_path) == ['f']


@pytest.mark.sampled
@pytest.mark.parametrize('dtype', sorted(headers.CODES))
@pytest.mark.parametrize('pattern', [None, '2:4', *ANYWHERE])
def test_every_dtype_keeps_its_bits(dtype, pattern, tmp_path):
  raw = np.random.default_rng(0).integers(0, 2 if dtype == 'bool' else 256, (8, 3, np.dtype(dtype).itemsize), np.uint8)
  raw[2::4] = raw[3::4] = 0
  w = raw.view(dtype).reshape(8, 3)
  with jax.enable_x64(True):
    if pattern and dtype == 'complex64':
      return
    kinds = {None: lambda: w, '2:4': lambda: formats.NMArray.from_dense(w, 2, 4, 0)}
    io.save(tmp_path / 'f', {'w': kinds[pattern]() if pattern in kinds else ANYWHERE[pattern].from_dense(w)})
    back = formats.unpack(io.load(tmp_path / 'f'))['w']
  assert back.dtype == w.dtype and np.asarray(back).tobytes() == w.tobytes()


@pytest.mark.parametrize('tree', [
    Pair(sparse(4, 2), jnp.ones(2)), {'a': (sparse(4, 2), [jnp.ones(2)])}, Layer(jnp.ones((2, 4)))],
    ids=['NamedTuple', 'tuple', 'Equinox'])
def test_like_gives_back_any_structure(tree, tmp_path):
  """Tests dicts and lists without `like`, and the structure of `like` with it, which is dense, packed or shapes."""
  io.save(tmp_path / 'f', formats.pack(tree, 'bitmask'))
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
  for like in (tree, formats.pack(tree, 'bitmask'), shapes):
    back = io.load(tmp_path / 'f', like=like)
    assert same(back, formats.pack(tree, 'bitmask'))
    assert same(formats.unpack(back), jax.tree.map(jnp.asarray, tree))
  assert all(isinstance(container, (dict, list)) for container in jax.tree.leaves(
      [io.load(tmp_path / 'f')], is_leaf=lambda node: isinstance(node, (dict, tuple))))


def test_like_takes_an_nnx_state(tmp_path):
  nnx = pytest.importorskip('flax.nnx')
  state = nnx.state(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
  io.save(tmp_path / 'f', state)
  assert set(io.load(tmp_path / 'f')) == {'kernel', 'bias'}
  assert same(io.load(tmp_path / 'f', like=state), state)


def test_any_reader_opens_the_file(path):
  with safetensors.safe_open(path, framework='numpy') as opened:
    names = set(opened.keys())
    np.testing.assert_array_equal(opened.get_tensor('layers/0/kernel.indices'), packed()['layers'][0]['kernel'].indices)
    assert opened.get_tensor('layers/1/kernel.values').shape == (2, 4, 3)
    assert opened.get_slice('layers/0/kernel.values').get_dtype() == 'BF16'
    assert opened.metadata()['run'] == 'a "quoted" name' == io.metadata(path)['run']
  assert {'free/kernel.values', 'free/kernel.mask', 'rare/kernel.values', 'rare/kernel.gaps', 'layers/1/bias',
          'by_number/7', 'step'} <= names
  assert io.metadata(path) == {'run': 'a "quoted" name'}


def test_the_file_is_small(path, tmp_path):
  """Tests that a file has the tensors' bytes and a header, and that equal trees give equal files."""
  with open(path, 'rb') as file:
    header = int.from_bytes(file.read(8), 'little')
  assert os.path.getsize(path) == 8 + header + formats.nbytes(packed())
  io.save(tmp_path / 'again', packed(), metadata={'run': 'a "quoted" name'})
  assert (tmp_path / 'again').read_bytes() == path.read_bytes()


# Damage.


def test_a_byte_altered_anywhere_is_refused(path):
  """Tests two kinds of change in the length, the header, its padding and every tensor, for `load` and `read`."""
  whole = path.read_bytes()
  header = 8 + int.from_bytes(whole[:8], 'little')
  marks = [whole.index(mark) for mark in (b'__metadata__', b'sparsejax', b'"sha256"', b'version')]
  offsets = {*range(9), *range(9, header, 131), *range(header - 9, header), *range(header, len(whole), 41),
             *(mark + i for mark in marks for i in range(10)), len(whole) - 1}
  for offset in sorted(offsets):
    for flip in (0x01, 0x29):  # 0x29 makes a space a tab, which JSON accepts.
      altered = bytearray(whole)
      altered[offset] ^= flip
      path.write_bytes(altered)
      refused(path)
      if offset % 3 == 0:
        refused(path, call=io.read)
  path.write_bytes(whole)
  assert same(io.load(path), packed())


def test_an_altered_tensor_is_named(path):
  whole = bytearray(path.read_bytes())
  with open(path, 'r+b') as file:
    file.seek(len(whole) - 1)
    file.write(bytes([whole[-1] ^ 0x10]))
  header = json.loads(whole[8:8 + int.from_bytes(whole[:8], 'little')])
  last = max((name for name in header if name != '__metadata__'), key=lambda name: header[name]['data_offsets'])
  refused(path, f'tensor {last!r} was altered')


@pytest.mark.parametrize('length', [0, 1, 7, 8, 9, 200, -2000, -100, -1])
def test_a_truncated_file_is_refused(path, length):
  path.write_bytes(path.read_bytes()[:length])
  refused(path, 'truncated')
  refused(path, 'truncated', call=io.read)


def test_a_longer_file_is_refused(path):
  path.write_bytes(path.read_bytes() + b'\0')
  refused(path)


def test_a_tensor_taken_out_or_put_in_is_named(path):
  """Writes the file again by another program, which keeps the metadata."""
  metadata, before = contents(path)
  for change, message in ((lambda t: t.pop('free/kernel.mask'), "missing tensors: 'free/kernel.mask'"),
                          (lambda t: t.update(more=np.ones(2)), "not saved: 'more'")):
    tensors = {name: np.array(tensor) for name, tensor in before.items() if 'float8' not in tensor.dtype.name}
    tensors['layers/1/bias'] = before['layers/1/bias'].view(np.uint8)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata)
    refused(path, message)


def forge(path, change):
  """Writes a file with correct digests of contents that `change(about, tensors)` made wrong."""
  metadata, tensors = contents(path)
  about = json.loads(metadata['sparsejax'])
  change(about, tensors)
  data = {name: bytes(bodies.raw(tensor)) for name, tensor in tensors.items()}
  ends = itertools.accumulate(map(len, data.values()))
  places = {name: headers.Extent(tensors[name].dtype, tensors[name].shape, end - len(data[name]), end)
            for name, end in zip(data, ends)}
  digests = {name: hashlib.sha256(each).hexdigest() for name, each in data.items()}
  text = saving._header(about['leaves'], places, digests, {}, 0)
  path.write_bytes(len(text).to_bytes(8, 'little') + text + b''.join(data.values()))


def entry(about, path):
  return next(leaf for leaf in about['leaves'] if leaf['path'] == path)


KERNEL = 'layers/0/kernel'
FORGERIES = {
    'nothing': (None, lambda about, tensors: None),
    'indices out of order': (f"'{KERNEL}'.*strictly increasing", lambda about, tensors: tensors.update(
        {f'{KERNEL}.indices': tensors[f'{KERNEL}.indices'] ^ 0xFF})),
    'one index too many': (f"'{KERNEL}'.*groups of 2:4", lambda about, tensors: tensors.update(
        {f'{KERNEL}.indices': tensors[f'{KERNEL}.indices'][:-1]})),
    'values of another shape': (f"'{KERNEL}'.*groups of 2:4", lambda about, tensors: tensors.update(
        {f'{KERNEL}.values': tensors[f'{KERNEL}.values'].T})),
    'values of another dtype': (f"'{KERNEL}'.*float16", lambda about, tensors: tensors.update(
        {f'{KERNEL}.values': tensors[f'{KERNEL}.values'].view('float16')})),
    'another shape in the metadata': (KERNEL, lambda about, tensors: entry(about, KERNEL).update(shape=[16, 8])),
    'another axis': (KERNEL, lambda about, tensors: entry(about, KERNEL).update(axes=[1])),
    'no such axis': (f"'{KERNEL}'.*axes", lambda about, tensors: entry(about, KERNEL).update(axes=[2])),
    'n above m': (f"'{KERNEL}' cannot be 5:4", lambda about, tensors: entry(about, KERNEL).update(n=5)),
    'm too large': (f"'{KERNEL}' cannot be", lambda about, tensors: entry(about, KERNEL).update(m=4096)),
    'n is no number': ("has '2' in the place of a whole", lambda about, tensors: entry(about, KERNEL).update(n='2')),
    'a kind of the future': ("unknown kind, 'new'", lambda about, tensors: entry(about, KERNEL).update(kind='new')),
    'no kind': ('malformed', lambda about, tensors: entry(about, KERNEL).pop('kind')),
    'no keys': ('malformed', lambda about, tensors: entry(about, KERNEL).update(keys=None)),
    'a dense leaf of another shape': ("'step'.*shape", lambda about, tensors: entry(about, 'step').update(shape=[1])),
    'a bit behind the end': ("'free/kernel'.*mask has", lambda about, tensors: tensors.update(
        {'free/kernel.mask': tensors['free/kernel.mask'] | 0x80})),
    'a mask of another size': ("'free/kernel'.*takes a mask", lambda about, tensors: tensors.update(
        {'free/kernel.mask': tensors['free/kernel.mask'][:-1]})),
    'a gap that ends nowhere': ("'rare/kernel'.*gaps end 3 times.* for 3 values", lambda about, tensors: tensors.update(
        {'rare/kernel.gaps': np.append(tensors['rare/kernel.gaps'], np.uint8(255))})),
    'a gap too many': ("'rare/kernel'.*gaps end 4 times", lambda about, tensors: tensors.update(
        {'rare/kernel.gaps': np.append(tensors['rare/kernel.gaps'], np.uint8(0))})),
    'a gap too wide': ("'rare/kernel'.*reach place 74 of 72", lambda about, tensors: tensors.update(
        {'rare/kernel.gaps': tensors['rare/kernel.gaps'] + np.asarray([25, 0, 0], np.uint8)})),
    'gaps of another dtype': ("'rare/kernel'.*gaps int8", lambda about, tensors: tensors.update(
        {'rare/kernel.gaps': tensors['rare/kernel.gaps'].view('int8')})),
    'values for gaps in two axes': ("'rare/kernel'.*values .*do not belong", lambda about, tensors: tensors.update(
        {'rare/kernel.values': tensors['rare/kernel.values'][None]})),
    'parts of another kind': ('malformed.*mask', lambda about, tensors: entry(about, 'free/kernel').update(
        kind='relative_index')),
    'parts that are not there': ('malformed.*free/kernel.gaps', lambda about, tensors: entry(
        about, 'free/kernel').update(kind='relative_index', parts=['values', 'gaps'])),
    'axes of another rank': ("'free/kernel' has axes", lambda about, tensors: entry(about, 'free/kernel').update(
        roles={'contracted': [0], 'output': [1, 2], 'spatial': [], 'layer': [], 'source': 'given'})),
    'axes without a source': ('malformed.*source', lambda about, tensors: entry(about, 'free/kernel').update(
        roles={'contracted': [0], 'output': [1], 'spatial': [], 'layer': []})),
    'the same as no leaf': ("malformed.*'step2'", lambda about, tensors: about['leaves'].append(
        {'path': 'other', 'keys': [['dict', 'other']], 'same': 'step2'})),
}


@pytest.mark.parametrize('message, change', FORGERIES.values(), ids=FORGERIES)
def test_contents_that_save_never_writes_are_refused(path, message, change):
  forge(path, change)
  if message is None:
    assert same(io.load(path), packed())
  else:
    refused(path, f'(?s){message}')


def test_a_file_of_the_future_says_so(path, monkeypatch):
  monkeypatch.setattr(headers, 'VERSION', 3)
  forge(path, lambda about, tensors: None)
  monkeypatch.undo()
  refused(path, 'format version 3.*update')


@pytest.mark.parametrize('like, message', [
    (lambda: {**params(), 'more': np.ones(2)}, "Missing in the file: 'more'"),
    (lambda: {'step': np.asarray(3, 'int32')}, "missing in `like`:.*'layers/0/kernel'"),
    (lambda: {**params(), 'free': {'kernel': np.ones((3, 8), 'float32')}},
     r"'free/kernel' of shape \(3, 8\).*shape \(8, 3\) and dtype float32"),
    (lambda: {**params(), 'step': np.asarray(3.0, 'float32')}, "'step'.*float32.*int32")])
def test_another_tree_is_refused_by_its_first_difference(path, like, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    io.load(path, like=like())


def test_a_missing_file_is_an_os_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere: No such file'):
    io.load(tmp_path / 'nowhere')
  with pytest.raises(IsADirectoryError):
    io.load(tmp_path)


# Whatever is written can be read.


@pytest.mark.parametrize('tree', [
    {'': np.ones(2), 'b': {'': {'kernel': np.ones(2)}}}, {'a': {'': np.ones(2)}}, {'a': [None, [None, np.ones(2)]]},
    {-1: np.ones(2), 10**30: np.zeros(1)}, {'\x1b[31m\n': np.ones(2)}, {'value': {'value': np.ones(2)}},
    {'a/b': {'c.d': np.ones(2)}}, {'csc': formats.CSCArray.from_dense(np.zeros((64, 64), 'f4'))},
    {'gaps': formats.RelativeIndexArray.from_dense(np.zeros((0, 4), 'f4'))}, [[np.ones(2)] * 3]],
    ids=['empty keys', 'an empty last key', 'holes', 'numbers', 'control characters', 'value', 'marks in keys',
         'all zeros', 'no weights', 'tied'])
def test_strange_trees_come_back(tree, tmp_path):
  io.save(tmp_path / 'f', tree)
  assert same(io.load(tmp_path / 'f'), tree) and same(io.read(tmp_path / 'f'), tree)


def nested(depth):
  return np.ones(2) if not depth else {'a': nested(depth - 1)}


@pytest.mark.parametrize('tree, metadata, message', [
    (lambda: nested(headers.DEEPEST + 1), {}, 'more than 128 keys'), (lambda: {'a.' * 200: np.ones(2)}, {}, '128 keys'),
    (lambda: {'\ud800': np.ones(2)}, {}, 'surrogate'), (lambda: {'w': np.ones(2)}, {'a': '\ud800'}, 'surrogate'),
    (lambda: {'__metadata__': np.ones(2)}, {}, 'cannot be the path'),
    (lambda: [None] * 100_000 + [np.ones(2)], {}, 'places'),
    (lambda: {'w': formats.RelativeIndexArray(np.ones(0, 'f4'), np.ones(0, 'u1'), (10**5, 10**5))}, {}, 'stand for'),
    (lambda: {'w': np.ones(2)}, {'long': 'x' * 10**6}, 'bytes, more than')])
def test_what_could_not_be_read_is_refused_before_a_byte_is_written(tree, metadata, message, tmp_path, monkeypatch):
  monkeypatch.setattr(headers, 'LONGEST', 10**6)
  with pytest.raises(ValueError, match=f'io.save: .*{message}'):
    io.save(tmp_path / 'f', tree(), metadata=metadata)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('metadata', [{'sha256': 'f' * 64}, {'sparsejax': '0.3.1'}, {'sparsejax': '{}', 'sha256': ''}])
def test_another_programs_metadata_may_have_our_names(metadata, tmp_path):
  safetensors.numpy.save_file({'a.weight': np.ones(2)}, tmp_path / 'f', metadata)
  assert same(io.read(tmp_path / 'f'), {'a': {'weight': np.ones(2)}}) and io.metadata(tmp_path / 'f') == {}
  refused(tmp_path / 'f', 'not written by')


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'f')
  for call in (io.load, io.read, io.metadata):
    refused(tmp_path / 'f', 'a pipe or a device', call=call)


# Some leaves cannot be saved.


@pytest.mark.parametrize('tree, message', [
    ({'a': {'w': np.zeros(3, 'int4')}}, r"'a/w' of shape \(3,\): safetensors cannot hold dtype int4"),
    ({'f': lambda x: x}, "'f'.*object"),
    ({'a': 'text'}, "'a'.*<U4"),
    ({'key': lambda: jax.random.key(0)}, "'key'.*key_data"),
    ({'w': jax.ShapeDtypeStruct((2,), jnp.float32)}, "'w'.*no values"),
    ({'a/b': np.ones(2), 'a': {'b': np.ones(2)}}, "two leaves.*'a/b'"),
    ({'k': formats.BitmaskArray.from_dense(np.ones(3, 'float32')), 'k.values': np.ones(2)}, "two leaves.*'k.values'"),
    ({None: np.ones(2)}, 'None.*neither a string nor a whole number'),
    ({'w': formats.NMArray(jnp.ones((2, 3)), jnp.full((2, 3), 255, 'uint8'), 1, 4, (-2,), (8,))}, "'w'.*zero bits"),
])
def test_a_leaf_that_cannot_be_saved_is_named(tree, message, tmp_path):
  tree = {'key': jax.random.key(0)} if 'key' in tree else tree
  with pytest.raises(ValueError, match=f'(?s){message}'):
    io.save(tmp_path / 'f', tree)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('metadata', [{'sha256': 'x'}, {'n': 3}, {3: 'n'}])
def test_metadata_are_strings_under_keys_of_their_own(metadata, tmp_path):
  with pytest.raises(ValueError, match='metadata .*strings'):
    io.save(tmp_path / 'f', {}, metadata=metadata)


@pytest.mark.parametrize('moment', ['first write', 'last write', 'thread', 'flush', 'sync', 'replace', 'interrupt'])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, moment):
  """Tests a full disk at any moment, and Ctrl-C."""
  before, calls = path.read_bytes(), []
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def fail(*args, error=full, at=1, real=bodies.raw):
    calls.append(args)
    if len(calls) == at:
      raise error
    return real(*args)

  tensors = len(jax.tree.leaves(packed()))
  full_body = type('FullBody', (bodies.Body,), {'_flush': lambda self, written: fail(written)})
  targets = {'first write': ('raw', fail), 'last write': ('raw', lambda t: fail(t, at=tensors)),
             'thread': ('Body', full_body),
             'flush': ('os', types.SimpleNamespace(**{**vars(os), 'fsync': lambda f: fail(f, real=os.fsync)})),
             'sync': ('os', types.SimpleNamespace(**{**vars(os), 'fsync': fail})),
             'replace': ('os', types.SimpleNamespace(**{**vars(os), 'replace': fail})),
             'interrupt': ('raw', lambda t: fail(t, error=KeyboardInterrupt(), at=2))}
  monkeypatch.setattr(bodies, *targets[moment])
  monkeypatch.setattr(bodies, '_FLUSH', 1 if moment == 'flush' else bodies._FLUSH)
  with pytest.raises(KeyboardInterrupt if moment == 'interrupt' else OSError) as failure:
    io.save(path, packed())
  assert calls
  if moment != 'interrupt':
    assert failure.value.errno == errno.ENOSPC and f'cannot write {path}: No space left' in str(failure.value)
  assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def read_only(tmp_path):
  if os.geteuid() == 0:
    pytest.skip('the superuser may write everywhere')
  tmp_path.chmod(0o555)
  return tmp_path / 'f'


def below_a_file(tmp_path):
  (tmp_path / 'file').touch()
  return tmp_path / 'file' / 'f'


def a_circle(tmp_path):
  (tmp_path / 'file').symlink_to(tmp_path / 'file')
  return tmp_path / 'file'


def a_device(tmp_path):
  os.mkfifo(tmp_path / 'file')  # no regular file, like /dev/null, but harmless to replace
  return tmp_path / 'file'


@pytest.mark.parametrize('place, kind', [
    (read_only, PermissionError), (below_a_file, NotADirectoryError),
    (lambda tmp_path: tmp_path / 'no' / 'f', FileNotFoundError), (lambda tmp_path: tmp_path, ValueError),
    (a_device, ValueError), (a_circle, OSError), (lambda tmp_path: tmp_path / ('x' * 256), OSError)],
    ids=['read-only', 'below a file', 'no folder', 'a folder', 'a device', 'a circle of links', 'a long name'])
def test_a_place_that_cannot_be_written_is_named(place, kind, tmp_path):
  target = place(tmp_path)
  with pytest.raises(kind, match='io.save: '):
    io.save(target, params())
  assert not [name for name in os.listdir(tmp_path) if name != 'file']


def test_a_link_is_written_through_and_others_may_read(tmp_path):
  (tmp_path / 'target').touch()
  (tmp_path / 'link').symlink_to(tmp_path / 'target')
  io.save(tmp_path / 'link', params())
  assert (tmp_path / 'link').is_symlink() and same(io.load(tmp_path / 'target'), params())
  mask = os.umask(0o022)
  os.umask(mask)
  assert (tmp_path / 'target').stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path):
  io.save(tmp_path / ('x' * 255), params())
  assert same(io.load(tmp_path / ('x' * 255)), params())


# A whole network.


@pytest.mark.usefixtures('standard_promotion')  # optax's AdamW needs it
def test_the_file_of_a_frozen_network_is_a_fiftieth_and_the_seed_gives_the_rest(tmp_path):
  """Tests 99 % frozen weights in float32 and bfloat16, with a weight decay that would move frozen weights."""
  def first(seed):
    draw = np.random.default_rng(seed).standard_normal
    return {'a': {'kernel': jnp.asarray(draw((784, 300)), jnp.float32), 'bias': jnp.zeros(300)},
            'b': {'kernel': jnp.asarray(draw((300, 100)), jnp.bfloat16), 'bias': jnp.zeros(100)}}

  start = first(3)
  tx = sj.recipes.freeze_net(optax.adamw(0.1, weight_decay=0.1), 0.99)
  state, held = tx.init(start), start
  for seed in (4, 5, 6):
    moves, state = jax.jit(tx.update)(first(seed), state, held)
    held = optax.apply_updates(held, moves)
  mask = sj.masks(held, state)['a']['kernel']
  assert 0.5 < np.mean(held['a']['kernel'][mask] != start['a']['kernel'][mask])
  io.save(tmp_path / 'frozen.safetensors', formats.freeze_net_trained(held, state))
  assert (tmp_path / 'frozen.safetensors').stat().st_size < 0.02 * formats.nbytes(held)
  again = formats.unpack(io.load(tmp_path / 'frozen.safetensors'), first(3))
  assert jax.tree.structure(again) == jax.tree.structure(held)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(held)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
